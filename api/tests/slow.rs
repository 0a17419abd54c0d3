//! Clients that send slowly, over TCP.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/served.rs"]
mod served;
#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use api::http::Patience;
use serde_json::{Value, json};
use served::{PATIENT, Served};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A time that passes soon, and not before what is sent at once has come.
const SHORT: Duration = Duration::from_secs(1);
const FORM: &str = "Content-Type: multipart/form-data; boundary=x\r\n";

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// A connection on which this was sent.
async fn say(served: &Served, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    stream
}

/// The head of a request whose body is so long, in bytes, and the beginning of that.
fn begin(path: &str, headers: &str, length: usize, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
    )
}

/// A form of a text and a file; the second half has the end of the file.
fn form((name, text): (&str, &str), file: &str) -> (String, String) {
    let field = "Content-Disposition: form-data; name=";
    let first = format!(
        "--x\r\n{field}\"{name}\"\r\n\r\n{text}\r\n\
         --x\r\n{field}\"{file}\"; filename=\"f\"\r\n\r\nthe beginning"
    );
    (first, " and the end\r\n--x--\r\n".to_owned())
}

/// All that comes to the end of the connection: status, headers and the JSON body.
async fn answer(mut stream: TcpStream) -> (u16, String, Value) {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let body = serde_json::from_str(body).unwrap_or(Value::Null);
    (status, head.to_lowercase(), body)
}

