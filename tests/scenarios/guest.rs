//! The agent as the first program of a real guest: what needs a guest of its own to be seen. Its
//! VMM is in the jail, as that of every sandbox is.

use std::io;
use std::time::Instant;

use agent_protocol::{AgentFrame, ErrorCode, ExecRequest, FileQuery, HostFrame};
use e2e_tests::PATIENCE;
use e2e_tests::agent::{Agent, argv, sh};
use e2e_tests::pattern::{Pattern, assert_pattern};
use e2e_tests::process::status_kib;
use e2e_tests::report;
use e2e_tests::vmm::Machine;

/// The most that the agent may ever have had resident, in KiB.
const AGENT_LIMIT_KIB: u64 = 4096;

fn assert_agent_is_small(agent: &Agent) {
    let status = agent.must("cat /proc/1/status");
    let (peak, now) = (status_kib(&status, "VmHWM:"), status_kib(&status, "VmRSS:"));
    report(&format!("agent: {now} KiB resident, {peak} KiB at most"));
    assert!(peak < AGENT_LIMIT_KIB, "{peak} KiB");
}

/// The processes of the guest, zombies among them: not the agent itself, not the kernel's
/// threads, and not those that do the listing.
fn processes(agent: &Agent) -> Vec<String> {
    // proc_pid_stat(5): the id, the name, the state and the parent's id.
    let all = agent.must("cat /proc/[0-9]*/stat 2>/dev/null | cut -d ' ' -f 1-4");
    let is_listing = |line: &&str| {
        let lists = ["(sh)", "(cat)", "(cut)"]
            .iter()
            .any(|name| line.contains(name));
        lists && !line.contains(") Z")
    };
    // The parent of the agent is 0, and that of a thread of the kernel 0 or 2.
    all.lines()
        .filter(|line| !line.ends_with(" 0") && !line.ends_with(" 2"))
        .filter(|line| !is_listing(line))
        .map(str::to_owned)
        .collect()
}

/// Waits until no process is left. An orphan that has just ended may not be reaped yet.
fn assert_no_process_left(agent: &Agent, after: &str) {
    let deadline = Instant::now() + PATIENCE;
    while let left = processes(agent)
        && !left.is_empty()
    {
        assert!(Instant::now() < deadline, "after {after}: {left:?}");
    }
}

#[test]
fn programs_get_what_they_were_given_and_end_as_they_did() {
    let vmm = Machine::new().jailed().boot();
    let agent = vmm.agent();

    let given = ExecRequest {
        env: [("GREETING".to_owned(), "hello there".to_owned())].into(),
        cwd: Some("/usr/share".to_owned()),
        user: Some("user".to_owned()),
        ..sh("echo $GREETING; pwd; id -un; id -gn; echo $HOME; echo error >&2; exit 3")
    };
    let output = agent.exec(&given).finish();
    assert_eq!(
        output.text(),
        "hello there\n/usr/share\nuser\nuser\n/home/user"
    );
    assert_eq!(output.stderr, b"error\n");
    assert_eq!((output.exit.code, output.exit.signal), (3, None));

    let output = agent.sh("kill -9 $$");
    assert_eq!((output.exit.code, output.exit.signal), (137, Some(9)));

    for (program, code) in [
        ("no-such-program", ErrorCode::CommandNotFound),
        ("/etc/passwd", ErrorCode::CommandNotExecutable),
    ] {
        let refusal = agent.try_exec(&argv(&[program])).err().unwrap();
        assert_eq!(refusal.code, code);
        assert!(refusal.message.contains(program), "{refusal}");
    }

    let exec = agent.exec(&ExecRequest {
        stdin: true,
        ..argv(&["sha256sum"])
    });
    exec.feed(&b"abc"[..]);
    // FIPS 180-4, the example for "abc".
    let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  -";
    assert_eq!(exec.finish().text(), digest);
    // Input that a program leaves unread, and that is still on its way, takes nothing of its end.
    for _ in 0..20 {
        let exec = agent.exec(&ExecRequest {
            stdin: true,
            ..sh("echo said; exit 7")
        });
        exec.feed(io::repeat(b'x'));
        let output = exec.finish();
        assert_eq!(output.text(), "said");
        assert_eq!(output.exit.code, 7);
    }

    // In a guest, programs live in a system as they expect it.
    assert_eq!(agent.must("readlink /proc/1/exe"), "/init");
    agent.must("test -c /dev/null && test -d /sys/class && test -w /tmp && test -e /dev/ptmx");
    agent.must("ping -c 1 127.0.0.1");
    assert_agent_is_small(agent);
}

#[test]
fn nothing_of_a_program_outlives_its_time_and_orphans_are_reaped() {
    let vmm = Machine::new().jailed().boot();
    let agent = vmm.agent();
    assert_no_process_left(agent, "the boot");

    // Orphans end as children of the agent, which is to leave no zombie.
    agent.must("for n in 1 2 3 4 5 6 7 8; do (true & sh -c 'exit 3' & ) ; done; wait");
    agent.must("(setsid sh -c 'exit 0' &) ; true");
    assert_no_process_left(agent, "orphans");

    // What a program has started does not outlive its timeout, even in a session of its own.
    let escapes = "setsid sleep 1000 & (setsid setsid sleep 1001 &) ; sleep 1002";
    let output = agent
        .exec(&ExecRequest {
            timeout_ms: Some(3000),
            ..sh(&format!("echo begun; {escapes}"))
        })
        .finish();
    assert!(output.exit.timed_out, "{output:?}");
    assert_eq!((output.text().as_str(), output.exit.code), ("begun", 137));
    assert_no_process_left(agent, "a timeout");

    // Nor does it outlive the host's connection. That everything has ended shows in a lock that
    // all of it held.
    let mut exec = agent.exec(&sh(&format!(
        "exec 9>/tmp/lock; flock 9; echo begun; {escapes}"
    )));
    exec.wait_for("begun");
    drop(exec);
    agent.must("exec 9>/tmp/lock; flock 9");
    assert_agent_is_small(agent);
}

