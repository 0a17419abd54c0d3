//! Snapshots: a machine in files, from which any number of machines can go on.
//!
//! ```text
//!  manifest.json   format, identity, base, layout of the memory, size and SHA-256 of the others
//!  state.json      vCPUs, interrupt controllers, clock, devices
//!  memory-ranges   memory, each page at its offset, holes in between (see memory::layers)
//!  config.json     configuration of the machine; only in a directory
//!  working-set.json  the pages that machines touch first when they go on from it; may be missing,
//!                  and is made later, by the first of them
//! ```
//!
//! **Saving**, with vCPUs and devices at rest: the devices first, since one may still raise an
//! interrupt; then the vCPUs, each on its own thread; then interrupt controllers, timer and clock;
//! the memory last, when nothing above writes to it any more. The manifest is written when all
//! else is on the disk: a snapshot without one is none.
//!
//! **Restoring** is [`crate::builder::build_from_snapshot`].
//!
//! A snapshot with a base holds the memory that differs from it, and is of no use without. It says
//! which snapshot its base is, but never where: whoever restores it says so, and the identity shows
//! whether they are right. So a machine that has been taken over cannot have another one's files
//! opened for it.
//!
//! The files may come from somebody hostile: they are read in the jail, and what is in them is
//! checked where it is used. What is not checked by itself is the memory. Reading all of it would
//! take longer than everything else, so that its checksum is compared only on demand; its size
//! always is.

mod files;
mod manifest;
mod working_set;

use std::fs::File;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::files::{Base, Destination, FileError, Source, WorkingSetFile, read_config};
pub use self::manifest::{Manifest, ManifestError, Region, SnapshotId};
use crate::devices::cpu_hotplug::CpuHotplugState;
use crate::devices::legacy::serial::SerialRegisters;
use crate::devices::virtio::ControlError;
use crate::devices::virtio::state::VirtioState;
use crate::kvm::state::{StateError, VcpuState, VmState};
use crate::kvm::vcpu::StoppedError;
use crate::memory::GuestMemory;
use crate::memory::layers::{Layer, Layers, MAX_LAYERS, MapError, SaveError};
use crate::memory::pagemap::Pagemap;
use crate::memory::working_set::WorkingSet;

/// A machine without its memory.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// In the order of their numbers.
    pub vcpus: Vec<VcpuState>,
    /// What belongs to no vCPU.
    pub vm: VmState,
    /// Which vCPUs the guest has.
    pub cpu_hotplug: CpuHotplugState,
    /// Platform events that the guest has not seen.
    pub platform_events: u32,
    /// The serial port, if there is one.
    pub serial: Option<SerialRegisters>,
    /// In the order of the machine's slots.
    pub devices: Vec<VirtioState>,
}

/// What of a machine's memory is mapped before it is touched.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefault {
    /// Nothing.
    #[default]
    Off,
    /// All that the snapshot holds, before the machine is there.
    On,
    /// What machines touch first, if the snapshot or one that it is based on has a list of it.
    WorkingSet,
}

