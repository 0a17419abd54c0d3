//! Execute a command and follow its output, over a WebSocket.
//!
//! ```text
//! client → {"type":"start","cmd":"make","args":["-j2"]}      once, first
//! client → {"type":"stdin","data":"…"}, {"type":"stdin_end"}  if the start has "stdin": true
//! client ← {"type":"start","pid":212}
//! client ← {"type":"stdout","data":"…"}, {"type":"stderr","data":"…"}   any number
//! client ← {"type":"exit","exit_code":0}  or  {"type":"error","data":"…"}; then the socket is closed
//! ```
//!
//! Nothing is collected: a client that does not read stops the command's writes, and a command that
//! does not read stops the client's. A client that goes away, or sends `{"type":"stop"}`, ends the
//! command with all its children.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::{self, Sender};

use super::error::ApiError;
use super::extract::Path;
use super::socket::{self, Data, MAX_MESSAGE, Socket};
use super::text::Text;
use crate::domain::{Command, ExecError, ExecEvent, InUse, MAX_EXEC_TIMEOUT_SEC, Manager};
use crate::http::{Caller, ErrorBody, SocketPermit};

/// Pieces of input that wait for the guest to take them.
const PIECES_IN_FLIGHT: usize = 2;

/// While a client is not read from, since the command does not read, how often it is made sure that
/// the client is still there.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// What a client says.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Order {
    Start(Start),
    Stdin(Input),
    StdinEnd {},
    Stop {},
}

/// A piece of standard input.
#[derive(Debug, Deserialize)]
struct Input {
    data: String,
    #[serde(default)]
    encoding: InputEncoding,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum InputEncoding {
    #[default]
    #[serde(rename = "utf-8")]
    Utf8,
    Base64,
}

impl Input {
    fn bytes(self) -> Result<Bytes, String> {
        match self.encoding {
            InputEncoding::Utf8 => Ok(self.data.into()),
            InputEncoding::Base64 => STANDARD
                .decode(self.data)
                .map(Into::into)
                .map_err(|source| format!("invalid base64: {source}")),
        }
    }
}

#[derive(Debug, Deserialize)]
struct Start {
    #[serde(default)]
    cmd: String,
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    envs: Option<BTreeMap<String, String>>,
    #[serde(default)]
    cwd: Option<String>,
    #[serde(default)]
    timeout_sec: Option<i64>,
    #[serde(default)]
    stdin: bool,
}

/// What a client is told.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum News<'a> {
    Start {
        pid: u32,
    },
    Stdout(Data<'a>),
    Stderr(Data<'a>),
    Exit {
        exit_code: i32,
        #[serde(skip_serializing_if = "std::ops::Not::not")]
        timed_out: bool,
    },
    Error {
        data: String,
    },
}

/// Execute a command and follow its output
///
/// A WebSocket. The client's first message is `{"type":"start","cmd":…}`, with the fields of an
/// exec, but `timeout_sec` is 86400 by default. Then it is told `start` with the `pid`, `stdout` and
/// `stderr` with `data` (`encoding` is `base64` for what is not UTF-8), and at last `exit` with the
/// `exit_code`, or `error`. If the first message has `"stdin": true`, the client may write to the
/// command, by `{"type":"stdin","data":…}` (with `"encoding":"base64"` for what is not UTF-8) and at
/// last `{"type":"stdin_end"}`. A client that goes away ends the command.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/exec/stream", operation_id = "execStream", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 101, description = "The WebSocket is open"),
        (status = 400, description = "Not a WebSocket's handshake", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 429, description = "Too many WebSockets", body = ErrorBody),
    ),
)]
pub async fn exec_stream(
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

/// Serves one client until its command has ended. The last thing to tell; `None` if it went away.
async fn serve(socket: &mut Socket, manager: &Manager, in_use: &InUse) -> Option<News<'static>> {
    let problem = match socket.first("{\"type\":\"start\",\"cmd\":…}").await? {
        Ok(Order::Start(start)) => return run(socket, manager, in_use, start).await,
        Ok(Order::Stop {}) => "there is nothing to stop yet".to_owned(),
        Ok(_) => "nothing runs yet that could read; expected start".to_owned(),
        Err(problem) => problem,
    };
    Some(News::Error { data: problem })
}

