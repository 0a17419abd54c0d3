//! Restores of a machine that was saved: from the start of a VMM's process until the agent in the
//! guest has answered. Each VMM is driven by its own API, and each restores what it has saved itself.

use std::{
    fs,
    io::{self, Read, Write},
    os::fd::AsFd,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use agent_protocol::{AGENT_PORT, Health, PATH_HEALTH, READY_PORT};
use rustix::fs::inotify;
use serde::Serialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    agent,
    channel::Channel,
    clock::{self, Moment, millis_between},
    process::{Process, StartError, WaitError},
    stage::Stage,
};

/// The longest answer of a VMM that is read, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;
/// The context id of every guest: each has the host's side of its device for itself.
const CID: u32 = 3;

/// How a VMM is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Cloud Hypervisor's API, which ours has too.
    CloudHypervisor,
    /// Firecracker's.
    Firecracker,
}

/// A VMM whose restores are measured.
#[derive(Debug, Clone)]
pub struct Restorer {
    /// Its name in results.
    pub name: &'static str,
    /// Its binary.
    pub program: PathBuf,
    /// Its API.
    pub dialect: Dialect,
    /// Kernel that it boots, an ELF file.
    pub kernel: PathBuf,
    /// Initramfs with the agent.
    pub initramfs: PathBuf,
}

/// One restore.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Restore {
    /// From the start of the process until it has answered that the guest runs, in ms.
    pub runs_ms: f64,
    /// … until the agent has answered, in ms.
    pub answered_ms: f64,
    /// Memory of the process after that, with the guest's, in KiB: pages that it shares count by
    /// its share.
    pub pss_kib: u64,
}

