//! Machines that are saved and go on, driven as a user of the VMM alone does it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use agent_protocol::ShutdownAction;
use e2e_tests::images::write_second_qcow2_overlay;
use e2e_tests::setup::{scratch, setup};
use e2e_tests::vmm::{ApiSocket, Machine, Vmm};
use serde_json::{Value, json};

/// A directory for a snapshot.
fn directory(parent: &Path, name: &str) -> PathBuf {
    let path = parent.join(name);
    std::fs::create_dir(&path).unwrap();
    path
}

fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

/// Saves a machine that runs, and leaves it paused.
fn save(vmm: &Vmm, to: &Path, keep: usize) {
    let api = vmm.api();
    api.put("vm.pause", None);
    let body = json!({"destination_url": url(to), "keep_base_layers": keep});
    api.put("vm.snapshot", Some(&body));
}

/// The root disk of a machine from [`Machine::new`].
fn root_of(vmm: &Vmm) -> String {
    let path = vmm.directory().join("root.qcow2");
    format!("path={},image_type=qcow2,backing_files=on", path.display())
}

/// Ends a VMM and keeps its files.
fn stop(vmm: &mut Vmm) {
    vmm.api().put("vmm.shutdown", None);
    assert_eq!(vmm.process.exit_code(), 0);
}

