//! Disks that are kept when a machine is done, and digests.
//!
//! A machine that a template is built in is shut down in order, so that its file system is clean, and
//! its disk becomes a layer. Nobody has that open for writing any more.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tracing::debug;

use super::Inner;
use super::entry::Entry;
use super::layers::LayerFiles;
use crate::domain::{
    CreateRequest, End, HostError, HostEvent, ImageDigest, ImageInfo, KeepDiskRequest, KeptDisk,
    LayerId, SandboxId,
};
use crate::images::{Base, Chain};

/// What processes have to end in.
const GRACE: Duration = Duration::from_secs(10);
/// How long a guest may take to power off, the time of its processes included.
const POWER_OFF_TIMEOUT: Duration = Duration::from_secs(120);
/// The largest description of an image, in bytes.
const MAX_DESCRIPTION: u64 = 4 << 20;

impl Inner {
    /// Shuts a sandbox down and keeps one of its disks. `events` are those since before.
    pub async fn keep_disk(
        self: &Arc<Self>,
        entry: &Entry,
        events: BoxStream<'static, HostEvent>,
        request: KeepDiskRequest,
    ) -> Result<KeptDisk, HostError> {
        let id = request.created.id.clone();
        let CreateRequest {
            shape,
            layers,
            scratch_mb,
            ..
        } = &request.created;
        let chain = self.chain(shape, layers, *scratch_mb)?;
        let (disk, chain) = if request.scratch {
            let scratch = chain.scratch.ok_or_else(|| HostError::Invalid {
                reason: "the sandbox has no second disk".to_owned(),
            })?;
            (self.config.paths.scratch(&id), *scratch)
        } else {
            (self.config.paths.disk(&id), chain)
        };
        let failed = |error: io::Error| HostError::Internal {
            reason: format!("the disk cannot be kept: {error}"),
        };
        // Its second name, from before the first goes with the sandbox.
        let layer = request.layer.clone();
        let base = chain.base.clone();
        let inner = Arc::clone(self);
        let draft = blocking(move || {
            let draft = LayerFiles(inner.config.paths.layers()).begin(&layer)?;
            draft.put_disk(&disk, &base)?;
            Ok(draft)
        });
        let draft = draft.await.map_err(failed)?;
        entry.agent.power_off(GRACE).await?;
        match tokio::time::timeout(POWER_OFF_TIMEOUT, end_of(&id, events)).await {
            Ok(Some(End::Orderly { .. })) => {}
            Ok(Some(End::Failed { reason })) => return Err(HostError::Agent { reason }),
            Ok(None) => return Err(HostError::Destroyed),
            Err(_) => {
                let seconds = POWER_OFF_TIMEOUT.as_secs();
                return Err(HostError::Agent {
                    reason: format!("the guest did not power off within {seconds} s"),
                });
            }
        }
        let inner = Arc::clone(self);
        let kept = blocking(move || {
            File::open(draft.disk())?.sync_all()?;
            draft.complete()?;
            let files = LayerFiles(inner.config.paths.layers());
            let digested = digests(files, &request.others, &request.layer);
            if digested.is_err() {
                files.remove(&request.layer)?;
            }
            digested
        });
        let (digests, size_bytes) = kept.await.map_err(failed)?;
        debug!(sandbox = %id, size_bytes, "disk kept");
        let Chain { base, .. } = chain;
        Ok(KeptDisk {
            digests,
            size_bytes,
            disk_bytes: base.disk_size(),
        })
    }

    /// Makes the empty file system that second disks of this size are made on.
    pub async fn make_empty(self: &Arc<Self>, size_mb: u32) -> Result<(), HostError> {
        let inner = Arc::clone(self);
        let made = tokio::task::spawn_blocking(move || {
            Base::empty(inner.config.paths.empty(), size_mb)
                .map(drop)
                .map_err(|error| crate::chain(&error))
        });
        made.await
            .unwrap_or_else(|error| Err(error.to_string()))
            .map_err(|reason| HostError::Start { reason })
    }

