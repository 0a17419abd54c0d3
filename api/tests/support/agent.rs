//! The guest agent's binary.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The guest agent's binary, built if it is not up to date.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let status = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "-p",
                "guest-agent",
                "--bin",
                "guest-agent",
            ])
            .status()
            .unwrap();
        assert!(status.success(), "the guest agent does not build");
        let own = std::env::current_exe().unwrap();
        own.parent().unwrap().parent().unwrap().join("guest-agent")
    })
}
