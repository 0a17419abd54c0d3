//! Turns: who changes a sandbox from one state to another does so alone.

use tokio::sync::{Mutex, OwnedMutexGuard};

use super::id::SandboxId;
use super::shared::Shared;

/// The turns of all sandboxes.
#[derive(Debug, Default)]
pub struct Turns(Shared<Mutex<()>>);

/// The turn at one sandbox, until it is dropped.
pub type Turn = OwnedMutexGuard<()>;

impl Turns {
    /// Waits for the turn at a sandbox.
    pub async fn take(&self, id: &SandboxId) -> Turn {
        self.0.of(id).lock_owned().await
    }

    /// The turn at a sandbox, if nobody has it.
    pub fn try_take(&self, id: &SandboxId) -> Option<Turn> {
        self.0.of(id).try_lock_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn each_sandbox_has_one_turn_at_a_time() {
        let turns = Turns::default();
        let (a, b) = (SandboxId::random(), SandboxId::random());
        let first = turns.take(&a).await;
        assert!(turns.take(&a).now_or_never().is_none());
        assert!(turns.try_take(&a).is_none());
        let other = turns.take(&b).now_or_never();
        assert!(other.is_some());
        drop(first);
        assert!(turns.try_take(&a).is_some());
        assert!(turns.take(&a).now_or_never().is_some());
        drop(other);
        let _last = turns.take(&SandboxId::random()).await;
        assert_eq!(turns.0.count(), 1, "old ones are forgotten");
    }
}
