//! What happens to sandboxes, told to whoever listens.
//!
//! The [`Manager`](super::Manager) tells each event once, in the order of the records, to all
//! subscriptions whose principal may see it. A subscription holds so many events that were not read
//! yet; of more it loses the oldest, and its reader is told how many. So nobody who tells ever waits
//! for one who reads.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::Notify;

use super::id::{SandboxId, SnapshotId, UserId};
use super::network::Forward;
use super::principal::Principal;
use super::sandbox::{Sandbox, Standing, Status};

/// How many events wait for one reader, unless a test wants others.
pub const MAX_WAITING: usize = 256;

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

/// What a reader gets.
#[derive(Debug, Clone, PartialEq)]
pub enum News {
    /// Something happened.
    Event(Arc<Event>),
    /// The reader was so slow that this many events before the next one are lost.
    Lost(u64),
}

/// Why nothing follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// The sandbox that was followed is deleted.
    Deleted,
    /// The daemon ends.
    Closing,
}

/// Tells events to subscriptions; clones share them.
#[derive(Debug, Clone)]
pub struct Events {
    shared: Arc<Shared>,
    max_waiting: usize,
}

#[derive(Debug, Default)]
struct Shared {
    subscriptions: Mutex<Subscriptions>,
}

#[derive(Debug, Default)]
struct Subscriptions {
    next: u64,
    known: HashMap<u64, Arc<Queue>>,
    is_closed: bool,
}

#[derive(Debug)]
struct Queue {
    principal: Principal,
    /// Only of this sandbox; `None` for all that the principal may see.
    of: Option<SandboxId>,
    waiting: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Arc<Event>>,
    lost: u64,
    over: Option<Over>,
}

impl Default for Events {
    fn default() -> Self {
        Self::new(MAX_WAITING)
    }
}

impl Events {
    /// With this many events at most that wait for one reader.
    pub fn new(max_waiting: usize) -> Self {
        Self {
            shared: Arc::default(),
            max_waiting: max_waiting.max(1),
        }
    }

    /// Tells all who may see it.
    pub fn tell(&self, event: Event) {
        let event = Arc::new(event);
        let subscriptions = self.shared.lock();
        for queue in subscriptions.known.values() {
            if queue.wants(&event) {
                queue.push(Arc::clone(&event), self.max_waiting);
            }
        }
    }

    /// What this principal may see from now on, of one sandbox or of all.
    pub fn subscribe(&self, principal: Principal, of: Option<SandboxId>) -> Subscription {
        let queue = Arc::new(Queue {
            principal,
            of,
            waiting: Mutex::default(),
            changed: Notify::new(),
        });
        let mut subscriptions = self.shared.lock();
        let key = subscriptions.next;
        subscriptions.next += 1;
        match subscriptions.is_closed {
            true => queue.end(Over::Closing),
            false => {
                subscriptions.known.insert(key, Arc::clone(&queue));
            }
        }
        Subscription {
            key,
            queue,
            shared: Arc::clone(&self.shared),
        }
    }

