//! Processes that belong to no connection, and terminals.

use std::{path::Path, time::Duration};

use agent_protocol::{
    AttachRequest, AttachedFrame, ErrorCode, ErrorDetail, ExecRequest, Exit, MAX_ATTACHED,
    MAX_BACKLOG, MAX_ENDED, MAX_PROCESSES, PATH_ATTACH, PATH_PROCESSES, PATH_SIGNAL,
    PROCESS_UPGRADE, Process, ProcessList, ProcessRef, SignalRequest, StartProcess, TerminalFrame,
    TerminalSize,
};
use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::Method;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::common::{Agent, argv, builder, error_of, sh};

const SIZE: TerminalSize = TerminalSize { cols: 80, rows: 24 };

impl Agent {
    async fn try_keep(
        &self,
        tag: &str,
        exec: ExecRequest,
        terminal: Option<TerminalSize>,
    ) -> Result<Process, (u16, ErrorDetail)> {
        let request = StartProcess {
            exec,
            tag: tag.to_owned(),
            terminal,
        };
        let body = serde_json::to_vec(&request).unwrap();
        let response = self.call(Method::POST, PATH_PROCESSES, &body).await;
        if response.status() != 201 {
            return Err(error_of(response).await);
        }
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        Ok(serde_json::from_slice(&bytes).unwrap())
    }

    async fn keep(&self, tag: &str, exec: ExecRequest) -> Process {
        self.try_keep(tag, exec, None).await.unwrap()
    }

    async fn processes(&self) -> Vec<Process> {
        let response = self.call(Method::GET, PATH_PROCESSES, b"").await;
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        let list: ProcessList = serde_json::from_slice(&bytes).unwrap();
        list.processes
    }

    async fn signal(&self, process: ProcessRef, signal: i32) -> Result<(), (u16, ErrorDetail)> {
        let body = serde_json::to_vec(&SignalRequest { process, signal }).unwrap();
        let response = self.call(Method::POST, PATH_SIGNAL, &body).await;
        match response.status().as_u16() {
            204 => Ok(()),
            _ => Err(error_of(response).await),
        }
    }

