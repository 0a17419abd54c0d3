//! What a virtual machine is made of: the JSON of the Cloud Hypervisor API, as far as this VMM
//! has the hardware.

mod disk;
mod error;
mod mac;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::devices::virtio::mem::BLOCK_SIZE;
use crate::rate_limiter::RateLimiterConfig;
pub use disk::{BackingImage, DiskConfig, ImageType, MAX_DISK_QUEUES};
pub use error::ConfigError;
pub use mac::{MacAddress, ParseMacError};

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// vCPUs.
    #[serde(default)]
    pub cpus: CpusConfig,
    /// RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What to boot. A machine that goes on from a snapshot boots nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Disks, in the order in which the guest finds them (`vda` first).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// Network cards, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub net: Vec<NetConfig>,
    /// Entropy source.
    #[serde(default)]
    pub rng: RngConfig,
    /// Memory balloon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Serial port (COM1).
    #[serde(default)]
    pub serial: SerialConfig,
    /// Paravirtualized console. This VMM has none: the mode is always `Off`.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Socket device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
}

/// The most queues of one network card: eight pairs.
pub const MAX_NET_QUEUES: u16 = 16;

/// The fewest descriptors of a queue, enough for a request in several pieces.
pub const MIN_QUEUE_SIZE: u16 = 16;

/// The most descriptors of a queue. They bound what one guest can have under way.
pub const MAX_QUEUE_SIZE: u16 = 1024;

fn one_queue_pair() -> u16 {
    2
}

fn default_net_queue_size() -> u16 {
    256
}

fn validate_queue_size(size: u16) -> Result<(), ConfigError> {
    if (MIN_QUEUE_SIZE..=MAX_QUEUE_SIZE).contains(&size) && size.is_power_of_two() {
        Ok(())
    } else {
        Err(ConfigError::QueueSize { size })
    }
}

/// A network card, backed by a tap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the device in the API and in events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of an existing tap of the host. Either this or `fds` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Open descriptors of a tap with the flags `IFF_NO_PI` and `IFF_VNET_HDR`, one a queue pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fds: Option<Vec<RawFd>>,
    /// Address of the guest's card; a random locally administered one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Queues for frames, two for each pair: an even number, 2 to [`MAX_NET_QUEUES`]. More than
    /// one pair needs a tap that was made with several queues.
    #[serde(default = "one_queue_pair")]
    pub num_queues: u16,
    /// Descriptors of each queue: a power of two, [`MIN_QUEUE_SIZE`] to [`MAX_QUEUE_SIZE`].
    #[serde(default = "default_net_queue_size")]
    pub queue_size: u16,
    /// TCP segmentation may be left to the other side, in both directions.
    #[serde(default = "yes")]
    pub offload_tso: bool,
    /// UDP fragmentation may be left to the other side, in both directions, if the host can.
    #[serde(default = "yes")]
    pub offload_ufo: bool,
    /// Checksums may be left to the other side, in both directions. Segmentation needs it.
    #[serde(default = "yes")]
    pub offload_csum: bool,
    /// Limits for each direction, all queues together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            id: None,
            tap: None,
            fds: None,
            mac: None,
            num_queues: one_queue_pair(),
            queue_size: default_net_queue_size(),
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
            rate_limiter_config: None,
        }
    }
}

impl NetConfig {
    /// How many pairs of queues the card has.
    pub fn queue_pairs(&self) -> usize {
        usize::from(self.num_queues / 2)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let queues = self.num_queues;
        if !(2..=MAX_NET_QUEUES).contains(&queues) || !queues.is_multiple_of(2) {
            return Err(ConfigError::NetQueues { asked: queues });
        }
        validate_queue_size(self.queue_size)?;
        match (&self.tap, &self.fds) {
            (Some(_), None) => Ok(()),
            (None, Some(fds)) if fds.len() == self.queue_pairs() => Ok(()),
            (None, Some(fds)) => Err(ConfigError::TapDescriptors {
                given: fds.len(),
                pairs: self.queue_pairs(),
            }),
            _ => Err(ConfigError::Tap),
        }
    }
}

/// The socket device and its socket on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// Name of the device in the API and in events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Address of the guest, at least 3 (0 to 2 are reserved).
    pub cid: u32,
    /// UNIX socket that leads to the guest: a client sends `CONNECT <port>\n` and reads
    /// `OK <port>\n`. A guest that connects to port P of the host reaches the socket `<path>_P`.
    pub socket: PathBuf,
}

/// vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpusConfig {
    /// vCPUs that are online at boot, 1 to [`MAX_VCPUS`].
    pub boot_vcpus: u8,
    /// vCPUs that may come online later, at least `boot_vcpus`.
    pub max_vcpus: u8,
}

