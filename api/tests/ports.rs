//! HTTP servers in sandboxes, as programs and browsers reach them, with the real agent.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/served.rs"]
mod served;
#[path = "support/vmm.rs"]
mod vmm;

use api::domain::GuestHost;
use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::extract::ws::WebSocketUpgrade;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use served::Served;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// A server on this machine's loopback interface, which is that of the stand-in's guests too. It tells
/// what it was asked.
async fn server() -> u16 {
    async fn tell(request: Request) -> Response {
        let (parts, body) = request.into_parts();
        let headers: Vec<_> = parts
            .headers
            .iter()
            .map(|(name, value)| json!([name.as_str(), value.to_str().unwrap()]))
            .collect();
        let body = body.collect().await.unwrap().to_bytes();
        let told = json!({
            "method": parts.method.as_str(),
            "target": parts.uri.to_string(),
            "headers": headers,
            "length": body.len(),
        });
        let headers = [
            ("set-cookie", "a=b"),
            ("x-own", "yes"),
            ("connection", "x-own"),
        ];
        (headers, told.to_string()).into_response()
    }
    let router = Router::new()
        .route(
            "/socket",
            get(async |upgrade: WebSocketUpgrade| {
                upgrade.on_upgrade(async |mut socket| {
                    while let Some(Ok(message)) = socket.recv().await {
                        if socket.send(message).await.is_err() {
                            return;
                        }
                    }
                })
            }),
        )
        .route("/echo", any(async |body: Body| body))
        .route(
            "/away",
            any(async || ([("location", "/login")], axum::http::StatusCode::FOUND)),
        )
        .route(
            "/large",
            get(async || {
                let piece = Bytes::from(vec![b'x'; 64 * 1024]);
                let pieces =
                    stream::iter((0..LARGE).map(move |_| Ok::<_, std::io::Error>(piece.clone())));
                Body::from_stream(pieces)
            }),
        )
        .fallback(tell);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move { axum::serve(listener, router).await });
    port
}

/// How many pieces of 64 KiB `/large` has.
const LARGE: usize = 1024;

fn request(method: &str, target: &str, headers: &[(&str, &str)]) -> hyper::Request<Full<Bytes>> {
    let mut request = hyper::Request::builder().method(method).uri(target);
    if !headers.iter().any(|(name, _)| *name == "host") {
        request = request.header("host", "localhost:8080");
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request
        .body(Full::new(Bytes::from_static(b"hello")))
        .unwrap()
}

async fn told(response: hyper::Response<Incoming>) -> Value {
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    serde_json::from_slice(&body).unwrap()
}

fn header<'a>(told: &'a Value, name: &str) -> Option<&'a str> {
    let headers = told["headers"].as_array().unwrap();
    let found = headers.iter().find(|header| header[0] == name);
    found.map(|header| header[1].as_str().unwrap())
}

