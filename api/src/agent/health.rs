//! Whether the agent answers.

use std::time::Duration;

use agent_protocol::PATH_HEALTH;
use tokio::time::Instant;

use super::{AgentClient, failure, host_error, request, unreachable};
use crate::domain::HostError;

/// How long to wait after an agent could not be reached.
const PAUSE: Duration = Duration::from_millis(100);

impl AgentClient {
    /// Waits until the agent answers.
    ///
    /// # Errors
    /// It has not by `deadline`, or is not well.
    pub async fn healthy(&self, deadline: Instant) -> Result<(), HostError> {
        let mut last = "it did not answer in time".to_owned();
        let attempts = async {
            loop {
                match self.is_healthy().await {
                    Err(HostError::AgentUnreachable { reason }) => last = reason,
                    other => return other,
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout_at(deadline, attempts)
            .await
            .unwrap_or(Err(HostError::AgentUnreachable { reason: last }))
    }

    async fn is_healthy(&self) -> Result<(), HostError> {
        let request = request::get(PATH_HEALTH)?;
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| unreachable("it did not answer", &error))?;
        if response.status().is_success() {
            return Ok(());
        }
        Err(host_error(failure(response).await, "/"))
    }
}
