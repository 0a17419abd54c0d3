//! Layers on the disk.
//!
//! A layer is a directory with its id as the name. It is made under another name, and has its own
//! only when it is complete and on the disk; it is renamed again before it is removed. So one that is
//! there under its name is whole, whenever the daemon or the machine crashes.
//!
//! | In the directory | What |
//! |---|---|
//! | `manifest.json`, `state.json`, `memory-ranges` | a memory layer, as the VMM writes and reads it |
//! | `working-set.json` | perhaps, in a memory layer: what machines touch first that start from it |
//! | `disk.qcow2`, `base.json` | a disk layer, and which template's image is at the bottom of it |

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tracing::{info, warn};

use crate::domain::{LayerId, Layers, LayersInfo};
use crate::images::{Base, Chain};

/// The files of a memory layer, in the order in which the VMM takes them.
pub const MEMORY_FILES: [&str; 3] = ["manifest.json", "state.json", "memory-ranges"];
/// Added to a layer that is complete, whole or not at all.
const WORKING_SET: &str = "working-set.json";
const DISK: &str = "disk.qcow2";
const BASE: &str = "base.json";
/// What follows the id in the name of a layer that is not complete.
const DRAFT: &str = ".new";
/// What follows the id in the name of a layer that is being removed.
const GONE: &str = ".gone";
/// The largest manifest, and the largest `base.json`, in bytes.
const MAX_JSON: u64 = 1 << 20;
/// How much of an image is read at a time, in bytes.
const PIECE: usize = 1 << 20;

/// The directory of all layers.
#[derive(Debug, Clone, Copy)]
pub struct LayerFiles<'a>(pub &'a Path);

/// A layer that is being made. It is removed if it is not completed.
#[derive(Debug)]
pub struct Draft {
    draft: PathBuf,
    path: PathBuf,
    is_complete: bool,
}

impl LayerFiles<'_> {
    /// The directory of a layer.
    pub fn path(&self, id: &LayerId) -> PathBuf {
        self.0.join(id.as_str())
    }

    /// The image of a disk layer.
    pub fn disk(&self, id: &LayerId) -> PathBuf {
        self.path(id).join(DISK)
    }

    /// What a new overlay on these layers is made on; `None` if there are none.
    pub fn chain(&self, layers: &[LayerId]) -> io::Result<Option<Chain>> {
        let Some(top) = layers.last() else {
            return Ok(None);
        };
        let json = read_small(&self.path(top).join(BASE))?;
        let base: Base = serde_json::from_slice(&json)?;
        Ok(Some(Chain {
            base,
            layers: layers.iter().map(|id| self.disk(id)).collect(),
            scratch: None,
        }))
    }

    /// Begins to make a layer.
    pub fn begin(&self, id: &LayerId) -> io::Result<Draft> {
        let draft = self.0.join(format!("{id}{DRAFT}"));
        DirBuilder::new().mode(0o700).create(&draft)?;
        Ok(Draft {
            draft,
            path: self.path(id),
            is_complete: false,
        })
    }

    /// Begins to make the working set of a memory layer: an empty file for the VMM to write. One that
    /// somebody else has begun is not begun again.
    pub fn begin_working_set(&self, id: &LayerId) -> io::Result<WorkingSetDraft> {
        let path = self.path(id).join(WORKING_SET);
        let draft = path.with_extension("new");
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&draft)?;
        Ok(WorkingSetDraft { file, draft, path })
    }

    /// Whether a memory layer has a working set of its own.
    pub fn has_working_set(&self, id: &LayerId) -> bool {
        self.path(id).join(WORKING_SET).exists()
    }

    /// Removes a layer; one that is not there is removed.
    pub fn remove(&self, id: &LayerId) -> io::Result<()> {
        let gone = self.0.join(format!("{id}{GONE}"));
        match fs::rename(self.path(id), &gone) {
            Ok(()) => fs::remove_dir_all(gone),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Removes all but these layers, and what is not complete.
    pub fn retain(&self, layers: &BTreeSet<LayerId>) -> io::Result<()> {
        for entry in fs::read_dir(self.0)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            match name.and_then(|name| name.parse::<LayerId>().ok()) {
                Some(id) if layers.contains(&id) => {}
                Some(id) => {
                    info!(layer = %id, "removing a layer that nobody holds");
                    self.remove(&id)?;
                }
                None => {
                    warn!(path = %path.display(), "removing part of a layer");
                    fs::remove_dir_all(&path)?;
                }
            }
        }
        Ok(())
    }

    /// What these layers occupy on the disk, in bytes; `None` if one of them is not there.
    pub fn size(&self, layers: &Layers) -> io::Result<Option<u64>> {
        let mut size_bytes: u64 = 0;
        for id in layers.all() {
            match size(&self.path(id)) {
                Ok(size) => size_bytes = size_bytes.saturating_add(size),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(size_bytes))
    }

    /// What there is to say of these layers; `None` if one of them is not there.
    pub fn inspect(&self, layers: &Layers) -> io::Result<Option<LayersInfo>> {
        let Some(size_bytes) = self.size(layers)? else {
            return Ok(None);
        };
        let digest = match (layers.memory.last(), layers.disk.last()) {
            (Some(memory), _) => {
                let manifest = read_small(&self.path(memory).join(MEMORY_FILES[0]))?;
                Sha256::digest(manifest)
            }
            (None, Some(disk)) => digest_of(File::open(self.disk(disk))?)?,
            (None, None) => Sha256::digest([]),
        };
        let checksum = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Some(LayersInfo {
            size_bytes,
            checksum,
        }))
    }
}

