//! What a guest takes of what it has.

use std::time::Duration;

use agent_protocol::{PATH_USAGE, Usage};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::header::HOST;
use hyper::{Request, StatusCode};

use super::{AgentClient, MAX_JSON_ANSWER, failure, host_error, unreachable};
use crate::domain::{GuestUsage, HostError};

/// How long an agent may take. A healthy one takes milliseconds; one whose guest stands still to be saved
/// may take as long as that, which nobody who looks at figures waits for.
const PATIENCE: Duration = Duration::from_secs(3);

impl AgentClient {
    /// What the guest takes of its memory and its root file system.
    ///
    /// # Errors
    /// It does not tell soon.
    pub async fn usage(&self) -> Result<GuestUsage, HostError> {
        tokio::time::timeout(PATIENCE, self.ask_usage())
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: format!("it did not answer within {} s", PATIENCE.as_secs()),
            })?
    }

    async fn ask_usage(&self) -> Result<GuestUsage, HostError> {
        let request = Request::get(PATH_USAGE)
            .header(HOST, "agent")
            .body(
                Empty::<Bytes>::new()
                    .map_err(|never| match never {})
                    .boxed_unsync(),
            )
            .map_err(|error| HostError::Internal {
                reason: error.to_string(),
            })?;
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| unreachable("it did not tell what is used", &error))?;
        if response.status() != StatusCode::OK {
            return Err(host_error(failure(response).await, "/"));
        }
        let body = Limited::new(response.into_body(), MAX_JSON_ANSWER)
            .collect()
            .await
            .map_err(|error| unreachable("its answer broke off", &*error))?;
        let usage: Usage = serde_json::from_slice(&body.to_bytes())
            .map_err(|error| unreachable("its answer makes no sense", &error))?;
        Ok(GuestUsage {
            cpus: usage.cpus,
            memory_total: usage.memory_total,
            memory_available: usage.memory_available,
            disk_total: usage.disk_total,
            disk_used: usage.disk_used,
            disk_available: usage.disk_available,
        })
    }
}