/// The disk space of a file, in bytes.
fn stored(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_guest_goes_on_where_it_was_and_again() {
    let snapshots = scratch();
    let mut first = Machine::new()
        .cpus("boot=2")
        .api(ApiSocket::Inherited)
        .boot();
    let agent = first.agent();
    agent.must("echo before > /root/file; sync; mkdir -p /run/count");
    // A process with state in memory only, that counts as long as it runs.
    agent.must(
        "setsid sh -c 'n=0; while :; do n=$((n+1)); echo $n > /run/count/new; \
         mv /run/count/new /run/count/now; sleep 0.05; done' >/dev/null 2>&1 </dev/null &",
    );
    let boot_id = agent.must("cat /proc/sys/kernel/random/boot_id");
    let held = agent.connect_to(agent_protocol::AGENT_PORT).unwrap();
    let base = directory(snapshots.path(), "base");
    save(&first, &base, 0);
    let disk = root_of(&first);
    stop(&mut first);
    drop(held);

    // Their directories hold the disk.
    let mut ended = vec![first];
    let mut bases: Vec<PathBuf> = Vec::new();
    let mut source = base;
    let mut last_count = 0;
    for generation in 1..=3 {
        let list: Vec<String> = bases.iter().map(|base| url(base)).collect();
        let options = match list.is_empty() {
            true => format!("source_url={}", url(&source)),
            false => format!("source_url={},base_url=[{}]", url(&source), list.join(",")),
        };
        let machine = Machine::without_disk()
            .cpus("boot=2")
            .disk(disk.clone())
            .restore(&options)
            .api(ApiSocket::Inherited);
        let mut vmm = machine.start().resumed();
        let agent = vmm.agent();
        assert_eq!(
            agent.must("cat /root/file"),
            "before",
            "generation {generation}"
        );
        assert_eq!(agent.must("nproc"), "2");
        let count = || agent.must("cat /run/count/now").parse::<u64>().unwrap();
        let now = count();
        assert!(now >= last_count, "{now} after {last_count}");
        let later = agent.must("c=$(cat /run/count/now); while [ $(cat /run/count/now) = $c ]; do sleep 0.05; done; cat /run/count/now");
        last_count = later.parse().unwrap();
        assert!(last_count > now, "the process has stopped at {now}");
        assert_eq!(agent.must("cat /proc/sys/kernel/random/boot_id"), boot_id);
        // What is written here is found in the next generation.
        agent.must(&format!(
            "echo {generation} > /root/generation; echo $((1+1)) > /run/memory"
        ));
        let next = directory(snapshots.path(), &format!("generation{generation}"));
        save(&vmm, &next, bases.len() + 1);
        let small = stored(&next.join("memory-ranges"));
        let large = stored(&source.join("memory-ranges"));
        assert!(
            generation > 1 || small < large / 2,
            "{small} of {large} bytes"
        );
        bases.insert(0, source);
        source = next;
        stop(&mut vmm);
        ended.push(vmm);
    }
}

#[test]
fn two_clones_are_two_machines() {
    let snapshots = scratch();
    let mut first = Machine::new().api(ApiSocket::Inherited).boot();
    // A generator in user space that was seeded before.
    first
        .agent()
        .must("sync; head -c 16 /dev/urandom > /run/seed");
    let snapshot = directory(snapshots.path(), "s");
    save(&first, &snapshot, 0);
    let clones: Vec<Vmm> = (0..2)
        .map(|index| {
            let disk = snapshots.path().join(format!("{index}.qcow2"));
            std::fs::copy(first.directory().join("root.qcow2"), &disk).unwrap();
            Machine::without_disk()
                .disk(format!(
                    "path={},image_type=qcow2,backing_files=on",
                    disk.display()
                ))
                .restore(&format!("source_url={}", url(&snapshot)))
                .api(ApiSocket::Inherited)
                .start()
                .resumed()
        })
        .collect();
    let uuids: Vec<String> = clones
        .iter()
        .map(|clone| clone.agent().must("cat /proc/sys/kernel/random/uuid"))
        .collect();
    assert_ne!(uuids[0], uuids[1]);
    let ids: Vec<u128> = clones.iter().map(Vmm::generation_id).collect();
    assert_ne!(ids[0], ids[1]);
    for (index, clone) in clones.iter().enumerate() {
        clone
            .agent()
            .must(&format!("echo {index} > /root/mine; sync"));
    }
    for (index, clone) in clones.iter().enumerate() {
        assert_eq!(clone.agent().must("cat /root/mine"), index.to_string());
        assert!(
            clone
                .agent()
                .must("dmesg")
                .contains("crng reseeded due to virtual machine fork")
        );
    }
    // The one that they come from goes on as if nothing had happened.
    first.api().put("vm.resume", None);
    assert_eq!(
        first.agent().must("ls /root/mine 2>/dev/null || echo none"),
        "none"
    );
    first.agent().shut_down(ShutdownAction::Poweroff);
    first.expect_end(0, "shutdown");
}

#[test]
fn a_jailed_machine_is_saved_to_descriptors_and_goes_on_with_another_disk() {
    let snapshots = scratch();
    let mut first = Machine::new().jailed().api(ApiSocket::Inherited).boot();
    first
        .agent()
        .must("echo one > /root/file; sync; echo two > /run/file");
    // A connection that is open while the machine is saved, and stays.
    let mut held = first
        .agent()
        .connect_to(agent_protocol::AGENT_PORT)
        .unwrap();
    let api = first.api();
    api.put("vm.pause", None);
    let base = directory(snapshots.path(), "base");
    save_to_descriptors(&first, &base, 0, true);

    // The disk becomes a layer, and the machine goes on with a new one on top of it.
    let frozen = first.directory().join("root.qcow2");
    let top = snapshots.path().join("top.qcow2");
    write_second_qcow2_overlay(&top, &frozen);
    let template = setup().template();
    let open = |path: &Path, write| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .unwrap()
    };
    let images = [
        open(&top, true),
        open(&frozen, false),
        open(&template, false),
    ];
    let body = json!({"id": "_disk0", "image_types": ["Qcow2", "Qcow2", "Raw"]});
    let (status, answer) = call_with(&first, "vm.replace-disk", &body, &images);
    assert_eq!(status, 204, "{answer}");
    // The VMM's locks are those of these descriptors, too.
    drop(images);
    api.put("vm.resume", None);
    first.agent().must("echo three > /root/file; sync");
    held.write_all(b"GET /v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    held.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    // What has changed since is small, and its base is the other.
    api.put("vm.pause", None);
    let next = directory(snapshots.path(), "next");
    save_to_descriptors(&first, &next, 1, true);
    let (small, large) = (
        stored(&next.join("memory-ranges")),
        stored(&base.join("memory-ranges")),
    );
    assert!(small < large / 2, "{small} of {large} bytes");
    api.put("vmm.shutdown", None);
    assert_eq!(first.process.exit_code(), 0);

    let chain = |top: &Path, beneath: &[(&str, &Path)]| {
        let beneath: Vec<String> = beneath
            .iter()
            .map(|(kind, path)| format!("{kind}:{}", path.display()))
            .collect();
        format!(
            "path={},image_type=qcow2,backing=[{}]",
            top.display(),
            beneath.join(",")
        )
    };
    let from_next = Machine::without_disk()
        .disk(chain(&top, &[("qcow2", &frozen), ("raw", &template)]))
        .restore(&format!(
            "source_url={},base_url={}",
            url(&next),
            url(&base)
        ))
        .jailed()
        .start()
        .resumed();
    assert_eq!(
        from_next.agent().must("cat /root/file /run/file"),
        "three\ntwo"
    );
    let from_base = Machine::without_disk()
        .disk(chain(
            &copy(&frozen, snapshots.path()),
            &[("raw", &template)],
        ))
        .restore(&format!("source_url={},verify=on,prefault=on", url(&base)))
        .jailed()
        .start()
        .resumed();
    assert_eq!(
        from_base.agent().must("cat /root/file /run/file"),
        "one\ntwo"
    );
}

fn copy(path: &Path, to: &Path) -> PathBuf {
    let copy = to.join("copy.qcow2");
    std::fs::copy(path, &copy).unwrap();
    copy
}

/// Sends a request along with files.
fn call_with(vmm: &Vmm, name: &str, body: &Value, files: &[File]) -> (u16, Value) {
    let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    vmm.api().put_passing(name, body, &descriptors)
}

fn save_to_descriptors(vmm: &Vmm, directory: &Path, keep: usize, again: bool) {
    let new = |name: &str| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        options.open(directory.join(name)).unwrap()
    };
    let mut files = vec![
        new("manifest.json"),
        new("state.json"),
        new("memory-ranges"),
    ];
    if again {
        files.push(File::open(directory.join("memory-ranges")).unwrap());
    }
    let body = json!({"keep_base_layers": keep});
    let (status, answer) = call_with(vmm, "vm.snapshot", &body, &files);
    assert_eq!(status, 204, "{answer}");
}

