//! What all who are at one sandbox at a time share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::id::SandboxId;

/// One of these for each sandbox that somebody is at.
#[derive(Debug)]
pub struct Shared<T> {
    known: Mutex<HashMap<SandboxId, Weak<T>>>,
}

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
        }
    }
}

impl<T: Default> Shared<T> {
    /// The one of this sandbox: that of those who are at it, or a new one.
    pub fn of(&self, id: &SandboxId) -> Arc<T> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(id).and_then(Weak::upgrade) {
            Some(one) => one,
            None => {
                known.retain(|_, one| one.strong_count() > 0);
                let one = Arc::default();
                known.insert(id.clone(), Arc::downgrade(&one));
                one
            }
        }
    }

    /// How many are known, with those that nobody is at any more and that are not forgotten yet.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.known.lock().unwrap().len()
    }
}
