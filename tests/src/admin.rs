//! `/api/v1` of `sandboxd`, as an admin.

use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::http::Request;

/// An admin.
pub struct Admin {
    /// `Authorization` of its requests.
    pub bearer: String,
}

impl Admin {
    /// The first user of a daemon, who logs in.
    ///
    /// # Panics
    /// There is one already.
    pub fn register(daemon: &Daemon) -> Self {
        let user = json!({"username": "root", "password": "Correct-horse-7", "role": "admin"});
        let (status, body) = daemon.call("POST", "/api/v1/auth/register", &user.to_string());
        assert_eq!(status, 201, "{body}");
        let (status, body) = daemon.call("POST", "/api/v1/auth/login", &user.to_string());
        assert_eq!(status, 200, "{body}");
        Self {
            bearer: format!("Bearer {}", body["access_token"].as_str().unwrap()),
        }
    }

    /// A request below `/api/v1`, and what comes of it; `null` is no body.
    pub fn call(&self, daemon: &Daemon, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let request = Request::new(method, &format!("/api/v1{path}"))
            .header("Content-Type", "application/json")
            .header("Authorization", &self.bearer);
        let response = daemon.send(request, body.as_bytes(), body.len() as u64);
        (response.status, response.json())
    }

    /// What comes of a request that must succeed.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn must(&self, daemon: &Daemon, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.call(daemon, method, path, body);
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {answer}"
        );
        answer
    }
}