/// Runs the command and tells what it writes. The last thing to tell; `None` if the client went
/// away.
async fn run(
    socket: &mut Socket,
    manager: &Manager,
    in_use: &InUse,
    start: Start,
) -> Option<News<'static>> {
    let error = |data| Some(News::Error { data });
    let mut argv = vec![start.cmd];
    argv.extend(start.args.unwrap_or_default());
    let command = Command {
        argv,
        env: start.envs.unwrap_or_default(),
        cwd: start.cwd,
        timeout_sec: start.timeout_sec.unwrap_or(MAX_EXEC_TIMEOUT_SEC),
    };
    let (mut input, content) = match start.stdin {
        true => {
            let (sender, content) = input();
            (Some(sender), Some(content))
        }
        false => (None, None),
    };
    // Dropped before `input`: a command whose client goes away must not take that for the end of
    // what it reads.
    let mut events = match manager.exec_events(in_use, command, content).await {
        Ok(events) => events,
        Err(source) => return error(ApiError::from(source).message),
    };
    let mut waiting: Option<Bytes> = None;
    let mut check = tokio::time::interval(CHECK_INTERVAL);
    let (mut stdout, mut stderr) = (Text::default(), Text::default());
    let last = loop {
        let event = tokio::select! {
            order = socket.order(), if waiting.is_none() => {
                match order? {
                    Ok(Order::Stop {}) => return error("the command was stopped".to_owned()),
                    Ok(Order::Start(_)) => return error("only one command runs here".to_owned()),
                    Ok(Order::Stdin(_) | Order::StdinEnd {}) if !start.stdin => {
                        return error("the command was started without stdin".to_owned());
                    }
                    Ok(Order::Stdin(piece)) => match piece.bytes() {
                        // What comes after the end has nobody who reads it.
                        Ok(bytes) => waiting = input.as_ref().map(|_| bytes),
                        Err(problem) => return error(problem),
                    },
                    Ok(Order::StdinEnd {}) => input = None,
                    Err(problem) => return error(problem),
                }
                continue;
            },
            taken = pass_on(&mut input, &mut waiting), if waiting.is_some() => {
                if !taken {
                    input = None;
                }
                continue;
            }
            _ = check.tick(), if waiting.is_some() => {
                socket.check().await?;
                continue;
            }
            event = events.next() => event,
        };
        match event {
            Some(Ok(ExecEvent::Started { pid })) => socket.tell(&News::Start { pid }).await?,
            Some(Ok(ExecEvent::Stdout(bytes))) => {
                if let Some(piece) = stdout.push(&bytes) {
                    socket.tell(&News::Stdout(Data::new(&piece))).await?;
                }
            }
            Some(Ok(ExecEvent::Stderr(bytes))) => {
                if let Some(piece) = stderr.push(&bytes) {
                    socket.tell(&News::Stderr(Data::new(&piece))).await?;
                }
            }
            Some(Ok(ExecEvent::Exited(exit))) => {
                break News::Exit {
                    exit_code: exit.code,
                    timed_out: exit.timed_out,
                };
            }
            Some(Err(source)) => {
                break News::Error {
                    data: ApiError::from(ExecError::Host(source)).message,
                };
            }
            None => {
                break News::Error {
                    data: "the command's output ended without its exit status".to_owned(),
                };
            }
        }
    };
    if let Some(piece) = stdout.rest() {
        socket.tell(&News::Stdout(Data::new(&piece))).await?;
    }
    if let Some(piece) = stderr.rest() {
        socket.tell(&News::Stderr(Data::new(&piece))).await?;
    }
    Some(last)
}

/// What is written to a command, and where it comes out.
fn input() -> (Sender<Bytes>, BoxStream<'static, io::Result<Bytes>>) {
    let (sender, mut pieces) = mpsc::channel(PIECES_IN_FLIGHT);
    let content = stream::poll_fn(move |context| pieces.poll_recv(context));
    (sender, content.map(Ok).boxed())
}

/// Passes on what waits once there is room for it; `false` if nobody reads any more.
async fn pass_on(input: &mut Option<Sender<Bytes>>, waiting: &mut Option<Bytes>) -> bool {
    let Some(sender) = input else {
        *waiting = None;
        return false;
    };
    let permit = sender.reserve().await;
    let piece = waiting.take();
    match (permit, piece) {
        (Ok(permit), Some(piece)) => {
            permit.send(piece);
            true
        }
        (Ok(_), None) => true,
        (Err(_), _) => false,
    }
}
