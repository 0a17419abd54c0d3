//! What images may be used, and that a disk on any of them behaves as one.

use super::*;

fn refusal(config: &DiskConfig) -> ImageError {
    match build(config) {
        Ok(_) => panic!("the image was accepted"),
        Err(BlockError::Image(source)) => source,
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn an_overlay_keeps_its_writes_and_leaves_its_base_alone() {
    let dir = TempDir::new().unwrap();
    let base = raw_image(&dir, 200);
    let before = std::fs::read(&base).unwrap();
    // The backing file is named relative to the overlay. The disk is larger than its base.
    let size = 1 << 30;
    let path = overlay(&dir, "top.qcow2", size, Some(("base.raw", "raw")));
    let mut machine = Machine::new(&qcow2(&path));
    let mut capacity = [0; 8];
    machine.block.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), size / 512);

    assert_eq!(machine.sectors(100, 512), [100; 512]);
    assert_eq!(machine.write(100, &[0xaa; 512]), (OK, 1));
    assert_eq!(machine.write(size / 512 - 1, &[0xbb; 512]), (OK, 1));
    assert_eq!(machine.flush(), (OK, 1));
    drop(machine);

    let mut machine = Machine::new(&qcow2(&path));
    assert_eq!(machine.sectors(99, 512), [99; 512]);
    assert_eq!(machine.sectors(100, 512), [0xaa; 512]);
    assert_eq!(machine.sectors(101, 512), [101; 512]);
    assert_eq!(machine.sectors(300, 512), [0; 512]);
    assert_eq!(machine.sectors(size / 512 - 1, 512), [0xbb; 512]);
    assert_eq!(std::fs::read(&base).unwrap(), before);
    // Only what was written takes up space.
    assert!(std::fs::metadata(&path).unwrap().len() < 1 << 20);
}

#[test]
fn what_was_flushed_survives_the_death_of_the_process() {
    let dir = TempDir::new().unwrap();
    raw_image(&dir, 200);
    let path = overlay(&dir, "top.qcow2", 1 << 20, Some(("base.raw", "raw")));
    let mut machine = Machine::new(&qcow2(&path));
    assert_eq!(machine.write(100, &[0xaa; 512]), (OK, 1));
    assert_eq!(machine.flush(), (OK, 1));
    // A copy of the files as they are while the first machine still runs.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let mut survivor = Machine::new(&qcow2(&copy));
    assert_eq!(survivor.sectors(100, 512), [0xaa; 512]);
}

#[test]
fn the_death_of_the_process_does_not_break_the_image() {
    let dir = TempDir::new().unwrap();
    let size = 2 << 30;
    let path = overlay(&dir, "top.qcow2", size, None);
    let mut machine = Machine::new(&qcow2(&path));
    // Each needs a table of its own.
    let places = [0, 1, 2, 3].map(|table| table << 20);
    for sector in places {
        assert_eq!(machine.write(sector, &[0xaa; 512]), (OK, 1));
    }
    // The file as it is now, without a flush: what is left if the process is killed.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    let mut heir = Machine::new(&qcow2(&copy));
    // New clusters must not land on the tables.
    for index in 0..20 {
        assert_eq!(heir.write(1024 + index * 128, &[0xbb; 0x1_0000]), (OK, 1));
    }
    assert_eq!(heir.flush(), (OK, 1));
    for sector in places {
        assert_eq!(heir.sectors(sector, 512), [0xaa; 512]);
    }
}

#[test]
fn a_backing_file_is_opened_only_if_that_is_allowed() {
    let dir = TempDir::new().unwrap();
    raw_image(&dir, 8);
    let path = overlay(&dir, "top.qcow2", 4096, Some(("base.raw", "raw")));
    let denied = DiskConfig {
        backing_files: false,
        ..qcow2(&path)
    };
    assert!(matches!(refusal(&denied), ImageError::BackingDenied { .. }));
}

