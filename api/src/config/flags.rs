//! Settings on the command line and in the environment.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::requests::RequestsFlags;
use super::{LogFormat, NetworkMode};
use crate::domain::{OnStop, Subnet, WhenIdle};
use crate::identity::Registration;

/// A policy without a list, for the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum EgressFlag {
    None,
    All,
}

/// A resolver: an address, and a port if it is not that of DNS.
fn parse_resolver(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>();
    let address = address.map(|address| SocketAddr::new(address, 53));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "expected an address, and `:` and a port if it is not 53".to_owned())
}

/// Settings on the command line and in the environment. What is not given stays as it is.
#[derive(Debug, Default, Args)]
pub struct Flags {
    /// Settings file (TOML); /etc/microvm-sandbox/sandboxd.toml is read if it is there
    #[arg(long, env = "SANDBOXD_CONFIG", value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Addresses to serve on; if one is not on loopback, every caller needs a token or an API key
    /// [default: 127.0.0.1:8000,127.0.0.1:8080]
    #[arg(
        long,
        env = "SANDBOXD_LISTEN",
        value_name = "ADDR:PORT",
        value_delimiter = ','
    )]
    pub(super) listen: Vec<SocketAddr>,
    /// Database, disks and spool files [default: /var/lib/microvm-sandbox]
    #[arg(long, env = "SANDBOXD_DATA_DIR", value_name = "DIR")]
    pub(super) data_dir: Option<PathBuf>,
    /// Sockets and console logs, best on a tmpfs [default: /run/microvm-sandbox]
    #[arg(long, env = "SANDBOXD_RUNTIME_DIR", value_name = "DIR")]
    pub(super) runtime_dir: Option<PathBuf>,
    /// VMM binary [default: `vmm` beside this program]
    #[arg(long, env = "SANDBOXD_VMM", value_name = "FILE")]
    pub(super) vmm: Option<PathBuf>,
    /// Who may register at `/api/v1/auth/register` [default: open]
    #[arg(long, env = "SANDBOXD_REGISTRATION", value_name = "WHO")]
    pub(super) registration: Option<Registration>,
    /// Directory with vmlinux, initramfs.cpio and NAME.ext4 for each template
    /// [default: ../images from this program's directory, or target/images]
    #[arg(long, env = "SANDBOXD_IMAGES_DIR", value_name = "DIR")]
    pub(super) images_dir: Option<PathBuf>,
    /// Guest kernel, an ELF vmlinux or a bzImage, instead of the one in the images directory
    #[arg(long, env = "SANDBOXD_KERNEL", value_name = "FILE")]
    pub(super) kernel: Option<PathBuf>,
    /// Initramfs with the guest agent, instead of the one in the images directory
    #[arg(long, env = "SANDBOXD_INITRAMFS", value_name = "FILE")]
    pub(super) initramfs: Option<PathBuf>,
    /// A template, beside those in the images directory: a raw ext4 image; may be repeated
    #[arg(
        long = "template",
        env = "SANDBOXD_TEMPLATES",
        value_name = "NAME=FILE",
        value_delimiter = ',',
        value_parser = parse_template
    )]
    pub(super) templates: Vec<(String, PathBuf)>,
    /// Words to add to the guest kernel's command line
    #[arg(long, env = "SANDBOXD_CMDLINE_EXTRA", value_name = "WORDS")]
    pub(super) cmdline_extra: Option<String>,
    /// Seconds from a VMM's start to its agent's first words [default: 60]
    #[arg(long, env = "SANDBOXD_BOOT_TIMEOUT_SEC", value_name = "SECONDS")]
    pub(super) boot_timeout_sec: Option<u64>,
    /// Seconds that requests in flight have at shutdown [default: 10]
    #[arg(long, env = "SANDBOXD_SHUTDOWN_TIMEOUT_SEC", value_name = "SECONDS")]
    pub(super) shutdown_timeout_sec: Option<u64>,
    /// Seconds from one comparison of records and host to the next [default: 30]
    #[arg(long, env = "SANDBOXD_RECONCILE_SEC", value_name = "SECONDS")]
    pub(super) reconcile_sec: Option<u64>,
    /// What becomes of a sandbox that was idle for its timeout_sec: pause or delete
    /// [default: pause]
    #[arg(long, env = "SANDBOXD_WHEN_IDLE", value_name = "WHAT", value_parser = parse_when_idle)]
    pub(super) when_idle: Option<WhenIdle>,
    /// What becomes of sandboxes that run when the daemon is asked to end: keep, pause or delete
    /// [default: keep]
    #[arg(long, env = "SANDBOXD_ON_STOP", value_name = "WHAT", value_parser = parse_on_stop)]
    pub(super) on_stop: Option<OnStop>,
    /// Jail VMMs: `false` is for debugging, and makes a VMM's user the daemon's [default: true]
    #[arg(long, env = "SANDBOXD_JAIL", value_name = "BOOL")]
    pub(super) jail: Option<bool>,
    /// First of the 65536 uids and gids that sandboxes get if the daemon is root
    /// [default: 1879048192]
    #[arg(long, env = "SANDBOXD_JAIL_FIRST_UID", value_name = "UID")]
    pub(super) jail_first_uid: Option<u32>,
    /// Where sandboxes have their cgroups: auto, off, or a directory [default: auto]
    #[arg(long, env = "SANDBOXD_JAIL_CGROUP", value_name = "WHERE")]
    pub(super) jail_cgroup: Option<String>,
    /// Bytes a second that a sandbox may read from the disk that data_dir is on, and as many that
    /// it may write [default: 0, no limit]
    #[arg(long, env = "SANDBOXD_JAIL_DISK_BYTES_PER_SEC", value_name = "BYTES")]
    pub(super) jail_disk_bytes_per_sec: Option<u64>,
    /// Operations a second of the same [default: 0, no limit]
    #[arg(long, env = "SANDBOXD_JAIL_DISK_OPS_PER_SEC", value_name = "COUNT")]
    pub(super) jail_disk_ops_per_sec: Option<u64>,
    /// Whether sandboxes have a network: auto is if it can be set up, which takes root or
    /// CAP_NET_ADMIN, and nft [default: auto]
    #[arg(long, env = "SANDBOXD_NETWORK", value_name = "MODE")]
    pub(super) network: Option<NetworkMode>,
    /// Name of the bridge that sandboxes are connected by [default: chbr0]
    #[arg(long, env = "SANDBOXD_NETWORK_BRIDGE", value_name = "NAME")]
    pub(super) network_bridge: Option<String>,
    /// Addresses of sandboxes; the first is the gateway's [default: 192.168.200.0/24]
    #[arg(long, env = "SANDBOXD_NETWORK_SUBNET", value_name = "SUBNET")]
    pub(super) network_subnet: Option<Subnet>,
    /// The largest packet of sandboxes, in bytes [default: 1500]
    #[arg(long, env = "SANDBOXD_NETWORK_MTU", value_name = "BYTES")]
    pub(super) network_mtu: Option<u16>,
    /// Network namespace that bridge and sandboxes are in: a name in /run/netns, or an absolute
    /// path [default: the daemon's own]
    #[arg(long, env = "SANDBOXD_NETWORK_NAMESPACE", value_name = "NAME")]
    pub(super) network_namespace: Option<String>,
    /// Resolvers that names are looked up at [default: those of /etc/resolv.conf]
    #[arg(
        long,
        env = "SANDBOXD_NETWORK_RESOLVERS",
        value_name = "ADDR",
        value_delimiter = ',',
        value_parser = parse_resolver
    )]
    pub(super) network_resolvers: Vec<SocketAddr>,
    /// What new sandboxes may reach unless they ask for something else [default: all]
    #[arg(long, env = "SANDBOXD_NETWORK_EGRESS", value_name = "POLICY")]
    pub(super) network_egress: Option<EgressFlag>,
    #[command(flatten)]
    pub(super) requests: RequestsFlags,
    /// Largest file to upload, in bytes [default: 104857600, 100 MiB]
    #[arg(long, env = "SANDBOXD_UPLOAD_BYTES", value_name = "BYTES")]
    pub(super) upload_bytes: Option<u64>,
    /// Largest archive to build a template from, in bytes [default: 10737418240, 10 GiB]
    #[arg(long, env = "SANDBOXD_TEMPLATE_ARCHIVE_BYTES", value_name = "BYTES")]
    pub(super) template_archive_bytes: Option<u64>,
    /// Most output of one command, in bytes; one that writes more is killed
    /// [default: 1073741824, 1 GiB]
    #[arg(long, env = "SANDBOXD_EXEC_OUTPUT_BYTES", value_name = "BYTES")]
    pub(super) exec_output_bytes: Option<u64>,
    /// Output of one stream of a command that is kept in memory, in bytes; more goes to disk
    /// [default: 262144, 256 KiB]
    #[arg(long, env = "SANDBOXD_EXEC_MEMORY_BYTES", value_name = "BYTES")]
    pub(super) exec_memory_bytes: Option<usize>,
    /// Output of commands and uploads of one user that wait on the daemon's disk to be read or passed on, in
    /// bytes; with more, a command is killed, and an upload is refused [default: 4294967296, 4 GiB]
    #[arg(long, env = "SANDBOXD_SPOOL_BYTES", value_name = "BYTES")]
    pub(super) spool_bytes: Option<u64>,
    /// Disk space for warm snapshots of templates, from which sandboxes start in less time, in
    /// bytes; 0 is none [default: 4294967296, 4 GiB]
    #[arg(long, env = "SANDBOXD_WARM_DISK_BYTES", value_name = "BYTES")]
    pub(super) warm_disk_bytes: Option<u64>,
    /// Give sandboxes that start from a snapshot the memory that they touch first before they touch
    /// it [default: true]
    #[arg(long, env = "SANDBOXD_PREFETCH", value_name = "BOOL")]
    pub(super) prefetch: Option<bool>,
    /// Machines that are kept ready for each template and shape that was used lately; 0 is none
    /// [default: 2]
    #[arg(long, env = "SANDBOXD_POOL_SIZE", value_name = "COUNT")]
    pub(super) pool_size: Option<usize>,
    /// Machines that are kept ready in all [default: 8]
    #[arg(long, env = "SANDBOXD_POOL_TOTAL", value_name = "COUNT")]
    pub(super) pool_total: Option<usize>,
    /// RAM of all machines that are kept ready, in MiB, as if they used all of it [default: 4096]
    #[arg(long, env = "SANDBOXD_POOL_MEMORY_MB", value_name = "MIB")]
    pub(super) pool_memory_mb: Option<u64>,
    /// Seconds after which ready machines are ended if nobody has used their shape [default: 600]
    #[arg(long, env = "SANDBOXD_POOL_IDLE_SEC", value_name = "SECONDS")]
    pub(super) pool_idle_sec: Option<u64>,
    /// How log lines look [default: text]
    #[arg(long, env = "SANDBOXD_LOG_FORMAT", value_name = "FORMAT")]
    pub(super) log_format: Option<LogFormat>,
    /// Which log lines there are, such as `debug` or `info,api::hypervisor=debug`
    /// [default: info]
    #[arg(long, env = "SANDBOXD_LOG", value_name = "FILTER")]
    pub(super) log: Option<String>,
}

fn parse_template(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err("expected a name, `=`, and the path of its image".to_owned()),
    }
}

fn parse_when_idle(text: &str) -> Result<WhenIdle, String> {
    match text {
        "pause" => Ok(WhenIdle::Pause),
        "delete" => Ok(WhenIdle::Delete),
        _ => Err("expected pause or delete".to_owned()),
    }
}

fn parse_on_stop(text: &str) -> Result<OnStop, String> {
    match text {
        "keep" => Ok(OnStop::Keep),
        "pause" => Ok(OnStop::Pause),
        "delete" => Ok(OnStop::Delete),
        _ => Err("expected keep, pause or delete".to_owned()),
    }
}