    async fn try_attach(&self, process: ProcessRef) -> Result<Attached, (u16, ErrorDetail)> {
        let body = serde_json::to_vec(&AttachRequest { process }).unwrap();
        let body = Full::new(Bytes::from(body)).map_err(|never| match never {});
        let request = builder(Method::POST, PATH_ATTACH)
            .header("connection", "upgrade")
            .header("upgrade", PROCESS_UPGRADE)
            .body(body)
            .unwrap();
        let response = self.request(request).await;
        if response.status() != 101 {
            return Err(error_of(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.unwrap();
        let parts = upgraded.downcast::<TokioIo<UnixStream>>().unwrap();
        Ok(Attached {
            stream: parts.io.into_inner(),
            buffer: BytesMut::from(&parts.read_buf[..]),
        })
    }

    async fn attach(&self, tag: &str) -> Attached {
        self.try_attach(by_tag(tag)).await.unwrap()
    }

    /// A shell on a terminal, which has said that it is there.
    async fn terminal(&self, tag: &str, script: &str) -> Attached {
        self.try_keep(tag, sh(script), Some(SIZE)).await.unwrap();
        self.attach(tag).await
    }
}

fn by_tag(tag: &str) -> ProcessRef {
    ProcessRef::Tag(tag.to_owned())
}

struct Attached {
    stream: UnixStream,
    buffer: BytesMut,
}

impl Attached {
    /// The next frame; `None` at the end of the connection.
    async fn next(&mut self) -> Option<AttachedFrame> {
        loop {
            if let Some(frame) = AttachedFrame::decode(&mut self.buffer).unwrap() {
                return Some(frame);
            }
            if self.stream.read_buf(&mut self.buffer).await.unwrap() == 0 {
                assert!(self.buffer.is_empty(), "the connection ends within a frame");
                return None;
            }
        }
    }

    async fn send(&mut self, frame: TerminalFrame) {
        let mut wire = BytesMut::new();
        frame.encode(&mut wire).unwrap();
        self.stream.write_all(&wire).await.unwrap();
    }

    async fn type_in(&mut self, bytes: &'static [u8]) {
        self.send(TerminalFrame::Input(Bytes::from_static(bytes)))
            .await;
    }

    /// Reads on until the output holds `text`.
    async fn wait_for(&mut self, text: &str) -> Vec<u8> {
        let mut stdout = Vec::new();
        while !contains(&stdout, text.as_bytes()) {
            match self.next().await {
                Some(AttachedFrame::Stdout(bytes)) => stdout.extend(bytes),
                Some(AttachedFrame::Attached(_) | AttachedFrame::Stderr(_)) => {}
                other => panic!("{other:?} came before {text:?}"),
            }
        }
        stdout
    }

    /// What comes up to the end: the bytes lost, of stdout and of stderr.
    async fn finish(mut self) -> (u64, Vec<u8>, Vec<u8>, Exit) {
        let (mut lost, mut stdout, mut stderr) = (0, Vec::new(), Vec::new());
        loop {
            match self.next().await {
                Some(AttachedFrame::Attached(process)) => assert!(process.pid > 0),
                Some(AttachedFrame::Stdout(bytes)) => stdout.extend(bytes),
                Some(AttachedFrame::Stderr(bytes)) => stderr.extend(bytes),
                Some(AttachedFrame::Lost(gap)) => lost += gap.bytes,
                Some(AttachedFrame::Exit(exit)) => {
                    assert_eq!(self.next().await, None);
                    return (lost, stdout, stderr, exit);
                }
                other => panic!("{other:?} came before the exit"),
            }
        }
    }
}

fn contains(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|window| window == text)
}

/// Waits until the process is gone.
async fn gone(pid: u32) {
    while Path::new(&format!("/proc/{pid}")).exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_process_outlives_whoever_started_and_followed_it() {
    let agent = Agent::start();
    let fifo = agent.directory().join("go");
    let script = format!(
        "mkfifo {0}; echo begun; echo oh >&2; read word < {0}; echo $word; exit 3",
        fifo.display()
    );
    let process = agent.keep("job", sh(&script)).await;
    assert_eq!((process.tag.as_str(), process.terminal), ("job", false));
    assert_eq!(process.argv[..2], ["sh", "-c"]);
    let mut first = agent.attach("job").await;
    first.wait_for("begun\n").await;
    drop(first);

    assert_eq!(agent.processes().await, std::slice::from_ref(&process));
    let second = agent
        .try_attach(ProcessRef::Pid(process.pid))
        .await
        .unwrap();
    let third = agent.attach("job").await;
    std::fs::write(&fifo, "on\n").unwrap();
    for attached in [second, third, agent.attach("job").await] {
        let (lost, stdout, stderr, exit) = attached.finish().await;
        assert_eq!(
            (lost, &stdout[..], &stderr[..]),
            (0, &b"begun\non\n"[..], &b"oh\n"[..])
        );
        assert_eq!((exit.code, exit.signal, exit.timed_out), (3, None, false));
    }
    let listed = agent.processes().await;
    assert_eq!(listed[0].exit.as_ref().map(|exit| exit.code), Some(3));
    // Its tag is free again, and names the new one from now on.
    let next = agent.keep("job", argv(&["sleep", "1000"])).await;
    let Some(AttachedFrame::Attached(told)) = agent.attach("job").await.next().await else {
        panic!("nothing is told");
    };
    assert_eq!(told, next);
}

#[tokio::test]
async fn signals_reach_the_group_and_the_end_is_told() {
    let agent = Agent::start();
    // Before it is `sleep`, the child is a shell, which takes the signal for its own.
    let script = "trap 'echo caught; exit 7' TERM; sleep 1000 & \
                  until grep -q sleep /proc/$!/comm; do :; done; echo $!; wait";
    agent.keep("trap", sh(script)).await;
    let mut attached = agent.attach("trap").await;
    let out = attached.wait_for("\n").await;
    agent.signal(by_tag("trap"), 15).await.unwrap();
    let (_, stdout, _, exit) = attached.finish().await;
    assert_eq!((&stdout[..], exit.code), (&b"caught\n"[..], 7));
    let child = String::from_utf8(out).unwrap().trim().parse().unwrap();
    gone(child).await;

    let killed = agent.keep("kill", sh("sleep 1000 & echo $!; wait")).await;
    let mut attached = agent.attach("kill").await;
    let out = attached.wait_for("\n").await;
    agent.signal(ProcessRef::Pid(killed.pid), 9).await.unwrap();
    let (.., exit) = attached.finish().await;
    assert_eq!((exit.code, exit.signal), (137, Some(9)));
    gone(String::from_utf8(out).unwrap().trim().parse().unwrap()).await;

    for (process, signal, code) in [
        (by_tag("kill"), 9, ErrorCode::NoSuchProcess),
        (by_tag("none"), 9, ErrorCode::NoSuchProcess),
        (ProcessRef::Pid(1), 9, ErrorCode::NoSuchProcess),
        (by_tag("kill"), 0, ErrorCode::BadRequest),
        (by_tag("kill"), 64, ErrorCode::BadRequest),
        (by_tag("kill"), -9, ErrorCode::BadRequest),
    ] {
        let (_, error) = agent.signal(process, signal).await.unwrap_err();
        assert_eq!(error.code, code, "{error}");
    }
}

#[tokio::test]
async fn a_reader_that_does_not_read_stops_nothing_and_is_told_what_it_missed() {
    const FLOOD: usize = 64 << 20;
    let agent = Agent::start();
    let flood = async |tag: &str, size: usize| {
        let script = format!("yes 0123456789abcde | head -c {size}; echo; echo end");
        agent.keep(tag, sh(&script)).await;
        let mut slow = agent.attach(tag).await;
        assert!(matches!(
            slow.next().await,
            Some(AttachedFrame::Attached(_))
        ));
        let (lost, kept, _, exit) = agent.attach(tag).await.finish().await;
        assert_eq!(exit.code, 0);
        assert!(kept.ends_with(b"\nend\n"));
        assert_eq!(lost as usize + kept.len(), size + 5);
        // What the slow one has not been sent is gone by now but for what is kept.
        let (lost, kept, ..) = slow.finish().await;
        assert!(kept.ends_with(b"\nend\n"));
        assert_eq!(lost as usize + kept.len(), size + 5);
        lost
    };
    // With what the program itself comes to occupy for this.
    flood("small", 16 * MAX_BACKLOG).await;
    let before = agent.peak_kib();
    assert!(flood("large", FLOOD).await > 0);
    let grown = agent.peak_kib() - before;
    println!("agent grew by {grown} KiB while {FLOOD} bytes were written");
    assert!(grown < 4 * (MAX_BACKLOG as u64 / 1024), "{grown} KiB");
}

#[tokio::test]
async fn there_are_bounds_and_they_are_told() {
    let agent = Agent::start();
    let refused = async |tag: &str, exec: ExecRequest, size| {
        let (_, error) = agent.try_keep(tag, exec, size).await.unwrap_err();
        error.code
    };
    for tag in ["", "12", "a\nb"] {
        let code = refused(tag, argv(&["true"]), None).await;
        assert_eq!(code, ErrorCode::BadRequest, "{tag:?}");
    }
    let none = Some(TerminalSize { cols: 0, rows: 1 });
    let stdin = ExecRequest {
        stdin: true,
        ..argv(&["true"])
    };
    assert_eq!(
        refused("t", argv(&["true"]), none).await,
        ErrorCode::BadRequest
    );
    assert_eq!(refused("t", stdin, None).await, ErrorCode::BadRequest);
    let missing = argv(&["no-such-program"]);
    assert_eq!(
        refused("t", missing.clone(), Some(SIZE)).await,
        ErrorCode::CommandNotFound
    );
    assert_eq!(
        refused("t", missing, None).await,
        ErrorCode::CommandNotFound
    );
    assert!(agent.processes().await.is_empty());

    for n in 0..MAX_ENDED + 4 {
        let tag = format!("ended-{n}");
        agent.keep(&tag, argv(&["true"])).await;
        agent.attach(&tag).await.finish().await;
    }
    // The last may be told before the one that goes for it is forgotten.
    while agent.processes().await.len() > MAX_ENDED {}
    let (_, error) = agent.try_attach(by_tag("ended-3")).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::NoSuchProcess);
    agent.attach("ended-4").await.finish().await;

    for n in 0..MAX_PROCESSES {
        agent
            .keep(&format!("run-{n}"), argv(&["sleep", "1000"]))
            .await;
    }
    let code = refused("run-0", argv(&["sleep", "1000"]), None).await;
    assert_eq!(code, ErrorCode::TagInUse);
    let code = refused("more", argv(&["sleep", "1000"]), None).await;
    assert_eq!(code, ErrorCode::OutOfResources);

    let mut attached = Vec::new();
    for _ in 0..MAX_ATTACHED {
        attached.push(agent.attach("run-0").await);
    }
    let (_, error) = agent.try_attach(by_tag("run-0")).await.err().unwrap();
    assert_eq!(error.code, ErrorCode::OutOfResources);
    println!(
        "{} KiB at most, with {MAX_ATTACHED} attached",
        agent.peak_kib()
    );
    drop(attached);
    while agent.try_attach(by_tag("run-0")).await.is_err() {}
}

#[tokio::test]
async fn who_breaks_the_protocol_is_told_and_the_process_runs_on() {
    let agent = Agent::start();
    let process = agent.keep("job", argv(&["sleep", "1000"])).await;
    for wire in [
        &[0x01, 0, 0, 0, 1, b'x'][..],
        &[0x03, 0, 0, 0, 2, b'{', b'}'],
        &[0x01, 0xff, 0xff, 0xff, 0xff],
        &[0x77],
        &[0x11, 0, 0, 0, 0],
    ] {
        let mut attached = agent.attach("job").await;
        attached.next().await;
        attached.stream.write_all(wire).await.unwrap();
        let Some(AttachedFrame::Error(error)) = attached.next().await else {
            panic!("{wire:?} was taken");
        };
        assert_eq!(error.code, ErrorCode::BadRequest);
        assert_eq!(attached.next().await, None);
    }
    assert_eq!(agent.processes().await, [process]);
    let (status, _) = agent.refused(Method::POST, PATH_ATTACH, b"{}").await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn a_terminal_has_a_size_a_session_and_ctrl_c() {
    let agent = Agent::start();
    let mut terminal = agent.terminal("pty", "exec sh -i 2>&1").await;
    terminal
        .type_in(b"PS1=; stty -echo; tty; echo $TERM; stty size; echo do''ne\n")
        .await;
    let out = String::from_utf8(terminal.wait_for("done\r\n").await).unwrap();
    assert!(out.contains("/dev/pts/") && out.contains("24 80"), "{out}");
    assert!(out.contains("xterm-256color"), "{out}");
    terminal
        .send(TerminalFrame::Resize(TerminalSize {
            cols: 132,
            rows: 43,
        }))
        .await;
    terminal.type_in(b"stty size\n").await;
    terminal.wait_for("43 132\r\n").await;
    // It reaches what runs in the foreground, and not the shell.
    terminal.type_in(b"sh -c 'trap \"echo caught; exit 5\" INT; echo ready; while :; do sleep 0.01; done'; echo status $?\n").await;
    terminal.wait_for("ready\r\n").await;
    terminal.type_in(b"\x03").await;
    terminal.wait_for("status 5\r\n").await;
    // A character whose bytes come apart stays whole; all is given as it is.
    terminal
        .type_in(b"od -An -tx1; printf '\\377\\303\\n'\n")
        .await;
    terminal.type_in(b"\xc3").await;
    terminal.type_in(b"\xbc\n\x04").await;
    let mut out = terminal.wait_for("c3 bc 0a").await;
    while !contains(&out, b"\xff\xc3\r\n") {
        match terminal.next().await {
            Some(AttachedFrame::Stdout(bytes)) => out.extend(bytes),
            other => panic!("{other:?}"),
        }
    }
    // Who hangs up leaves it, and who comes again goes on.
    drop(terminal);
    let mut again = agent.attach("pty").await;
    again.wait_for("43 132\r\n").await;
    again.type_in(b"exit 9\n").await;
    let (.., exit) = again.finish().await;
    assert_eq!(exit.code, 9);
}

#[tokio::test]
async fn what_is_left_on_a_terminal_is_hung_up() {
    let agent = Agent::start();
    let script = "(trap '' HUP; sleep 1000) & sleep 1000 & echo $!; exec sleep 1001";
    agent.try_keep("pty", sh(script), Some(SIZE)).await.unwrap();
    let mut terminal = agent.attach("pty").await;
    let out = terminal.wait_for("\n").await;
    agent.signal(by_tag("pty"), 9).await.unwrap();
    let (.., exit) = terminal.finish().await;
    assert_eq!(exit.signal, Some(9));
    gone(String::from_utf8(out).unwrap().trim().parse().unwrap()).await;
}

#[tokio::test]
async fn a_terminal_that_nobody_reads_holds_up_what_is_typed_and_nothing_else() {
    let agent = Agent::start();
    let mut terminal = agent
        .terminal("pty", "stty raw -echo; echo raw; kill -STOP $$")
        .await;
    terminal.wait_for("raw").await;
    let stuck = tokio::spawn(async move {
        let bytes = Bytes::from(vec![b'x'; 64 * 1024]);
        for _ in 0..64 {
            terminal.send(TerminalFrame::Input(bytes.clone())).await;
        }
        terminal
    });
    let before = agent.peak_kib();
    let others = agent.keep("other", argv(&["echo", "there"])).await;
    let (_, stdout, ..) = agent.attach("other").await.finish().await;
    assert_eq!(
        (&stdout[..], others.tag.as_str()),
        (&b"there\n"[..], "other")
    );
    assert!(!stuck.is_finished());
    let grown = agent.peak_kib() - before;
    println!("peak resident size: {before} KiB before, {grown} KiB more after");
    assert!(grown < 1024, "{grown} KiB");
    // Who is stuck and hangs up is not attached any more.
    stuck.abort();
    agent.signal(by_tag("pty"), 9).await.unwrap();
    let (.., exit) = agent.attach("pty").await.finish().await;
    assert_eq!(exit.signal, Some(9));
}
