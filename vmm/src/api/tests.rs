//! The API over its socket, with fake machines behind it.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::routes::{Handler, ROUTES};
use super::{ApiServer, ApiTarget, Listener};
use crate::control::Control;
use crate::control::testing::{Ending, FakeLauncher};
use crate::events::EventStream;
use crate::exit::ExitReason;
use crate::signals::Signals;

/// By what clients know the process.
const PID: u32 = 4711;

struct Bench {
    directory: TempDir,
    _endings: Receiver<Ending>,
    owner: JoinHandle<ExitReason>,
}

impl Bench {
    /// A VMM without a machine, on threads as in the program.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let target = ApiTarget::Path(directory.path().join("api.sock"));
        let listener = Listener::open(&target).unwrap();
        let (started, ready) = channel();
        let owner = std::thread::spawn(move || {
            let (launcher, endings) = FakeLauncher::new();
            let events = EventStream::new(Instant::now(), None);
            let signals = Signals::new().unwrap();
            let control = Control::new(launcher, events, false).unwrap();
            let _server = ApiServer::start(listener, control.mailbox(), PID).unwrap();
            started.send(endings).unwrap();
            control.run(&signals)
        });
        Self {
            directory,
            _endings: ready.recv().unwrap(),
            owner,
        }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("api.sock")).unwrap()
    }

    fn call(&self, method: &str, name: &str, body: &str) -> Answer {
        let mut stream = self.connect();
        let head =
            format!("{method} /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        if !body.is_empty() {
            let length = format!("Content-Length: {}\r\n", body.len());
            stream.write_all(length.as_bytes()).unwrap();
        }
        stream.write_all(b"\r\n").unwrap();
        // A server that has answered already may not read all of it.
        let _ = stream.write_all(body.as_bytes());
        read_answer(&mut stream)
    }

    fn put(&self, name: &str) -> Answer {
        self.call("PUT", name, "")
    }
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Value,
}

impl Answer {
    /// The error's strings.
    fn chain(&self) -> Vec<&str> {
        let array = self.body.as_array().unwrap_or_else(|| panic!("{self:?}"));
        array.iter().map(|text| text.as_str().unwrap()).collect()
    }
}

/// Reads as the client of Cloud Hypervisor does: the length by the exact name of its header.
fn read_answer(stream: &mut UnixStream) -> Answer {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .split("\r\n")
                .find_map(|line| line.strip_prefix("Content-Length: "));
            let length: usize = length.map_or(0, |length| length.parse().unwrap());
            if body.len() >= length {
                let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                let body = match body {
                    "" => Value::Null,
                    body => serde_json::from_str(body).unwrap(),
                };
                return Answer {
                    status,
                    head: head.to_owned(),
                    body,
                };
            }
        }
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "the connection ended after {text:?}");
        bytes.extend_from_slice(&buffer[..count]);
    }
}

fn config() -> String {
    json!({"payload": {"kernel": "/proc/self/exe"}}).to_string()
}

#[test]
fn a_machine_is_driven_over_the_socket() {
    let bench = Bench::new();
    let ping = bench.call("GET", "vmm.ping", "");
    assert_eq!(ping.status, 200);
    assert_eq!(ping.body["version"], "54.0.0");
    assert_eq!(ping.body["pid"], PID);
    assert!(
        ping.head.contains("\r\nServer: Cloud Hypervisor API"),
        "{}",
        ping.head
    );
    assert!(
        ping.head.contains("\r\nContent-Type: application/json"),
        "{}",
        ping.head
    );

    assert_eq!(bench.call("GET", "vm.info", "").status, 404);
    assert_eq!(bench.call("PUT", "vm.create", &config()).status, 204);
    let disk = json!({"path": "/proc/self/exe", "readonly": true, "pci_segment": 0}).to_string();
    assert_eq!(bench.call("PUT", "vm.add-disk", &disk).status, 204);
    assert_eq!(bench.put("vm.boot").status, 204);
    let info = bench.call("GET", "vm.info", "");
    assert_eq!((info.status, &info.body["state"]), (200, &json!("Running")));
    assert_eq!(info.body["config"]["disks"][0]["id"], "_disk0");
    assert_eq!(info.body["device_tree"]["_disk0"]["id"], "_disk0");
    assert_eq!(bench.call("GET", "vm.counters", "").body, json!({}));
    assert_eq!(bench.put("vm.pause").status, 204);
    assert_eq!(bench.call("GET", "vm.info", "").body["state"], "Paused");
    let again = bench.put("vm.pause");
    assert_eq!(again.status, 500);
    assert_eq!(
        again.chain(),
        [
            "vm.pause failed",
            "the virtual machine is paused, and has to be running"
        ]
    );
    let core = json!({"destination_url": "file:///core"}).to_string();
    assert_eq!(bench.call("PUT", "vm.coredump", &core).status, 204);
    assert_eq!(bench.put("vm.resume").status, 204);
    assert_eq!(bench.put("vm.nmi").status, 204);
    let resize = json!({"desired_vcpus": 1}).to_string();
    assert_eq!(bench.call("PUT", "vm.resize", &resize).status, 204);
    assert_eq!(bench.put("vm.power-button").status, 400);
    assert_eq!(bench.put("vm.shutdown").status, 204);
    assert_eq!(bench.call("GET", "vm.info", "").body["state"], "Created");
    assert_eq!(bench.put("vm.delete").status, 204);
    assert_eq!(bench.put("vm.delete").status, 204);

    assert_eq!(bench.put("vmm.shutdown").status, 204);
    assert_eq!(bench.owner.join().unwrap(), ExitReason::Requested);
    assert_eq!(
        std::fs::read_dir(bench.directory.path()).unwrap().count(),
        0
    );
}