/// Whether this host's KVM maps memory before the guest comes to it, as the VMM's doctor tells.
fn kvm_prefaults() -> bool {
    let doctor = Command::new(&setup().vmm)
        .args(["doctor", "--json"])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let mut findings = report["findings"].as_array().unwrap().iter();
    let finding = findings.find(|finding| finding["check"] == "prefault");
    let detail = finding.unwrap()["detail"].as_str().unwrap();
    detail.starts_with("KVM can ")
}

#[test]
fn what_one_guest_touches_first_the_next_one_has_before_it_runs() {
    let snapshots = scratch();
    let mut first = Machine::new()
        .cpus("boot=2")
        .api(ApiSocket::Inherited)
        .boot();
    first.agent().must("echo kept > /run/file; sync");
    let snapshot = directory(snapshots.path(), "s");
    save(&first, &snapshot, 0);
    let disk = root_of(&first);
    stop(&mut first);
    let from = |options: &str| {
        Machine::without_disk()
            .cpus("boot=2")
            .disk(disk.clone())
            .restore(&format!("source_url={}{options}", url(&snapshot)))
            .arguments(&["-v"])
            .api(ApiSocket::Inherited)
    };
    let mut one = from("").start().resumed();
    one.agent().must("cat /run/file");
    let body = json!({"destination_url": url(&snapshot)});
    one.api().put("vm.working-set", Some(&body));
    stop(&mut one);

    let mut next = from(",prefault=working-set").jailed().start().resumed();
    assert_eq!(next.agent().must("cat /run/file; nproc"), "kept\n2");
    stop(&mut next);
    let said = next.process.stderr.whole_text();
    assert!(said.contains("prefetched the working set"), "{said}");
    let is_in_kvm = said.contains("the working set is in KVM's page table");
    assert_eq!(is_in_kvm, kvm_prefaults(), "{said}");
}