/// The most vCPUs of one machine.
pub const MAX_VCPUS: u8 = 32;

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
        }
    }
}

/// RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Size in bytes, a multiple of 1 MiB, at least [`MIN_MEMORY`].
    pub size: u64,
    /// Whether the host shall back it by transparent huge pages.
    #[serde(default = "yes")]
    pub thp: bool,
    /// How memory is plugged in while the machine runs.
    #[serde(default)]
    pub hotplug_method: HotplugMethod,
    /// How much memory can be plugged in, in bytes, a multiple of [`HOTPLUG_UNIT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    /// How much of it the guest shall plug in as soon as it can, in bytes, a multiple of
    /// [`BLOCK_SIZE`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplugged_size: Option<u64>,
}

/// How memory is plugged in while the machine runs.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum HotplugMethod {
    /// As memory modules. The default of the API, and not for a machine with memory to plug in.
    #[default]
    Acpi,
    /// By a virtio memory device.
    VirtioMem,
}

/// What Linux adds and removes as a whole, in machines with up to 64 GiB: 128 MiB.
pub const HOTPLUG_UNIT: u64 = 128 << 20;

/// The least RAM that a Linux guest with an initramfs boots in.
pub const MIN_MEMORY: u64 = 64 << 20;

/// The most RAM of one machine: far below the 46 physical address bits that guests are given,
/// and above any host that this VMM is meant for.
pub const MAX_MEMORY: u64 = 1 << 40;

fn yes() -> bool {
    true
}

impl Default for MemoryConfig {
    fn default() -> Self {
        Self {
            size: 512 << 20,
            thp: true,
            hotplug_method: HotplugMethod::default(),
            hotplug_size: None,
            hotplugged_size: None,
        }
    }
}

/// Memory balloon: takes memory from the running guest, and takes back what the guest has free.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// Memory that the guest gives up, in bytes; can be changed while it runs.
    pub size: u64,
    /// Whether the guest takes memory back by itself rather than run out of it.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether the guest reports memory that it does not use, for the host to take.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PayloadConfig {
    /// Kernel: an ELF `vmlinux` or a bzImage.
    pub kernel: PathBuf,
    /// Kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Initial RAM file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
}

/// Entropy source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngConfig {
    /// File that the random bytes come from.
    pub src: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self {
            src: PathBuf::from("/dev/urandom"),
        }
    }
}

/// Where the bytes of a serial port go.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// There is no such port.
    Off,
    /// The port is there; output is dropped.
    #[default]
    Null,
    /// The terminal that the VMM was started on, in raw mode.
    Tty,
    /// Output goes to a file.
    File,
}

/// Serial port (COM1).
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// Where its bytes go.
    pub mode: ConsoleMode,
    /// The file of mode `File`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// Paravirtualized console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// `Off`.
    pub mode: ConsoleMode,
}

impl Default for ConsoleConfig {
    fn default() -> Self {
        Self {
            mode: ConsoleMode::Off,
        }
    }
}

impl VmConfig {
    /// Checks everything that can be known before the machine is built, and that there is something
    /// for it to boot.
    ///
    /// # Errors
    /// The first thing found wrong, with what was expected.
    pub fn validate_for_boot(&self) -> Result<(), ConfigError> {
        self.validate()?;
        let payload = self.payload.as_ref().ok_or(ConfigError::NoPayload)?;
        readable("kernel", &payload.kernel)?;
        match &payload.initramfs {
            Some(initramfs) => readable("initramfs", initramfs),
            None => Ok(()),
        }
    }

    /// Checks everything that can be known before the machine is built.
    ///
    /// # Errors
    /// The first thing found wrong, with what was expected.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let CpusConfig {
            boot_vcpus: boot,
            max_vcpus: max,
        } = self.cpus;
        for asked in [boot, max] {
            if !(1..=MAX_VCPUS).contains(&asked) {
                return Err(ConfigError::Vcpus { asked });
            }
        }
        if max < boot {
            return Err(ConfigError::MaxVcpus { boot, max });
        }
        let size = self.memory.size;
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&size) || !size.is_multiple_of(1 << 20) {
            return Err(ConfigError::Memory { size });
        }
        self.memory.validate_hotplug()?;
        if let Some(balloon) = self.balloon.filter(|balloon| balloon.size > size) {
            return Err(ConfigError::Balloon {
                size: balloon.size,
                memory: size,
            });
        }
        for disk in &self.disks {
            readable("disk", &disk.path)?;
            disk.validate()?;
        }
        for card in &self.net {
            card.validate()?;
        }
        if let Some(vsock) = &self.vsock
            && (vsock.cid < 3 || vsock.cid == u32::MAX)
        {
            return Err(ConfigError::Cid { cid: vsock.cid });
        }
        if (self.serial.mode == ConsoleMode::File) != self.serial.file.is_some() {
            return Err(ConfigError::SerialFile);
        }
        if self.console.mode != ConsoleMode::Off {
            return Err(ConfigError::Console);
        }
        Ok(())
    }
}

