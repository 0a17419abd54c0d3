//! `sandboxd` with directories and a port of its own, and its sandboxes over REST.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::PATIENCE;
use crate::http::{Request, Response};
use crate::log::print_tail;
use crate::process::{Process, children_of, innermost, with_argument};
use crate::setup::{scratch, setup};

/// A running daemon. Dropping it asks it to end, and fails the scenario if it does not end well.
pub struct Daemon {
    /// The process.
    pub process: Process,
    address: SocketAddr,
    /// Shared with the daemon that comes after this one.
    directory: Arc<TempDir>,
    data: PathBuf,
    arguments: Vec<String>,
}

/// What the daemon holds on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    processes: Vec<u32>,
    files: BTreeSet<PathBuf>,
    sockets: BTreeSet<String>,
    interfaces: BTreeSet<String>,
    descriptors: usize,
    sandboxes: Vec<Value>,
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    ///
    /// # Panics
    /// It does not.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a daemon with more arguments, and waits until it serves.
    ///
    /// # Panics
    /// It does not.
    pub fn start_with(arguments: &[&str]) -> Self {
        let directory = scratch();
        let data = directory.path().join("data");
        Self::start_first(directory, data, arguments)
    }

    /// The same, with its data in this directory.
    ///
    /// # Panics
    /// It does not.
    pub fn start_on(data: &Path, arguments: &[&str]) -> Self {
        Self::start_first(scratch(), data.to_owned(), arguments)
    }

    fn start_first(directory: TempDir, data: PathBuf, arguments: &[&str]) -> Self {
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        Self::start_in(Arc::new(directory), data, arguments.collect())
    }

    /// Kills the daemon, and starts another one in its place.
    ///
    /// # Panics
    /// That does not start.
    pub fn crash(mut self) -> Self {
        self.process.signal(Signal::KILL);
        self.process.wait();
        let directory = Arc::clone(&self.directory);
        Self::start_in(directory, self.data.clone(), self.arguments.clone())
    }

    fn start_in(directory: Arc<TempDir>, data: PathBuf, arguments: Vec<String>) -> Self {
        let mut command = Command::new(&setup().sandboxd);
        command
            .arg("serve")
            .args(["--listen", "127.0.0.1:0", "--log-format", "json"])
            .args(["--log", "info,api=debug", "--boot-timeout-sec", "120"])
            .arg("--data-dir")
            .arg(&data)
            .arg("--runtime-dir")
            .arg(directory.path().join("run"))
            .arg("--vmm")
            .arg(&setup().vmm)
            .arg("--images-dir")
            .arg(&setup().images)
            .args(&arguments)
            .env_remove("SANDBOXD_CONFIG")
            // What boots in the background, and what it leaves, is asked for by argument.
            .env("SANDBOXD_WARM_DISK_BYTES", "0")
            .env("SANDBOXD_ON_STOP", "delete")
            // Daemons of different scenarios run side by side, and would share one bridge.
            .env("SANDBOXD_NETWORK", "off")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let process = Process::spawn("sandboxd", command, &[]);
        let field = |line: &str, name: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let field = line.get(name).or_else(|| line["fields"].get(name));
            Some(field?.as_str()?.to_owned())
        };
        let address = process.stderr.wait_for_line("its address", |line| {
            (field(line, "message")? == "listening").then_some(())?;
            field(line, "address")?.parse().ok()
        });
        process.stderr.wait_for_line("that it is ready", |line| {
            (field(line, "message")? == "sandboxd is ready").then_some(())
        });
        Self {
            process,
            address,
            directory,
            data,
            arguments,
        }
    }

    /// Where it serves.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("a connection to the daemon");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The answer to a request.
    ///
    /// # Panics
    /// There is none.
    pub fn send(&self, request: Request, body: impl Read, length: u64) -> Response<TcpStream> {
        request
            .send(self.connect(), body, length)
            .expect("an answer of the daemon")
    }

    /// The status and JSON of the answer to a request with a JSON body.
    ///
    /// # Panics
    /// There is none.
    pub fn call(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        let request = Request::new(method, path).header("Content-Type", "application/json");
        let response = self.send(request, body.as_bytes(), body.len() as u64);
        (response.status, response.json())
    }

    /// A request that must be refused with this status and code, and a sentence that has all of
    /// these words in it.
    ///
    /// # Panics
    /// It is not.
    pub fn refused(
        &self,
        (method, path, body): (&str, &str, &str),
        (status, code): (u16, &str),
        words: &[&str],
    ) {
        let (got, answer) = self.call(method, path, body);
        assert_refusal(
            &format!("{method} {path} {body}"),
            got,
            &answer,
            (status, code),
            words,
        );
    }

    /// Creates a sandbox.
    ///
    /// # Panics
    /// It is not created.
    pub fn create(&self, request: &Value) -> Sandbox<'_> {
        let (status, body) = self.call("POST", "/v1/sandboxes", &request.to_string());
        assert_eq!(status, 201, "{body}");
        assert_eq!(body["status"], "running", "{body}");
        Sandbox {
            id: body["id"].as_str().unwrap().to_owned(),
            daemon: self,
        }
    }

    /// The sandboxes that it lists.
    ///
    /// # Panics
    /// It does not.
    pub fn list(&self) -> Vec<Value> {
        let (status, body) = self.call("GET", "/v1/sandboxes", "");
        assert_eq!(status, 200, "{body}");
        body.as_array().unwrap().clone()
    }

    /// What `sandboxd template` with these arguments does with this daemon: its exit status, standard
    /// output, and standard error.
    ///
    /// # Panics
    /// It cannot be run.
    pub fn template(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        self.client(&[&["template"], arguments].concat(), b"")
    }

    /// What `sandboxd` with these arguments does as a client of this daemon, with this on standard
    /// input: its exit status, standard output, and standard error.
    ///
    /// # Panics
    /// It cannot be run.
    pub fn client(&self, arguments: &[&str], input: &[u8]) -> (Option<i32>, String, String) {
        let mut child = Command::new(&setup().sandboxd)
            .args(arguments)
            .env("MVS_HOST", self.address.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sandboxd as a client");
        let mut stdin = child.stdin.take().expect("standard input");
        let input = input.to_vec();
        // One that does not read all of it is no failure.
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().expect("sandboxd as a client");
        writer.join().expect("the input's writer");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    }

    /// What it holds on the host now.
    ///
    /// # Panics
    /// It cannot be asked.
    pub fn holdings(&self) -> Holdings {
        // Before the daemon's descriptors are counted, so that no connection is among them.
        let sandboxes = self.list();
        let mut files = BTreeSet::new();
        files_below(self.directory.path(), &mut files);
        // The database's own files come and go.
        files.retain(|path| !path.to_string_lossy().contains("sandboxd.db"));
        let directory = self.directory.path().to_string_lossy().into_owned();
        Holdings {
            processes: children_of(self.process.pid()),
            files,
            sockets: lines_with("/proc/net/unix", &directory),
            interfaces: interfaces(),
            descriptors: self.settled_descriptors(),
            sandboxes,
        }
    }

    /// How many descriptors the daemon has open, but for connections of its callers.
    fn settled_descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.process.pid());
        let entries = std::fs::read_dir(directory).unwrap().flatten();
        let targets = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let tcp = tcp_connections();
        targets
            .filter(|target| !tcp.contains(target.to_string_lossy().as_ref()))
            .count()
    }

    /// Asks it to end, and checks that it does so with status 0 and leaves nothing behind but what is
    /// kept.
    ///
    /// # Panics
    /// It does not.
    pub fn stop(&mut self) {
        let children = children_of(self.process.pid());
        self.process.signal(Signal::TERM);
        assert_eq!(self.process.exit_code(), 0, "exit status of sandboxd");
        for child in children {
            assert!(
                !Path::new(&format!("/proc/{child}")).exists(),
                "process {child} outlives the daemon"
            );
        }
        let mut files = BTreeSet::new();
        files_below(self.directory.path(), &mut files);
        files.retain(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // Templates are made of layers, and of empty file systems.
            let empty = self.directory.path().join("data/empty");
            let is_own = ["sandboxd.", "audit.", "token.key"]
                .iter()
                .any(|own| name.starts_with(own));
            !is_own && !path.starts_with(self.layers_directory()) && !path.starts_with(empty)
        });
        assert!(files.is_empty(), "left behind: {files:?}");
    }

    /// Where it keeps what was saved.
    pub fn layers_directory(&self) -> PathBuf {
        self.directory.path().join("data/layers")
    }

    /// The names of the layers that it keeps.
    ///
    /// # Panics
    /// They cannot be listed.
    pub fn layers(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.layers_directory()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// The sandbox of this id.
    pub fn sandbox(&self, id: &str) -> Sandbox<'_> {
        Sandbox {
            id: id.to_owned(),
            daemon: self,
        }
    }

    /// Where it keeps the sockets and console of a sandbox.
    pub fn runtime_directory(&self, id: &str) -> PathBuf {
        self.directory.path().join("run/sandboxes").join(id)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let consoles = std::fs::read_dir(self.directory.path().join("run/sandboxes"));
            for sandbox in consoles.into_iter().flatten().flatten() {
                let console = std::fs::read(sandbox.path().join("console.log"));
                let name = format!("the console of {}", sandbox.file_name().display());
                print_tail(
                    &name,
                    &String::from_utf8_lossy(&console.unwrap_or_default()),
                );
            }
            // It must not leave guests running, which a kill would.
            let _ = rustix::process::kill_process(
                rustix::process::Pid::from_raw(self.process.pid().cast_signed()).unwrap(),
                Signal::TERM,
            );
            crate::process::wait_readable(&[self.process.pidfd()]);
        } else if !self.process.has_ended() {
            self.stop();
        }
    }
}

