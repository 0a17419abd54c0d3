//! What happens to virtual machines, over WebSockets.
//!
//! ```text
//! client ← {"event_type":"status_change","vm_name":"n","timestamp":"…","data":{…}}     of one machine
//! client ← {"event_type":"status_change","timestamp":"…","data":{"vm_name":"n","user_id":"…",…}}  of all
//! client ← {"event_type":"events_lost","timestamp":"…","data":{"count":12}}
//! ```
//!
//! What a client sends is read and does not matter. It is pinged; one that has not been heard of for
//! two pings, or that does not take a message for as long, is gone. Its credentials are looked at again
//! as often.
//!
//! | close code | why |
//! |---|---|
//! | 1000 | the machine is deleted |
//! | 1001 | the daemon ends |
//! | 1008 | the token has run out, or was revoked |

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{OriginalUri, State};
use axum::http::HeaderMap;
use axum::response::Response;
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::at_vm::AtVm;
use super::error::{ApiError, ErrorBody};
use super::extract::Path;
use super::rfc3339;
use super::vms::word_at;
use crate::domain::{
    Change, Event, Forward, MacAddress, Named, News, Over, Principal, SnapshotId, Subscription,
};
use crate::http::{AppState, BEARER, Caller, SocketPermit, identify};

/// How often a client is pinged.
const PING_INTERVAL: Duration = Duration::from_secs(30);
/// How long a client may be silent, or not take a message.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a client may take to close its side in the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest message of a client, in bytes.
const MAX_MESSAGE: usize = 4096;
/// What is read of a client at once, in bytes. Each has it, idle or not.
const READ_BUFFER: usize = 1024;

/// Follow the events of a virtual machine
///
/// A WebSocket. Each message has `event_type`, `vm_name`, `timestamp` and `data`. It ends with the
/// machine.
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}/events", operation_id = "vmEvents", tag = "events",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 101, description = "The WebSocket is open"),
        (status = 400, description = "Not a WebSocket's handshake", body = ErrorBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 429, description = "Too many WebSockets", body = ErrorBody),
    ),
)]
pub async fn of_vm(
    State(state): State<AppState>,
    caller: Caller,
    permit: SocketPermit,
    Path(name): Path<String>,
    uri: OriginalUri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let subscribed = caller.manager.subscribe_to(&name).await;
    let (vm, subscription) = subscribed.map_err(|error| error.at_vm(&name))?;
    let client = Client {
        state,
        principal: caller.principal,
        headers,
        path: uri.path().to_owned(),
        of: Some(super::vms::name_of(&vm)),
    };
    serve(client, subscription, permit, upgrade)
}

/// Follow the events of all virtual machines
///
/// A WebSocket. Each message has `event_type`, `timestamp` and `data`, and that has `vm_name`, unless it is
/// of all of them, and `user_id`. A user is told of their own machines, an administrator of all.
#[utoipa::path(
    get, path = "/api/v1/system/events", operation_id = "systemEvents", tag = "events",
    responses(
        (status = 101, description = "The WebSocket is open"),
        (status = 400, description = "Not a WebSocket's handshake", body = ErrorBody),
        (status = 429, description = "Too many WebSockets", body = ErrorBody),
    ),
)]
pub async fn of_system(
    State(state): State<AppState>,
    caller: Caller,
    permit: SocketPermit,
    uri: OriginalUri,
    headers: HeaderMap,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let subscription = caller.manager.subscribe();
    let client = Client {
        state,
        principal: caller.principal,
        headers,
        path: uri.path().to_owned(),
        of: None,
    };
    serve(client, subscription, permit, upgrade)
}

/// Who follows, and what.
struct Client {
    state: AppState,
    principal: Principal,
    headers: HeaderMap,
    path: String,
    /// Name of the machine, if it is one.
    of: Option<String>,
}

fn serve(
    client: Client,
    subscription: Subscription,
    permit: SocketPermit,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    let upgrade = upgrade
        .map_err(|rejection| ApiError::bad_request(format!("expected a WebSocket: {rejection}")))?;
    Ok(upgrade
        .protocols([BEARER])
        .read_buffer_size(READ_BUFFER)
        .max_message_size(MAX_MESSAGE)
        .on_upgrade(async move |mut socket| {
            if let Some(close) = client.follow(&mut socket, subscription).await {
                let _ = timeout(CLOSE_TIMEOUT, say_goodbye(&mut socket, close)).await;
            }
            drop(permit);
        }))
}

/// What the client still sends is read: a connection that is closed on it is reset, and what the
/// client has been told would be lost on the way.
async fn say_goodbye(socket: &mut WebSocket, close: CloseFrame) {
    let _ = socket.send(Message::Close(Some(close))).await;
    while let Some(Ok(_)) = socket.recv().await {}
}

