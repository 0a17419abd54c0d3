//! The jail from within: this program jails itself as the VMM does, tries what a guest that has
//! taken over its VMM would try, and tells what came of it.
//!
//! It is a program without the usual test harness, since only a process with one thread can be
//! jailed: each test starts it again, with the name of what to try.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test that cannot go on may panic"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmm::sandboxing::seccomp;
use vmm::sandboxing::{JailConfig, ThreadKind, enter};

/// What a test starts this program with.
const INSIDE: &str = "--inside";

/// The user that the tests jail to if they are root.
const UID: u32 = 0x7200_0000;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, flag, what, directory] = arguments.as_slice()
        && flag == INSIDE
    {
        inside(what, Path::new(directory));
        return;
    }
    let filters: Vec<&String> = arguments[1..]
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let tests: &[(&str, fn())] = &[
        ("nothing_of_the_host_is_in_reach", nothing_of_the_host),
        (
            "every_identity_and_privilege_is_gone",
            identity_and_privileges,
        ),
        ("host_programs_are_reached_in_one_directory", host_programs),
        ("what_is_not_on_the_list_ends_the_process", forbidden_calls),
        ("each_thread_is_narrowed_down", narrowed_threads),
        ("the_waiter_ends_as_the_process_ends", ends),
        ("signals_are_passed_on", signals),
        ("neither_outlives_the_other", deaths),
        ("without_root_too", without_root),
        ("a_host_without_namespaces_is_told", no_namespaces),
    ];
    for (name, test) in tests {
        if filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())) {
            print!("test {name} ... ");
            std::io::stdout().flush().unwrap();
            test();
            println!("ok");
        }
    }
}

// ---- outside ----

struct Inside {
    child: Child,
    directory: tempfile::TempDir,
}

impl Inside {
    fn start(what: &str) -> Self {
        Self::start_as(what, |_| {})
    }

    fn start_as(what: &str, change: impl FnOnce(&mut Command)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        if is_root() {
            std::os::unix::fs::chown(directory.path(), Some(0), Some(UID)).unwrap();
            let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o710);
            fs::set_permissions(directory.path(), mode).unwrap();
        }
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args([INSIDE, what])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        change(&mut command);
        Self {
            child: command.spawn().unwrap(),
            directory,
        }
    }

    /// Waits for the first line, which says that the process is jailed.
    fn up(&mut self) {
        let mut up = [0; 3];
        let stdout = self.child.stdout.as_mut().unwrap();
        if stdout.read_exact(&mut up).is_err() || &up != b"up\n" {
            let mut said = String::new();
            self.child
                .stderr
                .as_mut()
                .unwrap()
                .read_to_string(&mut said)
                .unwrap();
            panic!("not jailed: {said}");
        }
    }

    /// Waits until the waiter, which is jailed beside the process that says so, has taken its last step: its
    /// filter of system calls.
    fn waiter_confined(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = format!("/proc/{}/status", self.child.id());
        while field(&fs::read_to_string(&status).unwrap(), "Seccomp:") != "2" {
            assert!(Instant::now() < deadline, "the waiter has no filter");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What it has said at its end, by `name=value` lines.
    fn report(mut self) -> BTreeMap<String, String> {
        self.up();
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .map(|line| line.split_once('=').expect("name=value"))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// The jailed process itself, whose parent is the waiter.
    fn jailed(&self) -> u32 {
        let waiter = self.child.id();
        let children = fs::read_to_string(format!("/proc/{waiter}/task/{waiter}/children"));
        children.unwrap().trim().parse().expect("one child")
    }
}

fn is_root() -> bool {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap_or_else(|| panic!("no {name} in {status}"))
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

fn nothing_of_the_host() {
    // The file system alone, before any filter of system calls.
    let report = Inside::start("files").report();
    for (name, value) in &report {
        if name.starts_with("open ") || name.starts_with("write ") {
            assert!(
                value == "No such file or directory (os error 2)"
                    || value == "Permission denied (os error 13)"
                    || value == "Read-only file system (os error 30)",
                "{name}: {value}"
            );
        }
    }
    assert_eq!(report["/"], "vsock");
    assert_eq!(report["interfaces"], "lo");
    assert_eq!(report["pid"], "1");
    assert_eq!(report["kill"], "No such process (os error 3)");
    // The same through the filter.
    let report = Inside::start("files-filtered").report();
    for path in ["/etc/passwd", "/", "/dev/kvm", "/proc/self/status"] {
        assert_eq!(
            report[&format!("open {path}")],
            "Permission denied (os error 13)"
        );
    }
}

fn identity_and_privileges() {
    let mut inside = Inside::start("wait");
    inside.up();
    inside.waiter_confined();
    let own = if is_root() {
        UID
    } else {
        // SAFETY: takes nothing and cannot fail.
        unsafe { libc::getuid() }
    };
    for (what, pid) in [("waiter", inside.child.id()), ("vmm", inside.jailed())] {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let four = [own; 4].map(|id| id.to_string()).join(" ");
        assert_eq!(field(&status, "Uid:"), four, "{what}");
        if is_root() {
            assert_eq!(field(&status, "Gid:"), four, "{what}");
            assert_eq!(field(&status, "Groups:"), "", "{what}");
        }
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(&status, set), "0000000000000000", "{what} {set}");
        }
        assert_eq!(field(&status, "NoNewPrivs:"), "1", "{what}");
        assert_eq!(field(&status, "Seccomp:"), "2", "{what}");
        for namespace in ["user", "mnt", "net", "ipc", "uts", "cgroup"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
            assert_ne!(of(&pid.to_string()), of("self"), "{what} {namespace}");
        }
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        assert_eq!(field(&limits, "Max core file size"), "0 0 bytes", "{what}");
    }
    // The waiter holds standard error and one end of a pipe.
    let waiter = inside.child.id();
    let held = fs::read_dir(format!("/proc/{waiter}/fd")).unwrap().count();
    assert_eq!(held, 2);
    let root = fs::read_dir(format!("/proc/{}/root", inside.jailed())).unwrap();
    let names: Vec<_> = root.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["vsock"]);
    drop(inside.child.stdin.take());
    assert!(inside.child.wait().unwrap().success());
}

