//! What happens to sandboxes, told to whoever listens.
//!
//! The [`Manager`](super::Manager) tells each event once, in the order of the records, to all
//! subscriptions whose principal may see it. A subscription holds so many events that were not read
//! yet; of more it loses the oldest, and its reader is told how many. So nobody who tells ever waits
//! for one who reads.

mod subscriptions;

use std::net::Ipv4Addr;
use std::time::Duration;

use jiff::Timestamp;

use super::id::{SandboxId, SnapshotId, UserId};
use super::network::Forward;
use super::sandbox::{Sandbox, Standing, Status};
pub use subscriptions::{Events, News, Over, Subscription};

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// When.
    pub at: Timestamp,
    /// To what.
    pub subject: Subject,
    /// What.
    pub change: Change,
}

/// What something happened to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Which sandbox; `None` if it was no particular one.
    pub sandbox: Option<Named>,
    /// Whose it is, who may see it beside those who see all; `None` is the local principal.
    pub owner: Option<UserId>,
}

/// A sandbox, as it is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Its id.
    pub id: SandboxId,
    /// The user's name for it.
    pub name: Option<String>,
}

impl From<&Sandbox> for Named {
    fn from(sandbox: &Sandbox) -> Self {
        Self {
            id: sandbox.id.clone(),
            name: sandbox.name.clone(),
        }
    }
}

impl From<&Sandbox> for Subject {
    fn from(sandbox: &Sandbox) -> Self {
        Self {
            sandbox: Some(sandbox.into()),
            owner: sandbox.owner.clone(),
        }
    }
}

/// What happens to sandboxes.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// It was written down.
    Created,
    /// It is in another state.
    Status {
        /// Where it stood.
        from: Standing,
        /// Where it stands.
        to: Standing,
        /// Why, as a sentence, if that is known.
        reason: Option<String>,
    },
    /// It will not run again, and is nobody's any more. Nothing comes after this.
    Deleted,
    /// Its card is in the network: it runs.
    NetworkAttached {
        /// Its address.
        address: Ipv4Addr,
        /// Name of the network; `None` for the first one.
        network: Option<String>,
    },
    /// Its card is not in the network any more.
    NetworkDetached,
    /// It may reach something else.
    EgressChanged,
    /// A port of the host leads into it.
    ForwardOpened(Forward),
    /// A port of the host leads into it no longer.
    ForwardClosed(Forward),
    /// It has other vCPUs or other memory.
    Resized {
        /// Virtual CPUs.
        vcpus: u8,
        /// RAM in MiB.
        memory_mb: u32,
    },
    /// A command has ended in it.
    CommandExecuted {
        /// Its exit status; `None` if it was killed by the daemon.
        exit_code: Option<i32>,
        /// From the request to its end.
        duration: Duration,
    },
    /// A process was started in it, in the background or on a terminal.
    ProcessStarted {
        /// Its id in the guest.
        pid: u32,
        /// What it is called.
        tag: String,
    },
    /// A file was written in it.
    FileWritten {
        /// Where.
        path: String,
    },
    /// A snapshot of it was taken.
    SnapshotTaken {
        /// Which.
        id: SnapshotId,
        /// Its name among those of the sandbox, if it has one.
        name: Option<String>,
    },
    /// A snapshot of it was deleted.
    SnapshotDeleted {
        /// Which.
        id: SnapshotId,
        /// Its name, as above.
        name: Option<String>,
    },
    /// It was taken back to a snapshot.
    RolledBack {
        /// Which.
        id: SnapshotId,
        /// Its name, as above.
        name: Option<String>,
    },
    /// A security scan of it, or of all, has ended. That is told to who asked for the scan.
    ScanEnded {
        /// Name of the scan.
        id: String,
        /// What it looked at, as it was called then.
        target: String,
        /// Where it stands now.
        status: &'static str,
    },
}

