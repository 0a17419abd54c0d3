//! Sandboxes over REST: what a caller is promised.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::http::Request;
use e2e_tests::pattern::{Pattern, assert_pattern};
use e2e_tests::process::{peak_kib, status_kib};
use e2e_tests::{report, until};
use serde_json::{Value, json};

fn small() -> Value {
    json!({"memory_mb": 192})
}

#[test]
fn directories_are_listed_made_and_removed() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    let call = |operation: &str, body: Value| {
        let path = sandbox.path(&format!("/files/{operation}"));
        daemon.call("POST", &path, &body.to_string())
    };
    let (status, made) = call("mkdir", json!({"path": "/srv/a/b"}));
    assert_eq!(
        (status, &made["entry"]["permissions"]),
        (200, &json!("drwxr-xr-x"))
    );
    sandbox.must("mkfifo /srv/a/fifo && ln -s /etc /srv/a/link && echo x >/srv/a/b/file");
    let (status, listed) = call("list", json!({"path": "/srv", "depth": 3}));
    assert_eq!(status, 200, "{listed}");
    let entries: Vec<_> = listed["entries"].as_array().unwrap().iter().collect();
    let found: Vec<_> = entries
        .iter()
        .map(|entry| (&entry["path"], &entry["type"]))
        .collect();
    let expected = [
        ("/srv/a", "directory"),
        ("/srv/a/b", "directory"),
        ("/srv/a/b/file", "file"),
        ("/srv/a/fifo", "file"),
        ("/srv/a/link", "symlink"),
    ];
    assert!(
        found.iter().zip(expected).all(|((path, kind), expected)| {
            (path.as_str(), kind.as_str()) == (Some(expected.0), Some(expected.1))
        }),
        "{listed}"
    );
    assert_eq!(found.len(), expected.len());
    assert_eq!(call("remove", json!({"path": "/srv/a"})).0, 204);
    assert_eq!(sandbox.must("ls /srv; ls /etc/passwd"), "/etc/passwd");
    assert_eq!(call("remove", json!({"path": "/proc"})).0, 400);
}

#[test]
fn an_idle_sandbox_is_paused_and_goes_on() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&json!({"memory_mb": 192, "timeout_sec": 2}));
    // A pause would end the command.
    sandbox.must("echo kept >/run/kept; sleep 4");
    until("the sandbox is paused", || {
        sandbox.get()["status"] == "paused"
    });
    sandbox.resume();
    assert_eq!(sandbox.must("cat /run/kept"), "kept");
    sandbox.delete();
}

#[test]
fn a_sandbox_is_created_used_and_deleted() {
    let daemon = Daemon::start();
    let (status, health) = daemon.call("GET", "/health", "");
    assert_eq!((status, &health["status"]), (200, &json!("healthy")));

    let sandbox = daemon.create(&json!({"template": "minimal", "vcpus": 2, "memory_mb": 256}));
    let record = sandbox.get();
    assert_eq!(record["status"], "running");
    assert_eq!(
        (&record["vcpus"], &record["memory_mb"]),
        (&json!(2), &json!(256))
    );
    assert!(
        record["timings_ms"]["boot"].as_f64().unwrap() > 0.0,
        "{record}"
    );
    assert_eq!(daemon.list().len(), 1);

    let said = sandbox.exec(&["sh", "-c", "uname -a; nproc; cat /etc/os-release"]);
    assert_eq!(
        (&said["exit_code"], &said["encoding"]),
        (&json!(0), &json!("utf-8"))
    );
    let lines: Vec<&str> = said["stdout"].as_str().unwrap().lines().collect();
    assert!(
        lines[0].starts_with("Linux ") && lines[0].contains("x86_64"),
        "{said}"
    );
    assert_eq!(lines[1], "2");
    assert!(lines.contains(&"ID=debian"), "{said}");

    sandbox.delete();
    assert_eq!(sandbox.get()["status"], "stopped");
    assert!(daemon.list().is_empty());
    daemon.refused(
        ("GET", "/v1/sandboxes/sb-00000000", ""),
        (404, "not_found"),
        &["not found"],
    );
}