/// A working set that is being made. It is removed if it is not completed.
#[derive(Debug)]
pub struct WorkingSetDraft {
    /// For the VMM to write.
    pub file: File,
    draft: PathBuf,
    path: PathBuf,
}

impl WorkingSetDraft {
    /// Gives it its name.
    pub fn complete(self) -> io::Result<()> {
        fs::rename(&self.draft, &self.path)
    }
}

impl Drop for WorkingSetDraft {
    fn drop(&mut self) {
        // After a rename it is not there.
        let _ = fs::remove_file(&self.draft);
    }
}

impl Draft {
    /// The empty files of a memory layer, for the VMM to write.
    pub fn memory_files(&self) -> io::Result<Vec<File>> {
        let create = |name: &&str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(self.draft.join(name))
        };
        MEMORY_FILES.iter().map(create).collect()
    }

    /// The file of the memory, for the VMM to map.
    pub fn read_memory(&self) -> io::Result<File> {
        File::open(self.draft.join(MEMORY_FILES[2]))
    }

    /// An empty file for a disk, and what is at its bottom.
    pub fn new_disk(&self, base: &Base) -> io::Result<File> {
        self.put_base(base)?;
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.draft.join(DISK))
    }

    /// Takes in the image `disk`, which keeps its old name too, and what is at its bottom.
    pub fn put_disk(&self, disk: &Path, base: &Base) -> io::Result<()> {
        let path = self.draft.join(DISK);
        fs::hard_link(disk, &path)?;
        File::open(path)?.sync_all()?;
        self.put_base(base)
    }

    fn put_base(&self, base: &Base) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.draft.join(BASE))?;
        file.write_all(&serde_json::to_vec(base)?)?;
        file.sync_all()
    }

    /// The image of a disk layer, which may still be written to.
    pub fn disk(&self) -> PathBuf {
        self.draft.join(DISK)
    }

    /// Gives the layer its name. Its files are on the disk. Returns its size there, in bytes.
    pub fn complete(mut self) -> io::Result<u64> {
        File::open(&self.draft)?.sync_all()?;
        let size = size(&self.draft)?;
        fs::rename(&self.draft, &self.path)?;
        self.is_complete = true;
        match self.path.parent() {
            Some(parent) => File::open(parent)?.sync_all()?,
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(size)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_complete
            && let Err(error) = fs::remove_dir_all(&self.draft)
        {
            warn!(path = %self.draft.display(), %error, "part of a layer is left");
        }
    }
}

