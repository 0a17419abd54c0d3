//! Who may call, at the level of HTTP.

mod support;

use std::sync::Arc;

use api::domain::Role;
use api::http::{Access, OPEN};
use api::identity::{Identity, NewUser, RegisterError, Registration, Tokens};
use api::store::SqliteStore;
use axum::http::StatusCode;
use serde_json::{Value, json};
use support::{Api, PASSWORD};

async fn register(api: &Api, name: &str, role: &str, headers: &[(&str, &str)]) -> StatusCode {
    let body = json!({"username": name, "password": PASSWORD, "role": role}).to_string();
    api.call_as("POST", "/api/v1/auth/register", &body, headers)
        .await
        .0
}

async fn login(api: &Api, name: &str, password: &str) -> (StatusCode, Value) {
    let body = json!({"username": name, "password": password}).to_string();
    api.call("POST", "/api/v1/auth/login", &body).await
}

#[tokio::test]
async fn a_user_registers_and_logs_in() {
    let api = Api::new(1, 1).await;
    let body = json!({"username": "alice", "password": PASSWORD, "role": "admin"}).to_string();
    let (status, user) = api.call("POST", "/api/v1/auth/register", &body).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(user["username"], "alice");
    assert_eq!(user["role"], "admin");
    assert!(user["user_id"].as_str().unwrap().starts_with("us-"));
    let created_at = user["created_at"].as_str().unwrap();
    created_at.parse::<jiff::Timestamp>().unwrap();
    assert_eq!(user.as_object().unwrap().len(), 4, "{user}");
    let (status, token) = login(&api, "alice", PASSWORD).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(token["token_type"], "bearer");
    assert_eq!(token["expires_in"], 3600);
    let token = token["access_token"].as_str().unwrap();
    let bearer = format!("Bearer {token}");
    let send = |value: String| {
        let api = &api;
        async move {
            let headers = [("authorization", value.as_str())];
            api.call_as("GET", "/v1/sandboxes", "", &headers).await.0
        }
    };
    assert_eq!(send(bearer.clone()).await, StatusCode::OK);
    assert_eq!(send(format!("bearer  {token}")).await, StatusCode::OK);
    for bad in [
        format!("{bearer}x"),
        format!("Basic {token}"),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        token.to_owned(),
    ] {
        assert_eq!(send(bad.clone()).await, StatusCode::UNAUTHORIZED, "{bad}");
    }
    let files = std::fs::read_dir(api.dir.path()).unwrap();
    for file in files.map(|file| file.unwrap().path()) {
        let content = std::fs::read(&file).unwrap();
        let found = content
            .windows(PASSWORD.len())
            .any(|window| window == PASSWORD.as_bytes());
        assert!(!found, "the password is in {}", file.display());
    }
}

#[tokio::test]
async fn roles_do_not_escalate() {
    let api = Api::new(1, 1).await;
    assert_eq!(register(&api, "root", "admin", &[]).await, 201);
    assert_eq!(register(&api, "mallory", "admin", &[]).await, 403);
    assert_eq!(register(&api, "bob", "user", &[]).await, 201);
    let bob = api.token("bob", PASSWORD).await;
    let root = api.token("root", PASSWORD).await;
    let as_bob = [("authorization", bob.as_str())];
    let as_root = [("authorization", root.as_str())];
    assert_eq!(register(&api, "mallory", "admin", &as_bob).await, 403);
    assert_eq!(register(&api, "second", "admin", &as_root).await, 201);
    assert_eq!(register(&api, "BOB", "user", &[]).await, 409, "taken");
    let forged = [("authorization", "Bearer x.y.z")];
    assert_eq!(register(&api, "carol", "user", &forged).await, 401);
}

#[tokio::test]
async fn of_many_that_want_to_be_the_first_administrator_one_is() {
    let api = Api::new(1, 1).await;
    let names: Vec<_> = (0..6).map(|number| format!("u{number}")).collect();
    let all = names.iter().map(|name| register(&api, name, "admin", &[]));
    let mut statuses = futures_util::future::join_all(all).await;
    statuses.sort();
    assert_eq!(
        statuses,
        [201, 403, 403, 403, 403, 403].map(|n| StatusCode::from_u16(n).unwrap())
    );
}

#[tokio::test]
async fn weak_passwords_and_bad_names_are_told_at_once() {
    let api = Api::new(1, 1).await;
    let body = json!({"username": "a b", "password": "short", "role": "root"}).to_string();
    let (status, error) = api.call("POST", "/api/v1/auth/register", &body).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(error["error"], "validation_error");
    assert_eq!(error["message"], "Request validation failed");
    let details = error["details"].as_array().unwrap();
    let fields: Vec<_> = details
        .iter()
        .map(|detail| detail["field"].as_str().unwrap())
        .collect();
    assert_eq!(
        fields,
        [
            "username", "password", "password", "password", "password", "role"
        ]
    );
    for body in ["", "[]", "{", "null"] {
        let (status, error) = api.call("POST", "/api/v1/auth/register", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(error["error"], "bad_request");
    }
    for name in [
        "",
        "'; DROP TABLE users",
        "../../etc/passwd",
        "a\r\nb",
        &"x".repeat(65),
    ] {
        assert_eq!(register(&api, name, "user", &[]).await, 422, "{name:?}");
    }
}

#[tokio::test]
async fn nobody_learns_who_there_is_from_a_login_that_fails() {
    let api = Api::new(1, 1).await;
    register(&api, "alice", "user", &[]).await;
    let mut answers = Vec::new();
    let began = std::time::Instant::now();
    for name in ["alice", "nobody"] {
        let mut told = Vec::new();
        for _ in 0..7 {
            let (status, mut error) = login(&api, name, "Wrong-horse-7").await;
            error["retry_after_seconds"].take();
            told.push((status, error));
        }
        answers.push(told);
    }
    assert_eq!(answers[0], answers[1]);
    assert_eq!(answers[0][4].0, StatusCode::UNAUTHORIZED);
    assert_eq!(answers[0][5].0, StatusCode::TOO_MANY_REQUESTS);
    let (status, error) = login(&api, "Alice", PASSWORD).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "locked, even so");
    assert_eq!(error["error"], "rate_limit_exceeded");
    let seconds = error["retry_after_seconds"].as_u64().unwrap();
    let least = 1800 - began.elapsed().as_secs() - 1;
    assert!((least..=1800).contains(&seconds), "{seconds}");
}