impl Client {
    /// Tells the client what happens. Why that ends; `None` if the client is gone.
    async fn follow(
        &self,
        socket: &mut WebSocket,
        mut subscription: Subscription,
    ) -> Option<CloseFrame> {
        let mut pings = interval_at(Instant::now() + PING_INTERVAL, PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            let message = tokio::select! {
                news = subscription.next() => match news {
                    Ok(News::Event(event)) if is_silent(&event.change) => continue,
                    Ok(News::Event(event)) => Message::Text(self.message(&event).to_string().into()),
                    Ok(News::Lost(count)) => Message::Text(self.lost(count).to_string().into()),
                    Err(Over::Deleted) => return Some(close(close_code::NORMAL, "VM deleted")),
                    Err(Over::Closing) => {
                        return Some(close(close_code::AWAY, "the daemon shuts down"));
                    }
                },
                said = socket.recv() => match said? {
                    Ok(Message::Close(_)) | Err(_) => return None,
                    Ok(_) => {
                        heard = Instant::now();
                        continue;
                    }
                },
                _ = pings.tick() => {
                    if heard.elapsed() > PATIENCE {
                        return None;
                    }
                    if !self.may_still().await {
                        let why = "the token or API key is not good any more";
                        return Some(close(close_code::POLICY, why));
                    }
                    Message::Ping(Bytes::new())
                }
            };
            timeout(PATIENCE, socket.send(message)).await.ok()?.ok()?;
        }
    }

    /// Whether the client's credentials are those of the same principal as before.
    async fn may_still(&self) -> bool {
        match identify(&self.state, &self.headers, &self.path).await {
            Ok(Some(principal)) => principal == self.principal,
            Ok(None) => false,
            // That they cannot be looked up now says nothing of them.
            Err(refusal) => refusal.status().is_server_error(),
        }
    }

    fn message(&self, event: &Event) -> Value {
        let (event_type, mut data) = told(&event.change);
        let name = event.subject.sandbox.as_ref().map(name_of);
        let timestamp = rfc3339(event.at);
        if self.of.is_some() {
            return json!({
                "event_type": event_type, "vm_name": name, "timestamp": timestamp, "data": data,
            });
        }
        let owner = event.subject.owner.as_ref();
        if let Some(name) = name {
            data.insert("vm_name".into(), name.into());
        }
        let owner = owner.map_or("local", |owner| owner.as_str());
        data.insert("user_id".into(), owner.into());
        json!({"event_type": event_type, "timestamp": timestamp, "data": data})
    }

    fn lost(&self, count: u64) -> Value {
        let mut message = json!({
            "event_type": "events_lost",
            "timestamp": rfc3339(Timestamp::now()),
            "data": {"count": count},
        });
        if let Some(name) = &self.of {
            message["vm_name"] = name.as_str().into();
        }
        message
    }
}

fn close(code: u16, reason: &'static str) -> CloseFrame {
    CloseFrame {
        code,
        reason: reason.into(),
    }
}

fn name_of(sandbox: &Named) -> String {
    let name = sandbox.name.clone();
    name.unwrap_or_else(|| sandbox.id.to_string())
}

/// What an event is called, and what there is to say of it.
fn told(change: &Change) -> (&'static str, Map<String, Value>) {
    let (event_type, data) = match change {
        Change::Created => ("vm_created", json!({})),
        Change::Deleted => ("vm_deleted", json!({})),
        Change::Status { from, to, reason } => {
            let mut data = json!({"old_status": word_at(*from), "new_status": word_at(*to)});
            if let Some(reason) = reason {
                data["reason"] = reason.as_str().into();
            }
            ("status_change", data)
        }
        Change::NetworkAttached { address, network } => {
            let mac = MacAddress::of(*address).to_string();
            let data = json!({
                "ip": address.to_string(), "mac_address": mac, "bridge": network,
            });
            ("network_attached", data)
        }
        Change::NetworkDetached => ("network_detached", json!({})),
        Change::EgressChanged => ("egress_changed", json!({})),
        Change::ForwardOpened(forward) => ("port_forward_opened", of_forward(forward)),
        Change::ForwardClosed(forward) => ("port_forward_closed", of_forward(forward)),
        Change::Resized { vcpus, memory_mb } => (
            "resources_changed",
            json!({"vcpus": vcpus, "memory_mb": memory_mb}),
        ),
        Change::CommandExecuted {
            exit_code,
            duration,
        } => (
            "command_executed",
            json!({"exit_code": exit_code, "execution_time_seconds": duration.as_secs_f64()}),
        ),
        Change::ProcessStarted { pid, tag } => ("process_started", json!({"pid": pid, "tag": tag})),
        Change::FileWritten { path } => ("file_written", json!({"path": path})),
        Change::SnapshotTaken { id, name } => ("snapshot_created", of_snapshot(id, name)),
        Change::SnapshotDeleted { id, name } => ("snapshot_deleted", of_snapshot(id, name)),
        Change::RolledBack { id, name } => ("snapshot_restored", of_snapshot(id, name)),
        Change::ScanEnded { id, target, status } => (
            "scan_ended",
            json!({"scan_id": id, "target": target, "status": status}),
        ),
    };
    match data {
        Value::Object(data) => (event_type, data),
        _ => (event_type, Map::new()),
    }
}

fn of_forward(forward: &Forward) -> Value {
    json!({
        "host_port": forward.host.port(),
        "guest_port": forward.guest_port,
        "protocol": forward.transport,
        "host_address": forward.host.ip(),
    })
}

fn of_snapshot(id: &SnapshotId, name: &Option<String>) -> Value {
    let name = name.as_deref().unwrap_or(id.as_str());
    json!({"snapshot_name": name, "snapshot_id": id.as_str()})
}

/// Whether an event changes nothing that this dialect has a word for.
fn is_silent(change: &Change) -> bool {
    match change {
        Change::Status { from, to, .. } => word_at(*from) == word_at(*to),
        _ => false,
    }
}
