//! Exec: the streams of a running program over one connection.
//!
//! Three activities run side by side until the session ends:
//!
//! ```text
//! input       connection → frames → pipe of stdin
//! output      pipes of stdout and stderr → frames → connection
//! supervision exit of the first process, timeout
//! ```
//!
//! It ends in one of two ways. When output and supervision are both done, `Exit` is sent. When
//! the host closes the connection, breaks the protocol, or does not take the output any more,
//! the program is killed. The host's hang-up is watched for on its own, because input and output
//! may both be blocked by a program that does not read and a host that does not either.
//!
//! Output is done at the end of both pipes. Processes left in the background may keep them open;
//! then it is done a short while after the exit of the first process, with what the pipes hold
//! at that moment.

use std::{
    io,
    pin::pin,
    time::{Duration, Instant},
};

use agent_protocol::{
    AgentFrame, BACKGROUND_GRACE, ErrorCode, ErrorDetail, Exit, FRAME_HEADER_LEN, FrameError,
    FrameKind, HostFrame, Started, header,
};
use bytes::BytesMut;
use rustix::process::WaitStatus;
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{
        UnixStream,
        unix::pipe::{Receiver, Sender},
    },
    sync::oneshot,
    time::sleep,
};

use super::{Leader, Running, group::ProcessGroup};
use crate::log::{chain, warning};

/// The largest frame of output with its header: what Linux's virtio transport of vsock puts in one
/// packet (VIRTIO_VSOCK_MAX_PKT_BUF_SIZE). A few bytes more would cost a second packet.
const OUTPUT_FRAME: usize = 64 * 1024;
/// How much is read at once of what nobody wants any more.
const DROP_BUFFER: usize = 4096;

/// Carries the streams of a program until it ends or the host goes away. `early` is what the
/// host has sent already.
pub async fn run(mut connection: UnixStream, early: BytesMut, running: Running) {
    // If it fails the host is gone, and there is nobody left to tell.
    let Ok((last, leftovers)) = carry(&connection, early, running).await else {
        return;
    };
    for pipe in leftovers {
        tokio::task::spawn_local(drop_output(pipe));
    }
    let mut wire = BytesMut::new();
    if last.encode(&mut wire).is_ok() && send(&connection, &wire).await.is_ok() {
        let _ = connection.shutdown().await;
    }
}

/// The host has gone away.
struct HungUp;

impl From<io::Error> for HungUp {
    fn from(_: io::Error) -> Self {
        Self
    }
}

/// Returns the last frame, and the pipes that are still open.
async fn carry(
    connection: &UnixStream,
    early: BytesMut,
    running: Running,
) -> Result<(AgentFrame, Vec<Receiver>), HungUp> {
    let Running {
        leader,
        stdin,
        stdout,
        stderr,
    } = running;
    let Leader {
        pid,
        group,
        exit,
        started,
        timeout,
    } = leader;
    let mut wire = BytesMut::new();
    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
    if let Err(error) = AgentFrame::Started(Started { pid }).encode(&mut wire) {
        warning!("cannot report a start: {}", chain(&error));
    }
    send(connection, &wire).await?;

    let (exited, exited_at) = oneshot::channel();
    let supervision = async {
        let exit = supervise(exit, timeout, &group, started).await;
        let _ = exited.send(tokio::time::Instant::now());
        exit
    };
    let output = pump_output(connection, [Some(stdout), Some(stderr)], exited_at);
    let mut work = pin!(async { tokio::join!(supervision, output) });
    let mut input = pin!(pump_input(connection, early, stdin));
    let mut hang_up = pin!(connection.ready(Interest::PRIORITY));
    // Leaving this function with an error drops `group`, which kills what runs.
    tokio::select! {
        biased;
        (exit, leftovers) = &mut work => {
            Ok((AgentFrame::Exit(exit), leftovers?.into_iter().flatten().collect()))
        }
        // tokio reports the peer's end of stream together with this interest, and data alone
        // does not wake it.
        _ = &mut hang_up => Err(HungUp),
        end = &mut input => match end {
            InputEnd::HungUp => Err(HungUp),
            InputEnd::Refused(detail) => {
                group.kill();
                Ok((AgentFrame::Error(detail), Vec::new()))
            }
        },
    }
}

/// Waits for the first process, and kills all of them when the time has run out.
pub async fn supervise(
    mut exit: oneshot::Receiver<WaitStatus>,
    timeout: Option<Duration>,
    group: &ProcessGroup,
    started: Instant,
) -> Exit {
    let mut timed_out = false;
    let status = match timeout {
        Some(timeout) => {
            tokio::select! {
                biased;
                status = &mut exit => status,
                () = sleep(timeout.saturating_sub(started.elapsed())) => {
                    timed_out = true;
                    group.kill();
                    exit.await
                }
            }
        }
        None => exit.await,
    };
    // The reaper drops a sender only after it has sent.
    let status = status.ok();
    let signal = status.and_then(WaitStatus::terminating_signal);
    let code = status.and_then(WaitStatus::exit_status);
    Exit {
        code: code.unwrap_or(128 + signal.unwrap_or(0)),
        signal,
        timed_out,
        duration_us: u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX),
    }
}

