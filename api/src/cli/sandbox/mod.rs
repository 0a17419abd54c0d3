//! Sandboxes from the command line, by the API of a daemon that runs: run, ps, exec, cp and so on.

mod copy;
mod stream;
mod table;
mod terminal;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::client::{Client, ClientError};
use super::host::HostArgs;
use super::{CliError, parse_variable, print, say, slow};
pub use copy::CopyError;
use stream::{Interrupts, Start};

/// Commands for sandboxes and snapshots.
#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Run a command in a new sandbox, which is deleted afterwards
    ///
    /// Standard input, output and error are those of the command, and so is the exit status. Ctrl-C
    /// ends both. With -it the command has a terminal, which is the one that this is typed on.
    Run(RunArgs),
    /// List sandboxes
    Ps(PsArgs),
    /// Run a command in a sandbox that runs
    ///
    /// Standard input, output and error are those of the command, and so is the exit status. With -it
    /// the command has a terminal, which is the one that this is typed on.
    Exec(ExecArgs),
    /// Copy a file or a directory into a sandbox, or out of it
    Cp(CopyArgs),
    /// Save sandboxes to disk and end their processes
    Pause(ManyArgs),
    /// Let paused sandboxes go on where they were
    Resume(ManyArgs),
    /// Make sandboxes that go on where another is; prints their ids
    Fork(ForkArgs),
    /// Delete sandboxes, whatever they are at
    Rm(ManyArgs),
    /// Show what a sandbox that runs has written to its console, the kernel's messages included
    Logs(OneArgs),
    /// Snapshots of sandboxes
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
}

/// `sandboxd run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Template of the sandbox, or name or id of a snapshot
    #[arg(long, value_name = "NAME")]
    template: Option<String>,
    /// Virtual CPUs [default: what the template says]
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<i64>,
    /// RAM in MiB [default: what the template says]
    #[arg(long, value_name = "MIB")]
    memory: Option<i64>,
    /// Keep the sandbox; its id is told on standard error
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    what: CommandArgs,
}

/// A command and its surroundings.
#[derive(Debug, Args)]
struct CommandArgs {
    /// Environment of the command; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Working directory of the command
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Seconds after which the command is killed [default: 86400]
    #[arg(long, value_name = "SECONDS", conflicts_with = "tty")]
    timeout: Option<i64>,
    /// Run the command on a terminal
    #[arg(short, long)]
    tty: bool,
    /// Let the command read standard input; without -t it does so in any case
    #[arg(short, long)]
    interactive: bool,
    /// Program and arguments; no shell is involved
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<String>,
}

impl CommandArgs {
    /// Says what is wrong before anything is done.
    fn check(&self) -> Result<(), CliError> {
        match self.tty && self.interactive && !io::stdin().is_terminal() {
            true => Err(CliError::NoTerminal),
            false => Ok(()),
        }
    }

    /// Runs the command in this sandbox. The exit status.
    async fn run(
        self,
        client: &Client,
        id: &str,
        interrupts: &mut Interrupts,
    ) -> Result<u8, CliError> {
        let start = Start::new(self.command, self.env, self.cwd, self.timeout);
        match self.tty {
            true => terminal::run(client, id, &start, self.interactive, interrupts).await,
            false => stream::run(client, id, &start, interrupts).await,
        }
    }
}

/// `sandboxd ps`.
#[derive(Debug, Args)]
pub struct PsArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Also those that are stopped or in error, the latest thousand in all
    #[arg(short, long)]
    all: bool,
    /// Print what the API answers, as JSON
    #[arg(long)]
    json: bool,
}

/// `sandboxd exec`.
#[derive(Debug, Args)]
pub struct ExecArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Its id
    #[arg(value_name = "SANDBOX")]
    id: String,
    #[command(flatten)]
    what: CommandArgs,
}

/// `sandboxd cp`.
#[derive(Debug, Args)]
pub struct CopyArgs {
    #[command(flatten)]
    host: HostArgs,
    /// What to copy: PATH, or SANDBOX:PATH with an absolute path
    from: String,
    /// Where to: PATH, or SANDBOX:PATH. A directory that is there gets a new entry
    to: String,
}

/// One sandbox.
#[derive(Debug, Args)]
pub struct OneArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Its id
    #[arg(value_name = "SANDBOX")]
    id: String,
}

