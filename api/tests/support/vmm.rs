//! A program that stands in for the VMM: it is started with the same arguments, inherits the same
//! descriptors, tells the same events, takes the same requests, and writes and reads snapshots, but
//! its guest is the real agent on this machine.
//!
//! It is the test program itself, started by a script ([`install`]) to run one test only, which calls
//! [`run`]. What it is to do wrong, and what it was asked for, are files in one directory.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

pub mod executable;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::Signal;

/// The part of the script that merges disks: a line of what it was given, and then what the layers
/// hold, the topmost first.
const MERGE: &str = r#"if [ "$1" = merge-disk ]; then
    dir=${0%/*} layers=()
    while shift && (($#)); do
        case $1 in
        --size) size=$2 ;;
        --output) output=$2 ;;
        --layer) layers+=("$2") ;;
        esac
    done
    echo "merge ${#layers[@]} $size" >>"$dir/log"
    [ ! -p "$dir/no-merge" ] || read -r <"$dir/no-merge"
    [ ! -e "$dir/no-merge" ] || { echo "vmm: layer 0 from the top is damaged" >&2; exit 1; }
    for layer in "${layers[@]}"; do /bin/cat "/proc/self/fd/$layer" >&"$output"; done
    exit 0
fi
"#;

/// Writes the script `DIR/vmm`, which starts this program as a VMM by its test `test`.
pub fn install(dir: &Path, test: &str, agent: &Path) -> PathBuf {
    let script = format!(
        "#!/bin/bash\n{MERGE}for argument; do case $argument in cid=3,*) name=$argument;; esac; done\n\
         echo $$ >> {0}/pid\n\
         export FAKE_VMM_DIR={0} FAKE_VMM_AGENT={1} FAKE_VMM_ARGS=$(/usr/bin/printf '%s\\n' \"$@\")\n\
         exec -a \"$name\" {2} --exact {test} --nocapture --test-threads=1\n",
        dir.display(),
        agent.display(),
        std::env::current_exe().unwrap().display(),
    );
    executable::write(&dir.join("vmm"), &script)
}

/// Is a VMM, if this program was started as one; does not return then.
pub fn run() {
    let Ok(arguments) = std::env::var("FAKE_VMM_ARGS") else {
        return;
    };
    let mut words = arguments.lines();
    let mut values = HashMap::new();
    while let Some(flag) = words.next() {
        values.insert(flag.to_owned(), words.next().unwrap().to_owned());
    }
    if !values.contains_key("--event-monitor") {
        tell_who(&values["--api-socket"]);
    }
    let status = Vmm::new(values).run();
    std::process::exit(status);
}

/// Is a VMM without a machine, which tells who it is and nothing else.
fn tell_who(api: &str) -> ! {
    for stream in UnixListener::from(inherited(api)).incoming() {
        let mut stream = stream.unwrap();
        let (request, _) = receive(&mut stream);
        assert!(request.starts_with("GET /api/v1/vmm.ping "), "{request}");
        let body = r#"{"build_version":"vmm 9.9","version":"54.0","pid":1,"features":["kvm"]}"#;
        answer_with(&mut stream, body);
    }
    std::process::exit(0)
}

/// Answers with this JSON.
fn answer_with(stream: &mut UnixStream, body: &str) {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}", body.len());
    let _ = write!(stream, "{head}\r\n\r\n{body}");
}

struct Vmm {
    dir: PathBuf,
    values: HashMap<String, String>,
    events: File,
    /// What its memory holds: a line for each generation.
    memory: Vec<String>,
    paused: bool,
    /// The disk that it writes to.
    disk: u64,
}

impl Vmm {
    fn new(values: HashMap<String, String>) -> Self {
        let dir = PathBuf::from(std::env::var_os("FAKE_VMM_DIR").unwrap());
        Self {
            dir,
            events: File::from(inherited(&values["--event-monitor"])),
            values,
            memory: Vec::new(),
            paused: false,
            disk: 0,
        }
    }

    /// Waits at this point for as long as there is a FIFO for it that nobody has opened to write.
    fn may_stop(&self, point: &str) {
        if self.has(point) {
            let _ = fs::read(self.dir.join(point));
        }
    }

    fn event(&mut self, event: &str) {
        writeln!(
            self.events,
            "{{\"timestamp_us\":1500,\"event\":\"{event}\"}}"
        )
        .unwrap();
    }

    /// Whether it is to do this wrong.
    fn has(&self, what: &str) -> bool {
        self.dir.join(what).exists()
    }

    fn log(&self, line: &str) {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("log"));
        writeln!(log.unwrap(), "{line}").unwrap();
    }

    fn run(mut self) -> i32 {
        let api = UnixListener::from(inherited(&self.values["--api-socket"]));
        let vsock = PathBuf::from(
            self.values["--vsock"]
                .strip_prefix("cid=3,socket=")
                .unwrap(),
        );
        let images = images(&self.values["--disk"]);
        for image in &images {
            assert!(image.exists(), "{image:?}");
        }
        self.disk = fs::metadata(&images[0]).unwrap().ino();
        self.may_stop("stop-at-start");
        if let Some(options) = self.values.get("--restore").cloned() {
            fs::write(self.dir.join("restore"), &options).unwrap();
            if self.has("refuse-restore") {
                eprintln!("the snapshot is of another processor");
                return 2;
            }
            self.memory = layers(&options)
                .iter()
                .flat_map(|layer| {
                    let memory = fs::read_to_string(layer.join("memory-ranges")).unwrap();
                    memory.lines().map(str::to_owned).collect::<Vec<_>>()
                })
                .collect();
            self.log(&format!("restore {}", self.memory.join(" ")));
            if !self.has("mute") {
                serve_agent(&self.dir, &vsock);
            }
            self.event("restored");
            self.paused = options.contains(",resume=off");
            if !self.paused {
                self.event("resumed");
            }
        } else {
            self.log("boot");
            if self.has("hang-boot") {
                let _ = fs::read(self.dir.join("hang-boot"));
            }
            self.event("booting");
            serve_agent(&self.dir, &vsock);
            let ready = UnixStream::connect(format!("{}_1025", vsock.display()));
            let words = r#"{"version":"1","kernel":"6","entered_us":1,"serving_us":2}"#;
            writeln!(ready.unwrap(), "{words}").unwrap();
        }
        for stream in api.incoming() {
            self.answer(stream.unwrap());
        }
        0
    }

    fn answer(&mut self, mut stream: UnixStream) {
        let (request, files) = receive(&mut stream);
        let Some((head, body)) = request.split_once("\r\n\r\n") else {
            // Who wanted to ask has ended.
            return;
        };
        let path = head.split(' ').nth(1).unwrap();
        let what = path.strip_prefix("/api/v1/").unwrap();
        if what == "vm.info" {
            let state = if self.paused { "Paused" } else { "Running" };
            let body = serde_json::json!({ "state": state, "disk": self.disk }).to_string();
            answer_with(&mut stream, &body);
            return;
        }
        if what == "vm.counters" {
            self.may_stop("stop-before-vm.counters");
            let disk = r#""_disk0":{"read_ops":1,"read_bytes":512}"#;
            let card =
                r#","_net2":{"rx_bytes":1000,"rx_frames":10,"tx_bytes":2000,"tx_frames":20}"#;
            let card = if self.has("card") { card } else { "" };
            let memory = r#","__mem":{"requested_bytes":2,"plugged_bytes":2}"#;
            answer_with(&mut stream, &format!("{{{disk}{card}{memory}}}"));
            return;
        }
        self.log(&format!("{what} {body} {}", files.len()));
        self.may_stop(&format!("stop-before-{what}"));
        let result = match what {
            "vm.pause" if self.has("no-pause") => Err("a device does not stop".to_owned()),
            "vm.pause" => self.set_paused(true),
            "vm.resume" if self.has("no-resume") => Err("a device does not start".to_owned()),
            "vm.resume" => self.set_paused(false),
            "vm.snapshot" => self.snapshot(body, files),
            "vm.working-set" if self.has("no-working-set") => {
                Err("the machine was not restored".to_owned())
            }
            "vm.working-set" => self.working_set(files),
            "vm.resize" if self.has("no-resize") => {
                Err("the machine has no memory to plug".to_owned())
            }
            "vm.resize" => Ok(()),
            "vm.replace-disk" => self.replace_disk(body, files),
            other => Err(format!("no {other}")),
        };
        self.may_stop(&format!("stop-after-{what}"));
        let answer = match result {
            Ok(()) => "HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n".to_owned(),
            Err(reason) => {
                let body = serde_json::json!(["Error from API", reason]).to_string();
                let length = body.len();
                format!("HTTP/1.1 500 x\r\nContent-Length: {length}\r\n\r\n{body}")
            }
        };
        // Whoever asked may be gone.
        let _ = stream.write_all(answer.as_bytes());
    }

    fn set_paused(&mut self, paused: bool) -> Result<(), String> {
        if self.paused == paused {
            return Err("it is so already".to_owned());
        }
        self.paused = paused;
        self.event(if paused { "paused" } else { "resumed" });
        Ok(())
    }

    fn snapshot(&mut self, body: &str, files: Vec<OwnedFd>) -> Result<(), String> {
        if !self.paused {
            return Err("it runs".to_owned());
        }
        if self.has("die") {
            std::process::exit(1);
        }
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let keep = usize::try_from(body["keep_base_layers"].as_u64().unwrap()).unwrap();
        assert!(keep <= self.memory.len() && (3..=4).contains(&files.len()));
        let goes_on = files.len() == 4;
        let mut files: Vec<File> = files.into_iter().take(3).map(File::from).collect();
        for file in &files {
            let metadata = file.metadata().unwrap();
            assert!(metadata.is_file() && metadata.len() == 0);
        }
        files[0].write_all(b"{}").unwrap();
        if self.has("no-space") {
            return Err("No space left on device (os error 28)".to_owned());
        }
        if self.has("hang") {
            // Opening it waits for a writer.
            let _ = fs::read(self.dir.join("hang"));
        }
        // What differs from the kept ones, as one line a layer.
        let generation = format!("{}+{}", self.memory.len(), keep);
        files[1].write_all(b"state").unwrap();
        writeln!(files[2], "{generation}").unwrap();
        for file in &files {
            file.sync_all().unwrap();
        }
        if goes_on {
            self.memory.truncate(keep);
            self.memory.push(generation);
        }
        Ok(())
    }

    fn working_set(&mut self, files: Vec<OwnedFd>) -> Result<(), String> {
        let mut files = files.into_iter().map(File::from);
        let (mut file, none) = (files.next().unwrap(), files.next());
        assert!(none.is_none() && file.metadata().unwrap().len() == 0);
        file.write_all(b"pages").unwrap();
        Ok(())
    }

    fn replace_disk(&mut self, body: &str, files: Vec<OwnedFd>) -> Result<(), String> {
        if self.has("no-replace") {
            return Err("the new image has another size".to_owned());
        }
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let types = body["image_types"].as_array().unwrap();
        assert!(self.paused && types.len() == files.len() && body["id"] == "_disk0");
        let (last, others) = types.split_last().unwrap();
        assert!(last == "Raw" && others.iter().all(|kind| kind == "Qcow2"));
        self.disk = File::from(files[0].try_clone().unwrap())
            .metadata()
            .unwrap()
            .ino();
        for (index, file) in files.into_iter().enumerate() {
            let mode = rustix::fs::fcntl_getfl(&file).unwrap() & rustix::fs::OFlags::RWMODE;
            let expected = match index {
                0 => rustix::fs::OFlags::RDWR,
                _ => rustix::fs::OFlags::RDONLY,
            };
            assert_eq!(mode, expected);
        }
        Ok(())
    }
}

fn inherited(value: &str) -> OwnedFd {
    let number = value.strip_prefix("fd=").unwrap().parse().unwrap();
    // SAFETY: the daemon passes this descriptor for this purpose, and it is taken once.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// The images of a disk: the overlay, and those that it builds on.
fn images(options: &str) -> Vec<PathBuf> {
    let (path, rest) = options
        .strip_prefix("path=")
        .unwrap()
        .split_once(',')
        .unwrap();
    let below = rest.strip_prefix("image_type=qcow2,backing=[").unwrap();
    let below = below.strip_suffix(']').unwrap().split(',');
    let below = below.map(|image| image.split_once(':').unwrap().1.into());
    std::iter::once(path.into()).chain(below).collect()
}

/// The directories of a snapshot and those that it is based on, bottom first.
fn layers(options: &str) -> Vec<PathBuf> {
    let options = options.strip_suffix(",resume=off").unwrap_or(options);
    let options = options
        .strip_suffix(",prefault=working-set")
        .unwrap_or(options);
    let options = options.strip_suffix(",config=flags").unwrap();
    let options = options.replace("source_url=", "").replace("base_url=[", "");
    let options = options.trim_end_matches(']').split(',');
    let mut layers: Vec<PathBuf> = options
        .map(|url| url.strip_prefix("file://").unwrap().into())
        .collect();
    layers.reverse();
    layers
}

/// Reads a request and the descriptors at its first bytes.
fn receive(stream: &mut UnixStream) -> (String, Vec<OwnedFd>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; 4096];
    let received = recvmsg(
        &*stream,
        &mut [IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    );
    // The daemon writes a request at once, and none is longer.
    bytes.truncate(received.unwrap().bytes);
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    (String::from_utf8(bytes).unwrap(), files)
}

/// Starts the real agent, and carries connections to it as a VMM does. It ends with this process.
#[expect(
    clippy::zombie_processes,
    reason = "it ends with this process, not before"
)]
fn serve_agent(dir: &Path, vsock: &Path) {
    let socket = vsock.with_extension("agent");
    let mut agent = Command::new(std::env::var_os("FAKE_VMM_AGENT").unwrap());
    agent
        .arg("--listen")
        .arg(format!("unix:{}", socket.display()))
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // SAFETY: prctl(2) is async-signal-safe.
    unsafe {
        agent.pre_exec(|| {
            Ok(rustix::process::set_parent_process_death_signal(Some(
                Signal::KILL,
            ))?)
        });
    }
    let mut agent = agent.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(agent.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let listener = UnixListener::bind(vsock).unwrap();
    let dir = dir.to_owned();
    thread::spawn(move || {
        for host in listener.incoming() {
            let (mut host, socket, dir) = (host.unwrap(), socket.clone(), dir.clone());
            thread::spawn(move || {
                let mut line = [0; b"CONNECT 1024\n".len()];
                host.read_exact(&mut line).unwrap();
                assert_eq!(&line, b"CONNECT 1024\n");
                host.write_all(b"OK 1073741824\n").unwrap();
                if fs::remove_file(dir.join("break-off")).is_ok() {
                    return;
                }
                let guest = UnixStream::connect(socket).unwrap();
                let (up, down) = (
                    (host.try_clone().unwrap(), guest.try_clone().unwrap()),
                    (guest, host),
                );
                let carry = |(mut from, mut to): (UnixStream, UnixStream)| {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                };
                let other = thread::spawn(move || carry(up));
                carry(down);
                other.join().unwrap();
            });
        }
    });
}
