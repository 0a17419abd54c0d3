//! The daemon, from its checks at start to its end.
//!
//! Start, in this order, so that a daemon that cannot work says so before it changes anything:
//! check what it needs, lock its directories, take its ports, open its database, end what an
//! earlier daemon left, settle the records, serve. End: take no more requests, wait for those in
//! flight, end every sandbox that runs, write that down.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::FlockOperation;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::audit::{self, AuditError, AuditLog};
use crate::chain;
use crate::config::{Config, NetworkMode};
use crate::descriptors;
use crate::domain::{
    ExecLimits, Host, Limits, Manager, OnStop, PoolLimits, Quotas, RecoverError, SpoolSpace,
};
use crate::http::{self, Access, AppState, OpenApiError, RateLimiter, Rates, Sockets, Stop};
use crate::hypervisor::{
    HostConfig, HostNetwork, HostNetworks, LeftoverError, LocalHost, Paths, PathsError,
};
use crate::identity::{HashError, Identity, KeyFileError, Tokens};
use crate::images::{ImageError, Images};
use crate::metrics::Metrics;
use crate::network::{Network, NetworkError};
use crate::private;
use crate::scan::Scans;
use crate::store::{OpenError, SqliteStore};

/// From how many disk layers on those of a sandbox are merged. Each is an open file of its VMM, and
/// a table to look into for what is not in those above it; a merge copies all that they hold.
const MERGE_FROM: usize = 8;

/// How long clients of WebSockets have to take what they are told at the end of the daemon.
const GOODBYE: Duration = Duration::from_secs(1);

