//! Egress policies and port forwards.

use std::net::SocketAddr;

use tracing::{Instrument, info, warn};

use super::super::error::NetworkChangeError;
use super::super::host::HostError;
use super::super::network::{
    Egress, Forward, ForwardSpec, KeptForward, MAX_DESCRIPTION, MAX_FORWARDS, NetworkActivity,
    NetworkInfo, Transport, port_in_use,
};
use super::super::sandbox::{Sandbox, Status, Transition};
use super::Manager;
use crate::chain;

/// Whether a sandbox that is neither gone nor on the way somewhere.
fn can_change(status: Status) -> bool {
    matches!(status, Status::Running | Status::Paused | Status::Off)
}

/// What there is to say of the network of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxNetwork {
    /// The sandbox.
    pub sandbox: Sandbox,
    /// The network of the host that it is in, if that is there now.
    pub host: Option<NetworkInfo>,
    /// What the sandbox does in it, if it runs.
    pub activity: Option<NetworkActivity>,
}

impl Manager {
    /// The networks that the host has for sandboxes; the first is for those that ask for none in
    /// particular.
    ///
    /// # Errors
    /// The host cannot tell.
    pub async fn host_networks(&self) -> Result<Vec<NetworkInfo>, HostError> {
        Ok(self.inner.host.describe().await?.networks)
    }

    /// How a sandbox is connected, and what it does.
    ///
    /// # Errors
    /// There is no such sandbox, or the host cannot tell.
    pub async fn network(&self, id: &str) -> Result<SandboxNetwork, NetworkChangeError> {
        let sandbox = self.get(id).await?;
        let host = self.inner.host.describe().await;
        let host = host.map_err(NetworkChangeError::Host)?;
        let connection = sandbox.spec.network.as_ref();
        let network = connection.and_then(|it| host.network(it.network.as_deref()).ok());
        let host = network.cloned();
        let activity = if sandbox.status == Status::Running && sandbox.address.is_some() {
            match self.inner.host.network_activity(&sandbox.id).await {
                Ok(activity) => Some(activity),
                // It has ended in the meantime.
                Err(HostError::NotRunning { .. }) => None,
                Err(source) => return Err(NetworkChangeError::Host(source)),
            }
        } else {
            None
        };
        Ok(SandboxNetwork {
            sandbox,
            host,
            activity,
        })
    }

    /// Changes what a sandbox may reach, from now on and for connections that it has; one that is
    /// paused, from its resume on. It goes on if the caller goes away.
    ///
    /// # Errors
    /// It is as before.
    pub async fn set_egress(
        &self,
        id: &str,
        egress: Egress,
    ) -> Result<Sandbox, NetworkChangeError> {
        let egress = egress.check();
        let egress = egress.map_err(|error| NetworkChangeError::Invalid(error.to_string()))?;
        let id = self.get(id).await?.id;
        let manager = self.clone();
        let task = async move {
            let _turn = manager.inner.turns.take(&id).await;
            let sandbox = manager.get(id.as_str()).await?;
            let Some(before) = &sandbox.spec.network else {
                return Err(NetworkChangeError::NoNetwork);
            };
            if !can_change(sandbox.status) {
                return Err(NetworkChangeError::WrongState(sandbox.standing()));
            }
            // Before the act, so that after a crash the sandbox is never resumed with what it was
            // to have no longer.
            let wanted = Transition::Egress(egress.clone());
            let recorded = manager.record(&id, wanted).await?;
            if sandbox.status == Status::Running
                && let Err(source) = manager.inner.host.set_egress(&id, egress).await
            {
                let back = Transition::Egress(before.egress.clone());
                manager.record(&id, back).await?;
                return Err(NetworkChangeError::Host(source));
            }
            info!(sandbox = %id, "egress policy changed");
            recorded.ok_or(NetworkChangeError::Interrupted)
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(NetworkChangeError::Interrupted))
    }

