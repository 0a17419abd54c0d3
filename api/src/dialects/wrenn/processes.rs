//! Processes in the background: list them, end them, and follow one over a WebSocket.
//!
//! ```text
//! client ← {"type":"start","pid":212,"tag":"proc-1f2e3d4c"}                 once, first
//! client ← {"type":"stdout","data":"…"}, {"type":"stderr","data":"…"}       any number
//! client ← {"type":"lost","bytes":4096}                                     output that is not kept
//! client ← {"type":"exit","exit_code":0}  or  {"type":"error","data":"…"}; then the socket is closed
//! ```
//!
//! A client that goes away, or does not read, does nothing to the process.

use axum::Json;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::http::StatusCode;
use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ApiError;
use super::extract::{Path, Query};
use super::socket::{self, Data, Socket};
use super::text::Text;
use crate::domain::{ExecError, InUse, KILL, Manager, Process, ProcessEvent, ProcessRef};
use crate::http::{Caller, ErrorBody, SocketPermit};

/// A process that was started in the background.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = BackgroundExecResponse)]
pub struct BackgroundExecBody {
    /// The sandbox.
    pub sandbox_id: String,
    /// The program.
    pub cmd: String,
    /// The id of its process.
    pub pid: u32,
    /// Its tag.
    pub tag: String,
}

/// A process that runs in the background.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ProcessEntry)]
pub struct ProcessBody {
    /// Its id.
    pub pid: u32,
    /// Its tag.
    pub tag: String,
    /// The program.
    pub cmd: String,
    /// Its arguments; long ones are cut off.
    pub args: Vec<String>,
    /// Whether it has a terminal.
    pub pty: bool,
}

impl From<Process> for ProcessBody {
    fn from(process: Process) -> Self {
        let mut argv = process.argv.into_iter();
        Self {
            pid: process.pid,
            tag: process.tag,
            cmd: argv.next().unwrap_or_default(),
            args: argv.collect(),
            pty: process.has_terminal,
        }
    }
}

/// The processes of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ProcessListResponse)]
pub struct ProcessListBody {
    /// In the order in which they were started.
    pub processes: Vec<ProcessBody>,
}

/// How to end a process.
#[derive(Debug, Deserialize)]
pub struct SignalParams {
    /// Its name or number; `KILL` if not given.
    signal: Option<String>,
}

/// List background processes
///
/// Those that run: commands that were started in the background, and terminals.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/processes", operation_id = "listProcesses", tag = "sandboxes",
    params(("id" = String, Path)),
    responses(
        (status = 200, description = "What runs in the background", body = ProcessListBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<ProcessListBody>, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let processes = caller.manager.processes(&in_use).await?;
    Ok(Json(ProcessListBody {
        processes: processes.into_iter().map(Into::into).collect(),
    }))
}

/// End a background process
///
/// By its id or its tag. It is killed with all that it has started, unless another signal is asked for.
#[utoipa::path(
    delete, path = "/v1/sandboxes/{id}/processes/{process}", operation_id = "killProcess",
    tag = "sandboxes",
    params(
        ("id" = String, Path),
        ("process" = String, Path, description = "Process id or tag"),
        ("signal" = Option<String>, Query, description = "Name of a signal, with or without `SIG`, \
            or its number, 1 to 31; `KILL` if not given. That goes to all that the process has \
            started, any other to its process group"),
    ),
    responses(
        (status = 204, description = "The signal was sent"),
        (status = 400, description = "There is no such signal", body = ErrorBody),
        (status = 404, description = "Sandbox or process not found, or the process has ended",
            body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
    ),
)]
pub async fn kill(
    caller: Caller,
    Path((id, process)): Path<(String, String)>,
    Query(params): Query<SignalParams>,
) -> Result<StatusCode, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let signal = params.signal.as_deref().map_or(Ok(KILL), signal_of)?;
    let process = ProcessRef::from(process.as_str());
    caller
        .manager
        .signal_process(&in_use, &process, signal)
        .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The number of a signal on x86-64 (signal(7)).
