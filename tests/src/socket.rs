//! WebSockets of JSON messages.

use std::net::TcpStream;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderName;
use tungstenite::{Message, WebSocket};

use crate::PATIENCE;
use crate::daemon::Daemon;

/// A WebSocket of JSON messages.
pub struct Socket(WebSocket<TcpStream>);

impl Socket {
    /// Opens one of the daemon's.
    ///
    /// # Panics
    /// It is refused.
    pub fn open(daemon: &Daemon, path: &str) -> Self {
        Self::open_with(daemon, path, &[])
    }

    /// The same with these headers.
    ///
    /// # Panics
    /// It is refused.
    pub fn open_with(daemon: &Daemon, path: &str, headers: &[(HeaderName, &str)]) -> Self {
        let stream = TcpStream::connect(daemon.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut request = format!("ws://localhost{path}")
            .into_client_request()
            .unwrap();
        for (name, value) in headers {
            let value = value.parse().unwrap();
            request.headers_mut().insert(name.clone(), value);
        }
        let (socket, _) = tungstenite::client(request, stream).unwrap();
        Self(socket)
    }

    /// Sends a message.
    ///
    /// # Panics
    /// The socket is closed.
    pub fn say(&mut self, message: &Value) {
        self.0.send(Message::text(message.to_string())).unwrap();
    }

    /// Types on the terminal that is open on this socket.
    ///
    /// # Panics
    /// The socket is closed.
    pub fn type_in(&mut self, bytes: &[u8]) {
        self.say(&json!({"type": "input", "data": STANDARD.encode(bytes)}));
    }

    /// The next message; `None` at the close.
    ///
    /// # Panics
    /// There is none for long, or the connection breaks off.
    pub fn receive(&mut self) -> Option<Value> {
        loop {
            match self.0.read().unwrap() {
                Message::Text(text) => return Some(serde_json::from_str(&text).unwrap()),
                Message::Close(_) => return None,
                // Answered by the next read.
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// The next output, which is empty of a message that brings none.
    ///
    /// # Errors
    /// There is no more, as a sentence.
    ///
    /// # Panics
    /// A message is not what it should be.
    pub fn output(&mut self) -> Result<Vec<u8>, String> {
        let told = match self.0.read() {
            Ok(Message::Text(text)) => serde_json::from_str::<Value>(&text).unwrap(),
            other => return Err(format!("no more output: {other:?}")),
        };
        let data = told["data"].as_str().unwrap_or_default();
        match told["type"].as_str().unwrap() {
            "output" => Ok(STANDARD.decode(data).unwrap()),
            "stdout" => Ok(data.as_bytes().to_vec()),
            "start" | "started" | "ping" => Ok(Vec::new()),
            _ => Err(format!("no more output: {told}")),
        }
    }

    /// Reads on until the output holds `text`.
    ///
    /// # Panics
    /// It does not.
    pub fn wait_for(&mut self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        while !out.windows(text.len()).any(|window| window == text) {
            out.extend(self.output().unwrap());
        }
        out
    }
}
