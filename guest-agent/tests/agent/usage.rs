//! What is used, which is here that of the machine that the tests run on.

use agent_protocol::{ErrorCode, PATH_USAGE, Usage};
use http_body_util::BodyExt;
use hyper::Method;

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
