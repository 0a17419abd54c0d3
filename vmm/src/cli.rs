//! The command line: flags named as in Cloud Hypervisor, turned into a [`VmConfig`].

mod options;
mod values;

use std::fs::File;
use std::os::fd::{FromRawFd, RawFd};
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};

use crate::api::ApiTarget;
use crate::config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig,
    RngConfig, SerialConfig, VmConfig, VsockConfig,
};
use crate::control::request::{Changes, Restore};
use crate::sandboxing::JailConfig;
use crate::snapshot::RestoreConfig;
use values::{
    parse_api_target, parse_balloon, parse_console, parse_cpus, parse_disk, parse_event_target,
    parse_jail, parse_memory, parse_net, parse_restore, parse_rng, parse_serial, parse_vsock,
};

/// Boots Linux in a virtual machine of its own.
///
/// With --serial tty the terminal belongs to the guest: Ctrl-A x ends the machine.
///
/// Exit status: 0 the guest powered off, or the host asked the VMM to end; 1 the VMM failed;
/// 2 the configuration is wrong; 10 the guest rebooted; 11 the guest's kernel panicked;
/// 12 the guest caused a triple fault.
#[derive(Debug, Parser)]
#[command(
    name = "vmm",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    group = ArgGroup::new("origin").args(["kernel", "restore"])
)]
pub struct Cli {
    /// What to do instead of booting.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What to boot.
    #[command(flatten)]
    pub boot: BootArgs,
}

/// What the program does besides booting.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tells whether this machine's KVM runs Linux guests, and if not, why and what to do.
    ///
    /// Exit status: 0 usable, 1 not usable.
    Doctor {
        /// Print the findings as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Merges qcow2 images that lie one on top of the other into one that takes the place of all of
    /// them. What is beneath the lowest is not read, and shows through where it did.
    ///
    /// Exit status: 0 merged, 1 not merged, 2 wrong arguments.
    MergeDisk(MergeArgs),
}

/// What to merge.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Size of the disk in bytes, which all of the images have.
    #[arg(long, value_name = "BYTES")]
    pub size: u64,
    /// An image, topmost first: an inherited descriptor above 2 that can be read.
    #[arg(long = "layer", value_name = "FD", required = true, value_parser = clap::value_parser!(i32).range(3..))]
    pub layers: Vec<RawFd>,
    /// The empty file for the new image: an inherited descriptor above 2 that can be read and written.
    #[arg(long, value_name = "FD", value_parser = clap::value_parser!(i32).range(3..))]
    pub output: RawFd,
    /// Jail the process first, as a VMM [=uid=N][,gid=N][,cgroup=DIR].
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "",
        value_parser = parse_jail)]
    pub jail: Option<JailConfig>,
}

impl MergeArgs {
    /// The images, topmost first, and the file for the new one.
    ///
    /// # Errors
    /// One of the descriptors is not open.
    pub fn open(&self) -> std::io::Result<(Vec<File>, File)> {
        let layers = self.layers.iter().map(|fd| inherited(*fd));
        Ok((layers.collect::<Result<_, _>>()?, inherited(self.output)?))
    }
}