/// Why there is no restore.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No place for its files.
    #[error("its files cannot be made or removed")]
    Files(#[source] io::Error),
    /// The process was not started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The process did not come to serve its API.
    #[error("its API is not served")]
    Wait(#[from] WaitError),
    /// A request was not answered.
    #[error("{request}")]
    Request {
        /// What was asked.
        request: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The agent did not answer.
    #[error("the agent does not answer")]
    Agent(#[source] io::Error),
}

/// A machine that was saved.
pub struct SavedMachine<'a> {
    restorer: &'a Restorer,
    directory: TempDir,
    limit: Duration,
}

/// A request of a VMM's API: method, path and body.
type Request = (&'static str, &'static str, Option<Value>);

impl<'a> SavedMachine<'a> {
    /// Boots a guest of one vCPU, waits until its agent answers, and saves it. The files are in
    /// `stage`, and each step may take `limit`.
    ///
    /// # Errors
    /// The VMM does not do it.
    pub fn make(
        restorer: &'a Restorer,
        memory_mib: u64,
        cmdline: &str,
        stage: &Stage,
        limit: Duration,
    ) -> Result<Self, RestoreError> {
        let directory = tempfile::tempdir_in(stage.directory()).map_err(RestoreError::Files)?;
        let saved = Self {
            restorer,
            directory,
            limit,
        };
        fs::create_dir(saved.path("saved")).map_err(RestoreError::Files)?;
        let listener = saved.channel().listen(READY_PORT);
        let listener = listener.map_err(RestoreError::Files)?;
        let mut running = saved.start()?;
        running.send(&saved.boot(memory_mib, cmdline))?;
        running
            .process
            .wait_for(&[listener.as_fd()], clock::now() + limit)?;
        saved.ask_agent()?;
        running.send(&saved.save())?;
        Ok(saved)
    }

    /// Restores it once.
    ///
    /// # Errors
    /// The VMM does not do it, or the guest is not what it was.
    pub fn restore(&self) -> Result<Restore, RestoreError> {
        let start = clock::now();
        let mut running = self.start()?;
        running.send(&self.load())?;
        let runs = clock::now();
        let answered = self.ask_agent()?;
        let rollup = format!("/proc/{}/smaps_rollup", running.process.id());
        let rollup = fs::read_to_string(rollup).map_err(RestoreError::Files)?;
        Ok(Restore {
            runs_ms: millis_between(start, runs),
            answered_ms: millis_between(start, answered),
            pss_kib: pss_kib(&rollup).unwrap_or_default(),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn channel(&self) -> Channel {
        Channel::Unix(self.path("vsock"))
    }

    /// Starts a VMM that has no machine yet, without what another has left.
    fn start(&self) -> Result<Running, RestoreError> {
        for socket in ["api", "vsock"] {
            match fs::remove_file(self.path(socket)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(RestoreError::Files(error));
                }
                _ => {}
            }
        }
        let created = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)
            .and_then(|watch| {
                inotify::add_watch(&watch, self.directory.path(), inotify::WatchFlags::CREATE)?;
                Ok(watch)
            })
            .map_err(|error| RestoreError::Files(error.into()))?;
        let api = self.path("api");
        let mut command = Command::new(&self.restorer.program);
        match self.restorer.dialect {
            Dialect::CloudHypervisor => {
                let mut value = std::ffi::OsString::from("path=");
                value.push(&api);
                command.arg("--api-socket").arg(value);
            }
            Dialect::Firecracker => {
                command.arg("--api-sock").arg(&api);
            }
        }
        let mut process = Process::start(&mut command, self.directory.path())?;
        let deadline = clock::now() + self.limit;
        let stream = loop {
            match UnixStream::connect(&api) {
                Ok(stream) => break stream,
                // It is there, and is about to be listened on.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    thread::yield_now();
                }
                Err(_) => {
                    process.wait_for(&[created.as_fd()], deadline)?;
                    let mut events = [0; 4096];
                    // Only that there were some counts.
                    let _ = rustix::io::read(&created, &mut events);
                }
            }
        };
        stream
            .set_read_timeout(Some(self.limit))
            .map_err(RestoreError::Files)?;
        Ok(Running { process, stream })
    }

    fn ask_agent(&self) -> Result<Moment, RestoreError> {
        let ask = || {
            let mut stream = self.channel().connect(AGENT_PORT, self.limit)?;
            let body = agent::get(&mut stream, PATH_HEALTH)?;
            let answered = clock::now();
            serde_json::from_slice::<Health>(&body)?;
            Ok(answered)
        };
        ask().map_err(RestoreError::Agent)
    }

    fn boot(&self, memory_mib: u64, cmdline: &str) -> Vec<Request> {
        let Restorer {
            kernel, initramfs, ..
        } = self.restorer;
        let vsock = self.path("vsock");
        match self.restorer.dialect {
            Dialect::CloudHypervisor => {
                let machine = json!({
                    "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
                    "memory": {"size": memory_mib << 20},
                    "payload": {"kernel": kernel, "initramfs": initramfs, "cmdline": cmdline},
                    "vsock": {"cid": CID, "socket": vsock},
                    "rng": {"src": "/dev/urandom"},
                    "serial": {"mode": "Off"},
                    "console": {"mode": "Off"},
                });
                vec![
                    ("PUT", "/api/v1/vm.create", Some(machine)),
                    ("PUT", "/api/v1/vm.boot", None),
                ]
            }
            Dialect::Firecracker => {
                let source = json!({"kernel_image_path": kernel, "initrd_path": initramfs,
                                    "boot_args": cmdline});
                let machine = json!({"vcpu_count": 1, "mem_size_mib": memory_mib});
                let vsock = json!({"guest_cid": CID, "uds_path": vsock});
                vec![
                    ("PUT", "/boot-source", Some(source)),
                    ("PUT", "/machine-config", Some(machine)),
                    ("PUT", "/vsock", Some(vsock)),
                    ("PUT", "/entropy", Some(json!({}))),
                    (
                        "PUT",
                        "/actions",
                        Some(json!({"action_type": "InstanceStart"})),
                    ),
                ]
            }
        }
    }

    fn save(&self) -> Vec<Request> {
        match self.restorer.dialect {
            Dialect::CloudHypervisor => vec![
                ("PUT", "/api/v1/vm.pause", None),
                (
                    "PUT",
                    "/api/v1/vm.snapshot",
                    Some(json!({"destination_url": self.url()})),
                ),
            ],
            Dialect::Firecracker => {
                let (state, memory) = self.firecracker_files();
                let files = json!({"snapshot_type": "Full", "snapshot_path": state,
                                   "mem_file_path": memory});
                vec![
                    ("PATCH", "/vm", Some(json!({"state": "Paused"}))),
                    ("PUT", "/snapshot/create", Some(files)),
                ]
            }
        }
    }

    fn load(&self) -> Vec<Request> {
        match self.restorer.dialect {
            Dialect::CloudHypervisor => vec![
                (
                    "PUT",
                    "/api/v1/vm.restore",
                    Some(json!({"source_url": self.url()})),
                ),
                ("PUT", "/api/v1/vm.resume", None),
            ],
            Dialect::Firecracker => {
                let (state, memory) = self.firecracker_files();
                let backend = json!({"backend_type": "File", "backend_path": memory});
                let files = json!({"snapshot_path": state, "mem_backend": backend,
                                   "resume_vm": true});
                vec![("PUT", "/snapshot/load", Some(files))]
            }
        }
    }

    fn url(&self) -> String {
        format!("file://{}", self.path("saved").display())
    }

    fn firecracker_files(&self) -> (PathBuf, PathBuf) {
        let directory = self.path("saved");
        (directory.join("state"), directory.join("memory"))
    }
}

/// A VMM's process and a connection to its API.
struct Running {
    process: Process,
    stream: UnixStream,
}

impl Running {
    /// Sends requests one after the other, each of which has to succeed.
    fn send(&mut self, requests: &[Request]) -> Result<(), RestoreError> {
        for (method, path, body) in requests {
            self.call(method, path, body.as_ref())
                .map_err(|source| RestoreError::Request {
                    request: format!("{method} {path}"),
                    source,
                })?;
        }
        Ok(())
    }

    fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> io::Result<()> {
        // The shape of header that the strictest of their servers reads.
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
        if let Some(body) = body {
            let body = body.to_string();
            request.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            ));
        } else {
            request.push_str("\r\n");
        }
        self.stream.write_all(request.as_bytes())?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte)?;
            head.push(byte[0]);
            if head.len() as u64 > MAX_ANSWER {
                return Err(invalid("the header of the answer has no end".to_owned()));
            }
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let length = content_length(&head)?.min(MAX_ANSWER);
        let mut said = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.stream.read_exact(&mut said)?;
        let status = head.split(' ').nth(1).unwrap_or_default();
        if matches!(status, "200" | "204") {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&said).into_owned();
        Err(invalid(format!("it answers {status}: {said}")))
    }
}

