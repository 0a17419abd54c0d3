//! Disks beyond reading and writing: several queues, space given back, new sizes, limits, and a
//! host that has run full. In the jail, whose filters of system calls have to know all of it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::ShutdownAction;
use e2e_tests::setup::scratch;
use e2e_tests::vmm::{ApiSocket, Machine};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::json;

const MIB: u64 = 1 << 20;

/// A raw image of that size without content.
fn sparse_image(path: &Path, size: u64) {
    File::create_new(path).unwrap().set_len(size).unwrap();
}

/// The space that a file takes up, in bytes.
fn stored(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_disk_with_two_queues_gives_space_back_and_changes_its_size() {
    let machine = Machine::new();
    let image = machine.directory().join("data");
    sparse_image(&image, 16 * MIB);
    let mut vmm = machine
        .cpus("boot=2")
        .jailed()
        .disk(format!(
            "path={},id=data,num_queues=2,queue_size=64",
            image.display()
        ))
        .api(ApiSocket::Path)
        .boot();
    let agent = vmm.agent();
    assert_eq!(agent.must("ls /sys/block/vdb/mq | wc -l"), "2");

    // Four at once, each to its own quarter, past the guest's cache.
    agent.must(
        "for i in 0 1 2 3; do head -c 4M /dev/urandom >/tmp/part$i; done
         write() { dd if=/tmp/part$1 of=/dev/vdb bs=64K seek=$(($1 * 64)) oflag=direct; }
         for i in 0 1 2 3; do write $i & pids=\"$pids $!\"; done
         for pid in $pids; do wait $pid || exit 1; done
         sync
         read_back() { dd if=/dev/vdb bs=64K skip=$(($1 * 64)) count=64 iflag=direct | cmp - /tmp/part$1; }
         pids=
         for i in 0 1 2 3; do read_back $i & pids=\"$pids $!\"; done
         for pid in $pids; do wait $pid || exit 1; done",
    );
    let mut file = File::open(&image).unwrap();
    for part in 0..4 {
        let mut on_host = vec![0; 4 * MIB as usize];
        file.read_exact(&mut on_host).unwrap();
        let in_guest = agent.read(&format!("/tmp/part{part}")).unwrap().bytes();
        assert!(on_host == in_guest, "part {part}");
    }
    assert_eq!(stored(&image), 16 * MIB);

    agent.must("blkdiscard -o 0 -l 8M /dev/vdb");
    assert_eq!(stored(&image), 8 * MIB);
    agent.must("blkdiscard -z -o 8M -l 4M /dev/vdb");
    file.seek(SeekFrom::Start(8 * MIB)).unwrap();
    let mut zeros = vec![1; 4 * MIB as usize];
    file.read_exact(&mut zeros).unwrap();
    assert!(zeros.iter().all(|byte| *byte == 0));
    agent.must("dd if=/dev/vdb bs=64K skip=192 count=64 iflag=direct | cmp - /tmp/part3");
    // The root disk is an overlay.
    agent.must("fstrim /");

    let counters = &vmm.api().get("vm.counters")["data"];
    assert_eq!(counters["discard_bytes"], 8 * MIB);
    assert!(
        counters["write_bytes"].as_u64().unwrap() >= 16 * MIB,
        "{counters}"
    );
    assert!(counters["read_ops"].as_u64().unwrap() >= 64, "{counters}");

    for (times, size) in [(1, 24 * MIB), (2, 4 * MIB)] {
        let body = json!({"id": "data", "desired_size": size});
        vmm.api().put("vm.resize-disk", Some(&body));
        agent.must(&format!("grep -m {times} 'vdb. new size' /dev/kmsg"));
        assert_eq!(
            agent.must("blockdev --getsize64 /dev/vdb"),
            size.to_string()
        );
        assert_eq!(std::fs::metadata(&image).unwrap().len(), size);
        agent.must(&format!(
            "dd if=/tmp/part0 of=/dev/vdb bs=64K count=16 seek={} oflag=direct",
            size / (64 << 10) - 16
        ));
    }
    let body = json!({"id": "data", "desired_size": 1000});
    let (status, _) = vmm.api().call("PUT", "vm.resize-disk", Some(&body));
    assert_ne!(status, 204, "a size that is not of whole sectors");
    agent.shut_down(ShutdownAction::Poweroff);
    vmm.expect_end(0, "shutdown");
}

/// A file system in memory, of that many bytes.
struct SmallHost(PathBuf);

impl SmallHost {
    fn mount(path: PathBuf, size: u64) -> Self {
        std::fs::create_dir(&path).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        let flags = MountFlags::empty();
        rustix::mount::mount("tmpfs", &path, "tmpfs", flags, options.as_c_str()).unwrap();
        Self(path)
    }
}

impl Drop for SmallHost {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn limits_hold_and_a_full_host_is_an_error_in_the_guest() {
    let machine = Machine::new();
    let directory = machine.directory().to_owned();
    let limited = directory.join("limited");
    sparse_image(&limited, 16 * MIB);
    let elsewhere = scratch();
    let host = SmallHost::mount(elsewhere.path().join("small"), 4 * MIB);
    let full = host.0.join("full");
    sparse_image(&full, 16 * MIB);
    let mut vmm = machine
        .jailed()
        .disk(format!(
            "path={},bw_size={MIB},bw_refill_time=1000",
            limited.display()
        ))
        .disk(format!("path={},id=full", full.display()))
        .boot();
    let agent = vmm.agent();

    // A bucket of 1 MiB and 1 MiB a second: 4 MiB take 3 seconds at the very least.
    let start = Instant::now();
    agent.must("dd if=/dev/vdb of=/dev/null bs=64K count=64 iflag=direct");
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(3), "{took:?}");
    agent.must("dd if=/dev/zero of=/dev/vdb bs=64K count=16 oflag=direct");

    let write = "dd if=/dev/urandom of=/dev/vdc bs=64K count=128 oflag=direct";
    for _ in 0..2 {
        let output = agent.sh(write);
        assert_ne!(output.exit.code, 0);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains("Input/output error"), "{error}");
    }
    // What fits is there, the other disks work, and what is discarded can be written again.
    agent.must("dd if=/dev/vdc of=/dev/null bs=64K iflag=direct");
    agent.must("echo kept >/root/kept && sync && cat /root/kept");
    agent
        .must("blkdiscard /dev/vdc && dd if=/dev/urandom of=/dev/vdc bs=64K count=16 oflag=direct");
    agent.shut_down(ShutdownAction::Poweroff);
    vmm.expect_end(0, "shutdown");
    let failures: Vec<_> = vmm
        .all_events()
        .into_iter()
        .filter(|(name, _)| name == "device_error")
        .collect();
    let [(_, failure)] = &failures[..] else {
        panic!("not one failure: {failures:?}");
    };
    assert_eq!(failure["device"], "full");
    let reason = failure["reason"].as_str().unwrap();
    assert!(reason.contains("No space left"), "{reason}");
    drop((vmm, host, elsewhere));
}
