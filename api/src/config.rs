//! Settings: built-in defaults, then a file, then the environment, then flags.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::chain;
use crate::domain::{Egress, OnStop, Quota, Subnet, WhenIdle};
use crate::hypervisor::{CgroupParent, DiskLimits};
use crate::identity::Registration;
use crate::network::MAX_BRIDGE_NAME;

/// The file that is read when none is named, if it is there.
const DEFAULT_FILE: &str = "/etc/microvm-sandbox/sandboxd.toml";

/// All settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Addresses to serve on. If one is not a loopback address, every caller needs a token or an
    /// API key.
    pub listen: Vec<SocketAddr>,
    /// Database, disks and spool files.
    pub data_dir: PathBuf,
    /// Sockets and console logs; best on a tmpfs.
    pub runtime_dir: PathBuf,
    /// The VMM's binary; `vmm` beside the daemon's own if not given.
    pub vmm: Option<PathBuf>,
    /// Seconds from a VMM's start to its agent's first words.
    pub boot_timeout_sec: u64,
    /// Seconds that requests in flight have at shutdown.
    pub shutdown_timeout_sec: u64,
    /// Seconds from one comparison of records and host to the next.
    pub reconcile_sec: u64,
    /// What becomes of a sandbox that was idle for its `timeout_sec`.
    pub when_idle: WhenIdle,
    /// What becomes of sandboxes that run when the daemon is asked to end.
    pub on_stop: OnStop,
    /// Accounts.
    pub auth: AuthConfig,
    /// What guests are made from.
    pub images: ImagesConfig,
    /// How VMMs are jailed.
    pub jail: JailConfig,
    /// The network of sandboxes.
    pub network: NetworkConfig,
    /// Security scans.
    pub scan: ScanConfig,
    /// Sizes.
    pub limits: LimitsConfig,
    /// Logs.
    pub log: LogConfig,
}

/// Accounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Who may register.
    pub registration: Registration,
    /// Requests of `/api/v1` that each user may make in a minute; 0 is no limit.
    pub requests_per_minute: u32,
    /// The same in an hour.
    pub requests_per_hour: u32,
    /// How much the sandboxes of each user may have together.
    pub user_quota: QuotaConfig,
    /// How much those of the local principal may have together.
    pub local_quota: QuotaConfig,
}

impl Default for AuthConfig {
    fn default() -> Self {
        Self {
            registration: Registration::default(),
            requests_per_minute: 100,
            requests_per_hour: 1000,
            user_quota: QuotaConfig::default(),
            local_quota: QuotaConfig::default(),
        }
    }
}

/// How much sandboxes may have together; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuotaConfig {
    /// Sandboxes that run.
    pub sandboxes: u32,
    /// Their virtual CPUs.
    pub vcpus: u32,
    /// Their RAM, in MiB.
    pub memory_mb: u64,
    /// Disks of all that are not deleted, in MiB.
    pub disk_mb: u64,
}

impl From<QuotaConfig> for Quota {
    fn from(config: QuotaConfig) -> Self {
        Self {
            sandboxes: config.sandboxes,
            vcpus: config.vcpus,
            memory_mb: config.memory_mb,
            disk_mb: config.disk_mb,
        }
    }
}

/// Security scans.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScanConfig {
    /// Known holes of packages: a JSON file of OSV records, or that of the Debian security tracker.
    pub advisories: Option<PathBuf>,
}

/// What guests are made from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ImagesConfig {
    /// Directory with `vmlinux`, `initramfs.cpio` and `NAME.ext4` for each template; `../images`
    /// from the daemon's binary, or `target/images` here, if not given.
    pub dir: Option<PathBuf>,
    /// Kernel instead of the directory's.
    pub kernel: Option<PathBuf>,
    /// Initramfs instead of the directory's.
    pub initramfs: Option<PathBuf>,
    /// Words to add to the kernel's command line.
    pub cmdline_extra: String,
    /// Templates beside the directory's: raw ext4 images by name.
    pub templates: BTreeMap<String, PathBuf>,
}

