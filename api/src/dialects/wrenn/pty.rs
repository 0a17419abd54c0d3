//! A program on a terminal, over a WebSocket.
//!
//! ```text
//! client → {"type":"start","cmd":"/bin/bash","cols":80,"rows":24}   or
//!          {"type":"connect","tag":"pty-1f2e3d4c"}                 once, first
//! client ← {"type":"started","pid":212,"tag":"pty-1f2e3d4c"}
//! client → {"type":"input","data":"bHMK"}, {"type":"resize","cols":100,"rows":30}   any number
//! client ← {"type":"output","data":"…"}                            any number; base64 both ways
//! client → {"type":"kill"}, {"type":"pong"}
//! client ← {"type":"exit","exit_code":0}  or  {"type":"error","data":"…","fatal":true}; then the
//!          socket is closed
//! ```
//!
//! A client that types in binary messages is also shown what follows in binary messages, both as it is.
//!
//! A client that goes away leaves the program as it is: it is a process in the background, and the
//! next client connects to it by its tag or process id, and is told the latest output first. It ends by
//! itself, by `kill`, or with the sandbox. A client that does not read stops nothing: what it misses
//! is told as an error that is not fatal.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::error::ApiError;
use super::extract::Path;
use super::socket::{self, MAX_MESSAGE, Received, Socket};
use crate::domain::{
    Command, ExecError, InUse, KILL, MAX_EXEC_TIMEOUT_SEC, Manager, ProcessEvent, ProcessRef,
    ProcessSpec, TerminalInput, check_size,
};
use crate::http::{Caller, ErrorBody, SocketPermit};

/// How often a client is told that the connection is alive.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How many messages of a client wait for the terminal; then it is not read any more.
const WAITING_INPUTS: usize = 4;

/// What a client says.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Order {
    Start(Start),
    Connect(Connect),
    Input { data: String },
    Resize { cols: i64, rows: i64 },
    Kill {},
    Pong {},
}

#[derive(Debug, Deserialize)]
struct Start {
    #[serde(default)]
    cmd: Option<String>,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    envs: Option<BTreeMap<String, String>>,
    #[serde(default)]
    cwd: Option<String>,
    #[serde(default)]
    user: Option<String>,
    #[serde(default)]
    tag: Option<String>,
    #[serde(default)]
    cols: Option<i64>,
    #[serde(default)]
    rows: Option<i64>,
}

#[derive(Debug, Deserialize)]
struct Connect {
    #[serde(default)]
    tag: Option<String>,
    #[serde(default)]
    pid: Option<u32>,
}

/// What a client is told.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum News<'a> {
    Started { pid: u32, tag: &'a str },
    Output { data: String },
    Exit { exit_code: i32 },
    Error { data: String, fatal: bool },
    Ping,
}

fn fatal(data: impl Into<String>) -> News<'static> {
    News::Error {
        data: data.into(),
        fatal: true,
    }
}

fn failed(source: ExecError) -> News<'static> {
    fatal(ApiError::from(source).message)
}

/// Run a program on a terminal
///
/// A WebSocket. The client's first message is `{"type":"start"}`, with `cmd` (`/bin/sh` if not given),
/// `args`, `envs`, `cwd`, `user`, `cols` (80) and `rows` (24), or `{"type":"connect"}` with the `tag`
/// or `pid` of one that runs. It is told `started` with both. Then it sends `input` with `data` in
/// base64, `resize` with `cols` and `rows`, and `kill`, and is told `output` with `data` in base64,
/// `ping` every 30 s, and at last `exit` with the `exit_code`, or an `error` that is `fatal`. One that
/// sends its input as binary messages also gets the output that follows as such. A client that goes
/// away leaves the program running.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/pty", operation_id = "openPty", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 101, description = "The WebSocket is open"),
        (status = 400, description = "Not a WebSocket's handshake", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 429, description = "Too many WebSockets", body = ErrorBody),
    ),
)]
pub async fn pty(
    caller: Caller,
    permit: SocketPermit,
    Path(id): Path<String>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    socket::open(upgrade, MAX_MESSAGE, async move |mut socket| {
        let last = serve(&mut socket, &caller.manager, &in_use).await;
        socket.end(last).await;
        caller.manager.keep_awake(in_use).await;
        drop(permit);
    })
}

/// Serves one client. The last thing to tell; `None` if it went away.
async fn serve(socket: &mut Socket, manager: &Manager, in_use: &InUse) -> Option<News<'static>> {
    const EXPECTED: &str = "{\"type\":\"start\"} or {\"type\":\"connect\",\"tag\":…}";
    let process = match socket.first(EXPECTED).await? {
        Ok(Order::Start(start)) => match manager.start_process(in_use, spec_of(start)).await {
            Ok(process) => ProcessRef::Pid(process.pid),
            Err(source) => return Some(failed(source)),
        },
        Ok(Order::Connect(connect)) => match (connect.tag, connect.pid) {
            (Some(tag), None) => ProcessRef::Tag(tag),
            (None, Some(pid)) => ProcessRef::Pid(pid),
            _ => return Some(fatal("connect takes either a tag or a pid")),
        },
        Ok(_) => return Some(fatal(format!("nothing runs here yet: expected {EXPECTED}"))),
        Err(problem) => return Some(fatal(problem)),
    };
    Session::attach(socket, manager, in_use, process).await
}

