//! Who uses the sandboxes that run, and for how long nobody has.
//!
//! ```text
//!   it runs ──► idle since t ──── somebody uses it ───► in use
//!                 │   ▲   ▲                               │
//!         timeout │   │   └──────── the last user is done ┘
//!                 ▼   │ it could not be
//!           being set aside ──► set aside: forgotten
//! ```
//!
//! One lock decides between a user and who sets it aside: a sandbox in use is not set aside, and one
//! that is being set aside is not used before that is done.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::id::SandboxId;

/// The sandboxes that run and have an idle timeout, and all that somebody uses.
#[derive(Debug, Default)]
pub struct Idle {
    watched: Mutex<HashMap<SandboxId, Watched>>,
    /// There may be an earlier deadline.
    changed: Notify,
}

#[derive(Debug)]
struct Watched {
    /// `None` if it does not run, or is never set aside.
    timeout: Option<Duration>,
    users: usize,
    /// Since when there are none.
    since: Instant,
    /// It is being set aside; cancelled when that is done.
    aside: Option<CancellationToken>,
}

impl Watched {
    fn new() -> Self {
        Self {
            timeout: None,
            users: 0,
            since: Instant::now(),
            aside: None,
        }
    }

    /// When it is to be set aside, if nobody uses it before.
    fn deadline(&self) -> Option<Instant> {
        let is_idle = self.users == 0 && self.aside.is_none();
        self.timeout
            .filter(|_| is_idle)
            .and_then(|timeout| self.since.checked_add(timeout))
    }

    fn is_needed(&self) -> bool {
        self.timeout.is_some() || self.users > 0 || self.aside.is_some()
    }
}

/// What a user finds.
#[derive(Debug)]
pub enum Begun {
    /// The sandbox is in use until this is dropped.
    Using(Using),
    /// It is being set aside. This is cancelled when that is done, or was not possible.
    BeingSetAside(CancellationToken),
}

/// A use of a sandbox.
#[derive(Debug)]
pub struct Using {
    idle: Arc<Idle>,
    id: SandboxId,
}

/// A sandbox is set aside; until this is dropped nobody uses it.
#[derive(Debug)]
pub struct SettingAside {
    idle: Arc<Idle>,
    id: SandboxId,
    done: CancellationToken,
}

impl SettingAside {
    /// Which one.
    pub fn id(&self) -> &SandboxId {
        &self.id
    }
}

impl Idle {
    fn watched(&self) -> MutexGuard<'_, HashMap<SandboxId, Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is known of a sandbox.
    fn change<T>(&self, id: &SandboxId, change: impl FnOnce(&mut Watched) -> T) -> T {
        let mut watched = self.watched();
        let entry = watched.entry(id.clone()).or_insert_with(Watched::new);
        let result = change(entry);
        if !entry.is_needed() {
            watched.remove(id);
        }
        result
    }

    /// A sandbox runs, and has been idle for this long already, if nobody uses it.
    pub fn watch_since(&self, id: &SandboxId, timeout: Duration, idle_for: Duration) {
        let now = Instant::now();
        self.change(id, |entry| {
            entry.timeout = Some(timeout);
            // The clock may have begun later than that, with the machine; then there is no better.
            entry.since = now.checked_sub(idle_for).unwrap_or(now);
        });
        self.changed.notify_one();
    }

    /// Whether a sandbox is watched.
    pub fn is_watched(&self, id: &SandboxId) -> bool {
        let watched = self.watched();
        watched.get(id).is_some_and(|entry| entry.timeout.is_some())
    }

    /// A sandbox runs no more.
    pub fn forget(&self, id: &SandboxId) {
        self.change(id, |entry| entry.timeout = None);
    }

    /// Begins to use a sandbox, whether it is watched or not.
    pub fn begin(self: &Arc<Self>, id: &SandboxId) -> Begun {
        self.change(id, |entry| {
            if let Some(done) = &entry.aside {
                return Begun::BeingSetAside(done.clone());
            }
            entry.users += 1;
            Begun::Using(Using {
                idle: self.clone(),
                id: id.clone(),
            })
        })
    }

