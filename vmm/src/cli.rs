//! The command line: flags named as in Cloud Hypervisor, turned into a [`VmConfig`].

mod options;

use std::fs::File;
use std::os::fd::{FromRawFd, RawFd};
use std::path::PathBuf;

use clap::{ArgGroup, Args, Parser, Subcommand};

use crate::api::ApiTarget;
use crate::config::{
    BackingImage, BalloonConfig, ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, HotplugMethod,
    ImageType, MemoryConfig, NetConfig, PayloadConfig, RngConfig, SerialConfig, VmConfig,
    VsockConfig,
};
use crate::control::request::{Changes, Restore};
use crate::sandboxing::JailConfig;
use crate::snapshot::RestoreConfig;
use options::Options;

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
    /// [,config=snapshot|flags][,resume=on|off][,prefault=on|off: read all memory at once]
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
    /// Tell more about what the VMM does; up to three times.
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

/// Where events are reported.
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
            Self::Fd(fd) => {
                // SAFETY: F_SETFD takes a number and writes to no memory; it fails on a
                // descriptor that is not open.
                if unsafe { libc::fcntl(*fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                // SAFETY: the descriptor is open, and whoever started the VMM gave it away for
                // this purpose.
                Ok(unsafe { File::from_raw_fd(*fd) })
            }
            Self::Path(path) => File::options().create(true).append(true).open(path),
        }
    }
}

fn parse_restore(text: &str) -> Result<RestoreArgs, String> {
    let known = [
        "source_url",
        "base_url",
        "config",
        "resume",
        "prefault",
        "verify",
    ];
    let options = Options::parse(text, &known)?;
    let directory = |url: &str| match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(format!("{url:?} is no directory: expected file:///PATH")),
    };
    let bases = options.list("base_url");
    Ok(RestoreArgs {
        snapshot: RestoreConfig {
            source: directory(options.required("source_url")?)?,
            bases: bases.map(directory).collect::<Result<_, _>>()?,
            prefault: options.switch("prefault", false)?,
            verify: options.switch("verify", false)?,
        },
        config_by_flags: match options.text("config") {
            None | Some("snapshot") => false,
            Some("flags") => true,
            Some(other) => return Err(format!("config={other}: expected snapshot or flags")),
        },
        resume: options.switch("resume", true)?,
    })
}

fn parse_image_type(text: &str) -> Result<ImageType, String> {
    match text {
        "raw" => Ok(ImageType::Raw),
        "qcow2" => Ok(ImageType::Qcow2),
        other => Err(format!(
            "{other:?} is no type of image: expected raw or qcow2"
        )),
    }
}

fn parse_cpus(text: &str) -> Result<CpusConfig, String> {
    let options = Options::parse(text, &["boot", "max"])?;
    let boot_vcpus = options.get("boot")?.unwrap_or(1);
    Ok(CpusConfig {
        boot_vcpus,
        max_vcpus: options.get("max")?.unwrap_or(boot_vcpus),
    })
}

fn parse_memory(text: &str) -> Result<MemoryConfig, String> {
    let known = [
        "size",
        "thp",
        "hotplug_method",
        "hotplug_size",
        "hotplugged_size",
    ];
    let options = Options::parse(text, &known)?;
    Ok(MemoryConfig {
        size: parse_size(options.required("size")?)?,
        thp: options.switch("thp", true)?,
        hotplug_method: match options.text("hotplug_method") {
            None | Some("acpi") => HotplugMethod::Acpi,
            Some("virtio-mem") => HotplugMethod::VirtioMem,
            Some(other) => {
                return Err(format!(
                    "hotplug_method={other}: expected acpi or virtio-mem"
                ));
            }
        },
        hotplug_size: options.text("hotplug_size").map(parse_size).transpose()?,
        hotplugged_size: options
            .text("hotplugged_size")
            .map(parse_size)
            .transpose()?,
    })
}

/// A number of bytes, or of KiB, MiB or GiB with the suffix K, M or G.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size: expected a number with K, M or G, as in 512M"))
}

fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let known = [
        "path",
        "readonly",
        "image_type",
        "backing_files",
        "backing",
        "id",
        "serial",
        "num_queues",
        "queue_size",
        "direct",
        "sparse",
    ];
    let options = Options::parse_limited(text, &known)?;
    let default = DiskConfig::new(options.required("path")?);
    Ok(DiskConfig {
        id: options.text("id").map(str::to_owned),
        readonly: options.switch("readonly", false)?,
        image_type: parse_image_type(options.text("image_type").unwrap_or("raw"))?,
        backing_files: options.switch("backing_files", false)?,
        backing: options
            .list("backing")
            .map(|image| {
                let (kind, path) = image
                    .split_once(':')
                    .ok_or_else(|| format!("backing={image}: expected TYPE:PATH"))?;
                Ok(BackingImage {
                    image_type: parse_image_type(kind)?,
                    path: path.into(),
                })
            })
            .collect::<Result<_, String>>()?,
        serial: options.text("serial").map(str::to_owned),
        num_queues: options.get("num_queues")?.unwrap_or(default.num_queues),
        queue_size: options.get("queue_size")?.unwrap_or(default.queue_size),
        direct: options.switch("direct", default.direct)?,
        sparse: options.switch("sparse", default.sparse)?,
        rate_limiter_config: options.rate_limits()?,
        ..default
    })
}

