//! `sandboxd exec -it` and `run -it` on a real terminal, with a daemon whose guests are the real agent on
//! this machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/place.rs"]
mod place;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use place::Daemon;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Termios, Winsize};

/// How long anything may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// A terminal, seen from where one sits.
struct Terminal {
    ours: File,
    theirs: OwnedFd,
    before: String,
    /// In bytes: those of a character may come apart.
    seen: Vec<u8>,
}

fn winsize(rows: u16, cols: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

impl Terminal {
    fn open() -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let ours = rustix::pty::openpt(flags).unwrap();
        rustix::pty::unlockpt(&ours).unwrap();
        let theirs = rustix::pty::ioctl_tiocgptpeer(&ours, flags).unwrap();
        rustix::termios::tcsetwinsize(&ours, winsize(33, 99)).unwrap();
        let mut terminal = Self {
            ours: ours.into(),
            theirs,
            before: String::new(),
            seen: Vec::new(),
        };
        terminal.before = format!("{:?}", terminal.modes());
        terminal
    }

    /// Starts a client whose controlling terminal this is.
    fn run(&self, daemon: &Daemon, arguments: &[&str]) -> Child {
        let stdio = || Stdio::from(self.theirs.try_clone().unwrap());
        // The signals of a terminal go to the session that it controls.
        Command::new("setsid")
            .args(["--ctty", env!("CARGO_BIN_EXE_sandboxd")])
            .args(arguments)
            .env("MVS_HOST", format!("http://{}", daemon.address()))
            .env("XDG_CONFIG_HOME", "/nonexistent")
            .env_remove("MVS_API_KEY")
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .unwrap()
    }

    fn modes(&self) -> Termios {
        rustix::termios::tcgetattr(&self.theirs).unwrap()
    }

    fn is_raw(&self) -> bool {
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        !self.modes().local_modes.intersects(cooked)
    }

    /// The terminal is as it was.
    fn assert_restored(&self) {
        assert_eq!(format!("{:?}", self.modes()), self.before);
    }

    fn type_in(&mut self, bytes: &[u8]) {
        self.ours.write_all(bytes).unwrap();
    }

    /// Waits until this is seen after what was waited for last; returns what came before it.
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut places = self.seen.windows(text.len());
            if let Some(at) = places.position(|place| place == text.as_bytes()) {
                let mut before: Vec<_> = self.seen.drain(..at + text.len()).collect();
                before.truncate(at);
                return String::from_utf8(before).unwrap();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap();
            let mut fds = [PollFd::from_borrowed_fd(self.ours.as_fd(), PollFlags::IN)];
            let ready = poll(&mut fds, Some(&left)).unwrap();
            let seen = String::from_utf8_lossy(&self.seen);
            assert!(ready > 0, "{text:?} is not seen, but {seen:?}");
            let mut bytes = [0; 4096];
            let count = self.ours.read(&mut bytes).unwrap();
            self.seen.extend_from_slice(&bytes[..count]);
        }
    }
}

