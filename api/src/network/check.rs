//! Whether a network is still as it was set up: others on the host may change links and rules too.

use super::{Network, NetworkError};

impl Network {
    /// Whether the bridge and the rules of the packet filter are there. The error is a sentence.
    ///
    /// # Errors
    /// One of them is not, or the kernel does not tell.
    pub async fn check(&self) -> Result<(), String> {
        let inner = &self.inner;
        let name = self.name();
        let failed = |error: NetworkError| format!("{name}: {}", crate::chain(&error));
        let bridge = inner.links.index_of(name).await;
        if bridge.map_err(|error| failed(error.into()))?.is_none() {
            return Err(format!(
                "the bridge {name} is gone, which sandboxd has made; restart sandboxd"
            ));
        }
        let rules = inner.nft.counters(&inner.tables.name()).await;
        rules.map(drop).map_err(|error| failed(error.into()))
    }
}