#[tokio::test]
async fn a_server_is_reached_by_path_by_header_and_by_host() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let id = sandbox.rsplit('/').next().unwrap();
    let port = server().await.to_string();
    let below = format!("{sandbox}/ports/{port}");

    // What the daemon is told is not for the guest, and is looked at by the daemon.
    let account = json!({"username": "admin", "password": "Correct-horse-7", "role": "admin"});
    let registered = served.call("POST", "/api/v1/auth/register", &account).await;
    assert_eq!(registered.0, 201, "{}", registered.1);
    let (_, login) = served.call("POST", "/api/v1/auth/login", &account).await;
    let credentials = format!("Bearer {}", login["access_token"].as_str().unwrap());
    for bad in [("x-api-key", "secret"), ("authorization", "Bearer secret")] {
        let response = served.send(request("GET", &below, &[bad])).await;
        assert_eq!(response.status(), 401, "{bad:?}");
    }

    let target = format!("{below}/a%2Fb//c?d=%20");
    let headers = [
        ("cookie", "of=others"),
        ("authorization", &credentials),
        ("connection", "x-private, keep-alive"),
        ("x-private", "1"),
        ("x-forwarded-host", "evil.example"),
    ];
    let response = served.send(request("PATCH", &target, &headers)).await;
    assert_eq!(response.headers()["content-security-policy"], "sandbox");
    assert!(!response.headers().contains_key("set-cookie"));
    assert!(!response.headers().contains_key("x-own"));
    let by_path = told(response).await;
    assert_eq!(
        (&by_path["method"], &by_path["target"], &by_path["length"]),
        (&json!("PATCH"), &json!("/a%2Fb//c?d=%20"), &json!(5))
    );
    for (name, value) in [
        ("host", Some(format!("localhost:{port}"))),
        ("x-forwarded-prefix", Some(below.clone())),
        ("x-forwarded-host", Some("localhost:8080".to_owned())),
        ("x-forwarded-proto", Some("http".to_owned())),
        (
            "forwarded",
            Some("host=\"localhost:8080\";proto=http".to_owned()),
        ),
        ("cookie", None),
        ("authorization", None),
        ("x-private", None),
    ] {
        assert_eq!(header(&by_path, name), value.as_deref(), "{name}");
    }
    let root = told(served.send(request("GET", &below, &[])).await).await;
    assert_eq!(root["target"], "/");
    let other = below.replace("sandboxes", "capsules") + "/x";
    let by_other = told(served.send(request("GET", &other, &[])).await).await;
    assert_eq!(
        header(&by_other, "x-forwarded-prefix"),
        Some(&other[..other.len() - 2])
    );
    let away = format!("{below}/away");
    let response = served.send(request("GET", &away, &[])).await;
    assert_eq!(
        (
            response.status().as_u16(),
            response.headers()["location"].to_str().unwrap()
        ),
        (302, format!("{below}/login").as_str())
    );

    let headers = [("x-sandbox-id", id), ("x-sandbox-port", port.as_str())];
    let by_header = told(
        served
            .send(request("GET", "/v1/sandboxes?x", &headers))
            .await,
    )
    .await;
    assert_eq!(by_header["target"], "/v1/sandboxes?x");
    assert_eq!(header(&by_header, "x-sandbox-id"), None);

    let host = format!("{port}-{id}.localhost:8080");
    let origin = format!("http://{host}");
    let headers = [
        ("host", host.as_str()),
        ("origin", &origin),
        ("cookie", "own=1"),
        ("sec-fetch-site", "same-origin"),
        ("sec-fetch-mode", "cors"),
    ];
    let response = served.send(request("POST", "/health", &headers)).await;
    assert_eq!(response.headers()["set-cookie"], "a=b");
    assert!(!response.headers().contains_key("content-security-policy"));
    let by_host = told(response).await;
    assert_eq!(by_host["target"], "/health");
    assert_eq!(header(&by_host, "cookie"), Some("own=1"));
    assert_eq!(
        header(&by_host, "origin"),
        Some(format!("http://localhost:{port}").as_str())
    );
}

#[tokio::test]
async fn pages_of_guests_reach_nothing_but_their_own_origin() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let id = sandbox.rsplit('/').next().unwrap();
    let port = server().await.to_string();
    let path = format!("{sandbox}/ports/{port}/page?x");
    // A browser that opens the path of a port is sent to the port's origin, and gets nothing there else.
    let opens = [
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "document"),
        ("sec-fetch-site", "none"),
    ];
    let response = served.send(request("GET", &path, &opens)).await;
    assert_eq!(response.status(), 307);
    let own = format!("http://{port}-{id}.localhost:8080");
    assert_eq!(response.headers()["location"], format!("{own}/page?x"));
    let status = async |method: &str, target: &str, headers: &[(&str, &str)]| {
        let response = served.send(request(method, target, headers)).await;
        response.status().as_u16()
    };
    for headers in [
        &[
            ("sec-fetch-mode", "cors"),
            ("sec-fetch-site", "same-origin"),
        ][..],
        &[
            ("sec-fetch-mode", "no-cors"),
            ("sec-fetch-site", "cross-site"),
        ],
        &[("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")],
        &[("sec-fetch-mode", "websocket")],
        &[("origin", "null")],
        &[("origin", &own)],
        &[("host", "evil.example")],
    ] {
        assert_eq!(status("GET", &path, headers).await, 403, "{headers:?}");
        let mut headers = headers.to_vec();
        headers.extend([("x-sandbox-id", id), ("x-sandbox-port", port.as_str())]);
        assert_eq!(status("GET", "/page", &headers).await, 403, "{headers:?}");
    }
    assert_eq!(status("POST", &path, &opens).await, 403);
    // A page of a port is a stranger to the API, and so to other ports.
    assert_eq!(
        status("POST", "/v1/sandboxes", &[("origin", &own)]).await,
        403
    );
    let other = format!("1-{id}.localhost:8080");
    assert_eq!(
        status("POST", "/", &[("host", &other), ("origin", &own)]).await,
        403
    );
    assert_eq!(
        status("GET", "/health", &[("host", "x.localhost:8080")]).await,
        403
    );
    // The host of a port leads to the port, whatever the path, and nowhere else.
    let host = format!("{port}-{id}.localhost:8080");
    let response = served
        .send(request("GET", "/v1/sandboxes", &[("host", &host)]))
        .await;
    assert_eq!(told(response).await["target"], "/v1/sandboxes");
}

