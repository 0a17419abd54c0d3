//! The manifest of a snapshot: what the other files are, and whether they are what they were.

use std::fmt;
use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::files::{self, FileError};
use crate::memory::GuestMemory;
use crate::memory::extents::Extents;
use crate::memory::layers::{Hash, Written};

/// The format that this VMM writes, and the only one that it reads.
const FORMAT: u32 = 1;

/// The name of the format: what is not ours is not read.
const KIND: &str = "microvm-sandbox snapshot";

/// The largest manifest, in bytes: its runs of pages are at most 8192, of some 30 characters.
const MAX_SIZE: u64 = 4 << 20;

/// Why a manifest is of no use.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is something else.
    #[error("manifest.json is not that of a snapshot of this VMM")]
    Foreign(#[source] serde_json::Error),
    /// It was made by something else.
    #[error("manifest.json is that of a {kind:?}; expected a {KIND:?}")]
    Kind {
        /// What it is.
        kind: String,
    },
    /// It was made by a VMM of another age.
    #[error(
        "the snapshot has format {format}, and this VMM reads format {FORMAT}; restore it with the \
         version that made it, or make it anew"
    )]
    Format {
        /// Its format.
        format: u32,
    },
    /// It has changed since it was written.
    #[error("manifest.json has been damaged: its checksum is wrong")]
    Damaged,
}

/// The identity of a snapshot: 128 random bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(u128);

impl SnapshotId {
    /// A new identity.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 16];
        // Up to 256 bytes come whole (getrandom(2)).
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(u128::from_ne_bytes(bytes)))
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bad = "an identity is 32 hexadecimal digits";
        if text.len() != 32 || !is_lower_hex(&text) {
            return Err(bad);
        }
        u128::from_str_radix(&text, 16).map(Self).map_err(|_| bad)
    }
}

/// Whether there are only the digits that this format writes. What also means the same number, upper
/// case and signs, is damage.
fn is_lower_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// A SHA-256, in hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256Hex(pub Hash);

impl Sha256Hex {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl From<Sha256Hex> for String {
    fn from(hash: Sha256Hex) -> Self {
        hash.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl TryFrom<String> for Sha256Hex {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bad = "a checksum is 64 hexadecimal digits";
        let mut hash = Hash::default();
        if text.len() != 2 * hash.len() || !is_lower_hex(&text) {
            return Err(bad);
        }
        for (index, byte) in hash.iter_mut().enumerate() {
            let digits = text.get(2 * index..2 * index + 2).ok_or(bad)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad)?;
        }
        Ok(Self(hash))
    }
}

/// A region of a guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Region {
    /// Guest physical address.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

impl Region {
    /// Those of `memory`, in order.
    pub fn all(memory: &GuestMemory) -> Vec<Self> {
        let region = |region: &vm_memory::GuestRegionMmap| Self {
            start: region.start_addr().raw_value(),
            size: region.len(),
        };
        memory.iter().map(region).collect()
    }
}

/// Regions, for people.
pub(super) fn describe(regions: &[Region]) -> String {
    let region = |region: &Region| format!("{} MiB at {:#x}", region.size >> 20, region.start);
    regions.iter().map(region).collect::<Vec<_>>().join(", ")
}

/// A file that is not to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDigest {
    /// Size in bytes.
    pub size: u64,
    /// Of its content.
    pub sha256: Sha256Hex,
}

impl FileDigest {
    fn of(bytes: &[u8]) -> Self {
        Self {
            size: bytes.len() as u64,
            sha256: Sha256Hex::of(bytes),
        }
    }

    /// Whether these are the bytes.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        *self == Self::of(bytes)
    }
}

/// The manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Which snapshot it is.
    pub id: SnapshotId,
    /// The one that it is based on.
    pub base: Option<SnapshotId>,
    /// Version of the VMM that made it, for people.
    pub vmm: String,
    /// The guest's memory.
    pub regions: Vec<Region>,
    /// The pages in `memory-ranges`.
    pub pages: Extents,
    /// Of the content of those pages, in order.
    pub memory_sha256: Sha256Hex,
    /// `state.json`.
    pub state: FileDigest,
}

/// What the file says before anything of a certain format.
#[derive(Deserialize)]
struct Head {
    kind: String,
    format: u32,
}

/// The whole file. The checksum is that of the text of the manifest.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    kind: &'a str,
    format: u32,
    sha256: Sha256Hex,
    #[serde(borrow)]
    manifest: &'a RawValue,
}