/// What the difference between two records of a sandbox means, in the order in which it is told.
pub fn changes(before: &Sandbox, after: &Sandbox) -> Vec<Change> {
    let mut changes = Vec::new();
    let spec = |sandbox: &Sandbox| (sandbox.spec.vcpus, sandbox.spec.memory_mb);
    if spec(before) != spec(after) {
        let (vcpus, memory_mb) = spec(after);
        changes.push(Change::Resized { vcpus, memory_mb });
    }
    let egress = |sandbox: &Sandbox| sandbox.spec.network.clone().map(|network| network.egress);
    if egress(before) != egress(after) {
        changes.push(Change::EgressChanged);
    }
    let only_in = |one: &Sandbox, other: &Sandbox| {
        let has = |sandbox: &Sandbox, forward: Forward| {
            sandbox.forwards.iter().any(|kept| kept.forward == forward)
        };
        let forwards = one.forwards.iter().map(|kept| kept.forward);
        let forwards = forwards.filter(|forward| !has(other, *forward));
        forwards.collect::<Vec<_>>()
    };
    changes.extend(
        only_in(before, after)
            .into_iter()
            .map(Change::ForwardClosed),
    );
    changes.extend(
        only_in(after, before)
            .into_iter()
            .map(Change::ForwardOpened),
    );
    if before.status == after.status {
        return changes;
    }
    if after.address.is_some() && is_attached(before.status) && !is_attached(after.status) {
        changes.push(Change::NetworkDetached);
    }
    changes.push(Change::Status {
        from: before.standing(),
        to: after.standing(),
        reason: after.status_reason.clone(),
    });
    if let Some(address) = after.address
        && !is_attached(before.status)
        && is_attached(after.status)
    {
        let network = after.spec.network.as_ref();
        changes.push(Change::NetworkAttached {
            address,
            network: network.and_then(|network| network.network.clone()),
        });
    }
    if after.status == Status::Stopped {
        changes.push(Change::Deleted);
    }
    changes
}

/// Whether the card of a sandbox in this state is known to be in the network. One that is on the way
/// out may have it still.
fn is_attached(status: Status) -> bool {
    matches!(status, Status::Running | Status::Pausing | Status::Stopping)
}

#[cfg(test)]
mod tests {
    use super::super::layer::Layers;
    use super::super::network::{Connection, Egress, KeptForward, RateLimits, Transport};
    use super::super::resources::Resources;
    use super::super::sandbox::{Spec, Transition};
    use super::super::timings::Timings;
    use super::*;

    pub(super) fn sandbox() -> Sandbox {
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            timeout_sec: 0,
            network: Some(Connection {
                network: None,
                egress: Egress::All,
                rate_limits: RateLimits::default(),
            }),
            disk_mb: None,
            resources: Resources::default(),
        };
        let now = Timestamp::now();
        let mut sandbox = Sandbox::new(SandboxId::random(), spec, Layers::default(), now);
        sandbox.address = Some(Ipv4Addr::new(192, 168, 200, 5));
        sandbox
    }

    #[test]
    fn each_difference_of_records_is_a_change() {
        let pending = sandbox();
        let after = |before: &Sandbox, transition: Transition| {
            let mut after = before.clone();
            after.apply(transition, Timestamp::now()).unwrap();
            after
        };
        let running = after(&pending, Transition::Started(Timings::default()));
        let attached = Change::NetworkAttached {
            address: Ipv4Addr::new(192, 168, 200, 5),
            network: None,
        };
        let status = |from: &Sandbox, to: &Sandbox| Change::Status {
            from: from.standing(),
            to: to.standing(),
            reason: to.status_reason.clone(),
        };
        assert_eq!(
            changes(&pending, &running),
            [status(&pending, &running), attached]
        );
        assert_eq!(changes(&running, &after(&running, Transition::Used)), []);
        let closed = after(&running, Transition::Egress(Egress::None));
        assert_eq!(changes(&running, &closed), [Change::EgressChanged]);
        let [one, two] = [10_000, 10_001].map(|port| Forward {
            transport: Transport::Tcp,
            host: (Ipv4Addr::LOCALHOST, port).into(),
            guest_port: 80,
        });
        let kept = |forward| KeptForward {
            forward,
            description: None,
        };
        let first = after(&running, Transition::Forwards(vec![kept(one)]));
        let second = after(&first, Transition::Forwards(vec![kept(two)]));
        assert_eq!(changes(&running, &first), [Change::ForwardOpened(one)]);
        assert_eq!(
            changes(&first, &second),
            [Change::ForwardClosed(one), Change::ForwardOpened(two)]
        );
        let mut larger = running.clone();
        (larger.spec.vcpus, larger.spec.memory_mb) = (2, 1024);
        let resized = Change::Resized {
            vcpus: 2,
            memory_mb: 1024,
        };
        assert_eq!(changes(&running, &larger), [resized]);
        let gone = after(&running, Transition::Stopped { reason: None });
        assert_eq!(
            changes(&running, &gone),
            [
                Change::NetworkDetached,
                status(&running, &gone),
                Change::Deleted
            ]
        );
        let reason = "x".to_owned();
        let failed = after(&running, Transition::Failed { reason });
        assert_eq!(
            changes(&running, &failed),
            [Change::NetworkDetached, status(&running, &failed)]
        );
    }
}
