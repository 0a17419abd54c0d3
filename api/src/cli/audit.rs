//! `sandboxd audit verify`: checks the file itself, whether a daemon runs or not.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::audit::{self, AuditError};
use crate::chain;

/// Check the audit log.
#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(subcommand)]
    command: AuditCommand,
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Tell whether every record is as it was written
    ///
    /// Prints how many there are and the hash of the last one: keep it elsewhere, since what is
    /// missing at the end shows by it alone. The exit status is 1 if the log was changed.
    Verify {
        /// Data directory of the daemon
        #[arg(
            long,
            env = "SANDBOXD_DATA_DIR",
            value_name = "DIR",
            default_value = "/var/lib/microvm-sandbox"
        )]
        data_dir: PathBuf,
    },
}

/// Runs `sandboxd audit …`.
///
/// # Errors
/// The log cannot be read: why, for people.
pub fn audit(args: AuditArgs) -> Result<ExitCode, String> {
    let AuditCommand::Verify { data_dir } = args.command;
    let (text, status) = match audit::verify(&data_dir.join(audit::FILE)) {
        Ok(intact) => (
            format!("intact: {} records, last {}", intact.records, intact.last),
            ExitCode::SUCCESS,
        ),
        Err(AuditError::Broken(broken)) => (format!("BROKEN: {broken}"), ExitCode::FAILURE),
        Err(error) => return Err(chain(&error)),
    };
    writeln!(io::stdout(), "{text}").map_err(|error| error.to_string())?;
    Ok(status)
}
