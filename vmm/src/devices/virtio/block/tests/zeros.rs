//! Discards and zeros: what comes back, what space is given back, and what is refused.

use std::os::unix::fs::MetadataExt;

use virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP as UNMAP;

use super::*;

/// Large enough for whole blocks of any file system.
const SECTORS: u64 = 8192;

fn full_image(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("full.raw");
    std::fs::write(&path, vec![0xaa; SECTORS as usize * 512]).unwrap();
    std::fs::File::open(&path).unwrap().sync_all().unwrap();
    path
}

fn blocks(path: &Path) -> u64 {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks()
}

#[test]
fn what_is_discarded_takes_up_no_space() {
    let dir = TempDir::new().unwrap();
    let path = full_image(&dir);
    let before = blocks(&path);
    let mut machine = Machine::new(&config(&path));
    let kind = VIRTIO_BLK_T_DISCARD;
    assert_eq!(
        machine.segments(kind, &[(0, 4096, 0), (4096, 2048, 0)]),
        (OK, 1)
    );
    assert!(blocks(&path) <= before - 6144, "{} blocks", blocks(&path));
    assert_eq!(machine.sectors(0, 512), [0; 512]);
    assert_eq!(machine.sectors(6144, 512), [0xaa; 512]);
    assert_eq!(machine.block.counters()["discard_bytes"], 6144 * 512);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SECTORS * 512);
}

#[test]
fn zeros_give_space_back_only_if_the_guest_allows_it() {
    let dir = TempDir::new().unwrap();
    let path = full_image(&dir);
    let before = blocks(&path);
    let mut machine = Machine::new(&config(&path));
    let kind = VIRTIO_BLK_T_WRITE_ZEROES;
    // Beginning and end lie within blocks.
    assert_eq!(machine.segments(kind, &[(1, 2046, 0)]), (OK, 1));
    assert_eq!(blocks(&path), before);
    assert_eq!(machine.segments(kind, &[(4097, 2046, UNMAP)]), (OK, 1));
    assert!(blocks(&path) < before);
    for start in [0, 4096] {
        assert_eq!(machine.sectors(start, 512), [0xaa; 512]);
        assert_eq!(machine.sectors(start + 1, 512), [0; 512]);
        assert_eq!(machine.sectors(start + 2046, 512), [0; 512]);
        assert_eq!(machine.sectors(start + 2047, 512), [0xaa; 512]);
    }
}

#[test]
fn a_disk_that_is_not_sparse_keeps_its_space() {
    let dir = TempDir::new().unwrap();
    let path = full_image(&dir);
    let before = blocks(&path);
    let mut machine = Machine::new(&DiskConfig {
        sparse: false,
        ..config(&path)
    });
    assert_eq!(machine.block.features() & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_eq!(machine.config_field(36), [0; 12], "no limits of discards");
    assert_eq!(machine.config_field(56), [0], "write_zeroes_may_unmap");
    let segment = [(0, 4096, 0)];
    assert_eq!(
        machine.segments(VIRTIO_BLK_T_DISCARD, &segment),
        (UNSUPP, 1)
    );
    let segment = [(0, 4096, UNMAP)];
    assert_eq!(
        machine.segments(VIRTIO_BLK_T_WRITE_ZEROES, &segment),
        (OK, 1)
    );
    assert_eq!(machine.sectors(0, 512), [0; 512]);
    assert_eq!(blocks(&path), before);
}

#[test]
fn a_read_only_disk_offers_neither() {
    let dir = TempDir::new().unwrap();
    let path = full_image(&dir);
    let mut machine = Machine::new(&DiskConfig {
        readonly: true,
        ..config(&path)
    });
    let both = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    assert_eq!(machine.block.features() & both, 0);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(machine.segments(kind, &[(0, 8, 0)]), (UNSUPP, 1));
    }
    assert_eq!(machine.sectors(0, 512), [0xaa; 512]);
}

