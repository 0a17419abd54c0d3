//! Disks, network, sockets and entropy, as the guest uses them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::thread;

use agent_protocol::{ExecRequest, ShutdownAction};
use e2e_tests::PATIENCE;
use e2e_tests::agent::{Agent, argv, sh};
use e2e_tests::images::write_qcow2_overlay;
use e2e_tests::network::Tap;
use e2e_tests::pattern::{Pattern, assert_pattern};
use e2e_tests::vmm::Machine;

const MIB: usize = 1 << 20;

/// A disk, read by the guest past its cache.
fn read_disk(agent: &Agent, disk: &str) -> Vec<u8> {
    let script = format!("echo 3 >/proc/sys/vm/drop_caches; cat {disk}");
    let output = agent.sh(&script);
    assert_eq!(output.exit.code, 0, "{output:?}");
    output.stdout
}

fn write_disk(agent: &Agent, disk: &str, content: impl Read + Send + 'static) -> i32 {
    let script = format!("dd of={disk} bs=64K iflag=fullblock conv=fsync,notrunc");
    let exec = agent.exec(&ExecRequest {
        stdin: true,
        ..sh(&script)
    });
    exec.feed(content);
    exec.finish().exit.code
}

#[test]
fn disks_hold_what_is_written_and_read_only_ones_do_not_change() {
    const SIZE: usize = 8 * MIB;
    let machine = Machine::new();
    let directory = machine.directory().to_owned();
    let file = |name: &str| directory.join(name);
    for (name, seed) in [("raw", 1), ("fixed", 2), ("base", 3)] {
        fs::write(file(name), Pattern::bytes(seed, SIZE)).unwrap();
    }
    write_qcow2_overlay(&file("overlay"), &file("base"));
    let disk = |name: &str, options: &str| format!("path={}{options}", file(name).display());
    let overlay = disk("overlay", ",image_type=qcow2,backing_files=on");
    let mut vmm = machine
        .disk(disk("raw", ",serial=its-own-number"))
        .disk(disk("fixed", ",readonly=on"))
        .disk(overlay.clone())
        .boot();
    let agent = vmm.agent();

    assert_eq!(agent.must("cat /sys/block/vdb/serial"), "its-own-number");
    let sizes = agent.must("cat /sys/block/vd[bcd]/size /sys/block/vd[bcd]/ro");
    let sectors = SIZE / 512;
    assert_eq!(sizes, format!("{sectors}\n{sectors}\n{sectors}\n0\n1\n0"));
    for (name, seed) in [("/dev/vdb", 1), ("/dev/vdc", 2), ("/dev/vdd", 3)] {
        assert_pattern(&read_disk(agent, name)[..], seed, SIZE as u64);
    }
    let new = |seed| Pattern::new(seed).take(SIZE as u64);
    assert_eq!(write_disk(agent, "/dev/vdb", new(4)), 0);
    assert_ne!(
        write_disk(agent, "/dev/vdc", new(5)),
        0,
        "a write to a read-only disk"
    );
    // Only the middle of the overlay changes.
    let script = "dd of=/dev/vdd bs=64K seek=32 iflag=fullblock conv=fsync,notrunc";
    let exec = agent.exec(&ExecRequest {
        stdin: true,
        ..sh(script)
    });
    exec.feed(Pattern::new(6).take(MIB as u64));
    assert_eq!(exec.finish().exit.code, 0);
    let mut expected = Pattern::bytes(3, SIZE);
    expected[2 * MIB..3 * MIB].copy_from_slice(&Pattern::bytes(6, MIB));
    assert!(
        read_disk(agent, "/dev/vdd") == expected,
        "content of the overlay"
    );
    vmm.agent().shut_down(ShutdownAction::Poweroff);
    vmm.expect_end(0, "shutdown");

    for (name, seed) in [("raw", 4), ("fixed", 2), ("base", 3)] {
        assert_pattern(File::open(file(name)).unwrap(), seed, SIZE as u64);
    }
    let next = Machine::new().disk(overlay).boot();
    assert!(
        read_disk(next.agent(), "/dev/vdb") == expected,
        "content of the overlay in the next guest"
    );
    drop(vmm);
}