#[test]
fn every_endpoint_refuses_what_it_does_not_take() {
    let bench = Bench::new();
    for route in &ROUTES {
        let (right, wrong) = match route.method.as_str() {
            "GET" => ("GET", "PUT"),
            _ => ("PUT", "GET"),
        };
        let answer = bench.call(wrong, route.name, "");
        assert_eq!(answer.status, 400, "{}: {:?}", route.name, answer);
        let bodies: &[&str] = if route.handler.takes_body() {
            &[
                "",
                "[]",
                "{",
                "{\"color\": \"red\"}",
                "\"x\"",
                "[\"/disk\"]",
            ]
        } else {
            &["{}"]
        };
        for body in bodies {
            let answer = bench.call(right, route.name, body);
            assert_eq!(answer.status, 400, "{} {body}: {answer:?}", route.name);
            assert_eq!(answer.chain()[0], format!("{} failed", route.name));
            assert!(answer.chain().len() > 1, "{answer:?}");
        }
        if let Handler::Lacking(why) = route.handler {
            assert_eq!(bench.call(right, route.name, "{}").chain()[1], why);
        }
    }
    for path in ["vm.explode", "", "vm.info/", "../vm.info"] {
        assert_eq!(bench.call("GET", path, "").status, 404, "{path}");
    }
}

#[test]
fn bodies_are_refused_with_the_reason() {
    let bench = Bench::new();
    for (name, body, expected) in [
        (
            "vm.create",
            json!({"payload": {"firmware": "/f"}}),
            "payload.firmware is \"/f\"",
        ),
        (
            "vm.create",
            json!({"payload": {"kernel": "/nowhere"}}),
            "/nowhere",
        ),
        (
            "vm.create",
            json!({"payload": {"kernel": "/k", "color": 1}}),
            "`color`",
        ),
        ("vm.create", json!({}), "the payload is missing"),
        ("vm.resize", json!({"desired_vcpus": 300}), "300"),
        (
            "vm.coredump",
            json!({"destination_url": "core"}),
            "expected file:///PATH",
        ),
        ("vm.add-net", json!({"fds": [3]}), "fds is [3]"),
        ("vm.snapshot", json!({}), "0 descriptors came"),
        (
            "vm.snapshot",
            json!({"destination_url": "/s"}),
            "expected file:///PATH",
        ),
        ("vm.restore", json!({}), "missing field `source_url`"),
        (
            "vm.restore",
            json!({"source_url": "file:///nowhere", "memory_restore_mode": "OnDemand"}),
            "cannot open /nowhere/config.json",
        ),
        (
            "vm.restore",
            json!({"source_url": "file:///s", "net_fds": [{"id": "n", "num_fds": 1}]}),
            "names the card \"n\"",
        ),
        (
            "vm.restore",
            json!({"source_url": "file:///s", "zone_updates": [{"id": "z"}]}),
            "no memory zones",
        ),
        (
            "vm.replace-disk",
            json!({"id": "_disk0", "image_types": ["Raw"]}),
            "0 descriptors came",
        ),
        ("vm.working-set", json!({}), "0 descriptors came"),
    ] {
        let answer = bench.call("PUT", name, &body.to_string());
        assert_eq!(answer.status, 400, "{name} {body}: {answer:?}");
        assert!(answer.chain().concat().contains(expected), "{answer:?}");
    }
    let large = format!("{{\"id\": \"{}\"}}", "x".repeat(4 << 20));
    let answer = bench.call("PUT", "vm.remove-device", &large);
    assert_eq!(answer.status, 400);
    assert!(answer.chain()[1].contains("larger"), "{answer:?}");
}

