//! Merging disk layers, in a process of its own: images that a guest's VMM has written are read in a
//! jail like that VMM's, and nowhere else.
//!
//! The process has the layers to read, an empty file to write, and nothing else. What it has written
//! gets the name of a layer when it has ended well. The directories of a sandbox that is none, which
//! stay empty, are there so that the next daemon finds what a crash of this one leaves.

use std::fs::File;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tracing::{debug, error};

use super::Inner;
use super::command::{self, Jail};
use super::jail::User;
use super::layers::{Draft, LayerFiles};
use super::monitor;
use crate::chain;
use crate::domain::{HostError, MergeRequest, SandboxId};

/// How long a merge may take: as much as the VMM has to write a guest's memory.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// How much of what a process says goes into an error message, in bytes.
const LAST_WORDS: u64 = 1024;

impl Inner {
    /// See [`Host::merge_disk`](crate::domain::Host::merge_disk).
    pub async fn merge(&self, request: &MergeRequest) -> Result<(), HostError> {
        let _one = self.merging.lock().await;
        let id = SandboxId::random();
        let merged = self.merge_as(&id, request).await;
        if let Err(reason) = self.config.paths.remove(&id).await {
            error!(reason, "directories of a merge are left");
        }
        merged.map_err(|reason| HostError::NotMerged { reason })
    }

    /// Merges in the name of a sandbox that is none. The error is a sentence.
    async fn merge_as(&self, id: &SandboxId, request: &MergeRequest) -> Result<(), String> {
        let failed =
            |what: &str, error: &dyn std::error::Error| format!("{what}: {}", chain(error));
        let files = LayerFiles(self.config.paths.layers());
        let chain = files
            .chain(&request.layers)
            .map_err(|error| failed("the layers cannot be read", &error))?
            .ok_or("there are no layers")?;
        let layers = chain.layers.iter().map(File::open);
        let layers: Vec<_> = layers
            .collect::<Result<_, _>>()
            .map_err(|error| failed("the layers cannot be read", &error))?;
        let draft = files
            .begin(&request.into)
            .map_err(|error| failed("the new layer cannot be made", &error))?;
        let output = draft
            .new_disk(&chain.base)
            .map_err(|error| failed("the new layer cannot be made", &error))?;

        let user = match &self.users {
            Some(users) => Some(users.take().ok_or("no user is free for it")?),
            None => None,
        };
        self.config
            .paths
            .make(id, user.as_ref().map(User::id))
            .map_err(|error| failed("its directories cannot be made", &error))?;
        // Of memory, it may take what a VMM may beyond its guest's.
        let cgroup = match &self.cgroups {
            Some(cgroups) => Some(
                cgroups
                    .create(id, 1, 0)
                    .map_err(|error| failed("its cgroup cannot be made", &error))?,
            ),
            None => None,
        };
        let jail = self.config.jail.as_ref().map(|_| Jail {
            user: user.as_ref().map(User::id),
            cgroup: cgroup.as_ref().map(|cgroup| cgroup.path.as_path()),
        });
        let command = command::merge(
            &self.config.vmm,
            &layers,
            &output,
            chain.base.disk_size(),
            jail,
        );
        let ended = tokio::select! {
            biased;
            () = self.end.cancelled() => Err("the daemon is shutting down".to_owned()),
            ended = run(command) => ended,
            () = tokio::time::sleep(TIMEOUT) => {
                Err(format!("it took longer than {} s", TIMEOUT.as_secs()))
            }
        };
        if let Some(cgroup) = cgroup {
            let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
            if let Ok(Err(error)) = removed {
                error!(%error, "the cgroup of a merge is left");
            }
        }
        ended?;
        let bytes = complete(draft).await?;
        debug!(layers = request.layers.len(), into = %request.into, bytes, "disk layers merged");
        Ok(())
    }
}

/// Runs the process to its end. It is killed if this is dropped. The error is a sentence.
async fn run(mut command: tokio::process::Command) -> Result<(), String> {
    let mut child = command
        .spawn()
        .map_err(|error| format!("the vmm cannot be executed: {error}"))?;
    let mut words = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        // What it says beyond that, it says to nobody.
        let _ = stderr.take(LAST_WORDS).read_to_end(&mut words).await;
    }
    let status = child
        .wait()
        .await
        .map_err(|error| format!("its end is not known: {error}"))?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("{status}: {}", monitor::readable(&words).trim())),
    }
}

async fn complete(draft: Draft) -> Result<u64, String> {
    tokio::task::spawn_blocking(move || draft.complete())
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(|error| format!("the new layer cannot be completed: {error}"))
}