fn content_length(head: &str) -> io::Result<u64> {
    for line in head.lines() {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            return value.trim().parse().map_err(io::Error::other);
        }
    }
    Ok(0)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn pss_kib(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead, BufReader},
        os::unix::fs::PermissionsExt,
        path::Path,
    };

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn restorer(program: &Path, dialect: Dialect) -> Restorer {
        Restorer {
            name: "one",
            program: program.to_owned(),
            dialect,
            kernel: "/k/vmlinux".into(),
            initramfs: "/k/initramfs".into(),
        }
    }

    fn machine<'a>(restorer: &'a Restorer, stage: &Stage) -> SavedMachine<'a> {
        SavedMachine {
            restorer,
            directory: tempfile::tempdir_in(stage.directory()).unwrap(),
            limit: LIMIT,
        }
    }

    #[test]
    fn our_vmm_takes_the_machine_that_is_asked_for() {
        let stage = Stage::new().unwrap();
        let ours = restorer(Path::new("/bin/true"), Dialect::CloudHypervisor);
        let requests = machine(&ours, &stage).boot(4096, "quiet");
        let (_, _, Some(body)) = &requests[0] else {
            panic!("no machine");
        };
        let config: vmm::config::VmConfig = serde_json::from_value(body.clone()).unwrap();
        assert_eq!(config.memory.size, 4 << 30);
    }

    /// A program that writes all that it is told to the file `told`, and answers 204 each time.
    const SERVER: &str = r#"#!/usr/bin/env python3
import os, socket, sys
path = sys.argv[2].removeprefix("path=")
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen()
stream = server.accept()[0].makefile("rwb")
with open(os.path.join(os.path.dirname(path), "told"), "wb") as told:
    while line := stream.readline():
        told.write(line)
        length = 0
        while (header := stream.readline().strip()):
            if header.lower().startswith(b"content-length:"):
                length = int(header.split(b":")[1])
        told.write(stream.read(length) + b"\n")
        told.flush()
        bad = b"nothing" in line
        stream.write(b"HTTP/1.1 400 Bad\r\nContent-Length: 2\r\n\r\nno" if bad else b"HTTP/1.1 204 \r\n\r\n")
        stream.flush()
"#;

    #[test]
    fn each_is_spoken_to_in_its_own_dialect() {
        let stage = Stage::new().unwrap();
        let program = stage.directory().join("server");
        fs::write(&program, SERVER).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        for (dialect, first) in [
            (Dialect::CloudHypervisor, "PUT /api/v1/vm.restore HTTP/1.1"),
            (Dialect::Firecracker, "PUT /snapshot/load HTTP/1.1"),
        ] {
            let restorer = restorer(&program, dialect);
            let machine = machine(&restorer, &stage);
            // What an earlier process has left is in nobody's way.
            fs::write(machine.path("api"), "").unwrap();
            let mut running = machine.start().unwrap();
            running.send(&machine.load()).unwrap();
            let told = fs::File::open(machine.path("told")).unwrap();
            let lines: Vec<_> = BufReader::new(told).lines().map(Result::unwrap).collect();
            assert_eq!(lines[0], first);
            let body: Value = serde_json::from_str(&lines[1]).unwrap();
            assert!(body.to_string().contains("/saved"), "{body}");

            let error = running.send(&[("PUT", "/nothing", None)]).unwrap_err();
            let text = crate::error_chain(&error);
            assert_eq!(text, "PUT /nothing: it answers 400: no");
        }
    }

    #[test]
    fn a_program_that_ends_early_is_told_of() {
        let stage = Stage::new().unwrap();
        let restorer = restorer(Path::new("/bin/false"), Dialect::Firecracker);
        let error = machine(&restorer, &stage).start().err().unwrap();
        assert!(matches!(error, RestoreError::Wait(WaitError::Ended { .. })));
    }

    #[test]
    fn memory_is_read_from_the_rollup() {
        assert_eq!(
            pss_kib("Rss: 7 kB\nPss:   5 kB\nPss_Dirty: 3 kB\n"),
            Some(5)
        );
        assert_eq!(pss_kib(""), None);
    }
}