/// Sends what the pipes give; returns those that have not ended.
async fn pump_output(
    connection: &UnixStream,
    mut pipes: [Option<Receiver>; 2],
    exited_at: oneshot::Receiver<tokio::time::Instant>,
) -> io::Result<[Option<Receiver>; 2]> {
    let mut buffer = vec![0; OUTPUT_FRAME];
    let mut grace = pin!(async {
        match exited_at.await {
            Ok(at) => tokio::time::sleep_until(at + BACKGROUND_GRACE).await,
            Err(_) => std::future::pending().await,
        }
    });
    while pipes.iter().any(Option::is_some) {
        let [stdout, stderr] = &pipes;
        let index = tokio::select! {
            ready = readable(stdout) => { ready?; 0 }
            ready = readable(stderr) => { ready?; 1 }
            () = &mut grace => {
                for (index, pipe) in pipes.iter_mut().enumerate() {
                    send_remainder(connection, pipe, kind(index), &mut buffer).await?;
                }
                break;
            }
        };
        send_some(connection, &mut pipes[index], kind(index), &mut buffer).await?;
    }
    Ok(pipes)
}

fn kind(index: usize) -> FrameKind {
    if index == 0 {
        FrameKind::Stdout
    } else {
        FrameKind::Stderr
    }
}

async fn readable(pipe: &Option<Receiver>) -> io::Result<()> {
    match pipe {
        Some(pipe) => pipe.readable().await,
        None => std::future::pending().await,
    }
}

/// Sends one frame of what a pipe has; returns its length, and takes away a pipe that has ended.
async fn send_some(
    connection: &UnixStream,
    pipe: &mut Option<Receiver>,
    kind: FrameKind,
    buffer: &mut [u8],
) -> io::Result<usize> {
    let Some(open) = pipe else { return Ok(0) };
    match open.try_read(&mut buffer[FRAME_HEADER_LEN..]) {
        Ok(0) => {
            *pipe = None;
            Ok(0)
        }
        Ok(len) => {
            let header = header(kind, len).map_err(io::Error::other)?;
            buffer[..FRAME_HEADER_LEN].copy_from_slice(&header);
            send(connection, &buffer[..FRAME_HEADER_LEN + len]).await?;
            Ok(len)
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(e) => Err(e),
    }
}

/// Sends as much as the pipe holds now, and no more, however fast others go on writing.
async fn send_remainder(
    connection: &UnixStream,
    pipe: &mut Option<Receiver>,
    kind: FrameKind,
    buffer: &mut [u8],
) -> io::Result<()> {
    let Some(open) = pipe else { return Ok(()) };
    let mut left = rustix::io::ioctl_fionread(&*open)?;
    while left > 0 {
        let limit = usize::try_from(left).unwrap_or(usize::MAX);
        let end = buffer.len().min(FRAME_HEADER_LEN.saturating_add(limit));
        match send_some(connection, pipe, kind, &mut buffer[..end]).await? {
            0 => break,
            sent => left = left.saturating_sub(u64::try_from(sent).unwrap_or(left)),
        }
    }
    Ok(())
}

enum InputEnd {
    HungUp,
    Refused(ErrorDetail),
}

impl From<FrameError> for InputEnd {
    fn from(error: FrameError) -> Self {
        Self::Refused(ErrorDetail::new(ErrorCode::BadRequest, chain(&error)))
    }
}

/// Feeds stdin from the host's frames; returns when the host goes away or breaks the protocol.
async fn pump_input(
    connection: &UnixStream,
    mut buffer: BytesMut,
    stdin: Option<Sender>,
) -> InputEnd {
    let mut stdin = match stdin {
        Some(pipe) => Stdin::Open(pipe),
        None => Stdin::NotWanted,
    };
    loop {
        loop {
            match HostFrame::decode(&mut buffer) {
                Ok(None) => break,
                Ok(Some(frame)) => match stdin.take(frame).await {
                    Ok(next) => stdin = next,
                    Err(end) => return end,
                },
                Err(error) => return error.into(),
            }
        }
        buffer.reserve(FRAME_HEADER_LEN + 1);
        match read(connection, &mut buffer).await {
            Ok(0) | Err(_) => return InputEnd::HungUp,
            Ok(_) => {}
        }
    }
}

/// Where stdin stands.
///
/// ```text
/// Open ──StdinEnd──> Ended
///   └─program closed it─> Unread ──StdinEnd──> Ended
/// ```
enum Stdin {
    /// Bytes go to the program.
    Open(Sender),
    /// The program does not read any more; bytes are dropped.
    Unread,
    /// The host has said that nothing follows.
    Ended,
    /// The request asked for none.
    NotWanted,
}

impl Stdin {
    async fn take(self, frame: HostFrame) -> Result<Self, InputEnd> {
        let refuse = |what| {
            Err(InputEnd::Refused(ErrorDetail::new(
                ErrorCode::BadRequest,
                what,
            )))
        };
        match (self, frame) {
            (Self::Open(pipe), HostFrame::Stdin(bytes)) => Ok(match feed(&pipe, &bytes).await {
                Ok(()) => Self::Open(pipe),
                Err(_) => Self::Unread,
            }),
            (Self::Unread, HostFrame::Stdin(_)) => Ok(Self::Unread),
            (Self::Open(_) | Self::Unread, HostFrame::StdinEnd) => Ok(Self::Ended),
            (Self::Ended, _) => refuse("a frame follows the end of stdin"),
            (Self::NotWanted, _) => {
                refuse("a stdin frame came, and the request asked for no stdin")
            }
        }
    }
}

async fn feed(pipe: &Sender, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        pipe.writable().await?;
        match pipe.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

pub async fn read(connection: &UnixStream, buffer: &mut BytesMut) -> io::Result<usize> {
    loop {
        connection.readable().await?;
        match connection.try_read_buf(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            result => return result,
        }
    }
}

pub async fn send(connection: &UnixStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        connection.writable().await?;
        match connection.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Keeps a process in the background from being killed by SIGPIPE or blocked by a full pipe.
pub async fn drop_output(pipe: Receiver) {
    let mut buffer = vec![0; DROP_BUFFER];
    while pipe.readable().await.is_ok() {
        match pipe.try_read(&mut buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}
