//! The daemon as a process, in a directory of its own.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Output, Stdio};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A directory with all that a daemon needs.
pub struct Place {
    pub dir: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
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

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxd"));
        command
            .env_clear()
            .arg("serve")
            .args(["--listen=127.0.0.1:0", "--log-format=json"])
            // What boots in the background is told of elsewhere.
            .arg("--warm-disk-bytes=0")
            // These tests have no part of this host for themselves but directories.
            .arg("--network=off")
            // What outlives a daemon is told of by argument.
            .arg("--on-stop=delete");
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
    pub fn refusal(&self, arguments: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command().args(arguments).output().unwrap();
        assert_eq!(status.code(), Some(1));
        let text = String::from_utf8(stderr).unwrap();
        text.lines().last().unwrap().to_owned()
    }

    /// Waits until a VMM is up, and returns its process id.
    pub fn vmm(&self) -> String {
        assert_eq!(fs::read_to_string(self.path("up")).unwrap(), "up\n");
        fs::read_to_string(self.path("pid"))
            .unwrap()
            .trim()
            .to_owned()
    }

    /// The only sandbox's id.
    pub fn id(&self) -> String {
        let mut entries = fs::read_dir(self.path("run/sandboxes")).unwrap();
        entries
            .next()
            .unwrap()
            .unwrap()
            .file_name()
            .into_string()
            .unwrap()
    }

    pub fn assert_nothing_is_left(&self, vmm: &str) {
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
pub fn runs(pid: &str) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    state
        .lines()
        .any(|line| line.starts_with("State:") && !line.contains('Z'))
}

/// A daemon, which is killed if the test ends before it.
pub struct Daemon {
    pub process: Child,
    pub address: String,
    /// Open for as long as somebody is to read its log.
    pub stderr: Option<BufReader<ChildStderr>>,
}

impl Daemon {
    /// A daemon that is ready.
    pub fn start(place: &Place) -> Self {
        Self::start_with(place, &[])
    }

    /// A daemon with more arguments that is ready.
    pub fn start_with(place: &Place, arguments: &[&str]) -> Self {
        let mut command = place.command();
        let mut process = command
            .args(arguments)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
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

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.process);
        kill_process(pid, signal).unwrap();
    }

    /// Sends a request; the answer is read later.
    pub fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
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

    pub fn get(&self, path: &str) -> Value {
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

pub fn answer(mut stream: TcpStream) -> (u16, Value) {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let head = head.to_ascii_lowercase();
    let body = match head.contains("transfer-encoding: chunked") {
        true => joined(body),
        false => body.to_owned(),
    };
    (status, serde_json::from_str(&body).unwrap_or_default())
}

/// A body that comes in chunks.
fn joined(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        text.push_str(&rest[..length]);
        body = rest[length..].strip_prefix("\r\n").unwrap();
    }
    text
}