#[test]
fn the_format_of_an_image_is_never_guessed() {
    let dir = TempDir::new().unwrap();
    let base = overlay(&dir, "base.qcow2", 4096, None);
    // As a raw image it is just bytes.
    let mut machine = Machine::new(&config(&base));
    assert_eq!(&machine.sectors(0, 512)[..4], b"QFI\xfb");
    drop(machine);

    let other = overlay(&dir, "other", 4096, Some(("base.qcow2", "vmdk")));
    assert!(matches!(
        refusal(&qcow2(&other)),
        ImageError::BackingFormat { .. }
    ));

    let raw = raw_image(&dir, 8);
    assert!(matches!(
        refusal(&qcow2(&raw)),
        ImageError::Format {
            format: "qcow2",
            ..
        }
    ));
}

#[test]
fn an_image_that_takes_its_own_header_for_free_space_is_not_written_to() {
    let dir = TempDir::new().unwrap();
    let path = overlay(&dir, "damaged", 1 << 20, None);
    let sound = std::fs::read(&path).unwrap();
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap()) as usize;
    let table = word(48);
    // The offset of the table of blocks, the number of its clusters, the offset of the block that
    // counts the first cluster, and the count itself; and a table behind the end of the file.
    let zeroed = [48, 56, table, word(table)].map(|at| (at, 0));
    for (at, value) in zeroed.into_iter().chain([(48, 1_u64 << 40)]) {
        let mut bytes = sound.clone();
        let length = if at == 56 { 4 } else { 8 };
        bytes[at..at + length].copy_from_slice(&value.to_be_bytes()[..length]);
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(
            refusal(&qcow2(&path)),
            ImageError::RefCounts { .. }
        ));
        let readonly = DiskConfig {
            readonly: true,
            ..qcow2(&path)
        };
        Machine::new(&readonly);
    }
    std::fs::write(&path, &sound).unwrap();
    assert_eq!(Machine::new(&qcow2(&path)).write(0, &[1; 512]), (OK, 1));
}

#[test]
fn an_image_that_is_its_own_backing_file_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = overlay(&dir, "loop", 4096, Some(("loop", "qcow2")));
    let readonly = DiskConfig {
        readonly: true,
        ..qcow2(&path)
    };
    assert!(matches!(refusal(&readonly), ImageError::Layers { .. }));
    assert!(matches!(refusal(&qcow2(&path)), ImageError::Locked { .. }));
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let dir = TempDir::new().unwrap();
    let base = raw_image(&dir, 8);
    let one = overlay(&dir, "one", 4096, Some(("base.raw", "raw")));
    let two = overlay(&dir, "two", 4096, Some(("base.raw", "raw")));
    let first = Machine::new(&qcow2(&one));
    let second = Machine::new(&qcow2(&two));
    for written_or_built_on in [&qcow2(&one), &config(&base)] {
        assert!(matches!(
            refusal(written_or_built_on),
            ImageError::Locked { .. }
        ));
    }
    drop((first, second));
    Machine::new(&config(&base));
}

#[test]
fn directories_pipes_and_missing_files_are_refused() {
    let dir = TempDir::new().unwrap();
    let readonly = |path: &Path| DiskConfig {
        readonly: true,
        ..config(path)
    };
    assert!(matches!(
        refusal(&readonly(dir.path())),
        ImageError::Kind { .. }
    ));
    assert!(matches!(
        refusal(&readonly(Path::new("/dev/null"))),
        ImageError::Kind { .. }
    ));
    let missing = refusal(&config(&dir.path().join("missing")));
    assert!(matches!(missing, ImageError::Open { .. }));
    assert!(missing.to_string().contains("missing"));
}

/// What a guest may do to its disk.
#[derive(Debug, Clone)]
enum Step {
    Write {
        sector: u64,
        count: u32,
        fill: u8,
    },
    Read {
        sector: u64,
        count: u32,
    },
    Zero {
        sector: u64,
        count: u32,
        unmap: bool,
    },
    Discard {
        sector: u64,
        count: u32,
    },
    Flush,
    Reopen,
}

