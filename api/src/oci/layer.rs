//! Layers: what they remove, and what they hold.
//!
//! A layer is read twice. First all of it is looked at: its digests, its paths, and the whiteouts, by
//! which it removes what is in the layers below it. Only then it is passed on, and its digests are
//! compared again, for the archive is a file that somebody could have changed.

use std::collections::HashSet;
use std::io::{self, BufReader, Read, Write};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};

use super::{LayerBlob, OciError};
use crate::archive::{ArchiveError, Entry, Kind, Section, lossy, normal, walk};

/// What the name of a whiteout begins with (image-spec, layer.md).
const WHITEOUT: &[u8] = b".wh.";
/// The whiteout of all that is in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What else AUFS keeps in its directories.
const AUFS: &[u8] = b".wh..wh.";
/// The most whiteouts of one layer: their paths are in memory.
const MAX_WHITEOUTS: usize = 100_000;
/// The most directories of an image: their paths are in memory.
const MAX_DIRECTORIES: usize = 500_000;
/// The largest window of a zstd frame, as a power of 2: 128 MiB, the default of `zstd -d`.
const MAX_WINDOW_LOG: u32 = 27;
/// How much is passed on at a time, in bytes.
const CHUNK: usize = 256 * 1024;

/// Something of the layers below that is not in the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whiteout {
    /// What has this path, and all that is in it.
    Path(Vec<u8>),
    /// All that is in this directory; the root, if the path is empty.
    Content(Vec<u8>),
}

/// The directories of the layers of an image, as far as they are entries.
#[derive(Debug, Default)]
pub struct Directories(HashSet<Vec<u8>>);

impl Directories {
    fn insert(&mut self, path: Vec<u8>) -> Result<(), ArchiveError> {
        if self.0.len() >= MAX_DIRECTORIES {
            return Err(ArchiveError::TooManyEntries);
        }
        self.0.insert(path);
        Ok(())
    }
}

/// What is to be known of a layer before it is unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LayerScan {
    /// What it removes.
    pub whiteouts: Vec<Whiteout>,
    /// How many entries it has besides.
    pub entries: u64,
    /// Devices and named pipes among them.
    pub special: u64,
    /// Size of the tar file, in bytes.
    pub bytes: u64,
}

impl LayerBlob {
    /// A name for people.
    pub fn name(&self) -> &str {
        let digits = self.digest.as_deref().unwrap_or(&self.diff_id);
        &digits[..digits.len().min(12)]
    }

    /// Looks at all of a layer, whose tar file may have `most` bytes. This blocks. Paths below
    /// `reserved`, in the root, are refused. `below` are the directories of the layers below, and
    /// those of this one afterwards.
    ///
    /// # Errors
    /// The layer is refused.
    pub fn scan(
        &self,
        most: u64,
        reserved: &str,
        below: &mut Directories,
    ) -> Result<LayerScan, OciError> {
        let mut scan = LayerScan::default();
        let bytes = self.read(most, |tar| {
            walk(tar, |entry| scan.take(entry, reserved.as_bytes(), below)).map_err(|source| {
                OciError::Layer {
                    digest: self.name().to_owned(),
                    source,
                }
            })
        })?;
        scan.bytes = bytes;
        Ok(scan)
    }

    /// Writes the tar file of a layer to `out`. This blocks.
    ///
    /// # Errors
    /// It cannot be read or written, or is another than it should be.
    pub fn copy(&self, most: u64, out: &mut impl Write) -> Result<(), OciError> {
        self.read(most, |tar| {
            let mut buffer = vec![0; CHUNK];
            loop {
                let mut filled = 0;
                while filled < CHUNK {
                    match tar.read(&mut buffer[filled..])? {
                        0 => break,
                        count => filled += count,
                    }
                }
                if filled == 0 {
                    return Ok(());
                }
                out.write_all(&buffer[..filled])?;
            }
        })
        .map(drop)
    }

