//! Which templates this daemon builds, and has built.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::domain::build::Progress;
use crate::domain::id::TemplateId;

/// The builds of this daemon.
#[derive(Debug, Default)]
pub struct Builds {
    known: Mutex<HashMap<TemplateId, Build>>,
}

/// One of them; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Build {
    /// What is told of it.
    pub progress: Progress,
    /// Ends it.
    pub cancel: CancellationToken,
    /// Nothing of it is left.
    pub gone: CancellationToken,
}

impl Builds {
    fn lock(&self) -> MutexGuard<'_, HashMap<TemplateId, Build>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The build of a template, under way or not.
    pub fn get(&self, id: &TemplateId) -> Option<Build> {
        self.lock().get(id).cloned()
    }

    /// Keeps a build that begins.
    pub fn insert(&self, id: TemplateId, build: Build) {
        self.lock().insert(id, build);
    }

    /// Ends a build, if it is under way, and waits until nothing of it is left.
    pub async fn cancel(&self, id: &TemplateId) {
        if let Some(build) = self.get(id) {
            build.cancel.cancel();
            build.gone.cancelled().await;
        }
    }

    /// Forgets a build that has ended.
    pub fn forget(&self, id: &TemplateId) {
        self.lock().remove(id);
    }
}
