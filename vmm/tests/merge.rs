//! `vmm merge-disk` as the daemon starts it: jailed, with open files and nothing else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, StorageOpenOptions};

const SIZE: u64 = 3 << 20;
const CLUSTER: usize = 65_536;

fn open(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

fn image_file(path: &Path) -> ImageFile {
    let options = StorageOpenOptions::new().write(true);
    ImageFile::from_open_file(open(path), options).unwrap()
}

fn access(path: &Path) -> FormatAccess<ImageFile> {
    let image: Qcow2<ImageFile> = Qcow2::open_image_sync(image_file(path), true).unwrap();
    FormatAccess::new(image)
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(work)
}

/// A layer with a cluster of `byte` at each of these places.
fn layer(path: &Path, byte: u8, places: &[u64]) {
    let builder = Qcow2::<ImageFile>::create_builder(image_file(path)).size(SIZE);
    block_on(builder.create()).unwrap();
    let disk = access(path);
    for &place in places {
        block_on(disk.write(&vec![byte; CLUSTER][..], place)).unwrap();
    }
    block_on(disk.flush()).unwrap();
}

fn merge(layers: &[&Path], output: &Path) -> Output {
    let output = open(output);
    let layers: Vec<_> = layers
        .iter()
        .map(|path| File::open(path).unwrap())
        .collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
    command
        .arg("merge-disk")
        .args(["--size", &SIZE.to_string()])
        .args(["--output", &output.as_raw_fd().to_string()]);
    let mut files = vec![output.as_raw_fd()];
    for layer in &layers {
        command.args(["--layer", &layer.as_raw_fd().to_string()]);
        files.push(layer.as_raw_fd());
    }
    command.args(["--jail", ""]);
    // SAFETY: fcntl(2) may be called between fork and exec, and the files are open until after it.
    unsafe {
        command.pre_exec(move || {
            for &file in &files {
                let file = BorrowedFd::borrow_raw(file);
                rustix::io::fcntl_setfd(file, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    command.output().unwrap()
}

#[test]
fn layers_are_merged_in_the_jail() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    layer(&path("1"), 1, &[0, 1 << 20]);
    layer(&path("2"), 2, &[1 << 20, 2 << 20]);
    let merged = merge(&[&path("2"), &path("1")], &path("merged"));
    let words = String::from_utf8_lossy(&merged.stderr);
    assert!(merged.status.success(), "{}: {words}", merged.status);
    let disk = access(&path("merged"));
    for (place, byte) in [(0, 1), (1 << 20, 2), (2 << 20, 2), (1 << 19, 0)] {
        let mut read = vec![0xff; CLUSTER];
        block_on(disk.read(&mut read[..], place)).unwrap();
        assert!(read == vec![byte; CLUSTER], "{place}");
    }
    assert!(fs::metadata(path("merged")).unwrap().len() < 16 * CLUSTER as u64);
}

#[test]
fn a_damaged_layer_is_a_sentence_and_a_status() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    layer(&path("1"), 1, &[0]);
    fs::write(path("2"), vec![7; 1 << 20]).unwrap();
    let merged = merge(&[&path("2"), &path("1")], &path("merged"));
    let words = String::from_utf8_lossy(&merged.stderr);
    assert_eq!(merged.status.code(), Some(1), "{words}");
    assert!(words.contains("layer 0 from the top"), "{words}");
    let again = merge(&[&path("1"), &path("1")], &path("1"));
    assert!(!again.status.success(), "over a layer");
}