/// How VMMs are jailed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JailConfig {
    /// Whether they are.
    pub enabled: bool,
    /// The first of 65536 uids, and gids of the same numbers, that sandboxes get if the daemon is
    /// root. Nothing else may use them.
    pub first_uid: u32,
    /// `auto`, `off`, or the directory of a cgroup (version 2) for those of sandboxes.
    pub cgroup: String,
    /// Bytes a second that a sandbox may read from the host's disk, and write to it; 0 is no limit.
    pub disk_bytes_per_sec: u64,
    /// Operations a second of the same; 0 is no limit.
    pub disk_ops_per_sec: u64,
}

impl Default for JailConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            // Unused by distributions, containers' sub-uids and systemd (its UIDS-GIDS.md).
            first_uid: 0x7000_0000,
            cgroup: "auto".to_owned(),
            disk_bytes_per_sec: 0,
            disk_ops_per_sec: 0,
        }
    }
}

impl JailConfig {
    /// The same as the host side takes it; `None` if VMMs are not jailed.
    pub fn for_host(&self) -> Option<crate::hypervisor::JailConfig> {
        self.enabled.then(|| crate::hypervisor::JailConfig {
            first_uid: self.first_uid,
            cgroup: match self.cgroup.as_str() {
                "auto" => CgroupParent::Auto,
                "off" => CgroupParent::None,
                path => CgroupParent::At(path.into()),
            },
            disk_limits: DiskLimits {
                bytes_per_sec: self.disk_bytes_per_sec,
                ops_per_sec: self.disk_ops_per_sec,
            },
        })
    }
}

/// The network of sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// Whether sandboxes have one.
    pub mode: NetworkMode,
    /// Name of the bridge.
    pub bridge: String,
    /// Addresses of the sandboxes and, as the first of them, of the gateway.
    pub subnet: Subnet,
    /// The largest packet, in bytes.
    pub mtu: u16,
    /// Name in `/run/netns`, or absolute path, of the network namespace that all of it is in; the
    /// daemon's own, if not given.
    pub namespace: Option<String>,
    /// Resolvers that names are looked up at, instead of those of `/etc/resolv.conf`.
    pub resolvers: Vec<SocketAddr>,
    /// What new sandboxes may reach unless they ask for something else.
    pub egress: Egress,
    /// Further networks, for sandboxes that ask for them.
    pub further: Vec<FurtherNetwork>,
}

/// A network beside the first, in the same namespace and with packets of the same size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FurtherNetwork {
    /// Name of the bridge, and of the network.
    pub bridge: String,
    /// Addresses of the sandboxes and, as the first of them, of the gateway.
    pub subnet: Subnet,
    /// What new sandboxes in it may reach unless they ask for something else.
    #[serde(default = "anything")]
    pub egress: Egress,
}

fn anything() -> Egress {
    Egress::All
}

/// Whether sandboxes have a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum NetworkMode {
    /// If it can be set up.
    Auto,
    /// Yes; if it cannot be set up, the daemon does not start.
    On,
    /// No: they have no network card.
    Off,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            mode: NetworkMode::Auto,
            bridge: "chbr0".to_owned(),
            subnet: Subnet::DEFAULT,
            mtu: 1500,
            namespace: None,
            resolvers: Vec::new(),
            egress: Egress::All,
            further: Vec::new(),
        }
    }
}

impl NetworkConfig {
    /// The same as the host side takes it, for the daemon that owns `data_dir`, each with what new
    /// sandboxes may reach. The first is for those that ask for none in particular.
    pub fn for_host(&self, data_dir: &Path) -> Vec<(crate::network::NetworkConfig, Egress)> {
        if self.mode == NetworkMode::Off {
            return Vec::new();
        }
        let all = self.all();
        let others = |bridge: &str| {
            let others = all.iter().filter(|(other, ..)| *other != bridge);
            others.map(|(other, ..)| (*other).to_owned()).collect()
        };
        let host_side = |(bridge, subnet, egress): &(&str, Subnet, &Egress)| {
            let config = crate::network::NetworkConfig {
                bridge: (*bridge).to_owned(),
                subnet: *subnet,
                mtu: self.mtu,
                namespace: self.namespace.clone(),
                resolvers: self.resolvers.clone(),
                owner: data_dir.to_owned(),
                siblings: others(bridge),
            };
            (config, (*egress).clone())
        };
        all.iter().map(host_side).collect()
    }

