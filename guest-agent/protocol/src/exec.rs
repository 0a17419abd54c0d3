//! Exec: the request, and the frames of either side.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    ErrorDetail, FrameKind,
    frame::{self, FrameError},
};

/// The body of `POST /v1/exec`. All but `argv` may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The program and its arguments; no shell is involved. A program without `/` is looked up
    /// in the `PATH` of the environment it gets. At least one, without NUL.
    pub argv: Vec<String>,
    /// Variables to set. Names are non-empty and without `=` or NUL, values without NUL.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Start from an empty environment, and not from the defaults: `PATH`, `HOME`, `USER`,
    /// `LOGNAME`, `SHELL`, `LANG=C.UTF-8` and `TERM=xterm`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub env_clear: bool,
    /// The working directory, absolute. By default the user's home, or `/` if that does not
    /// exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `USER` or `USER:GROUP`, each a name or a number. Without a group, the user's own group
    /// and supplementary groups from the guest's `/etc/passwd` and `/etc/group` are used. By
    /// default the agent's user (root).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Kill the program after so many milliseconds, at least 1. By default it may run forever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Whether `Stdin` frames follow. Otherwise standard input is `/dev/null`.
    #[serde(default, skip_serializing_if = "is_false")]
    pub stdin: bool,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// The payload of the `Started` frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Process id in the guest, which also names its session and process group.
    pub pid: u32,
}

/// The payload of the `Exit` frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// The exit status; 128 plus the signal's number if a signal ended the program.
    pub code: i32,
    /// The number of the signal that ended the program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<i32>,
    /// Whether the program was killed because its timeout ran out.
    #[serde(default)]
    pub timed_out: bool,
    /// Microseconds from the start of the program to its exit.
    pub duration_us: u64,
}

/// What the host sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostFrame {
    /// Bytes for standard input.
    Stdin(Bytes),
    /// End of standard input.
    StdinEnd,
}

impl HostFrame {
    /// Takes the first frame out of `buffer`; `None` as long as it is incomplete.
    ///
    /// # Errors
    /// Any [`FrameError`]. The stream cannot be read on after one.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some((kind, payload)) = frame::decode(buffer)? else {
            return Ok(None);
        };
        match kind {
            FrameKind::Stdin => Ok(Some(Self::Stdin(payload))),
            FrameKind::StdinEnd if payload.is_empty() => Ok(Some(Self::StdinEnd)),
            FrameKind::StdinEnd => Err(FrameError::UnexpectedPayload {
                kind,
                len: payload.len(),
            }),
            _ => Err(FrameError::WrongDirection(kind)),
        }
    }

    /// Appends the frame to `out`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`]; the sender splits what is larger.
    pub fn encode(&self, out: &mut BytesMut) -> Result<(), FrameError> {
        match self {
            Self::Stdin(bytes) => frame::encode(FrameKind::Stdin, bytes, out),
            Self::StdinEnd => frame::encode(FrameKind::StdinEnd, &[], out),
        }
    }
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentFrame {
    /// The program runs.
    Started(Started),
    /// Bytes of standard output.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// The program ended; nothing follows.
    Exit(Exit),
    /// The exec failed and the program was killed; nothing follows.
    Error(ErrorDetail),
}

impl AgentFrame {
    /// Takes the first frame out of `buffer`; `None` as long as it is incomplete.
    ///
    /// # Errors
    /// Any [`FrameError`]. The stream cannot be read on after one.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some((kind, payload)) = frame::decode(buffer)? else {
            return Ok(None);
        };
        Ok(Some(match kind {
            FrameKind::Started => Self::Started(from_json(kind, &payload)?),
            FrameKind::Stdout => Self::Stdout(payload),
            FrameKind::Stderr => Self::Stderr(payload),
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
            Self::Started(started) => json(FrameKind::Started, started, out),
            Self::Stdout(bytes) => frame::encode(FrameKind::Stdout, bytes, out),
            Self::Stderr(bytes) => frame::encode(FrameKind::Stderr, bytes, out),
            Self::Exit(exit) => json(FrameKind::Exit, exit, out),
            Self::Error(error) => json(FrameKind::Error, error, out),
        }
    }
}

pub(crate) fn json<T: Serialize>(
    kind: FrameKind,
    value: &T,
    out: &mut BytesMut,
) -> Result<(), FrameError> {
    let payload = serde_json::to_vec(value).map_err(|source| FrameError::Json { kind, source })?;
    frame::encode(kind, &payload, out)
}

pub(crate) fn from_json<T: DeserializeOwned>(
    kind: FrameKind,
    payload: &[u8],
) -> Result<T, FrameError> {
    serde_json::from_slice(payload).map_err(|source| FrameError::Json { kind, source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ErrorCode;

    #[test]
    fn every_agent_frame_survives() {
        let frames = [
            AgentFrame::Started(Started { pid: 42 }),
            AgentFrame::Stdout(Bytes::from_static(b"\xff\x00")),
            AgentFrame::Stderr(Bytes::new()),
            AgentFrame::Exit(Exit {
                code: 137,
                signal: Some(9),
                timed_out: true,
                duration_us: 1,
            }),
            AgentFrame::Error(ErrorDetail::new(ErrorCode::BadRequest, "m")),
        ];
        let mut wire = BytesMut::new();
        for frame in &frames {
            frame.encode(&mut wire).unwrap();
        }
        for frame in frames {
            assert_eq!(AgentFrame::decode(&mut wire).unwrap(), Some(frame));
        }
        assert_eq!(AgentFrame::decode(&mut wire).unwrap(), None);
    }

    #[test]
    fn each_side_refuses_its_own_frames() {
        let mut wire = BytesMut::new();
        HostFrame::StdinEnd.encode(&mut wire).unwrap();
        assert!(matches!(
            AgentFrame::decode(&mut wire),
            Err(FrameError::WrongDirection(FrameKind::StdinEnd))
        ));
        let mut wire = BytesMut::new();
        AgentFrame::Stdout(Bytes::new()).encode(&mut wire).unwrap();
        assert!(matches!(
            HostFrame::decode(&mut wire),
            Err(FrameError::WrongDirection(FrameKind::Stdout))
        ));
    }

    #[test]
    fn an_end_of_stdin_has_no_payload() {
        let mut wire = BytesMut::from(&[2, 0, 0, 0, 1, b'x'][..]);
        assert!(matches!(
            HostFrame::decode(&mut wire),
            Err(FrameError::UnexpectedPayload { len: 1, .. })
        ));
    }

    #[test]
    fn only_argv_is_required() {
        let request: ExecRequest = serde_json::from_str(r#"{"argv":["true"]}"#).unwrap();
        assert_eq!(
            serde_json::to_string(&request).unwrap(),
            r#"{"argv":["true"]}"#
        );
        assert!(serde_json::from_str::<ExecRequest>(r#"{"argv":["true"],"tty":true}"#).is_err());
        assert!(serde_json::from_str::<ExecRequest>("{}").is_err());
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_frames_or_errors(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let mut host = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = HostFrame::decode(&mut host) {}
            let mut agent = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = AgentFrame::decode(&mut agent) {}
        }
    }
}
