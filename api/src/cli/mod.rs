//! The command line as a client of a daemon that runs, by its API.
//!
//! What a program may want to read goes to standard output, as a table or as the API's JSON;
//! everything else, progress included, goes to standard error.

mod apikey;
mod archive;
mod audit;
mod client;
mod host;
mod recipe;
mod sandbox;
mod table;
mod template;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;

pub use apikey::{ApikeyArgs, apikey};
pub use audit::{AuditArgs, audit};
use client::ClientError;
use recipe::RecipeError;
pub use sandbox::{SandboxCommand, sandbox};
pub use template::{TemplateArgs, template};

/// After how long it is told what takes so long.
const SLOW: Duration = Duration::from_secs(1);
/// How often it is told that it still does.
const STILL: Duration = Duration::from_secs(10);

/// Why a command did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Host(#[from] host::HostError),
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    #[error(transparent)]
    Copy(#[from] sandbox::CopyError),
    #[error("the output cannot be written")]
    Output(#[source] io::Error),
    #[error("standard input cannot be read")]
    Input(#[source] io::Error),
    #[error("template {name} was not built: {reason}")]
    NotBuilt { name: String, reason: String },
    #[error("the command did not run to its end: {0}")]
    Command(String),
    #[error("the terminal cannot be set up")]
    Terminal(#[source] io::Error),
    #[error("standard input is no terminal: leave -t away, or -i if nothing is to be typed")]
    NoTerminal,
    #[error("signals cannot be received")]
    Signals(#[source] io::Error),
}

/// Runs a command of the command line. The error is a sentence.
fn block_on(command: impl Future<Output = Result<ExitCode, CliError>>) -> Result<ExitCode, String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| crate::chain(&error))?;
    let done = runtime.block_on(command);
    // What is being read, a file to send or standard input, is of no use any more.
    runtime.shutdown_background();
    done.map_err(|error| crate::chain(&error))
}

/// `NAME=VALUE`.
fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected a name, `=`, and a value".to_owned()),
    }
}

/// A name as a part of a path of the API.
fn encode(name: &str) -> String {
    agent_protocol::percent_encode(name.as_bytes())
}

fn print(
    value: &Value,
    as_json: bool,
    for_people: impl FnOnce(&Value) -> String,
) -> Result<(), CliError> {
    let text = if as_json {
        format!("{value:#}\n")
    } else {
        for_people(value)
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(CliError::Output)
}

/// Waits for something, and tells what it is if that takes long.
async fn slow<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    let start = Instant::now();
    let mut next = SLOW;
    loop {
        tokio::select! {
            done = &mut work => return done,
            () = tokio::time::sleep(next) => {
                match next == SLOW {
                    true => say(&format!("{what} …")),
                    false => say(&format!("{what} …, {} s", start.elapsed().as_secs())),
                }
                next = STILL;
            }
        }
    }
}

/// Tells people something. With standard error closed there is nobody to tell.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}
