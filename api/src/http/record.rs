//! What the audit log says of a request: the same for all dialects, made of its path and its answer.

use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{Method, StatusCode, header};
use axum::response::Response;
use http_body_util::BodyExt;
use jiff::Timestamp;
use serde_json::{Map, Value};

use super::auth::Identified;
use crate::audit::{Entry, UNANSWERED, frameworks};

/// The largest answer that is looked into for the name of what was made, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;
/// The action, and the path, of a request at a path where nothing is served.
const NOT_SERVED: &str = "not_served";
/// What is taken from an answer that tells of a new thing.
const TOLD: [&str; 9] = [
    "name",
    "username",
    "role",
    "template",
    "sandbox_id",
    "host_address",
    "host_port",
    "guest_port",
    "protocol",
];
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

/// What a request would do, or asks for.
#[derive(Debug, Clone)]
pub struct Act {
    method: Method,
    path: String,
    action_type: String,
    resource_type: &'static str,
    resource_id: Option<String>,
    /// What stands in the path behind the name of the resource, by the names of its parameters.
    parameters: Vec<(String, String)>,
    changes: bool,
}

/// What becomes of an act in the audit log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// A record of its own.
    Own,
    /// One together with others: it was refused, which its caller can cause without end.
    Together,
    /// None: nothing was changed, and nobody refused.
    None,
}

