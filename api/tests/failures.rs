//! What answers have that tell of a failure, besides their body.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use api::audit;
use api::http::Rates;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode};
use http_body_util::BodyExt;
use rusqlite::Connection;
use serde_json::Value;
use support::Api;
use tower::ServiceExt;

const LIMITS: [&str; 3] = [
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
];

async fn limited() -> Api {
    Api::with_rates(Rates {
        per_minute: 50,
        per_hour: 100,
    })
    .await
}

/// Status, headers and body of the list of machines, for who shows this.
async fn list(api: &Api, host: &str, token: &str) -> (StatusCode, HeaderMap, Vec<u8>) {
    let request = Request::get("/api/v1/vms")
        .header("host", host)
        .header("authorization", token)
        .body(Body::empty())
        .unwrap();
    let (parts, body) = api
        .router
        .clone()
        .oneshot(request)
        .await
        .unwrap()
        .into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    (parts.status, parts.headers, body.to_vec())
}

fn how_many_limits(headers: &HeaderMap) -> usize {
    LIMITS
        .iter()
        .filter(|name| headers.contains_key(**name))
        .count()
}

#[tokio::test]
async fn an_answer_that_tells_of_a_failure_also_tells_what_is_left() {
    let api = limited().await;
    let token = api.user("alice", "admin").await;
    let records = Connection::open(api.dir.path().join("db")).unwrap();
    // A failure of what was asked for, and one of the check of who asks.
    for table in ["sandboxes", "users"] {
        let statement = format!("ALTER TABLE {table} RENAME TO {table}_away");
        records.execute_batch(&statement).unwrap();
        let (status, headers, body) = list(&api, "localhost", &token).await;
        assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(how_many_limits(&headers), 3, "{table}: {headers:?}");
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers.get_all("content-type").iter().count(), 1);
        if let Some(length) = headers.get("content-length") {
            assert_eq!(length.to_str().unwrap(), body.len().to_string());
        }
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            body["request_id"].as_str(),
            headers["x-request-id"].to_str().ok()
        );
    }
}

#[tokio::test]
async fn an_answer_that_is_not_on_record_tells_what_is_left() {
    let api = limited().await;
    let token = api.user("alice", "admin").await;
    let audit = Connection::open(api.dir.path().join(audit::FILE)).unwrap();
    audit
        .execute_batch("ALTER TABLE records RENAME TO away")
        .unwrap();
    let request = Request::delete("/api/v1/vms/none")
        .header("host", "localhost")
        .header("authorization", token)
        .body(Body::empty())
        .unwrap();
    let answer = api.router.clone().oneshot(request).await.unwrap();
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(how_many_limits(answer.headers()), 3);
    let (_, body) = support::read_json(answer).await;
    let message = body["message"].as_str().unwrap();
    assert!(message.contains("the audit log"), "{message}");
}

#[tokio::test]
async fn who_is_refused_before_anybody_asks_who_it_is_is_not_counted() {
    let api = limited().await;
    let token = api.user("alice", "admin").await;
    let (status, headers, _) = list(&api, "evil.example", &token).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    assert_eq!(how_many_limits(&headers), 0, "{headers:?}");
    let (status, headers, _) = list(&api, "localhost", "Bearer none").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(how_many_limits(&headers), 3, "{headers:?}");
}
