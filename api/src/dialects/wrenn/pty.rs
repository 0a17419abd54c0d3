//! A program on a terminal, over a WebSocket.
//!
//! ```text
//! client → {"type":"start","cmd":"/bin/bash","cols":80,"rows":24}   or
//!          {"type":"connect","tag":"pty-1f2e3d4c"}                 once, first
//! client ← {"type":"started","pid":212,"tag":"pty-1f2e3d4c"}
//! client → {"type":"input","data":"bHMK"}, {"type":"resize","cols":100,"rows":30}   any number
//! client ← {"type":"output","data":"…"}                            any number; base64 both ways
//! client → {"type":"kill"}
//! client ← {"type":"exit","exit_code":0}  or  {"type":"error","data":"…","fatal":true}; then the
//!          socket is closed
//! ```
//!
//! A client that goes away leaves the program as it is: it is a process in the background, and the
//! next client connects to it by its tag or process id, and is told the latest output first. It ends by
//! itself, by `kill`, or with the sandbox. A client that does not read stops nothing: what it misses
//! is told as an error that is not fatal.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::Path;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::error::ApiError;
use super::exec_stream::{READ_BUFFER, close};
use crate::domain::{
    Command, ExecError, InUse, KILL, MAX_EXEC_TIMEOUT_SEC, Manager, ProcessEvent, ProcessRef,
    ProcessSpec, TerminalInput, check_size,
};
use crate::http::{Caller, ErrorBody, SocketPermit};

/// How long a client may take to say what to run.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a client is told that the connection is alive.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// The largest message of a client, in bytes: what a command may have.
const MAX_MESSAGE: usize = 1 << 20;
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
/// `ping` every 30 s, and at last `exit` with the `exit_code`, or an `error` that is `fatal`. A client
/// that goes away leaves the program running.
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
    let upgrade = upgrade
        .map_err(|rejection| ApiError::invalid(format!("expected a WebSocket: {rejection}")))?;
    Ok(upgrade
        .read_buffer_size(READ_BUFFER)
        .max_message_size(MAX_MESSAGE)
        .on_upgrade(async move |mut socket| {
            if let Some(last) = serve(&mut socket, &caller.manager, &in_use).await
                && tell(&mut socket, &last).await.is_some()
            {
                close(&mut socket).await;
            }
            caller.manager.keep_awake(in_use).await;
            drop(permit);
        }))
}

/// Serves one client. The last thing to tell; `None` if it went away.
async fn serve(socket: &mut WebSocket, manager: &Manager, in_use: &InUse) -> Option<News<'static>> {
    const EXPECTED: &str = "expected {\"type\":\"start\"} or {\"type\":\"connect\",\"tag\":…}";
    let process = match timeout(START_TIMEOUT, next_order(socket)).await {
        Ok(Some(Ok(Order::Start(start)))) => {
            match manager.start_process(in_use, spec_of(start)).await {
                Ok(process) => ProcessRef::Pid(process.pid),
                Err(source) => return Some(failed(source)),
            }
        }
        Ok(Some(Ok(Order::Connect(connect)))) => match (connect.tag, connect.pid) {
            (Some(tag), None) => ProcessRef::Tag(tag),
            (None, Some(pid)) => ProcessRef::Pid(pid),
            _ => return Some(fatal("connect takes either a tag or a pid")),
        },
        Ok(Some(Ok(_))) => return Some(fatal(format!("nothing runs here yet: {EXPECTED}"))),
        Ok(Some(Err(problem))) => return Some(fatal(problem)),
        Ok(None) => return None,
        Err(_) => {
            let seconds = START_TIMEOUT.as_secs();
            let problem = format!("nothing was sent within {seconds} s: {EXPECTED}");
            return Some(fatal(problem));
        }
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

/// The client's next message; `None` if it went away.
async fn next_order(socket: &mut WebSocket) -> Option<Result<Order, String>> {
    loop {
        let text = match socket.recv().await?.ok()? {
            Message::Text(text) => Bytes::from(text),
            Message::Binary(bytes) => bytes,
            Message::Close(_) => return None,
            Message::Ping(_) | Message::Pong(_) => continue,
        };
        return Some(
            serde_json::from_slice(&text).map_err(|source| format!("invalid message: {source}")),
        );
    }
}

/// A client at a terminal.
struct Session<'a> {
    socket: &'a mut WebSocket,
    manager: &'a Manager,
    in_use: &'a InUse,
    /// The process, by its id once that is known: another may get its tag.
    process: ProcessRef,
    typing: mpsc::Sender<TerminalInput>,
}

impl<'a> Session<'a> {
    /// Serves the client until the process ends or the client goes away.
    async fn attach(
        socket: &'a mut WebSocket,
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
                permit = typing.reserve(), if waiting.is_some() => {
                    // Otherwise the process has ended, which is told soon.
                    if let (Ok(permit), Some(input)) = (permit, waiting.take()) {
                        permit.send(input);
                    }
                    continue;
                }
                order = next_order(session.socket), if waiting.is_none() => {
                    match session.obey(order?).await {
                        Ok(input) => waiting = input,
                        Err(news) => tell(session.socket, &news).await?,
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
                        tell(session.socket, &News::Started { pid, tag }).await?;
                        continue;
                    }
                    Ok(ProcessEvent::Stdout(bytes) | ProcessEvent::Stderr(bytes)) => News::Output {
                        data: STANDARD.encode(bytes),
                    },
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
            tell(session.socket, &news).await?;
        }
    }

    /// Does what the client says; returns what is to be done at the terminal, or what to tell it.
    async fn obey(
        &mut self,
        order: Result<Order, String>,
    ) -> Result<Option<TerminalInput>, News<'static>> {
        let refuse = |data: String| News::Error { data, fatal: false };
        match order.map_err(refuse)? {
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

/// `None` if the client went away.
async fn tell(socket: &mut WebSocket, news: &News<'_>) -> Option<()> {
    let text = serde_json::to_string(news).ok()?;
    socket.send(Message::Text(text.into())).await.ok()
}