    /// Bridge, addresses and policy of each network.
    fn all(&self) -> Vec<(&str, Subnet, &Egress)> {
        let further = self.further.iter();
        std::iter::once((self.bridge.as_str(), self.subnet, &self.egress))
            .chain(further.map(|one| (one.bridge.as_str(), one.subnet, &one.egress)))
            .collect()
    }

    /// What is wrong with it, as a sentence.
    fn check(&self) -> Result<(), String> {
        let all = self.all();
        for (place, (bridge, subnet, egress)) in all.iter().enumerate() {
            check_bridge(bridge)?;
            for (other, other_subnet, _) in &all[..place] {
                // Taps are known by the name of their bridge and a `-`.
                let is_prefix = |one: &str, other: &str| {
                    other
                        .strip_prefix(one)
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
                };
                if is_prefix(bridge, other) || is_prefix(other, bridge) {
                    return Err(format!(
                        "the networks {other:?} and {bridge:?} need names of which none is the \
                         other, or the other with `-` and more"
                    ));
                }
                if subnet.overlaps(*other_subnet) {
                    return Err(format!(
                        "the subnets {other_subnet} of {other:?} and {subnet} of {bridge:?} overlap"
                    ));
                }
            }
            let egress = (*egress).clone().check();
            egress.map_err(|error| format!("egress of the network {bridge:?}: {error}"))?;
        }
        // RFC 791 and the largest that Ethernet interfaces take.
        if !(576..=65_521).contains(&self.mtu) {
            return Err(format!(
                "network.mtu must be 576 to 65521, not {}",
                self.mtu
            ));
        }
        Ok(())
    }
}

fn check_bridge(name: &str) -> Result<(), String> {
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    let bytes = name.as_bytes();
    if (1..=MAX_BRIDGE_NAME).contains(&bytes.len())
        && bytes.iter().copied().all(is_name)
        && bytes[0].is_ascii_alphabetic()
    {
        return Ok(());
    }
    Err(format!(
        "a network's bridge must be 1 to {MAX_BRIDGE_NAME} letters, digits, `-` or `_`, and begin with a \
         letter, not {name:?}"
    ))
}

/// A policy without a list, for the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum EgressFlag {
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

/// Sizes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Largest file to upload, in bytes.
    pub upload_bytes: u64,
    /// Largest archive to build a template from, in bytes.
    pub template_archive_bytes: u64,
    /// Most output of one command, in bytes.
    pub exec_output_bytes: u64,
    /// Output of one stream of a command that is kept in memory, in bytes; more goes to disk.
    pub exec_memory_bytes: usize,
    /// Warm snapshots of templates on the disk, in bytes; 0 is none.
    pub warm_disk_bytes: u64,
    /// Whether sandboxes that start warm, are forked or resumed have the memory that they touch first
    /// before they touch it.
    pub prefetch: bool,
    /// Machines that are ready for each template and shape that was used lately; 0 is none.
    pub pool_size: usize,
    /// Machines that are ready in all.
    pub pool_total: usize,
    /// RAM of all guests that are ready, in MiB, as if they used all of it.
    pub pool_memory_mb: u64,
    /// Seconds after which machines of a shape that nobody has used are ended.
    pub pool_idle_sec: u64,
}

/// Logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// How lines look.
    pub format: LogFormat,
    /// Which lines there are: `error`, `warn`, `info`, `debug`, `trace`, or as in
    /// `info,api::hypervisor=debug`.
    pub filter: String,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![([127, 0, 0, 1], 8000).into(), ([127, 0, 0, 1], 8080).into()],
            data_dir: "/var/lib/microvm-sandbox".into(),
            runtime_dir: "/run/microvm-sandbox".into(),
            vmm: None,
            boot_timeout_sec: 60,
            shutdown_timeout_sec: 10,
            reconcile_sec: 30,
            when_idle: WhenIdle::default(),
            on_stop: OnStop::default(),
            auth: AuthConfig::default(),
            images: ImagesConfig::default(),
            jail: JailConfig::default(),
            network: NetworkConfig::default(),
            scan: ScanConfig::default(),
            limits: LimitsConfig::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            upload_bytes: 100 << 20,
            template_archive_bytes: 10 << 30,
            exec_output_bytes: 1 << 30,
            exec_memory_bytes: 256 << 10,
            warm_disk_bytes: 4 << 30,
            prefetch: true,
            pool_size: 2,
            pool_total: 8,
            pool_memory_mb: 4096,
            pool_idle_sec: 600,
        }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            filter: "info".to_owned(),
        }
    }
}

