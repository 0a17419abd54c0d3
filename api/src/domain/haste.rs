//! Haste: who wants a sandbox off at once does not wait for a guest that another lets take its time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio_util::sync::CancellationToken;

use super::id::SandboxId;

/// The haste with all sandboxes.
#[derive(Debug, Default)]
pub struct Haste {
    known: Mutex<HashMap<SandboxId, Weak<Shared>>>,
}

#[derive(Debug, Default)]
struct Shared {
    urged: CancellationToken,
    heeded: AtomicBool,
}

/// The haste with one sandbox. There is none with the next stop once all who have been in this one have dropped
/// theirs.
#[derive(Debug)]
pub struct Hurry(Arc<Shared>);

impl Haste {
    /// For whoever is about to stop this sandbox.
    pub fn of(&self, id: &SandboxId) -> Hurry {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let shared = match known.get(id).and_then(Weak::upgrade) {
            Some(shared) => shared,
            None => {
                known.retain(|_, shared| shared.strong_count() > 0);
                let shared = Arc::default();
                known.insert(id.clone(), Arc::downgrade(&shared));
                shared
            }
        };
        Hurry(shared)
    }
}

impl Hurry {
    /// Has whoever stops this sandbox now, or before the caller does, not wait for its guest.
    pub fn urge(&self) {
        self.0.urged.cancel();
    }

    /// Waits until somebody urges.
    pub async fn urged(&self) {
        self.0.urged.cancelled().await;
    }

    /// For whoever stops the sandbox: it is done faster, as was urged.
    pub fn heed(&self) {
        self.0.heeded.store(true, Ordering::Release);
    }

    /// Whether a stop was made faster.
    pub fn was_heeded(&self) -> bool {
        self.0.heeded.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn it_is_of_one_sandbox_and_goes_with_the_last_who_is_in_it() {
        let haste = Haste::default();
        let (a, b) = (SandboxId::random(), SandboxId::random());
        let (stop, other) = (haste.of(&a), haste.of(&b));
        let is_urged = |hurry: &Hurry| hurry.urged().now_or_never().is_some();
        assert!(!is_urged(&stop));
        let forced = haste.of(&a);
        forced.urge();
        assert!(is_urged(&stop) && !is_urged(&other));
        assert!(!forced.was_heeded());
        stop.heed();
        drop(stop);
        assert!(forced.was_heeded());
        assert!(is_urged(&haste.of(&a)), "whoever urged waits still");
        drop((forced, other));
        assert!(!is_urged(&haste.of(&a)));
        let _last = haste.of(&b);
        assert_eq!(
            haste.known.lock().unwrap().len(),
            1,
            "old ones are forgotten"
        );
    }
}
