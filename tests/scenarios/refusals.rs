//! What cannot be run is refused with the right status and a sentence that helps, and nothing is
//! left behind.

use std::path::Path;

use e2e_tests::images::write_qcow2_overlay;
use e2e_tests::pattern::Pattern;
use e2e_tests::setup::setup;
use e2e_tests::vmm::Machine;

/// The VMM refuses the machine with this status and a sentence that has these words in it.
fn assert_refused(machine: Machine, status: i32, words: &[&str]) {
    let mut vmm = machine.start();
    assert_eq!(vmm.process.exit_code(), status);
    let said = vmm.process.stderr.whole_text();
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
    assert!(!said.contains("panicked"), "{said}");
    let socket = vmm.directory().join("vsock.sock");
    assert!(!socket.exists(), "the socket is left behind: {said}");
}

#[test]
fn machines_that_cannot_be() {
    let machine = Machine::without_disk;
    let disk = format!("path={},readonly=on", setup().template().display());
    let many_disks = (0..18).fold(machine(), |machine, _| machine.disk(disk.clone()));
    for (machine, words) in [
        (machine().cpus("boot=0"), ["0 vCPUs", "1 to 32"]),
        (machine().cpus("boot=33"), ["33 vCPUs", "1 to 32"]),
        (machine().memory("size=1M"), ["1048576 bytes", "64 MiB"]),
        (
            machine().memory("size=1000001K"),
            ["memory", "steps of 1 MiB"],
        ),
        (
            machine().memory("size=1048577M"),
            ["1099512676352 bytes", "1024 GiB"],
        ),
        (machine().memory("size=lots"), ["lots", "512M"]),
        (
            machine().kernel("/no/such/kernel"),
            ["/no/such/kernel", "No such file"],
        ),
        (machine().kernel("/"), ["kernel", "directory"]),
        (many_disks, ["virtio devices", "at most 18"]),
        (
            machine().initramfs(Some("/no/such/initramfs".into())),
            ["/no/such/initramfs", "No such file"],
        ),
        (
            machine().disk("path=/no/such/disk".into()),
            ["/no/such/disk", "No such file"],
        ),
        (
            machine().disk("path=/dev/null,readonly=perhaps".into()),
            ["perhaps", "on or off"],
        ),
        (
            machine().arguments(&["--net", "tap=t,mac=ff:ff:ff:ff:ff:ff"]),
            ["mac", "group address"],
        ),
        (machine().arguments(&["--fast"]), ["--fast", "--help"]),
    ] {
        assert_refused(machine, 2, &words);
    }
}

#[test]
fn files_that_are_not_what_they_should_be() {
    let content = |machine: Machine, what: &dyn Fn(&Path)| {
        let path = machine.directory().join("file");
        what(&path);
        (machine, path)
    };

    let write = |bytes: Vec<u8>| move |path: &Path| std::fs::write(path, &bytes).unwrap();
    let vmlinux = std::fs::read(setup().kernel()).unwrap();
    for (bytes, word) in [
        (Vec::new(), "kernel"),
        (b"#!/bin/sh\n".to_vec(), "kernel"),
        (Pattern::bytes(1, 1 << 20), "kernel"),
        (vmlinux[..vmlinux.len() / 2].to_vec(), "kernel"),
        (vmlinux[..100].to_vec(), "kernel"),
    ] {
        let (machine, path) = content(Machine::without_disk(), &write(bytes));
        let path_word = path.to_str().unwrap().to_owned();
        assert_refused(machine.kernel(path), 1, &[word, &path_word]);
    }

    let (machine, path) = content(Machine::without_disk().memory("size=64M"), &|path| {
        let file = std::fs::File::create(path).unwrap();
        file.set_len(65 << 20).unwrap();
    });
    assert_refused(
        machine.initramfs(Some(path)),
        1,
        &["give the machine more memory"],
    );

    let (machine, path) = content(Machine::without_disk(), &write(Pattern::bytes(2, 1 << 20)));
    let disk = format!("path={},image_type=qcow2", path.display());
    assert_refused(machine.disk(disk), 1, &["disk", path.to_str().unwrap()]);

    // The name of a backing file is a path on the host, and comes from the image.
    let (machine, path) = content(Machine::without_disk(), &|path| {
        write_qcow2_overlay(path, &setup().template());
    });
    let disk = format!("path={},image_type=qcow2", path.display());
    assert_refused(machine.disk(disk), 1, &["backing", path.to_str().unwrap()]);
}

#[test]
fn things_of_the_host_that_are_not_there() {
    let machine = Machine::without_disk;
    assert_refused(
        machine().arguments(&["--net", "tap=nosuchtap"]),
        1,
        &["nosuchtap"],
    );
    assert_refused(
        machine().arguments(&["--rng", "src=/no/such/source"]),
        1,
        &["entropy", "/no/such/source"],
    );
}
