//! Processes that the agent keeps: requests, and the frames of who is attached to one.

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::{
    ErrorDetail, ExecRequest, Exit, FrameKind,
    exec::{from_json, json},
    frame::{self, FrameError},
};

/// The most processes that run at the same time and are kept.
pub const MAX_PROCESSES: usize = 64;
/// How many processes that have ended are remembered, with their output.
pub const MAX_ENDED: usize = 16;
/// How much of the output of one process is kept, in bytes: the latest.
pub const MAX_BACKLOG: usize = 256 * 1024;
/// How many may be attached to processes at the same time, all processes together.
pub const MAX_ATTACHED: usize = 256;
/// The longest tag in bytes.
pub const MAX_TAG: usize = 128;
/// How much is told of the arguments of a process, in bytes.
pub const MAX_TOLD_ARGV: usize = 4096;

/// The body of `POST /v1/processes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartProcess {
    /// What to run. It reads `/dev/null`, or the terminal: `stdin` must not be asked for.
    pub exec: ExecRequest,
    /// Names it. See [`check_tag`].
    pub tag: String,
    /// Give it a terminal of this size, which is its standard input, output and error, and controls
    /// its session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
}

/// What is wrong with a tag, as a sentence.
///
/// # Errors
/// The sentence.
pub fn check_tag(tag: &str) -> Result<(), &'static str> {
    if tag.is_empty() || tag.len() > MAX_TAG {
        Err("tag must be 1 to 128 bytes long")
    } else if tag.chars().any(char::is_control) {
        Err("tag must not contain control characters")
    } else if tag.bytes().all(|byte| byte.is_ascii_digit()) {
        Err("tag must not be a number, for it would be taken for a process id")
    } else {
        Ok(())
    }
}

/// The size of a terminal in characters, each at least 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// A process that is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the guest, which also names its session and process group.
    pub pid: u32,
    /// Its tag.
    pub tag: String,
    /// The program and its arguments; of long ones the first [`MAX_TOLD_ARGV`] bytes.
    pub argv: Vec<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// How it ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
}

/// The answer to `GET /v1/processes`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessList {
    /// Those that run and those that are remembered, in the order in which they were started.
    pub processes: Vec<Process>,
}

/// Names a process. Of several that had the name, the one that runs is meant, or else the one that was
/// started last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProcessRef {
    /// By its id.
    Pid(u32),
    /// By its tag.
    Tag(String),
}

impl std::fmt::Display for ProcessRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "{pid}"),
            Self::Tag(tag) => write!(f, "{tag:?}"),
        }
    }
}

/// The body of `POST /v1/processes/signal`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalRequest {
    /// Which process.
    pub process: ProcessRef,
    /// Number of the signal, 1 to 31. With 9 (SIGKILL) all descendants are killed, as at the end of an
    /// exec; any other goes to its process group.
    pub signal: i32,
}

/// The body of `POST /v1/processes/attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Which process.
    pub process: ProcessRef,
}

/// The body of `POST /v1/connect`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectRequest {
    /// The TCP port, at least 1.
    pub port: u16,
}

/// The payload of the `Lost` frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// How many bytes of output are missing at this place.
    pub bytes: u64,
}

/// What the agent sends to who is attached to a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachedFrame {
    /// What the process is; comes first.
    Attached(Process),
    /// Bytes of standard output, or of the terminal.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// Output was dropped here.
    Lost(Lost),
    /// The process ended; nothing follows.
    Exit(Exit),
    /// The host has broken the protocol; nothing follows. The process runs on.
    Error(ErrorDetail),
}