/// Some sandboxes, or snapshots.
#[derive(Debug, Args)]
pub struct ManyArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Their ids; snapshots also have names
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// `sandboxd fork`.
#[derive(Debug, Args)]
pub struct ForkArgs {
    #[command(flatten)]
    host: HostArgs,
    /// How many, 1 to 100
    #[arg(short = 'n', long, default_value_t = 1)]
    count: i64,
    /// Print what the API answers, as JSON
    #[arg(long)]
    json: bool,
    /// Which one
    #[arg(value_name = "SANDBOX")]
    id: String,
}

/// `sandboxd snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Take a snapshot of a sandbox, which goes on; prints its id
    Create(CreateSnapshotArgs),
    /// List snapshots
    List(ListArgs),
    /// Delete snapshots
    Rm(ManyArgs),
}

/// `sandboxd snapshot create`.
#[derive(Debug, Args)]
pub struct CreateSnapshotArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Which sandbox, running or paused
    #[arg(value_name = "SANDBOX")]
    id: String,
    /// A name for the snapshot, which no other has
    #[arg(long)]
    name: Option<String>,
    /// A description
    #[arg(long, value_name = "TEXT")]
    description: Option<String>,
    /// Without memory and processes: what is made from it boots
    #[arg(long)]
    disk_only: bool,
    /// Replace the snapshot that has the name, once this one is taken
    #[arg(long, requires = "name")]
    overwrite: bool,
    /// Print what the API answers, as JSON
    #[arg(long)]
    json: bool,
}

/// `sandboxd snapshot list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Print what the API answers, as JSON
    #[arg(long)]
    json: bool,
}

/// Does what the command line says. The error is a sentence.
///
/// # Errors
/// It was not done.
pub fn sandbox(command: SandboxCommand) -> Result<ExitCode, String> {
    super::block_on(dispatch(command))
}

async fn dispatch(command: SandboxCommand) -> Result<ExitCode, CliError> {
    match command {
        SandboxCommand::Run(args) => run(args).await,
        SandboxCommand::Ps(args) => {
            let path = match args.all {
                true => "/v1/sandboxes?all=true",
                false => "/v1/sandboxes",
            };
            let list = Client::new(&args.host)?.call("GET", path).await?;
            print(&list, args.json, table::sandboxes)?;
            Ok(ExitCode::SUCCESS)
        }
        SandboxCommand::Exec(args) => {
            args.what.check()?;
            let client = Client::new(&args.host)?;
            let mut interrupts = Interrupts::catch()?;
            let status = args.what.run(&client, &args.id, &mut interrupts).await?;
            Ok(ExitCode::from(status))
        }
        SandboxCommand::Cp(args) => {
            copy::copy(&Client::new(&args.host)?, &args.from, &args.to).await?;
            Ok(ExitCode::SUCCESS)
        }
        SandboxCommand::Pause(args) => {
            each(args, "pausing", async |client, id| {
                let path = format!("{}/pause", sandbox_path(id));
                client.call("POST", &path).await.map(drop)
            })
            .await
        }
        SandboxCommand::Resume(args) => {
            each(args, "resuming", async |client, id| {
                let path = format!("{}/resume", sandbox_path(id));
                client.call("POST", &path).await.map(drop)
            })
            .await
        }
        SandboxCommand::Rm(args) => {
            each(args, "deleting", async |client, id| {
                client.call("DELETE", &sandbox_path(id)).await.map(drop)
            })
            .await
        }
        SandboxCommand::Fork(args) => fork(args).await,
        SandboxCommand::Logs(args) => {
            let path = format!("{}/logs", sandbox_path(&args.id));
            let client = Client::new(&args.host)?;
            client.download("GET", &path, None, io::stdout()).await?;
            Ok(ExitCode::SUCCESS)
        }
        SandboxCommand::Snapshot(command) => snapshot(command).await,
    }
}