impl Bench {
    /// Sends a request as the client of Cloud Hypervisor does: descriptors with the first bytes,
    /// and the rest in later writes.
    fn call_with(&self, name: &str, descriptor: impl AsFd, body: &str) -> (UnixStream, Answer) {
        let mut stream = self.connect();
        let head = format!("PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        let descriptors = [descriptor.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let head = IoSlice::new(head.as_bytes());
        sendmsg(&stream, &[head], &mut ancillary, SendFlags::empty()).unwrap();
        let length = format!("Content-Length: {}\r\n", body.len());
        for part in [&length, "\r\n", body] {
            stream.write_all(part.as_bytes()).unwrap();
        }
        let answer = read_answer(&mut stream);
        (stream, answer)
    }
}

fn is_open_elsewhere(ours: &UnixStream) -> bool {
    ours.set_nonblocking(true).unwrap();
    let mut ours = ours;
    // Nobody ever writes to it: the end of the stream, or nothing.
    ours.read(&mut [0]).is_err()
}

#[test]
fn descriptors_that_are_not_used_are_closed() {
    let bench = Bench::new();
    for (name, body, status) in [
        ("vm.add-net", "{\"num_queues\": 2}", 404),
        ("vm.add-net", "{", 400),
        ("vm.create", &config(), 204),
        ("vm.explode", "{}", 404),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_open, answer) = bench.call_with(name, theirs, body);
        assert_eq!(answer.status, status, "{name}: {answer:?}");
        assert!(!is_open_elsewhere(&ours), "{name}");
    }
}

#[test]
fn descriptors_of_a_card_are_kept_as_long_as_it_is() {
    let bench = Bench::new();
    assert_eq!(bench.call("PUT", "vm.create", &config()).status, 204);
    let add = || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The number is the client's, and of no meaning here.
        let (_, answer) = bench.call_with("vm.add-net", theirs, "{\"id\": \"n\", \"fds\": [77]}");
        (ours, answer.status)
    };
    let (first, status) = add();
    assert_eq!(status, 204);
    let (second, status) = add();
    assert_eq!(status, 409, "two devices with one id");
    assert!(is_open_elsewhere(&first) && !is_open_elsewhere(&second));
    let remove = json!({"id": "n"}).to_string();
    assert_eq!(bench.call("PUT", "vm.remove-device", &remove).status, 204);
    assert!(!is_open_elsewhere(&first));

    let (third, _) = add();
    assert!(is_open_elsewhere(&third));
    assert_eq!(bench.put("vm.delete").status, 204);
    assert!(!is_open_elsewhere(&third));
}

#[test]
fn a_connection_serves_several_requests_and_none_blocks_another() {
    let bench = Bench::new();
    // Heads and bodies that never come to an end, and a connection that says nothing.
    let mut half_head = bench.connect();
    half_head.write_all(b"PUT /api/v1/vm.cre").unwrap();
    let mut half_body = bench.connect();
    half_body
        .write_all(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        .unwrap();
    let _silent = bench.connect();
    let mut stream = bench.connect();
    for _ in 0..3 {
        stream
            .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            .unwrap();
        assert_eq!(read_answer(&mut stream).status, 200);
    }
    // Nor do they keep the VMM from ending.
    assert_eq!(bench.put("vmm.shutdown").status, 204);
    bench.owner.join().unwrap();
}

#[test]
fn threads_and_descriptors_are_given_back() {
    let count = |what: &str| {
        std::fs::read_dir(Path::new("/proc/self").join(what))
            .unwrap()
            .count()
    };
    // Other tests come and go meanwhile, so this looks for growth by each round.
    let before = (count("fd"), count("task"));
    for _ in 0..200 {
        let bench = Bench::new();
        assert_eq!(bench.call("GET", "vmm.ping", "").status, 200);
        assert_eq!(bench.put("vmm.shutdown").status, 204);
        bench.owner.join().unwrap();
    }
    let after = (count("fd"), count("task"));
    assert!(
        after.0 < before.0 + 200,
        "{before:?} descriptors became {after:?}"
    );
    assert!(
        after.1 < before.1 + 200,
        "{before:?} threads became {after:?}"
    );
}