impl AttachedFrame {
    /// Takes the first frame out of `buffer`; `None` as long as it is incomplete.
    ///
    /// # Errors
    /// Any [`FrameError`]. The stream cannot be read on after one.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some((kind, payload)) = frame::decode(buffer)? else {
            return Ok(None);
        };
        Ok(Some(match kind {
            FrameKind::Attached => Self::Attached(from_json(kind, &payload)?),
            FrameKind::Stdout => Self::Stdout(payload),
            FrameKind::Stderr => Self::Stderr(payload),
            FrameKind::Lost => Self::Lost(from_json(kind, &payload)?),
            FrameKind::Exit => Self::Exit(from_json(kind, &payload)?),
            FrameKind::Error => Self::Error(from_json(kind, &payload)?),
            _ => return Err(FrameError::WrongDirection(kind)),
        }))
    }

    /// Appends the frame to `out`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`]; the sender splits what is larger.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), FrameError> {
        match self {
            Self::Attached(process) => json(FrameKind::Attached, process, out),
            Self::Stdout(bytes) => frame::encode(FrameKind::Stdout, bytes, out),
            Self::Stderr(bytes) => frame::encode(FrameKind::Stderr, bytes, out),
            Self::Lost(lost) => json(FrameKind::Lost, lost, out),
            Self::Exit(exit) => json(FrameKind::Exit, exit, out),
            Self::Error(error) => json(FrameKind::Error, error, out),
        }
    }
}

/// What the host sends to a process that it is attached to, which has to have a terminal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TerminalFrame {
    /// Bytes that are typed.
    Input(Bytes),
    /// The terminal has this size from now on.
    Resize(TerminalSize),
}

impl TerminalFrame {
    /// Takes the first frame out of `buffer`; `None` as long as it is incomplete.
    ///
    /// # Errors
    /// Any [`FrameError`]. The stream cannot be read on after one.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some((kind, payload)) = frame::decode(buffer)? else {
            return Ok(None);
        };
        Ok(Some(match kind {
            FrameKind::Stdin => Self::Input(payload),
            FrameKind::Resize => Self::Resize(from_json(kind, &payload)?),
            _ => return Err(FrameError::WrongDirection(kind)),
        }))
    }

    /// Appends the frame to `out`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`]; the sender splits what is larger.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), FrameError> {
        match self {
            Self::Input(bytes) => frame::encode(FrameKind::Stdin, bytes, out),
            Self::Resize(size) => json(FrameKind::Resize, size, out),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ErrorCode;

    #[test]
    fn every_frame_survives() {
        let process = Process {
            pid: 42,
            tag: "t".into(),
            argv: vec!["sleep".into()],
            terminal: true,
            exit: None,
        };
        let frames = [
            AttachedFrame::Attached(process),
            AttachedFrame::Stdout(Bytes::from_static(b"\xff\x00")),
            AttachedFrame::Stderr(Bytes::new()),
            AttachedFrame::Lost(Lost { bytes: u64::MAX }),
            AttachedFrame::Exit(Exit {
                code: 0,
                signal: None,
                timed_out: false,
                duration_us: 1,
            }),
            AttachedFrame::Error(ErrorDetail::new(ErrorCode::BadRequest, "m")),
        ];
        let mut wire = BytesMut::new();
        for frame in &frames {
            frame.encode(&mut wire).unwrap();
        }
        for frame in frames {
            assert_eq!(AttachedFrame::decode(&mut wire).unwrap(), Some(frame));
        }
        let frames = [
            TerminalFrame::Input(Bytes::from_static(b"\x03")),
            TerminalFrame::Resize(TerminalSize { cols: 1, rows: 2 }),
        ];
        for frame in &frames {
            frame.encode(&mut wire).unwrap();
        }
        for frame in frames {
            assert_eq!(TerminalFrame::decode(&mut wire).unwrap(), Some(frame));
        }
    }

    #[test]
    fn tags_are_checked() {
        assert_eq!(check_tag("my dev-server/1"), Ok(()));
        assert_eq!(check_tag(&"x".repeat(MAX_TAG)), Ok(()));
        for bad in ["", "12", "a\nb", "\u{7f}", &"x".repeat(MAX_TAG + 1)] {
            assert!(check_tag(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_frames_or_errors(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let mut host = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = TerminalFrame::decode(&mut host) {}
            let mut agent = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = AttachedFrame::decode(&mut agent) {}
        }
    }
}
