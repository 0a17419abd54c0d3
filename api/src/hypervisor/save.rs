//! Saving a machine: its memory and state to one new layer, its disk to another.
//!
//! ```text
//! vm.pause ─► vm.snapshot ─► memory layer ─► disk layer ─┬─► (its VMM is ended)
//!     │             │              │              │      └─► new overlay ─► vm.replace-disk ─► vm.resume
//!     └─────────────┴──────────────┴──────────────┴────────────────┘
//!          an error: the new layers are removed, and the guest goes on as it was
//! ```
//!
//! The guest stands still from the first to the last of these. The disk layer is another name for
//! the file that the machine writes to, so nothing is copied; a machine that goes on writes to an
//! overlay on it from then on.
//!
//! Where the disk is saved alone, there is no memory layer, and the guest's agent freezes the file
//! system before and thaws it after all this: what a disk holds is all there is then.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tracing::{debug, warn};

use super::control::{Control, ControlError};
use super::layers::{Draft, LayerFiles};
use super::machine::micros;
use super::note::{self, Note};
use super::paths::Paths;
use crate::agent::{AgentClient, Freeze};
use crate::chain;
use crate::domain::{HostError, LayerId, SaveRequest, SaveTimings, Saved};
use crate::images::{Chain, OverlayError};

/// Why a machine was not saved.
#[derive(Debug)]
pub enum SaveError {
    /// It goes on as it was.
    NotSaved(HostError),
    /// It stands still, or has no disk, and must be ended. Why, as a sentence.
    Broken(String),
}

/// Why one of the steps failed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("the new {what} layer cannot be written")]
    Layer {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    #[error(transparent)]
    HandOver(#[from] HandOverError),
    #[error("the request makes no sense: it names no new layers")]
    NoLayers,
    #[error("the task that wrote it is gone")]
    Interrupted,
}

/// A machine that is to be saved.
pub struct Saving<'a> {
    pub control: &'a Control,
    pub paths: &'a Paths,
    pub request: &'a SaveRequest,
    /// What the machine's own disk is made on.
    pub chain: &'a Chain,
    /// Its guest's agent.
    pub agent: &'a AgentClient,
}

