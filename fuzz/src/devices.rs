//! Every kind of virtio device, and what the host does to it meanwhile.

use std::os::fd::OwnedFd;
use std::time::Instant;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{recv, send, socketpair};
use tempfile::TempDir;
use vm_memory::GuestAddress;
use vmm::config::{BalloonConfig, DiskConfig, NetConfig, RngConfig, VsockConfig};
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::balloon::Balloon;
use vmm::devices::virtio::block::Block;
use vmm::devices::virtio::mem::{BLOCK_SIZE, Mem};
use vmm::devices::virtio::net::{Net, Tap};
use vmm::devices::virtio::rng::Rng;
use vmm::devices::virtio::testing::REGIONS;
use vmm::devices::virtio::vsock::Vsock;
use vmm::events::EventStream;
use vmm::memory::GuestMemory;
use vmm::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

use crate::file::MemoryFile;
use crate::programs::Programs;

/// The size of a disk in bytes, and to which it may grow.
const DISK_SIZE: u64 = 1 << 20;

/// Where memory can be plugged in, and how much: enough for several blocks in several states.
const PLUGGABLE: u64 = 1 << 30;
const PLUGGABLE_SIZE: u64 = 8 * BLOCK_SIZE;

/// What a tap puts in front of every frame, in bytes.
const TAP_HEADER: usize = 12;

/// Uses a device of any kind.
pub trait Guest {
    /// Does with `device` and `host`, in a guest with `memory`, what the input says.
    ///
    /// # Errors
    /// The input ends in the middle of a step.
    fn attack(
        self,
        input: &mut Unstructured<'_>,
        memory: GuestMemory,
        device: impl VirtioDevice + 'static,
        host: Host,
    ) -> Result<()>;
}

/// Builds the device that the input asks for, and lets `guest` loose on it.
///
/// # Errors
/// The input ends in the middle of a step.
///
/// # Panics
/// The host has no resources left.
pub fn attack(input: &mut Unstructured<'_>, guest: impl Guest) -> Result<()> {
    let ram = REGIONS.map(|start| (GuestAddress(start), 1 << 20));
    let memory = || GuestMemory::from_ranges(&ram).unwrap();
    let kind = input.arbitrary::<u8>()? % 6;
    let options: u8 = input.arbitrary()?;
    let has = |bit: u8| options & 1 << bit != 0;
    match kind {
        0 => {
            let file = MemoryFile::new(&vec![0x5a; DISK_SIZE as usize]);
            let config = DiskConfig {
                readonly: has(0),
                sparse: !has(1),
                num_queues: 1 + u16::from(has(2)),
                queue_size: 16,
                rate_limiter_config: has(3).then(limits),
                ..DiskConfig::new(file.path())
            };
            let events = EventStream::new(Instant::now(), None);
            let files = Block::open(&config).unwrap();
            let block = Block::with_files("disk".to_owned(), &config, files, events).unwrap();
            guest.attack(input, memory(), block, Host::Disk(file))
        }
        1 => {
            let pairs = 1 + u16::from(has(0));
            let (taps, wires) = (0..pairs).map(|_| tap()).unzip();
            let config = NetConfig {
                num_queues: 2 * pairs,
                queue_size: 16,
                offload_csum: !has(1),
                rate_limiter_config: has(3).then(limits),
                ..NetConfig::default()
            };
            let net = Net::with_taps(taps, &config).unwrap();
            guest.attack(input, memory(), net, Host::Wires(wires))
        }
        2 => {
            let directory = tempfile::tempdir().unwrap();
            let config = VsockConfig {
                id: None,
                cid: 52,
                socket: directory.path().join("vsock"),
            };
            let vsock = Vsock::new(&config).unwrap();
            let host = Host::Programs(Programs::new(config.socket), directory);
            guest.attack(input, memory(), vsock, host)
        }
        3 => {
            // What comes out of a random source would make every run another one.
            let config = RngConfig {
                src: if has(0) { "/dev/null" } else { "/dev/zero" }.into(),
            };
            guest.attack(input, memory(), Rng::new(&config).unwrap(), Host::Idle)
        }
        4 => {
            let config = BalloonConfig {
                size: 1 << 20,
                deflate_on_oom: has(0),
                free_page_reporting: !has(1),
            };
            guest.attack(input, memory(), Balloon::new(&config, 3 << 20), Host::Idle)
        }
        _ => {
            let mut regions = ram.to_vec();
            regions.push((GuestAddress(PLUGGABLE), PLUGGABLE_SIZE as usize));
            let memory = GuestMemory::from_ranges(&regions).unwrap();
            let requested = u64::from(options) % (PLUGGABLE_SIZE / BLOCK_SIZE) * BLOCK_SIZE;
            let mem = Mem::new(GuestAddress(PLUGGABLE), PLUGGABLE_SIZE, requested);
            guest.attack(input, memory, mem, Host::Idle)
        }
    }
}

/// Tight enough for a few requests to have to wait, and over so soon that waiting can end.
fn limits() -> RateLimiterConfig {
    let bucket = |size| {
        Some(TokenBucketConfig {
            size,
            one_time_burst: None,
            refill_time: 1,
        })
    };
    RateLimiterConfig {
        bandwidth: bucket(4096),
        ops: bucket(4),
    }
}

/// A tap, and the other end of it.
fn tap() -> (Tap, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (tap, wire) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Tap::fake(tap), wire)
}

/// The host's side of a device.
pub enum Host {
    /// Has nothing to do with it.
    Idle,
    /// Holds the image.
    Disk(MemoryFile),
    /// Sends and receives frames.
    Wires(Vec<OwnedFd>),
    /// Runs programs that use the socket device.
    Programs(Programs, TempDir),
}

impl Host {
    /// Does one thing.
    ///
    /// # Errors
    /// The input ends in the middle of it.
    pub fn act(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match self {
            Self::Idle | Self::Disk(_) => Ok(()),
            Self::Wires(wires) => {
                let wire = input.choose(wires)?;
                let length = TAP_HEADER + 1 + usize::from(input.arbitrary::<u16>()? % 4096);
                // The wire may be full.
                let _ = send(wire, &vec![0; length], SendFlags::empty());
                let mut buffer = [0; 64];
                for wire in wires {
                    let mut take = || recv(&*wire, &mut buffer[..], RecvFlags::empty());
                    while take().is_ok_and(|(_, length)| length > 0) {}
                }
                Ok(())
            }
            Self::Programs(programs, _) => programs.act(input),
        }
    }
}
