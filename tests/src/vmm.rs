//! One `vmm` process and its guest.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use agent_protocol::{READY_PORT, Ready};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::Agent;
use crate::images::write_qcow2_overlay;
use crate::log::{Log, print_tail};
use crate::process::{Process, innermost, wait_readable};
use crate::setup::{scratch, setup};
use crate::vmm_api::VmmApi;

/// Memory of the default machine, in MiB.
const DEFAULT_MIB: u64 = 256;

/// What to start. By default our kernel with the agent's initramfs, on an overlay of template
/// `minimal`, with one vCPU and 256 MiB.
pub struct Machine {
    directory: TempDir,
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    cmdline: String,
    cpus: String,
    memory: String,
    disks: Vec<String>,
    arguments: Vec<String>,
    serial: Option<String>,
    terminal: Option<OwnedFd>,
    jailed: bool,
    api: Option<ApiSocket>,
    restore: Option<String>,
}

/// How a VMM gets the socket of its API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApiSocket {
    /// It makes it, by its path.
    Path,
    /// It inherits it, so that the first client need not wait for it.
    Inherited,
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// The default machine.
    pub fn new() -> Self {
        let directory = scratch();
        let root = directory.path().join("root.qcow2");
        write_qcow2_overlay(&root, &setup().template());
        let root = format!("path={},image_type=qcow2,backing_files=on", root.display());
        let mut machine = Self::without_disk();
        machine.directory = directory;
        machine.disks.push(root);
        machine
            .cmdline
            .push_str(" root=/dev/vda rootfstype=ext4 rw");
        machine
    }

    /// The default machine with no disk: its agent stays in the initramfs, which holds no other
    /// program.
    pub fn without_disk() -> Self {
        Self {
            directory: scratch(),
            kernel: setup().kernel(),
            initramfs: Some(setup().initramfs()),
            cmdline: "console=ttyS0 loglevel=6 panic=1 random.trust_cpu=on".to_owned(),
            cpus: "boot=1".to_owned(),
            memory: format!("size={DEFAULT_MIB}M"),
            disks: Vec::new(),
            arguments: Vec::new(),
            serial: None,
            terminal: None,
            jailed: false,
            api: None,
            restore: None,
        }
    }

    /// A directory that goes away with the machine.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Another kernel.
    #[must_use]
    pub fn kernel(mut self, path: impl Into<PathBuf>) -> Self {
        self.kernel = path.into();
        self
    }

    /// Another initramfs, or none.
    #[must_use]
    pub fn initramfs(mut self, path: Option<PathBuf>) -> Self {
        self.initramfs = path;
        self
    }

    /// The value of `--cpus`.
    #[must_use]
    pub fn cpus(mut self, cpus: &str) -> Self {
        cpus.clone_into(&mut self.cpus);
        self
    }

    /// One more parameter on the kernel's command line.
    #[must_use]
    pub fn kernel_parameter(mut self, parameter: &str) -> Self {
        self.cmdline.push(' ');
        self.cmdline.push_str(parameter);
        self
    }

    /// The value of `--memory`.
    #[must_use]
    pub fn memory(mut self, memory: &str) -> Self {
        memory.clone_into(&mut self.memory);
        self
    }

    /// One more disk, as the value of `--disk`.
    #[must_use]
    pub fn disk(mut self, disk: String) -> Self {
        self.disks.push(disk);
        self
    }

    /// More arguments.
    #[must_use]
    pub fn arguments(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// In a jail.
    #[must_use]
    pub fn jailed(mut self) -> Self {
        self.jailed = true;
        self
    }

    /// With an API, at [`Vmm::api`].
    #[must_use]
    pub fn api(mut self, socket: ApiSocket) -> Self {
        self.api = Some(socket);
        self
    }

    /// Goes on from a snapshot instead of booting: the value of `--restore` but for `config=flags`.
    #[must_use]
    pub fn restore(mut self, options: &str) -> Self {
        self.restore = Some(format!("{options},config=flags"));
        self
    }

    /// The serial console on a terminal, which becomes the process's own.
    #[must_use]
    pub fn terminal(mut self, terminal: OwnedFd) -> Self {
        self.serial = Some("tty".to_owned());
        self.terminal = Some(terminal);
        self
    }

    /// Starts the process.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(self) -> Vmm {
        let mut arguments: Vec<String> = Vec::new();
        let mut give = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        if let Some(restore) = &self.restore {
            give("--restore", restore.clone());
        } else {
            give("--kernel", self.kernel.display().to_string());
            if let Some(initramfs) = &self.initramfs {
                give("--initramfs", initramfs.display().to_string());
            }
            give("--cmdline", self.cmdline.clone());
        }
        give("--cpus", self.cpus.clone());
        give("--memory", self.memory.clone());
        let console = self.directory.path().join("console.log");
        let serial = self.serial.clone();
        give(
            "--serial",
            serial.unwrap_or_else(|| format!("file={}", console.display())),
        );
        give("--console", "off".to_owned());
        let socket = self.directory.path().join("vsock.sock");
        give("--vsock", format!("cid=3,socket={}", socket.display()));
        for disk in &self.disks {
            give("--disk", disk.clone());
        }
        self.spawn(arguments)
    }

    /// Starts the process with nothing but its API, at [`Vmm::api`].
    ///
    /// # Panics
    /// It cannot be started.
    pub fn serve(self) -> Vmm {
        self.api(ApiSocket::Inherited).spawn(Vec::new())
    }

    /// The machine as a body of `vm.create`.
    ///
    /// # Panics
    /// It has more than one vCPU.
    pub fn config(&self) -> Value {
        assert_eq!(self.cpus, "boot=1");
        let directory = self.directory.path();
        let disks: Vec<Value> = self.disks.iter().map(|disk| disk_config(disk)).collect();
        json!({
            "memory": {"size": DEFAULT_MIB << 20},
            "payload": {
                "kernel": self.kernel,
                "initramfs": self.initramfs,
                "cmdline": self.cmdline,
            },
            "disks": disks,
            "serial": {"mode": "File", "file": directory.join("console.log")},
            "console": {"mode": "Off"},
            "vsock": {"cid": 3, "socket": directory.join("vsock.sock")},
        })
    }

    fn spawn(self, mut arguments: Vec<String>) -> Vmm {
        let directory = self.directory;
        let socket = directory.path().join("vsock.sock");
        let ready = directory.path().join(format!("vsock.sock_{READY_PORT}"));
        let listener = UnixListener::bind(&ready).unwrap();
        if self.jailed {
            // The jailed user must find the sockets of host programs.
            set_mode(directory.path(), 0o711);
            set_mode(&ready, 0o666);
        }
        let (events, event_writer) = rustix::pipe::pipe().unwrap();
        rustix::io::fcntl_setfd(&events, rustix::io::FdFlags::CLOEXEC).unwrap();
        rustix::io::fcntl_setfd(&event_writer, rustix::io::FdFlags::CLOEXEC).unwrap();
        let console = directory.path().join("console.log");
        let mut inherited = vec![event_writer.as_fd()];
        let api = directory.path().join("api.sock");
        let bound =
            (self.api == Some(ApiSocket::Inherited)).then(|| UnixListener::bind(&api).unwrap());
        if self.api.is_some() {
            let socket = match &bound {
                Some(socket) => format!("fd={}", socket.as_raw_fd()),
                None => format!("path={}", api.display()),
            };
            arguments.extend(["--api-socket".to_owned(), socket]);
            inherited.extend(bound.as_ref().map(AsFd::as_fd));
        }

        let mut command = Command::new(&setup().vmm);
        command
            .args(&arguments)
            .args([
                "--event-monitor",
                &format!("fd={}", event_writer.as_raw_fd()),
            ])
            .args(self.jailed.then_some("--jail"))
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if let Some(terminal) = self.terminal {
            take_terminal(&mut command, terminal);
        }
        let process = Process::spawn("vmm", command, &inherited);
        drop(event_writer);
        Vmm {
            process,
            agent: Agent::new(socket),
            events: Log::follow("the vmm's events", std::fs::File::from(events)),
            listener,
            console,
            directory,
        }
    }

    /// Starts the process and waits for its guest's agent.
    ///
    /// # Panics
    /// It does not come up.
    pub fn boot(self) -> Vmm {
        let mut vmm = self.start();
        vmm.ready();
        vmm
    }
}