#[test]
fn the_guest_gets_entropy_from_the_host() {
    let vmm = Machine::new().boot();
    let draw = || vmm.agent().sh("head -c 65536 /dev/hwrng").stdout;
    let (first, second) = (draw(), draw());
    assert_eq!((first.len(), second.len()), (65536, 65536));
    assert!(first != second, "the same bytes twice");
    // Bytes of a uniform distribution: each of the 256 comes about 256 times.
    let mut counts = [0; 256];
    first
        .iter()
        .for_each(|&byte| counts[usize::from(byte)] += 1);
    assert!(
        counts.iter().all(|count| (100..500).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn the_network_card_carries_packets_both_ways() {
    let tap = Tap::in_new_network("mvs-test0", HOST, false);
    let card = format!("tap={},mac=52:54:00:12:34:56", tap.name());
    let vmm = Machine::new().arguments(&["--net", &card]).boot();
    exchange_packets(vmm.agent());
}

#[test]
fn a_network_card_with_two_pairs_of_queues_uses_both() {
    let tap = Tap::in_new_network("mvs-test0", HOST, true);
    let card = format!("tap={},mac=52:54:00:12:34:56,num_queues=4", tap.name());
    let vmm = Machine::new()
        .cpus("boot=2")
        .arguments(&["--net", &card])
        .boot();
    let agent = vmm.agent();
    assert_eq!(
        agent.must("ls -d /sys/class/net/eth0/queues/rx-* | wc -l"),
        "2"
    );
    exchange_packets(agent);
    // Each vCPU has a queue of its own to send on.
    for cpu in 0..2 {
        agent.must(&format!("taskset -c {cpu} ping -c 3 -i 0.2 -W 60 {HOST}"));
    }
}

const HOST: Ipv4Addr = Ipv4Addr::new(10, 55, 0, 1);

/// Sends much in both directions between the host and a guest with one card.
fn exchange_packets(agent: &Agent) {
    const SIZE: u64 = 12 * MIB as u64;
    let host = HOST;
    let guest = Ipv4Addr::new(10, 55, 0, 2);
    assert_eq!(
        agent.must("cat /sys/class/net/eth0/address"),
        "52:54:00:12:34:56"
    );
    agent.must(&format!(
        "ip address add {guest}/24 dev eth0 && ip link set eth0 up"
    ));
    agent.must(&format!("ping -c 3 -i 0.2 -W 60 {host}"));

    // The guest connects, and gets back all that it sends.
    let listener = TcpListener::bind((host, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let echo = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut sink = stream.try_clone().unwrap();
        let count = io::copy(&mut stream, &mut sink).unwrap();
        sink.shutdown(Shutdown::Write).unwrap();
        count
    });
    agent.must(&format!(
        "head -c {SIZE} /dev/urandom >/tmp/sent && \
         nc -n -N {host} {port} </tmp/sent >/tmp/returned && cmp /tmp/sent /tmp/returned"
    ));
    assert_eq!(echo.join().unwrap(), SIZE);

    // The host connects.
    let mut exec = agent.exec(&sh("nc -l -n -v -N 5001 </dev/null >/tmp/received"));
    exec.wait_for("Listening");
    let mut stream = TcpStream::connect((guest, 5001)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    io::copy(&mut Pattern::new(7).take(SIZE), &mut stream).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(exec.finish().exit.code, 0);
    assert_pattern(agent.read("/tmp/received").unwrap(), 7, SIZE);
}

#[test]
fn many_socket_streams_at_once_stay_apart() {
    const STREAMS: u64 = 16;
    const SIZE: u64 = MIB as u64;
    let vmm = Machine::new().cpus("boot=2").boot();
    let agent = vmm.agent();
    thread::scope(|scope| {
        for seed in 0..STREAMS {
            scope.spawn(move || {
                let exec = agent.exec(&ExecRequest {
                    stdin: true,
                    ..argv(&["cat"])
                });
                exec.feed(Pattern::new(seed).take(SIZE));
                let output = exec.finish();
                assert_eq!(output.exit.code, 0);
                assert_pattern(&output.stdout[..], seed, SIZE);
            });
        }
        for _ in 0..48 {
            scope.spawn(move || assert!(agent.health().init));
        }
    });
    // Nobody listens there: the connection ends without the word that it stands.
    let error = agent.connect_to(9999).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
}