#[test]
fn a_command_tells_how_it_ended_and_all_that_it_wrote() {
    const FLOOD: usize = 100_000_000;
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());

    assert_eq!(sandbox.exec(&["true"])["exit_code"], 0);
    assert_eq!(sandbox.exec(&["false"])["exit_code"], 1);
    assert_eq!(sandbox.exec(&["sh", "-c", "kill -9 $$"])["exit_code"], 137);
    let missing = sandbox.exec(&["no-such-program", "x"]);
    assert_eq!(missing["exit_code"], 127);
    let said = missing["stderr"].as_str().unwrap();
    assert!(
        said.contains("no-such-program") && said.contains("not found"),
        "{said}"
    );
    assert_eq!(sandbox.exec(&["/etc/passwd"])["exit_code"], 126);

    let both = sandbox.exec(&["sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(
        (&both["stdout"], &both["stderr"], &both["exit_code"]),
        (&json!("out\n"), &json!("err\n"), &json!(3))
    );

    let binary = sandbox.exec(&["printf", r"\377\376\000text"]);
    assert_eq!(binary["encoding"], "base64");
    let bytes = STANDARD.decode(binary["stdout"].as_str().unwrap()).unwrap();
    assert_eq!(bytes, b"\xff\xfe\0text");

    let (status, late) = sandbox.try_exec(&["sh", "-c", "echo begun; setsid sleep 1000"], 2);
    assert_eq!(
        (status, &late["error"]["code"]),
        (502, &json!("agent_error")),
        "{late}"
    );
    assert_eq!(late["stdout"], "begun\n");
    let message = late["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("2 s") && message.contains("timeout_sec"),
        "{message}"
    );

    let before = Memory::of(&daemon, &sandbox);
    let script = format!("yes 0123456789abcde | head -c {FLOOD}");
    let flood = sandbox.exec(&["sh", "-c", &script]);
    assert_eq!(flood["exit_code"], 0);
    let stdout = flood["stdout"].as_str().unwrap();
    assert_eq!(stdout.len(), FLOOD);
    assert!(
        stdout
            .as_bytes()
            .chunks(16)
            .all(|line| line == b"0123456789abcde\n")
    );
    Memory::of(&daemon, &sandbox).assert_bounded(&before, "100 MB of output");
}

/// The most memory that each process between a caller and a program has had, in KiB.
#[derive(Debug, Clone, Copy)]
struct Memory {
    daemon: u64,
    vmm: u64,
    agent: u64,
}

impl Memory {
    fn of(daemon: &Daemon, sandbox: &Sandbox<'_>) -> Self {
        Self {
            daemon: daemon.process.peak_kib(),
            vmm: peak_kib(sandbox.vmm_pid()),
            agent: status_kib(&sandbox.must("cat /proc/1/status"), "VmHWM:"),
        }
    }

    /// No process has grown by more than it may, whatever went through it.
    fn assert_bounded(&self, before: &Self, what: &str) {
        // The VMM's peak holds all of the guest's memory that the guest has ever touched.
        const GUEST_KIB: u64 = 192 * 1024;
        report(&format!(
            "peak memory in KiB for {what}: daemon {} before and {} after, vmm {} and {} \
             (its guest has {GUEST_KIB}), agent {} and {}",
            before.daemon, self.daemon, before.vmm, self.vmm, before.agent, self.agent
        ));
        assert!(
            self.daemon - before.daemon < 24 * 1024,
            "the daemon has grown"
        );
        assert!(
            self.vmm < GUEST_KIB + 24 * 1024,
            "the vmm is larger than its guest"
        );
        assert!(self.agent < 4 * 1024, "the agent has grown");
    }
}

