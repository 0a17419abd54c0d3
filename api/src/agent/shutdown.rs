//! Taking a guest down in order.

use std::io;
use std::time::Duration;

use agent_protocol::{PATH_SHUTDOWN, ShutdownAction, ShutdownRequest};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::header::{CONTENT_TYPE, HOST};

use super::{AgentClient, failure, host_error, unreachable};
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
        let internal = |error: &dyn std::error::Error| HostError::Internal {
            reason: error.to_string(),
        };
        let body = serde_json::to_vec(&ShutdownRequest {
            action: ShutdownAction::Poweroff,
            grace_ms: u64::try_from(grace.as_millis()).unwrap_or(u64::MAX),
        })
        .map_err(|error| internal(&error))?;
        let request = Request::post(PATH_SHUTDOWN)
            .header(HOST, "agent")
            .header(CONTENT_TYPE, "application/json")
            .body(
                Full::<Bytes>::from(body)
                    .map_err(io::Error::other)
                    .boxed_unsync(),
            )
            .map_err(|error| internal(&error))?;
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
