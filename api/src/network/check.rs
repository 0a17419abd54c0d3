//! Whether a network is still as it was set up, and making it so again: others on the host change links
//! and rules too. `nft flush ruleset`, with which most firewalls begin to load their own rules, takes
//! ours along, and managers of networks take interfaces out of bridges or set them down.

use std::time::Instant;

use tracing::warn;

use super::links::Port;
use super::{Inner, Network, NetworkError};
use crate::chain;
use crate::domain::{MacAddress, SandboxId};

impl Network {
    /// Whether the bridge and the rules of the packet filter are there. The error is a sentence.
    ///
    /// # Errors
    /// One of them is not, or the kernel does not tell.
    pub async fn check(&self) -> Result<(), String> {
        let inner = &self.inner;
        let failed = |error: NetworkError| format!("{}: {}", self.name(), chain(&error));
        inner.check_bridge().await.map_err(failed)?;
        match inner.nft.has_tables(&inner.tables.name()).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(failed(NetworkError::NoTables)),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Makes what is no longer as it was set up so again: the packet filter, with all that it had but
    /// what it had counted, and ports of the bridge. Returns the sandboxes that were cut off, or that
    /// nothing held back.
    ///
    /// # Errors
    /// It is not as it was set up.
    pub async fn repair(&self) -> Result<Vec<SandboxId>, NetworkError> {
        let inner = &self.inner;
        inner.check_bridge().await?;
        let mut repaired = inner.remake_tables().await?;
        for id in inner.repair_ports().await? {
            if !repaired.contains(&id) {
                repaired.push(id);
            }
        }
        Ok(repaired)
    }
}

impl Inner {
    async fn check_bridge(&self) -> Result<(), NetworkError> {
        let found = self.links.index_of(&self.config.bridge).await?;
        if found == Some(self.bridge.index) {
            return Ok(());
        }
        let name = self.config.bridge.clone();
        Err(NetworkError::NoBridge { name })
    }

    /// Makes both tables anew, with every sandbox, if one of them is gone: at once, so that there is no
    /// moment with tables and without a sandbox. Returns those.
    async fn remake_tables(&self) -> Result<Vec<SandboxId>, NetworkError> {
        let _alone = self.changes.write().await;
        if self.nft.has_tables(&self.tables.name()).await? {
            return Ok(Vec::new());
        }
        let mut script = self.tables.replace();
        let mut ids = Vec::new();
        let now = Instant::now();
        for (id, connected) in self.members().all_applied() {
            let counters = super::Counters::default();
            script.push_str(&self.tables.attach(&connected.member, counters));
            for (rule, address, seconds) in connected.resolved_at(now) {
                let resolved =
                    self.tables
                        .resolved(&connected.member, &[rule], &[(address, seconds)]);
                script.push_str(&resolved);
            }
            ids.push(id.clone());
        }
        self.nft.apply(script).await?;
        Ok(ids)
    }

    /// Makes taps ports of the bridge again that are no longer. Returns whose they are.
    async fn repair_ports(&self) -> Result<Vec<SandboxId>, NetworkError> {
        let is_port = |port: Option<&Port>| {
            port.is_none_or(|port| port.is_up && port.controller == Some(self.bridge.index))
        };
        let ports = self.links.ports().await?;
        // Closing the last descriptor of a tap waits for it to be gone.
        let unfit = {
            let mut taps = self.taps();
            let (fit, unfit) = taps
                .drain(..)
                .partition(|tap| is_port(ports.get(&tap.name)));
            *taps = fit;
            unfit
        };
        if !unfit.is_empty() {
            let _ = tokio::task::spawn_blocking(move || drop(unfit)).await;
            self.tap_taken.notify_one();
        }
        let suspects: Vec<_> = self
            .members()
            .all_applied()
            .filter(|(_, connected)| !is_port(ports.get(&connected.member.tap)))
            .map(|(id, _)| id.clone())
            .collect();
        let mut repaired = Vec::new();
        for id in suspects {
            // It may have ended meanwhile, and its tap be another's.
            let Some(_turn) = self.turn(&id).await else {
                continue;
            };
            let member = self.members().applied(&id).map(|it| it.member.clone());
            let ports = self.links.ports().await?;
            let Some((member, port)) =
                member.and_then(|it| ports.get(&it.tap).map(|port| (it, port)))
            else {
                continue;
            };
            if is_port(Some(port)) {
                continue;
            }
            let (bridge, tap, address) = (self.bridge.index, port.index, member.address);
            let repair = async {
                self.links.add_port(bridge, tap, self.config.mtu).await?;
                let mac = MacAddress::of(address);
                self.links.bind(bridge, tap, address, mac).await
            };
            // It goes with its VMM, at any moment; the others are none the worse for it.
            match repair.await {
                Ok(()) => repaired.push(id),
                Err(error) => warn!(sandbox = %id, error = %chain(&error),
                    "the tap of the sandbox is not in the bridge"),
            }
        }
        Ok(repaired)
    }
}