#[test]
fn a_large_file_goes_in_and_comes_out_the_same() {
    const SIZE: u64 = 200_000_000;
    let daemon = Daemon::start_with(&["--upload-bytes", "200000000"]);
    let sandbox = daemon.create(&small());
    let before = Memory::of(&daemon, &sandbox);

    let (status, answer) = sandbox.upload("/srv/large/file", Pattern::new(11), SIZE);
    assert_eq!((status, answer), (204, Value::Null));
    assert_eq!(
        sandbox.must("stat -c '%s %a %U' /srv/large/file"),
        format!("{SIZE} 644 root")
    );
    let response = sandbox.download("/srv/large/file");
    assert_eq!(response.status, 200);
    assert_eq!(
        response.header("content-length"),
        Some(SIZE.to_string().as_str())
    );
    assert_pattern(response, 11, SIZE);
    Memory::of(&daemon, &sandbox).assert_bounded(&before, "a file of 200 MB in and out");

    let (status, answer) = sandbox.upload("/srv/large/file", Pattern::new(12), SIZE + 1);
    assert_eq!(
        (status, &answer["error"]["code"]),
        (413, &json!("too_large"))
    );
    assert_pattern(
        sandbox.download("/srv/large/file").take(1 << 20),
        11,
        1 << 20,
    );
}