/// The value of `--disk` as JSON: all that scenarios give is text or on.
fn disk_config(disk: &str) -> Value {
    let field = |field: &str| {
        let (name, value) = field.split_once('=').unwrap();
        let value = match (name, value) {
            ("image_type", "qcow2") => json!("Qcow2"),
            (_, "on") => json!(true),
            (_, value) => json!(value),
        };
        (name.to_owned(), value)
    };
    disk.split(',').map(field).collect()
}

/// Sets the permissions of a file.
///
/// # Panics
/// They cannot be set.
pub fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    let permissions = std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(path, permissions).unwrap();
}

/// Gives the process the terminal as its standard streams and as the one that controls it.
fn take_terminal(command: &mut Command, terminal: OwnedFd) {
    use std::os::unix::process::CommandExt;
    command
        .stdin(terminal.try_clone().unwrap())
        .stdout(terminal);
    // SAFETY: setsid(2) and ioctl(2) are async-signal-safe, and descriptor 0 is open then.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
}

/// A running `vmm` process. Dropping it kills it.
pub struct Vmm {
    /// The process.
    pub process: Process,
    agent: Agent,
    events: Log,
    listener: UnixListener,
    console: PathBuf,
    directory: TempDir,
}

impl Vmm {
    /// Waits for the agent's first words.
    ///
    /// # Panics
    /// The process ends before, or nothing comes.
    pub fn ready(&mut self) -> Ready {
        let listener = self.listener.as_fd().try_clone_to_owned().unwrap();
        match wait_readable(&[&listener, self.process.pidfd()]) {
            Some(0) => {}
            Some(_) => panic!(
                "the vmm ended before its guest was ready: {}",
                self.process.wait()
            ),
            None => panic!("the guest's agent says nothing"),
        }
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(crate::PATIENCE)).unwrap();
        let mut line = String::new();
        BufReader::new(stream.take(4096))
            .read_line(&mut line)
            .unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Waits until a machine from a snapshot runs.
    ///
    /// # Panics
    /// It does not.
    #[must_use]
    pub fn resumed(self) -> Self {
        self.events.wait_for("\"event\":\"resumed\"");
        self
    }

