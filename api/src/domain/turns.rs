//! Turns: who changes a sandbox from one state to another does so alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

use super::id::SandboxId;

/// The turns of all sandboxes.
#[derive(Debug, Default)]
pub struct Turns {
    taken: Mutex<HashMap<SandboxId, Weak<tokio::sync::Mutex<()>>>>,
}

/// The turn at one sandbox, until it is dropped.
pub type Turn = OwnedMutexGuard<()>;

impl Turns {
    /// Waits for the turn at a sandbox.
    pub async fn take(&self, id: &SandboxId) -> Turn {
        self.turn(id).lock_owned().await
    }

    /// The turn at a sandbox, if nobody has it.
    pub fn try_take(&self, id: &SandboxId) -> Option<Turn> {
        self.turn(id).try_lock_owned().ok()
    }

    fn turn(&self, id: &SandboxId) -> Arc<tokio::sync::Mutex<()>> {
        {
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            match taken.get(id).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    taken.retain(|_, turn| turn.strong_count() > 0);
                    let turn = Arc::default();
                    taken.insert(id.clone(), Arc::downgrade(&turn));
                    turn
                }
            }
        }
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
        assert_eq!(
            turns.taken.lock().unwrap().len(),
            1,
            "old ones are forgotten"
        );
    }
}