#[test]
fn output_of_any_size_passes_through_a_small_agent() {
    const SIZE: u64 = 100_000_000;
    let vmm = Machine::new().jailed().boot();
    let agent = vmm.agent();
    let mut counted = Counted::default();
    let output = agent
        .exec(&sh(&format!(
            "yes 0123456789abcde | head -c {SIZE}; echo end >&2"
        )))
        .finish_into(&mut counted);
    assert_eq!((output.exit.code, &output.stderr[..]), (0, &b"end\n"[..]));
    assert_eq!((counted.total, counted.wrong), (SIZE, 0));
    assert_agent_is_small(agent);

    // A host that does not read stops the program, and does not make the agent grow.
    let mut exec = agent.exec(&sh("yes"));
    assert!(matches!(exec.next_frame(), Some(AgentFrame::Started(_))));
    assert!(matches!(exec.next_frame(), Some(AgentFrame::Stdout(_))));
    assert_agent_is_small(agent);
}

/// Counts the lines of `yes 0123456789abcde`, and bytes that do not belong there.
#[derive(Default)]
struct Counted {
    total: u64,
    wrong: u64,
}

impl io::Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        const LINE: &[u8; 16] = b"0123456789abcde\n";
        for &byte in bytes {
            self.wrong += u64::from(byte != LINE[(self.total % 16) as usize]);
            self.total += 1;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn files_are_written_whole_with_mode_and_owner() {
    const SIZE: u64 = 20 << 20;
    let vmm = Machine::new().jailed().boot();
    let agent = vmm.agent();

    let query = FileQuery {
        mode: Some(0o4750),
        user: Some("user".to_owned()),
        ..FileQuery::new("/srv/new/deep/file")
    };
    let (status, entry) = agent.write(&query, Pattern::new(8), SIZE).unwrap();
    assert_eq!((status, entry.size), (201, SIZE));
    let described = agent.must("stat -c '%a %U %G %s' /srv/new/deep/file /srv/new");
    assert_eq!(
        described,
        format!("4750 user user {SIZE}\n755 user user 4096")
    );
    assert_pattern(agent.read("/srv/new/deep/file").unwrap(), 8, SIZE);

    // A reader sees the old content or the new, never a part.
    let mut reader = agent.exec(&ExecRequest {
        stdin: true,
        ..sh("exec 3</srv/new/deep/file; echo open; cat; wc -c <&3")
    });
    reader.wait_for("open");
    let (status, _) = agent
        .write(&FileQuery::new("/srv/new/deep/file"), &b"new"[..], 3)
        .unwrap();
    assert_eq!(status, 200);
    assert_eq!(agent.must("cat /srv/new/deep/file"), "new");
    reader.send(&HostFrame::StdinEnd);
    assert_eq!(reader.finish().text(), SIZE.to_string());

    // What breaks off leaves the old content, and nothing beside it.
    let broken = agent.connect_to(agent_protocol::AGENT_PORT).unwrap();
    let target = "/v1/files?path=/srv/new/deep/file";
    let head =
        format!("PUT {target} HTTP/1.1\r\nHost: agent\r\nContent-Length: 100000\r\n\r\nsome");
    io::Write::write_all(&mut &broken, head.as_bytes()).unwrap();
    drop(broken);
    assert_eq!(agent.must("cat /srv/new/deep/file"), "new");
    let names = |entries: Vec<serde_json::Value>| -> Vec<String> {
        entries
            .iter()
            .map(|entry| entry["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(agent.list("/srv/new/deep").unwrap()), ["file"]);

    agent.must("cd /srv/new && ln -s deep link && mkfifo fifo");
    assert_eq!(
        names(agent.list("/srv/new").unwrap()),
        ["deep", "fifo", "link"]
    );
    for (path, code) in [
        ("/no/such/file", ErrorCode::NotFound),
        ("/srv/new", ErrorCode::IsADirectory),
        ("/srv/new/fifo", ErrorCode::NotARegularFile),
        ("/etc/passwd/file", ErrorCode::NotADirectory),
    ] {
        let refusal = agent.read(path).err().unwrap();
        assert_eq!(refusal.code, code, "{path}: {refusal}");
    }
    assert_eq!(
        agent.stat("/no/such/file").unwrap_err().code,
        ErrorCode::NotFound
    );
    let version = agent.read("/proc/version").unwrap().text();
    assert!(version.starts_with("Linux version"), "{version}");
    let refusal = agent
        .write(&FileQuery::new("/proc/file"), &b"x"[..], 1)
        .unwrap_err();
    assert!(!refusal.message.is_empty());
    assert_agent_is_small(agent);
}
