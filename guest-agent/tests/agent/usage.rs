//! What is used, which is here that of the machine that the tests run on.

use agent_protocol::{ErrorCode, PATH_HEALTH, PATH_USAGE, Usage};
use http_body_util::BodyExt;
use hyper::{Method, header::CONNECTION};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::Agent;

#[tokio::test]
async fn what_is_used_is_told() {
    let agent = Agent::start();
    let response = agent.call(Method::GET, PATH_USAGE, b"").await;
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let usage: Usage = serde_json::from_slice(&body).unwrap();
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert!(usage.cpus as usize >= cpus, "{usage:?}");
    assert!(usage.memory_available > 0 && usage.memory_available < usage.memory_total);
    let disk = usage.disk_used + usage.disk_available;
    assert!(usage.disk_used > 0 && disk <= usage.disk_total, "{usage:?}");
    let (status, error) = agent.refused(Method::POST, PATH_USAGE, b"").await;
    assert_eq!((status, error.code), (405, ErrorCode::MethodNotAllowed));
}

#[tokio::test]
async fn a_connection_stays_open_for_more_of_these_questions_and_no_others() {
    let agent = Agent::start();
    let mut connection = agent.connect().await;
    let ask = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n");
    for _ in 0..3 {
        connection
            .write_all(ask(PATH_USAGE).as_bytes())
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"}") {
            assert_ne!(connection.read_buf(&mut answer).await.unwrap(), 0);
        }
    }
    connection
        .write_all(ask(PATH_HEALTH).as_bytes())
        .await
        .unwrap();
    let mut last = String::new();
    connection.read_to_string(&mut last).await.unwrap();
    assert!(last.starts_with("HTTP/1.1 200 OK\r\n"), "{last}");
    let refused = agent.call(Method::POST, PATH_HEALTH, b"").await;
    assert_eq!(refused.headers()[CONNECTION], "close");
}
