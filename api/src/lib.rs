//! sandboxd: the daemon that owns sandboxes and serves the REST APIs.
//!
//! Dependencies point inwards: [`dialects`] and [`http`] know [`domain`]; [`hypervisor`],
//! [`agent`], [`images`], [`network`] and [`store`] do its work behind its two traits,
//! [`Host`](domain::Host) and [`Store`](domain::Store); [`daemon`] puts them
//! together as [`config`] says. [`cli`] is a client of it all.

pub mod agent;
pub mod archive;
pub mod audit;
pub mod cli;
pub mod config;
pub mod daemon;
mod descriptors;
pub mod dialects;
pub mod domain;
pub mod http;
pub mod hypervisor;
pub mod identity;
pub mod images;
pub mod metrics;
pub mod network;
pub mod oci;
mod private;
pub mod scan;
pub mod store;

/// Version of the compiler that this was built with.
pub const RUST_VERSION: &str = env!("BUILT_WITH_RUST");

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An error and its sources, as one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
