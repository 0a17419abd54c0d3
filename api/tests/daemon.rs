//! The daemon as a process: what it says when it cannot start, and what it leaves when it ends or
//! is killed. A script stands in for the VMM.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// A directory with all that a daemon needs.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        fs::create_dir(path.join("images")).unwrap();
        for image in ["vmlinux", "initramfs.cpio", "minimal.ext4"] {
            fs::write(path.join("images").join(image), [0; 4096]).unwrap();
        }
        for fifo in ["up", "never"] {
            let status = Command::new("mkfifo")
                .arg(path.join(fifo))
                .status()
                .unwrap();
            assert!(status.success());
        }
        let script = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\necho $$ > {dir}/pid\necho up > {dir}/up\n\
             read word < {dir}/never\n",
            dir = path.display()
        );
        fs::write(path.join("vmm"), script).unwrap();
        fs::set_permissions(path.join("vmm"), fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxd"));
        command
            .env_clear()
            .arg("serve")
            .args(["--listen=127.0.0.1:0", "--log-format=json"])
            // What boots in the background is told of elsewhere.
            .arg("--warm-disk-bytes=0")
            // These tests have no part of this host for themselves but directories.
            .arg("--network=off");
        for (flag, name) in [
            ("--data-dir", "data"),
            ("--runtime-dir", "run"),
            ("--vmm", "vmm"),
            ("--images-dir", "images"),
        ] {
            command.arg(flag).arg(self.path(name));
        }
        command
    }

    /// What a daemon says that cannot start.
    fn refusal(&self, arguments: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command().args(arguments).output().unwrap();
        assert_eq!(status.code(), Some(1));
        let text = String::from_utf8(stderr).unwrap();
        text.lines().last().unwrap().to_owned()
    }

    /// Waits until a VMM is up, and returns its process id.
    fn vmm(&self) -> String {
        assert_eq!(fs::read_to_string(self.path("up")).unwrap(), "up\n");
        fs::read_to_string(self.path("pid"))
            .unwrap()
            .trim()
            .to_owned()
    }

    /// The only sandbox's id.
    fn id(&self) -> String {
        let mut entries = fs::read_dir(self.path("run/sandboxes")).unwrap();
        entries
            .next()
            .unwrap()
            .unwrap()
            .file_name()
            .into_string()
            .unwrap()
    }

    fn assert_nothing_is_left(&self, vmm: &str) {
        assert!(!runs(vmm), "process {vmm} is left");
        for dir in ["run/sandboxes", "data/sandboxes", "data/spool"] {
            let mut entries = fs::read_dir(self.path(dir)).unwrap();
            assert!(entries.next().is_none(), "something is left in {dir}");
        }
    }
}

impl Drop for Place {
    /// Ends the VMMs of a test that has failed: they outlive their daemon.
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let pids = fs::read_to_string(self.path("pid")).unwrap_or_default();
        for pid in pids.lines().filter_map(|line| line.parse().ok()) {
            let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

/// Whether a process runs. One that has ended may have to wait for its parent.
fn runs(pid: &str) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    state
        .lines()
        .any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// A daemon, which is killed if the test ends before it.
struct Daemon {
    process: Child,
    address: String,
    /// Open for as long as somebody is to read its log.
    stderr: Option<BufReader<ChildStderr>>,
}

impl Daemon {
    /// A daemon that is ready.
    fn start(place: &Place) -> Self {
        let mut process = place.command().stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let mut address = None;
        let mut log = String::new();
        loop {
            let mut line = String::new();
            assert!(
                stderr.read_line(&mut line).unwrap() > 0,
                "it did not start: {log}"
            );
            log.push_str(&line);
            let line: Value = serde_json::from_str(&line).unwrap_or_default();
            match line["fields"]["message"].as_str() {
                Some("listening") => {
                    address = line["fields"]["address"].as_str().map(str::to_owned);
                }
                Some("sandboxd is ready") => break,
                _ => {}
            }
        }
        Self {
            process,
            address: address.unwrap(),
            stderr: Some(stderr),
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, signal).unwrap();
    }

    /// Sends a request; the answer is read later.
    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    fn get(&self, path: &str) -> Value {
        answer(self.send("GET", path, "")).1
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
    }
}

/// Does as an agent that takes its identity, and returns what it is told.
fn take_identity(listener: UnixListener) -> Value {
    let (mut stream, _) = listener.accept().unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    };
    assert_eq!(line(), "CONNECT 1024");
    stream.write_all(b"OK 1073741824\n").unwrap();
    assert_eq!(line(), "POST /v1/resumed HTTP/1.1");
    let mut length = 0;
    loop {
        let header = line();
        match header.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().unwrap();
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let done = json!({"realtime_ns": 0, "seeded": false, "clock": false, "hostname": false,
                      "machine_id": false, "problems": []});
    let done = done.to_string();
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{done}",
        done.len()
    )
    .unwrap();
    serde_json::from_slice(&body).unwrap()
}

fn answer(mut stream: TcpStream) -> (u16, Value) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_default())
}

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

