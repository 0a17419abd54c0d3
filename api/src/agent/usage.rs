//! What a guest takes of what it has.

use std::time::Duration;

use agent_protocol::{PATH_USAGE, Usage};
use hyper::StatusCode;

use super::{AgentClient, failure, host_error, request, unreachable};
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
        let request = request::get(PATH_USAGE)?;
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| unreachable("it did not tell what is used", &error))?;
        if response.status() != StatusCode::OK {
            return Err(host_error(failure(response).await, "/"));
        }
        let usage: Usage = request::read_json(response).await?;
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
