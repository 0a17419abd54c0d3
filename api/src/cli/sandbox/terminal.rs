//! A command in a sandbox on a terminal, which is the one that this process runs on.
//!
//! The keys go to the sandbox as they are, Ctrl-C too, and what it writes to its terminal is written to
//! this one. So while the command runs, this terminal is raw: it does nothing with either by itself. It
//! is as it was before again whenever [`run`] returns or its future is dropped.

use std::io::{self, Write};
use std::os::fd::AsFd;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::{SinkExt, StreamExt};
use rustix::termios::{OptionalActions, Termios};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::tungstenite::Message;

use super::stream::{Interrupts, Start, broken};
use crate::cli::client::{Client, ClientError};
use crate::cli::{CliError, say};

/// How much of what is typed is sent at a time, in bytes.
const CHUNK: usize = 4096;
/// Columns and rows where no terminal says how many it has.
const DEFAULT_SIZE: (u16, u16) = (80, 24);

/// What the daemon tells.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum News {
    Started {},
    Output {
        data: String,
    },
    Exit {
        exit_code: i32,
    },
    Error {
        data: String,
        fatal: bool,
    },
    #[serde(other)]
    Other,
}

/// Makes the terminal on standard input raw, until it is dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    /// `None` if standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        let Ok(before) = rustix::termios::tcgetattr(&stdin) else {
            return Ok(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = rustix::termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Columns and rows of the terminal, the one that is written to first.
fn size() -> (u16, u16) {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    [stdout.as_fd(), stdin.as_fd(), stderr.as_fd()]
        .into_iter()
        .filter_map(|fd| rustix::termios::tcgetwinsize(fd).ok())
        .map(|size| (size.ws_col, size.ws_row))
        .find(|&(cols, rows)| cols > 0 && rows > 0)
        .unwrap_or(DEFAULT_SIZE)
}

/// Runs a command on a terminal in a sandbox until it ends, or until this process is to, which ends the
/// command too. The exit status of either. Without `reads` nothing can be typed.
///
/// # Errors
/// It did not run to its end.
pub async fn run(
    client: &Client,
    id: &str,
    start: &Start,
    reads: bool,
    interrupts: &mut Interrupts,
) -> Result<u8, CliError> {
    let mut resized = signal(SignalKind::window_change()).map_err(CliError::Signals)?;
    let (mut sink, mut source) = client.socket(id, "pty").await?.split();
    let mut order = serde_json::to_value(start).map_err(ClientError::from)?;
    let (cols, rows) = size();
    order["cols"] = cols.into();
    order["rows"] = rows.into();
    let send = |order: Value| Message::text(order.to_string());
    sink.send(send(order)).await.map_err(broken)?;
    let raw = match reads {
        true => Raw::enter().map_err(CliError::Terminal)?,
        false => None,
    };
    let mut keys = tokio::io::stdin();
    let mut typed = vec![0; CHUNK];
    let mut is_typing = reads;
    let status = loop {
        let message = tokio::select! {
            // What was written before a signal came is still shown.
            biased;
            message = source.next() => message,
            count = keys.read(&mut typed), if is_typing => {
                let bytes = typed[..count.map_err(CliError::Input)?].to_vec();
                is_typing = !bytes.is_empty();
                // A command that has ended reads no more; its end is told.
                if is_typing && sink.send(Message::binary(bytes)).await.is_err() {
                    is_typing = false;
                }
                continue;
            }
            _ = resized.recv() => {
                let (cols, rows) = size();
                let order = json!({"type": "resize", "cols": cols, "rows": rows});
                let _ = sink.send(send(order)).await;
                continue;
            }
            status = interrupts.recv() => {
                let _ = sink.send(send(json!({"type": "kill"}))).await;
                break status;
            }
        };
        let bytes = match message {
            Some(Ok(Message::Binary(bytes))) => bytes.to_vec(),
            Some(Ok(Message::Text(text))) => {
                match serde_json::from_str(&text).map_err(ClientError::from)? {
                    News::Output { data } => {
                        STANDARD.decode(data).map_err(|_| ClientError::Stream)?
                    }
                    News::Exit { exit_code } => break u8::try_from(exit_code).unwrap_or(u8::MAX),
                    News::Error { data, fatal: true } => return Err(CliError::Command(data)),
                    News::Error { data, .. } => {
                        say(&format!("{data}\r"));
                        continue;
                    }
                    News::Started {} | News::Other => continue,
                }
            }
            Some(Ok(Message::Close(_))) | None => return Err(ClientError::Stream.into()),
            Some(Ok(_)) => continue,
            Some(Err(source)) => return Err(broken(source).into()),
        };
        let mut out = io::stdout().lock();
        out.write_all(&bytes)
            .and_then(|()| out.flush())
            .map_err(CliError::Output)?;
    };
    drop(raw);
    Ok(status)
}
