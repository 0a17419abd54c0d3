//! Processes in the background, and those that follow them.

use std::io;
use std::time::Duration;

use agent_protocol::{
    AttachRequest, AttachedFrame, ErrorCode, ErrorDetail, PATH_ATTACH, PATH_PROCESSES, PATH_SIGNAL,
    PROCESS_UPGRADE, SignalRequest, TerminalFrame,
};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio_util::task::AbortOnDropHandle;

use super::request::internal;
use super::upgrade::{self, Frames, to_json};
use super::{AgentClient, failure, host_error, unreachable};
use crate::domain::{
    ExecRequest, ExitInfo, HostError, Process, ProcessEvent, ProcessEvents, ProcessRef,
    StartProcess, TerminalInput, TerminalInputs, TerminalSize,
};

/// How long the agent may take to answer. A healthy one takes milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest list of processes that is read, in bytes: as many as an agent keeps, each with its
/// arguments as far as they are told, all of them escaped.
const MAX_LIST: usize = 4 << 20;

impl AgentClient {
    /// Starts a process; see [`GuestHost::start_process`](crate::domain::GuestHost::start_process).
    ///
    /// # Errors
    /// It was not started.
    pub async fn start_process(&self, request: StartProcess) -> Result<Process, HostError> {
        let StartProcess {
            command: ExecRequest { argv, env, cwd, .. },
            user,
            tag,
            terminal,
        } = request;
        let body = agent_protocol::StartProcess {
            exec: agent_protocol::ExecRequest {
                argv,
                env,
                cwd,
                user,
                ..Default::default()
            },
            tag,
            terminal: terminal.map(size),
        };
        let response = self.order(Method::POST, PATH_PROCESSES, &body).await?;
        let process: agent_protocol::Process = read(response, StatusCode::CREATED).await?;
        Ok(process.into())
    }

    /// The processes that are kept.
    ///
    /// # Errors
    /// The agent does not tell.
    pub async fn processes(&self) -> Result<Vec<Process>, HostError> {
        let response = self.order(Method::GET, PATH_PROCESSES, &()).await?;
        let list: agent_protocol::ProcessList = read(response, StatusCode::OK).await?;
        Ok(list.processes.into_iter().map(Into::into).collect())
    }

    /// Sends a signal to a process.
    ///
    /// # Errors
    /// There is none, or the signal was not sent.
    pub async fn signal_process(&self, process: &ProcessRef, signal: i32) -> Result<(), HostError> {
        let body = SignalRequest {
            process: process.into(),
            signal,
        };
        let response = self.order(Method::POST, PATH_SIGNAL, &body).await?;
        match response.status() {
            StatusCode::NO_CONTENT => Ok(()),
            _ => Err(refusal(failure(response).await)),
        }
    }

    /// Follows a process; see
    /// [`GuestHost::attach_process`](crate::domain::GuestHost::attach_process).
    ///
    /// # Errors
    /// It cannot be followed.
    pub async fn attach_process(
        &self,
        process: &ProcessRef,
        input: TerminalInputs,
    ) -> Result<ProcessEvents, HostError> {
        let body = AttachRequest {
            process: process.into(),
        };
        let upgraded = self.upgraded(PATH_ATTACH, PROCESS_UPGRADE, &body).await?;
        let (reader, writer) = tokio::io::split(TokioIo::new(upgraded));
        let typing = AbortOnDropHandle::new(tokio::spawn(type_in(writer, input)));
        let following = Following {
            frames: Frames::new(
                reader,
                AttachedFrame::decode,
                "the connection ended before the process did",
            ),
            _typing: typing,
        };
        Ok(stream::try_unfold(Some(following), async |following| {
            let Some(mut following) = following else {
                return Ok(None);
            };
            let event = event(following.frames.next().await?)?;
            let has_ended = matches!(event, ProcessEvent::Exited(_));
            Ok(Some((event, (!has_ended).then_some(following))))
        })
        .boxed())
    }

    /// The agent's answer to an order.
    async fn order(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<Response<Incoming>, HostError> {
        let body = if method == Method::GET {
            Vec::new()
        } else {
            to_json(body)?
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "agent")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body).map_err(io::Error::other).boxed_unsync())
            .map_err(internal)?;
        self.answer(request).await
    }

    async fn answer(&self, request: Request<super::Body>) -> Result<Response<Incoming>, HostError> {
        let answer = async {
            let mut sender = self.connect().await?;
            let answer = sender.send_request(request).await;
            answer.map_err(|error| unreachable("it did not answer", &error))
        };
        tokio::time::timeout(ANSWER_TIMEOUT, answer)
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: format!("it did not answer within {} s", ANSWER_TIMEOUT.as_secs()),
            })?
    }

    /// The connection, once the agent speaks this protocol on it.
    pub(super) async fn upgraded(
        &self,
        path: &str,
        protocol: &str,
        body: &impl Serialize,
    ) -> Result<Upgraded, HostError> {
        let request = upgrade::request(path, protocol, body)?;
        let response = self.answer(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(failure(response).await));
        }
        hyper::upgrade::on(response)
            .await
            .map_err(|error| unreachable("the connection broke off", &error))
    }
}