/// A descriptor that the process inherited, and nobody it starts will.
fn inherited(fd: RawFd) -> std::io::Result<File> {
    // SAFETY: F_SETFD takes a number and writes to no memory; it fails on a descriptor that is not
    // open.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor is open, and whoever started this process gave it away for this
    // purpose.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// What to boot, and how.
#[derive(Debug, Args)]
pub struct BootArgs {
    /// Kernel: an ELF vmlinux or a bzImage.
    #[arg(long, value_name = "PATH", required_unless_present_any = ["api_socket", "restore"])]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system.
    #[arg(long, requires = "kernel", value_name = "PATH")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    #[arg(
        long,
        requires = "kernel",
        value_name = "TEXT",
        default_value = "console=ttyS0 panic=1"
    )]
    pub cmdline: String,
    /// Go on from a snapshot instead of booting: source_url=file:///DIR
    /// [,base_url=[file:///DIR,...]: the snapshots that it is based on, nearest first]
    /// [,config=snapshot|flags][,resume=on|off]
    /// [,prefault=on|off|working-set: read all memory at once, or the pages that machines touch first]
    /// [,verify=on|off: compare the checksum of all memory].
    ///
    /// With config=snapshot, the default, the machine is the one that the snapshot is of, and
    /// --disk, --net, --vsock and --serial, if they are given, take the place of its own. With
    /// config=flags the flags say all of it, as for a boot, and nothing that the snapshot says of
    /// paths is read.
    #[arg(long, value_name = "OPTIONS", value_parser = parse_restore)]
    pub restore: Option<RestoreArgs>,
    /// vCPUs: boot=N[,max=N], 1 to 32 [default: boot=1].
    #[arg(long, requires = "origin", value_name = "OPTIONS", value_parser = parse_cpus)]
    pub cpus: Option<CpusConfig>,
    /// RAM [default: size=512M]: size=N[K|M|G], in steps of 1 MiB [,thp=on|off: huge pages, on by default]
    /// [,hotplug_method=virtio-mem,hotplug_size=N: what can be plugged in later, in steps of
    /// 128 MiB[,hotplugged_size=N: what of it is plugged in at once]].
    #[arg(long, requires = "origin", value_name = "OPTIONS", value_parser = parse_memory)]
    pub memory: Option<MemoryConfig>,
    /// Disk: path=PATH[,readonly=on|off][,image_type=raw|qcow2][,backing_files=on|off]
    /// [,backing=[TYPE:PATH,...]: the images that a qcow2 image builds on, nearest first, whatever
    /// it says of them][,id=NAME][,serial=TEXT][,num_queues=N][,queue_size=N][,direct=on|off][,sparse=on|off]
    /// and rate limits. May be given several times.
    ///
    /// Rate limits, of disks and network cards: bw_size=BYTES,bw_refill_time=MS
    /// [,bw_one_time_burst=BYTES] for bytes, and ops_size, ops_refill_time, ops_one_time_burst for
    /// requests or frames.
    #[arg(long = "disk", requires = "origin", value_name = "OPTIONS", value_parser = parse_disk)]
    pub disks: Vec<DiskConfig>,
    /// Network card: tap=NAME|fd=N|fd=[N,N...][,mac=ADDRESS][,id=NAME][,num_queues=N][,queue_size=N]
    /// [,offload_tso=on|off][,offload_ufo=on|off][,offload_csum=on|off] and rate limits. May be
    /// given several times.
    #[arg(long, requires = "origin", value_name = "OPTIONS", value_parser = parse_net)]
    pub net: Vec<NetConfig>,
    /// Socket device: cid=N,socket=PATH[,id=NAME].
    #[arg(long, requires = "origin", value_name = "OPTIONS", value_parser = parse_vsock)]
    pub vsock: Option<VsockConfig>,
    /// Entropy source: src=PATH [default: src=/dev/urandom].
    #[arg(long, requires = "origin", value_name = "OPTIONS", value_parser = parse_rng)]
    pub rng: Option<RngConfig>,
    /// Memory balloon: size=N[K|M|G][,deflate_on_oom=on|off][,free_page_reporting=on|off].
    #[arg(long, requires = "origin", value_name = "OPTIONS", value_parser = parse_balloon)]
    pub balloon: Option<BalloonConfig>,
    /// Serial port: tty, null, off or file=PATH [default: null].
    #[arg(long, requires = "origin", value_name = "MODE", value_parser = parse_serial)]
    pub serial: Option<SerialConfig>,
    /// Paravirtualized console: off (this VMM has none).
    #[arg(long, requires = "origin", value_name = "MODE", value_parser = parse_console)]
    pub console: Option<ConsoleConfig>,
    /// Where to report events, one JSON object a line: fd=N or path=PATH.
    #[arg(long, value_name = "TARGET", value_parser = parse_event_target)]
    pub event_monitor: Option<EventTarget>,
    /// Where to serve the REST API: path=PATH (or just PATH) or fd=N, a listening socket. Without
    /// --kernel the VMM waits there for vm.create.
    #[arg(long, value_name = "TARGET", value_parser = parse_api_target)]
    pub api_socket: Option<ApiTarget>,
    /// Keep the VMM when the guest powers off or fails. Without it, only the reboot of a guest
    /// that was created through the API is not the end of the VMM.
    #[arg(long, requires = "api_socket")]
    pub no_shutdown: bool,
    /// Jail the VMM: own namespaces, an empty root, no privileges, few system calls
    /// [=uid=N][,gid=N][,cgroup=DIR].
    ///
    /// Started as root, the VMM becomes a user and group of its own: those given, which nothing
    /// else should use, or numbers made from its process id. The host's user needs user
    /// namespaces if it is not root, and stays who it is. DIR is a cgroup (version 2) to join.
    /// Guest programs reach sockets of the host only if that user may search the directory of
    /// the socket device's socket and write to theirs.
    #[arg(long, value_name = "OPTIONS", num_args = 0..=1, default_missing_value = "",
        value_parser = parse_jail, requires = "origin")]
    pub jail: Option<JailConfig>,
    /// Where to report how long the first boot took until when, as one line of JSON: fd=N or
    /// path=PATH. It is written when the guest's agent begins, or else when the VMM ends.
    #[arg(long, value_name = "TARGET", value_parser = parse_event_target)]
    pub boot_timer: Option<EventTarget>,
    /// Where a debugger of the guest (gdb) connects, a UNIX socket: path=PATH (or just PATH) or
    /// fd=N, a listening socket.
    ///
    /// The guest does not run its first instruction before a debugger has connected and lets it
    /// go on. When a debugger leaves, the guest goes on without one, and another may connect.
    /// Whoever can connect owns the guest. Not with --jail: what debuggers send is read outside of
    /// it.
    #[arg(long, value_name = "TARGET", value_parser = parse_api_target, conflicts_with = "jail")]
    pub gdb: Option<ApiTarget>,
    /// File that the VMM logs into instead of standard error. It is appended to, and starts over
    /// at 4 MiB. On SIGUSR1 the VMM logs the registers of all vCPUs and the state of all devices.
    #[arg(long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,
    /// Log more about what the VMM does; up to three times.
    #[arg(short, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What the VMM has to do when it has started.
