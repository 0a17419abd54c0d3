//! WebSockets on which client and daemon tell each other things in JSON, and how they end.

use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::error::ApiError;
use crate::dialects::brief;

/// How long a client may take to say what it wants.
pub const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The largest message of a client that starts a command, in bytes: what a command may have.
pub const MAX_MESSAGE: usize = 1 << 20;
/// How long a client may take to close its side in the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// What is read of a WebSocket at once, in bytes. Each has it, idle or not.
const READ_BUFFER: usize = 4096;

/// The answer to the handshake of a client whose messages have so many bytes at most, and whom `serve`
/// serves then.
///
/// # Errors
/// It is no such handshake.
pub fn open<F>(
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
    max_message: usize,
    serve: impl FnOnce(Socket) -> F + Send + 'static,
) -> Result<Response, ApiError>
where
    F: Future<Output = ()> + Send + 'static,
{
    let upgrade = upgrade
        .map_err(|rejection| ApiError::invalid(format!("expected a WebSocket: {rejection}")))?;
    Ok(upgrade
        .read_buffer_size(READ_BUFFER)
        .max_message_size(max_message)
        .on_upgrade(move |socket| serve(Socket(socket))))
}

/// A client. Of what is told, `None` says that it has gone away.
pub struct Socket(WebSocket);

/// What a client has sent.
pub enum Received<T> {
    /// An order.
    Order(T),
    /// Bytes as they are.
    Bytes(Bytes),
    /// What is no order, and why, as a sentence.
    Problem(String),
}

impl Socket {
    /// The client's next message, which is an order; the error is a sentence.
    pub async fn order<T: DeserializeOwned>(&mut self) -> Option<Result<T, String>> {
        Some(match self.message().await? {
            Message::Text(text) => parse(text.as_bytes()),
            message => parse(&message.into_data()),
        })
    }

    /// The client's next message, an order if it is text.
    pub async fn order_or_bytes<T: DeserializeOwned>(&mut self) -> Option<Received<T>> {
        Some(match self.message().await? {
            Message::Text(text) => match parse(text.as_bytes()) {
                Ok(order) => Received::Order(order),
                Err(problem) => Received::Problem(problem),
            },
            message => Received::Bytes(message.into_data()),
        })
    }

    /// The client's first message. One that says nothing for long is told that `expected` was; the
    /// error is a sentence.
    pub async fn first<T: DeserializeOwned>(
        &mut self,
        expected: &str,
    ) -> Option<Result<T, String>> {
        match timeout(START_TIMEOUT, self.order()).await {
            Ok(order) => order,
            Err(_) => Some(Err(format!(
                "nothing was sent within {} s: expected {expected}",
                START_TIMEOUT.as_secs()
            ))),
        }
    }

    /// Returns when the client has gone away; what it says is of no interest.
    pub async fn gone(&mut self) {
        while self.message().await.is_some() {}
    }

    /// The next message that is text or bytes.
    async fn message(&mut self) -> Option<Message> {
        loop {
            match self.0.recv().await?.ok()? {
                message @ (Message::Text(_) | Message::Binary(_)) => return Some(message),
                Message::Close(_) => return None,
                Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    }

    /// Tells something.
    pub async fn tell(&mut self, news: &impl Serialize) -> Option<()> {
        let text = serde_json::to_string(news).ok()?;
        self.0.send(Message::Text(text.into())).await.ok()
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: Bytes) -> Option<()> {
        self.0.send(Message::Binary(bytes)).await.ok()
    }

    /// Makes sure that the client is there.
    pub async fn check(&mut self) -> Option<()> {
        self.0.send(Message::Ping(Bytes::new())).await.ok()
    }

    /// Tells the last thing, if there is one, and that nothing follows.
    pub async fn end(mut self, last: Option<impl Serialize>) {
        let Some(last) = last else { return };
        if self.tell(&last).await.is_none() {
            return;
        }
        let close = CloseFrame {
            code: close_code::NORMAL,
            reason: "".into(),
        };
        let _ = self.0.send(Message::Close(Some(close))).await;
        // What it still sends is read: a connection that is closed on it is reset, and what the client
        // has been told would be lost on the way.
        let rest = async { while let Some(Ok(_)) = self.0.recv().await {} };
        let _ = timeout(CLOSE_TIMEOUT, rest).await;
    }
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    serde_json::from_slice(text)
        .map_err(|source| brief::message(format!("invalid message: {source}")))
}

/// Output. What is not UTF-8 is base64, and says so.
#[derive(Debug, Serialize)]
pub struct Data<'a> {
    data: std::borrow::Cow<'a, str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encoding: Option<&'static str>,
}

impl<'a> Data<'a> {
    /// As it is, if it is UTF-8.
    pub fn new(bytes: &'a [u8]) -> Self {
        match std::str::from_utf8(bytes) {
            Ok(text) => Self {
                data: text.into(),
                encoding: None,
            },
            Err(_) => Self {
                data: STANDARD.encode(bytes).into(),
                encoding: Some("base64"),
            },
        }
    }
}
