//! Disks that are kept however a machine ends.
//!
//! The file that a machine writes to gets a second name, in a layer. The machine's own name for it
//! goes with the machine; the layer stays, and holds what the machine has written up to its end.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use super::Inner;
use super::entry::Entry;
use super::layers::LayerFiles;
use crate::chain;
use crate::domain::{End, HostError, LayerId, PowerOffRequest, SandboxId};

/// The longest time that the processes of a guest have to end before they are killed.
const MAX_GRACE: Duration = Duration::from_secs(10);

impl Inner {
    /// See [`Host::keep`](crate::domain::Host::keep).
    pub async fn keep(
        self: &Arc<Self>,
        id: &SandboxId,
        entry: &Entry,
        layer: &LayerId,
    ) -> Result<(), HostError> {
        let (inner, layer, base) = (Arc::clone(self), layer.clone(), entry.base.clone());
        let disk = self.config.paths.disk(id);
        blocking(move || {
            let draft = LayerFiles(inner.config.paths.layers()).begin(&layer)?;
            draft.put_disk(&disk, &base)?;
            draft.complete().map(drop)
        })
        .await
    }

    /// See [`Host::power_off`](crate::domain::Host::power_off).
    pub async fn power_off(
        self: &Arc<Self>,
        entry: &Entry,
        request: &PowerOffRequest,
    ) -> Result<bool, HostError> {
        let timeout = Duration::from_millis(request.timeout_ms);
        // One that has ended by itself is only waited for.
        let runs = entry.is_running();
        let ended = if timeout.is_zero() || !runs {
            None
        } else {
            let in_order = async {
                // Half of the time is the file systems'.
                match entry.agent.power_off(MAX_GRACE.min(timeout / 2)).await {
                    Ok(()) => entry.ended().await,
                    Err(source) => {
                        warn!(sandbox = %request.id, error = %chain(&source),
                            "a guest cannot be told to shut down");
                        None
                    }
                }
            };
            tokio::time::timeout(timeout, in_order).await.ok().flatten()
        };
        if ended.is_none() && runs {
            info!(sandbox = %request.id, "cutting the power of a sandbox");
        }
        // Waits until nothing is left, also of one that has ended.
        entry.destroy().await?;
        if let Some(layer) = request.layer.clone() {
            let inner = Arc::clone(self);
            blocking(move || {
                let files = LayerFiles(inner.config.paths.layers());
                File::open(files.disk(&layer))?.sync_all()
            })
            .await?;
        }
        Ok(matches!(ended, Some(End::Orderly { .. })))
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, HostError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
        .map_err(|error| HostError::Internal {
            reason: format!("the disk cannot be kept: {error}"),
        })
}
