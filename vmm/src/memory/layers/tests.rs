use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::memory;

const PAGES: u64 = 160;

/// Memory of two regions, as a small guest with a gap has it.
fn guest() -> GuestMemory {
    let ram = memory::allocate(100 * PAGE_SIZE, false).unwrap();
    let (all, _) = memory::with_pluggable_region(&ram, 60 * PAGE_SIZE, false).unwrap();
    assert_eq!(size_of(&all), PAGES * PAGE_SIZE);
    all
}

fn address(memory: &GuestMemory, page: u64) -> GuestAddress {
    let piece = pieces(memory, page * PAGE_SIZE..(page + 1) * PAGE_SIZE).next();
    piece.unwrap().guest
}

fn write(memory: &GuestMemory, page: u64, value: u8) {
    let bytes = [value; PAGE_SIZE as usize];
    memory.write_slice(&bytes, address(memory, page)).unwrap();
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    let read = |page| {
        let mut bytes = [0; PAGE_SIZE as usize];
        memory
            .read_slice(&mut bytes, address(memory, page))
            .unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page}");
        bytes[0]
    };
    (0..PAGES).map(read).collect()
}

struct Machine {
    memory: GuestMemory,
    layers: Layers,
    /// The files of the layers, as they are on disk.
    files: Vec<(File, Written)>,
}

impl Machine {
    fn new() -> Self {
        Self {
            memory: guest(),
            layers: Layers::default(),
            files: Vec::new(),
        }
    }

    /// Saves the machine, with the lowest `keep` layers as the base.
    fn save(&mut self, keep: usize) -> u64 {
        let file = tempfile::tempfile().unwrap();
        let pagemap = Pagemap::open().unwrap();
        let keep = keep.min(self.files.len());
        let written = self
            .layers
            .save(&self.memory, &pagemap, keep, &file)
            .unwrap();
        let bytes = written.pages.bytes();
        let mapped = file.try_clone().unwrap();
        self.layers
            .rebase(&self.memory, keep, mapped, &written)
            .unwrap();
        self.files.truncate(keep);
        self.files.push((file, written));
        assert_eq!(self.layers.len(), self.files.len());
        bytes
    }

    /// Another machine from what is on disk.
    fn restored(&self, prefault: bool) -> Self {
        let memory = guest();
        let again = |(file, written): &(File, Written)| {
            let file = file.try_clone().unwrap();
            let layer = Layer::new(file, written.pages.clone(), size_of(&memory)).unwrap();
            layer.verify(&written.hash).unwrap();
            layer
        };
        let layers = self.files.iter().map(again).collect();
        let layers = Layers::map(&memory, layers, prefault).unwrap();
        let copy = |(file, written): &(File, Written)| {
            let written = Written {
                pages: written.pages.clone(),
                zero: written.zero.clone(),
                ..*written
            };
            (file.try_clone().unwrap(), written)
        };
        Self {
            memory,
            layers,
            files: self.files.iter().map(copy).collect(),
        }
    }
}

#[test]
fn a_layer_holds_what_has_changed_and_no_zeros() {
    let mut machine = Machine::new();
    for page in [0, 1, 50, 99, 100, 159] {
        write(&machine.memory, page, 7);
    }
    // Pages 0 and 1, and those on both sides of the gap between the regions; page 2 was read only.
    machine
        .memory
        .read_obj::<u64>(address(&machine.memory, 2))
        .unwrap();
    assert_eq!(machine.save(0), 6 * PAGE_SIZE);
    write(&machine.memory, 30, 0);
    write(&machine.memory, 1, 0);
    assert_eq!(machine.save(1), PAGE_SIZE);
    assert_eq!(machine.save(2), 0);
    let restored = machine.restored(true);
    assert_eq!(content(&restored.memory), content(&machine.memory));
    assert_eq!(content(&restored.memory)[1], 0);
}

#[test]
fn machines_from_the_same_layers_do_not_see_each_other() {
    let mut machine = Machine::new();
    write(&machine.memory, 3, 1);
    machine.save(0);
    let (one, other) = (machine.restored(false), machine.restored(true));
    write(&machine.memory, 3, 2);
    write(&one.memory, 3, 3);
    assert_eq!(content(&other.memory)[3], 1);
    assert_eq!(content(&machine.restored(false).memory)[3], 1);
}

#[test]
fn damaged_short_and_foreign_files_are_refused() {
    let mut machine = Machine::new();
    write(&machine.memory, 0, 1);
    write(&machine.memory, 9, 1);
    machine.save(0);
    let (file, written) = &machine.files[0];
    let layer = |memory| Layer::new(file.try_clone().unwrap(), written.pages.clone(), memory);
    assert!(matches!(layer(9 * PAGE_SIZE), Err(MapError::Size { .. })));
    let layer = layer(PAGES * PAGE_SIZE).unwrap();
    layer.verify(&written.hash).unwrap();
    file.write_all_at(&[9], 9 * PAGE_SIZE + 5).unwrap();
    assert!(matches!(
        layer.verify(&written.hash),
        Err(MapError::Damaged)
    ));
    file.set_len(9 * PAGE_SIZE).unwrap();
    let short = Layer::new(file.try_clone().unwrap(), written.pages.clone(), u64::MAX);
    assert!(matches!(short, Err(MapError::Size { .. })));
}

#[test]
fn a_full_disk_leaves_the_memory_as_it_is() {
    let machine = Machine::new();
    write(&machine.memory, 4, 4);
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let pagemap = Pagemap::open().unwrap();
    let error = machine
        .layers
        .save(&machine.memory, &pagemap, 0, &full)
        .unwrap_err();
    assert!(matches!(error, SaveError::Write(_)));
    assert_eq!(content(&machine.memory)[4], 4);
}

#[test]
fn many_runs_are_joined() {
    let every_other = (0..2 * MAX_RUNS as u64 + 10)
        .map(|index| 40 * index * PAGE_SIZE..(40 * index + 1) * PAGE_SIZE);
    let pages = Extents::of(every_other.collect());
    let joined = join_runs(&pages, &Extents::default());
    assert_eq!(joined.iter().len(), MAX_RUNS);
    assert_eq!(pages.without(&joined), Extents::default());
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u8),
    Save(usize),
    Restore(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..PAGES, 0_u8..4).prop_map(|(page, value)| Step::Write(page, value)),
        2 => (0_usize..4).prop_map(Step::Save),
        1 => any::<bool>().prop_map(Step::Restore),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_was_saved_last_is_what_is_restored(steps in steps()) {
        let mut machine = Machine::new();
        let mut model = vec![0; PAGES as usize];
        let mut saved = model.clone();
        for step in steps {
            match step {
                Step::Write(page, value) => {
                    write(&machine.memory, page, value);
                    model[page as usize] = value;
                }
                Step::Save(keep) => {
                    machine.save(keep);
                    saved.clone_from(&model);
                }
                Step::Restore(_) if machine.files.is_empty() => {}
                Step::Restore(prefault) => {
                    machine = machine.restored(prefault);
                    model.clone_from(&saved);
                }
            }
            prop_assert_eq!(&content(&machine.memory), &model);
        }
    }
}
