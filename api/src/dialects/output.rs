//! The output of commands in JSON.
//!
//! It may be far larger than memory, so it is written as a stream: each piece of output is escaped or
//! encoded as it is read back from the spool.

use std::io;

use axum::body::{Body, Bytes};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::stream;
use serde::Serialize;
use utoipa::ToSchema;

use crate::domain::Spooled;

/// Output that is encoded at a time, in bytes: a multiple of 3, so that base64 pads the end only.
const CHUNK: usize = 48 * 1024;

/// How output is written into JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub enum Encoding {
    /// As it is.
    #[serde(rename = "utf-8")]
    Utf8,
    /// RFC 4648, section 4.
    #[serde(rename = "base64")]
    Base64,
}

/// How the output of a command is written: text as it is.
pub fn encoding(stdout: &Spooled, stderr: &Spooled) -> Encoding {
    match stdout.is_utf8() && stderr.is_utf8() {
        true => Encoding::Utf8,
        false => Encoding::Base64,
    }
}

/// An object of the fields of `head`, which has some, and of `stdout` and `stderr`.
///
/// # Errors
/// `head` cannot be written as JSON.
pub fn body(
    head: &impl Serialize,
    stdout: Spooled,
    stderr: Spooled,
) -> Result<Body, serde_json::Error> {
    let encoding = encoding(&stdout, &stderr);
    let mut head = serde_json::to_vec(head)?;
    // The object goes on: its last fields are the two that may be long.
    head.pop();
    head.extend_from_slice(b",\"stdout\":\"");
    let begin = Piece::Head {
        head,
        stdout,
        stderr,
    };
    let pieces = stream::try_unfold(begin, move |piece| piece.next(encoding));
    Ok(Body::from_stream(pieces))
}

/// What is still to be written.
enum Piece {
    Head {
        head: Vec<u8>,
        stdout: Spooled,
        stderr: Spooled,
    },
    Stdout {
        stdout: Spooled,
        stderr: Spooled,
    },
    Stderr {
        stderr: Spooled,
    },
    Done,
}

impl Piece {
    async fn next(self, encoding: Encoding) -> io::Result<Option<(Bytes, Self)>> {
        Ok(match self {
            Self::Head {
                head,
                stdout,
                stderr,
            } => Some((head.into(), Self::Stdout { stdout, stderr })),
            Self::Stdout { mut stdout, stderr } => Some(match stdout.next_chunk(CHUNK).await? {
                Some(chunk) => (encode(&chunk, encoding), Self::Stdout { stdout, stderr }),
                None => (
                    Bytes::from_static(b"\",\"stderr\":\""),
                    Self::Stderr { stderr },
                ),
            }),
            Self::Stderr { mut stderr } => Some(match stderr.next_chunk(CHUNK).await? {
                Some(chunk) => (encode(&chunk, encoding), Self::Stderr { stderr }),
                None => (Bytes::from_static(b"\"}"), Self::Done),
            }),
            Self::Done => None,
        })
    }
}

fn encode(chunk: &[u8], encoding: Encoding) -> Bytes {
    match encoding {
        Encoding::Utf8 => escape(chunk).into(),
        Encoding::Base64 => STANDARD.encode(chunk).into(),
    }
}

/// Escapes text for a JSON string (RFC 8259, section 7). Works on bytes, for a chunk may end
/// within a character: all that is escaped is ASCII, and no other byte of UTF-8 looks like it.
fn escape(chunk: &[u8]) -> Vec<u8> {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut out = Vec::with_capacity(chunk.len() + chunk.len() / 8);
    for &byte in chunk {
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0..0x20 => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
            _ => out.push(byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn escaped_text_is_read_back_by_any_json_parser(text: String, cut in 1..8usize) {
            let mut json = b"\"".to_vec();
            for chunk in text.as_bytes().chunks(cut) {
                json.extend(escape(chunk));
            }
            json.push(b'"');
            prop_assert_eq!(serde_json::from_slice::<String>(&json).unwrap(), text);
        }
    }

    #[test]
    fn every_control_character_is_escaped() {
        let all: Vec<u8> = (0..0x80).collect();
        let json = [b"\"".as_slice(), &escape(&all), b"\""].concat();
        let text: String = serde_json::from_slice(&json).unwrap();
        assert_eq!(text.as_bytes(), all);
    }

    #[test]
    fn chunks_of_base64_join_without_padding() {
        assert_eq!(CHUNK % 3, 0);
    }
}
