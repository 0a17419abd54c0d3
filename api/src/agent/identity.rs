//! Telling a guest who it is and what time it is.
//!
//! A guest whose kernel can ask KVM what time it is sets its clock by that. The clock of another is late by
//! the time that the request was under way, which after a restore may be long: all that the agent touches
//! has to be read from the disk first. So the answer says what the guest's clock shows, and the host repeats
//! the request until that is right. From the third on, it adds half of the shortest way so far; that of the
//! first says nothing of those that follow.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_protocol::{GuestNetwork, PATH_RESUMED, Resumed, ResumedRequest};
use hyper::StatusCode;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::{AgentClient, failure, host_error, request, unreachable};
use crate::domain::{HostError, Identity, SandboxId};

/// How far a guest's clock may be off, in nanoseconds, all that is uncertain included.
const CLOCK_TOLERANCE_NS: i64 = 50_000_000;
/// How often the clock is set, at most. A host that is too busy for all of these has a guest whose
/// clock is about as wrong as the way to it is long.
const TRIES: usize = 4;
/// How long to wait after an agent could not be reached.
const PAUSE: Duration = Duration::from_millis(100);
/// How many random bytes a guest gets each time: all that its kernel's pool holds.
const SEED: usize = 32;

impl AgentClient {
    /// Tells the guest who it is, how it is connected, and what time it is. A connection that does
    /// not come about or breaks off is not the last: a host under load may take longer for one than
    /// anybody waits for it, and saying it again does no harm.
    ///
    /// # Errors
    /// The agent has not answered by `deadline`, or has refused.
    pub async fn resumed(
        &self,
        id: &SandboxId,
        identity: &Identity,
        network: Option<&GuestNetwork>,
        deadline: Instant,
    ) -> Result<(), HostError> {
        let mut last = "it did not answer in time".to_owned();
        let attempts = async {
            loop {
                match self.set(id, identity, network).await {
                    Err(HostError::AgentUnreachable { reason }) => {
                        warn!(sandbox = %id, reason, "the guest's agent is asked once more");
                        last = reason;
                    }
                    other => return other,
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout_at(deadline, attempts)
            .await
            .unwrap_or(Err(HostError::AgentUnreachable { reason: last }))
    }

    async fn set(
        &self,
        id: &SandboxId,
        identity: &Identity,
        network: Option<&GuestNetwork>,
    ) -> Result<(), HostError> {
        let mut shortest = None;
        for attempt in 1..=TRIES {
            let sent = Instant::now();
            let sent_ns = now_ns();
            let late_ns = shortest.unwrap_or(0);
            let resumed = self
                .set_once(identity, network, sent_ns.saturating_add(late_ns))
                .await?;
            let way = sent.elapsed();
            for problem in &resumed.problems {
                warn!(sandbox = %id, problem, "the guest is not quite as it should be");
            }
            if !resumed.clock {
                return Ok(());
            }
            if let Some(error_ns) = resumed.clock_error_ns
                && error_ns <= CLOCK_TOLERANCE_NS.cast_unsigned()
            {
                debug!(sandbox = %id, error_ns, "guest's clock set by KVM");
                return Ok(());
            }
            let error = clock_error(sent_ns, way, resumed.realtime_ns);
            debug!(sandbox = %id, attempt, off_ns = error.off_ns, way_us = way.as_micros(),
                "guest's clock set");
            if error.off_ns.abs().saturating_add(error.uncertain_ns) <= CLOCK_TOLERANCE_NS {
                return Ok(());
            }
            if attempt > 1 {
                let half = error.uncertain_ns;
                shortest = Some(shortest.map_or(half, |shortest: i64| shortest.min(half)));
            }
        }
        warn!(sandbox = %id, "the guest's clock may be wrong: the way to it takes too long");
        Ok(())
    }

    async fn set_once(
        &self,
        identity: &Identity,
        network: Option<&GuestNetwork>,
        realtime_ns: i64,
    ) -> Result<Resumed, HostError> {
        let body = ResumedRequest {
            realtime_ns: realtime_ns.max(0).cast_unsigned(),
            hostname: identity.hostname.clone(),
            machine_id: identity.machine_id.clone(),
            seed: rand::random::<[u8; SEED]>().to_vec(),
            network: network.cloned(),
        };
        let request = request::post(PATH_RESUMED, &body)?;
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| unreachable("it did not take its identity", &error))?;
        if response.status() != StatusCode::OK {
            return Err(host_error(failure(response).await, ""));
        }
        request::read_json(response).await
    }
}

/// How wrong a clock is, and how certain that is.
#[derive(Debug, PartialEq, Eq)]
struct ClockError {
    /// Ahead of the host's, in nanoseconds.
    off_ns: i64,
    /// Either way, in nanoseconds.
    uncertain_ns: i64,
}

/// Compares a clock that was read somewhere on a way that began at `sent_ns` and took `way`.
fn clock_error(sent_ns: i64, way: Duration, read_ns: u64) -> ClockError {
    let half = i64::try_from(way.as_nanos() / 2).unwrap_or(i64::MAX);
    let middle = sent_ns.saturating_add(half);
    let read = i64::try_from(read_ns).unwrap_or(i64::MAX);
    ClockError {
        off_ns: read.saturating_sub(middle),
        uncertain_ns: half,
    }
}

/// Nanoseconds since the Unix epoch; fits until the year 2262.
fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_compared_with_the_middle_of_the_way() {
        let way = Duration::from_nanos(200);
        for (read, off_ns) in [(1100, 0), (1000, -100), (1250, 150), (0, -1100)] {
            let error = clock_error(1000, way, read);
            let uncertain_ns = 100;
            assert_eq!(
                error,
                ClockError {
                    off_ns,
                    uncertain_ns
                }
            );
        }
        assert!(clock_error(1000, way, u64::MAX).off_ns > i64::MAX - 2000);
    }
}
