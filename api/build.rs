//! Tells the program what it was built with.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output();
    let said = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    // As in `rustc 1.91.0 (f8297e351 2025-10-28)`.
    let version = said
        .ok()
        .and_then(|said| Some(said.split(' ').nth(1)?.to_owned()));
    println!(
        "cargo::rustc-env=BUILT_WITH_RUST={}",
        version.as_deref().unwrap_or("unknown")
    );
}
