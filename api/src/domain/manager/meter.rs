//! Measuring sandboxes and their host.
//!
//! Every few seconds the processes of sandboxes are looked at, from outside; what that showed is kept in
//! memory for a day. Guests are asked only when somebody wants to know.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tracing::warn;

use super::super::error::LookupError;
use super::super::history::History;
use super::super::host::HostError;
use super::super::id::SandboxId;
use super::super::sandbox::Status;
use super::super::usage::{
    HostHealth, HostMeasured, HostUsage, MeasureError, Measured, Point, VmmUsage,
};
use super::Manager;
use crate::chain;

/// How often everything is measured.
const PERIOD: Duration = Duration::from_secs(5);

/// The least time that a share of processor time is told of: in less, a process has it or has it not.
const MIN_SHARE: Duration = Duration::from_secs(1);

/// What was measured until now.
#[derive(Debug, Default)]
pub struct Meter {
    sandboxes: Mutex<HashMap<SandboxId, Track>>,
    host: Mutex<Latest<HostUsage>>,
}

/// The last two times that something was measured regularly.
#[derive(Debug)]
struct Latest<T>([Option<(Instant, T)>; 2]);

impl<T> Default for Latest<T> {
    fn default() -> Self {
        Self([None, None])
    }
}

impl<T: Copy> Latest<T> {
    fn push(&mut self, now: Instant, value: T) {
        self.0 = [self.0[1], Some((now, value))];
    }

    /// The latest of them that is long enough ago.
    fn before(&self, now: Instant) -> Option<(Duration, T)> {
        self.0.iter().rev().flatten().find_map(|(at, value)| {
            let ago = now.saturating_duration_since(*at);
            (ago >= MIN_SHARE).then_some((ago, *value))
        })
    }
}

/// What was measured of one sandbox.
#[derive(Debug, Default)]
struct Track {
    latest: Latest<VmmUsage>,
    history: History,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A part of a whole, 0 to 100.
fn percent(part: u64, whole: u64) -> f64 {
    match whole {
        0 => 0.0,
        whole => (part as f64 * 100.0 / whole as f64).min(100.0),
    }
}

/// Share of the time of so many vCPUs that a VMM has had since it was looked at before; if it was
/// started later, since then.
fn cpu_share(now: VmmUsage, before: Option<(Duration, VmmUsage)>, vcpus: u8) -> f64 {
    let (time_us, cpu_us) = before
        .and_then(|(ago, before)| {
            let ago_us = u64::try_from(ago.as_micros()).ok()?;
            let cpu_us = now.cpu_us.checked_sub(before.cpu_us)?;
            (now.age_us >= ago_us).then_some((ago_us, cpu_us))
        })
        .unwrap_or((now.age_us, now.cpu_us));
    percent(cpu_us, time_us.saturating_mul(vcpus.max(1).into()))
}

impl Manager {
    /// Measures everything every few seconds, until it is dropped.
    pub async fn measure_regularly(&self) {
        loop {
            if let Err(source) = self.measure_all().await {
                warn!(error = chain(&source), "nothing is measured");
            }
            tokio::time::sleep(PERIOD).await;
        }
    }

    /// Measures everything once. What is known of sandboxes that are not there any more is forgotten.
    ///
    /// # Errors
    /// The host or the store cannot tell.
    pub async fn measure_all(&self) -> Result<(), MeasureError> {
        let host = self.inner.host.host_usage().await;
        let host = host.map_err(MeasureError::Host)?;
        let usages = self.inner.host.vmm_usages().await;
        let mut usages: HashMap<_, _> = usages.map_err(MeasureError::Host)?.into_iter().collect();
        let live = self.inner.store.list_live().await;
        let live = live.map_err(LookupError::from)?;
        let (now, at) = (Instant::now(), Timestamp::now());
        locked(&self.inner.meter.host).push(now, host);
        let mut tracks = locked(&self.inner.meter.sandboxes);
        let mut kept = HashMap::with_capacity(live.len());
        for sandbox in live {
            let track = tracks.remove(&sandbox.id);
            let usage = usages.remove(&sandbox.id);
            if track.is_none() && usage.is_none() {
                continue;
            }
            let mut track = track.unwrap_or_default();
            if let Some(usage) = usage {
                let before = track.latest.before(now);
                track.history.push(Point {
                    at,
                    cpu_percent: cpu_share(usage, before, sandbox.spec.vcpus),
                    memory_bytes: usage.memory_bytes,
                    disk_bytes: usage.disk_bytes,
                });
                track.latest.push(now, usage);
            }
            kept.insert(sandbox.id, track);
        }
        *tracks = kept;
        Ok(())
    }

    /// Measures a running sandbox, by its id or name. It is not used by that.
    ///
    /// # Errors
    /// It does not run, or cannot be measured.
    pub async fn measure(&self, id: &str) -> Result<Measured, MeasureError> {
        let sandbox = self.get(id).await?;
        if sandbox.status != Status::Running {
            return Err(MeasureError::NotRunning(sandbox.standing()));
        }
        let usage = self.inner.host.sandbox_usage(&sandbox.id).await;
        let usage = usage.map_err(MeasureError::Host)?;
        Ok(Measured {
            at: Timestamp::now(),
            cpu_percent: self.share_of(&sandbox.id, usage.vmm, sandbox.spec.vcpus),
            usage,
            sandbox,
        })
    }