impl MemoryConfig {
    fn validate_hotplug(&self) -> Result<(), ConfigError> {
        let size = self.hotplug_size.unwrap_or(0);
        if size > MAX_MEMORY - self.size || !size.is_multiple_of(HOTPLUG_UNIT) {
            return Err(ConfigError::HotplugSize { size });
        }
        if size > 0 && self.hotplug_method == HotplugMethod::Acpi {
            return Err(ConfigError::HotplugMethod);
        }
        let plugged = self.hotplugged_size.unwrap_or(0);
        if plugged > size || !plugged.is_multiple_of(BLOCK_SIZE) {
            return Err(ConfigError::HotpluggedSize {
                size: plugged,
                limit: size,
            });
        }
        Ok(())
    }
}

/// Fails early, and by name, on a file that the machine could not be built from.
fn readable(what: &'static str, path: &Path) -> Result<(), ConfigError> {
    OpenOptions::new()
        .read(true)
        // A FIFO would hold up the open until someone writes to it.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .and_then(|file| file.metadata())
        .and_then(|metadata| {
            if metadata.is_dir() {
                Err(io::ErrorKind::IsADirectory.into())
            } else if metadata.file_type().is_fifo() {
                Err(io::ErrorKind::NotSeekable.into())
            } else {
                Ok(())
            }
        })
        .map_err(|source| ConfigError::Path {
            what,
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_has_its_default() {
        let card: NetConfig = serde_json::from_str(r#"{"tap":"tap0"}"#).unwrap();
        let expected = NetConfig {
            tap: Some("tap0".to_owned()),
            ..NetConfig::default()
        };
        assert_eq!(card, expected);
        assert!(card.validate().is_ok());
    }

    #[test]
    fn what_holds_no_bytes_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        for path in [fifo.as_path(), directory.path(), Path::new("/nonexistent")] {
            let refused = readable("kernel", path);
            assert!(matches!(refused, Err(ConfigError::Path { .. })), "{path:?}");
        }
    }

    #[test]
    fn cards_that_cannot_be_are_refused() {
        let tap = || Some("tap0".to_owned());
        for num_queues in [0, 1, 3, 18] {
            let card = NetConfig {
                tap: tap(),
                num_queues,
                ..NetConfig::default()
            };
            assert!(matches!(
                card.validate(),
                Err(ConfigError::NetQueues { .. })
            ));
        }
        for (tap, fds) in [(None, None), (tap(), Some(vec![3]))] {
            let card = NetConfig {
                tap,
                fds,
                ..NetConfig::default()
            };
            assert!(matches!(card.validate(), Err(ConfigError::Tap)));
        }
        let card = NetConfig {
            fds: Some(vec![3]),
            num_queues: 4,
            ..NetConfig::default()
        };
        assert!(matches!(
            card.validate(),
            Err(ConfigError::TapDescriptors { given: 1, pairs: 2 })
        ));
    }

    #[test]
    fn memory_to_plug_in_has_a_method_and_whole_units() {
        let check = |method, size, plugged| {
            let memory = MemoryConfig {
                hotplug_method: method,
                hotplug_size: size,
                hotplugged_size: plugged,
                ..Default::default()
            };
            memory.validate_hotplug()
        };
        use HotplugMethod::{Acpi, VirtioMem};
        check(Acpi, None, None).unwrap();
        check(VirtioMem, Some(1 << 30), None).unwrap();
        check(VirtioMem, Some(1 << 30), Some(6 << 20)).unwrap();

        let refused = check(Acpi, Some(1 << 30), None);
        assert!(matches!(refused, Err(ConfigError::HotplugMethod)));
        for size in [1 << 20, MAX_MEMORY, u64::MAX] {
            let refused = check(VirtioMem, Some(size), None);
            assert!(matches!(refused, Err(ConfigError::HotplugSize { .. })));
        }
        for (size, plugged) in [
            (None, 2 << 20),
            (Some(1 << 30), 1 << 31),
            (Some(1 << 30), 1),
        ] {
            let refused = check(VirtioMem, size, Some(plugged));
            assert!(matches!(refused, Err(ConfigError::HotpluggedSize { .. })));
        }
    }
}
