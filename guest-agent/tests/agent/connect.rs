//! Connections to ports of the guest.

use agent_protocol::{
    CONNECT_UPGRADE, ConnectRequest, ErrorCode, ErrorDetail, MAX_CONNECTIONS, PATH_CONNECT,
};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::common::{Agent, builder, error_of};

impl Agent {
    async fn try_to_port(&self, port: u16) -> Result<TokioIo<Upgraded>, (u16, ErrorDetail)> {
        let body = serde_json::to_vec(&ConnectRequest { port }).unwrap();
        let body = Full::new(Bytes::from(body)).map_err(|never| match never {});
        let request = builder(Method::POST, PATH_CONNECT)
            .header("connection", "upgrade")
            .header("upgrade", CONNECT_UPGRADE)
            .body(body)
            .unwrap();
        let response = self.request(request).await;
        if response.status() != 101 {
            return Err(error_of(response).await);
        }
        Ok(TokioIo::new(hyper::upgrade::on(response).await.unwrap()))
    }
}

#[tokio::test]
async fn bytes_pass_both_ways_and_each_way_ends_by_itself() {
    let agent = Agent::start();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address).await else {
            // This machine has no IPv6.
            continue;
        };
        let port = listener.local_addr().unwrap().port();
        let mut host = agent.try_to_port(port).await.unwrap();
        let (mut guest, _) = listener.accept().await.unwrap();
        let sent: Vec<u8> = (0..1 << 20).map(|n: u32| (n >> 3) as u8).collect();
        let writing = async {
            host.write_all(&sent).await.unwrap();
            host.shutdown().await.unwrap();
        };
        let reading = async {
            let mut received = Vec::new();
            guest.read_to_end(&mut received).await.unwrap();
            received
        };
        let ((), received) = tokio::join!(writing, reading);
        assert!(received == sent);
        guest.write_all(b"still here").await.unwrap();
        drop(guest);
        let mut answer = Vec::new();
        host.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"still here");
    }
}

#[tokio::test]
async fn what_cannot_be_connected_is_told() {
    let agent = Agent::start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut open = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        open.push((
            agent.try_to_port(port).await.unwrap(),
            listener.accept().await.unwrap(),
        ));
    }
    let (status, error) = agent.try_to_port(port).await.err().unwrap();
    assert_eq!((status, error.code), (503, ErrorCode::OutOfResources));
    println!(
        "{} KiB at most, with {MAX_CONNECTIONS} connections",
        agent.peak_kib()
    );
    open.clear();
    while agent.try_to_port(port).await.is_err() {}
    drop(listener);
    let (status, error) = agent.try_to_port(port).await.err().unwrap();
    assert_eq!((status, error.code), (502, ErrorCode::PortClosed));
    assert!(error.message.contains(&port.to_string()), "{error}");
    let (status, error) = agent.try_to_port(0).await.err().unwrap();
    assert_eq!((status, error.code), (400, ErrorCode::BadRequest));
    let (status, _) = agent
        .refused(Method::POST, PATH_CONNECT, br#"{"port":1}"#)
        .await;
    assert_eq!(status, 400);
    let (status, _) = agent.refused(Method::GET, PATH_CONNECT, b"").await;
    assert_eq!(status, 405);
}
