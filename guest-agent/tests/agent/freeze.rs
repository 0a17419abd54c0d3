//! Freezing, by an agent that freezes nothing since it is not process 1: what the host sees is the same.

use std::time::Duration;

use agent_protocol::{ErrorCode, FREEZE_UPGRADE, FROZEN, NOT_FROZEN, PATH_FREEZE};
use http_body_util::{BodyExt, Full};
use hyper::Method;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::{Agent, builder};

/// A connection by which something is frozen.
async fn freeze(agent: &Agent, timeout_ms: u64) -> TokioIo<hyper::upgrade::Upgraded> {
    let body = format!(r#"{{"timeout_ms":{timeout_ms}}}"#);
    let request = builder(Method::POST, PATH_FREEZE)
        .header("connection", "upgrade")
        .header("upgrade", FREEZE_UPGRADE)
        .body(Full::from(body).map_err(|never| match never {}))
        .unwrap();
    let response = agent.request(request).await;
    assert_eq!(response.status(), 101);
    TokioIo::new(hyper::upgrade::on(response).await.unwrap())
}

#[tokio::test]
async fn a_freeze_lasts_until_the_host_says_so() {
    let agent = Agent::start();
    let mut connection = freeze(&agent, 60_000).await;
    // The agent serves others meanwhile.
    assert_eq!(agent.sh("echo x").await.stdout, b"x\n");
    connection.write_u8(7).await.unwrap();
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, [FROZEN]);
}

#[tokio::test]
async fn a_freeze_ends_with_its_time_and_the_host_is_told() {
    let agent = Agent::start();
    let mut connection = freeze(&agent, 1).await;
    // Not asked: the end of the time makes the agent answer.
    let answer = connection.read_u8();
    let answer = tokio::time::timeout(Duration::from_secs(60), answer).await;
    assert_eq!(answer.unwrap().unwrap(), NOT_FROZEN);
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let agent = Agent::start();
    for (body, words) in [
        ("{}", "JSON"),
        (r#"{"timeout_ms":0}"#, "1 to 60000"),
        (r#"{"timeout_ms":60001}"#, "1 to 60000"),
    ] {
        let request = builder(Method::POST, PATH_FREEZE)
            .header("connection", "upgrade")
            .header("upgrade", FREEZE_UPGRADE)
            .body(Full::from(body).map_err(|never| match never {}))
            .unwrap();
        let (status, error) = crate::common::error_of(agent.request(request).await).await;
        assert_eq!((status, error.code), (400, ErrorCode::BadRequest));
        assert!(error.message.contains(words), "{}", error.message);
    }
    let (status, error) = agent
        .refused(Method::POST, PATH_FREEZE, br#"{"timeout_ms":5}"#)
        .await;
    assert_eq!((status, error.code), (400, ErrorCode::BadRequest));
    assert!(error.message.contains("freeze/1"), "{}", error.message);
    let (status, _) = agent.refused(Method::GET, PATH_FREEZE, b"").await;
    assert_eq!(status, 405);
}
