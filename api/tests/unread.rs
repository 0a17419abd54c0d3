//! Answers to clients that still send, over TCP.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/served.rs"]
mod served;
#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use serde_json::{Value, json};
use served::Served;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// More than the buffers of a connection on this machine hold.
const MUCH: usize = 10 << 20;
/// The beginning of a form for a file.
const FORM: &str = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n";

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

fn head(method: &str, path: &str, headers: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n")
}

fn post(path: &str, headers: &str) -> String {
    head(
        "POST",
        path,
        &format!("Content-Length: {MUCH}\r\n{headers}"),
    )
}

/// The status of the next answer of a connection, after its body.
async fn status(stream: &mut TcpStream) -> u16 {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| {
        let length = line.strip_prefix("content-length: ")?;
        length.parse::<usize>().ok()
    });
    stream
        .read_exact(&mut vec![0; length.unwrap_or(0)])
        .await
        .unwrap();
    head.split(' ').nth(1).unwrap().parse().unwrap()
}

/// The status of the answer to a client that sends all of this before it reads, and then uses the connection
/// again.
async fn sends_first(served: &Served, head: &str, mut body: Vec<u8>) -> u16 {
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(head.as_bytes()).await.unwrap();
    body.resize(MUCH, b'a');
    stream.write_all(&body).await.unwrap();
    let answer = status(&mut stream).await;
    let again = crate::head("GET", "/health", "");
    stream.write_all(again.as_bytes()).await.unwrap();
    assert_eq!(status(&mut stream).await, 200);
    answer
}

/// `Authorization` of a user.
async fn bearer(served: &Served) -> String {
    let user = json!({"username": "alice", "password": "Correct-horse-7", "role": "user"});
    served.call("POST", "/api/v1/auth/register", &user).await;
    let (status, token) = served.call("POST", "/api/v1/auth/login", &user).await;
    assert_eq!(status, 200, "{token}");
    let token = token["access_token"].as_str().unwrap();
    format!("Authorization: Bearer {token}\r\n")
}

#[tokio::test]
async fn a_client_that_sends_all_before_it_reads_gets_the_answer() {
    let served = Served::new().await;
    let bearer = bearer(&served).await;
    let running = served.create().await;
    let gone = served.create().await;
    let (status, _) = served.call("DELETE", &gone, &Value::Null).await;
    assert_eq!(status, 204);
    let id = running.rsplit('/').next().unwrap();
    let form = "Content-Type: multipart/form-data; boundary=x\r\n";
    let with_token = format!("{bearer}{form}");
    for (path, headers, begins, expected) in [
        // Deleted, and never there.
        (&format!("{gone}/files/write")[..], form, FORM, 409),
        ("/v1/sandboxes/sb-00000000/files/write", form, FORM, 404),
        ("/api/v1/vms/none/files/upload", &with_token, FORM, 404),
        ("/api/v1/vms/none/guest/upload", &with_token, FORM, 404),
        // Somebody else's, and without credentials or with bad ones.
        (
            &format!("/api/v1/vms/{id}/files/upload"),
            &with_token,
            FORM,
            404,
        ),
        ("/api/v1/vms/none/files/upload", form, FORM, 401),
        ("/v1/templates", "Authorization: Bearer no\r\n", "", 401),
        // Too large: a file and JSON.
        (&format!("{running}/files/write"), form, FORM, 413),
        (
            "/v1/sandboxes",
            "Content-Type: application/json\r\n",
            "{",
            413,
        ),
        (
            "/api/v1/auth/login",
            "Content-Type: application/json\r\n",
            "{",
            413,
        ),
        ("/v1/templates", "", "{", 413),
        // Malformed.
        ("/v1/templates", form, "--x\r\nnonsense\r\n\r\n", 400),
        // Nothing there, and nothing that takes a body.
        ("/none", "", "", 404),
        ("/health", "", "", 405),
    ] {
        let head = post(path, headers);
        let answer = sends_first(&served, &head, begins.as_bytes().to_vec()).await;
        assert_eq!(answer, expected, "{head}");
    }
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_is_told_no_at_once() {
    let served = Served::new().await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = post(
        "/v1/sandboxes/sb-00000000/files/write",
        "Content-Type: multipart/form-data; boundary=x\r\nExpect: 100-continue\r\n",
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(status(&mut stream).await, 404);
    // It is not told to go on, and no other request can follow.
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_client_that_sends_for_ever_is_cut_off() {
    let served = Served::new().await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let head = head("POST", "/none", "Transfer-Encoding: chunked\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    assert_eq!(status(&mut stream).await, 404);
    while stream.write_all(b"1\r\na\r\n").await.is_ok() {
        // It sends slowly.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