#[test]
fn snapshots_that_cannot_be_restored_are_refused_with_a_sentence() {
    let snapshots = scratch();
    let mut first = Machine::new().api(ApiSocket::Inherited).boot();
    first.agent().must("sync");
    let snapshot = directory(snapshots.path(), "s");
    save(&first, &snapshot, 0);
    let disk = root_of(&first);
    stop(&mut first);
    let expect = |what: &str, machine: Machine, sentence: &str| {
        let mut vmm = machine.start();
        assert_eq!(vmm.process.exit_code(), 2, "{what}");
        let said = vmm.process.stderr.whole_text();
        assert!(said.contains(sentence), "{what}: {said}");
    };
    let from = |directory: &Path| {
        Machine::without_disk()
            .disk(disk.clone())
            .restore(&format!("source_url={},verify=on", url(directory)))
    };
    let damaged = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let directory = directory(snapshots.path(), &format!("{name}-{}", rand_name()));
        for file in ["manifest.json", "state.json", "memory-ranges"] {
            let mut bytes = std::fs::read(snapshot.join(file)).unwrap();
            if file == name {
                change(&mut bytes);
            }
            std::fs::write(directory.join(file), bytes).unwrap();
        }
        directory
    };
    expect("no snapshot", from(snapshots.path()), "cannot open");
    let flip = |bytes: &mut Vec<u8>| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
    };
    expect(
        "manifest",
        from(&damaged("manifest.json", &flip)),
        "damaged",
    );
    expect(
        "state",
        from(&damaged("state.json", &flip)),
        "state.json has been damaged",
    );
    let cut = |bytes: &mut Vec<u8>| bytes.truncate(bytes.len() / 2);
    expect(
        "short state",
        from(&damaged("state.json", &cut)),
        "state.json has been damaged",
    );
    expect(
        "short memory",
        from(&damaged("memory-ranges", &cut)),
        "the memory file holds pages up to",
    );
    // A page that the guest has; most of its kernel is in the first tens of MiB.
    let kernel = |bytes: &mut Vec<u8>| bytes[17 << 20] ^= 1;
    expect(
        "memory",
        from(&damaged("memory-ranges", &kernel)),
        "the memory file has been damaged",
    );
    let newer = |bytes: &mut Vec<u8>| {
        let text = String::from_utf8(bytes.clone()).unwrap();
        *bytes = text.replace("\"format\":1", "\"format\":9").into_bytes();
    };
    expect(
        "newer",
        from(&damaged("manifest.json", &newer)),
        "has format 9",
    );
    expect(
        "memory size",
        from(&snapshot).memory("size=128M"),
        "give it as much as it had",
    );
    expect(
        "vcpus",
        from(&snapshot).cpus("boot=2"),
        "has 1 vCPUs, and the machine 2",
    );
    let more = from(&snapshot).arguments(&["--balloon", "size=1M"]);
    expect("devices", more, "has 3 devices, and the machine 4");
    let base = format!("source_url={0},base_url={0}", url(&snapshot));
    let foreign = Machine::without_disk().disk(disk.clone()).restore(&base);
    expect("base", foreign, "is based on no other");
}

/// A name that no other directory of this test has.
fn rand_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/uuid")
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn a_full_disk_ends_no_guest_and_leaves_nothing() {
    let snapshots = scratch();
    let small = directory(snapshots.path(), "small");
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &small, "tmpfs", flags, c"size=4m").unwrap();
    let vmm = Machine::new().api(ApiSocket::Inherited).boot();
    let api = vmm.api();
    api.put("vm.pause", None);
    let body = json!({"destination_url": url(&small)});
    let (status, answer) = api.call("PUT", "vm.snapshot", Some(&body));
    assert_eq!(status, 500, "{answer}");
    assert!(
        answer.to_string().contains("No space left on device"),
        "{answer}"
    );
    assert_eq!(
        std::fs::read_dir(&small).unwrap().count(),
        0,
        "part of a snapshot is left"
    );
    api.put("vm.resume", None);
    assert_eq!(vmm.agent().must("echo alive"), "alive");
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
}