    /// When the next sandbox is to be set aside.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.watched().values().filter_map(Watched::deadline).min()
    }

    /// Waits until there may be an earlier deadline than before.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes the sandbox that is idle for longest beyond its timeout, if there is one.
    pub fn set_aside(self: &Arc<Self>) -> Option<SettingAside> {
        let now = Instant::now();
        let mut watched = self.watched();
        let (_, id) = watched
            .iter()
            .filter_map(|(id, entry)| Some((entry.deadline()?, id)))
            .filter(|(deadline, _)| *deadline <= now)
            .min_by_key(|(deadline, _)| *deadline)?;
        let id = id.clone();
        let done = CancellationToken::new();
        watched.get_mut(&id)?.aside = Some(done.clone());
        Some(SettingAside {
            idle: self.clone(),
            id,
            done,
        })
    }
}

impl Drop for Using {
    fn drop(&mut self) {
        let is_idle = self.idle.change(&self.id, |entry| {
            entry.users = entry.users.saturating_sub(1);
            entry.since = Instant::now();
            entry.users == 0
        });
        if is_idle {
            self.idle.changed.notify_one();
        }
    }
}

impl Drop for SettingAside {
    fn drop(&mut self) {
        self.idle.change(&self.id, |entry| {
            entry.aside = None;
            entry.since = Instant::now();
        });
        self.done.cancel();
        self.idle.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn using(idle: &Arc<Idle>, id: &SandboxId) -> Using {
        match idle.begin(id) {
            Begun::Using(using) => using,
            Begun::BeingSetAside(_) => panic!("it is being set aside"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_sandbox_is_set_aside_after_its_timeout_and_never_in_use() {
        let (idle, id) = (Arc::new(Idle::default()), SandboxId::random());
        idle.watch_since(&id, TIMEOUT, Duration::ZERO);
        idle.changed().await;
        advance(TIMEOUT / 2).await;
        let (first, second) = (using(&idle, &id), using(&idle, &id));
        assert_eq!(idle.next_deadline(), None);
        advance(2 * TIMEOUT).await;
        drop(first);
        assert!(idle.set_aside().is_none(), "somebody uses it");
        drop(second);
        idle.changed().await;
        assert_eq!(idle.next_deadline(), Some(Instant::now() + TIMEOUT));
        advance(TIMEOUT - Duration::from_millis(1)).await;
        assert!(idle.set_aside().is_none(), "not yet");
        advance(Duration::from_millis(1)).await;
        let aside = idle.set_aside().unwrap();
        assert_eq!(aside.id(), &id);
        assert!(idle.set_aside().is_none(), "once is enough");
        let Begun::BeingSetAside(done) = idle.begin(&id) else {
            panic!("it is used while it is set aside");
        };
        drop(aside);
        done.cancelled().await;
        assert_eq!(idle.next_deadline(), Some(Instant::now() + TIMEOUT));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_idle_for_longest_comes_first_and_who_has_ended_never() {
        let idle = Arc::new(Idle::default());
        let ids: Vec<_> = (0..3).map(|_| SandboxId::random()).collect();
        for id in &ids {
            idle.watch_since(id, TIMEOUT, Duration::ZERO);
            advance(Duration::from_secs(1)).await;
        }
        idle.forget(&ids[0]);
        advance(TIMEOUT).await;
        let asides: Vec<_> = std::iter::from_fn(|| idle.set_aside()).collect();
        let order: Vec<_> = asides.iter().map(SettingAside::id).collect();
        assert_eq!(order, [&ids[1], &ids[2]]);
        idle.forget(&ids[1]);
        drop(asides);
        assert_eq!(idle.watched().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_used_but_not_watched_is_forgotten_with_its_last_user() {
        let (idle, id) = (Arc::new(Idle::default()), SandboxId::random());
        let users = [using(&idle, &id), using(&idle, &id)];
        idle.watch_since(&id, TIMEOUT, Duration::ZERO);
        idle.forget(&id);
        assert_eq!(idle.watched().len(), 1);
        drop(users);
        assert_eq!(idle.watched().len(), 0);
    }
}