/// The status of the answer, whose connection stays open.
async fn status(stream: &mut TcpStream) -> u16 {
    let mut line = [0; 12];
    stream.read_exact(&mut line).await.unwrap();
    let line = std::str::from_utf8(&line).unwrap();
    line.strip_prefix("HTTP/1.1 ").unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_body_that_does_not_come_is_answered_with_408_in_the_form_of_its_dialect() {
    let served = Served::with_patience(Patience {
        body: SHORT,
        ..PATIENT
    })
    .await;
    let sandbox = served.create().await;
    let paths = [
        "/api/v1/auth/login",
        "/api/v1/auth/register",
        "/v1/sandboxes",
        "/v1/templates",
        &format!("{sandbox}/exec"),
    ];
    let mut streams = Vec::new();
    for path in paths {
        streams.push((path, say(&served, &begin(path, "", 100, "{")).await));
    }
    for (path, stream) in streams {
        // The end of the connection follows the answer, though the client keeps its side open.
        let (status, head, body) = answer(stream).await;
        assert_eq!(status, 408, "{path}");
        assert!(head.contains("connection: close"), "{head}");
        let (code, message) = match path.starts_with("/api/v1/") {
            true => (&body["error"], &body["message"]),
            false => (&body["error"]["code"], &body["error"]["message"]),
        };
        assert_eq!(code, "request_timeout", "{body}");
        assert!(message.as_str().unwrap().contains("within 1s"), "{body}");
    }
    // One that comes a little at a time, and chunks, are no better.
    let head = "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n";
    let head = format!("POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\n{head}");
    let (mut reader, mut writer) = say(&served, &head).await.into_split();
    let sending = tokio::spawn(async move {
        while writer.write_all(b"1\r\n \r\n").await.is_ok() {
            tokio::time::sleep(SHORT / 10).await;
        }
    });
    // The client may be told by a reset that nobody reads on.
    let mut text = Vec::new();
    let _ = reader.read_to_end(&mut text).await;
    assert!(text.starts_with(b"HTTP/1.1 408 "));
    sending.await.unwrap();
    let (_, all) = served.call("GET", "/v1/sandboxes", &Value::Null).await;
    assert_eq!(all.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn an_upload_takes_as_long_as_it_likes() {
    let served = Served::with_patience(Patience {
        body: SHORT,
        ..PATIENT
    })
    .await;
    let sandbox = served.create().await;
    let file = served.dir.path().join("slow");
    let (first, rest) = form(("path", file.to_str().unwrap()), "file");
    let path = format!("{sandbox}/files/write");
    let head = begin(&path, FORM, first.len() + rest.len(), &first);
    let mut slow = say(&served, &head).await;
    // When this is answered, the upload has taken longer than another body may.
    let other = say(&served, &begin("/v1/sandboxes", "", 100, "{")).await;
    assert_eq!(answer(other).await.0, 408);
    slow.write_all(rest.as_bytes()).await.unwrap();
    assert_eq!(status(&mut slow).await, 204);
    let content = std::fs::read_to_string(file).unwrap();
    assert_eq!(content, "the beginning and the end");
}

#[tokio::test]
async fn an_upload_that_does_not_go_on_is_answered_with_408_and_leaves_no_file() {
    let served = Served::with_patience(Patience {
        upload: SHORT,
        ..PATIENT
    })
    .await;
    let sandbox = served.create().await;
    let user = json!({"username": "alice", "password": "Correct-horse-7", "role": "user"});
    served.call("POST", "/api/v1/auth/register", &user).await;
    let (_, token) = served.call("POST", "/api/v1/auth/login", &user).await;
    let bearer = format!(
        "{FORM}Authorization: Bearer {}\r\n",
        token["access_token"].as_str().unwrap()
    );
    // Whoever sends something else may take its time.
    let spec = json!({"timeout_sec": 0}).to_string();
    let (first, rest) = spec.split_at(5);
    let patient = begin("/v1/sandboxes", "", spec.len(), first);
    let mut patient = say(&served, &patient).await;
    // Without a name it runs at once.
    let vm = json!({"template": "minimal"}).to_string();
    let close = format!("{bearer}Connection: close\r\n");
    let create = begin("/api/v1/vms", &close, vm.len(), &vm);
    let (created, _, vm) = answer(say(&served, &create).await).await;
    assert_eq!(created, 201, "{vm}");
    let vm = format!("/api/v1/vms/{}", vm["id"].as_str().unwrap());

    let file = served.dir.path().join("stalled");
    let at = file.to_str().unwrap();
    let recipe = json!({"name": "n", "recipe": {"steps": []}}).to_string();
    for (path, headers, (first, rest)) in [
        (
            format!("{sandbox}/files/write"),
            FORM,
            form(("path", at), "file"),
        ),
        (
            "/v1/templates".to_owned(),
            FORM,
            form(("request", &recipe), "archive"),
        ),
        (
            format!("{vm}/files/upload"),
            &bearer,
            form(("path", at), "file"),
        ),
        (
            format!("{vm}/guest/upload"),
            &bearer,
            form(("path", at), "file"),
        ),
    ] {
        let head = begin(&path, headers, first.len() + rest.len(), &first);
        let (status, head, body) = answer(say(&served, &head).await).await;
        assert_eq!(status, 408, "{path} {body}");
        assert!(head.contains("connection: close"), "{head}");
        let code = match path.starts_with("/api/v1/") {
            true => &body["error"],
            false => &body["error"]["code"],
        };
        assert_eq!(code, "request_timeout", "{body}");
    }
    assert!(!file.exists());
    patient.write_all(rest.as_bytes()).await.unwrap();
    assert_eq!(status(&mut patient).await, 201);
}

#[tokio::test]
async fn a_connection_without_a_whole_head_is_closed() {
    let served = Served::with_patience(Patience {
        head: SHORT,
        ..PATIENT
    })
    .await;
    let sandbox = served.create().await;
    // A request that is being served, one whose body is on its way, and a WebSocket have had their heads.
    let mut socket = served.socket(&format!("{sandbox}/exec/stream")).await;
    socket
        .say(&json!({"type": "start", "cmd": "cat", "stdin": true}))
        .await;
    assert_eq!(socket.next().await.unwrap()["type"], "start");
    let fifo = served.dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RWXU,
        0,
    )
    .unwrap();
    let exec = json!({"cmd": "cat", "args": [fifo]}).to_string();
    let exec = begin(&format!("{sandbox}/exec"), "", exec.len(), &exec);
    let mut exec = say(&served, &exec).await;
    let spec = json!({"timeout_sec": 0}).to_string();
    let (first, rest) = spec.split_at(5);
    let mut half = say(&served, &begin("/v1/sandboxes", "", spec.len(), first)).await;

    let whole = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for (sent, answers) in [("", 0), (&whole[..30], 0), (whole, 1)] {
        let mut stream = say(&served, sent).await;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text.matches("HTTP/1.1 200").count(), answers, "{text}");
        assert_eq!(text.matches("HTTP/1.1").count(), answers, "{text}");
    }
    half.write_all(rest.as_bytes()).await.unwrap();
    assert_eq!(status(&mut half).await, 201);
    // Its writer waits until the command has opened it.
    tokio::fs::write(&fifo, "done").await.unwrap();
    assert_eq!(status(&mut exec).await, 200);
    socket.say(&json!({"type": "stdin_end"})).await;
    assert_eq!(socket.rest().await.pop().unwrap()["type"], "exit");
}
