//! sandboxd: the daemon that owns sandboxes and serves the REST APIs.

use std::io::{self, IsTerminal, Write};
use std::mem::ManuallyDrop;
use std::process::ExitCode;

use api::config::{Config, Flags, LogFormat};
use api::daemon::Ended;
use clap::{Parser, Subcommand};
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

/// Runs each untrusted program in a virtual machine of its own, and serves REST APIs for it.
#[derive(Parser)]
#[command(name = "sandboxd", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT.
    ///
    /// Each setting comes from its flag, else from its environment variable, else from the
    /// settings file, else from its default. api/sandboxd.example.toml is a settings file with all
    /// of them. Sandboxes outlive the daemon, and the next one takes them over; see --on-stop.
    #[command(args_override_self = true)]
    Serve(Box<Flags>),
    #[command(flatten)]
    Sandbox(api::cli::SandboxCommand),
    /// Templates, by the API of a daemon that runs.
    Template(api::cli::TemplateArgs),
    /// API keys, by the API of a daemon that runs.
    Apikey(api::cli::ApikeyArgs),
    /// The audit log, in its file.
    Audit(api::cli::AuditArgs),
    /// Print the description of the API, OpenAPI 3.1 in YAML.
    Openapi,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(flags) => serve(*flags).map(|()| ExitCode::SUCCESS),
        Command::Sandbox(command) => api::cli::sandbox(command),
        Command::Template(args) => api::cli::template(args),
        Command::Apikey(args) => api::cli::apikey(args),
        Command::Audit(args) => api::cli::audit(args),
        Command::Openapi => openapi().map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(status) => status,
        Err(text) => {
            // With standard error closed there is nobody left to tell.
            let _ = writeln!(io::stderr(), "sandboxd: {text}");
            ExitCode::FAILURE
        }
    }
}

fn serve(flags: Flags) -> Result<(), String> {
    let config = Config::load(flags).map_err(|error| api::chain(&error))?;
    let filter = EnvFilter::try_new(&config.log.filter).map_err(|error| api::chain(&error))?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr)
        // It tells of them on standard error, and panics if that is what failed.
        .log_internal_errors(false);
    match config.log.format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    let runtime = Runtime::new().map_err(|error| api::chain(&error))?;
    // Dropping what is at a sandbox would end it.
    let runtime = ManuallyDrop::new(runtime);
    let result = runtime
        .block_on(api::daemon::serve(config))
        .map_err(|error| api::chain(&error));
    if !matches!(result, Ok(Ended::WhileSandboxesRun)) {
        // What is still in flight was given its time.
        ManuallyDrop::into_inner(runtime).shutdown_background();
    }
    result.map(drop)
}

fn openapi() -> Result<(), String> {
    let text = api::http::yaml().map_err(|error| api::chain(&error))?;
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| api::chain(&error))
}
