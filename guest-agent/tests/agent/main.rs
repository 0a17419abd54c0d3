//! The agent on a UNIX socket, as a host sees it.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "the helpers of tests end the test"
)]

mod common;
mod connect;
mod exec;
mod files;
mod freeze;
mod processes;
mod usage;
mod walk;