fn parse_net(text: &str) -> Result<NetConfig, String> {
    let known = [
        "tap",
        "fd",
        "mac",
        "id",
        "num_queues",
        "queue_size",
        "offload_tso",
        "offload_ufo",
        "offload_csum",
    ];
    let options = Options::parse_limited(text, &known)?;
    let default = NetConfig::default();
    Ok(NetConfig {
        id: options.text("id").map(str::to_owned),
        tap: options.text("tap").map(str::to_owned),
        fds: options.text("fd").map(parse_descriptors).transpose()?,
        mac: options.get("mac")?,
        num_queues: options.get("num_queues")?.unwrap_or(default.num_queues),
        queue_size: options.get("queue_size")?.unwrap_or(default.queue_size),
        offload_tso: options.switch("offload_tso", default.offload_tso)?,
        offload_ufo: options.switch("offload_ufo", default.offload_ufo)?,
        offload_csum: options.switch("offload_csum", default.offload_csum)?,
        rate_limiter_config: options.rate_limits()?,
    })
}

/// One descriptor that the VMM inherited, or a list of them in brackets.
fn parse_descriptors(text: &str) -> Result<Vec<RawFd>, String> {
    options::elements(text)
        .map(|fd| match fd.parse() {
            Ok(fd @ 3..) => Ok(fd),
            _ => Err(format!(
                "fd={text}: expected a number above 2, or several as in [3,4]"
            )),
        })
        .collect()
}

fn parse_vsock(text: &str) -> Result<VsockConfig, String> {
    let options = Options::parse(text, &["cid", "socket", "id"])?;
    let cid = options.get("cid")?.ok_or("cid is missing")?;
    Ok(VsockConfig {
        id: options.text("id").map(str::to_owned),
        cid,
        socket: options.required("socket")?.into(),
    })
}

fn parse_rng(text: &str) -> Result<RngConfig, String> {
    let options = Options::parse(text, &["src"])?;
    Ok(RngConfig {
        src: options.required("src")?.into(),
    })
}

fn parse_balloon(text: &str) -> Result<BalloonConfig, String> {
    let options = Options::parse(text, &["size", "deflate_on_oom", "free_page_reporting"])?;
    Ok(BalloonConfig {
        size: parse_size(options.required("size")?)?,
        deflate_on_oom: options.switch("deflate_on_oom", false)?,
        free_page_reporting: options.switch("free_page_reporting", false)?,
    })
}

fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    let mode = match text {
        "tty" => ConsoleMode::Tty,
        "null" => ConsoleMode::Null,
        "off" => ConsoleMode::Off,
        _ => {
            let path = text
                .strip_prefix("file=")
                .ok_or("expected tty, null, off or file=PATH")?;
            return Ok(SerialConfig {
                mode: ConsoleMode::File,
                file: Some(path.into()),
            });
        }
    };
    Ok(SerialConfig { mode, file: None })
}

fn parse_console(text: &str) -> Result<ConsoleConfig, String> {
    match text {
        "off" => Ok(ConsoleConfig {
            mode: ConsoleMode::Off,
        }),
        _ => Err("this VMM has no virtio console; use --serial and --console off".to_owned()),
    }
}

fn parse_api_target(text: &str) -> Result<ApiTarget, String> {
    match text.split_once('=') {
        Some(("fd", number)) => {
            // 0 to 2 are the terminal's.
            let fd = number.parse().ok().filter(|fd| *fd > 2);
            fd.map(ApiTarget::Fd)
                .ok_or_else(|| format!("fd={number}: expected a descriptor above 2"))
        }
        Some(("path", path)) if !path.is_empty() => Ok(ApiTarget::Path(path.into())),
        None if !text.is_empty() => Ok(ApiTarget::Path(text.into())),
        _ => Err("expected path=PATH or fd=N".to_owned()),
    }
}

fn parse_jail(text: &str) -> Result<JailConfig, String> {
    if text.is_empty() {
        return Ok(JailConfig::default());
    }
    let options = Options::parse(text, &["uid", "gid", "cgroup"])?;
    Ok(JailConfig {
        uid: options.get("uid")?,
        gid: options.get("gid")?,
        cgroup: options.text("cgroup").map(PathBuf::from),
    })
}

