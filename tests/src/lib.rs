//! What the end-to-end scenarios are told with: real guests on the real VMM, the real daemon.
//!
//! ```text
//! scenarios/  what must hold                         src/  how it is driven and watched
//!   boot, alone, exits, refusals, devices, console ──► vmm     one `vmm` process, its guest
//!   vmm_api ─────────────────────────────────────────► vmm_api the REST API of `vmm`
//!   guest ───────────────────────────────────────────► agent   the guest's agent over vsock
//!   api ─────────────────────────────────────────────► daemon  `sandboxd`, sandboxes over REST
//!   power, measure, scan ────────────────────────────► admin   its `/api/v1`
//!   terminals ───────────────────────────────────────► screen  what a program shows on a terminal
//! ```
//!
//! Everything blocks, and waits for events: a line, a connection, the end of a process. What
//! does not come within [`PATIENCE`] fails the scenario. When a scenario fails, what the guest,
//! the VMM and the daemon last said is printed as they are dropped.
//!
//! A scenario that needs a guest fails where none can run; it is never left out.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a scenario that cannot go on fails by a panic"
)]

pub mod admin;
pub mod agent;
pub mod daemon;
pub mod disk;
pub mod http;
pub mod images;
pub mod log;
pub mod network;
pub mod outside;
pub mod pattern;
pub mod process;
pub mod screen;
pub mod setup;
pub mod socket;
pub mod terminal;
pub mod vmm;
pub mod vmm_api;
pub mod work;

use std::time::{Duration, Instant};

/// How long anything may take before it counts as failed. Far above what a loaded emulated
/// machine needs: it is there so that a run ends, not to measure.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Prints a measurement. It is seen also if the scenario passes: libtest keeps back only what
/// `println!` and `eprintln!` write.
pub fn report(text: &str) {
    let line = format!("\nmeasured: {text}\n");
    // A measurement that cannot be shown is no reason to fail.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

/// Looks until `holds`: for what nobody tells of.
///
/// # Panics
/// It does not come to hold.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
