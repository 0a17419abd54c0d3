//! Changes of the packet filter, by the program nft(8). Each script is one transaction: all of it
//! takes effect at once, or nothing.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;
use tracing::debug;

use super::namespace::Namespace;
use crate::domain::Counter;

/// Where the program is, if it is not in a directory of `PATH`: that of an ordinary user may lack
/// these.
const DIRECTORIES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
/// How much of what the program says goes into an error, in bytes.
const MAX_MESSAGE: usize = 1000;

/// The packet filter of one network namespace.
#[derive(Debug, Clone)]
pub struct Nft {
    program: PathBuf,
    namespace: Namespace,
}

/// Why the packet filter is as it was.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The program is not there.
    #[error("the program nft is missing: install the package nftables")]
    Missing,
    /// It cannot be run.
    #[error("nft cannot be run")]
    Run(#[source] io::Error),
    /// It refuses.
    #[error("nft refuses the rules: {0}")]
    Refused(String),
    /// What it lists makes no sense.
    #[error("what nft lists makes no sense")]
    List(#[source] serde_json::Error),
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    counter: Option<NamedCounter>,
}

#[derive(Deserialize)]
struct NamedCounter {
    name: String,
    packets: u64,
    bytes: u64,
}

impl Nft {
    /// The packet filter of this namespace.
    ///
    /// # Errors
    /// The program is missing.
    pub fn find(namespace: Namespace) -> Result<Self, NftError> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories = std::env::split_paths(&path).chain(DIRECTORIES.map(PathBuf::from));
        let program = directories
            .map(|directory| directory.join("nft"))
            .find(|program| is_executable(program))
            .ok_or(NftError::Missing)?;
        Ok(Self { program, namespace })
    }

    /// Runs a script as one transaction.
    ///
    /// # Errors
    /// Nothing of it was done.
    pub async fn apply(&self, script: String) -> Result<(), NftError> {
        debug!(script, "changing the packet filter");
        self.run(&["-f", "-"], script).await.map(drop)
    }

    /// The counters of a table, by name.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn counters(&self, table: &str) -> Result<HashMap<String, Counter>, NftError> {
        let arguments = ["-j", "list", "counters", "table", "inet", table];
        let text = self.run(&arguments, String::new()).await?;
        let listing: Listing = serde_json::from_slice(&text).map_err(NftError::List)?;
        let counters = listing.nftables.into_iter().filter_map(|item| item.counter);
        Ok(counters
            .map(
                |NamedCounter {
                     name,
                     packets,
                     bytes,
                 }| (name, Counter { packets, bytes }),
            )
            .collect())
    }

    async fn run(&self, arguments: &[&str], input: String) -> Result<Vec<u8>, NftError> {
        let mut command = Command::new(&self.program);
        command
            .args(arguments)
            .current_dir("/")
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let run = move || {
            let mut child = command.spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // One that ends before it has read everything says why.
                let _ = stdin.write_all(input.as_bytes());
            }
            child.wait_with_output()
        };
        let output = self.namespace.run(run).await.map_err(NftError::Run)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim();
        let end = said.floor_char_boundary(MAX_MESSAGE);
        Err(NftError::Refused(said[..end].to_owned()))
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}
