//! Looking into a sandbox and at what holds it, without that counting as use of it.

use futures_util::StreamExt;

use super::super::host::{FileInfo, HostError, ReadFileRequest, WalkSpec, WalkSteps};
use super::super::id::LayerId;
use super::super::posture::Posture;
use super::super::sandbox::Sandbox;
use super::super::store::StoreError;
use super::{InUse, Manager};

/// A file as far as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// Its beginning.
    pub content: Vec<u8>,
    /// Whether that is all of it.
    pub is_whole: bool,
}

impl Manager {
    /// The first `most` bytes of a regular file in a sandbox; `None` if there is none.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn inspect_file(
        &self,
        in_use: &InUse,
        path: &str,
        most: usize,
    ) -> Result<Option<Inspected>, HostError> {
        let request = ReadFileRequest { path: path.into() };
        let read = self.inner.host.read_file(&in_use.sandbox.id, request);
        let mut file = match read.await {
            Ok(file) => file.content,
            Err(HostError::FileNotFound { .. } | HostError::Invalid { .. }) => return Ok(None),
            Err(source) => return Err(source),
        };
        let mut content = Vec::new();
        while let Some(piece) = file.next().await {
            let piece = piece.map_err(|error| HostError::AgentUnreachable {
                reason: format!("{path} could not be read to its end: {error}"),
            })?;
            let room = most - content.len();
            content.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.len() > room {
                return Ok(Some(Inspected {
                    content,
                    is_whole: false,
                }));
            }
        }
        Ok(Some(Inspected {
            content,
            is_whole: true,
        }))
    }

    /// What is in a directory in a sandbox, if that is not more than `most`; `None` if there is no such
    /// directory.
    ///
    /// # Errors
    /// It cannot be read, or has more.
    pub async fn inspect_dir(
        &self,
        in_use: &InUse,
        path: &str,
        most: usize,
    ) -> Result<Option<Vec<FileInfo>>, HostError> {
        match self
            .inner
            .host
            .list_dir(&in_use.sandbox.id, path, most)
            .await
        {
            Ok(entries) => Ok(Some(entries)),
            Err(HostError::FileNotFound { .. }) => Ok(None),
            Err(source) => Err(source),
        }
    }

    /// What is in a directory in a sandbox and in those below it; `None` if its agent is too old to tell, and
    /// the directories have to be inspected one by one.
    ///
    /// # Errors
    /// It cannot be read; later errors are in the stream.
    pub async fn inspect_tree(
        &self,
        in_use: &InUse,
        spec: &WalkSpec,
    ) -> Result<Option<WalkSteps>, HostError> {
        self.inner.host.walk(&in_use.sandbox.id, spec).await
    }

    /// What holds a sandbox on the host, and who may read what it and its snapshots have there.
    ///
    /// # Errors
    /// The host cannot tell.
    pub async fn posture(&self, sandbox: &Sandbox) -> Result<Posture, HostError> {
        let layers = self.layers_with(sandbox).await;
        let layers = layers.map_err(|source| HostError::Internal {
            reason: crate::chain(&source),
        })?;
        self.inner.host.posture(&sandbox.id, &layers).await
    }

    /// The layers of a sandbox and of its snapshots.
    async fn layers_with(&self, sandbox: &Sandbox) -> Result<Vec<LayerId>, StoreError> {
        let snapshots = self.inner.store.list_snapshots().await?;
        let snapshots = snapshots.into_iter();
        let mut all: Vec<_> = snapshots
            .filter(|snapshot| snapshot.sandbox == sandbox.id)
            .map(|snapshot| snapshot.layers)
            .chain([sandbox.layers.clone()])
            .chain(sandbox.kept.clone())
            .flat_map(|layers| layers.disk.into_iter().chain(layers.memory))
            .collect();
        all.sort();
        all.dedup();
        Ok(all)
    }
}
