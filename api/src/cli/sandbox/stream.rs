//! A command in a sandbox whose streams are those of this process.

use std::collections::BTreeMap;
use std::io::{self, Write};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_tungstenite::tungstenite::Message;

use crate::cli::client::{Client, ClientError, Socket};
use crate::cli::{CliError, say};

/// How much of standard input is sent at a time, in bytes.
const CHUNK: usize = 32 * 1024;

/// Signals that ask this process to end.
pub struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    quit: Signal,
}

impl Interrupts {
    /// From now on they do not end it.
    ///
    /// # Errors
    /// They cannot be received.
    pub fn catch() -> Result<Self, CliError> {
        let catch = |kind| signal(kind).map_err(CliError::Signals);
        Ok(Self {
            interrupt: catch(SignalKind::interrupt())?,
            terminate: catch(SignalKind::terminate())?,
            hangup: catch(SignalKind::hangup())?,
            quit: catch(SignalKind::quit())?,
        })
    }

    /// Waits for one. The exit status that tells of it, 128 and its number.
    pub async fn recv(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            _ = self.hangup.recv() => 129,
            _ = self.quit.recv() => 131,
        }
    }
}

/// What to run.
#[derive(Debug, Serialize)]
pub struct Start {
    #[serde(rename = "type")]
    kind: &'static str,
    cmd: String,
    args: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    envs: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cwd: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timeout_sec: Option<i64>,
    stdin: bool,
}

impl Start {
    /// This command, which reads what this process reads.
    pub fn new(
        mut command: Vec<String>,
        envs: Vec<(String, String)>,
        cwd: Option<String>,
        timeout_sec: Option<i64>,
    ) -> Self {
        let args = command.split_off(command.len().min(1));
        Self {
            kind: "start",
            cmd: command.pop().unwrap_or_default(),
            args,
            envs: envs.into_iter().collect(),
            cwd,
            timeout_sec,
            stdin: true,
        }
    }
}

/// What the daemon tells.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum News {
    Start {},
    Stdout(Data),
    Stderr(Data),
    Exit {
        exit_code: i32,
        #[serde(default)]
        timed_out: bool,
    },
    Error {
        data: String,
    },
}

#[derive(Debug, Deserialize)]
struct Data {
    data: String,
    #[serde(default)]
    encoding: Option<String>,
}

impl Data {
    fn write(self, mut to: impl Write) -> Result<(), CliError> {
        let bytes = match self.encoding.as_deref() {
            Some("base64") => STANDARD
                .decode(self.data)
                .map_err(|_| ClientError::Stream)?,
            _ => self.data.into_bytes(),
        };
        to.write_all(&bytes)
            .and_then(|()| to.flush())
            .map_err(CliError::Output)
    }
}

/// Runs a command in a sandbox until it ends, or until this process is to. The exit status of either.
///
/// # Errors
/// It did not run to its end.
pub async fn run(
    client: &Client,
    id: &str,
    start: &Start,
    interrupts: &mut Interrupts,
) -> Result<u8, CliError> {
    let socket = client.socket(id, "exec/stream").await?;
    let (mut sink, mut source) = socket.split();
    let order = serde_json::to_string(start).map_err(ClientError::from)?;
    sink.send(Message::text(order)).await.map_err(broken)?;
    let feed = feed(tokio::io::stdin(), sink);
    tokio::pin!(feed);
    let mut is_fed = false;
    loop {
        let message = tokio::select! {
            // What was said before a signal came is still told.
            biased;
            message = source.next() => message,
            fed = &mut feed, if !is_fed => {
                fed?;
                is_fed = true;
                continue;
            }
            status = interrupts.recv() => return Ok(status),
        };
        let text = match message {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(_))) | None => return Err(ClientError::Stream.into()),
            Some(Ok(_)) => continue,
            Some(Err(source)) => return Err(broken(source).into()),
        };
        match serde_json::from_str(&text).map_err(ClientError::from)? {
            News::Start {} => {}
            News::Stdout(data) => data.write(io::stdout().lock())?,
            News::Stderr(data) => data.write(io::stderr().lock())?,
            News::Exit {
                exit_code,
                timed_out,
            } => {
                if timed_out {
                    say("the command ran into its timeout and was killed");
                }
                return Ok(u8::try_from(exit_code).unwrap_or(u8::MAX));
            }
            News::Error { data } => return Err(CliError::Command(data)),
        }
    }
}

/// What it means if the socket breaks off.
pub fn broken(source: tokio_tungstenite::tungstenite::Error) -> ClientError {
    ClientError::Body(Box::new(source))
}

/// Sends what is read, to its end. A command that has ended reads no more, which is no error here.
async fn feed(
    mut from: impl AsyncRead + Unpin,
    mut to: SplitSink<Socket, Message>,
) -> Result<(), CliError> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = from.read(&mut chunk).await.map_err(CliError::Input)?;
        let order = match count {
            0 => serde_json::json!({"type": "stdin_end"}),
            _ => serde_json::json!({"type": "stdin", "encoding": "base64",
                                    "data": STANDARD.encode(&chunk[..count])}),
        };
        let is_sent = to.send(Message::text(order.to_string())).await.is_ok();
        if count == 0 || !is_sent {
            return Ok(());
        }
    }
}