    fn share_of(&self, id: &SandboxId, usage: VmmUsage, vcpus: u8) -> f64 {
        let tracks = locked(&self.inner.meter.sandboxes);
        let track = tracks.get(id);
        let before = track.and_then(|track| track.latest.before(Instant::now()));
        cpu_share(usage, before, vcpus)
    }

    /// What was measured of a sandbox that runs or is paused in the last `range`, and if it runs what
    /// it takes now; oldest first.
    ///
    /// # Errors
    /// It is in another state, or cannot be measured.
    pub async fn history(
        &self,
        id: &str,
        range: Duration,
    ) -> Result<(SandboxId, Vec<Point>), MeasureError> {
        let sandbox = self.get(id).await?;
        let usage = match sandbox.status {
            Status::Running => {
                let usages = self.inner.host.vmm_usages().await;
                let mut usages = usages.map_err(MeasureError::Host)?.into_iter();
                let found = usages.find(|(id, _)| *id == sandbox.id);
                let gone = || HostError::NotRunning {
                    id: sandbox.id.clone(),
                };
                let (_, usage) = found.ok_or_else(|| MeasureError::Host(gone()))?;
                Some(usage)
            }
            Status::Paused => None,
            _ => return Err(MeasureError::NotRunning(sandbox.standing())),
        };
        let at = Timestamp::now();
        let mut points = {
            let tracks = locked(&self.inner.meter.sandboxes);
            let track = tracks.get(&sandbox.id);
            track.map_or_else(Vec::new, |track| track.history.since(range, at))
        };
        points.extend(usage.map(|usage| Point {
            at,
            cpu_percent: self.share_of(&sandbox.id, usage, sandbox.spec.vcpus),
            memory_bytes: usage.memory_bytes,
            disk_bytes: usage.disk_bytes,
        }));
        Ok((sandbox.id, points))
    }

    /// Measures the host, and counts the sandboxes on it that the principal sees.
    ///
    /// # Errors
    /// The host or the store cannot tell.
    pub async fn measure_host(&self) -> Result<HostMeasured, MeasureError> {
        let usage = self.inner.host.host_usage().await;
        let usage = usage.map_err(MeasureError::Host)?;
        let before = locked(&self.inner.meter.host).before(Instant::now());
        let (busy, total) =
            before.map_or((usage.cpu_busy_us, usage.cpu_total_us), |(_, before)| {
                (
                    usage.cpu_busy_us.saturating_sub(before.cpu_busy_us),
                    usage.cpu_total_us.saturating_sub(before.cpu_total_us),
                )
            });
        let owner = self.only_of();
        let totals = self.inner.store.totals(owner.as_ref()).await;
        Ok(HostMeasured {
            at: Timestamp::now(),
            cpu_percent: percent(busy, total),
            usage,
            totals: totals.map_err(LookupError::from)?,
        })
    }

    /// How the host is.
    pub async fn host_health(&self) -> HostHealth {
        self.inner.host.health().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(cpu_ms: u64, age_ms: u64) -> VmmUsage {
        VmmUsage {
            cpu_us: cpu_ms * 1000,
            age_us: age_ms * 1000,
            memory_bytes: 1,
            disk_bytes: 1,
        }
    }

    #[test]
    fn a_share_is_one_of_all_vcpus_and_of_the_time_since_it_was_looked_at() {
        let ago = Duration::from_secs(4);
        let share = |now, before, vcpus| cpu_share(now, Some((ago, before)), vcpus);
        assert_eq!(share(usage(5000, 60_000), usage(3000, 56_000), 1), 50.0);
        assert_eq!(share(usage(5000, 60_000), usage(3000, 56_000), 2), 25.0);
        // Devices take time too.
        assert_eq!(share(usage(9000, 60_000), usage(3000, 56_000), 1), 100.0);
        // It is another process.
        assert_eq!(share(usage(1000, 2000), usage(3000, 56_000), 1), 50.0);
        assert_eq!(share(usage(1000, 10_000), usage(3000, 56_000), 1), 10.0);
        assert_eq!(cpu_share(usage(500, 1000), None, 1), 50.0);
        assert_eq!(cpu_share(usage(0, 0), None, 0), 0.0);
    }

    #[test]
    fn a_share_is_not_told_of_next_to_no_time() {
        let start = Instant::now();
        let second = |seconds: u64| start + Duration::from_millis(seconds * 1000);
        let mut latest = Latest::default();
        assert_eq!(latest.before(start), None);
        for (at, value) in [(0, 1), (5, 2), (10, 3)] {
            latest.push(second(at), value);
        }
        let before = |seconds: f64| latest.before(start + Duration::from_secs_f64(seconds));
        assert_eq!(before(12.0), Some((Duration::from_secs(2), 3)));
        assert_eq!(before(10.5), Some((Duration::from_millis(5500), 2)));
        assert_eq!(before(5.5), None);
    }
}
