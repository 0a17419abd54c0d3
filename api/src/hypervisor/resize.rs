//! Changing what a running machine has.
//!
//! The VMM asks, and the guest complies in its own time, or not at all. So what counts is what the guest says
//! that it uses. No event tells of memory that was taken into use, and a guest cannot be waited for any
//! better than by asking it again.

use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::LocalHost;
use super::control::{Control, ControlError, Desired};
use super::entry::Entry;
use crate::domain::{Booted, HostError, ResizeRequest, Resources, withheld_mb};

/// How long a guest may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long to wait between questions.
const PAUSE: Duration = Duration::from_millis(50);

/// What a machine is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    vcpus: u8,
    memory_mb: u32,
    resources: Resources,
}

impl Wanted {
    /// What the VMM is asked for to get from `self` to `to`; all of it if these are the same, which may be
    /// because it was asked for before and not seen to the end.
    fn desired(&self, to: &Self) -> Desired {
        let mib = |mib: u32| u64::from(mib) << 20;
        let balloon = |of: &Self| withheld_mb(of.memory_mb, of.resources.memory_limit_percent);
        let again = self == to && to.resources.booted.is_some();
        let has_room = to.resources.booted.is_some_and(Booted::has_memory);
        Desired {
            desired_vcpus: (again || self.vcpus != to.vcpus).then_some(to.vcpus),
            desired_ram: ((again && has_room) || self.memory_mb != to.memory_mb)
                .then_some(mib(to.memory_mb)),
            desired_balloon: (again || balloon(self) != balloon(to)).then_some(mib(balloon(to))),
        }
    }
}

impl LocalHost {
    pub(super) async fn change(&self, request: &ResizeRequest) -> Result<(), HostError> {
        let id = &request.id;
        let entry = self.running(id)?;
        let [old, new] = [0, 1].map(|at| Wanted {
            vcpus: request.vcpus[at],
            memory_mb: request.memory_mb[at],
            resources: request.resources[at],
        });
        let control = Control::new(self.inner.config.paths.api(id));
        // The VMM may take what it has and what it is to have, until it has that.
        let most = old.memory_mb.max(new.memory_mb);
        self.limit(request, most, new)?;
        match self.ask(&entry, &control, &old, &new).await {
            Ok(()) => {
                self.limit(request, new.memory_mb, new)?;
                info!(sandbox = %id, vcpus = new.vcpus, memory_mb = new.memory_mb, "machine resized");
                Ok(())
            }
            Err(error) => {
                let back = new.desired(&old);
                if !back.is_nothing()
                    && let Err(error) = control.resize(&back).await
                {
                    warn!(sandbox = %id, error = crate::chain(&error), "a machine is not taken back");
                }
                self.limit(request, most, old)?;
                Err(error)
            }
        }
    }

    /// Limits what the VMM may take of the host.
    fn limit(
        &self,
        request: &ResizeRequest,
        memory_mb: u32,
        wanted: Wanted,
    ) -> Result<(), HostError> {
        let limit = wanted.resources.cpu_limit_percent;
        let Some(cgroups) = &self.inner.cgroups else {
            return match limit {
                Some(_) => Err(no_cpu_limit()),
                None => Ok(()),
            };
        };
        let limited = cgroups.limit(&request.id, wanted.vcpus, memory_mb, limit);
        match limited {
            Ok(true) => Ok(()),
            Ok(false) if limit.is_none() => Ok(()),
            Ok(false) => Err(no_cpu_limit()),
            Err(error) => Err(HostError::Internal {
                reason: format!("the limits of the sandbox's cgroup cannot be set: {error}"),
            }),
        }
    }

    async fn ask(
        &self,
        entry: &Entry,
        control: &Control,
        old: &Wanted,
        new: &Wanted,
    ) -> Result<(), HostError> {
        let desired = old.desired(new);
        if desired.is_nothing() {
            return Ok(());
        }
        control
            .resize(&desired)
            .await
            .map_err(|error| match error {
                ControlError::Refused { reason, .. } => HostError::Conflict { reason },
                other => HostError::Internal {
                    reason: crate::chain(&other),
                },
            })?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let what = match self.missing(entry, control, &desired).await? {
                None => return Ok(()),
                Some(what) => what,
            };
            if Instant::now() >= deadline {
                return Err(HostError::Agent {
                    reason: format!("{what} within {} s; it has what it had", PATIENCE.as_secs()),
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// What the guest has not yet done, as the beginning of a sentence.
    async fn missing(
        &self,
        entry: &Entry,
        control: &Control,
        desired: &Desired,
    ) -> Result<Option<&'static str>, HostError> {
        let counters = control
            .counters()
            .await
            .map_err(|error| HostError::Internal {
                reason: crate::chain(&error),
            })?;
        let counter = |device: &str, name: &str| counters.get(device)?.get(name).copied();
        if desired.desired_ram.is_some()
            && counter("__mem", "plugged_bytes") != counter("__mem", "requested_bytes")
        {
            return Ok(Some("the guest did not take or give up the memory"));
        }
        if desired.desired_balloon.is_some()
            && counter("__balloon", "actual_bytes") != counter("__balloon", "target_bytes")
        {
            return Ok(Some("the guest did not keep the limit of its memory"));
        }
        if let Some(vcpus) = desired.desired_vcpus {
            let usage = match entry.unless_interrupted(entry.agent.usage()).await {
                Ok(usage) => usage,
                // Its guest may be busy with just that.
                Err(HostError::AgentUnreachable { .. }) => {
                    return Ok(Some("the guest's agent did not answer"));
                }
                Err(error) => return Err(error),
            };
            if usage.cpus != u32::from(vcpus) {
                return Ok(Some("the guest did not take or give up the vCPUs"));
            }
        }
        Ok(None)
    }
}

fn no_cpu_limit() -> HostError {
    HostError::Conflict {
        reason:
            "the sandbox has no cgroup with the controller `cpu`, which keeps cpu_limit_percent"
                .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_asked_for() {
        let wanted = |vcpus, memory_mb, memory_limit_percent| Wanted {
            vcpus,
            memory_mb,
            resources: Resources {
                memory_limit_percent,
                ..Resources::default()
            },
        };
        let old = wanted(2, 512, None);
        assert!(old.desired(&old).is_nothing(), "it has no room");
        let mut roomy = old;
        roomy.resources.booted = Some(Booted::with_room(2, 512, 4096));
        let again = roomy.desired(&roomy);
        assert_eq!(
            (again.desired_vcpus, again.desired_ram),
            (Some(2), Some(512 << 20))
        );
        assert_eq!(again.desired_balloon, Some(0));
        let more = old.desired(&wanted(4, 1024, None));
        assert_eq!(
            (more.desired_vcpus, more.desired_ram),
            (Some(4), Some(1 << 30))
        );
        assert_eq!(more.desired_balloon, None);
        let limited = old.desired(&wanted(2, 512, Some(75)));
        assert_eq!(limited.desired_balloon, Some(128 << 20));
        assert_eq!(limited.desired_ram, None);
        // A limit is one of what there is.
        let grown = wanted(2, 512, Some(75)).desired(&wanted(2, 1024, Some(75)));
        assert_eq!(grown.desired_balloon, Some(256 << 20));
    }
}