    /// Lets a port of the host lead into a sandbox until that ends, over pauses as well, and keeps what
    /// is said of it. It goes on if the caller goes away.
    ///
    /// # Errors
    /// It does not.
    pub async fn open_forward(
        &self,
        id: &str,
        spec: ForwardSpec,
        description: Option<String>,
    ) -> Result<KeptForward, NetworkChangeError> {
        if let Some(text) = &description
            && (text.chars().count() > MAX_DESCRIPTION || text.chars().any(char::is_control))
        {
            let problem =
                format!("description must be {MAX_DESCRIPTION} characters at most, on one line");
            return Err(NetworkChangeError::Invalid(problem));
        }
        let id = self.get(id).await?.id;
        let manager = self.clone();
        let task = async move {
            let _turn = manager.inner.turns.take(&id).await;
            let sandbox = manager.get(id.as_str()).await?;
            if sandbox.address.is_none() {
                return Err(NetworkChangeError::NoNetwork);
            }
            if !can_change(sandbox.status) {
                return Err(NetworkChangeError::WrongState(sandbox.standing()));
            }
            if sandbox.forwards.len() >= MAX_FORWARDS {
                return Err(NetworkChangeError::TooManyForwards(sandbox.forwards.len()));
            }
            if let Some(port) = spec.host_port {
                let wanted = Forward {
                    transport: spec.transport,
                    host: SocketAddr::new(spec.host_address, port),
                    guest_port: spec.guest_port,
                };
                manager.check_conflicts(&wanted).await?;
            }
            let opened = manager.inner.host.open_forward(&id, spec).await;
            let forward = opened.map_err(NetworkChangeError::Host)?;
            let kept = KeptForward {
                forward,
                description,
            };
            let mut forwards = sandbox.forwards;
            forwards.push(kept.clone());
            let recorded = manager.record(&id, Transition::Forwards(forwards)).await;
            match recorded {
                Ok(Some(sandbox)) if sandbox.forwards.contains(&kept) => Ok(kept),
                // What is not recorded must not be there.
                other => {
                    manager.inner.host.close_forwards(&id, &[forward]).await;
                    match other? {
                        Some(sandbox) => Err(NetworkChangeError::WrongState(sandbox.standing())),
                        None => Err(NetworkChangeError::Interrupted),
                    }
                }
            }
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(NetworkChangeError::Interrupted))
    }

    /// Another sandbox may have a port although nobody listens on it now, if it could not be had
    /// again after a restart.
    async fn check_conflicts(&self, wanted: &Forward) -> Result<(), NetworkChangeError> {
        for other in self.inner.store.list_live().await? {
            let mut taken = other.forwards.iter().map(|kept| kept.forward);
            if let Some(forward) = taken.find(|forward| wanted.conflicts_with(forward)) {
                if !self.sees(&other) {
                    // As of a port that somebody else has.
                    let reason = port_in_use(wanted.transport, wanted.host);
                    return Err(NetworkChangeError::Host(HostError::PortInUse { reason }));
                }
                return Err(NetworkChangeError::PortTaken {
                    id: other.id,
                    forward,
                });
            }
        }
        Ok(())
    }

    /// Takes a port of the host away that leads into a sandbox; its connections end.
    ///
    /// # Errors
    /// There is no such forward.
    pub async fn close_forward(
        &self,
        id: &str,
        transport: Transport,
        host: SocketAddr,
    ) -> Result<(), NetworkChangeError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        let task = async move {
            let _turn = manager.inner.turns.take(&id).await;
            let sandbox = manager.get(id.as_str()).await?;
            let is_it = |kept: &KeptForward| {
                kept.forward.transport == transport && kept.forward.host == host
            };
            let (closed, left): (Vec<_>, Vec<_>) = sandbox.forwards.into_iter().partition(is_it);
            if closed.is_empty() {
                return Err(NetworkChangeError::NoForward);
            }
            manager.record(&id, Transition::Forwards(left)).await?;
            let closed: Vec<_> = closed.into_iter().map(|kept| kept.forward).collect();
            manager.inner.host.close_forwards(&id, &closed).await;
            Ok(())
        };
        tokio::spawn(task.in_current_span())
            .await
            .unwrap_or(Err(NetworkChangeError::Interrupted))
    }

    /// Lets the ports lead into a sandbox again that did before the daemon was started. One that
    /// another program has taken meanwhile is tried again when the sandbox is resumed.
    pub(super) async fn open_forwards(&self, sandbox: &Sandbox) {
        for KeptForward { forward, .. } in &sandbox.forwards {
            let spec = ForwardSpec {
                transport: forward.transport,
                host_address: forward.host.ip(),
                host_port: Some(forward.host.port()),
                guest_port: forward.guest_port,
            };
            let opened = self.inner.host.open_forward(&sandbox.id, spec).await;
            if let Err(source) = opened {
                warn!(sandbox = %sandbox.id, host = %forward.host, error = %chain(&source),
                    "a port does not lead into the sandbox for now");
            }
        }
    }
}