/// Where a machine is to be restored from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// Directory of the snapshot.
    pub source: PathBuf,
    /// Directories of the snapshots that it is based on, nearest first.
    #[serde(default)]
    pub bases: Vec<PathBuf>,
    /// What of its memory is read before it is touched.
    #[serde(default)]
    pub prefault: Prefault,
    /// Read all of the memory to compare its checksum.
    #[serde(default)]
    pub verify: bool,
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A device cannot tell.
    #[error("cannot save the device {id}")]
    Device {
        /// Its name.
        id: String,
        /// What it says.
        #[source]
        source: ControlError,
    },
    /// KVM does not tell.
    #[error("cannot read the state of the machine")]
    State(#[from] StateError),
    /// The machine has ended.
    #[error("cannot read the state of a vCPU")]
    Ended(#[from] StoppedError),
    /// The memory cannot be saved.
    #[error(transparent)]
    Memory(#[from] SaveError),
    /// There are not as many layers.
    #[error(
        "keep_base_layers is {asked}, and the memory of this machine is based on {layers} layers"
    )]
    Layers {
        /// How many were to be kept.
        asked: usize,
        /// How many there are.
        layers: usize,
    },
    /// This would make too many.
    #[error(
        "the snapshot would be based on {0} others, and more than {max} make a machine slow; \
         choose a smaller keep_base_layers",
        max = MAX_LAYERS - 1
    )]
    TooManyLayers(usize),
    /// The host hides it.
    #[error("this host does not show a process its page table (/proc/self/pagemap)")]
    NoPagemap,
    /// It goes on from no snapshot.
    #[error("the machine was not restored from a snapshot, and has no working set")]
    NotRestored,
    /// The files cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The identity of a snapshot is random.
    #[error("cannot get random bytes from the host")]
    Random(#[source] io::Error),
    /// The state cannot be written down.
    #[error("cannot write the state of the machine down")]
    Encode(#[source] serde_json::Error),
}

/// What a machine's memory is mapped from, and what tells how far it has come from there.
#[derive(Debug)]
pub struct Lineage {
    layers: Layers,
    /// The snapshot of each layer, lowest first.
    ids: Vec<SnapshotId>,
    /// The page table of this process, if the host shows it.
    pagemap: Option<Pagemap>,
}

impl Lineage {
    /// That of a machine that boots. Without a `pagemap` there will be no snapshots of it.
    pub fn new(pagemap: Option<Pagemap>) -> Self {
        Self {
            layers: Layers::default(),
            ids: Vec::new(),
            pagemap,
        }
    }

    /// Checks that so many layers can be kept.
    ///
    /// # Errors
    /// There are fewer, or there would be too many, or there can be no snapshot at all.
    pub fn check(&self, keep: usize) -> Result<(), SnapshotError> {
        let layers = self.ids.len();
        if keep > layers {
            return Err(SnapshotError::Layers {
                asked: keep,
                layers,
            });
        }
        if keep >= MAX_LAYERS {
            return Err(SnapshotError::TooManyLayers(keep));
        }
        if self.pagemap.is_none() {
            return Err(SnapshotError::NoPagemap);
        }
        Ok(())
    }

    /// Writes the machine in `state`, whose memory is `memory`, to `files`, and bases it on the
    /// lowest `keep` snapshots that it was based on before. If `files` can be read by somebody who
    /// cannot write to them, the machine is from now on based on this snapshot as well.
    ///
    /// # Errors
    /// The files are of no use. The machine is as it was.
    pub fn save(
        &mut self,
        state: &MachineState,
        memory: &GuestMemory,
        keep: usize,
        files: &Destination,
    ) -> Result<(), SnapshotError> {
        self.check(keep)?;
        let pagemap = self.pagemap.as_ref().ok_or(SnapshotError::NoPagemap)?;
        let written = self.layers.save(memory, pagemap, keep, files.memory())?;
        let state = serde_json::to_vec(state).map_err(SnapshotError::Encode)?;
        let manifest = Manifest::new(
            SnapshotId::random().map_err(SnapshotError::Random)?,
            keep.checked_sub(1)
                .and_then(|last| self.ids.get(last).copied()),
            memory,
            &written,
            &state,
        );
        let readable = files.memory_to_read()?;
        files.finish(&manifest, &state)?;
        if let Some(file) = readable {
            self.ids.truncate(keep);
            self.ids.push(manifest.id);
            if let Err(error) = self.layers.rebase(memory, keep, file, &written) {
                let error = crate::error_chain(&error);
                tracing::warn!(
                    error,
                    "the machine does not share its memory with the snapshot"
                );
            }
        }
        Ok(())
    }
}

impl Lineage {
    /// Writes to `file` which pages the machine, whose memory is `memory`, has touched since it was
    /// restored, for others that are restored from the same snapshot. It may run meanwhile.
    ///
    /// # Errors
    /// The file is of no use, or the machine was not restored.
    pub fn save_working_set(
        &self,
        memory: &GuestMemory,
        file: &WorkingSetFile,
    ) -> Result<(), SnapshotError> {
        let snapshot = self.ids.last().ok_or(SnapshotError::NotRestored)?;
        let pagemap = self.pagemap.as_ref().ok_or(SnapshotError::NoPagemap)?;
        let pages = WorkingSet::of(memory, pagemap).map_err(SaveError::Pagemap)?;
        let text = working_set::to_json(*snapshot, pages).map_err(SnapshotError::Encode)?;
        Ok(file.write(&text)?)
    }
}

/// Why a snapshot cannot be restored.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A manifest is of no use.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The state is not what was written.
    #[error("state.json has been damaged: its checksum is not that in the manifest")]
    StateDamaged,
    /// The state makes no sense.
    #[error("state.json is not the state of a machine")]
    State(#[source] serde_json::Error),
    /// Not the number of bases that it has.
    #[error(
        "the snapshot {id} is based on {needed}, and {given} was given; base_url has to name all \
         snapshots that it is based on, nearest first"
    )]
    Base {
        /// The snapshot.
        id: SnapshotId,
        /// What it is based on.
        needed: String,
        /// What was named.
        given: String,
    },
    /// More than make sense.
    #[error("{0} bases were given, and a snapshot has at most {max}", max = MAX_LAYERS - 1)]
    TooManyBases(usize),
    /// Another machine.
    #[error(
        "the snapshot is of a machine with the memory {saved}, and this one has {here}; give it as \
         much as it had"
    )]
    Memory {
        /// Regions in the snapshot.
        saved: String,
        /// Regions of the machine.
        here: String,
    },
    /// A memory file cannot be used.
    #[error("cannot use the memory of the snapshot {id}")]
    Map {
        /// The snapshot.
        id: SnapshotId,
        /// Why.
        #[source]
        source: MapError,
    },
}