fn signal_of(text: &str) -> Result<i32, ApiError> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let name = text.strip_prefix("SIG").unwrap_or(text);
    let by_name = NAMES.iter().zip(1..).find(|(known, _)| **known == name);
    let number = by_name.map(|(_, number)| number);
    let number = number.or_else(|| text.parse().ok().filter(|number| (1..=31).contains(number)));
    number.ok_or_else(|| {
        ApiError::invalid(format!(
            "signal must be a name such as TERM, or 1 to 31, and not {text:?}"
        ))
    })
}

/// What a client is told.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum News<'a> {
    Start { pid: u32, tag: &'a str },
    Stdout(Data<'a>),
    Stderr(Data<'a>),
    Lost { bytes: u64 },
    Exit { exit_code: i32 },
    Error { data: String },
}

/// Follow a background process
///
/// A WebSocket. The client is told `start` with the `pid` and `tag`, then `stdout` and `stderr` with
/// `data` (`encoding` is `base64` for what is not UTF-8), beginning with the latest output that is
/// kept, 256 KiB of a process; `lost` where `bytes` of it are missing; and at last `exit` with the
/// `exit_code`, or `error`. The last 16 processes that have ended can be followed too. A client that
/// goes away, or does not read, does nothing to the process.
#[utoipa::path(
    get, path = "/v1/sandboxes/{id}/processes/{process}/stream", operation_id = "followProcess",
    tag = "sandboxes",
    params(
        ("id" = String, Path),
        ("process" = String, Path, description = "Process id or tag"),
    ),
    responses(
        (status = 101, description = "The WebSocket is open"),
        (status = 400, description = "Not a WebSocket's handshake", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running", body = ErrorBody),
        (status = 429, description = "Too many WebSockets", body = ErrorBody),
    ),
)]
pub async fn follow(
    caller: Caller,
    permit: SocketPermit,
    Path((id, process)): Path<(String, String)>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let process = ProcessRef::from(process.as_str());
    socket::open(upgrade, MAX_MESSAGE, async move |mut socket| {
        let last = tell_all(&mut socket, &caller.manager, &in_use, &process).await;
        socket.end(last).await;
        caller.manager.keep_awake(in_use).await;
        drop(permit);
    })
}

/// The largest message of a client, in bytes: it has nothing to say.
const MAX_MESSAGE: usize = 4096;

/// Tells what the process writes. The last thing to tell; `None` if the client went away.
async fn tell_all(
    socket: &mut Socket,
    manager: &Manager,
    in_use: &InUse,
    process: &ProcessRef,
) -> Option<News<'static>> {
    let error = |source: ExecError| News::Error {
        data: ApiError::from(source).message,
    };
    // Nobody types.
    let input = stream::empty().boxed();
    let mut events = match manager.attach_process(in_use, process, input).await {
        Ok(events) => events,
        Err(source) => return Some(error(source)),
    };
    let (mut stdout, mut stderr) = (Text::default(), Text::default());
    let last = loop {
        let event = tokio::select! {
            () = socket.gone() => return None,
            event = events.next() => event?,
        };
        match event {
            Ok(ProcessEvent::Attached(process)) => {
                let (pid, tag) = (process.pid, process.tag.as_str());
                socket.tell(&News::Start { pid, tag }).await?;
            }
            Ok(ProcessEvent::Stdout(bytes)) => {
                if let Some(piece) = stdout.push(&bytes) {
                    socket.tell(&News::Stdout(Data::new(&piece))).await?;
                }
            }
            Ok(ProcessEvent::Stderr(bytes)) => {
                if let Some(piece) = stderr.push(&bytes) {
                    socket.tell(&News::Stderr(Data::new(&piece))).await?;
                }
            }
            Ok(ProcessEvent::Lost(bytes)) => socket.tell(&News::Lost { bytes }).await?,
            Ok(ProcessEvent::Exited(exit)) => {
                break News::Exit {
                    exit_code: exit.code,
                };
            }
            Err(source) => break error(ExecError::Host(source)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [
            ("KILL", Some(9)),
            ("SIGTERM", Some(15)),
            ("2", Some(2)),
            ("SYS", Some(31)),
            ("WINCH", Some(28)),
            ("0", None),
            ("32", None),
            ("kill", None),
            ("", None),
            ("SIGSIGTERM", None),
        ] {
            assert_eq!(signal_of(text).ok(), number, "{text}");
        }
    }
}
