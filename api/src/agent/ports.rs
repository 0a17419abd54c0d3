//! Connections to ports of the guest.

use agent_protocol::{CONNECT_UPGRADE, ConnectRequest, PATH_CONNECT};
use hyper_util::rt::TokioIo;

use super::AgentClient;
use crate::domain::{HostError, PortStream};

impl AgentClient {
    /// Connects to a port; see [`GuestHost::connect`](crate::domain::GuestHost::connect).
    ///
    /// # Errors
    /// There is no connection.
    pub async fn connect_to_port(&self, port: u16) -> Result<PortStream, HostError> {
        let order = ConnectRequest { port };
        let upgraded = self.upgraded(PATH_CONNECT, CONNECT_UPGRADE, &order).await?;
        Ok(Box::new(TokioIo::new(upgraded)))
    }
}
