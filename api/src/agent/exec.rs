//! Running commands.

use std::io;
use std::time::Duration;

use agent_protocol::{AgentFrame, EXEC_UPGRADE, FrameKind, MAX_FRAME_PAYLOAD, PATH_EXEC};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, StreamExt};
use hyper::upgrade::Upgraded;
use hyper::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, WriteHalf};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::upgrade::{self, Frames};
use super::{AgentClient, failure, host_error, unreachable};
use crate::domain::{ExecEvent, ExecRequest, ExitInfo, HostError};

/// How much longer than the command's timeout the host waits for its end: the agent keeps the
/// timeout itself, so this runs out only for an agent that does not.
const GRACE: Duration = Duration::from_secs(15);

type Input = BoxStream<'static, io::Result<Bytes>>;
type Events = BoxStream<'static, Result<ExecEvent, HostError>>;

impl AgentClient {
    /// Runs a command; see [`Host::exec`](crate::domain::Host::exec). A program that does not
    /// exist or cannot be executed is told as a shell would: exit status 127 or 126, and the
    /// reason on standard error.
    ///
    /// # Errors
    /// The command was not started.
    pub async fn exec(&self, request: ExecRequest) -> Result<Events, HostError> {
        self.exec_reading(request, None).await
    }

    /// Runs a command that reads `input`; see
    /// [`Host::exec_with_input`](crate::domain::Host::exec_with_input).
    ///
    /// # Errors
    /// The command was not started.
    pub async fn exec_with_input(
        &self,
        request: ExecRequest,
        input: Input,
    ) -> Result<Events, HostError> {
        self.exec_reading(request, Some(input)).await
    }

    async fn exec_reading(
        &self,
        request: ExecRequest,
        input: Option<Input>,
    ) -> Result<Events, HostError> {
        let timeout = Duration::from_secs(request.timeout_sec.into());
        let deadline = Instant::now() + timeout + GRACE;
        let response =
            tokio::time::timeout_at(deadline, self.start(&request, timeout, input.is_some()))
                .await
                .map_err(|_| late(timeout))??;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            let detail = failure(response).await;
            let Some(code) = detail.code.shell_status() else {
                return Err(host_error(detail, ""));
            };
            let message = Bytes::from(format!("{}\n", detail.message));
            let exit = ExitInfo {
                code,
                timed_out: false,
            };
            return Ok(
                stream::iter([Ok(ExecEvent::Stderr(message)), Ok(ExecEvent::Exited(exit))]).boxed(),
            );
        }
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| unreachable("no stream of frames", &error))?;
        let (reader, writer) = tokio::io::split(TokioIo::new(upgraded));
        let ended = "the connection ended while the command was running";
        let frames = Frames::new(reader, AgentFrame::decode, ended);
        let events = events(frames, deadline, timeout);
        Ok(match input {
            Some(input) => fed(events, writer, input),
            // The connection stays open as long as the other half is there.
            None => events,
        })
    }

    async fn start(
        &self,
        request: &ExecRequest,
        timeout: Duration,
        stdin: bool,
    ) -> Result<Response<hyper::body::Incoming>, HostError> {
        let body = agent_protocol::ExecRequest {
            argv: request.argv.clone(),
            env: request.env.clone(),
            cwd: request.cwd.clone(),
            stdin,
            timeout_ms: Some(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            ..Default::default()
        };
        let request = upgrade::request(PATH_EXEC, EXEC_UPGRADE, &body)?;
        let mut sender = self.connect().await?;
        sender
            .send_request(request)
            .await
            .map_err(|error| unreachable("it did not answer to a command", &error))
    }
}

fn late(timeout: Duration) -> HostError {
    HostError::AgentUnreachable {
        reason: format!(
            "the command's timeout of {} s is long over, and its end was not told",
            timeout.as_secs()
        ),
    }
}

/// The same events, while the command is fed. Whoever drops them ends the feeding too.
fn fed(events: Events, writer: WriteHalf<TokioIo<Upgraded>>, input: Input) -> Events {
    let (failed, failure) = oneshot::channel();
    let feeding = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut writer = writer;
        if let Err(error) = feed(&mut writer, input).await {
            let _ = failed.send(error);
        }
    }));
    let state = Some((events, failure, feeding));
    stream::unfold(state, async |state| {
        let (mut events, mut failure, feeding) = state?;
        tokio::select! {
            biased;
            Ok(error) = &mut failure, if !failure.is_terminated() => Some((Err(error), None)),
            event = events.next() => Some((event?, Some((events, failure, feeding)))),
        }
    })
    .boxed()
}

async fn feed(
    writer: &mut WriteHalf<TokioIo<Upgraded>>,
    mut input: Input,
) -> Result<(), HostError> {
    let mut frame = BytesMut::new();
    while let Some(piece) = input.next().await {
        let piece = piece.map_err(|error| HostError::Upload {
            reason: error.to_string(),
        })?;
        for part in piece.chunks(MAX_FRAME_PAYLOAD) {
            frame.clear();
            agent_protocol::encode(FrameKind::Stdin, part, &mut frame)
                .map_err(|error| unreachable("its input does not fit", &error))?;
            // A command that has ended reads no more; its end is told by the other direction.
            if writer.write_all(&frame).await.is_err() {
                return Ok(());
            }
        }
    }
    frame.clear();
    agent_protocol::encode(FrameKind::StdinEnd, &[], &mut frame)
        .map_err(|error| unreachable("its input does not end", &error))?;
    let _ = writer.write_all(&frame).await;
    Ok(())
}

fn events(frames: Frames<AgentFrame>, deadline: Instant, timeout: Duration) -> Events {
    stream::try_unfold(Some(frames), move |frames| async move {
        let Some(mut frames) = frames else {
            return Ok(None);
        };
        let frame = tokio::time::timeout_at(deadline, frames.next())
            .await
            .map_err(|_| late(timeout))??;
        Ok(Some(match frame {
            AgentFrame::Started(started) => (ExecEvent::Started { pid: started.pid }, Some(frames)),
            AgentFrame::Stdout(bytes) => (ExecEvent::Stdout(bytes), Some(frames)),
            AgentFrame::Stderr(bytes) => (ExecEvent::Stderr(bytes), Some(frames)),
            AgentFrame::Exit(exit) => {
                let exit = ExitInfo {
                    code: exit.code,
                    timed_out: exit.timed_out,
                };
                (ExecEvent::Exited(exit), None)
            }
            AgentFrame::Error(detail) => return Err(host_error(detail, "")),
        }))
    })
    .boxed()
}
