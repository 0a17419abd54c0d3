//! A virtual machine monitor for Linux guests on KVM.
//!
//! One process runs one microVM. [`config::VmConfig`] describes it, [`builder`] turns the
//! description into a paused [`machine`], and [`control`] owns that from there until the guest
//! ends it or the host does.

pub mod api;
pub mod arch;
pub mod boot_timer;
pub mod bounded_log;
pub mod builder;
pub mod cli;
pub mod config;
pub mod control;
pub mod core_dump;
pub mod debugging;
pub mod devices;
pub mod doctor;
pub mod events;
pub mod exit;
pub mod gdb;
pub mod inspect;
pub mod kvm;
pub mod log;
pub mod machine;
pub mod memory;
pub mod rate_limiter;
pub mod resources;
pub mod sandboxing;
pub mod signals;
pub mod snapshot;
pub mod terminal;

/// An error and everything that caused it, in one line, outermost first.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
