//! Exec against a real agent.

use std::{fs, path::Path, time::Duration};

use crate::common::{Agent, argv, sh};
use agent_protocol::{AgentFrame, ErrorCode, ExecRequest, HostFrame, MAX_FRAME_PAYLOAD, Started};
use bytes::Bytes;
use tokio::{io::AsyncWriteExt, time::timeout};

/// Long enough for anything that is to happen at once, on a busy machine.
const SOON: Duration = Duration::from_secs(20);

fn alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    // The state follows the name, which is in parentheses.
    !stat
        .rsplit(')')
        .next()
        .unwrap()
        .trim_start()
        .starts_with('Z')
}

/// Waits for a process to end, by its pidfd.
async fn gone(pid: u32) {
    let raw = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let Ok(fd) = rustix::process::pidfd_open(raw, rustix::process::PidfdFlags::NONBLOCK) else {
        return;
    };
    // SAFETY: an OwnedFd names the same open file as long as it lives.
    let fd = unsafe { tokio::io::unix::AsyncFd::register(fd) }.unwrap();
    let _ = timeout(SOON, fd.readable())
        .await
        .expect("the process still runs");
}

fn pid_in(path: &Path) -> u32 {
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

fn children(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap()
}

#[tokio::test]
async fn exit_statuses_and_signals() {
    let agent = Agent::start();
    for (script, code, signal) in [
        ("exit 0", 0, None),
        ("exit 1", 1, None),
        ("exit 255", 255, None),
        ("kill -KILL $$", 137, Some(9)),
        ("kill -TERM $$", 143, Some(15)),
    ] {
        let output = agent.sh(script).await;
        assert_eq!(
            (output.exit.code, output.exit.signal),
            (code, signal),
            "{script}"
        );
        assert!(!output.exit.timed_out);
        assert!(output.exit.duration_us > 0);
    }
}

#[tokio::test]
async fn what_cannot_be_started_is_told_apart() {
    let agent = Agent::start();
    let plain = agent.directory().join("plain");
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    let plain = plain.to_str().unwrap();
    let with = |change: fn(&mut ExecRequest)| {
        let mut request = argv(&["true"]);
        change(&mut request);
        request
    };
    for (request, code, shell) in [
        (
            argv(&["no-such-command"]),
            ErrorCode::CommandNotFound,
            Some(127),
        ),
        (
            argv(&["/no/such/command"]),
            ErrorCode::CommandNotFound,
            Some(127),
        ),
        (
            argv(&["/dev/null/command"]),
            ErrorCode::CommandNotFound,
            Some(127),
        ),
        (argv(&[plain]), ErrorCode::CommandNotExecutable, Some(126)),
        (argv(&["/etc"]), ErrorCode::CommandNotExecutable, Some(126)),
        (argv(&[]), ErrorCode::BadRequest, None),
        (argv(&["a\0b"]), ErrorCode::BadRequest, None),
        (
            argv(&["true", &"x".repeat(200_000)]),
            ErrorCode::BadRequest,
            None,
        ),
        (
            with(|r| r.cwd = Some("/no/such/dir".into())),
            ErrorCode::BadCwd,
            None,
        ),
        (
            with(|r| r.cwd = Some("/etc/passwd".into())),
            ErrorCode::BadCwd,
            None,
        ),
        (
            with(|r| r.user = Some("no-such-user".into())),
            ErrorCode::UnknownUser,
            None,
        ),
        (
            with(|r| r.user = Some(":".into())),
            ErrorCode::BadRequest,
            None,
        ),
        (
            with(|r| r.timeout_ms = Some(0)),
            ErrorCode::BadRequest,
            None,
        ),
    ] {
        let (_, error) = agent.try_exec(&request).await.err().unwrap();
        assert_eq!(error.code, code, "{request:?}: {error}");
        assert_eq!(error.code.shell_status(), shell);
    }
    assert_eq!(agent.sh("exit 0").await.exit.code, 0);
}

#[tokio::test]
async fn both_streams_pass_any_bytes() {
    let agent = Agent::start();
    let output = agent.sh(r"printf '\377\000\001'; printf '\376' >&2").await;
    assert_eq!(output.stdout, b"\xff\x00\x01");
    assert_eq!(output.stderr, b"\xfe");
}

#[tokio::test]
async fn the_environment_is_the_one_asked_for() {
    let agent = Agent::start();
    let mut request = argv(&["env"]);
    request.env.insert("A".into(), "b=c d".into());
    request.env_clear = true;
    let output = agent.exec(&request).await.finish().await;
    assert_eq!(output.stdout, b"A=b=c d\n");

    request.env_clear = false;
    request.env.insert("LANG".into(), "C".into());
    let output = agent.exec(&request).await.finish().await;
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert!(
        lines.contains(&"A=b=c d") && lines.contains(&"LANG=C"),
        "{text}"
    );
    assert!(lines.contains(&"TERM=xterm"), "{text}");
    for name in ["PATH=", "HOME=", "USER="] {
        assert!(
            lines.iter().any(|l| l.starts_with(name)),
            "{name} in {text}"
        );
    }
}

#[tokio::test]
async fn the_program_gets_a_clean_process() {
    let agent = Agent::start();
    let mut request = sh(
        "pwd; echo $(ls /proc/self/fd | wc -l); umask; ps -o sid= -p $$ | tr -d ' '; echo $$; \
         sed -n 's/^SigBlk:.//p; s/^SigIgn:.//p' /proc/self/status",
    );
    request.cwd = Some("/usr".into());
    let output = agent.exec(&request).await.finish().await;
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    // ls has its three streams and the directory that it lists.
    assert_eq!(lines[..3], ["/usr", "4", "0022"], "{text}");
    assert_eq!(lines[3], lines[4], "the program leads its session");
    let mask = |line: &str| u64::from_str_radix(line, 16).unwrap();
    assert_eq!(mask(lines[5]), 0, "no signal is blocked");
    // The agent ignores SIGPIPE, signal 13.
    assert_eq!(mask(lines[6]) & (1 << 12), 0, "{text}");
}

#[tokio::test]
async fn users_are_switched_by_root_only() {
    let agent = Agent::start();
    let mut request = sh("id -u; id -g; id -G; echo x > /dev/stdout; echo $HOME");
    request.user = Some("65534:65533".into());
    if rustix::process::geteuid().is_root() {
        let output = agent.exec(&request).await.finish().await;
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.starts_with("65534\n65533\n65533\nx\n/"),
            "{text} {output:?}"
        );
    } else {
        let (status, error) = agent.try_exec(&request).await.err().unwrap();
        assert_eq!((status, error.code), (403, ErrorCode::PermissionDenied));
    }
}

