//! Who listens, and what waits for them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::super::id::SandboxId;
use super::super::principal::Principal;
use super::{Change, Event};

/// How many events wait for one reader, unless a test wants others.
pub const MAX_WAITING: usize = 256;

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
    use jiff::Timestamp;

    use super::super::super::id::UserId;
    use super::super::super::principal::{Role, User};
    use super::super::super::sandbox::Sandbox;
    use super::super::Subject;
    use super::super::tests::sandbox;
    use super::*;

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