    /// Ends all subscriptions, once what waits has been read.
    pub fn close(&self) {
        let mut subscriptions = self.shared.lock();
        subscriptions.is_closed = true;
        for queue in subscriptions.known.values() {
            queue.end(Over::Closing);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Subscriptions> {
        let subscriptions = self.subscriptions.lock();
        subscriptions.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wants(&self, event: &Event) -> bool {
        let subject = &event.subject;
        self.principal.may_see(subject.owner.as_ref())
            && self.of.as_ref().is_none_or(|of| {
                let sandbox = subject.sandbox.as_ref();
                sandbox.is_some_and(|sandbox| sandbox.id == *of)
            })
    }

    fn push(&self, event: Arc<Event>, max_waiting: usize) {
        let mut waiting = self.lock();
        if waiting.over.is_some() {
            return;
        }
        if waiting.events.len() >= max_waiting {
            waiting.events.pop_front();
            waiting.lost += 1;
        }
        if self.of.is_some() && event.change == Change::Deleted {
            waiting.over = Some(Over::Deleted);
        }
        waiting.events.push_back(event);
        drop(waiting);
        self.changed.notify_one();
    }

    fn end(&self, why: Over) {
        self.lock().over.get_or_insert(why);
        self.changed.notify_one();
    }
}

/// Events for one reader, until it is dropped.
#[derive(Debug)]
pub struct Subscription {
    key: u64,
    queue: Arc<Queue>,
    shared: Arc<Shared>,
}

impl Subscription {
    /// What comes next; why there is nothing, once all was read.
    pub async fn next(&mut self) -> Result<News, Over> {
        loop {
            {
                let mut waiting = self.queue.lock();
                if waiting.lost > 0 {
                    return Ok(News::Lost(std::mem::take(&mut waiting.lost)));
                }
                if let Some(event) = waiting.events.pop_front() {
                    return Ok(News::Event(event));
                }
                if let Some(over) = waiting.over {
                    return Err(over);
                }
            }
            self.queue.changed.notified().await;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.lock().known.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::super::layer::Layers;
    use super::super::network::{Connection, Egress, KeptForward, RateLimits, Transport};
    use super::super::principal::{Role, User};
    use super::super::resources::Resources;
    use super::super::sandbox::{Spec, Transition};
    use super::super::timings::Timings;
    use super::*;

    fn sandbox() -> Sandbox {
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

    fn event(sandbox: &Sandbox, change: Change) -> Event {
        Event {
            at: Timestamp::now(),
            subject: sandbox.into(),
            change,
        }
    }

    fn user(role: Role) -> User {
        User {
            id: UserId::random(),
            name: "n".into(),
            role,
        }
    }

    async fn told(subscription: &mut Subscription) -> Change {
        match subscription.next().await {
            Ok(News::Event(event)) => event.change.clone(),
            other => panic!("{other:?}"),
        }
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

    #[tokio::test]
    async fn everybody_is_told_what_they_may_see() {
        let events = Events::default();
        let (one, other, admin) = (user(Role::User), user(Role::User), user(Role::Admin));
        let (mut hers, mut local) = (sandbox(), sandbox());
        hers.owner = Some(one.id.clone());
        local.name = Some("n".into());
        let [mut one, mut other, mut admin] =
            [one, other, admin].map(|user| events.subscribe(Principal::User(user), None));
        let mut of_local = events.subscribe(Principal::Local, Some(local.id.clone()));
        events.tell(event(&hers, Change::Created));
        events.tell(event(&local, Change::EgressChanged));
        assert_eq!(told(&mut one).await, Change::Created);
        assert_eq!(told(&mut admin).await, Change::Created);
        assert_eq!(told(&mut admin).await, Change::EgressChanged);
        assert_eq!(told(&mut of_local).await, Change::EgressChanged);
        // Of no particular sandbox, and so of none that is followed.
        let scan = Change::ScanEnded {
            id: "sc-1".into(),
            target: "all".into(),
            status: "completed",
        };
        for owner in [hers.owner.clone(), None] {
            events.tell(Event {
                at: Timestamp::now(),
                subject: Subject {
                    sandbox: None,
                    owner,
                },
                change: scan.clone(),
            });
        }
        assert_eq!(told(&mut one).await, scan);
        for _ in 0..2 {
            assert_eq!(told(&mut admin).await, scan);
        }
        events.close();
        for subscription in [&mut one, &mut other, &mut admin, &mut of_local] {
            assert_eq!(subscription.next().await, Err(Over::Closing));
        }
        let mut late = events.subscribe(Principal::Local, None);
        assert_eq!(late.next().await, Err(Over::Closing));
    }

    #[tokio::test]
    async fn who_reads_slowly_loses_the_oldest_and_is_told_how_many() {
        let events = Events::new(3);
        let sandbox = sandbox();
        let mut slow = events.subscribe(Principal::Local, Some(sandbox.id.clone()));
        let resized = |vcpus: u8| Change::Resized {
            vcpus,
            memory_mb: 1,
        };
        for vcpus in 1..=7 {
            events.tell(event(&sandbox, resized(vcpus)));
        }
        assert_eq!(slow.next().await, Ok(News::Lost(4)));
        for vcpus in 5..=7 {
            assert_eq!(told(&mut slow).await, resized(vcpus));
        }
        events.tell(event(&sandbox, resized(8)));
        assert_eq!(told(&mut slow).await, resized(8));
        // However full it is, the end is told.
        for vcpus in 1..=3 {
            events.tell(event(&sandbox, resized(vcpus)));
        }
        events.tell(event(&sandbox, Change::Deleted));
        assert_eq!(slow.next().await, Ok(News::Lost(1)));
        assert_eq!(told(&mut slow).await, resized(2));
        assert_eq!(told(&mut slow).await, resized(3));
        assert_eq!(told(&mut slow).await, Change::Deleted);
        assert_eq!(slow.next().await, Err(Over::Deleted));
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_who_goes_is_forgotten() {
        let events = Events::default();
        let sandbox = sandbox();
        let mut waiting = events.subscribe(Principal::Local, None);
        let woken = tokio::spawn(async move { told(&mut waiting).await });
        tokio::task::yield_now().await;
        events.tell(event(&sandbox, Change::Created));
        assert_eq!(woken.await.unwrap(), Change::Created);
        assert!(events.shared.lock().known.is_empty());
    }
}