/// Settings on the command line and in the environment. What is not given stays as it is.
#[derive(Debug, Default, Args)]
pub struct Flags {
    /// Settings file (TOML); /etc/microvm-sandbox/sandboxd.toml is read if it is there
    #[arg(long, env = "SANDBOXD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Addresses to serve on; if one is not on loopback, every caller needs a token or an API key
    /// [default: 127.0.0.1:8000,127.0.0.1:8080]
    #[arg(
        long,
        env = "SANDBOXD_LISTEN",
        value_name = "ADDR:PORT",
        value_delimiter = ','
    )]
    listen: Vec<SocketAddr>,
    /// Database, disks and spool files [default: /var/lib/microvm-sandbox]
    #[arg(long, env = "SANDBOXD_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Sockets and console logs, best on a tmpfs [default: /run/microvm-sandbox]
    #[arg(long, env = "SANDBOXD_RUNTIME_DIR", value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// VMM binary [default: `vmm` beside this program]
    #[arg(long, env = "SANDBOXD_VMM", value_name = "FILE")]
    vmm: Option<PathBuf>,
    /// Who may register at `/api/v1/auth/register` [default: open]
    #[arg(long, env = "SANDBOXD_REGISTRATION", value_name = "WHO")]
    registration: Option<Registration>,
    /// Directory with vmlinux, initramfs.cpio and NAME.ext4 for each template
    /// [default: ../images from this program's directory, or target/images]
    #[arg(long, env = "SANDBOXD_IMAGES_DIR", value_name = "DIR")]
    images_dir: Option<PathBuf>,
    /// Guest kernel, an ELF vmlinux or a bzImage, instead of the one in the images directory
    #[arg(long, env = "SANDBOXD_KERNEL", value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initramfs with the guest agent, instead of the one in the images directory
    #[arg(long, env = "SANDBOXD_INITRAMFS", value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// A template, beside those in the images directory: a raw ext4 image; may be repeated
    #[arg(
        long = "template",
        env = "SANDBOXD_TEMPLATES",
        value_name = "NAME=FILE",
        value_delimiter = ',',
        value_parser = parse_template
    )]
    templates: Vec<(String, PathBuf)>,
    /// Words to add to the guest kernel's command line
    #[arg(long, env = "SANDBOXD_CMDLINE_EXTRA", value_name = "WORDS")]
    cmdline_extra: Option<String>,
    /// Seconds from a VMM's start to its agent's first words [default: 60]
    #[arg(long, env = "SANDBOXD_BOOT_TIMEOUT_SEC", value_name = "SECONDS")]
    boot_timeout_sec: Option<u64>,
    /// Seconds that requests in flight have at shutdown [default: 10]
    #[arg(long, env = "SANDBOXD_SHUTDOWN_TIMEOUT_SEC", value_name = "SECONDS")]
    shutdown_timeout_sec: Option<u64>,
    /// Seconds from one comparison of records and host to the next [default: 30]
    #[arg(long, env = "SANDBOXD_RECONCILE_SEC", value_name = "SECONDS")]
    reconcile_sec: Option<u64>,
    /// What becomes of a sandbox that was idle for its timeout_sec: pause or delete
    /// [default: pause]
    #[arg(long, env = "SANDBOXD_WHEN_IDLE", value_name = "WHAT", value_parser = parse_when_idle)]
    when_idle: Option<WhenIdle>,
    /// What becomes of sandboxes that run when the daemon is asked to end: keep, pause or delete
    /// [default: keep]
    #[arg(long, env = "SANDBOXD_ON_STOP", value_name = "WHAT", value_parser = parse_on_stop)]
    on_stop: Option<OnStop>,
    /// Jail VMMs: `false` is for debugging, and makes a VMM's user the daemon's [default: true]
    #[arg(long, env = "SANDBOXD_JAIL", value_name = "BOOL")]
    jail: Option<bool>,
    /// First of the 65536 uids and gids that sandboxes get if the daemon is root
    /// [default: 1879048192]
    #[arg(long, env = "SANDBOXD_JAIL_FIRST_UID", value_name = "UID")]
    jail_first_uid: Option<u32>,
    /// Where sandboxes have their cgroups: auto, off, or a directory [default: auto]
    #[arg(long, env = "SANDBOXD_JAIL_CGROUP", value_name = "WHERE")]
    jail_cgroup: Option<String>,
    /// Bytes a second that a sandbox may read from the disk that data_dir is on, and as many that
    /// it may write [default: 0, no limit]
    #[arg(long, env = "SANDBOXD_JAIL_DISK_BYTES_PER_SEC", value_name = "BYTES")]
    jail_disk_bytes_per_sec: Option<u64>,
    /// Operations a second of the same [default: 0, no limit]
    #[arg(long, env = "SANDBOXD_JAIL_DISK_OPS_PER_SEC", value_name = "COUNT")]
    jail_disk_ops_per_sec: Option<u64>,
    /// Whether sandboxes have a network: auto is if it can be set up, which takes root or
    /// CAP_NET_ADMIN, and nft [default: auto]
    #[arg(long, env = "SANDBOXD_NETWORK", value_name = "MODE")]
    network: Option<NetworkMode>,
    /// Name of the bridge that sandboxes are connected by [default: chbr0]
    #[arg(long, env = "SANDBOXD_NETWORK_BRIDGE", value_name = "NAME")]
    network_bridge: Option<String>,
    /// Addresses of sandboxes; the first is the gateway's [default: 192.168.200.0/24]
    #[arg(long, env = "SANDBOXD_NETWORK_SUBNET", value_name = "SUBNET")]
    network_subnet: Option<Subnet>,
    /// The largest packet of sandboxes, in bytes [default: 1500]
    #[arg(long, env = "SANDBOXD_NETWORK_MTU", value_name = "BYTES")]
    network_mtu: Option<u16>,
    /// Network namespace that bridge and sandboxes are in: a name in /run/netns, or an absolute
    /// path [default: the daemon's own]
    #[arg(long, env = "SANDBOXD_NETWORK_NAMESPACE", value_name = "NAME")]
    network_namespace: Option<String>,
    /// Resolvers that names are looked up at [default: those of /etc/resolv.conf]
    #[arg(
        long,
        env = "SANDBOXD_NETWORK_RESOLVERS",
        value_name = "ADDR",
        value_delimiter = ',',
        value_parser = parse_resolver
    )]
    network_resolvers: Vec<SocketAddr>,
    /// What new sandboxes may reach unless they ask for something else [default: all]
    #[arg(long, env = "SANDBOXD_NETWORK_EGRESS", value_name = "POLICY")]
    network_egress: Option<EgressFlag>,
    /// Largest file to upload, in bytes [default: 104857600, 100 MiB]
    #[arg(long, env = "SANDBOXD_UPLOAD_BYTES", value_name = "BYTES")]
    upload_bytes: Option<u64>,
    /// Largest archive to build a template from, in bytes [default: 10737418240, 10 GiB]
    #[arg(long, env = "SANDBOXD_TEMPLATE_ARCHIVE_BYTES", value_name = "BYTES")]
    template_archive_bytes: Option<u64>,
    /// Most output of one command, in bytes; one that writes more is killed
    /// [default: 1073741824, 1 GiB]
    #[arg(long, env = "SANDBOXD_EXEC_OUTPUT_BYTES", value_name = "BYTES")]
    exec_output_bytes: Option<u64>,
    /// Output of one stream of a command that is kept in memory, in bytes; more goes to disk
    /// [default: 262144, 256 KiB]
    #[arg(long, env = "SANDBOXD_EXEC_MEMORY_BYTES", value_name = "BYTES")]
    exec_memory_bytes: Option<usize>,
    /// Disk space for warm snapshots of templates, from which sandboxes start in less time, in
    /// bytes; 0 is none [default: 4294967296, 4 GiB]
    #[arg(long, env = "SANDBOXD_WARM_DISK_BYTES", value_name = "BYTES")]
    warm_disk_bytes: Option<u64>,
    /// Give sandboxes that start from a snapshot the memory that they touch first before they touch
    /// it [default: true]
    #[arg(long, env = "SANDBOXD_PREFETCH", value_name = "BOOL")]
    prefetch: Option<bool>,
    /// Machines that are kept ready for each template and shape that was used lately; 0 is none
    /// [default: 2]
    #[arg(long, env = "SANDBOXD_POOL_SIZE", value_name = "COUNT")]
    pool_size: Option<usize>,
    /// Machines that are kept ready in all [default: 8]
    #[arg(long, env = "SANDBOXD_POOL_TOTAL", value_name = "COUNT")]
    pool_total: Option<usize>,
    /// RAM of all machines that are kept ready, in MiB, as if they used all of it [default: 4096]
    #[arg(long, env = "SANDBOXD_POOL_MEMORY_MB", value_name = "MIB")]
    pool_memory_mb: Option<u64>,
    /// Seconds after which ready machines are ended if nobody has used their shape [default: 600]
    #[arg(long, env = "SANDBOXD_POOL_IDLE_SEC", value_name = "SECONDS")]
    pool_idle_sec: Option<u64>,
    /// How log lines look [default: text]
    #[arg(long, env = "SANDBOXD_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Which log lines there are, such as `debug` or `info,api::hypervisor=debug`
    /// [default: info]
    #[arg(long, env = "SANDBOXD_LOG", value_name = "FILTER")]
    log: Option<String>,
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

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the settings file {path} cannot be read", path = path.display())]
    Read {
        /// Where it is.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file makes no sense.
    #[error("the settings file {path} makes no sense", path = path.display())]
    Parse {
        /// Where it is.
        path: PathBuf,
        /// What is wrong with it, and where.
        #[source]
        source: toml::de::Error,
    },
    /// A setting makes no sense.
    #[error("{0}")]
    Invalid(String),
}

