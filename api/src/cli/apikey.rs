//! `sandboxd apikey …`: API keys, by the API of a daemon that runs.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::Client;
use super::host::HostArgs;
use super::{CliError, block_on, encode, print, say, table};

/// Make, list and revoke API keys.
#[derive(Debug, Args)]
pub struct ApikeyArgs {
    #[command(flatten)]
    host: HostArgs,
    /// Print what the API answers, as JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: ApikeyCommand,
}

#[derive(Debug, Subcommand)]
enum ApikeyCommand {
    /// Make a key, and print it: it cannot be printed again
    Create {
        /// A name for it
        name: String,
        /// Name of the user whom it acts for [default: whoever makes it]
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
        #[command(flatten)]
        quota: QuotaArgs,
    },
    /// List keys
    List,
    /// Revoke keys: the next request with one is refused
    Revoke {
        /// Their ids
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

/// How much the sandboxes that are made with the key may have together; 0 is no limit.
#[derive(Debug, Args)]
struct QuotaArgs {
    /// How many of its sandboxes may run
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    sandboxes: u32,
    /// How many vCPUs those may have
    #[arg(long, value_name = "COUNT", default_value_t = 0)]
    vcpus: u32,
    /// How much memory those may have
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    memory_mb: u64,
    /// How large the disks of all of its sandboxes may be
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    disk_mb: u64,
}

/// Does what the command line says. The error is a sentence.
///
/// # Errors
/// It was not done.
pub fn apikey(args: ApikeyArgs) -> Result<ExitCode, String> {
    block_on(run(args))
}

async fn run(args: ApikeyArgs) -> Result<ExitCode, CliError> {
    let client = Client::new(&args.host)?;
    match args.command {
        ApikeyCommand::Create { name, user, quota } => {
            let quota = json!({
                "sandboxes": quota.sandboxes,
                "vcpus": quota.vcpus,
                "memory_mb": quota.memory_mb,
                "disk_mb": quota.disk_mb,
            });
            let request = json!({"name": name, "user": user, "quota": quota});
            let made = client.call_with("POST", "/v1/api-keys", &request).await?;
            print(&made, args.json, |made| {
                let key = made["key"].as_str().unwrap_or_default();
                format!("{key}\n")
            })?;
        }
        ApikeyCommand::List => {
            let list = client.call("GET", "/v1/api-keys").await?;
            print(&list, args.json, keys)?;
        }
        ApikeyCommand::Revoke { ids } => {
            for id in ids {
                let path = format!("/v1/api-keys/{}", encode(&id));
                client.call("DELETE", &path).await?;
                say(&format!("API key {id} revoked"));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn keys(list: &Value) -> String {
    let head = ["ID", "NAME", "PREFIX", "USER", "CREATED", "LAST USED"];
    let keys = list.as_array().into_iter().flatten();
    let rows = keys.map(|key| {
        ["id", "name", "prefix", "user", "created_at", "last_used_at"]
            .map(|field| table::text(&key[field]))
    });
    table::columns(head, rows)
}
