//! Sandboxes that nobody uses, in time that does not pass by itself.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::time::Duration;

use api::domain::WhenIdle;
use axum::http::StatusCode;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::{Api, Fault};
use tokio::time::{Instant, sleep};

const SECOND: Duration = Duration::from_secs(1);

async fn create(api: &Api, timeout_sec: u32) -> String {
    let body = json!({"timeout_sec": timeout_sec}).to_string();
    let (status, sandbox) = api.call("POST", "/v1/sandboxes", &body).await;
    assert_eq!(status, StatusCode::CREATED, "{sandbox}");
    format!("/v1/sandboxes/{}", sandbox["id"].as_str().unwrap())
}

async fn status(api: &Api, path: &str) -> Value {
    api.call("GET", path, "").await.1["status"].clone()
}

async fn exec(api: &Api, path: &str, argv: [&str; 2]) -> StatusCode {
    let body = json!({"cmd": argv[0], "args": [argv[1]]}).to_string();
    api.call("POST", &format!("{path}/exec"), &body).await.0
}

#[tokio::test(start_paused = true)]
async fn an_idle_sandbox_is_paused_within_two_seconds_of_its_timeout() {
    let api = Api::idle(WhenIdle::Pause).await;
    let (short, long, never) = (
        create(&api, 10).await,
        create(&api, 1000).await,
        create(&api, 0).await,
    );
    sleep(9 * SECOND).await;
    assert_eq!(status(&api, &short).await, "running");
    sleep(3 * SECOND).await;
    assert_eq!(status(&api, &short).await, "paused");
    assert_eq!(status(&api, &long).await, "running");
    sleep(1000 * SECOND).await;
    assert_eq!(status(&api, &long).await, "paused");
    sleep(100_000 * SECOND).await;
    assert_eq!(status(&api, &never).await, "running");

    let resumed = api.call("POST", &format!("{short}/resume"), "").await;
    assert_eq!(resumed.0, StatusCode::OK);
    sleep(12 * SECOND).await;
    assert_eq!(status(&api, &short).await, "paused", "and again");
}

#[tokio::test(start_paused = true)]
async fn what_is_used_is_not_idle() {
    let api = Api::idle(WhenIdle::Pause).await;
    let path = create(&api, 10).await;
    let read = async || {
        let body = json!({"path": "/zeros/655360"}).to_string();
        api.send("POST", &format!("{path}/files/read"), body).await
    };
    for _ in 0..5 {
        sleep(9 * SECOND).await;
        assert_eq!(exec(&api, &path, ["echo", "x"]).await, StatusCode::OK);
        sleep(9 * SECOND).await;
        let content = read().await.into_body().collect().await.unwrap();
        assert_eq!(content.to_bytes().len(), 655_360);
    }
    assert_eq!(exec(&api, &path, ["work", "25"]).await, StatusCode::OK);
    assert_eq!(status(&api, &path).await, "running");
    let slow = read().await;
    sleep(100 * SECOND).await;
    assert_eq!(status(&api, &path).await, "running", "it is being read");
    drop(slow);
    sleep(12 * SECOND).await;
    assert_eq!(status(&api, &path).await, "paused");
    assert_eq!(exec(&api, &path, ["echo", "x"]).await, StatusCode::CONFLICT);
}

#[tokio::test(start_paused = true)]
async fn a_command_that_comes_while_it_is_being_paused_runs() {
    let api = Api::idle(WhenIdle::Pause).await;
    *api.host.save_takes.lock().unwrap() = 5 * SECOND;
    let path = create(&api, 10).await;
    sleep(12 * SECOND).await;
    assert_eq!(api.host.saves.lock().unwrap().len(), 0, "it is being saved");
    let begun = Instant::now();
    assert_eq!(exec(&api, &path, ["echo", "x"]).await, StatusCode::OK);
    assert!(begun.elapsed() >= 2 * SECOND, "it was paused first");
    assert_eq!(api.host.saves.lock().unwrap().len(), 1);
    assert_eq!(status(&api, &path).await, "running");
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_paused_runs_on_and_is_tried_again() {
    let api = Api::idle(WhenIdle::Pause).await;
    *api.host.fault.lock().unwrap() = Some(Fault::NotSaved);
    let path = create(&api, 10).await;
    sleep(12 * SECOND).await;
    assert_eq!(status(&api, &path).await, "running");
    sleep(10 * SECOND).await;
    assert_eq!(status(&api, &path).await, "paused");
}

#[tokio::test(start_paused = true)]
async fn an_idle_sandbox_is_deleted_if_that_is_asked_for() {
    let api = Api::idle(WhenIdle::Delete).await;
    let path = create(&api, 10).await;
    sleep(12 * SECOND).await;
    assert_eq!(status(&api, &path).await, "stopped");
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
}