#[tokio::test]
async fn stdin_reaches_the_program_and_ends() {
    let agent = Agent::start();
    let mut request = argv(&["sha256sum"]);
    request.stdin = true;
    let mut exec = agent.exec(&request).await;
    for _ in 0..64 {
        exec.send(HostFrame::Stdin(Bytes::from(vec![0; MAX_FRAME_PAYLOAD])))
            .await;
    }
    exec.send(HostFrame::StdinEnd).await;
    let output = exec.finish().await;
    // SHA-256 of 4 MiB of zeros.
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8  -\n"
    );

    let without = agent.exec(&argv(&["cat"])).await.finish().await;
    assert_eq!((without.exit.code, without.stdout.len()), (0, 0));
}

#[tokio::test]
async fn stdin_that_nobody_reads_is_dropped() {
    let agent = Agent::start();
    let go = agent.directory().join("go");
    let mut request = sh(&format!(
        "exec <&-; echo closed; until [ -e {} ]; do sleep 0.01; done; exit 3",
        go.display()
    ));
    request.stdin = true;
    let mut exec = agent.exec(&request).await;
    exec.wait_for_line("closed").await;
    for _ in 0..32 {
        exec.send(HostFrame::Stdin(Bytes::from(vec![0; MAX_FRAME_PAYLOAD])))
            .await;
    }
    fs::write(go, "").unwrap();
    assert_eq!(exec.finish().await.exit.code, 3);
}

#[tokio::test]
async fn much_output_takes_little_memory() {
    const LEN: usize = 100 << 20;
    let agent = Agent::start();
    let before = agent.peak_kib();
    let script = format!("head -c {LEN} /dev/zero; head -c {LEN} /dev/zero >&2");
    let mut exec = agent.exec(&sh(&script)).await;
    let (mut stdout, mut stderr) = (0, 0);
    let exit = loop {
        match exec.next().await.unwrap() {
            AgentFrame::Started(_) => {}
            AgentFrame::Stdout(bytes) => stdout += bytes.len(),
            AgentFrame::Stderr(bytes) => stderr += bytes.len(),
            AgentFrame::Exit(exit) => break exit,
            AgentFrame::Error(error) => panic!("{error}"),
        }
    };
    assert_eq!((stdout, stderr, exit.code), (LEN, LEN, 0));
    let grown = agent.peak_kib() - before;
    println!("peak resident size: {before} KiB before, {grown} KiB more after");
    assert!(grown < 1024, "{grown} KiB");
}

