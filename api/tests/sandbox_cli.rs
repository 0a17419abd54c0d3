//! `sandboxd run`, `ps`, `exec`, `cp` and so on, as processes, with a daemon whose guests are the real
//! agent on this machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/place.rs"]
mod place;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use place::Daemon;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// A client of this daemon.
fn client(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxd"));
    command
        .args(arguments)
        .env("MVS_HOST", format!("http://{}", daemon.address()))
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .env_remove("MVS_API_KEY")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// What one did: its exit status, standard output, and standard error, but for what it tells of
/// something that takes long, as on a busy machine anything may.
fn done(mut child: Child, input: &[u8]) -> (Option<i32>, Vec<u8>, String) {
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // One that does not read all of it is no failure.
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    let lines = err.split_inclusive('\n');
    let err = lines.filter(|line| !line.contains(" …")).collect();
    (output.status.code(), output.stdout, err)
}

fn run(daemon: &Daemon, arguments: &[&str]) -> (Option<i32>, String, String) {
    let (status, out, err) = done(client(daemon, arguments).spawn().unwrap(), b"");
    (status, String::from_utf8(out).unwrap(), err)
}

/// Runs one that must succeed and say nothing but its output.
fn output(daemon: &Daemon, arguments: &[&str]) -> String {
    let (status, out, err) = run(daemon, arguments);
    assert_eq!(
        (status, err.as_str()),
        (Some(0), ""),
        "{arguments:?}: {out}"
    );
    out
}

fn create(daemon: &Daemon) -> String {
    let answer = daemon.call("POST", "/v1/sandboxes", "{}").json();
    answer["id"].as_str().unwrap().to_owned()
}

/// The sandboxes that there are now.
fn live(daemon: &Daemon) -> Vec<Value> {
    let list = daemon.call("GET", "/v1/sandboxes", "").json();
    list.as_array().unwrap().clone()
}

#[test]
fn a_command_is_run_in_a_sandbox_of_its_own_with_the_streams_of_the_caller() {
    let daemon = Daemon::start(&[]);
    let script = "cat; echo oops >&2; exit 7";
    let child = client(&daemon, &["run", "--", "/bin/sh", "-c", script]).spawn();
    // More than all that is in flight, and no text.
    let input: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let (status, out, err) = done(child.unwrap(), &input);
    assert_eq!((status, err.as_str()), (Some(7), "oops\n"));
    assert!(out == input, "{} of {} bytes", out.len(), input.len());
    assert!(live(&daemon).is_empty());

    // Without `--`, with an environment, and not read to its end.
    let arguments = [
        "run",
        "--env",
        "A=b c",
        "--cwd",
        "/",
        "/bin/sh",
        "-c",
        "echo $A; pwd",
    ];
    let child = client(&daemon, &arguments).spawn().unwrap();
    let (status, out, err) = done(child, &input);
    assert_eq!(
        (status, out.as_slice(), err.as_str()),
        (Some(0), &b"b c\n/\n"[..], "")
    );
    let (status, _, err) = run(&daemon, &["run", "--", "/no/such/program"]);
    assert_eq!(status, Some(127), "{err}");
    let (status, _, err) = run(&daemon, &["run", "--timeout", "1", "--", "sleep", "60"]);
    assert_eq!(
        (status, err.as_str()),
        (
            Some(137),
            "the command ran into its timeout and was killed\n"
        )
    );

    let (status, _, err) = run(&daemon, &["run", "--template", "none", "--", "true"]);
    assert_eq!(status, Some(1));
    assert!(
        err.starts_with("sandboxd: ") && err.contains("minimal"),
        "{err}"
    );
    assert!(live(&daemon).is_empty());
    let (status, _, err) = run(
        &daemon,
        &[
            "run", "--vcpus", "2", "--memory", "256", "--keep", "--", "true",
        ],
    );
    assert_eq!(status, Some(0));
    let kept = &live(&daemon)[0];
    assert_eq!(
        err,
        format!("sandbox {} is kept\n", kept["id"].as_str().unwrap())
    );
    assert_eq!(
        (&kept["vcpus"], &kept["memory_mb"]),
        (&json!(2), &json!(256))
    );
}

#[test]
fn whoever_is_interrupted_takes_the_sandbox_along() {
    let daemon = Daemon::start(&[]);
    for (signal, expected) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let script = "echo $$; exec sleep 1000";
        let mut child = client(&daemon, &["run", "--", "/bin/sh", "-c", script])
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut pid = String::new();
        out.read_line(&mut pid).unwrap();
        assert_eq!(live(&daemon).len(), 1);
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(expected));
        assert!(live(&daemon).is_empty());
        // The agent is on this machine, and the command with it: that ends a moment after its agent.
        let process = format!("/proc/{}", pid.trim());
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::metadata(&process).is_ok() {
            assert!(Instant::now() < deadline, "{process} is there");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    // While it starts: the stand-in waits for a word before it serves.
    let fifo = daemon.path("hang-boot");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let mut child = client(&daemon, &["run", "--", "echo", "never"])
        .spawn()
        .unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = || {
        let mut line = String::new();
        err.read_line(&mut line).unwrap();
        line
    };
    assert_eq!(line(), "starting a sandbox …\n");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(
        line(),
        "interrupted; the sandbox is deleted once it has started\n"
    );
    fs::write(&fifo, "go").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut out = String::new();
    child.stdout.unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(out, "");
    assert!(live(&daemon).is_empty());
}

#[test]
fn sandboxes_are_listed_used_saved_forked_and_deleted() {
    let daemon = Daemon::start(&[]);
    assert!(output(&daemon, &["ps"]).starts_with("ID  STATUS  TEMPLATE  VCPUS"));
    let id = create(&daemon);
    let row = output(&daemon, &["ps"]);
    let row: Vec<_> = row.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(row[..6], [&id, "running", "minimal", "1", "512", "MiB"]);

    let script = ["exec", &id, "--", "/bin/sh", "-c", "tr a-z A-Z; exit 3"];
    let (status, out, err) = done(client(&daemon, &script).spawn().unwrap(), b"text");
    assert_eq!(
        (status, out.as_slice(), err.as_str()),
        (Some(3), &b"TEXT"[..], "")
    );

    output(&daemon, &["pause", &id]);
    let (status, _, err) = run(&daemon, &["exec", &id, "--", "true"]);
    assert_eq!(status, Some(1));
    assert_eq!(err, "sandboxd: sandbox is not running (status: paused)\n");
    let (status, _, err) = run(&daemon, &["logs", &id]);
    assert_eq!(
        (status, err.as_str()),
        (
            Some(1),
            "sandboxd: sandbox is not running (status: paused)\n"
        )
    );
    output(&daemon, &["resume", &id]);

    let forks = output(&daemon, &["fork", "-n", "2", &id]);
    let forks: Vec<_> = forks.lines().collect();
    assert_eq!((forks.len(), live(&daemon).len()), (2, 3));
    let snapshot = output(
        &daemon,
        &["snapshot", "create", "--name", "s", "--disk-only", &id],
    );
    let list = output(&daemon, &["snapshot", "list", "--json"]);
    let list: Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list[0]["id"], json!(snapshot.trim()));
    assert_eq!(list[0]["include_memory"], false);
    assert!(output(&daemon, &["snapshot", "list"]).contains(snapshot.trim()));
    output(&daemon, &["snapshot", "rm", "s"]);

    // One that fails keeps none of the others.
    let (status, _, err) = run(&daemon, &["rm", forks[0], "sb-00000000", forks[1], &id]);
    assert_eq!(
        (status, err.as_str()),
        (Some(1), "sandboxd: sb-00000000: sandbox not found\n")
    );
    assert!(live(&daemon).is_empty());
    let gone = output(&daemon, &["ps", "-a", "--json"]);
    let gone: Value = serde_json::from_str(&gone).unwrap();
    let gone = gone.as_array().unwrap();
    assert_eq!(gone.len(), 3);
    assert!(gone.iter().all(|sandbox| sandbox["status"] == "stopped"));
}

