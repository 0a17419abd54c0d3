//! Changes of the packet filter, by the program nft(8). Each script takes effect at once, or nothing
//! of it.
//!
//! The program reads what is there before it changes it, which takes longer than the change. So what
//! is waiting when one run has ended goes into the next together, as one transaction; if that is
//! refused, each script is run by itself, so that one that is wrong fails alone.

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;
use tokio::sync::oneshot;
use tracing::debug;

use super::namespace::Namespace;
use crate::chain;
use crate::domain::Counter;

/// Where the program is, if it is not in a directory of `PATH`: that of an ordinary user may lack
/// these.
const DIRECTORIES: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];
/// How much of what the program says goes into an error, in bytes.
const MAX_MESSAGE: usize = 1000;

/// The packet filter of one network namespace.
#[derive(Debug)]
pub struct Nft {
    program: Program,
    namespace: Namespace,
    /// In the order that they are to take effect in.
    waiting: Arc<Mutex<Vec<Waiting>>>,
}

/// The program, with which everything is done on the thread of the namespace.
#[derive(Debug, Clone)]
struct Program(PathBuf);

/// A script that has not been run.
#[derive(Debug)]
struct Waiting {
    script: String,
    done: oneshot::Sender<Result<(), NftError>>,
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
    table: Option<NamedTable>,
}

#[derive(Deserialize)]
struct NamedTable {
    family: String,
    name: String,
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
        Ok(Self {
            program: Program(program),
            namespace,
            waiting: Arc::default(),
        })
    }

    /// Runs a script, all of it or nothing, after those that it was given before.
    ///
    /// # Errors
    /// Nothing of it was done.
    pub async fn apply(&self, script: String) -> Result<(), NftError> {
        let (done, told) = oneshot::channel();
        let waiting = Arc::clone(&self.waiting);
        lock(&waiting).push(Waiting { script, done });
        let program = self.program.clone();
        let turn = self.namespace.run(move || {
            // Those that an earlier turn took along have left nothing.
            let together = std::mem::take(&mut *lock(&waiting));
            apply_together(together, |script| {
                program.run(&["-f", "-"], script).map(drop)
            });
            Ok(())
        });
        turn.await.map_err(NftError::Run)?;
        told.await
            .unwrap_or_else(|_| Err(NftError::Run(io::ErrorKind::Interrupted.into())))
    }

    /// The counters of a table, by name.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn counters(&self, table: &str) -> Result<HashMap<String, Counter>, NftError> {
        let listed = self.list(["counters", "table", "inet", table]).await?;
        let counters = listed.into_iter().filter_map(|item| item.counter);
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

    /// Whether there are both tables of this name, that of bridges and that of packets.
    ///
    /// # Errors
    /// They cannot be listed.
    pub async fn has_tables(&self, name: &str) -> Result<bool, NftError> {
        let tables = self.list(["tables"]).await?;
        let has = |family: &str| {
            let mut tables = tables.iter().filter_map(|item| item.table.as_ref());
            tables.any(|table| table.family == family && table.name == name)
        };
        Ok(has("bridge") && has("inet"))
    }

    async fn list<const N: usize>(&self, what: [&str; N]) -> Result<Vec<Item>, NftError> {
        let what = what.map(str::to_owned);
        let program = self.program.clone();
        let listed = self.namespace.run(move || {
            let what = what.iter().map(String::as_str);
            let arguments: Vec<_> = ["-j", "list"].into_iter().chain(what).collect();
            Ok(program.run(&arguments, ""))
        });
        let text = listed.await.map_err(NftError::Run)??;
        let listing: Listing = serde_json::from_slice(&text).map_err(NftError::List)?;
        Ok(listing.nftables)
    }
}

impl Program {
    /// Runs it to its end. Returns what it prints.
    fn run(&self, arguments: &[&str], input: &str) -> Result<Vec<u8>, NftError> {
        let mut command = Command::new(&self.0);
        command
            .args(arguments)
            .current_dir("/")
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(NftError::Run)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends before it has read everything says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().map_err(NftError::Run)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim();
        let end = said.floor_char_boundary(MAX_MESSAGE);
        Err(NftError::Refused(said[..end].to_owned()))
    }
}

fn lock(waiting: &Mutex<Vec<Waiting>>) -> std::sync::MutexGuard<'_, Vec<Waiting>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs scripts as one, or if that fails, one by one.
fn apply_together(scripts: Vec<Waiting>, run: impl Fn(&str) -> Result<(), NftError>) {
    if scripts.len() > 1 {
        let together: String = scripts
            .iter()
            .map(|waiting| waiting.script.as_str())
            .collect();
        debug!(
            scripts = scripts.len(),
            together, "changing the packet filter"
        );
        match run(&together) {
            Ok(()) => {
                for waiting in scripts {
                    let _ = waiting.done.send(Ok(()));
                }
                return;
            }
            Err(error) => debug!(error = %chain(&error), "one by one"),
        }
    }
    for Waiting { script, done } in scripts {
        debug!(script, "changing the packet filter");
        let _ = done.send(run(&script));
    }
}

fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn waiting(script: &str) -> (Waiting, oneshot::Receiver<Result<(), NftError>>) {
        let (done, told) = oneshot::channel();
        let script = script.to_owned();
        (Waiting { script, done }, told)
    }

    #[test]
    fn what_waits_is_run_together_and_one_that_is_refused_fails_alone() {
        for (scripts, expected) in [
            (&["a"][..], &["a"][..]),
            (&["a", "b", "c"], &["abc"]),
            (&["a", "bad", "c"], &["abadc", "a", "bad", "c"]),
            (&["bad"], &["bad"]),
            (&[], &[]),
        ] {
            let (all, told): (Vec<_>, Vec<_>) =
                scripts.iter().map(|script| waiting(script)).unzip();
            let runs = RefCell::new(Vec::new());
            apply_together(all, |script| {
                runs.borrow_mut().push(script.to_owned());
                match script.contains("bad") {
                    true => Err(NftError::Refused("it is bad".to_owned())),
                    false => Ok(()),
                }
            });
            assert_eq!(*runs.borrow(), expected);
            for (script, mut told) in scripts.iter().zip(told) {
                assert_eq!(told.try_recv().unwrap().is_err(), *script == "bad");
            }
        }
    }
}
