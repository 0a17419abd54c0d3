//! Programs that tests write.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Puts a program with this text at `path`, which it returns.
///
/// Another program does the writing: what this one has open to be written, a child of another thread may still
/// have open, and nothing like that can be executed (execve(2), ETXTBSY).
pub fn write(path: &Path, text: &str) -> PathBuf {
    let written = path.with_extension("text");
    fs::write(&written, text).unwrap();
    let status = Command::new("install")
        .args(["-m", "755"])
        .args([&written, path])
        .status();
    assert!(status.unwrap().success());
    path.to_owned()
}