impl Config {
    /// The settings that the file, the environment and the flags make.
    ///
    /// # Errors
    /// There is no such file, or a setting makes no sense.
    pub fn load(flags: Flags) -> Result<Self, ConfigError> {
        let (path, must_exist) = match &flags.config {
            Some(path) => (path.clone(), true),
            None => (PathBuf::from(DEFAULT_FILE), false),
        };
        let mut config = match std::fs::read_to_string(&path) {
            Ok(text) => {
                toml::from_str(&text).map_err(|source| ConfigError::Parse { path, source })?
            }
            Err(error) if !must_exist && error.kind() == io::ErrorKind::NotFound => Self::default(),
            Err(source) => return Err(ConfigError::Read { path, source }),
        };
        config.overlay(flags);
        config.check()?;
        Ok(config)
    }

    fn overlay(&mut self, flags: Flags) {
        fn set<T>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        if !flags.listen.is_empty() {
            self.listen = flags.listen;
        }
        set(&mut self.data_dir, flags.data_dir);
        set(&mut self.runtime_dir, flags.runtime_dir);
        set(&mut self.vmm, flags.vmm.map(Some));
        set(&mut self.auth.registration, flags.registration);
        set(&mut self.images.dir, flags.images_dir.map(Some));
        set(&mut self.images.kernel, flags.kernel.map(Some));
        set(&mut self.images.initramfs, flags.initramfs.map(Some));
        set(&mut self.images.cmdline_extra, flags.cmdline_extra);
        self.images.templates.extend(flags.templates);
        set(&mut self.boot_timeout_sec, flags.boot_timeout_sec);
        set(&mut self.shutdown_timeout_sec, flags.shutdown_timeout_sec);
        set(&mut self.reconcile_sec, flags.reconcile_sec);
        set(&mut self.when_idle, flags.when_idle);
        set(&mut self.on_stop, flags.on_stop);
        set(&mut self.jail.enabled, flags.jail);
        set(&mut self.jail.first_uid, flags.jail_first_uid);
        set(&mut self.jail.cgroup, flags.jail_cgroup);
        let (bytes, ops) = (flags.jail_disk_bytes_per_sec, flags.jail_disk_ops_per_sec);
        set(&mut self.jail.disk_bytes_per_sec, bytes);
        set(&mut self.jail.disk_ops_per_sec, ops);
        set(&mut self.network.mode, flags.network);
        set(&mut self.network.bridge, flags.network_bridge);
        set(&mut self.network.subnet, flags.network_subnet);
        set(&mut self.network.mtu, flags.network_mtu);
        set(
            &mut self.network.namespace,
            flags.network_namespace.map(Some),
        );
        if !flags.network_resolvers.is_empty() {
            self.network.resolvers = flags.network_resolvers;
        }
        set(
            &mut self.network.egress,
            flags.network_egress.map(|policy| match policy {
                EgressFlag::None => Egress::None,
                EgressFlag::All => Egress::All,
            }),
        );
        set(&mut self.limits.upload_bytes, flags.upload_bytes);
        set(
            &mut self.limits.template_archive_bytes,
            flags.template_archive_bytes,
        );
        set(&mut self.limits.exec_output_bytes, flags.exec_output_bytes);
        set(&mut self.limits.exec_memory_bytes, flags.exec_memory_bytes);
        set(&mut self.limits.warm_disk_bytes, flags.warm_disk_bytes);
        set(&mut self.limits.prefetch, flags.prefetch);
        set(&mut self.limits.pool_size, flags.pool_size);
        set(&mut self.limits.pool_total, flags.pool_total);
        set(&mut self.limits.pool_memory_mb, flags.pool_memory_mb);
        set(&mut self.limits.pool_idle_sec, flags.pool_idle_sec);
        set(&mut self.log.format, flags.log_format);
        set(&mut self.log.filter, flags.log);
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |text: String| Err(ConfigError::Invalid(text));
        if self.listen.is_empty() {
            return invalid("listen names no address; expected one at least".to_owned());
        }
        for (name, seconds) in [
            ("boot_timeout_sec", self.boot_timeout_sec),
            ("shutdown_timeout_sec", self.shutdown_timeout_sec),
            ("reconcile_sec", self.reconcile_sec),
        ] {
            if !(1..=3600).contains(&seconds) {
                return invalid(format!("{name} must be 1 to 3600, not {seconds}"));
            }
        }
        if self.limits.exec_memory_bytes > 64 << 20 {
            return invalid("limits.exec_memory_bytes must be 64 MiB at most".to_owned());
        }
        if !(1..=7 * 86_400).contains(&self.limits.pool_idle_sec) {
            return invalid(format!(
                "limits.pool_idle_sec must be 1 to 604800, not {}",
                self.limits.pool_idle_sec
            ));
        }
        if self.jail.first_uid == 0 || self.jail.first_uid > u32::MAX - (1 << 16) {
            return invalid(format!(
                "jail.first_uid must be 1 to {}, not {}",
                u32::MAX - (1 << 16),
                self.jail.first_uid
            ));
        }
        if !matches!(self.jail.cgroup.as_str(), "auto" | "off")
            && (!self.jail.cgroup.starts_with('/') || self.jail.cgroup.contains(','))
        {
            return invalid(format!(
                "jail.cgroup must be auto, off, or an absolute path without comma, not {:?}",
                self.jail.cgroup
            ));
        }
        self.network.check().map_err(ConfigError::Invalid)?;
        if self.images.cmdline_extra.contains(char::is_control) {
            return invalid("images.cmdline_extra has a control character".to_owned());
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.log.filter) {
            return invalid(format!(
                "log.filter {:?}: {}",
                self.log.filter,
                chain(&error)
            ));
        }
        Ok(())
    }