fn parse_event_target(text: &str) -> Result<EventTarget, String> {
    match text.split_once('=') {
        Some(("fd", number)) => {
            // 0 to 2 are the terminal's: taking one over would mix events into other output.
            let fd = number.parse().ok().filter(|fd| *fd > 2);
            fd.map(EventTarget::Fd)
                .ok_or_else(|| format!("fd={number}: expected a descriptor above 2"))
        }
        Some(("path", path)) => Ok(EventTarget::Path(path.into())),
        _ => Err("expected fd=N or path=PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

    fn parse(arguments: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("vmm").chain(arguments.split(' ')))
    }

    #[test]
    fn flags_become_a_configuration() {
        let cli = parse(
            "--kernel k --initramfs i --cpus boot=4 \
             --memory size=1G,hotplug_method=virtio-mem,hotplug_size=2G,hotplugged_size=512M \
             --disk path=a.qcow2,image_type=qcow2,backing_files=on --disk path=b,readonly=on \
             --net tap=tap0,mac=52:54:00:12:34:56 --vsock cid=3,socket=/s --serial file=log \
             --balloon size=64M,free_page_reporting=on --event-monitor fd=5",
        )
        .unwrap();
        let Start::Boot(config) = cli.boot.start().unwrap() else {
            panic!("no machine to boot")
        };
        assert_eq!(
            config.cpus,
            CpusConfig {
                boot_vcpus: 4,
                max_vcpus: 4
            }
        );
        let expected = MemoryConfig {
            size: 1 << 30,
            thp: true,
            hotplug_method: HotplugMethod::VirtioMem,
            hotplug_size: Some(2 << 30),
            hotplugged_size: Some(512 << 20),
        };
        assert_eq!(config.memory, expected);
        assert_eq!(config.disks[0].image_type, ImageType::Qcow2);
        assert!(config.disks[0].backing_files && !config.disks[0].readonly);
        assert!(config.disks[1].readonly);
        assert_eq!(config.net[0].mac.unwrap().to_string(), "52:54:00:12:34:56");
        assert_eq!(config.vsock.as_ref().unwrap().cid, 3);
        assert_eq!(
            config.balloon.unwrap(),
            BalloonConfig {
                size: 64 << 20,
                deflate_on_oom: false,
                free_page_reporting: true
            }
        );
        assert_eq!(config.serial.file.as_deref().unwrap().to_str(), Some("log"));
        assert_eq!(cli.boot.event_monitor, Some(EventTarget::Fd(5)));
    }

    #[test]
    fn queues_limits_and_descriptors_are_those_of_cloud_hypervisor() {
        let cli = parse(
            "--kernel k --net fd=[5,6],num_queues=4,queue_size=64,offload_tso=off,ops_size=10,\
             ops_refill_time=1000 --disk path=a,num_queues=2,queue_size=32,direct=on,sparse=off,\
             bw_size=4096,bw_one_time_burst=8192,bw_refill_time=100",
        )
        .unwrap();
        let [card] = &cli.boot.net[..] else {
            panic!("one card");
        };
        let bucket = |size, one_time_burst, refill_time| {
            Some(TokenBucketConfig {
                size,
                one_time_burst,
                refill_time,
            })
        };
        let expected = NetConfig {
            fds: Some(vec![5, 6]),
            num_queues: 4,
            queue_size: 64,
            offload_tso: false,
            rate_limiter_config: Some(RateLimiterConfig {
                bandwidth: None,
                ops: bucket(10, None, 1000),
            }),
            ..NetConfig::default()
        };
        assert_eq!(*card, expected);
        let expected = DiskConfig {
            num_queues: 2,
            queue_size: 32,
            direct: true,
            sparse: false,
            rate_limiter_config: Some(RateLimiterConfig {
                bandwidth: bucket(4096, Some(8192), 100),
                ops: None,
            }),
            ..DiskConfig::new("a")
        };
        assert_eq!(cli.boot.disks[0], expected);
    }

    #[test]
    fn mistakes_are_named() {
        for (arguments, named) in [
            ("--kernel k --cpus boots=4", "known are boot, max"),
            ("--kernel k --cpus boot=300", "boot=300"),
            ("--kernel k --memory size=much", "512M"),
            (
                "--kernel k --memory size=1G,hotplug_method=dimm",
                "acpi or virtio-mem",
            ),
            ("--kernel k --memory size=99999999999G", "no size"),
            ("--kernel k --disk readonly=on", "path is missing"),
            ("--kernel k --disk path=a,path=b", "twice"),
            ("--kernel k --disk path=a,readonly=maybe", "on or off"),
            (
                "--kernel k --net tap=t,mac=01:00:5e:00:00:01",
                "group address",
            ),
            ("--kernel k --net fd=2", "above 2"),
            ("--kernel k --net fd=[3,x]", "[3,4]"),
            ("--kernel k --net tap=t,num_queues=-2", "num_queues=-2"),
            ("--kernel k --disk path=a,bw_size=1", "bw_refill_time"),
            ("--kernel k --disk path=a,ops_one_time_burst=1", "ops_size"),
            ("--kernel k --vsock socket=/s", "cid is missing"),
            ("--kernel k --balloon deflate_on_oom=on", "size is missing"),
            ("--kernel k --serial printer", "expected tty"),
            ("--kernel k --console tty", "no virtio console"),
            ("--kernel k --event-monitor fd=1", "above 2"),
            ("--cpus boot=1", "--kernel"),
            ("--api-socket fd=2", "above 2"),
            ("--api-socket port=80", "path=PATH or fd=N"),
            ("--kernel k --no-shutdown", "--api-socket"),
            ("--api-socket /s --cpus boot=2", "--kernel"),
            ("--api-socket /s --disk path=d", "--kernel"),
        ] {
            let error = parse(arguments).unwrap_err().to_string();
            assert!(error.contains(named), "{arguments}: {error}");
        }
    }

    #[test]
    fn a_machine_goes_on_as_it_was_or_as_the_flags_say() {
        let restore = |arguments| match parse(arguments).unwrap().boot.start() {
            Ok(Start::Restore(restore)) => Ok(restore),
            Ok(other) => panic!("{other:?}"),
            Err(error) => Err(error),
        };
        let as_it_was = restore(
            "--restore source_url=file:///s,base_url=[file:///b,file:///a],resume=off \
             --disk path=d,image_type=qcow2,backing=[qcow2:/e,raw:/f]",
        )
        .unwrap();
        let snapshot = &as_it_was.snapshot;
        assert_eq!(snapshot.source, PathBuf::from("/s"));
        assert_eq!(snapshot.bases, [PathBuf::from("/b"), PathBuf::from("/a")]);
        assert!(!as_it_was.resume && as_it_was.config.is_none());
        let disk = &as_it_was.changes.disks[0];
        let image = |image_type, path: &str| BackingImage {
            image_type,
            path: path.into(),
        };
        let chain = [image(ImageType::Qcow2, "/e"), image(ImageType::Raw, "/f")];
        assert_eq!(disk.backing, chain);

        let flags = "--restore source_url=file:///s,config=flags --memory size=64M --cpus boot=2";
        let as_flags_say = restore(flags).unwrap();
        let config = as_flags_say.config.unwrap();
        assert_eq!((config.memory.size, config.cpus.boot_vcpus), (64 << 20, 2));
        assert!(config.payload.is_none() && as_flags_say.resume);

        let error = restore("--restore source_url=file:///s --memory size=64M").unwrap_err();
        assert!(error.starts_with("--memory has no say"), "{error}");
        for bad in [
            "--restore source_url=/s",
            "--restore base_url=file:///s",
            "--restore source_url=file:///s,config=what",
            "--restore source_url=file:///s --kernel k",
            "--memory size=64M",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_api_needs_no_kernel() {
        let cli = parse("--api-socket /run/api.sock --no-shutdown").unwrap();
        let path = ApiTarget::Path("/run/api.sock".into());
        assert_eq!(cli.boot.api_socket, Some(path.clone()));
        assert!(cli.boot.no_shutdown);
        assert!(matches!(cli.boot.start(), Ok(Start::Nothing)));
        let cli = parse("--api-socket path=/run/api.sock --kernel k").unwrap();
        assert_eq!(cli.boot.api_socket, Some(path));
        let cli = parse("--api-socket fd=7").unwrap();
        assert_eq!(cli.boot.api_socket, Some(ApiTarget::Fd(7)));
    }

    #[test]
    fn a_jail_may_be_as_it_comes_or_given_an_identity() {
        let jail = |arguments| parse(arguments).unwrap().boot.jail;
        assert_eq!(jail("--kernel k"), None);
        assert_eq!(jail("--jail --kernel k"), Some(JailConfig::default()));
        let config = JailConfig {
            uid: Some(7),
            gid: Some(8),
            cgroup: Some("/c".into()),
        };
        assert_eq!(
            jail("--kernel k --jail uid=7,gid=8,cgroup=/c"),
            Some(config)
        );
        let error = parse("--kernel k --jail uid=-1").unwrap_err();
        assert!(error.to_string().contains("uid=-1"));
    }

    #[test]
    fn doctor_needs_no_kernel() {
        assert!(matches!(
            parse("doctor --json").unwrap().command,
            Some(Command::Doctor { json: true })
        ));
    }
}
