//! The file of a working set, `working-set.json`: it is made after its snapshot, which it names, by a
//! machine that was restored from that, and says itself whether it is what it was.
//!
//! It changes how long things take, and nothing else. So one that is of no use is left aside, and the
//! log says so.

use std::fs::File;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::files::{self, FileError};
use super::manifest::{Sha256Hex, SnapshotId};
use crate::memory::GuestMemory;
use crate::memory::working_set::{WorkingSet, WorkingSetError};

/// The format that this VMM writes, and the only one that it reads.
const FORMAT: u32 = 1;
/// The name of the format.
const KIND: &str = "microvm-sandbox working set";
/// The largest file, in bytes: at most 8192 runs of some 30 characters.
const MAX_SIZE: u64 = 1 << 20;

/// Why the file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is something else.
    #[error("it is no working set of this VMM's format")]
    Foreign(#[source] serde_json::Error),
    /// It is of another kind or age.
    #[error("it is a {kind:?} of format {format}; expected a {KIND:?} of format {FORMAT}")]
    Format {
        /// What it is.
        kind: String,
        /// Its format.
        format: u32,
    },
    /// It has changed.
    #[error("it has been damaged: its checksum is wrong")]
    Damaged,
    /// It is of another snapshot.
    #[error("it is of the snapshot {0}")]
    Other(SnapshotId),
    /// It fits no machine of this snapshot.
    #[error("it fits no machine of this snapshot")]
    Set(#[from] WorkingSetError),
}

/// The whole file. The checksum is that of the text of the content.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    kind: String,
    format: u32,
    sha256: Sha256Hex,
    #[serde(borrow)]
    content: &'a RawValue,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    snapshot: SnapshotId,
    pages: WorkingSet,
}

/// The content of the file for machines of `snapshot`.
pub(super) fn to_json(snapshot: SnapshotId, pages: WorkingSet) -> serde_json::Result<Vec<u8>> {
    let content = serde_json::value::to_raw_value(&Content { snapshot, pages })?;
    serde_json::to_vec(&Envelope {
        kind: KIND.to_owned(),
        format: FORMAT,
        sha256: Sha256Hex::of(content.get().as_bytes()),
        content: &content,
    })
}

/// What the file says of machines of `snapshot` with this memory.
pub(super) fn read(
    file: &File,
    snapshot: SnapshotId,
    memory: &GuestMemory,
) -> Result<WorkingSet, ReadError> {
    from_json(&files::read_up_to(file, MAX_SIZE)?, snapshot, memory)
}

fn from_json(
    bytes: &[u8],
    snapshot: SnapshotId,
    memory: &GuestMemory,
) -> Result<WorkingSet, ReadError> {
    let envelope: Envelope = serde_json::from_slice(bytes).map_err(ReadError::Foreign)?;
    let Envelope {
        kind,
        format,
        sha256,
        content,
    } = envelope;
    if kind != KIND || format != FORMAT {
        return Err(ReadError::Format { kind, format });
    }
    if Sha256Hex::of(content.get().as_bytes()) != sha256 {
        return Err(ReadError::Damaged);
    }
    let content: Content = serde_json::from_str(content.get()).map_err(ReadError::Foreign)?;
    if content.snapshot != snapshot {
        return Err(ReadError::Other(content.snapshot));
    }
    content.pages.check(memory)?;
    Ok(content.pages)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::{PAGE_SIZE, allocate};

    fn set(pages: u64) -> WorkingSet {
        let text = format!("{{\"read\":[[0,{}]],\"written\":[]}}", pages * PAGE_SIZE);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_file_is_for_the_machines_of_its_snapshot() {
        let memory = allocate(64 * PAGE_SIZE, false).unwrap();
        let (id, other) = (SnapshotId::random().unwrap(), SnapshotId::random().unwrap());
        let json = to_json(id, set(64)).unwrap();
        assert_eq!(from_json(&json, id, &memory).unwrap(), set(64));
        let refused = from_json(&json, other, &memory);
        assert!(matches!(refused, Err(ReadError::Other(named)) if named == id));
        let large = to_json(id, set(65)).unwrap();
        let refused = from_json(&large, id, &memory);
        assert!(matches!(refused, Err(ReadError::Set(_))));
        let newer = String::from_utf8(json)
            .unwrap()
            .replace("\"format\":1", "\"format\":2");
        let refused = from_json(newer.as_bytes(), id, &memory);
        assert!(matches!(refused, Err(ReadError::Format { format: 2, .. })));
    }

    #[test]
    fn no_damage_of_a_byte_goes_unnoticed() {
        let memory = allocate(64 * PAGE_SIZE, false).unwrap();
        let id = SnapshotId::random().unwrap();
        let json = to_json(id, set(7)).unwrap();
        for place in 0..json.len() {
            for flip in 1..=u8::MAX {
                let mut bytes = json.clone();
                bytes[place] ^= flip;
                let read = from_json(&bytes, id, &memory);
                assert!(read.is_err(), "byte {place} with {flip:#x} flipped");
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_does_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let memory = allocate(64 * PAGE_SIZE, false).unwrap();
            prop_assert!(from_json(&bytes, SnapshotId::random().unwrap(), &memory).is_err());
        }
    }
}