    /// The VMM's binary.
    ///
    /// # Errors
    /// This program does not know where it is itself.
    pub fn vmm_path(&self) -> io::Result<PathBuf> {
        match &self.vmm {
            Some(path) => std::path::absolute(path),
            None => Ok(own_dir()?.join("vmm")),
        }
    }

    /// The directory of images.
    ///
    /// # Errors
    /// This program does not know where it is itself.
    pub fn images_dir(&self) -> io::Result<PathBuf> {
        if let Some(dir) = &self.images.dir {
            return std::path::absolute(dir);
        }
        let installed = own_dir()?.join("../images");
        if installed.is_dir() {
            return installed.canonicalize();
        }
        std::path::absolute("target/images")
    }
}

fn own_dir() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program
        .parent()
        .map_or_else(|| Path::new("/").to_owned(), Path::to_owned))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        flags: Flags,
    }

    fn load(arguments: &[&str]) -> Result<Config, ConfigError> {
        let cli = Cli::try_parse_from([&["sandboxd"], arguments].concat()).unwrap();
        Config::load(cli.flags)
    }

    fn file(text: &str) -> (tempfile::TempDir, String) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sandboxd.toml");
        std::fs::write(&path, text).unwrap();
        let argument = format!("--config={}", path.display());
        (dir, argument)
    }

    const EXAMPLE: &str = include_str!("../sandboxd.example.toml");

    #[test]
    fn the_example_is_the_defaults() {
        assert_eq!(
            toml::from_str::<Config>(EXAMPLE).unwrap(),
            Config::default()
        );
    }

    #[test]
    fn networks_have_names_and_addresses_of_their_own() {
        let check = |further: &[(&str, &str)]| {
            let further = further.iter().map(|(bridge, subnet)| FurtherNetwork {
                bridge: (*bridge).to_owned(),
                subnet: subnet.parse().unwrap(),
                egress: Egress::None,
            });
            let config = NetworkConfig {
                further: further.collect(),
                ..NetworkConfig::default()
            };
            config.check().map(|()| config.for_host(Path::new("/data")))
        };
        let networks = check(&[("chbr1", "192.168.201.0/24"), ("chbr10", "10.0.0.0/16")]);
        let networks = networks.unwrap();
        assert_eq!(networks.len(), 3);
        assert_eq!(networks[0].0.siblings, ["chbr1", "chbr10"]);
        assert_eq!(networks[1].0.siblings, ["chbr0", "chbr10"]);
        assert_eq!(networks[2].1, Egress::None);
        for (bridge, subnet, what) in [
            ("chbr0", "10.0.0.0/16", "names"),
            ("chbr0-a", "10.0.0.0/16", "names"),
            ("chbr1", "192.168.0.0/16", "overlap"),
            ("chbr1", "192.168.200.128/25", "overlap"),
            ("1", "10.0.0.0/16", "letter"),
        ] {
            let error = check(&[(bridge, subnet)]).unwrap_err();
            assert!(error.contains(what), "{error}");
        }
    }

    #[test]
    fn the_example_names_every_setting() {
        let every = Config {
            vmm: Some("/v".into()),
            images: ImagesConfig {
                dir: Some("/i".into()),
                kernel: Some("/k".into()),
                initramfs: Some("/r".into()),
                ..ImagesConfig::default()
            },
            scan: ScanConfig {
                advisories: Some("/a".into()),
            },
            network: NetworkConfig {
                namespace: Some("n".into()),
                ..NetworkConfig::default()
            },
            ..Config::default()
        };
        let written = toml::to_string(&every).unwrap();
        for key in written
            .lines()
            .filter_map(|line| line.split_once(" ="))
            .map(|(key, _)| key)
        {
            let named = |line: &str| {
                line.trim_start_matches("# ")
                    .starts_with(&format!("{key} ="))
            };
            assert!(EXAMPLE.lines().any(named), "{key} is not in the example");
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_the_defaults() {
        let (_dir, config) = file(
            "boot_timeout_sec = 7\n[limits]\nupload_bytes = 5\n[images.templates]\na = '/a'\n",
        );
        let config = load(&[
            &config,
            "--upload-bytes=6",
            "--template=b=/b,c=/c",
            "--listen=[::1]:1",
        ])
        .unwrap();
        assert_eq!(config.boot_timeout_sec, 7);
        assert_eq!(config.limits.upload_bytes, 6);
        assert_eq!(config.limits.exec_output_bytes, 1 << 30);
        assert_eq!(config.images.templates.len(), 3);
        assert_eq!(config.listen, ["[::1]:1".parse().unwrap()]);
    }

    #[test]
    fn unknown_settings_are_refused_by_name() {
        for text in ["lisen = []", "[limits]\nlisen = 1", "[images]\nlisen = 1"] {
            let (_dir, config) = file(text);
            let error = chain(&load(&[&config]).unwrap_err());
            assert!(error.contains("lisen"), "{error}");
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_refused() {
        for arguments in [
            ["--boot-timeout-sec=0"],
            ["--pool-idle-sec=0"],
            ["--exec-memory-bytes=99999999999"],
            ["--jail-first-uid=0"],
            ["--jail-cgroup=somewhere"],
            ["--log=a=b=c"],
            ["--network-bridge=a-long-name"],
            ["--network-bridge=a/b"],
            ["--network-mtu=100"],
            ["--config=/nowhere/sandboxd.toml"],
        ] {
            assert!(load(&arguments).is_err(), "{arguments:?}");
        }
    }
}
