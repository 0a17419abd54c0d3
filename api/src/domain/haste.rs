//! Haste: who wants a sandbox off at once does not wait for a guest that another lets take its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio_util::sync::CancellationToken;

use super::id::SandboxId;
use super::shared::Shared;

/// The haste with all sandboxes.
#[derive(Debug, Default)]
pub struct Haste(Shared<State>);

#[derive(Debug, Default)]
struct State {
    urged: CancellationToken,
    heeded: AtomicBool,
}

/// The haste with one sandbox. There is none with the next stop once all who have been in this one have dropped
/// theirs.
#[derive(Debug)]
pub struct Hurry(Arc<State>);

impl Haste {
    /// For whoever is about to stop this sandbox.
    pub fn of(&self, id: &SandboxId) -> Hurry {
        Hurry(self.0.of(id))
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
        assert_eq!(haste.0.count(), 1, "old ones are forgotten");
    }
}