#[test]
fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let daemon = Daemon::start();
    let before = daemon.holdings();
    let create = |body| ("POST", "/v1/sandboxes", body);
    let invalid = (400, "invalid_request");
    let missing = (404, "not_found");
    for (request, refusal, words) in [
        (create("{\"vcpus\": "), invalid, &["JSON"][..]),
        (create("[]"), invalid, &["JSON"]),
        (create(r#"{"vcpus": "two"}"#), invalid, &["JSON"]),
        (
            create(r#"{"template": "nonesuch"}"#),
            invalid,
            &["nonesuch", "minimal"],
        ),
        (
            create(r#"{"template": "../minimal"}"#),
            invalid,
            &["template"],
        ),
        (create(r#"{"vcpus": 0}"#), invalid, &["vcpus", "1 to 32"]),
        (create(r#"{"vcpus": 33}"#), invalid, &["vcpus", "1 to 32"]),
        (
            create(r#"{"memory_mb": 1}"#),
            invalid,
            &["memory_mb", "128"],
        ),
        (
            create(r#"{"memory_mb": 99999999}"#),
            invalid,
            &["memory_mb"],
        ),
        (create(r#"{"timeout_sec": -1}"#), invalid, &["timeout_sec"]),
        (
            ("GET", "/v1/sandboxes/sb-00000000", ""),
            missing,
            &["not found"],
        ),
        (
            ("GET", "/v1/sandboxes/nonsense", ""),
            missing,
            &["not found"],
        ),
        (
            ("DELETE", "/v1/sandboxes/sb-00000000", ""),
            missing,
            &["not found"],
        ),
        (
            ("POST", "/v1/sandboxes/sb-00000000/exec", "{}"),
            missing,
            &["not found"],
        ),
        (("GET", "/v2/sandboxes", ""), missing, &["openapi"]),
        (
            ("PUT", "/v1/sandboxes", ""),
            (405, "method_not_allowed"),
            &["method"],
        ),
    ] {
        daemon.refused(request, refusal, words);
    }
    assert_eq!(daemon.holdings(), before);

    let sandbox = daemon.create(&small());
    let exec = sandbox.path("/exec");
    let read = sandbox.path("/files/read");
    for (request, refusal, words) in [
        (("POST", &*exec, "{"), invalid, &["JSON"][..]),
        (("POST", &*exec, "{}"), invalid, &["cmd"]),
        (
            ("POST", &*exec, r#"{"cmd": "x", "timeout_sec": 0}"#),
            invalid,
            &["timeout_sec"],
        ),
        (
            ("POST", &*exec, r#"{"cmd": "a\u0000b"}"#),
            invalid,
            &["zero byte"],
        ),
        (("POST", &*read, "{}"), invalid, &["path"]),
        (
            ("POST", &*read, r#"{"path": "etc/passwd"}"#),
            invalid,
            &["absolute"],
        ),
        (
            ("POST", &*read, r#"{"path": "/no/such/file"}"#),
            missing,
            &["/no/such/file"],
        ),
        (
            ("POST", &*read, r#"{"path": "/etc"}"#),
            invalid,
            &["directory"],
        ),
    ] {
        daemon.refused(request, refusal, words);
    }
    let (status, answer) = sandbox.upload("relative", &b"x"[..], 1);
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &json!("invalid_request"))
    );

    sandbox.delete();
    let state = (409, "invalid_state");
    daemon.refused(
        ("POST", &exec, r#"{"cmd": "true"}"#),
        state,
        &["not running", "stopped"],
    );
    daemon.refused(
        ("POST", &read, r#"{"path": "/etc/passwd"}"#),
        state,
        &["not running"],
    );
}

#[test]
fn images_that_do_not_boot_are_told_with_their_reason_and_leave_nothing() {
    let directory = e2e_tests::setup::scratch();
    let garbage = directory.path().join("garbage");
    std::fs::write(&garbage, Pattern::bytes(13, 1 << 20)).unwrap();
    let template = format!("broken={}", garbage.display());

    // A root disk without a file system: the guest's kernel panics.
    let daemon = Daemon::start_with(&["--template", &template]);
    let before = daemon.holdings();
    let request = json!({"template": "broken", "memory_mb": 128}).to_string();
    let words = ["panicked", "/dev/vda"];
    daemon.refused(
        ("POST", "/v1/sandboxes", &request),
        (502, "agent_error"),
        &words,
    );
    assert_eq!(daemon.holdings(), before);
    drop(daemon);

    // No kernel: the VMM refuses.
    let daemon = Daemon::start_with(&["--kernel", garbage.to_str().unwrap()]);
    let before = daemon.holdings();
    let words = ["kernel", garbage.to_str().unwrap()];
    daemon.refused(
        ("POST", "/v1/sandboxes", "{}"),
        (502, "agent_error"),
        &words,
    );
    assert_eq!(daemon.holdings(), before);
}

#[test]
fn twenty_sandboxes_one_after_the_other_leave_nothing() {
    let daemon = Daemon::start();
    // What the daemon makes once and keeps, it has after the first.
    let mut holdings = None;
    for round in 0..20 {
        let sandbox = daemon.create(&small());
        assert_eq!(
            sandbox.must(&format!("echo {round} >/root/f; cat /root/f")),
            round.to_string()
        );
        let (status, _) = sandbox.upload("/root/up", Pattern::new(round), 10_000);
        assert_eq!(status, 204);
        assert_pattern(sandbox.download("/root/up"), round, 10_000);
        sandbox.delete();
        let now = daemon.holdings();
        assert_eq!(
            holdings.get_or_insert_with(|| now.clone()),
            &now,
            "after round {round}"
        );
    }
}

#[test]
fn four_at_once_do_not_see_each_other() {
    let daemon = Daemon::start();
    let before = daemon.holdings();
    let sandboxes: Vec<Sandbox<'_>> = thread::scope(|scope| {
        let started: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| daemon.create(&small())))
            .collect();
        started
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(daemon.list().len(), 4);
    thread::scope(|scope| {
        for sandbox in &sandboxes {
            scope.spawn(|| {
                let id = &sandbox.id;
                sandbox.must(&format!("echo {id} >/root/mine; cp /bin/sleep /tmp/{id}"));
                // In the background, for the others to look for.
                sandbox.must(&format!("(/tmp/{id} 10000 >/dev/null 2>&1 &)"));
            });
        }
    });
    for sandbox in &sandboxes {
        assert_eq!(
            sandbox.must("cat /root/mine; ls /tmp"),
            format!("{0}\n{0}", sandbox.id)
        );
        assert_eq!(
            sandbox.must("cat /proc/[0-9]*/comm | grep '^sb-'"),
            sandbox.id
        );
    }
    thread::scope(|scope| {
        for sandbox in &sandboxes {
            scope.spawn(|| sandbox.delete());
        }
    });
    assert_eq!(daemon.holdings(), before);
}

#[test]
fn a_killed_vmm_turns_its_sandbox_to_error_within_two_seconds() {
    let daemon = Daemon::start();
    let before = daemon.holdings();
    let sandbox = daemon.create(&small());
    let pid = rustix::process::Pid::from_raw(sandbox.vmm_pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let killed = Instant::now();
    let record = sandbox.ended();
    let took = killed.elapsed();
    assert_eq!(record["status"], "error");
    let reason = record["status_reason"].as_str().unwrap();
    assert!(reason.contains("killed by signal 9"), "{reason}");
    report(&format!(
        "from SIGKILL of the vmm to the record's error: {took:?}"
    ));
    assert!(took < Duration::from_secs(2), "it took {took:?}");
    daemon.process.stderr.wait_for("killed by signal 9");
    assert_eq!(daemon.holdings(), before);
    let exec = sandbox.path("/exec");
    let state = (409, "invalid_state");
    daemon.refused(("POST", &exec, r#"{"cmd": "true"}"#), state, &["error"]);
}

#[test]
fn a_guest_that_ends_by_itself_leaves_its_reason_in_the_record_and_the_log() {
    let daemon = Daemon::start();
    let before = daemon.holdings();
    for (key, status, reason) in [
        ("b", "stopped", "reboot"),
        ("c", "error", "panicked"),
        ("o", "stopped", "powered off"),
    ] {
        let sandbox = daemon.create(&small());
        // The command does not come back; how it is told is not the matter here.
        sandbox.try_exec(
            &[
                "sh",
                "-c",
                &format!("echo {key} >/proc/sysrq-trigger; sleep 1000"),
            ],
            1000,
        );
        let record = sandbox.ended();
        assert_eq!(record["status"], status, "{record}");
        let said = record["status_reason"].as_str().unwrap();
        assert!(said.contains(reason), "{said}");
        daemon.process.stderr.wait_for(reason);
        assert_eq!(daemon.holdings(), before, "after {reason}");
    }
}

#[test]
fn the_daemon_ends_with_all_its_sandboxes() {
    let mut daemon = Daemon::start();
    let vmm = {
        let first = daemon.create(&small());
        daemon.create(&small());
        first.vmm_pid()
    };
    daemon.stop();
    assert!(!std::path::Path::new(&format!("/proc/{vmm}")).exists());
}

#[test]
fn the_api_describes_itself_and_web_pages_are_kept_out() {
    let daemon = Daemon::start();
    let response = daemon.send(Request::new("GET", "/openapi.yaml"), std::io::empty(), 0);
    assert_eq!(response.status, 200);
    let yaml = response.text();
    for part in [
        "openapi: 3.",
        "/v1/sandboxes/{id}/exec",
        "/v1/sandboxes/{id}/files/write",
    ] {
        assert!(yaml.contains(part), "no {part}");
    }
    let get = |name: &str, value: &str| {
        let request = Request::new("GET", "/v1/sandboxes").header(name, value);
        daemon.send(request, std::io::empty(), 0).status
    };
    assert_eq!(get("Host", "evil.example"), 403);
    assert_eq!(
        get("Host", &format!("127.0.0.1:{}", daemon.address().port())),
        200
    );
    assert_eq!(get("Origin", "https://evil.example"), 403);
    assert_eq!(get("Origin", "http://localhost:3000"), 200);
}
