//! What the daemon counts of itself, and how it is told to Prometheus.
//!
//! What happens is counted when it happens: changes of sandboxes ([`Observer`]) and requests. What is so
//! is looked at when somebody asks ([`Now`]). None of it names a sandbox or a user.

mod requests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::domain::{Divergence, HostUsage, Observer, Principal, Sandbox, Start, Status, Timings};
use requests::Today;
pub use requests::{Answered, Statistics, method_word};

/// What answers of [`Metrics::encode`] are.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bounds of the histogram of starts, in seconds: from a phase of one out of the pool to a boot on a host
/// under load.
const START_BOUNDS: [f64; 15] = [
    0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
];
/// Bounds of the histogram of requests, in seconds.
const REQUEST_BOUNDS: [f64; 12] = [
    0.000_5, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StartPhase {
    kind: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Change {
    from: &'static str,
    to: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Healed {
    divergence: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Request {
    method: &'static str,
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    method: &'static str,
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Build {
    version: &'static str,
    rust_version: &'static str,
}

/// What is so at this moment.
#[derive(Debug, Clone)]
pub struct Now<'a> {
    /// All sandboxes that are not deleted.
    pub sandboxes: &'a [Sandbox],
    /// What the reconciler has healed.
    pub healed: &'a [(Divergence, u64)],
    /// What is taken of the host.
    pub host: HostUsage,
}

/// What the daemon counts; clones share it.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    started: Instant,
    changes: Family<Change, Counter>,
    starts: Family<StartPhase, Histogram>,
    requests: Family<Request, Counter>,
    request_times: Family<Route, Histogram>,
    today: Today,
    scraped: Scraped,
    registry: Mutex<Registry>,
}

/// Set from [`Now`] before it is told, under the lock of the registry.
struct Scraped {
    sandboxes: Family<InState, Gauge>,
    vcpus: Gauge,
    memory: Gauge,
    healed: Family<Healed, Counter>,
    host_cpus: Gauge,
    host_busy: Counter<f64, AtomicU64>,
    host_memory: Gauge,
    host_memory_available: Gauge,
    host_disk: Gauge,
    host_disk_available: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Counters at 0, as of now.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("sandboxd");
        let inner = Inner {
            started: Instant::now(),
            changes: Family::default(),
            starts: Family::new_with_constructor(|| Histogram::new(START_BOUNDS)),
            requests: Family::default(),
            request_times: Family::new_with_constructor(|| Histogram::new(REQUEST_BOUNDS)),
            today: Today::default(),
            scraped: Scraped::register(&mut registry),
            registry: Mutex::default(),
        };
        let build = Family::<Build, Gauge>::default();
        build
            .get_or_create(&Build {
                version: env!("CARGO_PKG_VERSION"),
                rust_version: crate::RUST_VERSION,
            })
            .set(1);
        registry.register("build_info", "Version of the daemon", build);
        let start_time = Gauge::<i64>::default();
        start_time.set(Timestamp::now().as_second());
        registry.register_with_unit(
            "start_time",
            "When the daemon was started, since the Unix epoch",
            Unit::Seconds,
            start_time,
        );
        registry.register(
            "sandbox_transitions",
            "Changes of sandboxes from one state to another",
            inner.changes.clone(),
        );
        registry.register_with_unit(
            "sandbox_start",
            "How long the phases of starts took, by kind of start",
            Unit::Seconds,
            inner.starts.clone(),
        );
        registry.register(
            "http_requests",
            "Requests that were answered, by route and status",
            inner.requests.clone(),
        );
        registry.register_with_unit(
            "http_request",
            "How long it took until answers began",
            Unit::Seconds,
            inner.request_times.clone(),
        );
        *inner
            .registry
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = registry;
        Self {
            inner: Arc::new(inner),
        }
    }

    /// Since when there is a daemon.
    pub fn uptime(&self) -> Duration {
        self.inner.started.elapsed()
    }

    /// Counts a request.
    pub fn answered(&self, who: Option<&Principal>, answered: Answered) {
        let inner = &self.inner;
        let Answered {
            method,
            route,
            status,
            took,
        } = answered;
        let request = Request {
            method,
            route: route.clone(),
            status: status.as_u16(),
        };
        inner.requests.get_or_create(&request).inc();
        let times = inner.request_times.get_or_create(&Route { method, route });
        times.observe(took.as_secs_f64());
        inner.today.count(who, took, Timestamp::now());
    }

    /// Requests of today, as far as they are this principal's to know of.
    pub fn statistics(&self, who: &Principal) -> Statistics {
        self.inner.today.statistics(who, Timestamp::now())
    }

    /// All of it, as text.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn encode(&self, now: &Now<'_>) -> Result<String, std::fmt::Error> {
        let registry = &self.inner.registry;
        let registry = registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.scraped.set(now);
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

impl Observer for Metrics {
    fn changed(&self, before: Status, sandbox: &Sandbox) {
        let change = Change {
            from: before.as_str(),
            to: sandbox.status.as_str(),
        };
        self.inner.changes.get_or_create(&change).inc();
        let has_started = sandbox.status == Status::Running
            && matches!(before, Status::Pending | Status::Resuming);
        if let (true, Some(timings)) = (has_started, sandbox.timings) {
            for (phase, us) in phases(timings) {
                let kind = kind_of(timings.start);
                let times = self.inner.starts.get_or_create(&StartPhase { kind, phase });
                times.observe(Duration::from_micros(us).as_secs_f64());
            }
        }
    }
}

fn phases(timings: Timings) -> [(&'static str, u64); 6] {
    [
        ("prepare", timings.prepare_us),
        ("vmm", timings.vmm_us),
        ("boot", timings.boot_us),
        ("identity", timings.identity_us),
        ("readiness", timings.readiness_us),
        ("total", timings.total_us),
    ]
}

fn kind_of(start: Start) -> &'static str {
    match start {
        Start::Cold => "cold",
        Start::ColdFallback => "cold_fallback",
        Start::Warm => "warm",
        Start::Pool => "pool",
        Start::Fork => "fork",
        Start::Resume => "resume",
    }
}

/// What a gauge holds; more than fits is told as the most.
fn whole(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

impl Scraped {
    fn register(registry: &mut Registry) -> Self {
        let new = Self {
            sandboxes: Family::default(),
            vcpus: Gauge::default(),
            memory: Gauge::default(),
            healed: Family::default(),
            host_cpus: Gauge::default(),
            host_busy: Counter::default(),
            host_memory: Gauge::default(),
            host_memory_available: Gauge::default(),
            host_disk: Gauge::default(),
            host_disk_available: Gauge::default(),
        };
        registry.register(
            "sandboxes",
            "Sandboxes that are not deleted, by state",
            new.sandboxes.clone(),
        );
        registry.register(
            "running_vcpus",
            "vCPUs of sandboxes that run",
            new.vcpus.clone(),
        );
        registry.register(
            "reconciler_healed",
            "Divergences between records and host that were healed",
            new.healed.clone(),
        );
        registry.register("host_cpus", "Processors of the host", new.host_cpus.clone());
        registry.register_with_unit(
            "host_cpu_busy",
            "Time that all processors together were not idle",
            Unit::Seconds,
            new.host_busy.clone(),
        );
        for (name, help, gauge) in [
            (
                "running_memory",
                "Memory of sandboxes that run",
                &new.memory,
            ),
            ("host_memory", "Memory of the host", &new.host_memory),
            (
                "host_memory_available",
                "Memory of the host that programs could still have",
                &new.host_memory_available,
            ),
            (
                "host_disk",
                "Size of the file system that sandboxes' disks lie in",
                &new.host_disk,
            ),
            (
                "host_disk_available",
                "What the daemon could still take of that",
                &new.host_disk_available,
            ),
        ] {
            registry.register_with_unit(name, help, Unit::Bytes, gauge.clone());
        }
        new
    }

    fn set(&self, now: &Now<'_>) {
        for state in Status::ALL {
            let of = now.sandboxes.iter().filter(|it| it.status == state);
            let state = state.as_str();
            let gauge = self.sandboxes.get_or_create(&InState { state });
            gauge.set(whole(of.count()));
        }
        let running = || {
            now.sandboxes
                .iter()
                .filter(|it| it.status == Status::Running)
        };
        let vcpus = running().map(|it| i64::from(it.spec.vcpus)).sum();
        self.vcpus.set(vcpus);
        let memory = running().map(|it| i64::from(it.spec.memory_mb) << 20).sum();
        self.memory.set(memory);
        for (divergence, count) in now.healed {
            let divergence = divergence.as_str();
            let counter = self.healed.get_or_create(&Healed { divergence });
            counter.inner().store(*count, Ordering::Relaxed);
        }
        let host = now.host;
        self.host_cpus.set(host.cpus.into());
        let busy = Duration::from_micros(host.cpu_busy_us).as_secs_f64();
        self.host_busy
            .inner()
            .store(busy.to_bits(), Ordering::Relaxed);
        self.host_memory.set(whole(host.memory_total));
        self.host_memory_available.set(whole(host.memory_available));
        self.host_disk.set(whole(host.disk_total));
        self.host_disk_available.set(whole(host.disk_available));
    }
}
