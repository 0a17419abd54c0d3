//! What there is of which sandboxes, and removing what nobody looks after.

use std::sync::Arc;

use super::{HostError, Inner, LeftoverError, leftovers};
use crate::domain::{Presence, SandboxId};

impl Inner {
    /// See [`Host::present`](crate::domain::Host::present).
    pub async fn present(self: &Arc<Self>) -> Result<Vec<(SandboxId, Presence)>, HostError> {
        let inner = Arc::clone(self);
        let mut left = blocking(move || leftovers::list(&inner.config.paths)).await?;
        if let Some(networks) = &self.config.networks {
            left.extend(networks.attached());
        }
        // Only now: whoever was entered before is looked after, and so is what was found of it.
        let state = self.state();
        let mut present: Vec<_> = state
            .sandboxes
            .iter()
            .map(|(id, entry)| match entry.is_running() {
                true => (id.clone(), Presence::Runs),
                false => (id.clone(), Presence::OnTheWay),
            })
            .collect();
        left.retain(|id| !state.sandboxes.contains_key(id));
        present.extend(left.into_iter().map(|id| (id, Presence::Left)));
        Ok(present)
    }

    /// Removes what is left of a sandbox, unless there is one that is looked after.
    pub async fn sweep(self: &Arc<Self>, id: &SandboxId) -> Result<(), HostError> {
        if self.state().sandboxes.contains_key(id) {
            return Ok(());
        }
        let (inner, left) = (Arc::clone(self), id.clone());
        blocking(move || leftovers::remove_one(&inner.config.paths, inner.cgroups.as_ref(), &left))
            .await?;
        if let Some(networks) = &self.config.networks {
            networks.forwards.unreachable(id);
            let detached = networks.of(id).detach(id).await;
            detached.map_err(super::network_failed)?;
        }
        Ok(())
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, LeftoverError> + Send + 'static,
) -> Result<T, HostError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(LeftoverError::Interrupted))
        .map_err(|error| HostError::Internal {
            reason: crate::chain(&error),
        })
}