/// Checks an error answer.
///
/// # Panics
/// It is another.
pub fn assert_refusal(
    what: &str,
    got: u16,
    answer: &Value,
    (status, code): (u16, &str),
    words: &[&str],
) {
    assert_eq!(got, status, "{what}: {answer}");
    assert_eq!(answer["error"]["code"], code, "{what}: {answer}");
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    for word in words {
        assert!(message.contains(word), "{what}: no {word:?} in {message:?}");
    }
}

/// The files below a directory, without the directories.
fn files_below(directory: &Path, files: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => {
                let before = files.len();
                files_below(&entry.path(), files);
                // A sandbox's directory is itself something that is left behind.
                if files.len() == before && is_of_sandbox(&entry.path()) {
                    files.insert(entry.path());
                }
            }
            Ok(_) => drop(files.insert(entry.path())),
            // It went away in the meantime.
            Err(_) => {}
        }
    }
}

fn is_of_sandbox(directory: &Path) -> bool {
    let name = directory.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with("sb-")
}

fn lines_with(path: &str, text: &str) -> BTreeSet<String> {
    let lines = std::fs::read_to_string(path).unwrap();
    let found = lines.lines().filter(|line| line.contains(text));
    // The path, which is last; numbers before it differ from time to time.
    found
        .filter_map(|line| line.split_whitespace().last().map(str::to_owned))
        .collect()
}