/// What the agent's refusal means.
fn refusal(detail: ErrorDetail) -> HostError {
    let reason = detail.message;
    match detail.code {
        ErrorCode::NoSuchProcess => HostError::NoProcess { reason },
        ErrorCode::TagInUse | ErrorCode::OutOfResources => HostError::Conflict { reason },
        ErrorCode::PortClosed => HostError::PortClosed { reason },
        ErrorCode::CommandNotFound | ErrorCode::CommandNotExecutable => {
            HostError::Invalid { reason }
        }
        code => host_error(ErrorDetail::new(code, reason), ""),
    }
}

async fn read<T: DeserializeOwned>(
    response: Response<Incoming>,
    expected: StatusCode,
) -> Result<T, HostError> {
    if response.status() != expected {
        return Err(refusal(failure(response).await));
    }
    let body = Limited::new(response.into_body(), MAX_LIST).collect();
    let body = tokio::time::timeout(ANSWER_TIMEOUT, body)
        .await
        .map_err(|_| HostError::AgentUnreachable {
            reason: format!("its answer took more than {} s", ANSWER_TIMEOUT.as_secs()),
        })?
        .map_err(|error| unreachable("its answer broke off", &*error))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| unreachable("its answer is not what it should be", &error))
}

/// Hands on what is done at the terminal. It stays attached when there is no more of it.
async fn type_in(mut writer: WriteHalf<TokioIo<Upgraded>>, mut input: TerminalInputs) {
    let mut wire = BytesMut::new();
    while let Some(input) = input.next().await {
        let frames: Vec<_> = match input {
            TerminalInput::Resized(to) => vec![TerminalFrame::Resize(size(to))],
            TerminalInput::Typed(bytes) => pieces(&bytes).map(TerminalFrame::Input).collect(),
        };
        for frame in frames {
            wire.clear();
            // A process that has ended reads no more; its end is told by the other direction.
            if frame.encode(&mut wire).is_err() || writer.write_all(&wire).await.is_err() {
                return;
            }
        }
    }
    // Dropping the writer does not close the connection: the other half is open.
}

fn pieces(bytes: &Bytes) -> impl Iterator<Item = Bytes> {
    let step = agent_protocol::MAX_FRAME_PAYLOAD;
    let starts = (0..bytes.len()).step_by(step);
    starts.map(move |start| bytes.slice(start..bytes.len().min(start + step)))
}

/// Follows one process.
struct Following {
    frames: Frames<AttachedFrame>,
    _typing: AbortOnDropHandle<()>,
}

fn event(frame: AttachedFrame) -> Result<ProcessEvent, HostError> {
    Ok(match frame {
        AttachedFrame::Attached(process) => ProcessEvent::Attached(process.into()),
        AttachedFrame::Stdout(bytes) => ProcessEvent::Stdout(bytes),
        AttachedFrame::Stderr(bytes) => ProcessEvent::Stderr(bytes),
        AttachedFrame::Lost(lost) => ProcessEvent::Lost(lost.bytes),
        AttachedFrame::Exit(exit) => ProcessEvent::Exited(exit_info(&exit)),
        AttachedFrame::Error(detail) => return Err(host_error(detail, "")),
    })
}

fn exit_info(exit: &agent_protocol::Exit) -> ExitInfo {
    ExitInfo {
        code: exit.code,
        timed_out: exit.timed_out,
    }
}

fn size(size: TerminalSize) -> agent_protocol::TerminalSize {
    agent_protocol::TerminalSize {
        cols: size.cols,
        rows: size.rows,
    }
}

impl From<agent_protocol::Process> for Process {
    fn from(process: agent_protocol::Process) -> Self {
        Self {
            exit: process.exit.as_ref().map(exit_info),
            pid: process.pid,
            tag: process.tag,
            argv: process.argv,
            has_terminal: process.terminal,
        }
    }
}

impl From<&ProcessRef> for agent_protocol::ProcessRef {
    fn from(process: &ProcessRef) -> Self {
        match process {
            ProcessRef::Pid(pid) => Self::Pid(*pid),
            ProcessRef::Tag(tag) => Self::Tag(tag.clone()),
        }
    }
}