#[test]
fn files_and_directories_are_copied_both_ways() {
    let daemon = Daemon::start(&[]);
    let id = create(&daemon);
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (here, there) = (here.path(), there.path());
    let at = |name: &str| here.join(name).to_str().unwrap().to_owned();
    let in_it = |name: &str| format!("{id}:{}", there.join(name).display());
    fs::create_dir_all(here.join("d/e/empty")).unwrap();
    let content: Vec<u8> = (0..300_000_u32).map(|byte| byte as u8).collect();
    fs::write(here.join("d/a b"), &content).unwrap();
    fs::write(here.join("d/e/run"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(here.join("d/e/run"), fs::Permissions::from_mode(0o750)).unwrap();
    symlink("/etc/passwd", here.join("d/link")).unwrap();
    let mode = |path: std::path::PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;

    let left_out = "links and special files left out: 1\n";
    let copied = run(&daemon, &["cp", &at("d"), &in_it("new")]);
    assert_eq!(copied, (Some(0), String::new(), left_out.to_owned()));
    assert_eq!(fs::read(there.join("new/a b")).unwrap(), content);
    assert_eq!(mode(there.join("new/e/run")), 0o750);
    assert!(there.join("new/e/empty").is_dir() && !there.join("new/link").exists());
    // To a directory that is there, and to a name.
    output(&daemon, &["cp", &at("d/a b"), &in_it("new/e")]);
    assert_eq!(fs::read(there.join("new/e/a b")).unwrap(), content);
    output(&daemon, &["cp", &at("d/a b"), &in_it("new/c")]);
    assert_eq!(fs::read(there.join("new/c")).unwrap(), content);

    symlink("/etc/passwd", there.join("new/link")).unwrap();
    let copied = run(&daemon, &["cp", &in_it("new"), &at("back")]);
    assert_eq!(copied, (Some(0), String::new(), left_out.to_owned()));
    assert_eq!(fs::read(here.join("back/e/a b")).unwrap(), content);
    assert_eq!(mode(here.join("back/e/run")), 0o750);
    assert!(here.join("back/e/empty").is_dir() && !here.join("back/link").exists());
    output(&daemon, &["cp", &in_it("new/e/run"), &at("back")]);
    assert_eq!(mode(here.join("back/run")), 0o750);
    // One that is there is replaced.
    output(&daemon, &["cp", &in_it("new/c"), &at("back/run")]);
    assert_eq!(fs::read(here.join("back/run")).unwrap(), content);

    for (from, to, expected) in [
        (at("d"), at("e"), "one of the two must be in a sandbox"),
        (
            in_it("new"),
            in_it("e"),
            "one of the two must be in a sandbox",
        ),
        (format!("{id}:file"), at("e"), "must be absolute"),
        (in_it("none"), at("e"), "there is no "),
        (in_it("none/none"), at("e"), "there is no "),
        (at("none"), in_it("e"), "none cannot be read or written: "),
        ("sb-00000000:/a".to_owned(), at("e"), "sandbox not found"),
    ] {
        let (status, _, err) = run(&daemon, &["cp", &from, &to]);
        assert_eq!(status, Some(1));
        assert!(err.contains(expected), "{err}");
    }
    assert!(!here.join("e").exists() && !there.join("e").exists());
}

#[test]
fn who_does_not_answer_or_must_not_be_told_the_key_is_named() {
    let daemon = Daemon::start(&[]);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let (status, _, err) = run(&daemon, &["ps", "--host", &address]);
    assert_eq!(status, Some(1));
    let expected = format!("no daemon answers at {address}; start one with `sandboxd serve`");
    assert!(err.contains(&expected), "{err}");
    let (status, _, err) = run(&daemon, &["ps", "--host", "https://box"]);
    assert!(status == Some(1) && err.contains("only http"), "{err}");

    let key = daemon.path("key");
    fs::write(&key, "a-secret\n").unwrap();
    let with_key = |mode: u32| {
        fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
        let mut command = client(&daemon, &["ps"]);
        done(command.env("MVS_API_KEY_FILE", &key).spawn().unwrap(), b"")
    };
    let (status, _, err) = with_key(0o644);
    assert!(
        status == Some(1) && err.contains("run `chmod 600 "),
        "{err}"
    );
    assert!(!err.contains("a-secret"));
    // What is sent with it.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
        let lines: Vec<_> = std::iter::from_fn(|| lines.next())
            .map(Result::unwrap)
            .take_while(|line| !line.is_empty())
            .collect();
        let body = "[]";
        write!(
            &stream,
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{body}"
        )
        .unwrap();
        lines
    });
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    let mut command = client(&daemon, &["ps", "--json", "--host", &address]);
    let (status, out, _) = done(command.env("MVS_API_KEY_FILE", &key).spawn().unwrap(), b"");
    assert_eq!((status, out.as_slice()), (Some(0), &b"[]\n"[..]));
    let sent = server.join().unwrap();
    assert!(sent.contains(&"x-api-key: a-secret".to_owned()), "{sent:?}");
}