/// Why the daemon did not start, or ended otherwise than asked.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// As many files as are allowed cannot be opened.
    #[error("the limit of open files cannot be raised to what is allowed (ulimit -n)")]
    Descriptors(#[source] io::Error),
    /// This program does not know where it is itself.
    #[error("the directory of this program is unknown; name the files by --vmm and --images-dir")]
    OwnDirectory(#[source] io::Error),
    /// There is no VMM.
    #[error(
        "the vmm binary {path} cannot be executed; build it with `cargo build -p vmm`, or name \
         another with --vmm",
        path = path.display()
    )]
    Vmm {
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// There is no KVM.
    #[error("/dev/kvm cannot be opened; `vmm doctor` tells why and what to do")]
    Kvm(#[source] io::Error),
    /// An image is missing.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A directory is not usable.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// A directory cannot be made, or be kept from others.
    #[error("the directory {path} cannot be made, or not be kept from others", path = path.display())]
    Directory {
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// Another daemon works there.
    #[error(
        "another sandboxd uses {path}; stop it, or choose other directories with --data-dir and \
         --runtime-dir",
        path = path.display()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// An address is taken or not ours.
    #[error("{address} cannot be listened on; choose others with --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The database is not usable.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// An earlier daemon's remains are in the way.
    #[error(transparent)]
    Leftover(#[from] LeftoverError),
    /// What an earlier daemon left cannot be settled.
    #[error(transparent)]
    Recover(#[from] RecoverError),
    /// There is no network, and `network.mode` is `on`.
    #[error("the network of sandboxes cannot be set up, and network.mode is on")]
    Network(#[source] NetworkError),
    /// The key of tokens is not usable.
    #[error(transparent)]
    Tokens(#[from] KeyFileError),
    /// The audit log is not usable.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// Passwords cannot be hashed.
    #[error(transparent)]
    Passwords(#[from] HashError),
    /// The API's description cannot be written.
    #[error(transparent)]
    OpenApi(#[from] OpenApiError),
    /// Signals cannot be received.
    #[error("signals cannot be received")]
    Signals(#[source] io::Error),
}

/// How a daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nothing of it runs any more.
    Wholly,
    /// Sandboxes run on. What is at them in this process must not be dropped, for that would end them.
    WhileSandboxesRun,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// It cannot start. Once it serves, it ends only as asked.
pub async fn serve(config: Config) -> Result<Ended, DaemonError> {
    let connections = descriptors::raise().map_err(DaemonError::Descriptors)?;
    let images_dir = config.images_dir().map_err(DaemonError::OwnDirectory)?;
    let images = images(&config, &images_dir)?;
    let vmm = config.vmm_path().map_err(DaemonError::OwnDirectory)?;
    rustix::fs::access(&vmm, rustix::fs::Access::EXEC_OK).map_err(|source| DaemonError::Vmm {
        path: vmm.clone(),
        source: source.into(),
    })?;
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map_err(DaemonError::Kvm)?;

    let data_dir = absolute(&config.data_dir)?;
    let runtime_dir = absolute(&config.runtime_dir)?;
    let paths = Paths::new(&runtime_dir, &data_dir)?;
    let _locks = (lock(&data_dir)?, lock(&runtime_dir)?);
    let spool_dir = data_dir.join("spool");
    private::directory(&spool_dir).map_err(|source| DaemonError::Directory {
        path: spool_dir.clone(),
        source,
    })?;
    let mut listeners = Vec::new();
    for &address in &config.listen {
        let failed = |source| DaemonError::Listen { address, source };
        listeners.push(TcpListener::bind(address).await.map_err(failed)?);
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(DaemonError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(DaemonError::Signals)?;

    let store = SqliteStore::open(&data_dir.join("sandboxd.db"))?;
    let networks = networks(&config, &data_dir).await?;
    let host = LocalHost::start(HostConfig {
        vmm,
        images,
        paths,
        boot_timeout: Duration::from_secs(config.boot_timeout_sec),
        cmdline_extra: config.images.cmdline_extra.clone(),
        prefetch: config.limits.prefetch,
        jail: config.jail.for_host(),
        networks,
    })
    .await?;
    let limits = Limits {
        exec: ExecLimits {
            max_output: config.limits.exec_output_bytes,
            memory_threshold: config.limits.exec_memory_bytes,
            spool: SpoolSpace::new(spool_dir, config.limits.spool_bytes),
        },
        warm_bytes: config.limits.warm_disk_bytes,
        when_idle: config.when_idle,
        pool: PoolLimits {
            per_shape: config.limits.pool_size,
            total: config.limits.pool_total,
            memory_mb: config.limits.pool_memory_mb,
            idle: Duration::from_secs(config.limits.pool_idle_sec),
        },
        merge_from: MERGE_FROM,
        quotas: Quotas {
            user: config.auth.user_quota.into(),
            local: config.auth.local_quota.into(),
        },
    };
    let events = host.events().await;
    let store = Arc::new(store);
    let tokens = Tokens::open(&data_dir.join("token.key"))?;
    let identity = Identity::new(store.clone(), tokens, config.auth.registration)?;
    let manager = Manager::new(Arc::new(host), store.clone(), limits);
    manager.recover().await?;
    let follower = manager.clone();
    tokio::spawn(async move { follower.follow(events).await });
    let reaper = manager.clone();
    tokio::spawn(async move { reaper.set_aside_idle().await });
    let reconciler = manager.clone();
    let period = Duration::from_secs(config.reconcile_sec);
    tokio::spawn(async move { reconciler.reconcile_every(period).await });
    let meter = manager.clone();
    tokio::spawn(async move { meter.measure_regularly().await });
    let keeper = manager.clone();
    tokio::spawn(async move { keeper.keep_pool().await });

    let sockets = Sockets::default();
    let metrics = Metrics::new();
    manager.observe(Arc::new(metrics.clone()));
    let audit = AuditLog::open(&data_dir.join(audit::FILE))?;
    let scans = Scans::open(store.clone(), audit.clone(), config.scan.advisories.clone());
    let scans = scans.await.map_err(RecoverError::Store)?;
    let patience = config.requests.for_http();
    let state = AppState {
        metrics,
        manager: manager.clone().into(),
        identity,
        access: Access::of(&config.listen),
        rates: RateLimiter::new(Rates {
            per_minute: config.auth.requests_per_minute,
            per_hour: config.auth.requests_per_hour,
        }),
        audit: audit.clone(),
        scans: scans.clone(),
        sockets: sockets.clone(),
        patience,
        max_upload: config.limits.upload_bytes,
        max_archive: config.limits.template_archive_bytes,
    };
    let router = http::router(state)?;
    let stop = Stop::default();
    let room = Arc::new(Semaphore::new(connections));
    let mut servers = JoinSet::new();
    for listener in listeners {
        if let Ok(address) = listener.local_addr() {
            info!(%address, "listening");
        }
        servers.spawn(http::serve(
            listener,
            router.clone(),
            patience.head,
            Arc::clone(&room),
            stop.clone(),
        ));
    }
    info!(version = env!("CARGO_PKG_VERSION"), "sandboxd is ready");

    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    info!(signal = name, "shutting down");
    stop.closing.cancel();
    let in_flight = async { while servers.join_next().await.is_some() {} };
    let patience = Duration::from_secs(config.shutdown_timeout_sec);
    tokio::select! {
        () = in_flight => {}
        () = tokio::time::sleep(patience) => {
            warn!("requests are still in flight after {} s; ending them", patience.as_secs());
        }
        _ = terminate.recv() => warn!("asked again; ending requests in flight"),
        _ = interrupt.recv() => warn!("asked again; ending requests in flight"),
    }
    scans.shutdown().await;
    if config.on_stop == OnStop::Pause {
        tokio::select! {
            () = manager.pause_all() => {}
            _ = terminate.recv() => warn!("asked again; sandboxes that are not paused yet run on"),
            _ = interrupt.recv() => warn!("asked again; sandboxes that are not paused yet run on"),
        }
    }
    let runs_on = manager.shutdown(config.on_stop != OnStop::Delete).await;
    // What is not answered until here is on record as such.
    stop.ending.cancel();
    while servers.join_next().await.is_some() {}
    audit.flush().await;
    sockets.closed(GOODBYE).await;
    info!("sandboxd has shut down");
    Ok(match runs_on {
        true => Ended::WhileSandboxesRun,
        false => Ended::Wholly,
    })
}

/// The networks of sandboxes, if they are to have any and all of them can be set up.
async fn networks(
    config: &Config,
    data_dir: &Path,
) -> Result<Option<Arc<HostNetworks>>, DaemonError> {
    let wanted = config.network.for_host(data_dir);
    if wanted.is_empty() {
        info!("sandboxes have no network card: network.mode is off");
    }
    let mut started = Vec::with_capacity(wanted.len());
    for (settings, default_egress) in wanted {
        let source = match Network::start(settings).await {
            Ok(network) => {
                started.push(HostNetwork {
                    network,
                    default_egress,
                });
                continue;
            }
            Err(source) => source,
        };
        for one in started.iter().rev() {
            one.network.stop().await;
        }
        if config.network.mode != NetworkMode::Auto {
            return Err(DaemonError::Network(source));
        }
        warn!(
            reason = chain(&source),
            "sandboxes have no network card; commands and files work without"
        );
        return Ok(None);
    }
    let mut started = started.into_iter();
    let first = started.next();
    Ok(first.map(|first| Arc::new(HostNetworks::new(first, started.collect()))))
}

fn images(config: &Config, dir: &Path) -> Result<Images, DaemonError> {
    let mut images = Images::in_dir(dir)?;
    if let Some(kernel) = &config.images.kernel {
        images.kernel = absolute(kernel)?;
    }
    if let Some(initramfs) = &config.images.initramfs {
        images.initramfs = absolute(initramfs)?;
    }
    for (name, path) in &config.images.templates {
        images.templates.insert(name.clone(), absolute(path)?);
    }
    images.check(dir)?;
    Ok(images)
}

fn absolute(path: &Path) -> Result<PathBuf, DaemonError> {
    std::path::absolute(path).map_err(|source| DaemonError::Directory {
        path: path.to_owned(),
        source,
    })
}

/// Holds `dir` for this process until the file is closed, at the latest by the process's end.
fn lock(dir: &Path) -> Result<File, DaemonError> {
    let path = dir.join("sandboxd.lock");
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|source| DaemonError::Directory {
            path: dir.to_owned(),
            source,
        })?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(DaemonError::Locked {
            path: dir.to_owned(),
        }),
        Err(source) => Err(DaemonError::Directory {
            path: dir.to_owned(),
            source: source.into(),
        }),
    }
}