fn host_programs() {
    let directory = tempfile::tempdir().unwrap();
    let inside = Inside::start_as("connect", |_| {});
    drop(directory);
    let path = inside.directory.path().join("s_7");
    let listener = UnixListener::bind(&path).unwrap();
    let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
    fs::set_permissions(&path, mode).unwrap();
    let mut inside = inside;
    inside.up();
    inside
        .child
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"!")
        .unwrap();
    let mut said = String::new();
    listener
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(said, "hello");
    assert!(inside.child.wait().unwrap().success());
}

fn forbidden_calls() {
    for call in [
        "execve",
        "socket-inet",
        "ptrace",
        "mmap-exec",
        "fork",
        "mount",
        "unshare",
        "kvm-unknown",
    ] {
        let mut inside = Inside::start(call);
        inside.up();
        let output = inside.child.wait_with_output().unwrap();
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGSYS),
            "{call}: {output:?}"
        );
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("SIGSYS"), "{call}: {said}");
    }
}

fn narrowed_threads() {
    // What one kind of thread may do ends another.
    for (call, survives) in [
        ("vcpu-socket", false),
        ("loop-socket", true),
        ("io-socket", false),
        ("vcpu-pread", false),
        ("io-pread", true),
        ("api-kvm-create", false),
        ("loop-thread", true),
    ] {
        let mut inside = Inside::start(call);
        inside.up();
        let output = inside.child.wait_with_output().unwrap();
        assert_eq!(output.status.success(), survives, "{call}: {output:?}");
        if !survives {
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{call}");
        }
    }
}

fn ends() {
    let mut inside = Inside::start("exit-7");
    inside.up();
    assert_eq!(inside.child.wait().unwrap().code(), Some(7));
    let mut inside = Inside::start("crash");
    inside.up();
    assert_eq!(inside.child.wait().unwrap().signal(), Some(libc::SIGSEGV));
}

