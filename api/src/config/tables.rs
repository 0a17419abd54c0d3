//! The tables of the settings file that have no module of their own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::chain;
use crate::domain::Quota;
use crate::hypervisor::{self, CgroupParent, DiskLimits};
use crate::identity::Registration;

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

impl ImagesConfig {
    /// Whether it makes sense. The error is a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.cmdline_extra.contains(char::is_control) {
            return Err("images.cmdline_extra has a control character".to_owned());
        }
        Ok(())
    }
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
    /// Whether it makes sense. The error is a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.first_uid == 0 || self.first_uid > u32::MAX - (1 << 16) {
            return Err(format!(
                "jail.first_uid must be 1 to {}, not {}",
                u32::MAX - (1 << 16),
                self.first_uid
            ));
        }
        if !matches!(self.cgroup.as_str(), "auto" | "off")
            && (!self.cgroup.starts_with('/') || self.cgroup.contains(','))
        {
            return Err(format!(
                "jail.cgroup must be auto, off, or an absolute path without comma, not {:?}",
                self.cgroup
            ));
        }
        Ok(())
    }

    /// The same as the host side takes it; `None` if VMMs are not jailed.
    pub fn for_host(&self) -> Option<hypervisor::JailConfig> {
        self.enabled.then(|| hypervisor::JailConfig {
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
    /// Output and uploads of one user that wait on the disk to be read or passed on, in bytes.
    pub spool_bytes: u64,
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

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            upload_bytes: 100 << 20,
            template_archive_bytes: 10 << 30,
            exec_output_bytes: 1 << 30,
            exec_memory_bytes: 256 << 10,
            spool_bytes: 4 << 30,
            warm_disk_bytes: 4 << 30,
            prefetch: true,
            pool_size: 2,
            pool_total: 8,
            pool_memory_mb: 4096,
            pool_idle_sec: 600,
        }
    }
}

impl LimitsConfig {
    /// Whether they make sense. The error is a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.exec_memory_bytes > 64 << 20 {
            return Err("limits.exec_memory_bytes must be 64 MiB at most".to_owned());
        }
        if !(1..=7 * 86_400).contains(&self.pool_idle_sec) {
            return Err(format!(
                "limits.pool_idle_sec must be 1 to 604800, not {}",
                self.pool_idle_sec
            ));
        }
        Ok(())
    }
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

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            filter: "info".to_owned(),
        }
    }
}

impl LogConfig {
    /// Whether it makes sense. The error is a sentence.
    pub(super) fn check(&self) -> Result<(), String> {
        tracing_subscriber::EnvFilter::try_new(&self.filter)
            .map(drop)
            .map_err(|error| format!("log.filter {:?}: {}", self.filter, chain(&error)))
    }
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
