//! What the audit log says of a request: the same for all dialects, made of its path and its answer.

use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::auth::Identified;
use crate::audit::{Entry, frameworks};

/// The largest answer that is looked into for the name of what was made, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;
/// What is taken from an answer that tells of a new thing.
const TOLD: [&str; 5] = ["name", "username", "role", "template", "sandbox_id"];
/// What is taken from one that tells of a new machine, as its `vm_config`.
const SHAPE: [&str; 2] = ["vcpus", "memory_mb"];

/// Who logged in or tried to, as an extension of the answer.
#[derive(Debug, Clone)]
pub struct LoggedIn {
    /// Id of the user, if there is one and the password was right.
    pub user_id: Option<String>,
    /// The name that was given.
    pub username: String,
}

/// What a request would do.
#[derive(Debug, Clone)]
pub struct Act {
    method: Method,
    path: String,
    action_type: String,
    resource_type: &'static str,
    resource_id: Option<String>,
}

impl Act {
    /// What this request would do; `None` if it only asks.
    pub fn of(request: &Request) -> Option<Self> {
        let method = request.method();
        let is_socket = request.headers().contains_key(header::UPGRADE);
        if matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) && !is_socket {
            return None;
        }
        let path = request.uri().path();
        let matched = request.extensions().get::<MatchedPath>();
        let matched = matched.map_or(path, MatchedPath::as_str);
        let (action_type, resource_type) = name(method, matched);
        Some(Self {
            method: method.clone(),
            resource_id: first_parameter(matched, path),
            path: matched.to_owned(),
            action_type,
            resource_type,
        })
    }

    /// Whether this answer to it is one that the caller can cause without end: no or bad credentials, and
    /// too many requests. Those at `auth` with 401 are failed logins, whose number is limited.
    pub fn is_knock(&self, status: StatusCode) -> bool {
        match status {
            StatusCode::TOO_MANY_REQUESTS => true,
            StatusCode::UNAUTHORIZED => self.resource_type != "user",
            _ => false,
        }
    }

    /// The record of it, and the answer, which may have been read for it.
    pub async fn record(self, who: &Identified, response: Response) -> (Entry, Response) {
        let status = response.status();
        let (told, response) = match status {
            StatusCode::CREATED | StatusCode::ACCEPTED => look_into(response).await,
            _ => (None, response),
        };
        let mut details = Map::new();
        details.insert("method".into(), self.method.as_str().into());
        details.insert("path".into(), self.path.into());
        details.insert("status".into(), status.as_u16().into());
        if let Some(key) = who.principal.as_ref().and_then(|by| by.key()) {
            details.insert("api_key".into(), key.as_str().into());
        }
        let mut resource_id = self.resource_id;
        if let Some(told) = &told {
            details.extend(fields(told, &TOLD));
            let shape: Map<_, _> = fields(told, &SHAPE).collect();
            if !shape.is_empty() {
                details.insert("vm_config".into(), shape.into());
            }
            let id = ["id", "user_id", "scan_id", "name"]
                .into_iter()
                .find_map(|field| told.get(field));
            if let (None, Some(Value::String(id))) = (&resource_id, id) {
                resource_id = Some(id.clone());
            }
        }
        let mut user_id = match &who.principal {
            Some(principal) => principal.to_string(),
            None => "anonymous".to_owned(),
        };
        if let Some(login) = response.extensions().get::<LoggedIn>() {
            details.insert("username".into(), login.username.clone().into());
            if let Some(id) = &login.user_id {
                user_id.clone_from(id);
                resource_id = Some(id.clone());
            }
        }
        let outcome = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS => {
                "denied"
            }
            status if status.is_client_error() || status.is_server_error() => "failure",
            _ => "success",
        };
        let frameworks = frameworks(&self.action_type, self.resource_type, outcome);
        let entry = Entry {
            time: Timestamp::now(),
            action_type: self.action_type,
            resource_type: self.resource_type.to_owned(),
            resource_id,
            user_id,
            source_ip: who.source.map(|address| address.to_string()),
            outcome: outcome.to_owned(),
            details: details.into(),
            frameworks: frameworks.iter().map(|name| (*name).to_owned()).collect(),
        };
        (entry, response)
    }
}