fn spec_of(start: Start) -> ProcessSpec {
    let mut argv = vec![start.cmd.unwrap_or_else(|| "/bin/sh".to_owned())];
    argv.extend(start.args.unwrap_or_default());
    ProcessSpec {
        command: Command {
            argv,
            env: start.envs.unwrap_or_default(),
            cwd: start.cwd,
            timeout_sec: MAX_EXEC_TIMEOUT_SEC,
        },
        user: start.user,
        tag: start.tag,
        terminal: Some((start.cols.unwrap_or(80), start.rows.unwrap_or(24))),
    }
}

/// A client at a terminal.
struct Session<'a> {
    socket: &'a mut Socket,
    manager: &'a Manager,
    in_use: &'a InUse,
    /// The process, by its id once that is known: another may get its tag.
    process: ProcessRef,
    /// Whether the client types in bytes, and so is shown bytes.
    is_raw: bool,
    typing: mpsc::Sender<TerminalInput>,
}

impl<'a> Session<'a> {
    /// Serves the client until the process ends or the client goes away.
    async fn attach(
        socket: &'a mut Socket,
        manager: &'a Manager,
        in_use: &'a InUse,
        process: ProcessRef,
    ) -> Option<News<'static>> {
        let (typing, mut typed) = mpsc::channel(WAITING_INPUTS);
        let input = stream::poll_fn(move |context| typed.poll_recv(context)).boxed();
        let mut events = match manager.attach_process(in_use, &process, input).await {
            Ok(events) => events,
            Err(source) => return Some(failed(source)),
        };
        let mut session = Self {
            socket,
            manager,
            in_use,
            process,
            is_raw: false,
            typing,
        };
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waiting: Option<TerminalInput> = None;
        loop {
            // While something waits for the terminal, the client is not read, but what the terminal
            // shows is told.
            let typing = session.typing.clone();
            let news = tokio::select! {
                // What the client has sent comes first: it may be what tells how to show something.
                biased;
                permit = typing.reserve(), if waiting.is_some() => {
                    // Otherwise the process has ended, which is told soon.
                    if let (Ok(permit), Some(input)) = (permit, waiting.take()) {
                        permit.send(input);
                    }
                    continue;
                }
                received = session.socket.order_or_bytes(), if waiting.is_none() => {
                    match session.obey(received?).await {
                        Ok(input) => waiting = input,
                        Err(news) => session.socket.tell(&news).await?,
                    }
                    continue;
                }
                _ = pings.tick() => News::Ping,
                event = events.next() => match event? {
                    Ok(ProcessEvent::Attached(process)) if !process.has_terminal => {
                        let problem = "the process has no terminal; follow it at \
                                       /processes/{process}/stream";
                        return Some(fatal(problem));
                    }
                    Ok(ProcessEvent::Attached(process)) => {
                        session.process = ProcessRef::Pid(process.pid);
                        let (pid, tag) = (process.pid, process.tag.as_str());
                        session.socket.tell(&News::Started { pid, tag }).await?;
                        continue;
                    }
                    Ok(ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes)) => {
                        if session.is_raw {
                            session.socket.send(bytes).await?;
                            continue;
                        }
                        News::Output { data: STANDARD.encode(bytes) }
                    }
                    Ok(ProcessEvent::Lost(bytes)) => News::Error {
                        data: format!("{bytes} bytes of output are not kept any more"),
                        fatal: false,
                    },
                    Ok(ProcessEvent::Exited(exit)) => {
                        return Some(News::Exit { exit_code: exit.code });
                    }
                    Err(source) => return Some(failed(ExecError::Host(source))),
                },
            };
            session.socket.tell(&news).await?;
        }
    }

    /// Does what the client says; returns what is to be done at the terminal, or what to tell it.
    async fn obey(
        &mut self,
        received: Received<Order>,
    ) -> Result<Option<TerminalInput>, News<'static>> {
        let refuse = |data: String| News::Error { data, fatal: false };
        let order = match received {
            Received::Order(order) => order,
            Received::Problem(problem) => return Err(refuse(problem)),
            Received::Bytes(bytes) => {
                self.is_raw = true;
                return Ok(Some(TerminalInput::Typed(bytes)));
            }
        };
        match order {
            Order::Pong {} => Ok(None),
            Order::Input { data } => {
                let bytes = STANDARD
                    .decode(data)
                    .map_err(|source| refuse(format!("input must be base64: {source}")))?;
                Ok(Some(TerminalInput::Typed(bytes.into())))
            }
            Order::Resize { cols, rows } => {
                let size = check_size((cols, rows)).map_err(refuse)?;
                Ok(Some(TerminalInput::Resized(size)))
            }
            Order::Kill {} => {
                let killed = self
                    .manager
                    .signal_process(self.in_use, &self.process, KILL)
                    .await;
                match killed {
                    Ok(()) => Ok(None),
                    Err(source) => Err(refuse(ApiError::from(source).message)),
                }
            }
            Order::Start(_) | Order::Connect(_) => {
                Err(refuse("a program runs here already".to_owned()))
            }
        }
    }
}
