//! Layers of a disk that become one.

use std::fs::File;

use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as UNMAP;

use super::super::merge::{MergeError, merge};
use super::*;
use crate::config::BackingImage;

/// Of the disk, in sectors: some clusters, and part of one.
const SECTORS: u64 = 4 * 128 + 5;

/// A chain of overlays on a raw image with something in each of its sectors.
struct Chain {
    dir: TempDir,
    /// The raw image first.
    images: Vec<PathBuf>,
}

impl Chain {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let base = dir.path().join("base.raw");
        std::fs::write(&base, vec![0xba; SECTORS as usize * 512]).unwrap();
        Self {
            dir,
            images: vec![base],
        }
    }

    fn push(&mut self) {
        let name = format!("{}.qcow2", self.images.len());
        self.images
            .push(overlay(&self.dir, &name, SECTORS * 512, None));
    }

    fn on(images: &[PathBuf]) -> Machine {
        let (top, below) = images.split_last().unwrap();
        let backing = below.iter().rev().map(|path| BackingImage {
            path: path.clone(),
            image_type: match path.extension().unwrap().to_str() {
                Some("raw") => ImageType::Raw,
                _ => ImageType::Qcow2,
            },
        });
        Machine::new(&DiskConfig {
            backing: backing.collect(),
            ..qcow2(top)
        })
    }

    fn machine(&self) -> Machine {
        Self::on(&self.images)
    }

    fn content(machine: &mut Machine) -> Vec<Vec<u8>> {
        let parts = (0..SECTORS).step_by(47);
        parts
            .map(|start| {
                let sectors = u32::try_from((SECTORS - start).min(47)).unwrap();
                machine.sectors(start, sectors * 512)
            })
            .collect()
    }

    fn merge(&self, layers: std::ops::Range<usize>) -> Result<PathBuf, MergeError> {
        let output = self.dir.path().join("merged.qcow2");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&output)
            .unwrap();
        let layers = self.images[layers].iter().rev();
        let layers = layers.map(|path| File::open(path).unwrap()).collect();
        merge(layers, file, SECTORS * 512).map(|()| output)
    }
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, u8, u8),
    Zero(u64, u32, bool),
    Discard(u64, u32),
    Push,
}

fn change() -> impl Strategy<Value = Change> {
    let range = (0..SECTORS).prop_flat_map(|start| (Just(start), 1..=(SECTORS - start).min(300)));
    let range = range.prop_map(|(start, len)| (start, u32::try_from(len).unwrap()));
    let start = 0..SECTORS - 8;
    prop_oneof![
        5 => (start, 1..8_u8, any::<u8>()).prop_map(|(at, len, byte)| Change::Write(at, len, byte)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Change::Zero(at, len, unmap)),
        1 => range.prop_map(|(at, len)| Change::Discard(at, len)),
        3 => Just(Change::Push),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_merged_chain_holds_what_it_held(
        changes in prop::collection::vec(change(), 1..40),
        place in any::<prop::sample::Index>(),
    ) {
        let mut chain = Chain::new();
        chain.push();
        chain.push();
        let mut machine = chain.machine();
        for change in changes {
            let done = match change {
                Change::Write(at, len, byte) => {
                    machine.write(at, &vec![byte; usize::from(len) * 512])
                }
                Change::Zero(at, len, unmap) => {
                    let flags = if unmap { UNMAP } else { 0 };
                    machine.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[(at, len, flags)])
                }
                Change::Discard(at, len) => machine.segments(VIRTIO_BLK_T_DISCARD, &[(at, len, 0)]),
                Change::Push => {
                    prop_assert_eq!(machine.flush().0, OK);
                    drop(machine);
                    chain.push();
                    machine = chain.machine();
                    (OK, 1)
                }
            };
            prop_assert_eq!(done.0, OK);
        }
        prop_assert_eq!(machine.flush().0, OK);
        let before = Chain::content(&mut machine);
        drop(machine);
        // Any two or more of the overlays.
        let overlays = chain.images.len() - 1;
        let first = 1 + place.index(overlays - 1);
        let last = first + 2 + place.index(chain.images.len() - first - 1);
        let layers: Vec<_> = chain.images[first..last].iter().map(std::fs::read).collect();
        let merged = chain.merge(first..last).unwrap();
        for (path, layer) in chain.images[first..last].iter().zip(layers) {
            prop_assert_eq!(std::fs::read(path).unwrap(), layer.unwrap());
        }
        let mut images = chain.images.clone();
        images.splice(first..last, [merged]);
        let mut machine = Chain::on(&images);
        prop_assert_eq!(Chain::content(&mut machine), before);
        // And can be written to.
        prop_assert_eq!(machine.write(77, &[0x77; 512]).0, OK);
        prop_assert_eq!(machine.sectors(77, 512), [0x77; 512]);
    }
}

#[test]
fn what_lies_beneath_is_no_part_of_a_merged_image() {
    let mut chain = Chain::new();
    for byte in [1, 2, 3] {
        chain.push();
        let mut machine = chain.machine();
        assert_eq!(machine.write(u64::from(byte) * 128, &[byte; 512]), (OK, 1));
        assert_eq!(machine.flush(), (OK, 1));
    }
    let merged = chain.merge(2..4).unwrap();
    // Two clusters of data, and the rest is tables.
    let len = std::fs::metadata(&merged).unwrap().len();
    assert!(len <= 8 * 65_536, "{len}");
    let bytes = std::fs::read(&merged).unwrap();
    let has = |byte: u8| bytes.windows(512).any(|window| window == [byte; 512]);
    assert!(has(2) && has(3) && !has(1));
}

#[test]
fn damaged_and_foreign_layers_are_refused() {
    let mut chain = Chain::new();
    chain.push();
    chain.push();
    let refused = |chain: &Chain| {
        let error = chain.merge(1..3).unwrap_err();
        std::fs::remove_file(chain.dir.path().join("merged.qcow2")).unwrap();
        crate::error_chain(&error)
    };
    assert!(matches!(chain.merge(1..2), Err(MergeError::Count(1))));
    std::fs::remove_file(chain.dir.path().join("merged.qcow2")).unwrap();
    let good = std::fs::read(&chain.images[1]).unwrap();
    let spoil = |at: usize, bytes: &[u8]| {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&chain.images[1], bad).unwrap();
        refused(&chain)
    };
    // docs/interop/qcow2.rst of QEMU: magic at 0, cluster bits at 20, size at 24, L1 table at 40.
    assert!(spoil(0, b"none").contains("layer 1 from the top"));
    let text = spoil(24, &4096_u64.to_be_bytes());
    assert!(text.contains("another size"), "{text}");
    let text = spoil(40, &u64::MAX.to_be_bytes());
    assert!(text.contains("layer 1"), "{text}");
}
