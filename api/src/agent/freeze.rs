//! Holding a guest's root file system still.

use std::time::Duration;

use agent_protocol::{FREEZE_UPGRADE, FROZEN, FreezeRequest, PATH_FREEZE};
use hyper::StatusCode;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{AgentClient, failure, host_error, unreachable, upgrade};
use crate::domain::HostError;

/// How long a guest may take to write what it has in memory to its disk.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long it is frozen at most, in milliseconds of the guest's time, which stands still while its
/// VMM is stopped.
const HOLD_MS: u64 = 30_000;
/// How long the agent may take to thaw it.
const THAW_TIMEOUT: Duration = Duration::from_secs(10);

/// A guest whose root file system is frozen, until this is dropped at the latest.
pub struct Freeze(TokioIo<Upgraded>);

impl AgentClient {
    /// Writes what the guest has in memory for its root file system to its disk, and holds up all
    /// writes to it.
    ///
    /// # Errors
    /// It is not frozen, or will soon be no more.
    pub async fn freeze(&self) -> Result<Freeze, HostError> {
        tokio::time::timeout(FREEZE_TIMEOUT, self.begin_freeze())
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: format!(
                    "it did not freeze the file system within {} s",
                    FREEZE_TIMEOUT.as_secs()
                ),
            })?
    }

    async fn begin_freeze(&self) -> Result<Freeze, HostError> {
        let body = FreezeRequest {
            timeout_ms: HOLD_MS,
        };
        let request = upgrade::request(PATH_FREEZE, FREEZE_UPGRADE, &body)?;
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| unreachable("it did not freeze the file system", &error))?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(host_error(failure(response).await, "/"));
        }
        let upgraded = hyper::upgrade::on(response)
            .await
            .map_err(|error| unreachable("its connection broke off", &error))?;
        Ok(Freeze(TokioIo::new(upgraded)))
    }
}

impl Freeze {
    /// Lets the guest write again. Returns whether it could not until now.
    pub async fn thaw(mut self) -> bool {
        let ask = async {
            self.0.write_u8(0).await?;
            self.0.read_u8().await
        };
        matches!(
            tokio::time::timeout(THAW_TIMEOUT, ask).await,
            Ok(Ok(FROZEN))
        )
    }
}
