//! Who is attached to a process, over one connection.

use std::pin::pin;

use agent_protocol::{
    AttachedFrame, ErrorCode, ErrorDetail, FRAME_HEADER_LEN, Lost, TerminalFrame, header,
};
use bytes::BytesMut;
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::UnixStream,
};

use super::{Attachment, Kept};
use crate::{
    exec::{read, send},
    log::{chain, warning},
};

/// Tells of a process until it ends or the host goes away. `early` is what the host has sent already.
pub async fn attach(mut connection: UnixStream, early: BytesMut, attachment: Attachment) {
    let kept = &attachment.kept;
    let last = {
        let mut output = pin!(tell(&connection, kept));
        let mut input = pin!(listen(&connection, early, kept));
        let mut hang_up = pin!(connection.ready(Interest::PRIORITY));
        tokio::select! {
            biased;
            last = &mut output => last,
            // See the session of an exec.
            _ = &mut hang_up => None,
            refused = &mut input => refused.map(AttachedFrame::Error),
        }
    };
    // If there is nothing to say, or it cannot be said, the host is gone.
    let Some(last) = last else { return };
    let mut wire = BytesMut::new();
    if last.encode(&mut wire).is_ok() && send(&connection, &wire).await.is_ok() {
        let _ = connection.shutdown().await;
    }
}

/// Tells what the process is and writes; returns the last to tell, or nothing if the host is gone.
async fn tell(connection: &UnixStream, kept: &Kept) -> Option<AttachedFrame> {
    let mut wire = BytesMut::new();
    let mut process = kept.told();
    process.exit = None;
    if let Err(error) = AttachedFrame::Attached(process).encode(&mut wire) {
        warning!("cannot tell of a process: {}", chain(&error));
        return None;
    }
    send(connection, &wire).await.ok()?;
    let mut place = 0;
    loop {
        // Registered before looking, so that a change in between is not missed.
        let changed = kept.changed.notified();
        wire.clear();
        let more = match kept.backlog.borrow().at(place) {
            Some(found) => {
                let lost = Lost { bytes: found.lost };
                if found.lost > 0 {
                    AttachedFrame::Lost(lost).encode(&mut wire).ok()?;
                }
                let header = header(found.source.frame(), found.bytes.len()).ok()?;
                wire.reserve(FRAME_HEADER_LEN + found.bytes.len());
                wire.extend_from_slice(&header);
                wire.extend_from_slice(found.bytes);
                place += found.lost + found.bytes.len() as u64;
                true
            }
            None => false,
        };
        if more {
            send(connection, &wire).await.ok()?;
            continue;
        }
        if let Some(exit) = kept.exit.borrow().clone() {
            return Some(AttachedFrame::Exit(exit));
        }
        // While nothing is written, nothing is held.
        wire = BytesMut::new();
        changed.await;
    }
}

/// Does what the host wants of the terminal; returns when it goes away, or breaks the protocol.
async fn listen(connection: &UnixStream, mut buffer: BytesMut, kept: &Kept) -> Option<ErrorDetail> {
    let refuse = |message: String| Some(ErrorDetail::new(ErrorCode::BadRequest, message));
    loop {
        loop {
            let frame = match TerminalFrame::decode(&mut buffer) {
                Ok(None) => break,
                Ok(Some(frame)) => frame,
                Err(error) => return refuse(chain(&error)),
            };
            if !kept.has_terminal {
                return refuse("the process has no terminal to type on".to_owned());
            }
            // One that has ended has none any more, which is told soon.
            let terminal = kept.terminal.borrow().clone();
            let Some(terminal) = terminal else { continue };
            let done = match frame {
                TerminalFrame::Input(bytes) => terminal.write(&bytes).await,
                TerminalFrame::Resize(size) if size.cols == 0 || size.rows == 0 => {
                    return refuse("a terminal has at least one column and one row".to_owned());
                }
                TerminalFrame::Resize(size) => terminal.resize(size),
            };
            if let Err(error) = done {
                warning!("the terminal of process {}: {error}", kept.pid);
            }
        }
        if buffer.is_empty() {
            buffer = BytesMut::new();
        }
        buffer.reserve(FRAME_HEADER_LEN + 1);
        match read(connection, &mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
    }
}