#[test]
fn no_segment_is_acted_on_if_one_is_bad() {
    let dir = TempDir::new().unwrap();
    let mut machine = Machine::new(&config(&full_image(&dir)));
    let good = (0, 8, 0);
    let beyond = SECTORS;
    let bad = [
        ((beyond, 1, 0), IOERR),
        ((beyond - 1, 2, 0), IOERR),
        ((u64::MAX, 1, 0), IOERR),
        ((u64::MAX, u32::MAX, 0), IOERR),
        ((1 << 55, 1, 0), IOERR),
        ((0, SEGMENT_SECTORS + 1, 0), IOERR),
        ((0, 8, 2), UNSUPP),
        ((0, 8, u32::MAX), UNSUPP),
    ];
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for (segment, status) in bad {
            let result = machine.segments(kind, &[good, segment]);
            assert_eq!(result, (status, 1), "{segment:?}");
        }
        assert_eq!(machine.segments(kind, &[]), (IOERR, 1));
        let many = [good; MAX_SEGMENTS as usize + 1];
        assert_eq!(machine.segments(kind, &many), (IOERR, 1));
        // Half a segment.
        machine.header(kind, 0);
        let half = [
            readable(HEADER, 16),
            readable(DATA, 24),
            writable(STATUS, 1),
        ];
        assert_eq!(machine.run(&half), (IOERR, 1));
    }
    // A discard has no flags at all.
    let unmap = [(0, 8, UNMAP)];
    assert_eq!(machine.segments(VIRTIO_BLK_T_DISCARD, &unmap), (UNSUPP, 1));
    assert_eq!(machine.sectors(0, 512), [0xaa; 512]);
    // A segment of no sectors at the very end is within the disk.
    let empty = [(beyond, 0, 0)];
    assert_eq!(machine.segments(VIRTIO_BLK_T_WRITE_ZEROES, &empty), (OK, 1));
}

#[test]
fn what_an_overlay_discards_does_not_show_what_lies_beneath() {
    let dir = TempDir::new().unwrap();
    let base = full_image(&dir);
    let name = base.file_name().unwrap().to_str().unwrap();
    let path = overlay(&dir, "top.qcow2", SECTORS * 512, Some((name, "raw")));
    let mut machine = Machine::new(&qcow2(&path));
    assert_eq!(machine.write(0, &[0xbb; 0x8000]), (OK, 1));
    let segment = [(0, 1024, 0)];
    assert_eq!(machine.segments(VIRTIO_BLK_T_DISCARD, &segment), (OK, 1));
    assert_eq!(machine.sectors(0, 512), [0; 512]);
    assert_eq!(machine.sectors(1023, 512), [0; 512]);
    assert_eq!(machine.sectors(1024, 512), [0xaa; 512]);
    drop(machine);
    let mut machine = Machine::new(&qcow2(&path));
    assert_eq!(machine.sectors(0, 1024), [0; 1024]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the segments: a request is answered, changes nothing outside of the segments, and
    /// nothing at all if it fails.
    #[test]
    fn any_segments_are_survived(
        zeros in any::<bool>(),
        bytes in proptest::collection::vec(any::<u8>(), 0..40),
        segments in proptest::collection::vec(
            (
                prop_oneof![4 => 0_u64..10, 1 => any::<u64>()],
                prop_oneof![4 => 0_u32..10, 1 => any::<u32>()],
                prop_oneof![6 => 0_u32..2, 1 => any::<u32>()],
            ),
            0..4,
        ),
        raw_bytes in any::<bool>(),
    ) {
        let dir = TempDir::new().unwrap();
        let path = raw_image(&dir, 8);
        let before = std::fs::read(&path).unwrap();
        let mut machine = Machine::new(&config(&path));
        let kind = if zeros { VIRTIO_BLK_T_WRITE_ZEROES } else { VIRTIO_BLK_T_DISCARD };
        let (status, _) = if raw_bytes {
            machine.header(kind, 0);
            machine.driver.write(DATA, &bytes);
            let data = readable(DATA, bytes.len() as u32);
            machine.run(&[readable(HEADER, 16), data, writable(STATUS, 1)])
        } else {
            machine.segments(kind, &segments)
        };
        let after = std::fs::read(&path).unwrap();
        prop_assert_eq!(after.len(), before.len());
        prop_assert!([OK, IOERR, UNSUPP].contains(&status));
        if status != OK {
            prop_assert!(after == before, "status {}", status);
        } else if !raw_bytes {
            for sector in 0..8 {
                let touched = segments
                    .iter()
                    .any(|(start, count, _)| (*start..start + u64::from(*count)).contains(&sector));
                let at = sector as usize * 512;
                let (old, new) = (&before[at..at + 512], &after[at..at + 512]);
                let zero = new.iter().all(|byte| *byte == 0);
                let right = if touched && zeros {
                    zero
                } else {
                    new == old || touched && zero
                };
                prop_assert!(right, "sector {}", sector);
            }
        }
    }
}
