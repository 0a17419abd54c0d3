//! Settings: built-in defaults, then a file, then the environment, then flags.

mod flags;
mod network;
mod requests;
mod tables;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::domain::{Egress, OnStop, WhenIdle};
use flags::EgressFlag;
pub use flags::Flags;
pub use network::{FurtherNetwork, NetworkConfig, NetworkMode};
pub use requests::RequestsConfig;
pub use tables::{
    AuthConfig, ImagesConfig, JailConfig, LimitsConfig, LogConfig, LogFormat, QuotaConfig,
    ScanConfig,
};

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
    /// How long clients may take to send.
    pub requests: RequestsConfig,
    /// Sizes.
    pub limits: LimitsConfig,
    /// Logs.
    pub log: LogConfig,
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
            requests: RequestsConfig::default(),
            limits: LimitsConfig::default(),
            log: LogConfig::default(),
        }
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
        config.check().map_err(ConfigError::Invalid)?;
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
        self.requests = self.requests.with(&flags.requests);
        set(&mut self.limits.upload_bytes, flags.upload_bytes);
        set(
            &mut self.limits.template_archive_bytes,
            flags.template_archive_bytes,
        );
        set(&mut self.limits.exec_output_bytes, flags.exec_output_bytes);
        set(&mut self.limits.exec_memory_bytes, flags.exec_memory_bytes);
        set(&mut self.limits.spool_bytes, flags.spool_bytes);
        set(&mut self.limits.warm_disk_bytes, flags.warm_disk_bytes);
        set(&mut self.limits.prefetch, flags.prefetch);
        set(&mut self.limits.pool_size, flags.pool_size);
        set(&mut self.limits.pool_total, flags.pool_total);
        set(&mut self.limits.pool_memory_mb, flags.pool_memory_mb);
        set(&mut self.limits.pool_idle_sec, flags.pool_idle_sec);
        set(&mut self.log.format, flags.log_format);
        set(&mut self.log.filter, flags.log);
    }

    /// Whether all settings make sense. The error is a sentence.
    fn check(&self) -> Result<(), String> {
        if self.listen.is_empty() {
            return Err("listen names no address; expected one at least".to_owned());
        }
        for (name, seconds) in [
            ("boot_timeout_sec", self.boot_timeout_sec),
            ("shutdown_timeout_sec", self.shutdown_timeout_sec),
            ("reconcile_sec", self.reconcile_sec),
        ] {
            if !(1..=3600).contains(&seconds) {
                return Err(format!("{name} must be 1 to 3600, not {seconds}"));
            }
        }
        self.requests.check()?;
        self.limits.check()?;
        self.jail.check()?;
        self.network.check()?;
        self.images.check()?;
        self.log.check()
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
    use crate::chain;

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

    const EXAMPLE: &str = include_str!("../../sandboxd.example.toml");

    #[test]
    fn the_example_is_the_defaults() {
        assert_eq!(
            toml::from_str::<Config>(EXAMPLE).unwrap(),
            Config::default()
        );
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
            ["--request-head-sec=0"],
            ["--request-body-sec=3601"],
            ["--upload-idle-sec=0"],
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
