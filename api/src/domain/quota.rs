//! Quotas: how much the sandboxes of one owner, or those made with one API key, may have together.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::sandbox::{Sandbox, Spec, Status};

/// How much sandboxes may have together; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Quota {
    /// Sandboxes that run or are on the way there or from there.
    pub sandboxes: u32,
    /// Their virtual CPUs.
    pub vcpus: u32,
    /// Their RAM, in MiB.
    pub memory_mb: u64,
    /// Size of the disks of all sandboxes that are not deleted, as the guests see it, in MiB.
    pub disk_mb: u64,
}

/// The quotas of a daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Quotas {
    /// Of each user.
    pub user: Quota,
    /// Of the local principal.
    pub local: Quota,
}

/// Whose sandboxes a quota is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuotaOf {
    /// Those of one owner.
    Owner,
    /// Those made with one API key.
    Key,
}

impl fmt::Display for QuotaOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Owner => "the quota",
            Self::Key => "the quota of the API key",
        })
    }
}

/// It would be more than the quota.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{of} allows {most} {what} together, {used} are in use and {wanted} more are asked for; \
     pause or delete sandboxes, or ask an administrator for more"
)]
pub struct QuotaExceeded {
    /// Which quota.
    pub of: QuotaOf,
    /// Of what.
    pub what: &'static str,
    /// The quota.
    pub most: u64,
    /// What is in use.
    pub used: u64,
    /// What is wanted beside that.
    pub wanted: u64,
}

/// What sandboxes have together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    sandboxes: u64,
    vcpus: u64,
    memory_mb: u64,
    disk_mb: u64,
}

impl Usage {
    /// With this sandbox, whose disk has this size, too.
    pub fn add(&mut self, sandbox: &Sandbox, disk_mb: u64) {
        self.disk_mb += disk_mb;
        match sandbox.status {
            Status::Pending
            | Status::Running
            | Status::Pausing
            | Status::Resuming
            | Status::Stopping => self.start(&sandbox.spec),
            Status::Paused | Status::Off | Status::Stopped | Status::Error => {}
        }
    }

    fn start(&mut self, spec: &Spec) {
        self.sandboxes += 1;
        self.vcpus += u64::from(spec.vcpus);
        self.memory_mb += u64::from(spec.memory_mb);
    }
}

impl Quota {
    /// Whether there is any.
    pub fn is_limited(&self) -> bool {
        *self != Self::default()
    }

    /// Checks that a sandbox of `spec` may start beside those that are in use; `new_disk_mb` is the
    /// size of its disk if it is new, and `of` for the error.
    ///
    /// # Errors
    /// It may not: the first quota that it would exceed.
    pub fn check(
        &self,
        of: QuotaOf,
        used: Usage,
        spec: &Spec,
        new_disk_mb: u64,
    ) -> Result<(), QuotaExceeded> {
        let table = [
            (
                "running sandboxes",
                u64::from(self.sandboxes),
                used.sandboxes,
                1,
            ),
            (
                "vCPUs",
                u64::from(self.vcpus),
                used.vcpus,
                u64::from(spec.vcpus),
            ),
            (
                "MiB of memory",
                self.memory_mb,
                used.memory_mb,
                u64::from(spec.memory_mb),
            ),
            ("MiB of disk", self.disk_mb, used.disk_mb, new_disk_mb),
        ];
        for (what, most, used, wanted) in table {
            if most > 0 && wanted > 0 && used.saturating_add(wanted) > most {
                return Err(QuotaExceeded {
                    of,
                    what,
                    most,
                    used,
                    wanted,
                });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::id::SandboxId;
    use super::super::layer::Layers;
    use super::super::resources::Resources;
    use super::*;

    fn sandbox(status: Status) -> Sandbox {
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 2,
            memory_mb: 512,
            timeout_sec: 0,
            network: None,
            disk_mb: None,
            resources: Resources::default(),
        };
        let mut sandbox = Sandbox::new(
            SandboxId::random(),
            spec,
            Layers::default(),
            Timestamp::now(),
        );
        sandbox.status = status;
        sandbox
    }

    #[test]
    fn each_quota_holds_by_itself() {
        let mut used = Usage::default();
        used.add(&sandbox(Status::Running), 100);
        used.add(&sandbox(Status::Pending), 100);
        used.add(&sandbox(Status::Paused), 100);
        used.add(&sandbox(Status::Off), 100);
        let none = Quota::default();
        let spec = sandbox(Status::Pending).spec;
        let what = |quota: Quota| {
            let result = quota.check(QuotaOf::Owner, used, &spec, 100);
            result
                .err()
                .map(|error| (error.what, error.used, error.wanted))
        };
        assert_eq!(what(none), None);
        assert!(!none.is_limited());
        assert_eq!(
            what(Quota {
                sandboxes: 3,
                ..none
            }),
            None
        );
        assert_eq!(
            what(Quota {
                sandboxes: 2,
                ..none
            }),
            Some(("running sandboxes", 2, 1))
        );
        assert_eq!(what(Quota { vcpus: 6, ..none }), None);
        assert_eq!(what(Quota { vcpus: 5, ..none }), Some(("vCPUs", 4, 2)));
        assert_eq!(
            what(Quota {
                memory_mb: 1536,
                ..none
            }),
            None
        );
        assert_eq!(
            what(Quota {
                memory_mb: 1535,
                ..none
            }),
            Some(("MiB of memory", 1024, 512))
        );
        assert_eq!(
            what(Quota {
                disk_mb: 500,
                ..none
            }),
            None
        );
        assert_eq!(
            what(Quota {
                disk_mb: 499,
                ..none
            }),
            Some(("MiB of disk", 400, 100))
        );
    }
}