fn signals() {
    let mut inside = Inside::start("sigterm");
    inside.up();
    send(inside.child.id(), libc::SIGTERM);
    assert_eq!(inside.child.wait().unwrap().code(), Some(15));
    // At once, and with nothing left when the waiter is gone.
    let mut inside = Inside::start("wait");
    inside.up();
    let jailed = inside.jailed();
    send(inside.child.id(), libc::SIGQUIT);
    assert_eq!(inside.child.wait().unwrap().signal(), Some(libc::SIGQUIT));
    assert!(!Path::new(&format!("/proc/{jailed}")).exists());
}

fn deaths() {
    let mut inside = Inside::start("wait");
    inside.up();
    send(inside.jailed(), libc::SIGKILL);
    assert_eq!(inside.child.wait().unwrap().signal(), Some(libc::SIGKILL));
    let mut inside = Inside::start("wait");
    inside.up();
    inside.child.kill().unwrap();
    // The output ends with the last process that has it.
    let output = inside.child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(libc::SIGKILL));
}

fn without_root() {
    if !is_root() {
        return;
    }
    let mut inside = Inside::start_as("wait-own", |command| {
        command.uid(UID + 1).gid(UID + 1).current_dir("/");
    });
    inside.up();
    let status = fs::read_to_string(format!("/proc/{}/status", inside.jailed())).unwrap();
    assert_eq!(
        field(&status, "Uid:"),
        [UID + 1; 4].map(|id| id.to_string()).join(" ")
    );
    assert_eq!(field(&status, "CapBnd:"), "0000000000000000");
    drop(inside.child.stdin.take());
    assert!(inside.child.wait().unwrap().success());
}

fn no_namespaces() {
    // A user namespace in which no further one may be made.
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-current-user", "--keep-caps", "sh", "-c"])
        .arg("echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"")
        .arg(std::env::current_exe().unwrap())
        .args([INSIDE, "wait", "/"]);
    if is_root() {
        command.uid(UID + 1).gid(UID + 1);
    }
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("user.max_user_namespaces"), "{said}");
}

fn send(pid: u32, signal: i32) {
    // SAFETY: takes numbers only; the process is a child that has not been waited for, or its
    // child.
    assert_eq!(unsafe { libc::kill(pid.cast_signed(), signal) }, 0);
}

// ---- inside ----

fn inside(what: &str, directory: &Path) {
    let config = if is_root() {
        JailConfig {
            uid: Some(UID),
            ..JailConfig::default()
        }
    } else {
        JailConfig::default()
    };
    block_sigterm();
    let sockets = (what != "wait-own").then_some(directory);
    // Dropped at once: what the jail leaves open is not of interest here.
    let entered = if what == "files" {
        vmm::sandboxing::enter_unfiltered(&config, sockets)
    } else {
        enter(&config, sockets)
    };
    if let Err(error) = entered {
        eprintln!("{}", vmm::error_chain(&error));
        std::process::exit(1);
    }
    println!("up");
    let narrow = |kind| seccomp::apply(kind).unwrap();
    match what {
        "files" | "files-filtered" => try_files(what == "files"),
        "wait" | "wait-own" => drop(std::io::stdin().read(&mut [0])),
        "connect" => {
            narrow(ThreadKind::EventLoop);
            std::io::stdin().read_exact(&mut [0]).unwrap();
            UnixStream::connect("/vsock/s_7")
                .unwrap()
                .write_all(b"hello")
                .unwrap();
        }
        "execve" => drop(Command::new("/bin/true").exec()),
        "exit-7" => std::process::exit(7),
        // SAFETY: it is not: that is the point. The process is to die of it.
        "crash" => unsafe { std::ptr::null_mut::<u8>().write_volatile(1) },
        "sigterm" => wait_for_sigterm(),
        "vcpu-socket" => {
            narrow(ThreadKind::Vcpu);
            raw(libc::SYS_socket, [libc::AF_UNIX.into(), 1, 0]);
        }
        "loop-socket" => {
            narrow(ThreadKind::EventLoop);
            raw(libc::SYS_socket, [libc::AF_UNIX.into(), 1, 0]);
        }
        "io-socket" => {
            narrow(ThreadKind::Io);
            raw(libc::SYS_socket, [libc::AF_UNIX.into(), 1, 0]);
        }
        "vcpu-pread" => {
            narrow(ThreadKind::Vcpu);
            raw(libc::SYS_pread64, [0, 0, 0]);
        }
        "io-pread" => {
            narrow(ThreadKind::Io);
            raw(libc::SYS_pread64, [0, 0, 0]);
        }
        "api-kvm-create" => {
            narrow(ThreadKind::Api);
            raw(libc::SYS_ioctl, [0, 0xae01, 0]);
        }
        "loop-thread" => {
            narrow(ThreadKind::EventLoop);
            let thread = thread::Builder::new().name("io".into());
            let thread = thread.spawn(|| seccomp::apply(ThreadKind::Io).unwrap());
            thread.unwrap().join().unwrap();
        }
        "socket-inet" => raw(libc::SYS_socket, [libc::AF_INET.into(), 1, 0]),
        "ptrace" => raw(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0]),
        "mmap-exec" => {
            // SAFETY: a new mapping touches no other, and the filter ends the process before.
            unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
        }
        "fork" => raw(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]),
        "mount" => raw(libc::SYS_mount, [0, 0, 0]),
        "unshare" => raw(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]),
        "kvm-unknown" => raw(libc::SYS_ioctl, [0, 0xaeff, 0]),
        other => panic!("{other}?"),
    }
}

