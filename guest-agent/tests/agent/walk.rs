//! Walks of directories, as the host asks for them.

use std::fs;

use crate::common::Agent;
use agent_protocol::{ErrorCode, MAX_WALK_ENTRIES, PATH_WALK, WalkLine, WalkRequest};
use http_body_util::BodyExt;
use hyper::Method;

fn request(agent: &Agent) -> WalkRequest {
    WalkRequest {
        path: agent.directory().to_str().unwrap().to_owned(),
        max_entries: 10,
        max_depth: 1,
        max_bytes: 100_000,
        other_file_systems: false,
        skip: Vec::new(),
    }
}

#[tokio::test]
async fn a_walk_is_lines_with_an_end() {
    let agent = Agent::start();
    fs::create_dir(agent.directory().join("a")).unwrap();
    fs::write(agent.directory().join("a/b"), "x").unwrap();
    let body = serde_json::to_vec(&request(&agent)).unwrap();
    let response = agent.call(Method::POST, PATH_WALK, &body).await;
    assert_eq!(response.status(), 200);
    let kind = response.headers()["content-type"].clone();
    assert_eq!(kind, "application/x-ndjson");
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let lines: Vec<WalkLine> = body
        .split_inclusive(|&byte| byte == b'\n')
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    let mut names: Vec<_> = lines
        .iter()
        .filter_map(|line| match line {
            WalkLine::Entry(entry) => Some(entry.name.as_str()),
            _ => None,
        })
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["a", "agent.sock", "b"]);
    assert_eq!(lines.last(), Some(&WalkLine::End { cut: None }));
}

#[tokio::test]
async fn what_cannot_be_walked_is_refused() {
    let agent = Agent::start();
    let good = request(&agent);
    let with_path = |path: &str| WalkRequest {
        path: path.to_owned(),
        ..good.clone()
    };
    let file = agent.directory().join("file");
    fs::write(&file, "x").unwrap();
    let too_many = WalkRequest {
        max_entries: MAX_WALK_ENTRIES + 1,
        ..good.clone()
    };
    for (request, code) in [
        (with_path("etc"), ErrorCode::BadRequest),
        (too_many, ErrorCode::BadRequest),
        (with_path("/proc/none"), ErrorCode::NotFound),
        (with_path(file.to_str().unwrap()), ErrorCode::NotADirectory),
    ] {
        let body = serde_json::to_vec(&request).unwrap();
        let (_, error) = agent.refused(Method::POST, PATH_WALK, &body).await;
        assert_eq!(error.code, code, "{}: {error}", request.path);
    }
    let (_, error) = agent.refused(Method::POST, PATH_WALK, b"{}").await;
    assert_eq!(error.code, ErrorCode::BadRequest);
    let (_, error) = agent.refused(Method::GET, PATH_WALK, b"").await;
    assert_eq!(error.code, ErrorCode::MethodNotAllowed);
}
