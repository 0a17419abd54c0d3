//! What must hold, from end to end.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a scenario that cannot go on fails by a panic"
)]

mod alone;
mod api;
mod boot;
mod cli;
mod conformance;
mod console;
mod debugging;
mod devices;
mod disks;
mod exits;
mod floods;
mod guest;
mod hostile;
mod jail;
mod kills;
mod measure;
mod network;
mod power;
mod processes;
mod refusals;
mod resize;
mod restore;
mod scan;
mod snapshots;
mod templates;
mod terminals;
mod vmm_api;
