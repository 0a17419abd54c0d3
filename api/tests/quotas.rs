//! What users have: their own things, their API keys, and quotas.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/operations.rs"]
mod operations;
mod support;

use api::domain::{Quota, Quotas, Status};
use api::http::Access;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use operations::{Things, body_for};
use proptest::prelude::*;
use serde_json::{Value, json};
use support::kept::is_tidy;
use support::{Api, FakeHost, Fault, PASSWORD, form, read_json};
use tower::ServiceExt;

async fn call(api: &Api, token: &str, method: &str, path: &str, body: &str) -> (StatusCode, Value) {
    api.call_as(method, path, body, &[("authorization", token)])
        .await
}

async fn create(api: &Api, token: &str) -> String {
    let (status, sandbox) = call(api, token, "POST", "/v1/sandboxes", "{}").await;
    assert_eq!(status, StatusCode::CREATED, "{sandbox}");
    sandbox["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn no_operation_lets_a_user_see_touch_or_infer_what_is_anothers() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let alice = api.user("alice", "user").await;
    let bob = api.user("bob", "user").await;
    let sandbox = create(&api, &alice).await;
    let body = json!({"sandbox_id": sandbox, "name": "mine"}).to_string();
    let (status, snapshot) = call(&api, &alice, "POST", "/v1/snapshots", &body).await;
    assert_eq!(status, StatusCode::CREATED, "{snapshot}");
    let body = json!({"name": "alices", "sandbox_id": sandbox}).to_string();
    let (status, template) = call(&api, &alice, "POST", "/v1/templates", &body).await;
    assert!(status.is_success(), "{template}");
    let (_, key) = call(&api, &alice, "POST", "/v1/api-keys", r#"{"name": "k"}"#).await;
    let body = json!({"scan_type": "configuration", "target": sandbox}).to_string();
    let (status, scan) = call(&api, &alice, "POST", "/api/v1/security/scan", &body).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{scan}");
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let hers = Things {
        sandbox,
        snapshot: text(&snapshot["id"]),
        template: "alices".into(),
        key: text(&key["id"]),
        scan: text(&scan["scan_id"]),
    };
    let nobodys = Things {
        sandbox: "sb-00000000".into(),
        snapshot: "sn-00000000".into(),
        template: "nobody".into(),
        key: "ak-00000000".into(),
        scan: "sc-00000000".into(),
    };
    let names = [
        &hers.sandbox,
        &hers.snapshot,
        &hers.template,
        &hers.key,
        &hers.scan,
    ];
    let before = call(&api, &alice, "GET", &hers.fill("/v1/sandboxes/{id}"), "").await;
    let document: Value = serde_json::from_str(&api::http::json().unwrap()).unwrap();
    let mut checked = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let method = method.to_uppercase();
            if !path.contains('{') {
                if method == "GET" {
                    let (_, answer) = call(&api, &bob, &method, path, "").await;
                    let answer = answer.to_string();
                    for name in names {
                        // The description of the API has examples of names only.
                        assert!(!answer.contains(name.as_str()), "{path} tells of {name}");
                    }
                }
                continue;
            }
            let ask = async |things: &Things| {
                let (mut path, body) = (things.fill(path), body_for(path));
                if path.ends_with("/download") && method == "GET" {
                    path.push_str("?path=/f");
                }
                let (status, answer) = if path.ends_with("/write") || path.ends_with("/upload") {
                    api.upload_as(&bob, &path).await
                } else {
                    call(&api, &bob, &method, &path, body).await
                };
                let mut text = answer.to_string();
                for (name, of) in [
                    (&things.sandbox, "SANDBOX"),
                    (&things.snapshot, "SNAPSHOT"),
                    (&things.template, "TEMPLATE"),
                    (&things.key, "KEY"),
                    (&things.scan, "SCAN"),
                ] {
                    text = text.replace(name.as_str(), of);
                }
                (status, text)
            };
            let (theirs, none) = (ask(&hers).await, ask(&nobodys).await);
            assert_eq!(theirs, none, "{method} {path} tells that it is there");
            // Without the headers of a WebSocket it is not looked up.
            let is_socket = theirs.0 == StatusCode::BAD_REQUEST && theirs.1.contains("WebSocket");
            assert!(
                theirs.0 == StatusCode::NOT_FOUND || is_socket,
                "{method} {path}: {theirs:?}; give it a body that makes sense"
            );
            checked += 1;
        }
    }
    assert!(checked > 40, "{checked}");
    for (path, body) in [
        (
            "/api/v1/security/scan",
            json!({"scan_type": "configuration", "target": hers.sandbox}),
        ),
        ("/v1/snapshots", json!({"sandbox_id": hers.sandbox})),
        (
            "/v1/templates",
            json!({"name": "x", "sandbox_id": hers.sandbox}),
        ),
    ] {
        let (status, answer) = call(&api, &bob, "POST", path, &body.to_string()).await;
        assert_eq!(status, StatusCode::NOT_FOUND, "{path} {answer}");
    }
    let of_hers = json!({"template": "alices"}).to_string();
    let of_none = json!({"template": "nobody"}).to_string();
    let (status, theirs) = call(&api, &bob, "POST", "/v1/sandboxes", &of_hers).await;
    let (_, none) = call(&api, &bob, "POST", "/v1/sandboxes", &of_none).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert_eq!(
        theirs.to_string().replace("alices", "nobody"),
        none.to_string()
    );
    let after = call(&api, &alice, "GET", &hers.fill("/v1/sandboxes/{id}"), "").await;
    assert_eq!(before, after, "nothing was touched");
}