#[tokio::test]
async fn bodies_pass_as_they_come_and_sockets_both_ways() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let port = server().await;
    let below = format!("{sandbox}/ports/{port}");

    // The answer begins before the request has ended.
    let stream = TcpStream::connect(served.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    tokio::spawn(connection);
    let (pieces, body) = tokio::sync::mpsc::channel::<Bytes>(1);
    let body = stream::unfold(body, async |mut body| {
        let piece = body.recv().await?;
        Some((Ok::<_, std::io::Error>(piece), body))
    });
    let echo = hyper::Request::post(format!("{below}/echo"))
        .header("host", "localhost")
        .body(Body::from_stream(body))
        .unwrap();
    pieces.send(Bytes::from_static(b"one")).await.unwrap();
    let mut answer = sender.send_request(echo).await.unwrap().into_body();
    let first = answer.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, "one");
    pieces.send(Bytes::from_static(b"two")).await.unwrap();
    let second = answer.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(second, "two");
    drop(pieces);
    assert!(answer.frame().await.is_none());

    let response = served
        .send(request("GET", &format!("{below}/large"), &[]))
        .await;
    let mut body = response.into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        length += frame.unwrap().into_data().unwrap().len();
    }
    assert_eq!(length, LARGE * 64 * 1024);

    let stream = TcpStream::connect(served.address).await.unwrap();
    let uri = format!("ws://localhost{below}/socket");
    let (mut socket, _) = client_async(uri, stream).await.unwrap();
    for text in ["one", "two"] {
        socket.send(Message::text(text)).await.unwrap();
        let echoed = socket.next().await.unwrap().unwrap();
        assert_eq!(echoed.into_text().unwrap().as_str(), text);
    }
}

#[tokio::test]
async fn what_cannot_be_reached_is_told() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let closed = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().port()
    };
    // It speaks something else.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rude = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let words: [&[u8]; 3] = [
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"",
        ];
        for said in words {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 64];
            let _ = stream.read(&mut head).await;
            let _ = stream.write_all(said).await;
        }
        // A head without an end.
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream.write_all(b"x: y\r\n").await.is_ok() {}
    });
    for (path, status, code) in [
        (format!("{sandbox}/ports/0/"), 400, "invalid_request"),
        (format!("{sandbox}/ports/70000/"), 400, "invalid_request"),
        (format!("{sandbox}/ports/http/"), 400, "invalid_request"),
        (
            "/v1/sandboxes/sb-00000000/ports/80/".to_owned(),
            404,
            "not_found",
        ),
        (format!("{sandbox}/ports/{closed}/"), 502, "agent_error"),
        (format!("{sandbox}/ports/{rude}/"), 502, "agent_error"),
        (format!("{sandbox}/ports/{rude}/"), 502, "agent_error"),
        (format!("{sandbox}/ports/{rude}/"), 502, "agent_error"),
        (format!("{sandbox}/ports/{rude}/"), 502, "agent_error"),
    ] {
        let (got, answer) = served.call("GET", &path, &Value::Null).await;
        assert_eq!(
            (got, &answer["error"]["code"]),
            (status, &json!(code)),
            "{path}: {answer}"
        );
    }
    let (_, answer) = served
        .call("GET", &format!("{sandbox}/ports/{closed}/"), &Value::Null)
        .await;
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(
        message.contains(&closed.to_string()) && message.contains("listens"),
        "{message}"
    );
}

#[tokio::test]
async fn a_connection_carries_bytes_and_keeps_the_sandbox_in_use() {
    let served = Served::new().await;
    let (status, sandbox) = served
        .call("POST", "/v1/sandboxes", &json!({"timeout_sec": 1}))
        .await;
    assert_eq!(status, 201, "{sandbox}");
    let id = sandbox["id"].as_str().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let in_use = served.manager.running(id).await.unwrap();
    let mut connection = served.manager.connect(in_use, port).await.unwrap();
    let (mut guest, _) = listener.accept().await.unwrap();
    // Longer than the sandbox may be idle.
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    connection.write_all(b"ping").await.unwrap();
    let mut said = [0; 4];
    guest.read_exact(&mut said).await.unwrap();
    guest.write_all(b"pong").await.unwrap();
    connection.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"pong");
    // The primitive itself.
    let of = id.parse().unwrap();
    let direct = served.host.connect(&of, port);
    let (direct, accepted) = tokio::join!(direct, listener.accept());
    let (mut direct, (mut guest, _)) = (direct.unwrap(), accepted.unwrap());
    direct.write_all(b"ping").await.unwrap();
    direct.shutdown().await.unwrap();
    let mut said = Vec::new();
    guest.read_to_end(&mut said).await.unwrap();
    assert_eq!(said, b"ping");
    drop(connection);
    let path = format!("/v1/sandboxes/{id}");
    while served.call("GET", &path, &Value::Null).await.1["status"] != "paused" {}
}
