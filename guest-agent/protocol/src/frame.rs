//! The frames of an exec, and of who is attached to a process: type, length, payload.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes before the payload: one of type, four of length.
pub const FRAME_HEADER_LEN: usize = 5;
/// The largest payload, in bytes. It equals the capacity of a Linux pipe (pipe(7)), so that one
/// frame takes up what one read can give.
pub const MAX_FRAME_PAYLOAD: usize = 64 * 1024;

/// The types of frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// Host to agent: bytes for the program's standard input.
    Stdin = 0x01,
    /// Host to agent: end of standard input; no payload.
    StdinEnd = 0x02,
    /// Host to agent: the terminal's new size; JSON [`TerminalSize`](crate::TerminalSize).
    Resize = 0x03,
    /// Agent to host: the program runs; JSON [`Started`](crate::Started).
    Started = 0x10,
    /// Agent to host: bytes of standard output.
    Stdout = 0x11,
    /// Agent to host: bytes of standard error.
    Stderr = 0x12,
    /// Agent to host, last: the program ended; JSON [`Exit`](crate::Exit).
    Exit = 0x13,
    /// Agent to host: the process that it is attached to; JSON [`Process`](crate::Process).
    Attached = 0x14,
    /// Agent to host: output was dropped; JSON [`Lost`](crate::Lost).
    Lost = 0x15,
    /// Agent to host, last: the exec failed; JSON [`ErrorDetail`](crate::ErrorDetail).
    Error = 0x1f,
}

impl TryFrom<u8> for FrameKind {
    type Error = FrameError;

    fn try_from(byte: u8) -> Result<Self, FrameError> {
        Ok(match byte {
            0x01 => Self::Stdin,
            0x02 => Self::StdinEnd,
            0x03 => Self::Resize,
            0x10 => Self::Started,
            0x11 => Self::Stdout,
            0x12 => Self::Stderr,
            0x13 => Self::Exit,
            0x14 => Self::Attached,
            0x15 => Self::Lost,
            0x1f => Self::Error,
            _ => return Err(FrameError::UnknownKind(byte)),
        })
    }
}

