//! Commands over a WebSocket, on a host that runs nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod support;

use std::net::SocketAddr;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use support::Api;
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

type Socket = WebSocketStream<TcpStream>;

struct Served {
    api: Api,
    address: SocketAddr,
    id: String,
}

impl Served {
    async fn new() -> Self {
        let api = Api::new(1 << 20, 1 << 20).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = api.router.clone();
        tokio::spawn(async move { axum::serve(listener, router).await });
        let id = api.create().await;
        Self { api, address, id }
    }

    async fn connect(&self, id: &str) -> Result<Socket, Error> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let uri = format!("ws://localhost/v1/sandboxes/{id}/exec/stream");
        client_async(uri, stream).await.map(|(socket, _)| socket)
    }

    /// What a client is told that sends this first, up to the close.
    async fn told(&self, first: &Value) -> Vec<Value> {
        let mut socket = self.connect(&self.id).await.unwrap();
        let first = Message::text(first.to_string());
        socket.send(first).await.unwrap();
        let mut told = Vec::new();
        loop {
            match socket.next().await.unwrap().unwrap() {
                Message::Text(text) => told.push(serde_json::from_str(&text).unwrap()),
                Message::Close(_) => return told,
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn output_is_told_as_it_comes_and_characters_stay_whole() {
    let served = Served::new().await;
    let start = json!({"type": "start", "cmd": "talk",
                       "args": ["", "plain", "hex:c3", "hex:bc", "hex:ff"]});
    assert_eq!(
        served.told(&start).await,
        [
            json!({"type": "start", "pid": 7}),
            json!({"type": "stdout", "data": "plain"}),
            json!({"type": "stdout", "data": "\u{fc}"}),
            json!({"type": "stdout", "data": "/w==", "encoding": "base64"}),
            json!({"type": "exit", "exit_code": 3}),
        ]
    );
}

#[tokio::test]
async fn what_cannot_be_run_is_told_with_a_sentence() {
    let served = Served::new().await;
    for (first, expected) in [
        (json!({"type": "start"}), "cmd is required"),
        (
            json!({"type": "start", "cmd": "x", "cwd": "y"}),
            "cwd must be absolute",
        ),
        (json!({"type": "begin"}), "invalid message"),
        (json!([]), "invalid message"),
        (json!({"type": "stop"}), "nothing to stop"),
        (json!({"type": "start", "cmd": "nothing"}), "no nothing"),
    ] {
        let told = served.told(&first).await;
        assert_eq!(told.len(), 1, "{first}: {told:?}");
        assert_eq!(told[0]["type"], "error");
        let data = told[0]["data"].as_str().unwrap();
        assert!(data.contains(expected), "{first}: {data}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_or_says_so_ends_the_command() {
    let served = Served::new().await;
    let start = json!({"type": "start", "cmd": "talk", "args": ["forever"]}).to_string();
    for stop in [
        None,
        Some(r#"{"type":"stop"}"#),
        Some(r#"{"type":"start","cmd":"x"}"#),
    ] {
        let mut socket = served.connect(&served.id).await.unwrap();
        socket.send(Message::text(&start)).await.unwrap();
        let said = socket.next().await.unwrap().unwrap();
        assert_eq!(
            said.into_text().unwrap().as_str(),
            r#"{"type":"start","pid":7}"#
        );
        if let Some(stop) = stop {
            socket.send(Message::text(stop)).await.unwrap();
        } else {
            drop(socket);
        }
        served.api.host.dropped.notified().await;
    }
}

#[tokio::test]
async fn what_is_no_websocket_or_no_running_sandbox_is_an_ordinary_error() {
    let served = Served::new().await;
    let path = format!("/v1/sandboxes/{}/exec/stream", served.id);
    let (status, answer) = served.api.call("GET", &path, "").await;
    assert_eq!(
        (status.as_u16(), &answer["error"]["code"]),
        (400, &json!("invalid_request"))
    );
    let refused = async |id: &str| match served.connect(id).await {
        Err(Error::Http(response)) => response.status().as_u16(),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused("sb-00000000").await, 404);
    let pause = format!("/v1/sandboxes/{}/pause", served.id);
    served.api.call("POST", &pause, "").await;
    assert_eq!(refused(&served.id).await, 409);
}
