//! What is said of a configuration that describes no possible machine.

use std::path::PathBuf;

use super::{
    HOTPLUG_UNIT, MAX_DISK_QUEUES, MAX_MEMORY, MAX_NET_QUEUES, MAX_QUEUE_SIZE, MAX_VCPUS,
    MIN_MEMORY, MIN_QUEUE_SIZE,
};
use crate::devices::virtio::mem::BLOCK_SIZE;
/// Why a [`VmConfig`] describes no machine that this VMM can build.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Bad number of vCPUs.
    #[error("{asked} vCPUs asked for; a machine has 1 to {MAX_VCPUS}")]
    Vcpus {
        /// The number asked for.
        asked: u8,
    },
    /// `max_vcpus` below `boot_vcpus`.
    #[error("max_vcpus ({max}) is below boot_vcpus ({boot})")]
    MaxVcpus {
        /// `boot_vcpus`.
        boot: u8,
        /// `max_vcpus`.
        max: u8,
    },
    /// Bad memory size.
    #[error(
        "{size} bytes of memory asked for; a machine has {} MiB to {} GiB, in steps of 1 MiB",
        MIN_MEMORY >> 20,
        MAX_MEMORY >> 30
    )]
    Memory {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// Memory to plug in, and no way to.
    #[error(
        "memory hotplug_method Acpi: this VMM has no memory modules to plug in; use VirtioMem \
         (virtio-mem on the command line)"
    )]
    HotplugMethod,
    /// Bad size of what can be plugged in.
    #[error(
        "memory hotplug_size {size}: a machine has up to {} GiB of memory in all, and what can \
         be plugged in comes in steps of {} MiB",
        MAX_MEMORY >> 30,
        HOTPLUG_UNIT >> 20
    )]
    HotplugSize {
        /// The size asked for, in bytes.
        size: u64,
    },
    /// Bad size of what is plugged in at the start.
    #[error(
        "memory hotplugged_size {size}: possible are up to hotplug_size ({limit}) bytes, in steps \
         of {} MiB",
        BLOCK_SIZE >> 20
    )]
    HotpluggedSize {
        /// The size asked for, in bytes.
        size: u64,
        /// How much can be plugged in, in bytes.
        limit: u64,
    },
    /// The balloon is larger than the memory.
    #[error("a balloon of {size} bytes asked for; the machine has {memory} bytes of memory")]
    Balloon {
        /// The size asked for, in bytes.
        size: u64,
        /// Size of the memory, in bytes.
        memory: u64,
    },
    /// A path that leads to nothing usable.
    #[error("cannot read the {what} {path}", path = path.display())]
    Path {
        /// What the path is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What the host says.
        source: std::io::Error,
    },
    /// Disk serial number too long.
    #[error("disk serial {serial:?} is longer than 20 bytes")]
    DiskSerial {
        /// The serial number.
        serial: String,
    },
    /// Bad number of queues of a disk.
    #[error("a disk with {asked} queues asked for; one has 1 to {MAX_DISK_QUEUES}")]
    DiskQueues {
        /// The number asked for.
        asked: u16,
    },
    /// Bad number of queues of a card.
    #[error(
        "a network card with {asked} queues asked for; one has two for each pair, 2 to {MAX_NET_QUEUES}"
    )]
    NetQueues {
        /// The number asked for.
        asked: u16,
    },
    /// Bad queue size.
    #[error(
        "queue_size {size} asked for; expected a power of two, {MIN_QUEUE_SIZE} to {MAX_QUEUE_SIZE}"
    )]
    QueueSize {
        /// The size asked for.
        size: u16,
    },
    /// No tap, or two ways to one.
    #[error("a network card needs either the name of its tap or its open descriptors")]
    Tap,
    /// Too few or too many descriptors.
    #[error("{given} descriptors of a tap for {pairs} pairs of queues; expected one for each pair")]
    TapDescriptors {
        /// How many were given.
        given: usize,
        /// How many pairs there are.
        pairs: usize,
    },
    /// Reserved vsock address.
    #[error("vsock cid {cid} is reserved; a guest's is 3 to 4294967294")]
    Cid {
        /// The address asked for.
        cid: u32,
    },
    /// More devices than interrupt lines.
    #[error("{count} virtio devices asked for; a machine has at most {max}")]
    Devices {
        /// The number asked for.
        count: usize,
        /// The limit.
        max: usize,
    },
    /// A disk's images are given in two ways, or to one that has none.
    #[error(
        "disk: backing names the images that a qcow2 image builds on; a raw image has none, and \
         backing_files would look for them in the image"
    )]
    DiskBacking,
    /// Nothing to boot.
    #[error(
        "the payload is missing: a machine that does not go on from a snapshot has a kernel to boot"
    )]
    NoPayload,
    /// The serial port's file is missing or superfluous.
    #[error("serial: mode File needs a file, and no other mode takes one")]
    SerialFile,
    /// A console device was asked for.
    #[error("console: this VMM has no virtio console; use the serial port and set the mode Off")]
    Console,
}
