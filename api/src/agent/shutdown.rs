//! Taking a guest down in order.

use std::time::Duration;

use agent_protocol::{PATH_SHUTDOWN, ShutdownAction, ShutdownRequest};

use super::{AgentClient, failure, host_error, request, unreachable};
use crate::domain::HostError;

/// How long an agent may take to say that it will.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

impl AgentClient {
    /// Asks the guest to end its processes, to write all that it has to its disks, and to power
    /// off. `grace` is what processes have after they are told.
    ///
    /// # Errors
    /// It does not say that it will.
    pub async fn power_off(&self, grace: Duration) -> Result<(), HostError> {
        let body = ShutdownRequest {
            action: ShutdownAction::Poweroff,
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        };
        let request = request::post(PATH_SHUTDOWN, &body)?;
        let answer = async {
            let mut sender = self.connect().await?;
            sender
                .send_request(request)
                .await
                .map_err(|error| unreachable("it did not answer", &error))
        };
        let response = tokio::time::timeout(ANSWER_TIMEOUT, answer)
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: "it did not say whether it goes down".to_owned(),
            })??;
        if response.status().is_success() {
            Ok(())
        } else {
            Err(host_error(failure(response).await, ""))
        }
    }
}