/// A snapshot that was read, and fits a machine's memory.
pub struct Loaded {
    /// The machine without its memory.
    pub state: MachineState,
    /// What the memory is mapped from.
    pub lineage: Lineage,
    /// What is to be mapped before it is touched.
    pub working_set: Option<WorkingSet>,
}

impl Source {
    /// Reads the snapshot and maps `memory`, which has not been used yet, from it and its bases.
    ///
    /// # Errors
    /// It is no snapshot of this format, has been damaged, or is not of a machine with this memory.
    pub fn load(self, memory: &GuestMemory, pagemap: Option<Pagemap>) -> Result<Loaded, LoadError> {
        let Self {
            manifest,
            state,
            memory: memory_file,
            bases,
            prefault,
            working_set,
            verify,
        } = self;
        if bases.len() >= MAX_LAYERS {
            return Err(LoadError::TooManyBases(bases.len()));
        }
        let manifest = Manifest::read(&manifest)?;
        let state = files::read_up_to(&state, files::MAX_STATE)?;
        if !manifest.state.matches(&state) {
            return Err(LoadError::StateDamaged);
        }
        let state = serde_json::from_slice(&state).map_err(LoadError::State)?;

        // From the snapshot down to the one that has no base.
        let mut base = manifest.base;
        let mut id = manifest.id;
        let mut parts = vec![(manifest, memory_file)];
        let mut working_sets = vec![(id, working_set)];
        for Base {
            manifest,
            memory,
            working_set,
        } in bases
        {
            let manifest = Manifest::read(&manifest)?;
            working_sets.push((manifest.id, working_set));
            if base != Some(manifest.id) {
                return Err(wrong_base(id, base, Some(manifest.id)));
            }
            (id, base) = (manifest.id, manifest.base);
            parts.push((manifest, memory));
        }
        if base.is_some() {
            return Err(wrong_base(id, base, None));
        }

        let mut ids = Vec::new();
        let mut layers = Vec::new();
        for (manifest, file) in parts.into_iter().rev() {
            let id = manifest.id;
            layers.push(layer(manifest, file, memory, verify)?);
            ids.push(id);
        }
        let layers = Layers::map(memory, layers, prefault == Prefault::On)
            .map_err(|source| LoadError::Map { id, source })?;
        // That of the nearest: machines of a snapshot begin as those of its base did, for the most.
        let working_set = working_sets.into_iter().find_map(|(id, file)| {
            let read = working_set::read(&file?, id, memory);
            read.inspect_err(|error| {
                let error = crate::error_chain(error);
                tracing::warn!(error, %id, "the working set of a snapshot is of no use");
            })
            .ok()
        });
        Ok(Loaded {
            working_set,
            state,
            lineage: Lineage {
                layers,
                ids,
                pagemap,
            },
        })
    }
}

fn layer(
    manifest: Manifest,
    file: File,
    memory: &GuestMemory,
    verify: bool,
) -> Result<Layer, LoadError> {
    let here = Region::all(memory);
    if manifest.regions != here {
        return Err(LoadError::Memory {
            saved: manifest::describe(&manifest.regions),
            here: manifest::describe(&here),
        });
    }
    let id = manifest.id;
    let map = |source| LoadError::Map { id, source };
    let size = here.iter().map(|region| region.size).sum();
    let layer = Layer::new(file, manifest.pages, size).map_err(map)?;
    if verify {
        layer.verify(&manifest.memory_sha256.0).map_err(map)?;
    }
    Ok(layer)
}

fn wrong_base(id: SnapshotId, needed: Option<SnapshotId>, given: Option<SnapshotId>) -> LoadError {
    let name =
        |id: Option<SnapshotId>| id.map_or_else(|| "no other".to_owned(), |id| id.to_string());
    LoadError::Base {
        id,
        needed: name(needed),
        given: name(given),
    }
}