#[tokio::test]
async fn a_host_that_does_not_read_stops_the_program() {
    let agent = Agent::start();
    let progress = agent.directory().join("progress");
    let script = format!(
        "head -c 3000000 /dev/zero; echo done > {}",
        progress.display()
    );
    let exec = agent.exec(&sh(&script)).await;
    // The pipe and the socket's buffer hold less than the program writes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let blocked = !progress.exists();
    let output = exec.finish().await;
    assert_eq!(output.stdout.len(), 3_000_000);
    assert!(progress.exists());
    assert!(blocked);
}

#[tokio::test]
async fn a_timeout_kills_the_whole_group_and_keeps_the_output() {
    let agent = Agent::start();
    let file = agent.directory().join("pid");
    let mut request = sh(&format!(
        "echo before; (sleep 1000 & echo $! > {}; wait); sleep 1000",
        file.display()
    ));
    request.timeout_ms = Some(500);
    let output = timeout(SOON, agent.exec(&request).await.finish())
        .await
        .unwrap();
    assert!(output.exit.timed_out);
    assert_eq!((output.exit.code, output.exit.signal), (137, Some(9)));
    assert_eq!(output.stdout, b"before\n");
    assert!(output.exit.duration_us >= 500_000);
    gone(pid_in(&file)).await;
}

#[tokio::test]
async fn an_exec_in_time_is_not_timed_out() {
    let agent = Agent::start();
    let mut request = sh("echo quick");
    request.timeout_ms = Some(u64::MAX);
    let output = agent.exec(&request).await.finish().await;
    assert_eq!((output.exit.code, output.exit.timed_out), (0, false));
}

#[tokio::test]
async fn a_host_that_goes_away_kills_the_program() {
    let agent = Agent::start();
    let mut exec = agent.exec(&sh("echo up; sleep 1000; true")).await;
    let Some(AgentFrame::Started(Started { pid })) = exec.next().await else {
        panic!("not started");
    };
    exec.wait_for_line("up").await;
    assert!(alive(pid));
    drop(exec);
    gone(pid).await;
}

#[tokio::test]
async fn a_hang_up_is_seen_while_everything_is_blocked() {
    let agent = Agent::start();
    let mut request = sh("echo up; sleep 1000; true");
    request.stdin = true;
    let mut exec = agent.exec(&request).await;
    let Some(AgentFrame::Started(Started { pid })) = exec.next().await else {
        panic!("not started");
    };
    exec.wait_for_line("up").await;
    // More than the pipe, the agent and the socket hold; the last ones do not get through.
    let frame = vec![0; 1 << 20];
    let mut wire = bytes::BytesMut::new();
    for chunk in frame.chunks(MAX_FRAME_PAYLOAD) {
        HostFrame::Stdin(Bytes::copy_from_slice(chunk))
            .encode(&mut wire)
            .unwrap();
    }
    let stuck = timeout(Duration::from_millis(300), exec.stream.write_all(&wire)).await;
    assert!(
        stuck.is_err(),
        "a program that does not read stops the host"
    );
    drop(exec);
    gone(pid).await;
}

#[tokio::test]
async fn background_processes_end_the_exec_and_live_on() {
    let agent = Agent::start();
    let file = agent.directory().join("pid");
    let more = agent.directory().join("more");
    let script = format!(
        "(echo $$ > /dev/null; while [ ! -e {more} ]; do sleep 0.05; done; \
          head -c 200000 /dev/zero; echo late; echo fine > {more}.done) & \
         echo $! > {file}; echo early",
        more = more.display(),
        file = file.display()
    );
    let output = timeout(SOON, agent.sh(&script)).await.unwrap();
    assert_eq!(
        (output.exit.code, output.stdout.as_slice()),
        (0, &b"early\n"[..])
    );
    let pid = pid_in(&file);
    assert!(alive(pid));
    // It writes more than a pipe holds and is neither killed by SIGPIPE nor blocked.
    fs::write(&more, "").unwrap();
    gone(pid).await;
    assert_eq!(
        fs::read_to_string(format!("{}.done", more.display())).unwrap(),
        "fine\n"
    );
}

