//! Security scans: jobs that look into virtual machines and at what holds them on the host.
//!
//! ```text
//! POST ──► started ──► completed
//!             │  └───► failed: the daemon has crashed
//!             └──────► cancelled: the daemon was asked to end
//! ```
//!
//! A scan is written down before it begins. One that is `started` when the daemon begins was
//! ended by a crash. A guest is hostile: all that is read of it is bounded in size and in time, and
//! what makes no sense is left out or told as such; a machine that cannot be looked into is a warning,
//! and the scan goes on with the next.

mod accounts;
mod advisories;
mod control;
mod evidence;
mod files;
mod guest;
mod host;
mod job;
mod listeners;
mod packages;
mod report;
mod settings;
mod store;
mod sysctl;
mod turns;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info, warn};

pub use control::Framework;
pub use report::{Finding, Results, Severity};
pub use store::{MAX_KEPT, ScanStore, Work};

use turns::Turns;

use crate::audit::AuditLog;
use crate::chain;
use crate::domain::{
    Id, Kind, LookupError, Manager, Page, Principal, Sandbox, SortBy, Status, StoreError, UserId,
};

/// How many of one user may be under way.
const MAX_UNDER_WAY: u32 = 8;
/// The most machines of one scan.
const MAX_MACHINES: u32 = 1000;
/// How long one guest is looked into, at most. It takes seconds, and a few times ten on an emulated host.
const MAX_TIME: Duration = Duration::from_secs(120);
/// How long one takes, until that was measured.
const GUESS: Duration = Duration::from_secs(10);
/// How many scans the estimate is made of.
const MEASURED: u32 = 10;

/// Scans, as in `sc-0a1b2c3d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OfScan {}

impl Kind for OfScan {
    const WHAT: &'static str = "a scan";
    const PREFIX: &'static str = "sc";
    const DIGITS: usize = 8;
}

/// Name of a scan.
pub type ScanId = Id<OfScan>;

/// What a scan looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScanKind {
    /// Packages with known holes.
    Vulnerability,
    /// Settings, and what compliance frameworks ask for besides.
    Compliance,
    /// Settings of guests, and what holds them.
    Configuration,
}

impl ScanKind {
    /// What it is called in the API and the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Vulnerability => "vulnerability",
            Self::Compliance => "compliance",
            Self::Configuration => "configuration",
        }
    }

    /// The kind of that name.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Vulnerability, Self::Compliance, Self::Configuration]
            .into_iter()
            .find(|kind| kind.as_str() == word)
    }
}

/// Where a scan stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScanStatus {
    /// It is under way, or waits for others.
    Started,
    /// It has its results.
    Completed,
    /// The daemon has crashed while it ran.
    Failed,
    /// The daemon was asked to end.
    Cancelled,
}

impl ScanStatus {
    /// What it is called.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A scan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scan {
    /// Its name.
    pub id: ScanId,
    /// Who asked for it; `None` is the local principal.
    pub owner: Option<UserId>,
    /// What it looks at.
    pub kind: ScanKind,
    /// Name of the machine, or `all`.
    pub target: String,
    /// How many machines that were.
    pub machines: u32,
    /// Whose controls select checks; all checks, if there are none.
    pub frameworks: Vec<Framework>,
    /// Where it stands.
    pub status: ScanStatus,
    /// Why it has failed or was cancelled, as a sentence.
    pub reason: Option<String>,
    /// When it was asked for.
    pub started_at: Timestamp,
    /// When it will probably have ended.
    pub estimated_completion: Timestamp,
    /// When it has ended.
    pub completed_at: Option<Timestamp>,
    /// For how many milliseconds it was at work, and did not wait for others; `None` unless it is completed.
    #[serde(default)]
    pub work_ms: Option<u32>,
    /// What it came to.
    pub results: Option<Results>,
}

/// A scan that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanSpec {
    /// What it is to look at.
    pub kind: ScanKind,
    /// Name or id of a machine; `None` for all that the caller may see.
    pub target: Option<String>,
    /// Whose controls select checks.
    pub frameworks: Vec<Framework>,
}