#[derive(Debug)]
pub enum Start {
    /// Nothing: it waits to be asked through its API.
    Nothing,
    /// Boot a machine.
    Boot(Box<VmConfig>),
    /// Let a machine go on.
    Restore(Box<Restore>),
}

/// What `--restore` says.
#[derive(Debug, Clone)]
pub struct RestoreArgs {
    snapshot: RestoreConfig,
    /// Whether the flags say what the machine is.
    config_by_flags: bool,
    resume: bool,
}

impl BootArgs {
    /// What the flags ask for.
    ///
    /// # Errors
    /// Some of them contradict each other.
    pub fn start(&self) -> Result<Start, String> {
        let Some(restore) = &self.restore else {
            return Ok(match &self.kernel {
                None => Start::Nothing,
                Some(kernel) => Start::Boot(Box::new(self.config(Some(PayloadConfig {
                    kernel: kernel.clone(),
                    cmdline: Some(self.cmdline.clone()),
                    initramfs: self.initramfs.clone(),
                })))),
            });
        };
        let (config, changes) = if restore.config_by_flags {
            (Some(self.config(None)), Changes::default())
        } else {
            for (flag, given) in [
                ("--cpus", self.cpus.is_some()),
                ("--memory", self.memory.is_some()),
                ("--rng", self.rng.is_some()),
                ("--balloon", self.balloon.is_some()),
                ("--console", self.console.is_some()),
            ] {
                if given {
                    return Err(format!(
                        "{flag} has no say in what the snapshot is of; leave it out, or describe \
                         the whole machine and add config=flags to --restore"
                    ));
                }
            }
            let changes = Changes {
                disks: self.disks.clone(),
                net: self.net.clone(),
                vsock: self.vsock.clone(),
                serial: self.serial.clone(),
            };
            (None, changes)
        };
        Ok(Start::Restore(Box::new(Restore {
            snapshot: restore.snapshot.clone(),
            config,
            changes,
            descriptors: Vec::new(),
            resume: restore.resume,
        })))
    }

    /// The machine that the flags describe.
    fn config(&self, payload: Option<PayloadConfig>) -> VmConfig {
        VmConfig {
            cpus: self.cpus.unwrap_or_default(),
            memory: self.memory.unwrap_or_default(),
            payload,
            disks: self.disks.clone(),
            net: self.net.clone(),
            rng: self.rng.clone().unwrap_or_default(),
            balloon: self.balloon,
            serial: self.serial.clone().unwrap_or_default(),
            console: self.console.clone().unwrap_or_default(),
            vsock: self.vsock.clone(),
        }
    }
}

/// Where lines of JSON go: events, and the times of a boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventTarget {
    /// A descriptor that the VMM inherited.
    Fd(RawFd),
    /// A file, created or appended to.
    Path(PathBuf),
}

impl EventTarget {
    /// Opens the target.
    ///
    /// # Errors
    /// The descriptor is not open, or the file cannot be opened.
    pub fn open(&self) -> std::io::Result<File> {
        match self {
            Self::Fd(fd) => inherited(*fd),
            Self::Path(path) => File::options().create(true).append(true).open(path),
        }
    }
}

#[cfg(test)]
mod tests;