fn raw(call: libc::c_long, [a, b, c]: [libc::c_long; 3]) {
    // SAFETY: none of the calls that the tests try is given a pointer to anything.
    unsafe { libc::syscall(call, a, b, c) };
}

fn try_files(all: bool) {
    for path in [
        "/etc/passwd",
        "/",
        "/dev/kvm",
        "/proc/self/status",
        "/vsock",
    ] {
        if path == "/" || path == "/vsock" {
            if !all {
                println!("open {path}={}", fs::read_dir(path).unwrap_err());
            }
            continue;
        }
        println!("open {path}={}", fs::File::open(path).unwrap_err());
    }
    if !all {
        return;
    }
    for path in ["/new", "/vsock/new"] {
        println!("write {path}={}", fs::File::create(path).unwrap_err());
    }
    // SAFETY: takes no pointer; the call is to fail.
    unsafe { libc::kill(2, libc::SIGKILL) };
    println!("kill={}", std::io::Error::last_os_error());
    println!("pid={}", std::process::id());
    println!("interfaces={}", interfaces().join(","));
    let names = list("/");
    println!("/={}", names.join(","));
}

fn list(path: &str) -> Vec<String> {
    // Landlock forbids it, too; the names are found without opening anything.
    let known = [
        "etc", "proc", "dev", "usr", "bin", "tmp", "home", "root", "sys", "run", "vsock",
    ];
    let there = known
        .iter()
        .filter(|name| Path::new(path).join(name).symlink_metadata().is_ok());
    there.map(|name| (*name).to_owned()).collect()
}

fn interfaces() -> Vec<String> {
    let mut names = Vec::new();
    // SAFETY: the list is valid until it is freed, and its last entry has the index 0.
    unsafe {
        let list = libc::if_nameindex();
        assert!(!list.is_null());
        let mut at = list;
        while (*at).if_index != 0 {
            let name = std::ffi::CStr::from_ptr((*at).if_name);
            names.push(name.to_str().unwrap().to_owned());
            at = at.add(1);
        }
        libc::if_freenameindex(list);
    }
    names
}

/// Blocks SIGTERM, so that none is lost before it is waited for.
fn block_sigterm() -> libc::sigset_t {
    // SAFETY: the set is initialized by sigemptyset, and the pointers are to live variables.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    }
}

fn wait_for_sigterm() {
    let set = block_sigterm();
    // SAFETY: the set is initialized, and the buffer has the size that is given.
    unsafe {
        let fd = libc::signalfd(-1, &raw const set, 0);
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let size = size_of_val(&info);
        libc::read(fd, (&raw mut info).cast(), size);
        libc::exit(info.ssi_signo.cast_signed());
    }
}