async fn run(args: RunArgs) -> Result<ExitCode, CliError> {
    args.what.check()?;
    let client = Client::new(&args.host)?;
    let mut interrupts = Interrupts::catch()?;
    let mut fields = Map::new();
    let what = match &args.template {
        Some(template) => format!("starting a sandbox of {template}"),
        None => "starting a sandbox".to_owned(),
    };
    for (name, value) in [
        ("template", args.template.map(Value::from)),
        ("vcpus", args.vcpus.map(Value::from)),
        ("memory_mb", args.memory.map(Value::from)),
    ] {
        fields.extend(value.map(|value| (name.to_owned(), value)));
    }
    let fields = Value::from(fields);
    let created = slow(&what, client.call_with("POST", "/v1/sandboxes", &fields));
    tokio::pin!(created);
    // A start that nobody waits for any more goes on all the same, so that its sandbox is waited for.
    let (sandbox, interrupted) = tokio::select! {
        created = &mut created => (created?, None),
        status = interrupts.recv() => {
            say("interrupted; the sandbox is deleted once it has started");
            tokio::select! {
                created = &mut created => (created?, Some(status)),
                status = interrupts.recv() => {
                    say("the sandbox may still start: `sandboxd ps` lists it, `sandboxd rm` deletes it");
                    return Ok(ExitCode::from(status));
                }
            }
        }
    };
    let id = sandbox["id"].as_str().unwrap_or_default().to_owned();
    let ended = match interrupted {
        Some(status) => Ok(status),
        None => args.what.run(&client, &id, &mut interrupts).await,
    };
    if args.keep && interrupted.is_none() {
        say(&format!("sandbox {id} is kept"));
    } else {
        let path = sandbox_path(&id);
        let deleted = slow("deleting the sandbox", client.call("DELETE", &path));
        if let Err(source) = deleted.await {
            // What the command ended with matters more.
            let why = crate::chain(&source);
            say(&format!(
                "sandbox {id} is left: {why}; `sandboxd rm {id}` tries again"
            ));
        }
    }
    Ok(ExitCode::from(ended?))
}

async fn fork(args: ForkArgs) -> Result<ExitCode, CliError> {
    let client = Client::new(&args.host)?;
    let path = format!("{}/fork", sandbox_path(&args.id));
    let count = json!({"count": args.count});
    let forked = slow("forking", client.call_with("POST", &path, &count)).await?;
    print(&forked, args.json, |forked| {
        let sandboxes = forked["sandboxes"].as_array().into_iter().flatten();
        let ids = sandboxes.filter_map(|sandbox| sandbox["id"].as_str());
        ids.map(|id| format!("{id}\n")).collect()
    })?;
    let mut status = ExitCode::SUCCESS;
    for failed in forked["failed"].as_array().into_iter().flatten() {
        status = ExitCode::FAILURE;
        let (id, reason) = (failed["id"].as_str(), failed["reason"].as_str());
        let (id, reason) = (id.unwrap_or_default(), reason.unwrap_or_default());
        say(&format!("sandboxd: {id} did not start: {reason}"));
    }
    Ok(status)
}

async fn snapshot(command: SnapshotCommand) -> Result<ExitCode, CliError> {
    match command {
        SnapshotCommand::Create(args) => {
            let mut fields = Map::new();
            fields.insert("sandbox_id".to_owned(), args.id.into());
            fields.insert("include_memory".to_owned(), (!args.disk_only).into());
            let (name, description) = (args.name, args.description);
            fields.extend(name.map(|name| ("name".to_owned(), name.into())));
            fields.extend(description.map(|text| ("description".to_owned(), text.into())));
            let (client, fields) = (Client::new(&args.host)?, Value::from(fields));
            let path = match args.overwrite {
                true => "/v1/snapshots?overwrite=true",
                false => "/v1/snapshots",
            };
            let taken = client.call_with("POST", path, &fields);
            let taken = slow("taking a snapshot", taken).await?;
            print(&taken, args.json, |taken| {
                format!("{}\n", taken["id"].as_str().unwrap_or_default())
            })?;
            Ok(ExitCode::SUCCESS)
        }
        SnapshotCommand::List(args) => {
            let list = Client::new(&args.host)?
                .call("GET", "/v1/snapshots")
                .await?;
            print(&list, args.json, table::snapshots)?;
            Ok(ExitCode::SUCCESS)
        }
        SnapshotCommand::Rm(args) => {
            each(args, "deleting", async |client, id| {
                let path = format!("/v1/snapshots/{}", super::encode(id));
                client.call("DELETE", &path).await.map(drop)
            })
            .await
        }
    }
}

/// Does the same to each. One that fails keeps none of the others from it.
async fn each(
    args: ManyArgs,
    what: &str,
    act: impl AsyncFn(&Client, &str) -> Result<(), ClientError>,
) -> Result<ExitCode, CliError> {
    let client = Client::new(&args.host)?;
    let mut status = ExitCode::SUCCESS;
    for id in &args.ids {
        match slow(&format!("{what} {id}"), act(&client, id)).await {
            Ok(()) => {}
            // The others would fail as well.
            Err(source @ ClientError::Connect { .. }) => return Err(source.into()),
            Err(source) => {
                say(&format!("sandboxd: {id}: {}", crate::chain(&source)));
                status = ExitCode::FAILURE;
            }
        }
    }
    Ok(status)
}

fn sandbox_path(id: &str) -> String {
    format!("/v1/sandboxes/{}", super::encode(id))
}