/// Why bytes are no frame, or not one that this side may receive.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No frame has this type.
    #[error("frame type {0:#04x} is unknown")]
    UnknownKind(u8),
    /// The other side sends frames of this type.
    #[error("a frame of type {0:?} goes the other way")]
    WrongDirection(FrameKind),
    /// The payload is larger than [`MAX_FRAME_PAYLOAD`].
    #[error("a payload of {0} bytes is larger than the {MAX_FRAME_PAYLOAD} that a frame holds")]
    TooLarge(usize),
    /// A frame without payload has one.
    #[error("a frame of type {kind:?} has {len} bytes of payload, and may have none")]
    UnexpectedPayload {
        /// Type of the frame.
        kind: FrameKind,
        /// Length of its payload.
        len: usize,
    },
    /// The payload is not the JSON that goes with the type.
    #[error("the payload of a frame of type {kind:?} is not the JSON that it should be")]
    Json {
        /// Type of the frame.
        kind: FrameKind,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

/// The header of a frame, for a sender that has the payload elsewhere.
///
/// # Errors
/// [`FrameError::TooLarge`] if `len` exceeds [`MAX_FRAME_PAYLOAD`].
pub fn header(kind: FrameKind, len: usize) -> Result<[u8; FRAME_HEADER_LEN], FrameError> {
    if len > MAX_FRAME_PAYLOAD {
        return Err(FrameError::TooLarge(len));
    }
    let mut out = [kind as u8, 0, 0, 0, 0];
    let len = u32::try_from(len).map_err(|_| FrameError::TooLarge(len))?;
    out[1..].copy_from_slice(&len.to_be_bytes());
    Ok(out)
}

/// Appends one frame to `out`.
///
/// # Errors
/// [`FrameError::TooLarge`] if the payload exceeds [`MAX_FRAME_PAYLOAD`].
pub fn encode(kind: FrameKind, payload: &[u8], out: &mut BytesMut) -> Result<(), FrameError> {
    out.put_slice(&header(kind, payload.len())?);
    out.put_slice(payload);
    Ok(())
}

/// Takes the first frame out of `buffer`; `None` as long as it is incomplete. The type and
/// length are judged as soon as they are there, so a buffer never has to grow beyond one frame.
pub(crate) fn decode(buffer: &mut BytesMut) -> Result<Option<(FrameKind, Bytes)>, FrameError> {
    let Some(&kind) = buffer.first() else {
        return Ok(None);
    };
    let kind = FrameKind::try_from(kind)?;
    let Some(&[_, a, b, c, d]) = buffer.first_chunk::<FRAME_HEADER_LEN>() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes([a, b, c, d]);
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > MAX_FRAME_PAYLOAD {
        return Err(FrameError::TooLarge(len));
    }
    if buffer.len() < FRAME_HEADER_LEN + len {
        buffer.reserve(FRAME_HEADER_LEN + len - buffer.len());
        return Ok(None);
    }
    buffer.advance(FRAME_HEADER_LEN);
    Ok(Some((kind, buffer.split_to(len).freeze())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = FrameKind> {
        prop::sample::select(vec![
            FrameKind::Stdin,
            FrameKind::StdinEnd,
            FrameKind::Resize,
            FrameKind::Started,
            FrameKind::Stdout,
            FrameKind::Stderr,
            FrameKind::Exit,
            FrameKind::Attached,
            FrameKind::Lost,
            FrameKind::Error,
        ])
    }

    #[test]
    fn a_payload_of_the_limit_passes_and_one_byte_more_does_not() {
        let payload = vec![7; MAX_FRAME_PAYLOAD + 1];
        let mut wire = BytesMut::new();
        encode(FrameKind::Stdout, &payload[1..], &mut wire).unwrap();
        let (kind, got) = decode(&mut wire).unwrap().unwrap();
        assert_eq!((kind, got.len()), (FrameKind::Stdout, MAX_FRAME_PAYLOAD));
        assert!(matches!(
            encode(FrameKind::Stdout, &payload, &mut wire),
            Err(FrameError::TooLarge(_))
        ));
        assert!(wire.is_empty());
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_payload_arrives() {
        let mut wire = BytesMut::from(&[0x11, 0xff, 0xff, 0xff, 0xff][..]);
        assert!(matches!(decode(&mut wire), Err(FrameError::TooLarge(_))));
        assert!(wire.capacity() < MAX_FRAME_PAYLOAD);
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(
            frames in prop::collection::vec((kinds(), prop::collection::vec(any::<u8>(), 0..300)), 0..8),
            cuts in prop::collection::vec(1..50usize, 1..40),
        ) {
            let mut wire = BytesMut::new();
            for (kind, payload) in &frames {
                encode(*kind, payload, &mut wire).unwrap();
            }
            let mut buffer = BytesMut::new();
            let mut got = Vec::new();
            let mut cuts = cuts.into_iter().cycle();
            while !wire.is_empty() {
                let n = cuts.next().unwrap_or(1).min(wire.len());
                buffer.put_slice(&wire.split_to(n));
                while let Some((kind, payload)) = decode(&mut buffer).unwrap() {
                    got.push((kind, payload.to_vec()));
                }
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(got, frames);
        }

        #[test]
        fn hostile_bytes_never_grow_the_buffer_beyond_a_frame(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let mut taken = 0;
            loop {
                match decode(&mut buffer) {
                    Ok(Some((_, payload))) => taken += FRAME_HEADER_LEN + payload.len(),
                    Ok(None) => {
                        prop_assert_eq!(taken + buffer.len(), bytes.len());
                        prop_assert!(buffer.capacity() <= 2 * (FRAME_HEADER_LEN + MAX_FRAME_PAYLOAD));
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }
}