/// The status of a client that ends, while what it writes is read.
fn ended(child: &mut Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn create(daemon: &Daemon) -> String {
    let answer = daemon.call("POST", "/v1/sandboxes", "{}").json();
    answer["id"].as_str().unwrap().to_owned()
}

/// What runs in the background of a sandbox.
fn processes(daemon: &Daemon, id: &str) -> usize {
    let path = format!("/v1/sandboxes/{id}/processes");
    let list = daemon.call("GET", &path, "").json();
    list["processes"].as_array().unwrap().len()
}

#[test]
fn a_command_has_the_terminal_of_the_caller() {
    let daemon = Daemon::start(&[]);
    let id = create(&daemon);
    let mut terminal = Terminal::open();
    // It reads when the signals have come: one that came just before a read would not end that.
    let script = "stty size; tty; trap 'stty size' WINCH; trap 'caught=yes' INT; echo ready; \
                  while [ -z \"$caught\" ]; do sleep 0.01; done; echo caught; \
                  read -r line; echo \"<$line>\"; exit 5";
    let arguments = [
        "exec", "-it", "--env", "A=b", &id, "--", "/bin/sh", "-c", script,
    ];
    let mut client = terminal.run(&daemon, &arguments);
    let said = terminal.wait_for("ready\r\n");
    assert!(said.contains("33 99\r\n/dev/pts/"), "{said}");
    assert!(terminal.is_raw());
    // Sizes and keys reach the command, Ctrl-C too, and what is typed is shown once.
    rustix::termios::tcsetwinsize(&terminal.ours, winsize(44, 111)).unwrap();
    terminal.wait_for("44 111\r\n");
    terminal.type_in(b"\x03");
    terminal.wait_for("caught\r\n");
    terminal.type_in("gr\u{fc}n\r".as_bytes());
    let said = terminal.wait_for("<gr\u{fc}n>\r\n");
    assert_eq!(said, "gr\u{fc}n\r\n");
    assert_eq!(ended(&mut client).code(), Some(5));
    terminal.assert_restored();
}

#[test]
fn the_terminal_is_restored_however_it_ends() {
    let daemon = Daemon::start(&[]);
    let id = create(&daemon);
    let arguments = [
        "exec",
        "-it",
        &id,
        "--",
        "/bin/sh",
        "-c",
        "echo ready; exec cat",
    ];
    for (signal, status) in [
        (Signal::TERM, 143),
        (Signal::HUP, 129),
        (Signal::INT, 130),
        (Signal::QUIT, 131),
    ] {
        let mut terminal = Terminal::open();
        let mut client = terminal.run(&daemon, &arguments);
        terminal.wait_for("ready\r\n");
        assert!(terminal.is_raw());
        kill_process(Pid::from_child(&client), signal).unwrap();
        assert_eq!(ended(&mut client).code(), Some(status));
        terminal.assert_restored();
        // The command ends with it.
        let deadline = Instant::now() + PATIENCE;
        while processes(&daemon, &id) > 0 {
            assert!(Instant::now() < deadline, "it runs on");
        }
    }
    // What the command did not get to do, and a sandbox that goes away.
    let mut terminal = Terminal::open();
    let mut client = terminal.run(&daemon, &["exec", "-it", &id, "--", "/no/such"]);
    terminal.wait_for("/no/such");
    assert_eq!(ended(&mut client).code(), Some(1));
    terminal.assert_restored();
    let mut terminal = Terminal::open();
    let mut client = terminal.run(&daemon, &arguments);
    terminal.wait_for("ready\r\n");
    daemon.call("DELETE", &format!("/v1/sandboxes/{id}"), "");
    terminal.wait_for("sandboxd: ");
    assert_eq!(ended(&mut client).code(), Some(1));
    terminal.assert_restored();
}

#[test]
fn a_sandbox_is_run_for_a_terminal() {
    let daemon = Daemon::start(&[]);
    let mut terminal = Terminal::open();
    let arguments = [
        "run",
        "-it",
        "--",
        "/bin/sh",
        "-c",
        "echo ready; read -r x; exit 7",
    ];
    let mut client = terminal.run(&daemon, &arguments);
    terminal.wait_for("ready\r\n");
    let live = || {
        daemon
            .call("GET", "/v1/sandboxes", "")
            .json()
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(live(), 1);
    terminal.type_in(b"\r");
    assert_eq!(ended(&mut client).code(), Some(7));
    assert_eq!(live(), 0);
    terminal.assert_restored();

    // Without a terminal there is none to type on, but still one for the command.
    let id = create(&daemon);
    let output = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxd"));
        command.args(arguments).stdin(Stdio::null());
        command.env("MVS_HOST", format!("http://{}", daemon.address()));
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    for arguments in [["exec", "-it", &id, "true"], ["run", "-it", "--", "true"]] {
        let (status, _, err) = output(&arguments);
        assert!(status == Some(1) && err.contains("no terminal"), "{err}");
    }
    let (status, out, err) = output(&["exec", "-t", &id, "--", "stty", "size"]);
    assert_eq!((status, &*out), (Some(0), "24 80\r\n"), "{err}");
}