fn interfaces() -> BTreeSet<String> {
    let entries = std::fs::read_dir("/sys/class/net").unwrap().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Inodes of TCP sockets that are connected, as `socket:[INODE]`.
fn tcp_connections() -> BTreeSet<String> {
    // proc_net_tcp: the state is field 3, and 0A is listening; the inode is field 9.
    const LISTENING: &str = "0A";
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let rows = table
        .lines()
        .skip(1)
        .map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.filter(|row| row.get(3).is_some_and(|state| *state != LISTENING))
        .filter_map(|row| row.get(9).map(|inode| format!("socket:[{inode}]")))
        .collect()
}

/// A sandbox.
pub struct Sandbox<'a> {
    /// Its id.
    pub id: String,
    daemon: &'a Daemon,
}

impl Sandbox<'_> {
    /// The path of one of its operations.
    pub fn path(&self, operation: &str) -> String {
        format!("/v1/sandboxes/{}{operation}", self.id)
    }

    /// Its record.
    ///
    /// # Panics
    /// There is none.
    pub fn get(&self) -> Value {
        let (status, body) = self.daemon.call("GET", &self.path(""), "");
        assert_eq!(status, 200, "{body}");
        body
    }

    /// The status and body of the answer to an exec.
    ///
    /// # Panics
    /// There is none.
    pub fn try_exec(&self, argv: &[&str], timeout_sec: u32) -> (u16, Value) {
        let body = json!({"cmd": argv[0], "args": argv[1..], "timeout_sec": timeout_sec});
        self.daemon
            .call("POST", &self.path("/exec"), &body.to_string())
    }

    /// What a command gave.
    ///
    /// # Panics
    /// It did not run.
    pub fn exec(&self, argv: &[&str]) -> Value {
        let (status, body) = self.try_exec(argv, 120);
        assert_eq!(status, 200, "{argv:?}: {body}");
        body
    }

    /// The output of a shell script that must succeed, without white space around it.
    ///
    /// # Panics
    /// It does not succeed.
    pub fn must(&self, script: &str) -> String {
        let body = self.exec(&["sh", "-c", script]);
        assert_eq!(body["exit_code"], 0, "{script}: {body}");
        body["stdout"].as_str().unwrap().trim().to_owned()
    }

    /// Uploads a file, and returns the status and body of the answer.
    ///
    /// # Panics
    /// There is none.
    pub fn upload(&self, path: &str, content: impl Read, length: u64) -> (u16, Value) {
        const BOUNDARY: &str = "----boundary-of-the-test";
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"path\"\r\n\r\n{path}\r\n\
             --{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        let end = format!("\r\n--{BOUNDARY}--\r\n");
        let total = head.len() as u64 + length + end.len() as u64;
        let form = head
            .as_bytes()
            .chain(content.take(length))
            .chain(end.as_bytes());
        let request = Request::new("POST", &self.path("/files/write")).header(
            "Content-Type",
            &format!("multipart/form-data; boundary={BOUNDARY}"),
        );
        let response = self.daemon.send(request, form, total);
        (response.status, response.json())
    }

    /// Downloads a file.
    ///
    /// # Panics
    /// There is no answer.
    pub fn download(&self, path: &str) -> Response<TcpStream> {
        let body = json!({ "path": path }).to_string();
        let request = Request::new("POST", &self.path("/files/read"))
            .header("Content-Type", "application/json");
        self.daemon
            .send(request, body.as_bytes(), body.len() as u64)
    }

    /// The id of the process that runs its guest.
    ///
    /// # Panics
    /// There is none.
    pub fn vmm_pid(&self) -> u32 {
        innermost(self.outer_pid())
    }

    /// The id of its process that the daemon, or an earlier one, has started.
    ///
    /// # Panics
    /// There is none.
    pub fn outer_pid(&self) -> u32 {
        self.find_outer_pid().expect("its vmm process")
    }

    /// The same, if there is one.
    pub fn find_outer_pid(&self) -> Option<u32> {
        let socket = format!("/{}/vsock.sock", self.id);
        with_argument(&socket).first().copied()
    }

    /// Deletes it.
    ///
    /// # Panics
    /// The daemon refuses.
    pub fn delete(&self) {
        let response = self
            .daemon
            .send(Request::new("DELETE", &self.path("")), io::empty(), 0);
        assert_eq!(response.status, 204);
        assert_eq!(response.bytes(), b"");
    }

    /// Pauses it.
    ///
    /// # Panics
    /// It is not paused.
    pub fn pause(&self) {
        let (status, body) = self.daemon.call("POST", &self.path("/pause"), "");
        assert_eq!((status, &body["status"]), (200, &json!("paused")), "{body}");
    }

    /// Resumes it, and returns its record.
    ///
    /// # Panics
    /// It is not resumed.
    pub fn resume(&self) -> Value {
        let (status, body) = self.daemon.call("POST", &self.path("/resume"), "");
        assert_eq!(
            (status, &body["status"]),
            (200, &json!("running")),
            "{body}"
        );
        body
    }

    /// Reads its record again and again until it is no longer `running`, and returns that.
    ///
    /// # Panics
    /// It goes on running.
    pub fn ended(&self) -> Value {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            let record = self.get();
            if record["status"] != "running" {
                return record;
            }
            assert!(
                std::time::Instant::now() < deadline,
                "still running: {record}"
            );
        }
    }
}