    /// Lets `work` read the tar file, and then compares the digests. Returns the size of the tar
    /// file.
    fn read(
        &self,
        most: u64,
        work: impl FnOnce(&mut dyn Read) -> Result<(), OciError>,
    ) -> Result<u64, OciError> {
        let mut blob = Hashed::new(self.content.clone());
        let read = self.read_decoded(&mut blob, most, work);
        if let Err(error @ OciError::TooLarge(_)) = read {
            return Err(error);
        }
        io::copy(&mut blob, &mut io::sink())?;
        // What was damaged on its way is told as that, whatever came of it.
        self.compare("layer", self.digest.as_deref(), blob.digest())?;
        let (diff_id, bytes) = read?;
        self.compare("the tar file of layer", Some(&self.diff_id), diff_id)?;
        Ok(bytes)
    }

    /// The digest and the size of the tar file in `blob`, which `work` has read.
    fn read_decoded(
        &self,
        blob: &mut impl Read,
        most: u64,
        work: impl FnOnce(&mut dyn Read) -> Result<(), OciError>,
    ) -> Result<(String, u64), OciError> {
        let decoded = decoder(blob, self.content.clone())?;
        let mut tar = Hashed::new(decoded.take(most.saturating_add(1)));
        let result = work(&mut tar);
        // What is refused for its end may just have been cut off.
        if tar.bytes <= most {
            result?;
            // What follows the end of the archive counts for the digest.
            io::copy(&mut tar, &mut io::sink())?;
        }
        if tar.bytes > most {
            return Err(OciError::TooLarge(most));
        }
        let bytes = tar.bytes;
        Ok((tar.digest(), bytes))
    }

    fn compare(&self, what: &str, expected: Option<&str>, found: String) -> Result<(), OciError> {
        match expected {
            Some(expected) if expected != found => Err(OciError::Digest {
                what: format!("{what} {}", self.name()),
                expected: expected.to_owned(),
                found,
            }),
            _ => Ok(()),
        }
    }
}

impl LayerScan {
    fn take(
        &mut self,
        entry: Entry,
        reserved: &[u8],
        below: &mut Directories,
    ) -> Result<(), ArchiveError> {
        let bad = |problem| ArchiveError::Path {
            path: lossy(&entry.path),
            problem,
        };
        let mut parts = entry.path.rsplitn(2, |&byte| byte == b'/');
        let name = parts.next().unwrap_or_default();
        let parent = parts.next().unwrap_or_default();
        if entry.path.split(|&byte| byte == b'/').next() == Some(reserved) {
            return Err(bad("is used by this program"));
        }
        if entry.kind == Kind::HardLink {
            normal(&entry.target)?;
        }
        if parent
            .split(|&byte| byte == b'/')
            .any(|part| part.starts_with(WHITEOUT))
        {
            return Err(bad("is below a whiteout"));
        }
        let whiteout = match name.strip_prefix(WHITEOUT) {
            None => {
                self.entries += 1;
                self.special += u64::from(entry.kind == Kind::Special);
                if entry.kind == Kind::Directory {
                    return below.insert(entry.path);
                }
                // What takes the place of a directory does so without a whiteout.
                if !below.0.remove(&entry.path) {
                    return Ok(());
                }
                Whiteout::Path(entry.path)
            }
            _ if name == OPAQUE => Whiteout::Content(parent.to_owned()),
            _ if name.starts_with(AUFS) => return Ok(()),
            Some(b"" | b"." | b"..") => return Err(bad("is a whiteout of nothing")),
            Some(hidden) => {
                let mut path = parent.to_owned();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(hidden);
                Whiteout::Path(path)
            }
        };
        if self.whiteouts.len() >= MAX_WHITEOUTS {
            return Err(ArchiveError::TooManyEntries);
        }
        self.whiteouts.push(whiteout);
        Ok(())
    }
}

/// What `blob` holds, unpacked if it is compressed. `peeked` is the same, to look at its beginning.
fn decoder<'a>(blob: &'a mut impl Read, mut peeked: Section) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::new();
    peeked.by_ref().take(4).read_to_end(&mut magic)?;
    let blob = BufReader::with_capacity(CHUNK, blob);
    Ok(match magic[..] {
        // RFC 1952, section 2.3.1.
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(blob)),
        // RFC 8878, sections 3.1.1 and 3.1.2, where the first byte of the latter varies.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            Box::new(decoder)
        }
        _ => Box::new(blob),
    })
}