/// Those of these fields that say something.
fn fields(
    told: &Map<String, Value>,
    names: &'static [&str],
) -> impl Iterator<Item = (String, Value)> {
    let told = names.iter().filter_map(|name| told.get_key_value(*name));
    told.filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name.clone(), value.clone()))
}

/// What is done to what kind of thing, made of the path, so that no endpoint can be forgotten: the
/// kind of thing, and the words behind its name, or what the method means without such.
fn name(method: &Method, matched: &str) -> (String, &'static str) {
    let path = matched
        .strip_prefix("/api/v1/")
        .or(matched.strip_prefix("/v1/"));
    let mut segments = path
        .unwrap_or(matched)
        .split('/')
        .filter(|word| !word.is_empty());
    let resource_type = match segments.next() {
        Some("sandboxes" | "capsules" | "vms") => "vm",
        Some("snapshots") => "snapshot",
        Some("templates") => "template",
        Some("api-keys") => "api_key",
        Some("auth") => "user",
        Some("networks") => "network",
        Some("security") => "security",
        _ => "service",
    };
    let words: Vec<_> = segments
        .filter(|word| !word.starts_with('{'))
        .map(|word| word.replace('-', "_"))
        .collect();
    let verb = match *method {
        Method::DELETE => Some("delete"),
        Method::PUT | Method::PATCH => Some("update"),
        Method::POST if words.is_empty() => Some("create"),
        _ => None,
    };
    let words = words.iter().map(String::as_str).chain(verb);
    let words: Vec<_> = std::iter::once(resource_type).chain(words).collect();
    (words.join("_"), resource_type)
}

/// What stands in a path where its pattern has the first parameter.
fn first_parameter(matched: &str, path: &str) -> Option<String> {
    let mut pairs = matched.split('/').zip(path.split('/'));
    let (_, value) = pairs.find(|(pattern, _)| pattern.starts_with('{'))?;
    Some(value.chars().take(128).collect())
}

/// The fields of an answer that is a small JSON object, and the same answer.
async fn look_into(response: Response) -> (Option<Map<String, Value>>, Response) {
    if response
        .body()
        .size_hint()
        .exact()
        .is_none_or(|size| size > MAX_ANSWER)
    {
        return (None, response);
    }
    let (head, body) = response.into_parts();
    match body.collect().await {
        Ok(body) => {
            let body = body.to_bytes();
            let fields = serde_json::from_slice(&body).ok();
            (fields, Response::from_parts(head, Body::from(body)))
        }
        Err(error) => {
            let body = Body::from_stream(futures_util::stream::iter([Err::<Vec<u8>, _>(error)]));
            (None, Response::from_parts(head, body))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_named_after_paths() {
        for (method, path, action) in [
            (Method::POST, "/v1/sandboxes", "vm_create"),
            (Method::POST, "/api/v1/vms", "vm_create"),
            (Method::DELETE, "/v1/capsules/{id}", "vm_delete"),
            (Method::POST, "/v1/sandboxes/{id}/exec", "vm_exec"),
            (
                Method::GET,
                "/v1/sandboxes/{id}/exec/stream",
                "vm_exec_stream",
            ),
            (
                Method::POST,
                "/v1/sandboxes/{id}/files/write",
                "vm_files_write",
            ),
            (
                Method::PUT,
                "/v1/sandboxes/{id}/network/egress",
                "vm_network_egress_update",
            ),
            (Method::POST, "/v1/snapshots/{id}/fork", "snapshot_fork"),
            (Method::DELETE, "/v1/api-keys/{id}", "api_key_delete"),
            (Method::POST, "/api/v1/auth/login", "user_login"),
            (Method::POST, "/somewhere", "service_create"),
        ] {
            assert_eq!(name(&method, path).0, action);
        }
        let id = first_parameter("/v1/sandboxes/{id}/exec", "/v1/sandboxes/sb-1/exec");
        assert_eq!(id.as_deref(), Some("sb-1"));
        assert_eq!(first_parameter("/v1/sandboxes", "/v1/sandboxes"), None);
    }
}
