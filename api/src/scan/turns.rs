//! Who is looked into when: two guests at a time, each of a scan of another owner, so that an owner whose
//! guests are slow keeps others waiting for one guest and no longer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, SemaphorePermit};

use crate::domain::UserId;

/// How many guests are looked into at a time.
const AT_ONCE: usize = 2;

/// Gives turns to scans.
pub struct Turns {
    /// One for each guest that is looked into. Whoever waits longest is next.
    guests: Semaphore,
    /// By owner, one for the scan that runs; the others of that owner wait for it.
    owners: Mutex<HashMap<Option<UserId>, Weak<Semaphore>>>,
}

impl Turns {
    /// For no scan yet.
    pub fn new() -> Self {
        Self {
            guests: Semaphore::new(AT_ONCE),
            owners: Mutex::default(),
        }
    }

    /// Waits until no other scan of this owner runs.
    pub async fn scan(&self, owner: Option<&UserId>) -> ScanTurn<'_> {
        let own = self.of(owner);
        ScanTurn {
            guests: &self.guests,
            _own: own.acquire_owned().await,
        }
    }

    fn of(&self, owner: Option<&UserId>) -> Arc<Semaphore> {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|_, own| own.strong_count() > 0);
        let own = owners.entry(owner.cloned()).or_default();
        own.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Semaphore::new(1));
            *own = Arc::downgrade(&new);
            new
        })
    }
}

/// The turn of a scan, the only one of its owner.
pub struct ScanTurn<'a> {
    guests: &'a Semaphore,
    /// Never an error: it is not closed.
    _own: Result<OwnedSemaphorePermit, AcquireError>,
}

impl ScanTurn<'_> {
    /// Waits until one more guest may be looked into.
    pub async fn guest(&self) -> GuestTurn<'_> {
        GuestTurn {
            _guest: self.guests.acquire().await,
        }
    }
}

/// The turn of a guest.
pub struct GuestTurn<'a> {
    /// Never an error: it is not closed.
    _guest: Result<SemaphorePermit<'a>, AcquireError>,
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn an_owner_has_one_turn_and_owners_take_turns_guest_by_guest() {
        let turns = Turns::new();
        let owners = [(); 3].map(|()| UserId::random());
        let [one, two, three] = owners.each_ref().map(Some);
        let first = turns.scan(one).await;
        let mut second = Box::pin(turns.scan(one));
        assert!((&mut second).now_or_never().is_none());
        let others = (turns.scan(two).await, turns.scan(three).await);
        let local = turns.scan(None).await;

        let (guest, _slow) = (first.guest().await, others.0.guest().await);
        let mut waiting = Box::pin(others.1.guest());
        assert!((&mut waiting).now_or_never().is_none());
        let mut last = Box::pin(local.guest());
        assert!((&mut last).now_or_never().is_none());
        drop(guest);
        // It was there before the next guest of the first.
        assert!(first.guest().now_or_never().is_none());
        assert!((&mut last).now_or_never().is_none());
        assert!((&mut waiting).now_or_never().is_some());
        drop(first);
        assert!((&mut second).now_or_never().is_some());
    }

    #[tokio::test]
    async fn owners_without_scans_are_forgotten() {
        let turns = Turns::new();
        for _ in 0..9 {
            turns.scan(Some(&UserId::random())).await;
        }
        let _turn = turns.scan(None).await;
        assert_eq!(turns.owners.lock().unwrap().len(), 1);
    }
}