    /// The guest's agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The API of a process that has one ([`Machine::api`], [`Machine::serve`]).
    pub fn api(&self) -> VmmApi {
        VmmApi::new(self.directory.path().join("api.sock"))
    }

    /// A directory that goes away with the machine.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What the guest has written to its serial console.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The generation ID in the memory of a guest of default size, where ACPI tells the guest to
    /// look for it.
    ///
    /// # Panics
    /// ACPI does not tell, or the process does not have the guest's memory in one piece.
    pub fn generation_id(&self) -> u128 {
        let table = "/sys/firmware/acpi/tables/DSDT";
        let table = self.agent.read(table).unwrap().bytes();
        // ACPI 6.5, 20.2: the name and PackageOp; then the package's length, that it has two
        // elements, DWordPrefix, and the lower half of the address.
        let name = b"ADDR\x12";
        let at = table.windows(name.len()).position(|window| window == name);
        let package = &table[at.expect("a package ADDR") + name.len()..];
        assert_eq!(package[1..3], [2, 0x0c]);
        let address = u32::from_le_bytes(package[3..7].try_into().unwrap());
        let pid = innermost(self.process.pid());
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        // All of it, or the part of it that comes from a snapshot, where it has its place.
        let start = maps.lines().find_map(|line| {
            let mut fields = line.split_whitespace();
            let (start, end) = fields.next()?.split_once('-')?;
            let start = u64::from_str_radix(start, 16).ok()?;
            let size = u64::from_str_radix(end, 16).ok()? - start;
            let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
            let is_there = (offset..offset + size).contains(&u64::from(address));
            if line.ends_with("memory-ranges") && is_there {
                return Some(start - offset);
            }
            (size == DEFAULT_MIB << 20).then_some(start)
        });
        let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
        let mut id = [0; 16];
        let start = start.expect("the guest's memory in the process's");
        memory
            .read_exact_at(&mut id, start + u64::from(address))
            .unwrap();
        u128::from_le_bytes(id)
    }

    /// Its events, as they come.
    pub fn events(&self) -> &Log {
        &self.events
    }

    /// The events of a VMM that ends, by name.
    pub fn all_events(&self) -> Vec<(String, Value)> {
        let parse = |line: &str| {
            let event: Value = serde_json::from_str(line).unwrap();
            assert!(event["timestamp_us"].is_u64(), "{line}");
            (event["event"].as_str().unwrap().to_owned(), event)
        };
        self.events.whole_text().lines().map(parse).collect()
    }

    /// Waits for the process's end, and checks its exit status and its last event.
    ///
    /// # Panics
    /// They are others.
    pub fn expect_end(&mut self, code: i32, event: &str) {
        assert_eq!(self.process.exit_code(), code, "exit status");
        let events = self.all_events();
        let (last, body) = events.last().expect("an event");
        assert_eq!(last, event, "last event");
        assert!(
            body["reason"]
                .as_str()
                .is_some_and(|reason| !reason.is_empty()),
            "the last event gives no reason: {body}"
        );
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            print_tail("the guest's console", &self.console());
            self.events.print_tail();
        }
    }
}