/// Why a scan was not started.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// There is no such machine.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// There is no such scan.
    #[error("there is no such scan")]
    NotFound,
    /// The caller has too many under way.
    #[error("{MAX_UNDER_WAY} scans are under way already; wait for one of them to end")]
    TooMany,
    /// The daemon is shutting down.
    #[error("the daemon is shutting down")]
    ShuttingDown,
}

impl From<StoreError> for ScanError {
    fn from(source: StoreError) -> Self {
        Self::Lookup(source.into())
    }
}

/// Runs scans; clones share it.
#[derive(Clone)]
pub struct Scans {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn ScanStore>,
    audit: AuditLog,
    /// Known holes of packages.
    advisories: Option<PathBuf>,
    turns: Turns,
    /// Held while a scan is added, so that nobody has too many.
    adding: tokio::sync::Mutex<()>,
    cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Scans {
    /// What runs scans that are written down in `store`. Those that a crash has ended are marked.
    ///
    /// # Errors
    /// The store failed.
    pub async fn open(
        store: Arc<dyn ScanStore>,
        audit: AuditLog,
        advisories: Option<PathBuf>,
    ) -> Result<Self, StoreError> {
        loop {
            let left = store.under_way(MAX_KEPT).await?;
            if left.is_empty() {
                break;
            }
            for mut scan in left {
                warn!(scan = %scan.id, "the daemon has ended while a scan ran");
                let reason = "the daemon has ended while it ran".to_owned();
                scan.end(ScanStatus::Failed, Some(reason), None);
                store.update_scan(&scan).await?;
            }
        }
        Ok(Self {
            inner: Arc::new(Inner {
                store,
                audit,
                advisories,
                turns: Turns::new(),
                adding: tokio::sync::Mutex::default(),
                cancel: CancellationToken::new(),
                tasks: TaskTracker::new(),
            }),
        })
    }

    /// Begins a scan for `principal`, for whom `manager` acts.
    ///
    /// # Errors
    /// It is not begun.
    pub async fn start(
        &self,
        manager: &Manager,
        principal: &Principal,
        spec: ScanSpec,
    ) -> Result<Scan, ScanError> {
        let (machines, left_out) = machines(manager, spec.target.as_deref()).await?;
        let target = match &spec.target {
            Some(_) => machines.first().map(Sandbox::shown).unwrap_or_default(),
            None => "all".to_owned(),
        };
        let now = Timestamp::now();
        let count = u32::try_from(machines.len()).unwrap_or(u32::MAX);
        let mut scan = Scan {
            id: ScanId::random(),
            owner: principal.owner().cloned(),
            kind: spec.kind,
            target,
            machines: count,
            frameworks: spec.frameworks,
            status: ScanStatus::Started,
            reason: None,
            started_at: now,
            estimated_completion: now,
            completed_at: None,
            work_ms: None,
            results: None,
        };
        let inner = &self.inner;
        let estimate = inner.estimate(scan.owner.as_ref(), spec.kind).await?;
        let estimate = estimate.saturating_mul(count);
        let estimate = SignedDuration::try_from(estimate).unwrap_or(SignedDuration::MAX);
        scan.estimated_completion = now.checked_add(estimate).unwrap_or(now);
        {
            let _adding = inner.adding.lock().await;
            if inner.cancel.is_cancelled() {
                return Err(ScanError::ShuttingDown);
            }
            let under_way = inner.store.count_under_way(scan.owner.as_ref()).await?;
            if under_way >= MAX_UNDER_WAY {
                return Err(ScanError::TooMany);
            }
            while !inner.store.insert_scan(&scan).await? {
                scan.id = ScanId::random();
            }
            info!(scan = %scan.id, kind = scan.kind.as_str(), machines = count, "scan started");
            let is_of_one = spec.target.is_some();
            let task = run(
                self.clone(),
                manager.clone(),
                scan.clone(),
                Targets {
                    machines,
                    left_out,
                    is_of_one,
                },
            );
            inner.tasks.spawn(task.in_current_span());
        }
        Ok(scan)
    }

    /// A scan of `principal`, or any for one who sees all.
    ///
    /// # Errors
    /// There is none.
    pub async fn get(&self, principal: &Principal, id: &str) -> Result<Scan, ScanError> {
        let id = id.parse().map_err(|_| ScanError::NotFound)?;
        let found = self.inner.store.scan(&id).await?;
        found
            .filter(|scan| principal.may_see(scan.owner.as_ref()))
            .ok_or(ScanError::NotFound)
    }

    /// Cancels what is under way, and writes that down.
    pub async fn shutdown(&self) {
        let adding = self.inner.adding.lock().await;
        self.inner.cancel.cancel();
        self.inner.tasks.close();
        drop(adding);
        self.inner.tasks.wait().await;
    }
}

impl Inner {
    /// How long one machine takes, by the latest scans of this owner and kind.
    async fn estimate(
        &self,
        owner: Option<&UserId>,
        kind: ScanKind,
    ) -> Result<Duration, StoreError> {
        let (mut took, mut machines) = (Duration::ZERO, 0_u32);
        for work in self.store.latest_work(owner, kind, MEASURED).await? {
            took = took.saturating_add(work.took);
            machines = machines.saturating_add(work.machines);
        }
        Ok(took.checked_div(machines).unwrap_or(GUESS))
    }
}

impl Scan {
    fn end(&mut self, status: ScanStatus, reason: Option<String>, results: Option<Results>) {
        self.status = status;
        self.reason = reason;
        self.results = results;
        self.completed_at = Some(Timestamp::now());
    }
}

/// What a scan looks at.
struct Targets {
    machines: Vec<Sandbox>,
    /// How many more there are, which are older.
    left_out: u64,
    /// Whether it was asked for one by its name.
    is_of_one: bool,
}

/// Looks at the machines, and writes down what that came to.
async fn run(scans: Scans, manager: Manager, mut scan: Scan, targets: Targets) {
    let inner = &scans.inner;
    let job = job::Job {
        manager: &manager,
        scan: &scan,
        left_out: targets.left_out,
        advisories: inner.advisories.as_deref(),
        audit: &inner.audit,
    };
    let work = async {
        let turn = inner.turns.scan(job.scan.owner.as_ref()).await;
        job.run(&targets.machines, &turn).await
    };
    let ended = tokio::select! {
        results = work => Some(results),
        () = inner.cancel.cancelled() => None,
    };
    match ended {
        Some((results, work)) => {
            scan.work_ms = Some(u32::try_from(work.as_millis()).unwrap_or(u32::MAX));
            scan.end(ScanStatus::Completed, None, Some(results));
        }
        None => {
            let reason = "the daemon was asked to end".to_owned();
            scan.end(ScanStatus::Cancelled, Some(reason), None);
        }
    }
    info!(scan = %scan.id, status = scan.status.as_str(), "scan has ended");
    if let Err(source) = inner.store.update_scan(&scan).await {
        warn!(scan = %scan.id, error = %chain(&source), "the end of a scan is not recorded");
        return;
    }
    let one = targets.machines.first().filter(|_| targets.is_of_one);
    let (id, status) = (scan.id.to_string(), scan.status.as_str());
    manager.tell_scan_ended(one, scan.owner, id, scan.target, status);
}

/// The machines that are to be looked at, and how many are left out.
async fn machines(
    manager: &Manager,
    target: Option<&str>,
) -> Result<(Vec<Sandbox>, u64), ScanError> {
    if let Some(name) = target {
        return match manager.get(name).await? {
            gone if gone.status == Status::Stopped => Err(LookupError::NotFound.into()),
            machine => Ok((vec![machine], 0)),
        };
    }
    let page = Page {
        owner: None,
        statuses: None,
        was_started: None,
        sort: SortBy::CreatedAt,
        is_descending: true,
        limit: MAX_MACHINES,
        offset: 0,
    };
    let (machines, total) = manager.page(&page).await?;
    Ok((machines, total.saturating_sub(u64::from(MAX_MACHINES))))
}