#[tokio::test]
async fn names_are_each_users_own_and_an_administrator_sees_all() {
    let api = Api::new(1, 1).await;
    let root = api.user("root", "admin").await;
    let alice = api.user("alice", "user").await;
    let bob = api.user("bob", "user").await;
    for token in [&alice, &bob] {
        let sandbox = create(&api, token).await;
        let body = json!({"sandbox_id": sandbox, "name": "mine"}).to_string();
        let (status, answer) = call(&api, token, "POST", "/v1/snapshots", &body).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        let (_, found) = call(&api, token, "GET", "/v1/snapshots/mine", "").await;
        assert_eq!(found["id"], answer["id"]);
        let (status, _) = call(&api, token, "POST", "/v1/snapshots", &body).await;
        assert_eq!(status, StatusCode::CONFLICT);
    }
    for (token, sees) in [(&root, 2), (&alice, 1), (&bob, 1)] {
        let (_, list) = call(&api, token, "GET", "/v1/sandboxes", "").await;
        assert_eq!(list.as_array().unwrap().len(), sees);
    }
    let (_, local) = api.call("GET", "/v1/sandboxes", "").await;
    assert_eq!(local.as_array().unwrap().len(), 2);
    // Nobody can say which is meant.
    let (status, _) = call(&api, &root, "GET", "/v1/snapshots/mine", "").await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn keys_act_for_their_user_until_they_are_revoked() {
    let api = Api::open(Access::Credentials).await;
    let root = api.user("root", "admin").await;
    let alice = api.user("alice", "user").await;
    let make = async |token: &str, body: Value| {
        call(&api, token, "POST", "/v1/api-keys", &body.to_string()).await
    };
    let (status, made) = make(&root, json!({"name": "for alice", "user": "alice"})).await;
    assert_eq!(status, StatusCode::CREATED);
    let key = made["key"].as_str().unwrap();
    assert!(key.starts_with(made["prefix"].as_str().unwrap()));
    assert_eq!(key.len(), 47);
    assert_eq!(made["last_used_at"], Value::Null);
    let with_key = async |method: &str, path: &str| {
        api.call_as(method, path, "{}", &[("x-api-key", key)]).await
    };
    let (status, sandbox) = with_key("POST", "/v1/sandboxes").await;
    assert_eq!(status, StatusCode::CREATED);
    let (_, hers) = call(&api, &alice, "GET", "/v1/sandboxes", "").await;
    assert_eq!(hers[0]["id"], sandbox["id"]);
    let (_, list) = call(&api, &alice, "GET", "/v1/api-keys", "").await;
    assert_eq!(list[0]["id"], made["id"]);
    assert_eq!(list[0].get("key"), None, "it is told once");
    assert!(list[0]["last_used_at"].is_string());
    let (_, roots) = make(&root, json!({"name": "root's"})).await;
    assert_eq!(
        make(&alice, json!({"name": "x", "user": "root"})).await.0,
        403
    );
    assert_eq!(
        make(&root, json!({"name": "x", "user": "nobody"})).await.0,
        400
    );
    assert_eq!(make(&root, json!({"name": ""})).await.0, 400);
    let path = |made: &Value| format!("/v1/api-keys/{}", made["id"].as_str().unwrap());
    assert_eq!(call(&api, &alice, "DELETE", &path(&roots), "").await.0, 404);
    assert_eq!(call(&api, &alice, "DELETE", &path(&made), "").await.0, 204);
    assert_eq!(with_key("GET", "/v1/sandboxes").await.0, 401);
    let wrong = format!("{}x", &key[..46]);
    let answer = api
        .call_as("GET", "/v1/sandboxes", "", &[("x-api-key", &wrong)])
        .await;
    assert_eq!(answer.0, 401);
    let secret = roots["key"].as_str().unwrap().as_bytes();
    for file in std::fs::read_dir(api.dir.path()).unwrap() {
        let content = std::fs::read(file.unwrap().path()).unwrap();
        assert!(!content.windows(secret.len()).any(|window| window == secret));
    }
}

#[tokio::test]
async fn keys_are_made_listed_and_revoked_by_the_command_line() {
    let api = Api::open(Access::Credentials).await;
    api.user("root", "admin").await;
    let root = api.token("root", PASSWORD).await;
    let (_, first) = call(&api, &root, "POST", "/v1/api-keys", r#"{"name": "first"}"#).await;
    let first = first["key"].as_str().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap().to_string();
    let router = api.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let run = async |key: &str, arguments: &[&str]| {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_sandboxd"))
            .arg("apikey")
            .args(arguments)
            .env("MVS_HOST", &server)
            .env("MVS_API_KEY", key)
            .output()
            .await
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let limited = [
        "--json",
        "create",
        "limited",
        "--sandboxes",
        "2",
        "--disk-mb",
        "9",
    ];
    let (done, limited) = run(first, &limited).await;
    let limited: Value = serde_json::from_str(&limited).unwrap();
    let quota = json!({"sandboxes": 2, "vcpus": 0, "memory_mb": 0, "disk_mb": 9});
    assert!(done && limited["quota"] == quota, "{limited}");
    let (done, key) = run(first, &["create", "mine"]).await;
    assert!(done && key.starts_with("mvs_"), "{key}");
    let with_key = key.trim();
    let (done, list) = run(with_key, &["list"]).await;
    assert!(
        done && list.contains("mine") && list.contains("root"),
        "{list}"
    );
    assert!(!list.contains(key.trim()), "{list}");
    let line = list.lines().find(|line| line.contains("mine")).unwrap();
    let id = line.split_whitespace().next().unwrap();
    assert!(run(with_key, &["revoke", id]).await.0);
    let (done, refused) = run(with_key, &["list"]).await;
    assert!(!done && refused.contains("not good"), "{refused}");
}

fn of_user(user: Quota) -> Quotas {
    Quotas {
        user,
        local: Quota::default(),
    }
}

#[tokio::test]
async fn quotas_hold_for_create_fork_and_resume_of_each_user() {
    let quota = Quota {
        sandboxes: 2,
        ..Quota::default()
    };
    let api = Api::with_quotas(of_user(quota)).await;
    let alice = api.user("alice", "user").await;
    let bob = api.user("bob", "user").await;
    let first = create(&api, &alice).await;
    create(&api, &alice).await;
    let (status, refused) = call(&api, &alice, "POST", "/v1/sandboxes", "{}").await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(refused["error"]["code"], "quota_exceeded");
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("2 running sandboxes"), "{message}");
    let of_first = |what: &str| format!("/v1/sandboxes/{first}/{what}");
    assert_eq!(
        call(&api, &alice, "POST", &of_first("fork"), "{}").await.0,
        429
    );
    assert_eq!(
        call(&api, &alice, "POST", &of_first("pause"), "").await.0,
        200
    );
    let second = create(&api, &alice).await;
    assert_eq!(
        call(&api, &alice, "POST", &of_first("resume"), "").await.0,
        429
    );
    let (_, paused) = call(&api, &alice, "GET", &format!("/v1/sandboxes/{first}"), "").await;
    assert_eq!(paused["status"], "paused", "as before");
    call(
        &api,
        &alice,
        "DELETE",
        &format!("/v1/sandboxes/{second}"),
        "",
    )
    .await;
    assert_eq!(
        call(&api, &alice, "POST", &of_first("resume"), "").await.0,
        200
    );
    create(&api, &bob).await;
    for _ in 0..3 {
        api.create().await;
    }
}

#[tokio::test]
async fn what_waits_to_be_read_or_passed_on_takes_a_bounded_part_of_the_disk_for_each_user() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let alice = api.user("alice", "user").await;
    let bob = api.user("bob", "user").await;
    let ask = async |token: &str, path: String, kind: &str, body: Vec<u8>| {
        let request = Request::builder()
            .method("POST")
            .uri(path)
            .header("host", "localhost:8000")
            .header("content-type", kind)
            .header("authorization", token)
            .body(Body::from(body))
            .unwrap();
        api.router.clone().oneshot(request).await.unwrap()
    };
    let (hers, his) = (create(&api, &alice).await, create(&api, &bob).await);
    let flood = async |token: &str, sandbox: &str| {
        let body = br#"{"cmd": "flood", "args": ["1048576"]}"#.to_vec();
        let path = format!("/v1/sandboxes/{sandbox}/exec");
        ask(token, path, "application/json", body).await
    };
    // There is room for four, of which nobody reads any.
    let mut unread = Vec::new();
    for _ in 0..4 {
        let answer = flood(&alice, &hers).await;
        assert_eq!(answer.status(), StatusCode::OK);
        unread.push(answer);
    }
    let (status, killed) = read_json(flood(&alice, &hers).await).await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    let message = killed["error"]["message"].as_str().unwrap();
    assert!(message.contains("have not been read yet"), "{message}");
    // Nor for a file that waits for where it is to go.
    let large = vec![b'x'; 1 << 20];
    let upload = async || {
        let form = form(&[("file", &large), ("path", b"/f")]);
        let path = format!("/api/v1/vms/{hers}/files/upload");
        let kind = "multipart/form-data; boundary=X";
        read_json(ask(&alice, path, kind, form).await).await
    };
    let (status, refused) = upload().await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{refused}");
    assert_eq!(flood(&bob, &his).await.status(), StatusCode::OK);
    // Whoever goes away leaves the room to others.
    unread.pop();
    let (status, uploaded) = upload().await;
    assert!(status.is_success(), "{uploaded}");
    assert_eq!(flood(&alice, &hers).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_machine_that_is_stopping_counts_until_it_is_off() {
    let quota = Quota {
        sandboxes: 1,
        ..Quota::default()
    };
    let api = Api::with_quotas(of_user(quota)).await;
    let alice = api.user("alice", "user").await;
    let act = async |path: &str, body: &str| {
        let path = format!("/api/v1/vms{path}");
        call(&api, &alice, "POST", &path, body).await.0
    };
    for name in ["a", "b"] {
        let made = act("", &json!({"name": name}).to_string()).await;
        assert_eq!(made, StatusCode::CREATED);
    }
    assert_eq!(act("/a/start", "").await, StatusCode::OK);
    *api.host.fault.lock().unwrap() = Some(Fault::NotShutDown);
    let patient = async {
        let stopped = act("/a/stop", r#"{"timeout_seconds": 3600}"#).await;
        assert_eq!(stopped, StatusCode::OK);
    };
    let others = async {
        while api.host.fault.lock().unwrap().is_some() {
            tokio::task::yield_now().await;
        }
        let refused = act("/b/start", "").await;
        assert_eq!(refused, StatusCode::TOO_MANY_REQUESTS);
        let (_, stats) = call(&api, &alice, "GET", "/v1/sandboxes/stats", "").await;
        assert_eq!(stats["current"]["running_count"], 1, "{stats}");
        assert_eq!(act("/a/stop", r#"{"force": true}"#).await, StatusCode::OK);
    };
    tokio::join!(patient, others);
    assert_eq!(act("/b/start", "").await, StatusCode::OK);
}

#[tokio::test]
async fn a_restore_or_restart_beyond_the_quota_changes_nothing() {
    let quota = Quota {
        vcpus: 2,
        ..Quota::default()
    };
    let api = Api::with_quotas(of_user(quota)).await;
    let alice = api.user("alice", "user").await;
    let act = async |method: &str, path: &str, body: Value| {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let path = format!("/api/v1/vms{path}");
        call(&api, &alice, method, &path, &body).await
    };
    let must = async |method: &str, path: &str, body: Value| {
        let (status, answer) = act(method, path, body).await;
        assert!(status.is_success(), "{path}: {status} {answer}");
    };
    for (name, vcpus) in [("a", 2), ("b", 1)] {
        must("POST", "", json!({"name": name, "vcpus": vcpus})).await;
    }
    must("POST", "/a/start", Value::Null).await;
    must(
        "POST",
        "/a/snapshots",
        json!({"name": "s", "include_memory": true}),
    )
    .await;
    must("POST", "/a/stop", Value::Null).await;
    must("PUT", "/a/resources", json!({"vcpus": 1})).await;
    must("POST", "/a/start", Value::Null).await;
    must("POST", "/b/start", Value::Null).await;
    let before = api.manager.get("a").await.unwrap();
    let (status, refused) = act("POST", "/a/snapshots/s/restore", Value::Null).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{refused}");
    let after = api.manager.get("a").await.unwrap();
    assert_eq!(
        (after.status, &after.layers),
        (Status::Running, &before.layers)
    );
    assert_eq!((&after.kept, &after.spec), (&before.kept, &before.spec));
    // What it has counts once, so that what it takes now it can have again.
    must("POST", "/a/restart", Value::Null).await;
    must("POST", "/b/stop", Value::Null).await;
    must("POST", "/a/snapshots/s/restore", Value::Null).await;
    assert_eq!(api.manager.get("a").await.unwrap().spec.vcpus, 2);
    is_tidy(&api).await;
}

/// What sandboxes that run have together, by the host's word.
#[tokio::test]
async fn quotas_of_a_key_hold_for_what_is_made_with_it() {
    let quota = Quota {
        sandboxes: 3,
        ..Quota::default()
    };
    let api = Api::with_quotas(of_user(quota)).await;
    let alice = api.user("alice", "user").await;
    let new_key = json!({"name": "ci", "quota": {"sandboxes": 1, "memory_mb": 1024}}).to_string();
    let (status, made) = call(&api, &alice, "POST", "/v1/api-keys", &new_key).await;
    assert_eq!(status, StatusCode::CREATED);
    let whole = json!({"sandboxes": 1, "vcpus": 0, "memory_mb": 1024, "disk_mb": 0});
    assert_eq!(made["quota"], whole);
    let key = made["key"].as_str().unwrap();
    let with_key = async |method: &str, path: &str, body: &str| {
        api.call_as(method, path, body, &[("x-api-key", key)]).await
    };
    let of = |sandbox: &str, what: &str| format!("/v1/sandboxes/{sandbox}/{what}");

    // More memory than it allows, though the user has no such quota.
    let large = r#"{"memory_mb": 2048}"#;
    let (status, refused) = with_key("POST", "/v1/sandboxes", large).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("the quota of the API key allows 1024 MiB of memory"),
        "{message}"
    );
    let (status, first) = with_key("POST", "/v1/sandboxes", "{}").await;
    assert_eq!(status, StatusCode::CREATED);
    let first = first["id"].as_str().unwrap();
    assert_eq!(with_key("POST", "/v1/sandboxes", "{}").await.0, 429);
    assert_eq!(with_key("POST", &of(first, "fork"), "{}").await.0, 429);

    // What was made without it does not count, and its own do, whoever resumes them.
    let hers = create(&api, &alice).await;
    assert_eq!(with_key("POST", &of(first, "pause"), "").await.0, 200);
    let (status, second) = with_key("POST", "/v1/sandboxes", "{}").await;
    assert_eq!(status, StatusCode::CREATED);
    let resumed = call(&api, &alice, "POST", &of(first, "resume"), "").await;
    assert_eq!(resumed.0, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(with_key("POST", &of(&hers, "fork"), "{}").await.0, 429);
    let second = second["id"].as_str().unwrap();
    let path = format!("/v1/sandboxes/{second}");
    assert_eq!(with_key("DELETE", &path, "").await.0, 204);
    assert_eq!(with_key("POST", &of(first, "resume"), "").await.0, 200);

    // That of the user holds for it as well, and no other key is a way around it.
    create(&api, &alice).await;
    assert_eq!(with_key("POST", &of(first, "pause"), "").await.0, 200);
    create(&api, &alice).await;
    let (_, refused) = with_key("POST", "/v1/sandboxes", "{}").await;
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.starts_with("the quota allows 3"), "{message}");
    let (status, refused) = with_key("POST", "/v1/api-keys", r#"{"name": "x"}"#).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.contains("has a quota"), "{message}");
    for body in [
        r#"{"name": "x", "quota": {"sandboxes": -1}}"#,
        r#"{"name": "x", "quota": {"cpus": 1}}"#,
        r#"{"name": "x", "quota": null}"#,
    ] {
        assert_eq!(
            call(&api, &alice, "POST", "/v1/api-keys", body).await.0,
            400
        );
    }
}

fn running(host: &FakeHost) -> usize {
    host.sandboxes.lock().unwrap().len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn however_many_ask_at_once_the_quota_is_not_exceeded(
        most in 1_u32..5,
        creates in 1_usize..8,
        fork in 1_u8..4,
    ) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let quota = Quota { sandboxes: most, ..Quota::default() };
            let quotas = Quotas { user: Quota::default(), local: quota };
            let api = Api::with_quotas(quotas).await;
            let first = api.create().await;
            let forks = format!("/v1/sandboxes/{first}/fork");
            let count = json!({"count": fork}).to_string();
            let all = (0..creates).map(|_| api.call("POST", "/v1/sandboxes", "{}"));
            let (made, forked) = tokio::join!(
                futures_util::future::join_all(all),
                api.call("POST", &forks, &count)
            );
            let made = made.iter().filter(|(status, _)| *status == 201).count();
            let forked = match forked.0.as_u16() {
                201 => usize::from(fork),
                _ => 0,
            };
            assert_eq!(running(&api.host), 1 + made + forked);
            assert!(running(&api.host) <= most as usize);
            let wanted = 1 + creates + usize::from(fork);
            assert!(wanted > most as usize || running(&api.host) == wanted);
        });
    }
}