    /// What there is to say of an image.
    pub async fn image(
        self: &Arc<Self>,
        name: &str,
        digest: ImageDigest,
    ) -> Result<ImageInfo, HostError> {
        let path = self.template(name)?.clone();
        let described = blocking(move || {
            let metadata = std::fs::metadata(&path)?;
            let known = || described_digest(&path, metadata.len());
            let digest = match digest {
                ImageDigest::Unasked => None,
                ImageDigest::IfKnown => known(),
                ImageDigest::Computed => Some(known().map_or_else(|| sha256(&path), Ok)?),
            };
            Ok(ImageInfo {
                digest,
                // stat(2): in units of 512 bytes, whatever the file system's.
                size_bytes: metadata.blocks().saturating_mul(512),
                disk_bytes: metadata.len(),
                modified_us: metadata
                    .mtime()
                    .saturating_mul(1_000_000)
                    .saturating_add(metadata.mtime_nsec() / 1000),
            })
        });
        described.await.map_err(|error| HostError::Internal {
            reason: format!("the image of template {name:?} cannot be read: {error}"),
        })
    }
}

/// How a sandbox ends; `None` if it is not told any more.
async fn end_of(id: &SandboxId, mut events: BoxStream<'static, HostEvent>) -> Option<End> {
    while let Some(event) = events.next().await {
        match event {
            HostEvent::Ended { id: ended, end } if ended == *id => return Some(end),
            HostEvent::Ended { .. } | HostEvent::Lost { .. } => {}
        }
    }
    None
}

/// The digests of these layers and of the new one, and the space that they take.
fn digests(
    files: LayerFiles<'_>,
    others: &[LayerId],
    new: &LayerId,
) -> io::Result<(Vec<String>, u64)> {
    let mut digests = Vec::new();
    let mut size_bytes: u64 = 0;
    for layer in others.iter().chain([new]) {
        let disk = files.disk(layer);
        let blocks = std::fs::metadata(&disk)?.blocks();
        size_bytes = size_bytes.saturating_add(blocks.saturating_mul(512));
        digests.push(sha256(&disk)?);
    }
    Ok((digests, size_bytes))
}

/// SHA-256 of a file, as hexadecimal digits.
fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => digest.update(&buffer[..count]),
        }
    }
    Ok(crate::hex(&digest.finalize()))
}

/// The digest in the description that `rootfs/build` leaves beside an image, where there is one of
/// this size.
fn described_digest(image: &Path, size: u64) -> Option<String> {
    #[derive(Deserialize)]
    struct Description {
        size_bytes: u64,
        sha256: String,
    }
    // A link to the image need not have the description beside it.
    let image = image.canonicalize().ok()?;
    let mut json = Vec::new();
    File::open(image.with_file_name("metadata.json"))
        .ok()?
        .take(MAX_DESCRIPTION)
        .read_to_end(&mut json)
        .ok()?;
    let description: Description = serde_json::from_slice(&json).ok()?;
    let is_digest = description.sha256.len() == 64
        && description
            .sha256
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit());
    (is_digest && description.size_bytes == size).then_some(description.sha256)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_counts_only_beside_the_image_that_it_describes() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("rootfs.ext4");
        std::fs::write(&image, [0; 1024]).unwrap();
        let link = dir.path().join("link");
        std::fs::create_dir(&link).unwrap();
        let link = link.join("minimal.ext4");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert_eq!(described_digest(&link, 1024), None);
        let digest = "ab".repeat(32);
        let describe = |size: u64, digest: &str| {
            let json = format!(r#"{{"name":"minimal","size_bytes":{size},"sha256":"{digest}"}}"#);
            std::fs::write(dir.path().join("metadata.json"), json).unwrap();
        };
        describe(1024, &digest);
        assert_eq!(described_digest(&link, 1024), Some(digest.clone()));
        describe(1025, &digest);
        assert_eq!(described_digest(&link, 1024), None);
        describe(1024, "nonsense");
        assert_eq!(described_digest(&link, 1024), None);
    }

    #[test]
    fn digests_are_those_of_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(
            sha256(&path).unwrap(),
            // FIPS 180-2, appendix B.1.
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