impl Act {
    /// What this request would do.
    pub fn of(request: &Request) -> Self {
        let method = request.method();
        let path = request.uri().path();
        let matched = request.extensions().get::<MatchedPath>();
        let is_socket = request.headers().contains_key(header::UPGRADE);
        let only_asks =
            matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS) && !is_socket;
        match matched.map(MatchedPath::as_str) {
            Some(matched) => {
                let (action_type, resource_type) = name(method, matched, only_asks);
                let mut parameters = parameters(matched, path);
                Self {
                    method: method.clone(),
                    resource_id: parameters.next().map(|(_, value)| value),
                    parameters: parameters.collect(),
                    path: matched.to_owned(),
                    action_type,
                    resource_type,
                    changes: !only_asks,
                }
            }
            // Its path is whatever anybody cares to make up.
            None => Self {
                method: method.clone(),
                path: NOT_SERVED.to_owned(),
                action_type: NOT_SERVED.to_owned(),
                resource_type: "service",
                resource_id: None,
                parameters: Vec::new(),
                changes: false,
            },
        }
    }

    /// A request for a port of this sandbox by headers, whose path is that of a program in it.
    pub fn on_port(method: &Method, sandbox: &str) -> Self {
        Self {
            method: method.clone(),
            path: "x-sandbox-id, x-sandbox-port".to_owned(),
            action_type: "vm_ports".to_owned(),
            resource_type: "vm",
            resource_id: Some(shortened(sandbox)),
            parameters: Vec::new(),
            changes: false,
        }
    }

    /// Whether it may change something.
    pub fn changes(&self) -> bool {
        self.changes
    }

    /// Whether it is about who may come in, such as a login.
    pub fn is_of_accounts(&self) -> bool {
        self.changes && self.resource_type == "user"
    }

    /// What becomes of it with this answer. Failed logins each have a record, since their number is limited.
    pub fn record_for(&self, status: StatusCode) -> Record {
        match status {
            StatusCode::UNAUTHORIZED if self.is_of_accounts() => Record::Own,
            StatusCode::UNAUTHORIZED => Record::Together,
            StatusCode::TOO_MANY_REQUESTS if self.changes => Record::Together,
            StatusCode::FORBIDDEN if !self.changes => Record::Together,
            _ if self.changes => Record::Own,
            _ => Record::None,
        }
    }

    /// The record of it as long as it has no answer.
    pub fn begun(&self, who: &Identified) -> Entry {
        self.entry(who, UNANSWERED)
    }

    fn entry(&self, who: &Identified, outcome: &str) -> Entry {
        let mut details = Map::new();
        details.insert("method".into(), self.method.as_str().into());
        details.insert("path".into(), self.path.clone().into());
        for (name, value) in &self.parameters {
            details.insert(name.clone(), value.as_str().into());
        }
        if let Some(key) = who.principal.as_ref().and_then(|by| by.key()) {
            details.insert("api_key".into(), key.as_str().into());
        }
        let user_id = match &who.principal {
            Some(principal) => principal.to_string(),
            None => "anonymous".to_owned(),
        };
        let frameworks = frameworks(&self.action_type, self.resource_type, outcome);
        Entry {
            time: Timestamp::now(),
            action_type: self.action_type.clone(),
            resource_type: self.resource_type.to_owned(),
            resource_id: self.resource_id.clone(),
            user_id,
            source_ip: who.source.map(|address| address.to_string()),
            outcome: outcome.to_owned(),
            details: details.into(),
            frameworks: frameworks.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// The record of it, and the answer, which may have been read for it.
    pub async fn record(&self, who: &Identified, response: Response) -> (Entry, Response) {
        let status = response.status();
        let (told, response) = match status {
            StatusCode::CREATED | StatusCode::ACCEPTED => look_into(response).await,
            _ => (None, response),
        };
        let mut entry = self.entry(who, outcome(status));
        let mut details = Map::new();
        details.insert("status".into(), status.as_u16().into());
        if let Some(told) = &told {
            details.extend(fields(told, &TOLD));
            let shape: Map<_, _> = fields(told, &SHAPE).collect();
            if !shape.is_empty() {
                details.insert("vm_config".into(), shape.into());
            }
            let id = ["id", "user_id", "scan_id", "name"]
                .into_iter()
                .find_map(|field| told.get(field));
            if let (None, Some(Value::String(id))) = (&entry.resource_id, id) {
                entry.resource_id = Some(id.clone());
            }
        }
        if let Some(login) = response.extensions().get::<LoggedIn>() {
            details.insert("username".into(), login.username.clone().into());
            if let Some(id) = &login.user_id {
                entry.user_id.clone_from(id);
                entry.resource_id = Some(id.clone());
            }
        }
        if let Value::Object(all) = &mut entry.details {
            all.extend(details);
        }
        (entry, response)
    }
}

fn outcome(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS => {
            "denied"
        }
        status if status.is_client_error() || status.is_server_error() => "failure",
        _ => "success",
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
/// kind of thing, and the words behind its name, or what the method means without such; `read` at the end
/// of what only asks.
fn name(method: &Method, matched: &str, only_asks: bool) -> (String, &'static str) {
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
        _ if only_asks => Some("read"),
        Method::DELETE => Some("delete"),
        Method::PUT | Method::PATCH => Some("update"),
        Method::POST if words.is_empty() => Some("create"),
        _ => None,
    };
    let words = words.iter().map(String::as_str).chain(verb);
    let words: Vec<_> = std::iter::once(resource_type).chain(words).collect();
    (words.join("_"), resource_type)
}

/// What stands in a path where its pattern has parameters, by their names. What has a path of its own, as of
/// a program in a sandbox, is none.
fn parameters(matched: &str, path: &str) -> impl Iterator<Item = (String, String)> {
    let pairs = matched.split('/').zip(path.split('/'));
    pairs.filter_map(|(pattern, value)| {
        let name = pattern.strip_prefix('{')?.strip_suffix('}')?;
        (!name.starts_with('*')).then(|| (name.to_owned(), shortened(value)))
    })
}

fn shortened(name: &str) -> String {
    name.chars().take(128).collect()
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
        ] {
            assert_eq!(name(&method, path, false).0, action);
        }
        let (action, _) = name(&Method::GET, "/api/v1/security/audit-logs", true);
        assert_eq!(action, "security_audit_logs_read");
        for (matched, path, expected) in [
            (
                "/v1/sandboxes/{id}/exec",
                "/v1/sandboxes/sb-1/exec",
                "id=sb-1",
            ),
            ("/v1/sandboxes", "/v1/sandboxes", ""),
            (
                "/vms/{vm_name}/snapshots/{name}",
                "/vms/a/snapshots/b",
                "vm_name=a name=b",
            ),
            (
                "/ports/{id}/{port}/{*path}",
                "/ports/a/80/secret/x",
                "id=a port=80",
            ),
        ] {
            let found = parameters(matched, path).map(|(name, value)| format!("{name}={value}"));
            assert_eq!(found.collect::<Vec<_>>().join(" "), expected);
        }
    }
}
