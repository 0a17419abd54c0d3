//! What happens, told over WebSockets, on a host that runs nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod support;

use std::net::SocketAddr;

use api::domain::{Egress, End, NetworkInfo};

use axum::http::StatusCode;
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use support::Api;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

struct Served {
    api: Api,
    address: SocketAddr,
}

struct Socket(WebSocketStream<TcpStream>);

impl Socket {
    /// The next message that is no ping, which come every 30 s and are answered by the next read.
    async fn message(&mut self) -> Message {
        loop {
            match self.0.next().await.unwrap().unwrap() {
                Message::Ping(_) => {}
                message => return message,
            }
        }
    }

    /// The next message.
    async fn next(&mut self) -> Value {
        match self.message().await {
            Message::Text(text) => serde_json::from_str(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// The next event, and what there is to say of it.
    async fn event(&mut self) -> (String, Value) {
        let mut message = self.next().await;
        let time = message["timestamp"].as_str().unwrap();
        assert!(time.parse::<jiff::Timestamp>().is_ok(), "{time}");
        let event_type = message["event_type"].as_str().unwrap().to_owned();
        (event_type, message["data"].take())
    }

    /// The code with which it is closed.
    async fn close_code(&mut self) -> u16 {
        match self.message().await {
            Message::Close(Some(frame)) => frame.code.into(),
            other => panic!("{other:?}"),
        }
    }
}

impl Served {
    async fn new() -> Self {
        let api = Api::new(1 << 20, 1 << 20).await;
        *api.host.networks.lock().unwrap() = vec![NetworkInfo {
            name: "chbr0".into(),
            subnet: "192.168.200.0/24".parse().unwrap(),
            default_egress: Egress::All,
        }];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = api.router.clone();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { api, address }
    }

    /// A user's `Authorization`.
    async fn user(&self, name: &str, role: &str) -> String {
        self.api.user(name, role).await
    }

    async fn open(&self, path: &str, headers: &[(&'static str, &str)]) -> Result<Socket, Error> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        self.open_on(stream, path, headers).await
    }

    async fn open_on(
        &self,
        stream: TcpStream,
        path: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<Socket, Error> {
        let uri = format!("ws://localhost/api/v1{path}");
        let mut request = uri.into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let (socket, _) = client_async(request, stream).await?;
        Ok(Socket(socket))
    }

    async fn follow(&self, path: &str, bearer: &str) -> Socket {
        self.open(path, &[("authorization", bearer)]).await.unwrap()
    }

    async fn refused(&self, path: &str, headers: &[(&'static str, &str)]) -> u16 {
        match self.open(path, headers).await {
            Err(Error::Http(response)) => response.status().as_u16(),
            Err(other) => panic!("{other:?}"),
            Ok(_) => panic!("not refused"),
        }
    }

    async fn call(&self, bearer: &str, method: &str, path: &str, body: Value) -> Value {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let path = format!("/api/v1{path}");
        let headers = [("authorization", bearer)];
        let (status, answer) = self.api.call_as(method, &path, &body, &headers).await;
        assert!(status.is_success(), "{method} {path}: {status} {answer}");
        answer
    }
}

#[tokio::test]
async fn every_change_of_a_machine_is_told_in_the_words_of_the_reference() {
    let served = Served::new().await;
    let alice = served.user("alice", "admin").await;
    let call =
        async |method: &str, path: &str, body: Value| served.call(&alice, method, path, body).await;
    let mut system = served.follow("/system/events", &alice).await;
    let vm = call("POST", "/vms", json!({"name": "test-vm"})).await;
    let mut events = served.follow("/vms/test-vm/events", &alice).await;
    let created = system.next().await;
    let user_id = created["data"]["user_id"].clone();
    assert!(user_id.as_str().unwrap().starts_with("us"), "{user_id}");
    assert_eq!(
        created,
        json!({
            "event_type": "vm_created",
            "timestamp": created["timestamp"],
            "data": {"vm_name": "test-vm", "user_id": user_id},
        })
    );

    call("POST", "/vms/test-vm/start", Value::Null).await;
    let started = events.next().await;
    assert_eq!(
        started,
        json!({
            "event_type": "status_change",
            "vm_name": "test-vm",
            "timestamp": started["timestamp"],
            "data": {"old_status": "created", "new_status": "running"},
        })
    );
    let (event, attached) = events.event().await;
    assert_eq!(
        (event.as_str(), &attached["ip"]),
        ("network_attached", &vm["ip_address"])
    );

    let run = json!({"command": "true", "environment": {"KEY": "SECRET"}});
    call("POST", "/vms/test-vm/execute", run).await;
    let (event, data) = events.event().await;
    assert_eq!(
        (event.as_str(), &data["exit_code"]),
        ("command_executed", &json!(0))
    );
    assert!(!data.to_string().contains("SECRET"), "{data}");
    let forward = json!({"host_port": 8080, "guest_port": 80});
    call("POST", "/vms/test-vm/network/port-forward", forward.clone()).await;
    call(
        "DELETE",
        "/vms/test-vm/network/port-forward/8080",
        Value::Null,
    )
    .await;
    for expected in ["port_forward_opened", "port_forward_closed"] {
        let (event, data) = events.event().await;
        assert_eq!(
            (event.as_str(), &data["host_port"]),
            (expected, &json!(8080))
        );
    }
    let (status, _) = served
        .api
        .upload_as(&alice, "/api/v1/vms/test-vm/files/upload")
        .await;
    assert_eq!(status, StatusCode::OK);
    let written = ("file_written".to_owned(), json!({"path": "/f"}));
    assert_eq!(events.event().await, written);

    call("POST", "/vms/test-vm/snapshots", json!({"name": "one"})).await;
    call("POST", "/vms/test-vm/snapshots/one/restore", Value::Null).await;
    call("DELETE", "/vms/test-vm/snapshots/one", Value::Null).await;
    let mut told = Vec::new();
    while told
        .last()
        .is_none_or(|(event, _)| event != "snapshot_deleted")
    {
        told.push(events.event().await);
    }
    let names: Vec<_> = told.iter().map(|(event, _)| event.as_str()).collect();
    assert_eq!(
        names,
        [
            "snapshot_created",
            "status_change",
            "network_detached",
            "snapshot_restored",
            "status_change",
            "network_attached",
            "snapshot_deleted",
        ]
        .as_slice()
    );
    assert_eq!(told[0].1["snapshot_name"], "one");

    call("POST", "/vms/test-vm/restart", Value::Null).await;
    for expected in [("running", "stopped"), ("stopped", "running")] {
        loop {
            let (event, data) = events.event().await;
            if event == "status_change" {
                let words = (data["old_status"].as_str(), data["new_status"].as_str());
                assert_eq!(words, (Some(expected.0), Some(expected.1)));
                break;
            }
        }
    }
    served.api.host.end(
        vm["id"].as_str().unwrap(),
        End::Failed {
            reason: "its kernel panicked".into(),
        },
    );
    loop {
        let (event, data) = events.event().await;
        if event == "status_change" {
            assert_eq!(data["new_status"], "stopped");
            assert_eq!(data["reason"], "its kernel panicked");
            break;
        }
    }
    call("DELETE", "/vms/test-vm", Value::Null).await;
    let gone = ("vm_deleted".to_owned(), json!({}));
    assert_eq!(events.event().await, gone);
    assert_eq!(events.close_code().await, 1000);

    // Whoever follows all was told the same, with the name.
    loop {
        let (event, data) = system.event().await;
        assert_eq!(
            (&data["vm_name"], &data["user_id"]),
            (&json!("test-vm"), &user_id)
        );
        if event == "vm_deleted" {
            break;
        }
    }
}

#[tokio::test]
async fn what_the_other_dialect_does_is_told_too() {
    let served = Served::new().await;
    let alice = served.user("alice", "admin").await;
    let mut system = served.follow("/system/events", &alice).await;
    let id = served.api.create().await;
    let path = format!("/v1/sandboxes/{id}");
    for what in ["/pause", "/resume"] {
        let (status, answer) = served.api.call("POST", &format!("{path}{what}"), "").await;
        assert!(status.is_success(), "{answer}");
    }
    let fork = format!("{path}/fork");
    let (_, forked) = served.api.call("POST", &fork, r#"{"count": 1}"#).await;
    let egress = format!("{path}/network/egress");
    served
        .api
        .call("PUT", &egress, r#"{"policy": "none"}"#)
        .await;
    let (status, _) = served.api.call("DELETE", &path, "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let mut told = Vec::new();
    loop {
        let (event, data) = system.event().await;
        let word = data["new_status"].as_str().map(|word| format!(" {word}"));
        let is_fork = data["vm_name"] == forked["sandboxes"][0]["id"];
        assert!(is_fork || data["vm_name"] == json!(id), "{data}");
        assert_eq!(data["user_id"], "local");
        let of = if is_fork { "fork: " } else { "" };
        let is_last = event == "vm_deleted";
        told.push(format!("{of}{event}{}", word.unwrap_or_default()));
        if is_last {
            break;
        }
    }
    assert_eq!(
        told,
        [
            "vm_created",
            "status_change running",
            "network_attached",
            "status_change paused",
            "network_detached",
            "status_change running",
            "network_attached",
            "fork: vm_created",
            "fork: status_change running",
            "fork: network_attached",
            "egress_changed",
            "network_detached",
            "status_change stopped",
            "vm_deleted",
        ]
    );
}

#[tokio::test]
async fn each_user_is_told_of_their_own_and_nobody_without_a_good_token() {
    let served = Served::new().await;
    let root = served.user("root", "admin").await;
    let alice = served.user("alice", "user").await;
    let bob = served.user("bob", "user").await;
    served
        .call(&alice, "POST", "/vms", json!({"name": "hers"}))
        .await;
    for path in ["/system/events", "/vms/hers/events"] {
        assert_eq!(served.refused(path, &[]).await, 401);
        let forged = format!("{}x", &alice[..alice.len() - 1]);
        assert_eq!(
            served.refused(path, &[("authorization", &forged)]).await,
            401
        );
        let forged = format!("bearer, {}", &forged[7..]);
        let offered = [("sec-websocket-protocol", forged.as_str())];
        assert_eq!(served.refused(path, &offered).await, 401);
        let key = [("x-api-key", "mvs_no")];
        assert_eq!(served.refused(path, &key).await, 401);
    }
    let as_bob = [("authorization", bob.as_str())];
    assert_eq!(served.refused("/vms/hers/events", &as_bob).await, 404);
    assert_eq!(served.refused("/vms/nobodys/events", &as_bob).await, 404);

    // As a browser has to do it.
    let offered = format!("bearer, {}", &alice[7..]);
    let offered = [("sec-websocket-protocol", offered.as_str())];
    let mut hers = served.open("/system/events", &offered).await.unwrap();
    let mut of_one = served.open("/vms/hers/events", &offered).await.unwrap();
    let mut his = served.follow("/system/events", &bob).await;
    let mut roots = served.follow("/system/events", &root).await;
    let mut roots_of_one = served.follow("/vms/hers/events", &root).await;
    served
        .call(&alice, "POST", "/vms/hers/start", Value::Null)
        .await;
    served
        .call(&bob, "POST", "/vms", json!({"name": "his"}))
        .await;
    served
        .call(&alice, "DELETE", "/vms/hers", Value::Null)
        .await;
    let mut names = Vec::new();
    for socket in [&mut hers, &mut roots] {
        loop {
            let (event, data) = socket.event().await;
            names.push(data["vm_name"].as_str().unwrap().to_owned());
            if event == "vm_deleted" {
                break;
            }
        }
    }
    assert_eq!(
        names.iter().filter(|name| *name == "his").count(),
        1,
        "{names:?}"
    );
    assert_eq!(his.event().await.1["vm_name"], "his");
    for socket in [&mut of_one, &mut roots_of_one] {
        while socket.event().await.0 != "vm_deleted" {}
        assert_eq!(socket.close_code().await, 1000);
    }
    // Nothing else came: the next that he is told is his own.
    served.call(&bob, "DELETE", "/vms/his", Value::Null).await;
    assert_eq!(his.event().await.1["vm_name"], "his");
    assert_eq!(served.refused("/vms/hers/events", &offered).await, 404);
}

#[tokio::test]
async fn a_slow_reader_brakes_nobody_and_is_told_how_much_it_missed() {
    const WRITES: u64 = 3000;
    let served = Served::new().await;
    let alice = served.user("alice", "admin").await;
    let id = served.api.create().await;
    let slow = TcpSocket::new_v4().unwrap();
    slow.set_recv_buffer_size(4096).unwrap();
    let slow = slow.connect(served.address).await.unwrap();
    let path = format!("/vms/{id}/events");
    let headers = [("authorization", alice.as_str())];
    let mut slow = served.open_on(slow, &path, &headers).await.unwrap();
    let in_use = served.api.manager.running(&id).await.unwrap();
    let long = "x".repeat(4000);
    for number in 0..WRITES {
        let path = format!("/{number}/{long}");
        let content = futures_util::stream::empty().boxed();
        let written = served.api.manager.write_file(&in_use, path, None, content);
        written.await.unwrap();
    }
    served
        .api
        .call("DELETE", &format!("/v1/sandboxes/{id}"), "")
        .await;
    let (mut told, mut lost, mut last) = (0, 0, None);
    loop {
        let message = slow.next().await;
        assert_eq!(message["vm_name"], id, "{message}");
        let data = &message["data"];
        match message["event_type"].as_str().unwrap() {
            "file_written" => {
                told += 1;
                let path = data["path"].as_str().unwrap();
                let number: u64 = path.split('/').nth(1).unwrap().parse().unwrap();
                assert!(last < Some(number), "in order");
                last = Some(number);
            }
            "events_lost" => lost += data["count"].as_u64().unwrap(),
            "vm_deleted" => break,
            _ => {}
        }
    }
    assert_eq!(slow.close_code().await, 1000);
    assert_eq!(told + lost, WRITES);
    assert!(lost > 0);
    assert_eq!(last, Some(WRITES - 1), "the latest are kept");
}

#[tokio::test]
async fn sockets_of_one_user_are_counted_and_what_is_no_handshake_is_an_ordinary_error() {
    let served = Served::new().await;
    let alice = served.user("alice", "admin").await;
    let bob = served.user("bob", "user").await;
    let headers = [("authorization", alice.as_str())];
    for (path, expected) in [("/system/events", 400), ("/vms/nobodys/events", 404)] {
        let path = format!("/api/v1{path}");
        let (status, error) = served.api.call_as("GET", &path, "", &headers).await;
        assert_eq!(status.as_u16(), expected, "{error}");
        assert!(error["message"].is_string(), "{error}");
    }
    let mut open = Vec::new();
    for _ in 0..support::MAX_SOCKETS {
        open.push(served.follow("/system/events", &alice).await);
    }
    assert_eq!(served.refused("/system/events", &headers).await, 429);
    served.follow("/system/events", &bob).await;
    let mut one = open.pop().unwrap();
    one.0
        .send(Message::Text("it does not matter".into()))
        .await
        .unwrap();
    one.0.close(None).await.unwrap();
    while one.0.next().await.is_some() {}
    // Its place is free once the daemon has seen that.
    while served.open("/system/events", &headers).await.is_err() {}
}

#[tokio::test]
async fn the_end_of_the_daemon_is_told() {
    let served = Served::new().await;
    let alice = served.user("alice", "admin").await;
    let id = served.api.create().await;
    let mut events = served.follow("/system/events", &alice).await;
    served.api.manager.shutdown(false).await;
    loop {
        let (event, data) = events.event().await;
        if event == "status_change" {
            assert_eq!(
                (&data["vm_name"], &data["new_status"]),
                (&json!(id), &json!("stopped"))
            );
            break;
        }
    }
    assert_eq!(events.event().await.0, "vm_deleted");
    assert_eq!(events.close_code().await, 1001);
}

#[tokio::test(start_paused = true)]
async fn credentials_are_looked_at_again_and_a_silent_client_is_gone() {
    let served = Served::new().await;
    let alice = served.user("alice", "admin").await;
    let body = json!({"name": "k"}).to_string();
    let headers = [("authorization", alice.as_str())];
    let (_, key) = served
        .api
        .call_as("POST", "/v1/api-keys", &body, &headers)
        .await;
    let (id, secret) = (key["id"].as_str().unwrap(), key["key"].as_str().unwrap());
    let offered = format!("bearer, {secret}");
    let offered = [("sec-websocket-protocol", offered.as_str())];
    let mut events = served.open("/system/events", &offered).await.unwrap();
    let mut silent = served.follow("/system/events", &alice).await.0.into_inner();
    let (pinged, mut pings) = tokio::sync::mpsc::unbounded_channel();
    let client = tokio::spawn(async move {
        loop {
            match events.0.next().await.unwrap().unwrap() {
                Message::Ping(_) => pinged.send(()).unwrap(),
                Message::Close(Some(frame)) => return u16::from(frame.code),
                other => panic!("{other:?}"),
            }
        }
    });
    // Longer than one may be silent that does not answer.
    for _ in 0..10 {
        pings.recv().await.unwrap();
    }
    let mut last_words = Vec::new();
    silent.read_to_end(&mut last_words).await.unwrap();
    assert!(last_words.starts_with(&[0x89, 0]), "a ping: {last_words:?}");
    let path = format!("/v1/api-keys/{id}");
    let (status, _) = served.api.call_as("DELETE", &path, "", &headers).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert_eq!(client.await.unwrap(), 1008);
}
