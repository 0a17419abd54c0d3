//! The command line, with real guests.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use e2e_tests::daemon::Daemon;
use e2e_tests::pattern::Pattern;
use e2e_tests::setup::{scratch, setup};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

impl Cli<'_> {
    /// Does something that must succeed and say nothing else than its output.
    fn output(&self, arguments: &[&str]) -> String {
        let (status, out, err) = self.0.client(arguments, b"");
        // What takes long is told.
        let err: Vec<_> = err.lines().filter(|line| !line.contains(" …")).collect();
        assert_eq!(
            (status, err.as_slice()),
            (Some(0), &[][..]),
            "{arguments:?}: {out}"
        );
        out
    }

    fn sandboxes(&self) -> Vec<Value> {
        let list: Value = serde_json::from_str(&self.output(&["ps", "--json"])).unwrap();
        list.as_array().unwrap().clone()
    }
}

/// The client of a daemon.
struct Cli<'a>(&'a Daemon);

#[test]
fn sandboxes_are_used_from_the_command_line() {
    let daemon = Daemon::start();
    let cli = Cli(&daemon);

    // A command has the caller's streams, and the caller its status.
    let script = "tr a-z A-Z; echo oops >&2; echo ram >/dev/shm/word; exit 7";
    let arguments = ["run", "--memory", "192", "--keep", "--", "sh", "-c", script];
    let (status, out, err) = daemon.client(&arguments, b"word\n");
    assert_eq!((status, out.as_str()), (Some(7), "WORD\n"), "{err}");
    assert!(
        err.contains("oops\n") && err.contains(" is kept\n"),
        "{err}"
    );
    let sandboxes = cli.sandboxes();
    assert_eq!(
        (sandboxes.len(), &sandboxes[0]["status"]),
        (1, &Value::from("running"))
    );
    let id = sandboxes[0]["id"].as_str().unwrap();
    let script = "echo $A; echo told the console >/dev/console";
    assert_eq!(
        cli.output(&["exec", id, "--env", "A=b", "--", "sh", "-c", script]),
        "b\n"
    );
    assert!(cli.output(&["logs", id]).contains("told the console"));

    // A directory goes in, and comes out again as it was.
    let directory = scratch();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(path("in")).unwrap();
    let content: Vec<u8> = Pattern::bytes(7, 3_000_000);
    fs::write(path("in/data"), &content).unwrap();
    fs::set_permissions(path("in/data"), fs::Permissions::from_mode(0o751)).unwrap();
    cli.output(&["cp", &path("in"), &format!("{id}:/root/copied")]);
    cli.output(&["cp", &format!("{id}:/root/copied"), &path("out")]);
    assert!(fs::read(path("out/data")).unwrap() == content);
    let mode = fs::metadata(path("out/data")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o751);

    // Snapshots, which others are run from.
    cli.output(&["snapshot", "create", id, "--name", "whole"]);
    cli.output(&["snapshot", "create", id, "--name", "disk", "--disk-only"]);
    let look = "cat /dev/shm/word 2>/dev/null; stat -c %s /root/copied/data";
    for (snapshot, expected) in [("whole", "ram\n3000000\n"), ("disk", "3000000\n")] {
        let arguments = ["run", "--template", snapshot, "--", "sh", "-c", look];
        assert_eq!(cli.output(&arguments), expected, "{snapshot}");
    }
    cli.output(&["snapshot", "rm", "whole", "disk"]);

    // It goes on after a pause, and so does its fork.
    cli.output(&["pause", id]);
    assert_eq!(cli.sandboxes()[0]["status"], "paused");
    let (status, _, err) = daemon.client(&["exec", id, "--", "true"], b"");
    assert!(status == Some(1) && err.contains("not running"), "{err}");
    cli.output(&["resume", id]);
    let fork = cli.output(&["fork", id]);
    let fork = fork.trim();
    cli.output(&["exec", fork, "--", "sh", "-c", "echo fork >/dev/shm/word"]);
    for (id, word) in [(id, "ram\n"), (fork, "fork\n")] {
        assert_eq!(
            cli.output(&["exec", id, "--", "cat", "/dev/shm/word"]),
            word
        );
    }
    let table = cli.output(&["ps"]);
    assert!(table.contains(id) && table.contains(fork), "{table}");
    cli.output(&["rm", id, fork]);
    assert!(cli.sandboxes().is_empty());
}

#[test]
fn ctrl_c_ends_what_is_run_and_its_sandbox() {
    let daemon = Daemon::start();
    let script = "echo started; exec sleep 1000";
    let mut client = Command::new(&setup().sandboxd)
        .args(["run", "--memory", "192", "--", "sh", "-c", script])
        .env("MVS_HOST", daemon.address().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = BufReader::new(client.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "started\n");
    assert_eq!(daemon.list().len(), 1);
    kill_process(Pid::from_child(&client), Signal::INT).unwrap();
    assert_eq!(client.wait().unwrap().code(), Some(130));
    assert_eq!(daemon.list(), Vec::<Value>::new());
}
