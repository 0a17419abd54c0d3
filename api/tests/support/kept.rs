//! What tests of sandboxes whose disk is kept do and look at.

use std::time::Duration;

use api::domain::{CreateSpec, NetworkSpec, StopSpec, Store};

use super::Api;

/// By the guest.
pub const STOP: StopSpec = StopSpec {
    force: false,
    timeout: Duration::from_secs(5),
};

/// One that is asked for under this name.
pub fn spec(name: &str) -> CreateSpec {
    CreateSpec {
        template: "minimal".into(),
        vcpus: None,
        memory_mb: None,
        timeout_sec: 0,
        network: NetworkSpec::default(),
        name: Some(name.into()),
        disk_mb: None,
        is_kept: true,
    }
}

/// The layers that are on the host are those that somebody holds.
pub async fn is_tidy(api: &Api) {
    let held = api.store.held_layers().await.unwrap();
    assert_eq!(*api.host.layers.lock().unwrap(), held);
}
