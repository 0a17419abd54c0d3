//! `sandboxd template …`: templates from the command line, by the API of a daemon that runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::archive::{self, ArchiveFile};
use super::client::{self, Client, ClientError, Line};
use super::host::HostArgs;
use super::recipe::{self, RecipeError};
use super::{CliError, parse_variable, print, say, table};

/// The exit status after Ctrl-C: 128 and the number of SIGINT.
const INTERRUPTED: u8 = 130;

/// Build, list, inspect and delete templates.
#[derive(Debug, Args)]
pub struct TemplateArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Print what the API answers, as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// List all templates: those that were built, and images on the host
    List,
    /// Show all that is known of a template
    Inspect {
        /// Its name
        name: String,
    },
    /// Build a template, and follow the build to its end; Ctrl-C cancels it
    ///
    /// From a recipe (a TOML file: base, [[files]] with from and to, [[steps]] with run, and what the
    /// flags below set), from an OCI image, or from a sandbox.
    Build(Box<BuildArgs>),
    /// Delete templates; one that is being built is cancelled
    Delete {
        /// Their names
        #[arg(required = true)]
        names: Vec<String>,
    },
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("from").required(true))]
struct BuildArgs {
    /// Its name
    name: String,
    /// Recipe to build it from
    #[arg(long, value_name = "FILE", group = "from")]
    recipe: Option<PathBuf>,
    /// OCI image to build it from: an archive (`docker save`, `skopeo copy … oci-archive:FILE`) or
    /// the directory of a layout (`skopeo copy … oci:DIR`)
    #[arg(long, value_name = "PATH", group = "from")]
    oci: Option<PathBuf>,
    /// Sandbox, running or paused, whose disk it is built from
    #[arg(long, value_name = "ID", group = "from")]
    sandbox: Option<String>,
    /// Virtual CPUs of its sandboxes [default: 1]
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<i64>,
    /// RAM of its sandboxes, in MiB [default: 512]
    #[arg(long, value_name = "MIB")]
    memory_mb: Option<i64>,
    /// Size of the disk, in MiB, for an OCI image [default: 2048]
    #[arg(long, value_name = "MIB", requires = "oci")]
    disk_mb: Option<i64>,
    /// Shell command that must succeed in a sandbox before it counts as running
    #[arg(long, value_name = "COMMAND")]
    readiness: Option<String>,
    /// Seconds in which it must have succeeded [default: 30]
    #[arg(long, value_name = "SECONDS", requires = "readiness")]
    readiness_timeout_sec: Option<i64>,
    /// Environment of commands; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,
    /// Working directory of commands [default: the user's home]
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
}

/// Does what the command line says. The error is a sentence.
///
/// # Errors
/// It was not done.
pub fn template(args: TemplateArgs) -> Result<ExitCode, String> {
    super::block_on(run(args))
}

async fn run(args: TemplateArgs) -> Result<ExitCode, CliError> {
    let client = Client::new(&args.host)?;
    match args.command {
        TemplateCommand::List => {
            let list = client.call("GET", "/v1/templates").await?;
            print(&list, args.json, table::list)?;
        }
        TemplateCommand::Inspect { name } => {
            let template = client.call("GET", &client::template_path(&name)).await?;
            print(&template, args.json, table::one)?;
        }
        TemplateCommand::Delete { names } => {
            for name in names {
                let path = client::template_path(&name);
                client.call("DELETE", &path).await?;
                say(&format!("template {name} deleted"));
            }
        }
        TemplateCommand::Build(build) => return run_build(&client, *build, args.json).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn run_build(client: &Client, build: BuildArgs, as_json: bool) -> Result<ExitCode, CliError> {
    let name = build.name.clone();
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())
        .map_err(CliError::Signals)?;
    let begun = async {
        let (request, archive) = request_of(build).await?;
        Ok::<_, CliError>(client.build(&request, archive).await?)
    };
    tokio::select! {
        begun = begun => begun?,
        _ = interrupt.recv() => {
            say("interrupted before anything was built");
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    let template = tokio::select! {
        template = follow(client, &name) => template?,
        _ = interrupt.recv() => {
            say(&format!("cancelling the build of template {name}"));
            client.call("DELETE", &client::template_path(&name)).await?;
            return Ok(ExitCode::from(INTERRUPTED));
        }
    };
    if template["status"] != "ready" {
        let reason = template["status_reason"].as_str().unwrap_or("it is gone");
        return Err(CliError::NotBuilt {
            name,
            reason: reason.to_owned(),
        });
    }
    print(&template, as_json, table::one)?;
    Ok(ExitCode::SUCCESS)
}

/// Tells the progress of a build to its end. Returns the template; null if it is gone.
async fn follow(client: &Client, name: &str) -> Result<Value, CliError> {
    let mut lines = client.follow(name).await?;
    while let Some(line) = lines.next().await? {
        match line {
            Line::Progress(text) => say(&text),
            Line::Template(template) => return Ok(template),
            Line::Gone => return Ok(Value::Null),
        }
    }
    Err(ClientError::BrokeOff.into())
}

/// What to ask the daemon for, and what to send along.
async fn request_of(build: BuildArgs) -> Result<(Value, Option<ArchiveFile>), CliError> {
    let mut fields = Map::new();
    let mut archive = None;
    if let Some(path) = build.recipe {
        let read = tokio::task::spawn_blocking(move || recipe::read(&path)).await;
        let recipe = read.map_err(|_| RecipeError::Interrupted)??;
        fields = recipe.fields;
        archive = recipe.files;
    }
    if let Some(path) = build.oci {
        let opened = tokio::task::spawn_blocking(move || archive::image(&path)).await;
        archive = Some(opened.map_err(|_| RecipeError::Interrupted)??);
        let mut oci = Map::new();
        oci.extend(
            build
                .disk_mb
                .map(|size| ("disk_mb".to_owned(), size.into())),
        );
        fields.insert("oci".to_owned(), oci.into());
    }
    if let Some(id) = build.sandbox {
        fields.insert("sandbox_id".to_owned(), id.into());
    }
    let readiness = build.readiness.map(|command| {
        let mut readiness = json!({"cmd": ["/bin/sh", "-c", command]});
        if let Some(seconds) = build.readiness_timeout_sec {
            readiness["timeout_sec"] = seconds.into();
        }
        readiness
    });
    for (name, value) in [
        ("vcpus", build.vcpus.map(Value::from)),
        ("memory_mb", build.memory_mb.map(Value::from)),
        ("readiness", readiness),
        ("cwd", build.cwd.map(Value::from)),
    ] {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    }
    if !build.env.is_empty() {
        let env = fields.entry("env").or_insert_with(|| json!({}));
        let own: BTreeMap<String, String> = build.env.into_iter().collect();
        if let Value::Object(env) = env {
            env.extend(own.into_iter().map(|(name, value)| (name, value.into())));
        }
    }
    fields.insert("name".to_owned(), build.name.into());
    Ok((fields.into(), archive))
}
