//! A virtual machine monitor for Linux guests on KVM.
//!
//! One process runs one microVM. [`config::VmConfig`] describes it, `builder` turns the
//! description into a paused machine, and the machine then runs until the guest ends it or
//! the host does.

pub mod config;
pub mod devices;
pub mod memory;
