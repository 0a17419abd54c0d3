//! What a VMM tells of itself: the lines of its event monitor, and its standard error.

use std::collections::VecDeque;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::domain::SandboxId;

/// The longest line that is read, in bytes; a longer one is read as several.
const MAX_LINE: u64 = 16 * 1024;
/// How much of the end of standard error is kept, in bytes.
const MAX_TAIL: usize = 2048;

/// What the event monitor has told so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// When the guest's first instruction was about to run, in microseconds since the start of
    /// the process.
    pub booting_us: Option<u64>,
    /// Its snapshot has been restored; the guest may not run yet.
    pub restored: bool,
    /// When a restored guest ran again, in microseconds since the start of the process.
    pub resumed_us: Option<u64>,
    /// How the machine ended.
    pub end: Option<Told>,
}

/// How a machine ended, as its VMM tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Whether the guest, or whoever holds it, wanted it to end.
    pub is_orderly: bool,
    /// Why, as a sentence.
    pub reason: String,
}

/// One line of the event monitor.
#[derive(Debug, Deserialize)]
struct Line {
    timestamp_us: u64,
    event: String,
    #[serde(default)]
    reason: Option<String>,
}

/// Follows the event monitor until its writer is gone.
pub async fn follow_events(id: SandboxId, pipe: impl AsyncRead + Unpin, seen: watch::Sender<Seen>) {
    let mut lines = Lines::new(pipe);
    while let Some(line) = lines.next().await {
        let event: Line = match serde_json::from_slice(&line) {
            Ok(event) => event,
            Err(error) => {
                warn!(sandbox = %id, %error, "event of the vmm makes no sense");
                continue;
            }
        };
        debug!(sandbox = %id, event = event.event, timestamp_us = event.timestamp_us,
            reason = event.reason, "vmm event");
        match (event.event.as_str(), event.reason) {
            ("booting", _) => {
                seen.send_modify(|seen| seen.booting_us = Some(event.timestamp_us));
            }
            ("restored", _) => seen.send_modify(|seen| seen.restored = true),
            ("resumed", _) => seen.send_modify(|seen| {
                seen.resumed_us.get_or_insert(event.timestamp_us);
            }),
            ("device_error", reason) => {
                warn!(sandbox = %id, reason, "the guest can no longer use a device");
            }
            (event, Some(reason)) => {
                let is_orderly = matches!(event, "shutdown" | "reboot");
                seen.send_modify(|seen| seen.end = Some(Told { is_orderly, reason }));
            }
            (_, None) => {}
        }
    }
}

/// Logs the VMM's standard error until its writer is gone, and returns its end.
pub async fn follow_stderr(id: SandboxId, stderr: impl AsyncRead + Unpin) -> String {
    let mut tail = VecDeque::new();
    let mut lines = Lines::new(stderr);
    while let Some(line) = lines.next().await {
        let line = String::from_utf8_lossy(&line);
        debug!(sandbox = %id, line = &*line, "vmm");
        tail.extend(line.bytes().chain([b'\n']));
        let excess = tail.len().saturating_sub(MAX_TAIL);
        tail.drain(..excess);
    }
    readable(tail.make_contiguous())
}

/// Text from a guest or a VMM, fit for a log or an error message: without control characters
/// and empty lines.
pub fn readable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut lines = Vec::new();
    for line in text.split(['\n', '\r']) {
        let line: String = strip_escapes(line)
            .chars()
            .filter(|c| !c.is_control())
            .collect();
        let line = line.trim_end();
        if !line.trim_start().is_empty() {
            lines.push(line.to_owned());
        }
    }
    lines.join("\n")
}

/// Removes control sequences of terminals (ECMA-48: ESC `[`, parameters, a final byte).
fn strip_escapes(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c != '\x1b' {
            out.push(c);
        } else if chars.next() == Some('[') {
            let is_final = |c: &char| ('@'..='~').contains(c);
            let _ = chars.by_ref().find(is_final);
        }
    }
    out
}

struct Lines<R> {
    reader: BufReader<R>,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    fn new(reader: R) -> Self {
        Self {
            reader: BufReader::new(reader),
        }
    }

    /// The next line without its end; `None` at the end or on an error, which a pipe has none of.
    async fn next(&mut self) -> Option<Vec<u8>> {
        let mut line = Vec::new();
        let read = (&mut self.reader)
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)
            .await;
        if !matches!(read, Ok(1..)) {
            return None;
        }
        if line.ends_with(b"\n") {
            line.pop();
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn events_are_understood_and_nonsense_is_skipped() {
        let input = concat!(
            "{\"timestamp_us\":5123,\"event\":\"booting\"}\n",
            "what?\n",
            "{\"timestamp_us\":9000,\"event\":\"booted\",\"more\":[1]}\n",
            "{\"timestamp_us\":9005,\"event\":\"restored\"}\n",
            "{\"timestamp_us\":9010,\"event\":\"resumed\"}\n",
            "{\"timestamp_us\":9020,\"event\":\"resumed\"}\n",
            "{\"timestamp_us\":9100,\"event\":\"device_error\",\"reason\":\"a bad ring\"}\n",
            "{\"timestamp_us\":9999,\"event\":\"panic\",\"reason\":\"it panicked\"}\n",
        );
        let (sender, seen) = watch::channel(Seen::default());
        follow_events(SandboxId::random(), input.as_bytes(), sender).await;
        let expected = Seen {
            booting_us: Some(5123),
            restored: true,
            resumed_us: Some(9010),
            end: Some(Told {
                is_orderly: false,
                reason: "it panicked".into(),
            }),
        };
        assert_eq!(*seen.borrow(), expected);
    }

    #[tokio::test]
    async fn only_the_end_of_standard_error_is_kept() {
        let mut input = "x".repeat(100_000);
        input.push_str("\nthe end");
        let tail = follow_stderr(SandboxId::random(), input.as_bytes()).await;
        assert!(tail.len() <= MAX_TAIL && tail.ends_with("x\nthe end"));
    }

    #[test]
    fn a_console_is_made_readable() {
        let console = b"\x1b[0;31mred\x1b[m\r\n\r\n  \x07indented\xff \x1bM\r\nlast";
        assert_eq!(readable(console), "red\n  indented\u{fffd}\nlast");
    }
}