/// What the files in a directory occupy, in bytes.
fn size(directory: &Path) -> io::Result<u64> {
    let mut bytes: u64 = 0;
    for entry in fs::read_dir(directory)? {
        // stat(2): in units of 512 bytes, whatever the file system's.
        bytes = bytes.saturating_add(entry?.metadata()?.blocks().saturating_mul(512));
    }
    Ok(bytes)
}

fn digest_of(mut file: File) -> io::Result<sha2::digest::Output<Sha256>> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; PIECE];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(digest.finalize()),
            read => digest.update(&buffer[..read]),
        }
    }
}

fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path)?
        .take(MAX_JSON + 1)
        .read_to_end(&mut bytes)?;
    if read as u64 > MAX_JSON {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(files: LayerFiles<'_>, id: &LayerId) -> Draft {
        let draft = files.begin(id).unwrap();
        for mut file in draft.memory_files().unwrap() {
            file.write_all(id.as_str().as_bytes()).unwrap();
        }
        draft
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_layer_is_there_when_it_is_complete() {
        let dir = tempfile::tempdir().unwrap();
        let files = LayerFiles(dir.path());
        let layers = Layers::default().saved(LayerId::random(), LayerId::random());
        let draft = memory(files, &layers.memory[0]);
        assert_eq!(files.inspect(&layers).unwrap(), None);
        drop(draft);
        assert!(names(dir.path()).is_empty());

        let size = memory(files, &layers.memory[0]).complete().unwrap();
        assert_eq!(files.inspect(&layers).unwrap(), None, "no disk yet");
        let (disk, image) = (dir.path().join("disk"), dir.path().join("image"));
        fs::write(&disk, [1; 8192]).unwrap();
        fs::write(&image, [0; 8192]).unwrap();
        let base = Base::of(&image).unwrap();
        let draft = files.begin(&layers.disk[0]).unwrap();
        draft.put_disk(&disk, &base).unwrap();
        let size = size + draft.complete().unwrap();

        let info = files.inspect(&layers).unwrap().unwrap();
        assert_eq!(info.size_bytes, size);
        assert_eq!(info.checksum.len(), 64);
        let alone = files.inspect(&layers.without_memory()).unwrap().unwrap();
        assert!(alone.size_bytes < size);
        let expected: String = Sha256::digest([1; 8192])
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(alone.checksum, expected);
        let chain = files.chain(&layers.disk).unwrap().unwrap();
        assert_eq!(chain.base, base);
        assert_eq!(fs::read(&chain.layers[0]).unwrap(), [1; 8192]);
        assert_eq!(files.chain(&[]).unwrap(), None);
    }

    #[test]
    fn what_nobody_holds_is_removed_and_so_are_parts() {
        let dir = tempfile::tempdir().unwrap();
        let files = LayerFiles(dir.path());
        let ids: Vec<_> = (0..4).map(|_| LayerId::random()).collect();
        for id in &ids[..3] {
            memory(files, id).complete().unwrap();
        }
        // As a crash leaves them.
        fs::create_dir(dir.path().join(format!("{}{DRAFT}", ids[3]))).unwrap();
        fs::rename(
            files.path(&ids[2]),
            dir.path().join(format!("{}{GONE}", ids[2])),
        )
        .unwrap();
        files.retain(&BTreeSet::from([ids[1].clone()])).unwrap();
        assert_eq!(names(dir.path()), [ids[1].as_str()]);
        for _ in 0..2 {
            files.remove(&ids[1]).unwrap();
        }
        assert!(names(dir.path()).is_empty());
    }
}