#[tokio::test]
async fn the_seed_dialect_needs_credentials_everywhere_else() {
    let api = Api::new(1, 1).await;
    let (status, error) = api.call("GET", "/api/v1/vms-of-nobody", "").await;
    assert_eq!(status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        error,
        json!({"error": "unauthorized", "message": "Authentication required"})
    );
    register(&api, "alice", "user", &[]).await;
    let token = api.token("alice", PASSWORD).await;
    let headers = [("authorization", token.as_str())];
    let missing = api
        .call_as("GET", "/api/v1/nothing-here", "", &headers)
        .await;
    assert_eq!(missing.0, StatusCode::NOT_FOUND);
    assert_eq!(missing.1["error"], "not_found");
    let wrong = api.call_as("DELETE", "/api/v1/health", "", &headers).await;
    assert_eq!(wrong.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(wrong.1["error"], "method_not_allowed");
    let (status, health) = api.call("GET", "/api/v1/health", "").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(health["components"]["database"], "healthy");
    let key = [("x-api-key", "nonsense")];
    for path in OPEN.into_iter().chain(["/v1/sandboxes", "/api/v1/vms"]) {
        let answer = api.call_as("GET", path, "", &key).await;
        assert_eq!(answer.0, StatusCode::UNAUTHORIZED, "{path}");
    }
    let both = [("x-api-key", "nonsense"), headers[0]];
    assert_eq!(api.call_as("GET", "/health", "", &both).await.0, 401);
}

#[tokio::test]
async fn with_a_listener_that_others_reach_everybody_needs_credentials() {
    let api = Api::open(Access::Credentials).await;
    for path in ["/v1/sandboxes", "/v1/templates", "/v1/no-such", "/metrics"] {
        assert_eq!(api.call("GET", path, "").await.0, 401, "{path}");
    }
    for path in ["/health", "/openapi.json", "/api/v1/health"] {
        assert_eq!(api.call("GET", path, "").await.0, 200, "{path}");
    }
    // The page that shows the description, so that a browser can load it.
    for (path, status) in [
        ("/docs/", 200),
        ("/docs/swagger-ui.css", 200),
        ("/docsx", 401),
    ] {
        assert_eq!(api.send("GET", path, "").await.status(), status, "{path}");
    }
    register(&api, "alice", "user", &[]).await;
    let token = api.token("alice", PASSWORD).await;
    let headers = [
        ("authorization", token.as_str()),
        ("host", "sandbox.example:8000"),
    ];
    assert_eq!(
        api.call_as("GET", "/v1/sandboxes", "", &headers).await.0,
        200
    );
    // The account outlives the daemon, and so does the token.
    let api = api.restart().await;
    assert_eq!(
        api.call_as("GET", "/v1/sandboxes", "", &headers[..1])
            .await
            .0,
        200
    );
}

#[tokio::test]
async fn an_api_key_is_a_bearer_token_too() {
    let api = Api::new(1, 1).await;
    let alice = api.user("alice", "admin").await;
    let headers = [("authorization", alice.as_str())];
    let name = r#"{"name": "k"}"#;
    let (_, key) = api.call_as("POST", "/v1/api-keys", name, &headers).await;
    let bearer = format!("Bearer {}", key["key"].as_str().unwrap());
    let list = async |bearer: &str| {
        let headers = [("authorization", bearer)];
        api.call_as("GET", "/api/v1/vms", "", &headers).await.0
    };
    assert_eq!(list(&bearer).await, StatusCode::OK);
    assert_eq!(list(&format!("{bearer}x")).await, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn who_may_not_register_does_not_hear_who_is_registered() {
    let dir = tempfile::tempdir().unwrap();
    let store = Arc::new(SqliteStore::open(&dir.path().join("db")).unwrap());
    let tokens = Tokens::open(&dir.path().join("token.key")).unwrap();
    let identity = Identity::new(store, tokens, Registration::Admin).unwrap();
    let register = async |name: &str, role: Role| {
        let new = NewUser {
            name: name.to_owned(),
            password: PASSWORD.to_owned(),
            role,
        };
        identity.register(new, None).await
    };
    assert!(register("alice", Role::Admin).await.is_ok());
    for role in [Role::User, Role::Admin] {
        for name in ["alice", "bob"] {
            let refused = register(name, role).await;
            assert!(
                matches!(refused, Err(RegisterError::Forbidden(_))),
                "{name}: {refused:?}"
            );
        }
    }
}
