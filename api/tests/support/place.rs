//! A daemon as a process, with the stand-in for the VMM ([`super::vmm`]) and the real agent on this
//! machine as its guests. What commands and files of its sandboxes do, they do to this machine.
//!
//! A test binary that uses it has a test `as_a_vmm` that calls `vmm::run`.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::thread;

use conformance::{Answer, Client};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::{agent, vmm};

/// A daemon that is ready, and its directories. Ended, and they are removed, with the value.
pub struct Daemon {
    dir: tempfile::TempDir,
    process: Child,
    address: String,
    /// What it has said since it was ready.
    log: Mutex<mpsc::Receiver<String>>,
}

impl Daemon {
    /// Starts one with these settings beside its own.
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_with(|_| agent::binary().to_owned(), arguments)
    }

    /// The same with this program as the agent, which may be made in the daemon's directory.
    pub fn start_with(agent: impl FnOnce(&Path) -> PathBuf, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::create_dir(path("images")).unwrap();
        for image in ["vmlinux", "initramfs.cpio", "minimal.ext4"] {
            fs::write(path("images").join(image), [0; 4096]).unwrap();
        }
        vmm::install(dir.path(), "as_a_vmm", &agent(dir.path()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxd"));
        command
            .env_clear()
            .arg("serve")
            .args(["--listen=127.0.0.1:0", "--log-format=json"])
            .args(["--warm-disk-bytes=0", "--network=off", "--on-stop=delete"])
            .args(arguments)
            .stderr(Stdio::piped());
        for (flag, name) in [
            ("--data-dir", "data"),
            ("--runtime-dir", "run"),
            ("--vmm", "vmm"),
            ("--images-dir", "images"),
        ] {
            command.arg(flag).arg(path(name));
        }
        let mut process = command.spawn().unwrap();
        let stderr = BufReader::new(process.stderr.take().unwrap());
        // Read to its end: a daemon whose log nobody reads stands still.
        let (sender, lines) = mpsc::channel();
        let mut kept = fs::File::create(path("daemon.log")).unwrap();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                writeln!(kept, "{line}").unwrap();
                let _ = sender.send(line);
            }
        });
        let mut address = None;
        let mut log = String::new();
        loop {
            let line = lines.recv();
            assert!(line.is_ok(), "it did not start: {log}");
            let line = line.unwrap_or_default();
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
            dir,
            process,
            address: address.unwrap(),
            log: Mutex::new(lines),
        }
    }

    /// Where it serves, `ADDRESS:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// A file beside those of the daemon: `daemon.log` is what it has said. [`vmm`] says which ones make the VMM fail.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The next line of its log that has this text.
    pub fn logged(&self, text: &str) -> Value {
        let log = self.log.lock().unwrap();
        let mut lines = log.iter();
        let line = lines.find(|line| line.contains(text)).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) {
        self.process.wait().unwrap();
    }

    /// The `Authorization` of a new administrator.
    pub fn administrator(&self) -> String {
        let user = json!({"username": "root", "password": "Correct-Horse-9", "role": "admin"});
        let user = user.to_string();
        let made = self.call("POST", "/api/v1/auth/register", &user);
        assert_eq!(made.status, 201, "{:?}", made.json());
        let answer = self.call("POST", "/api/v1/auth/login", &user).json();
        format!("Bearer {}", answer["access_token"].as_str().unwrap())
    }

    /// The answer to a request with a JSON body, or none.
    pub fn call(&self, method: &str, path: &str, body: &str) -> Answer {
        self.send(method, path, "application/json", body.as_bytes())
    }

    /// The answer to a request with this body.
    pub fn send(&self, method: &str, path: &str, kind: &str, body: &[u8]) -> Answer {
        Client::send(self, method, path, &[("Content-Type", kind)], body)
    }
}

impl Client for Daemon {
    fn connect(&self) -> TcpStream {
        TcpStream::connect(&self.address).unwrap()
    }

    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let mut stream = self.connect();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        )
        .unwrap();
        for (name, value) in headers {
            write!(stream, "{name}: {value}\r\n").unwrap();
        }
        write!(stream, "Content-Length: {}\r\n\r\n", body.len()).unwrap();
        stream.write_all(body).unwrap();
        answer(stream)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // In order, so that the VMMs end with it.
        let _ = kill_process(Pid::from_child(&self.process), Signal::TERM);
        let status = self.process.wait();
        if thread::panicking() {
            let pids = fs::read_to_string(self.path("pid")).unwrap_or_default();
            for pid in pids.lines().filter_map(|line| line.parse().ok()) {
                let _ = Pid::from_raw(pid).map(|pid| kill_process(pid, Signal::KILL));
            }
        } else {
            assert!(status.unwrap().success());
        }
    }
}

/// The last answer of a connection.
pub fn answer(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    parse(&bytes)
}

/// What the bytes of an answer say.
fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let (head, body) = bytes.split_at(end.unwrap() + 4);
    let head = std::str::from_utf8(head).unwrap().to_lowercase();
    let header = |name: &str| {
        let mut lines = head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(known, _)| *known == name)
    };
    let mut body = body.to_vec();
    if header("transfer-encoding").is_some() {
        body = dechunk(&body);
    }
    Answer {
        status: head.split(' ').nth(1).unwrap().parse().unwrap(),
        kind: header("content-type").map_or_else(String::new, |(_, kind)| kind.to_owned()),
        body,
    }
}

/// RFC 9112, section 7.1, without extensions and trailers.
fn dechunk(mut rest: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|two| two == b"\r\n").unwrap();
        let size = std::str::from_utf8(&rest[..end]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return body;
        }
        rest = &rest[end + 2..];
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}