#[test]
fn after_a_crash_in_a_pause_the_sandbox_is_as_before_or_as_after() {
    let place = Place::new();
    vmm::install(&place.path(""), "as_a_vmm", agent::binary());
    let mut daemon = Daemon::start(&place);
    let create = |daemon: &Daemon| {
        let (status, sandbox) = answer(daemon.send("POST", "/v1/sandboxes", "{}"));
        assert_eq!(status, 201, "{sandbox}");
        format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())
    };
    let layers = || fs::read_dir(place.path("data/layers")).unwrap().count();
    let (paused, lost) = (create(&daemon), create(&daemon));
    let (status, _) = answer(daemon.send("POST", &format!("{paused}/pause"), ""));
    assert_eq!((status, layers()), (200, 2));

    let fifo = place.path("hang");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let pausing = daemon.send("POST", &format!("{lost}/pause"), "");
    // Opening it waits until the VMM is at it.
    let hung = fs::File::options().write(true).open(&fifo).unwrap();
    assert_eq!(daemon.get(&lost)["status"], "paused", "or on the way there");
    daemon.signal(Signal::KILL);
    daemon.process.wait().unwrap();
    drop((pausing, hung));
    fs::remove_file(fifo).unwrap();

    let daemon = Daemon::start(&place);
    assert_eq!(layers(), 2, "what was not complete is gone");
    let row = daemon.get(&lost);
    assert_eq!(row["status"], "error");
    let reason = row["status_reason"].as_str().unwrap();
    assert!(
        reason.contains("while the sandbox was being paused"),
        "{reason}"
    );
    assert_eq!(daemon.get(&paused)["status"], "paused");
    let (status, row) = answer(daemon.send("POST", &format!("{paused}/resume"), ""));
    assert_eq!((status, &row["status"]), (200, &json!("running")), "{row}");
    daemon.signal(Signal::TERM);
}

#[test]
fn what_is_missing_is_named() {
    let place = Place::new();
    for (file, expected) in [
        ("images/vmlinux", "the guest kernel"),
        ("images/initramfs.cpio", "the initramfs"),
        ("images/minimal.ext4", "there is no template"),
        ("vmm", "the vmm binary"),
    ] {
        let (here, away) = (place.path(file), place.path("away"));
        fs::rename(&here, &away).unwrap();
        let text = place.refusal(&[]);
        assert!(text.contains(expected), "{text}");
        fs::rename(&away, &here).unwrap();
    }
    let text = place.refusal(&["--template=other=/no/where.ext4"]);
    assert!(
        text.contains("\"other\" /no/where.ext4 cannot be read"),
        "{text}"
    );
    let key = place.path("data/token.key");
    fs::create_dir_all(place.path("data")).unwrap();
    fs::write(&key, [7; 32]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let text = place.refusal(&[]);
    assert!(text.contains("can be read by others"), "{text}");
    fs::remove_file(key).unwrap();
    let long = format!("--runtime-dir=/tmp/{}", "x".repeat(100));
    assert!(place.refusal(&[&long]).contains("choose a shorter one"));
}

#[test]
fn what_is_taken_is_named() {
    let place = Place::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let text = place.refusal(&["--listen", &address]);
    assert!(
        text.contains(&format!("{address} cannot be listened on")),
        "{text}"
    );

    let daemon = Daemon::start(&place);
    let text = place.refusal(&[]);
    assert!(text.contains("another sandboxd uses"), "{text}");
    daemon.signal(Signal::TERM);
}

#[test]
fn asked_to_end_it_ends_its_sandboxes_first() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    let request = daemon.send("POST", "/v1/sandboxes", "{}");
    let vmm = place.vmm();
    let id = place.id();
    daemon.signal(Signal::TERM);
    // The request is in flight; asked again, the daemon waits for it no longer.
    daemon.signal(Signal::INT);
    assert_eq!(daemon.process.wait().unwrap().code(), Some(0));
    drop(request);
    place.assert_nothing_is_left(&vmm);

    let daemon = Daemon::start(&place);
    let row = daemon.get(&format!("/v1/sandboxes/{id}"));
    assert!(
        row["status"] == "stopped" || row["status"] == "error",
        "{row}"
    );
    daemon.signal(Signal::TERM);
}

#[test]
fn it_outlives_who_reads_its_log() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    drop(daemon.stderr.take());
    assert_eq!(daemon.get("/health")["status"], "healthy");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.process.wait().unwrap().code(), Some(0));
}

#[test]
fn after_a_crash_the_next_daemon_cleans_up() {
    let place = Place::new();
    let mut daemon = Daemon::start(&place);
    let request = daemon.send("POST", "/v1/sandboxes", "{}");
    let vmm = place.vmm();
    let id = place.id();
    let vsock = place.path("run/sandboxes").join(&id).join("vsock.sock");
    // The daemon turns to the agent as soon as it is told that it serves.
    let listener = UnixListener::bind(vsock).unwrap();
    let agent = thread::spawn(|| take_identity(listener));
    let ready = json!({"version": "1", "kernel": "6", "entered_us": 1, "serving_us": 2});
    let socket = place
        .path("run/sandboxes")
        .join(&id)
        .join("vsock.sock_1025");
    UnixStream::connect(socket)
        .unwrap()
        .write_all(ready.to_string().as_bytes())
        .unwrap();
    let (status, sandbox) = answer(request);
    assert_eq!((status, &sandbox["status"]), (201, &json!("running")));
    let told = agent.join().unwrap();
    assert_eq!(told["hostname"], json!(id));
    daemon.signal(Signal::KILL);
    daemon.process.wait().unwrap();
    assert!(runs(&vmm), "the VMM has ended with the daemon");

    let daemon = Daemon::start(&place);
    place.assert_nothing_is_left(&vmm);
    let row = daemon.get(&format!("/v1/sandboxes/{id}"));
    assert_eq!(row["status"], "error");
    assert!(
        row["status_reason"]
            .as_str()
            .unwrap()
            .contains("the daemon ended without notice")
    );
    assert_eq!(daemon.get("/v1/sandboxes"), json!([]));
    daemon.signal(Signal::TERM);
}