/// Bytes whose digest is computed as they are read.
struct Hashed<R> {
    inner: R,
    digest: Sha256,
    bytes: u64,
}

impl<R> Hashed<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            digest: Sha256::new(),
            bytes: 0,
        }
    }

    fn digest(self) -> String {
        crate::hex(&self.digest.finalize())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.digest.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::super::tests::tar_of;
    use super::*;

    const MOST: u64 = 1 << 20;

    fn hash(bytes: &[u8]) -> String {
        crate::hex(&Sha256::digest(bytes))
    }

    /// A layer of this tar file, as it is in the archive.
    fn layer(tar: &[u8], blob: &[u8]) -> LayerBlob {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(blob).unwrap();
        LayerBlob {
            content: Section::whole(&Arc::new(file)).unwrap(),
            digest: Some(hash(blob)),
            diff_id: hash(tar),
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 1).unwrap()
    }

    fn scan_of(files: &[(&str, &[u8])]) -> Result<LayerScan, OciError> {
        let tar = tar_of(files);
        layer(&tar, &tar).scan(MOST, ".builder", &mut Directories::default())
    }

    #[test]
    fn every_compression_gives_the_same_tar_file() {
        let tar = tar_of(&[("a", &[7; 100_000]), (".wh.b", b"")]);
        let two_frames = |pack: fn(&[u8]) -> Vec<u8>| {
            let (one, two) = tar.split_at(5000);
            [pack(one), pack(two)].concat()
        };
        // A frame to be skipped, of four bytes.
        let skipped = [
            &[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..],
            &zstd(&tar),
        ]
        .concat();
        for blob in [
            tar.clone(),
            gzip(&tar),
            zstd(&tar),
            two_frames(gzip),
            two_frames(zstd),
            skipped,
        ] {
            let layer = layer(&tar, &blob);
            let scan = layer
                .scan(MOST, ".builder", &mut Directories::default())
                .unwrap();
            assert_eq!(scan.whiteouts, [Whiteout::Path(b"b".to_vec())]);
            assert_eq!((scan.entries, scan.bytes), (1, tar.len() as u64));
            let mut copy = Vec::new();
            layer.copy(MOST, &mut copy).unwrap();
            assert_eq!(copy, tar);
        }
    }

    #[test]
    fn whiteouts_are_collected_and_those_of_nothing_are_refused() {
        let scan = scan_of(&[
            ("a/.wh..wh..opq", b""),
            ("a/.wh.b", b""),
            (".wh..wh..opq", b""),
            (".wh..wh.plnk/1", b""),
            (".wh..wh.aufs", b""),
            ("a/c", b""),
        ]);
        assert!(
            matches!(scan, Err(OciError::Layer { .. })),
            "below a whiteout"
        );
        let scan = scan_of(&[
            ("a/.wh..wh..opq", b""),
            ("a/.wh.b", b""),
            (".wh..wh..opq", b""),
            (".wh..wh.aufs", b""),
            ("a/c", b""),
        ])
        .unwrap();
        let expected = [
            Whiteout::Content(b"a".to_vec()),
            Whiteout::Path(b"a/b".to_vec()),
            Whiteout::Content(Vec::new()),
        ];
        assert_eq!(scan.whiteouts, expected);
        assert_eq!(scan.entries, 1);
        for bad in [".wh.", "a/.wh..", ".builder/x", ".builder", "./.builder/"] {
            let result = scan_of(&[(bad, b"")]);
            assert!(matches!(result, Err(OciError::Layer { .. })), "{bad}");
        }
        assert!(scan_of(&[("a/.builder", b"")]).is_ok());
    }

    #[test]
    fn what_takes_the_place_of_a_directory_removes_it() {
        let mut below = Directories::default();
        let mut scan = |files: &[(&str, &[u8])]| {
            let tar = tar_of(files);
            let scan = layer(&tar, &tar).scan(MOST, ".builder", &mut below);
            scan.unwrap().whiteouts
        };
        assert_eq!(scan(&[("a/", b""), ("a/b/", b""), ("c", b"")]), []);
        assert_eq!(scan(&[("a/", b""), ("c", b"")]), []);
        assert_eq!(scan(&[("a/b", b"")]), [Whiteout::Path(b"a/b".to_vec())]);
        assert_eq!(scan(&[("a/b", b"")]), []);
    }

    #[test]
    fn hard_links_out_of_the_image_are_refused() {
        for (target, is_taken) in [("/etc/x", true), ("../x", false), ("a/../../x", false)] {
            let mut tar = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            tar.append_link(&mut header, "a", target).unwrap();
            let tar = tar.into_inner().unwrap();
            let result = layer(&tar, &tar).scan(MOST, ".builder", &mut Directories::default());
            assert_eq!(result.is_ok(), is_taken, "{target}: {result:?}");
        }
    }

    #[test]
    fn bombs_go_off_at_the_limit() {
        let tar = tar_of(&[("zeros", &vec![0; 2 << 20])]);
        for blob in [gzip(&tar), zstd(&tar), tar.clone()] {
            let layer = layer(&tar, &blob);
            let result = layer.scan(MOST, ".builder", &mut Directories::default());
            assert!(
                matches!(result, Err(OciError::TooLarge(MOST))),
                "{result:?}"
            );
            let mut copied = Vec::new();
            let result = layer.copy(MOST, &mut copied);
            assert!(result.is_err());
            assert!(copied.len() as u64 <= MOST + 1);
            assert!(
                layer
                    .scan(tar.len() as u64, ".builder", &mut Directories::default())
                    .is_ok()
            );
        }
        // A frame whose window is far larger than its content: RFC 8878, section 3.1.1.1.2.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xf8, 1, 0, 0];
        let result = layer(b"", &frame).scan(MOST, ".builder", &mut Directories::default());
        assert!(
            matches!(result, Err(OciError::Layer { .. } | OciError::Read(_))),
            "{result:?}"
        );
    }

    #[test]
    fn other_content_than_the_digest_says_is_refused() {
        let tar = tar_of(&[("a", b"x")]);
        let packed = gzip(&tar);
        let mut wrong = layer(&tar, &packed);
        wrong.digest = Some(hash(b"other"));
        assert!(matches!(
            wrong.scan(MOST, "", &mut Directories::default()),
            Err(OciError::Digest { .. })
        ));
        let wrong = layer(b"other", &packed);
        assert!(matches!(
            wrong.scan(MOST, "", &mut Directories::default()),
            Err(OciError::Digest { .. })
        ));
        let mut out = Vec::new();
        assert!(matches!(
            wrong.copy(MOST, &mut out),
            Err(OciError::Digest { .. })
        ));
        // Behind the end of the archive, too.
        let longer = [&tar[..], b"more"].concat();
        let wrong = layer(&tar, &longer);
        assert!(matches!(
            wrong.scan(MOST, "", &mut Directories::default()),
            Err(OciError::Digest { .. })
        ));
        assert!(
            layer(&longer, &longer)
                .scan(MOST, "", &mut Directories::default())
                .is_ok()
        );
    }

    proptest! {
        #[test]
        fn damaged_layers_are_refused(
            index: prop::sample::Index, byte: u8, pack in 0..3_usize,
        ) {
            let tar = tar_of(&[("dir/", b""), ("dir/file", b"content"), ("dir/.wh.gone", b"")]);
            let mut blob = [tar.clone(), gzip(&tar), zstd(&tar)][pack].clone();
            let whole = layer(&tar, &blob);
            let index = index.index(blob.len());
            let is_same = blob[index] == byte;
            blob[index] = byte;
            let mut damaged = layer(&tar, &blob);
            damaged.digest = whole.digest;
            prop_assert_eq!(damaged.scan(MOST, "", &mut Directories::default()).is_ok(), is_same);
        }
    }
}