impl Saving<'_> {
    /// Saves the machine, and leaves it stopped.
    pub async fn and_stop(&self) -> Result<Saved, SaveError> {
        self.run(false).await.map(|(saved, _)| saved)
    }

    /// Saves the machine, and lets it go on. Returns also what its disk is made on now.
    pub async fn and_go_on(&self) -> Result<(Saved, Chain), SaveError> {
        self.run(true).await
    }

    async fn run(&self, goes_on: bool) -> Result<(Saved, Chain), SaveError> {
        let begun = Instant::now();
        // As many as there are, for all that is known here; the caller takes no more than it has.
        let mut keep = usize::MAX;
        let freeze = match self.freeze().await {
            Ok(freeze) => freeze,
            Err(source) => {
                return Err(SaveError::NotSaved(HostError::NotSaved {
                    reason: chain(&source),
                    keep,
                }));
            }
        };
        if let Err(source) = self.control.pause().await {
            // If it was not stopped, it need not be started; if that is not known, this is to be safe.
            let _ = self.control.resume().await;
            return Err(SaveError::NotSaved(HostError::NotSaved {
                reason: chain(&source),
                keep,
            }));
        }
        let steps = self.steps(goes_on, begun, &mut keep).await;
        let resumed = if goes_on || steps.is_err() {
            self.control.resume().await
        } else {
            Ok(())
        };
        match (steps, resumed) {
            (Ok((mut saved, chain)), Ok(())) => {
                saved.timings.stall_us = micros(begun.elapsed());
                if let Some(freeze) = freeze {
                    saved.is_at_rest = freeze.thaw().await;
                }
                Ok((saved, chain))
            }
            (Err(Failure::Step(source)), Ok(())) => {
                warn!(sandbox = %self.request.id, error = chain(&source), "sandbox not saved");
                Err(SaveError::NotSaved(HostError::NotSaved {
                    reason: chain(&source),
                    keep,
                }))
            }
            (Err(Failure::Broken(reason)), _) => Err(SaveError::Broken(reason)),
            (_, Err(source)) => Err(SaveError::Broken(format!(
                "it could not go on after it was saved: {}",
                chain(&source)
            ))),
        }
    }

    /// Freezes the guest's file system, if its disk is saved alone.
    async fn freeze(&self) -> Result<Option<Freeze>, HostError> {
        match self.request.include_memory {
            true => Ok(None),
            false => self.agent.freeze().await.map(Some),
        }
    }

    async fn steps(
        &self,
        goes_on: bool,
        begun: Instant,
        keep: &mut usize,
    ) -> Result<(Saved, Chain), Failure> {
        let layers = &self.request.layers;
        let disk = layers.disk.last().ok_or(StepError::NoLayers)?;
        let mut new = NewLayers {
            files: self.files(),
            ids: Vec::new(),
        };
        let mut memory_bytes = 0;
        if self.request.include_memory {
            let memory = layers.memory.last().ok_or(StepError::NoLayers)?;
            new.ids.push(memory);
            memory_bytes = self.save_memory(memory, goes_on, keep).await?;
        }
        let memory_us = micros(begun.elapsed());

        new.ids.push(disk);
        let draft = self.begin("disk", disk)?;
        let (image, base) = (self.paths.disk(&self.request.id), self.chain.base.clone());
        let draft = blocking(move || {
            draft.put_disk(&image, &base).map_err(layer("disk"))?;
            Ok(draft)
        })
        .await?;
        let disk_bytes = complete("disk", draft).await?;
        let mut chain = self.chain.clone();
        if goes_on {
            // Some of those that it had may have become one since.
            chain.layers = layers.disk.iter().map(|id| self.files().disk(id)).collect();
            self.stack(&chain).await?;
        }
        new.keep();
        debug!(sandbox = %self.request.id, memory_bytes, disk_bytes, "sandbox saved");
        let saved = Saved {
            new_bytes: memory_bytes.saturating_add(disk_bytes),
            is_at_rest: false,
            timings: SaveTimings {
                stall_us: micros(begun.elapsed()),
                memory_us,
            },
        };
        Ok((saved, chain))
    }

    /// Writes the memory layer, and returns its size on the disk, in bytes.
    async fn save_memory(
        &self,
        memory: &LayerId,
        goes_on: bool,
        keep: &mut usize,
    ) -> Result<u64, Failure> {
        let draft = self.begin("memory", memory)?;
        let mut files = draft.memory_files().map_err(layer("memory"))?;
        if goes_on {
            files.push(draft.read_memory().map_err(layer("memory"))?);
        }
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        // From here on, the machine may be based on the new layer, which is gone after an error.
        *keep = self.request.keep;
        self.control
            .snapshot(self.request.keep, &descriptors)
            .await
            .map_err(StepError::from)?;
        Ok(complete("memory", draft).await?)
    }

    /// Gives the machine a new overlay on `chain`.
    async fn stack(&self, chain: &Chain) -> Result<(), Failure> {
        let next = self.paths.next_disk(&self.request.id);
        let result = self.replace_disk(chain, next.clone()).await;
        if result.is_err() {
            let _ = std::fs::remove_file(&next);
            return Ok(result?);
        }
        // From here on, a daemon that takes the machine over has it go on from this save.
        self.note_disk(&next).map_err(|error| {
            Failure::Broken(format!("its new disk cannot be written down: {error}"))
        })?;
        // The old name is not the only one of the old disk.
        std::fs::rename(&next, self.paths.disk(&self.request.id)).map_err(|error| {
            Failure::Broken(format!("its new disk cannot be put in place: {error}"))
        })
    }

    async fn replace_disk(&self, chain: &Chain, next: PathBuf) -> Result<(), StepError> {
        chain.overlay(next.clone()).await?;
        Ok(hand_over_disk(self.control, chain, &next).await?)
    }

    /// Writes down that the machine writes to the file `disk`, and what that is made on.
    fn note_disk(&self, disk: &Path) -> std::io::Result<()> {
        let id = &self.request.id;
        let note = Note::read(self.paths, id)?.ok_or(std::io::ErrorKind::NotFound)?;
        let note = Note {
            layers: self.request.layers.clone(),
            disk: note::inode(disk)?,
            ..note
        };
        note.write(self.paths, id)
    }

    fn begin(&self, what: &'static str, id: &LayerId) -> Result<Draft, StepError> {
        self.files().begin(id).map_err(layer(what))
    }

    fn files(&self) -> LayerFiles<'_> {
        LayerFiles(self.paths.layers())
    }
}

/// Why a machine has no other disk than before.
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// An image cannot be opened.
    #[error("the images of the disk cannot be opened")]
    Open(#[source] std::io::Error),
    /// The VMM does not take it.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Gives a stopped machine the disk `top`, an overlay on `chain`.
pub async fn hand_over_disk(
    control: &Control,
    chain: &Chain,
    top: &Path,
) -> Result<(), HandOverError> {
    let open = || {
        let mut files = vec![File::options().read(true).write(true).open(top)?];
        for layer in chain.layers.iter().rev() {
            files.push(File::open(layer)?);
        }
        files.push(File::open(&chain.base.path)?);
        Ok(files)
    };
    let files = open().map_err(HandOverError::Open)?;
    let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    Ok(control.replace_disk(&descriptors).await?)
}

enum Failure {
    Step(StepError),
    Broken(String),
}

impl From<StepError> for Failure {
    fn from(source: StepError) -> Self {
        Self::Step(source)
    }
}

/// Layers that are removed unless they are kept.
struct NewLayers<'a> {
    files: LayerFiles<'a>,
    ids: Vec<&'a LayerId>,
}

impl NewLayers<'_> {
    fn keep(mut self) {
        self.ids.clear();
    }
}

impl Drop for NewLayers<'_> {
    fn drop(&mut self) {
        for id in &self.ids {
            if let Err(error) = self.files.remove(id) {
                warn!(layer = %id, %error, "a layer is left");
            }
        }
    }
}

fn layer(what: &'static str) -> impl FnOnce(std::io::Error) -> StepError {
    move |source| StepError::Layer { what, source }
}

async fn complete(what: &'static str, draft: Draft) -> Result<u64, StepError> {
    blocking(move || draft.complete().map_err(layer(what))).await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or(Err(StepError::Interrupted))
}