#[tokio::test]
async fn endless_background_output_does_not_hold_the_exec() {
    let agent = Agent::start();
    let file = agent.directory().join("pid");
    let script = format!("yes & echo $! > {}; echo $! >&2", file.display());
    let output = timeout(SOON, agent.sh(&script)).await.unwrap();
    assert_eq!(output.exit.code, 0);
    let pid = pid_in(&file);
    assert_eq!(output.stderr, format!("{pid}\n").as_bytes());
    assert!(alive(pid));
    agent.sh(&format!("kill {pid}")).await;
    gone(pid).await;
}

#[tokio::test]
async fn orphans_are_reaped() {
    let agent = Agent::start();
    let file = agent.directory().join("pid");
    // The grandchild outlives its parent, ends, and becomes the agent's to wait for.
    let script = format!(
        "(sleep 0.2 & echo $! > {}) > /dev/null 2>&1",
        file.display()
    );
    assert_eq!(agent.sh(&script).await.exit.code, 0);
    gone(pid_in(&file)).await;
    for _ in 0..20 {
        agent.sh("exit 0").await;
    }
    // The last exec's own process was waited for before its exit was reported.
    assert_eq!(children(agent.pid()), "");
}

#[tokio::test]
async fn frames_against_the_rules_end_the_exec() {
    let agent = Agent::start();
    for (stdin, bytes) in [
        (true, &b"\x11\0\0\0\x01x"[..]),
        (true, b"\x7f\0\0\0\0"),
        (true, b"\x01\xff\xff\xff\xff"),
        (true, b"\x02\0\0\0\x01x"),
        (true, b"\x02\0\0\0\0\x02\0\0\0\0"),
        (true, b"\x02\0\0\0\0\x01\0\0\0\x01x"),
        (false, b"\x01\0\0\0\x01x"),
        (false, b"\x02\0\0\0\0"),
    ] {
        let mut request = sh("sleep 1000; true");
        request.stdin = stdin;
        let mut exec = agent.exec(&request).await;
        let Some(AgentFrame::Started(Started { pid })) = exec.next().await else {
            panic!("not started");
        };
        exec.stream.write_all(bytes).await.unwrap();
        match timeout(SOON, exec.next()).await.unwrap() {
            Some(AgentFrame::Error(error)) => assert_eq!(error.code, ErrorCode::BadRequest),
            other => panic!("{bytes:?} gave {other:?}"),
        }
        gone(pid).await;
    }
}

#[tokio::test]
async fn a_hundred_at_once() {
    let agent = Agent::start();
    let mut execs = Vec::new();
    for n in 0..100 {
        execs.push(agent.exec(&sh(&format!("read x; echo {n}"))).await);
    }
    for (n, exec) in execs.into_iter().enumerate() {
        let output = exec.finish().await;
        assert_eq!(output.stdout, format!("{n}\n").as_bytes());
    }
    assert_eq!(children(agent.pid()), "");
}

/// Where this system has a cgroup v2 file system that this user can make directories in.
fn cgroup_base() -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let root = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let at = fields.next()?;
        (fields.next() == Some("cgroup2")).then(|| at.to_owned())
    })?;
    let base = format!("{root}/agent-test-{}", std::process::id());
    fs::create_dir(&base).ok()?;
    Some(base)
}

#[tokio::test]
async fn a_cgroup_holds_what_leaves_the_session() {
    let Some(base) = cgroup_base() else {
        println!("no writable cgroup v2 here: guests have one, and run this there");
        return;
    };
    {
        let agent = Agent::start_with(&["--cgroup", &base]);
        let file = agent.directory().join("pid");
        let mut request = sh(&format!(
            "setsid sh -c 'echo $$ > {}; sleep 1000; true' & wait; sleep 1000",
            file.display()
        ));
        request.timeout_ms = Some(500);
        let output = timeout(SOON, agent.exec(&request).await.finish())
            .await
            .unwrap();
        assert!(output.exit.timed_out);
        gone(pid_in(&file)).await;
        // The next exec removes what was still occupied when the last one ended.
        agent.sh("exit 0").await;
        let left = fs::read_dir(&base)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_type().unwrap().is_dir())
            .count();
        assert_eq!(left, 0);
    }
    fs::remove_dir(&base).unwrap();
}