const MODEL_SECTORS: u64 = 1024;

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        (0..MODEL_SECTORS, 1_u32..200)
            .prop_map(|(sector, count)| (sector, count.min((MODEL_SECTORS - sector) as u32)))
    };
    prop_oneof![
        4 => (range(), 200_u8..).prop_map(|((sector, count), fill)| Step::Write {
            sector,
            count,
            fill,
        }),
        4 => range().prop_map(|(sector, count)| Step::Read { sector, count }),
        2 => (range(), any::<bool>()).prop_map(|((sector, count), unmap)| Step::Zero {
            sector,
            count,
            unmap,
        }),
        2 => range().prop_map(|(sector, count)| Step::Discard { sector, count }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// A disk of two overlays on a smaller base, or a raw one, reads as what was last written.
    #[test]
    fn images_behave_as_a_disk(
        raw in any::<bool>(),
        sparse in any::<bool>(),
        steps in proptest::collection::vec(step(), 1..30),
    ) {
        let dir = TempDir::new().unwrap();
        let size = MODEL_SECTORS * 512;
        let mut model = std::fs::read(raw_image(&dir, 200)).unwrap();
        model.resize(size as usize, 0);

        let middle = overlay(&dir, "middle", size, Some(("base.raw", "raw")));
        let mut machine = Machine::new(&qcow2(&middle));
        prop_assert_eq!(machine.write(190, &[0xcc; 1024]), (OK, 1));
        model[190 * 512..192 * 512].fill(0xcc);
        drop(machine);

        let top = if raw {
            std::fs::write(dir.path().join("raw"), &model).unwrap();
            config(&dir.path().join("raw"))
        } else {
            qcow2(&overlay(&dir, "top", size, Some(("middle", "qcow2"))))
        };
        let top = DiskConfig { sparse, ..top };
        let mut machine = Machine::new(&top);
        let bytes = |sector: u64, count: u32| {
            sector as usize * 512..(sector as usize + count as usize) * 512
        };
        for step in steps {
            match step {
                Step::Write { sector, count, fill } => {
                    let data = vec![fill; count as usize * 512];
                    prop_assert_eq!(machine.write(sector, &data), (OK, 1));
                    model[bytes(sector, count)].fill(fill);
                }
                Step::Read { sector, count } => {
                    let read = machine.sectors(sector, count * 512);
                    prop_assert!(read == model[bytes(sector, count)]);
                }
                Step::Zero { sector, count, unmap } => {
                    let segment = (sector, count, u32::from(unmap));
                    let result = machine.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[segment]);
                    prop_assert_eq!(result, (OK, 1));
                    model[bytes(sector, count)].fill(0);
                }
                Step::Discard { sector, count } => {
                    let result = machine.segments(VIRTIO_BLK_T_DISCARD, &[(sector, count, 0)]);
                    prop_assert_eq!(result, (if sparse { OK } else { UNSUPP }, 1));
                    // What was discarded is as it was or zero, and stays so.
                    let read = machine.sectors(sector, count * 512);
                    let model = &mut model[bytes(sector, count)];
                    for (old, new) in model.chunks_mut(512).zip(read.chunks(512)) {
                        prop_assert!(new == &old[..] || new == [0; 512]);
                        old.copy_from_slice(new);
                    }
                }
                Step::Flush => prop_assert_eq!(machine.flush(), (OK, 1)),
                Step::Reopen => {
                    drop(machine);
                    machine = Machine::new(&top);
                }
            }
        }
        for sector in (0..MODEL_SECTORS).step_by(128) {
            let read = machine.sectors(sector, 128 * 512);
            prop_assert!(read == model[bytes(sector, 128)], "sector {}", sector);
        }
    }
}