impl Manifest {
    /// The manifest of a snapshot whose memory was just written, and whose state is to be.
    pub(super) fn new(
        id: SnapshotId,
        base: Option<SnapshotId>,
        memory: &GuestMemory,
        written: &Written,
        state: &[u8],
    ) -> Self {
        Self {
            id,
            base,
            vmm: env!("CARGO_PKG_VERSION").to_owned(),
            regions: Region::all(memory),
            pages: written.pages.clone(),
            memory_sha256: Sha256Hex(written.hash),
            state: FileDigest::of(state),
        }
    }

    /// The content of the file.
    pub(super) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let manifest = serde_json::value::to_raw_value(self)?;
        serde_json::to_vec(&Envelope {
            kind: KIND,
            format: FORMAT,
            sha256: Sha256Hex::of(manifest.get().as_bytes()),
            manifest: &manifest,
        })
    }

    pub(super) fn read(file: &File) -> Result<Self, ManifestError> {
        Self::from_json(&files::read_up_to(file, MAX_SIZE)?)
    }

    fn from_json(bytes: &[u8]) -> Result<Self, ManifestError> {
        let head: Head = serde_json::from_slice(bytes).map_err(ManifestError::Foreign)?;
        if head.kind != KIND {
            return Err(ManifestError::Kind { kind: head.kind });
        }
        if head.format != FORMAT {
            return Err(ManifestError::Format {
                format: head.format,
            });
        }
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(ManifestError::Foreign)?;
        let text = envelope.manifest.get();
        if Sha256Hex::of(text.as_bytes()) != envelope.sha256 {
            return Err(ManifestError::Damaged);
        }
        serde_json::from_str(text).map_err(ManifestError::Foreign)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            id: SnapshotId(0x12),
            base: Some(SnapshotId(u128::MAX)),
            vmm: "1".to_owned(),
            regions: vec![Region {
                start: 0,
                size: 256 << 20,
            }],
            pages: Extents::of(vec![4096..8192, 16384..20480]),
            memory_sha256: Sha256Hex([7; 32]),
            state: FileDigest::of(b"state"),
        }
    }

    #[test]
    fn foreign_and_newer_manifests_are_told_apart() {
        let text = String::from_utf8(manifest().to_json().unwrap()).unwrap();
        assert_eq!(Manifest::from_json(text.as_bytes()).unwrap(), manifest());
        let newer = text.replace("\"format\":1", "\"format\":2,\"more\":[]");
        let error = Manifest::from_json(newer.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Format { format: 2 }));
        let other = text.replace(KIND, "firecracker");
        let error = Manifest::from_json(other.as_bytes()).unwrap_err();
        assert!(matches!(error, ManifestError::Kind { .. }));
        let error = Manifest::from_json(b"{\"memory\": 1}").unwrap_err();
        assert!(matches!(error, ManifestError::Foreign(_)));
    }

    #[test]
    fn hexadecimal_digits_are_written_in_one_way() {
        let hash = String::from(Sha256Hex::of(b"state"));
        assert!(Sha256Hex::try_from(hash.clone()).is_ok());
        let upper = hash.to_uppercase();
        let signed = format!("+1{}", &hash[2..]);
        for text in [upper, signed, hash[1..].to_owned(), format!("{hash}0")] {
            assert!(Sha256Hex::try_from(text).is_err());
        }
        let id = SnapshotId(0xa << 124 | 0xb).to_string();
        assert!(SnapshotId::try_from(id.clone()).is_ok());
        for text in [id.to_uppercase(), format!("+{}", &id[1..])] {
            assert!(SnapshotId::try_from(text).is_err());
        }
    }

    #[test]
    fn a_file_is_what_it_was_or_not() {
        let digest = FileDigest::of(b"state");
        assert!(digest.matches(b"state"));
        assert!(!digest.matches(b"State") && !digest.matches(b"stat"));
    }

    #[test]
    fn no_damage_of_a_byte_goes_unnoticed() {
        let json = manifest().to_json().unwrap();
        for place in 0..json.len() {
            for flip in 1..=u8::MAX {
                let mut bytes = json.clone();
                bytes[place] ^= flip;
                let read = Manifest::from_json(&bytes);
                assert!(read.is_err(), "byte {place} with {flip:#x} flipped");
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_does_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::from_json(&bytes);
        }
    }
}
