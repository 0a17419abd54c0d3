//! What clients of the two published APIs expect of the daemon, and whether its answers are so.
//!
//! ```text
//! api/tests/conformance.rs     a daemon without guests ──┐
//! tests/scenarios/conformance.rs  with real guests ──────┴──► Client ◄── wrenn    `/v1`
//!                                                                    ◄── microvm  `/api/v1`
//! ```

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "a check that does not hold fails its test by a panic"
)]

pub mod microvm;
pub mod wrenn;

use std::net::TcpStream;

use serde_json::Value;

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// The type of the body; empty if there is none.
    pub kind: String,
    /// The body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The body as JSON; null if it is none.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }
}

/// What asks the daemon under test.
pub trait Client {
    /// The answer to a request with these headers and this body.
    fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer;

    /// A new connection, for a WebSocket.
    fn connect(&self) -> TcpStream;
}

/// A form with the boundary `X` of these fields, and then of a file.
pub fn form(fields: &[(&str, &str)], content: &[u8]) -> Vec<u8> {
    let mut form = Vec::new();
    for (name, value) in fields {
        let field =
            format!("--X\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
        form.extend_from_slice(field.as_bytes());
    }
    form.extend_from_slice(
        b"--X\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n",
    );
    form.extend_from_slice(content);
    form.extend_from_slice(b"\r\n--X--\r\n");
    form
}

/// The type of [`form`].
pub const FORM: &str = "multipart/form-data; boundary=X";
