//! Requests and what makes them acceptable. A refusal is a sentence for whoever asked.

use std::collections::BTreeMap;

use super::host::{ExecRequest, HostInfo};
use super::network::{AddressError, Connection, Egress, NetworkSpec, RateLimits};
use super::sandbox::Spec;

/// The most vCPUs of one sandbox: what the VMM can build.
const MAX_VCPUS: i64 = 32;
/// The least RAM of one sandbox in MiB: what a kernel, an initramfs and a small program need.
const MIN_MEMORY_MB: i64 = 128;
/// The most RAM of one sandbox in MiB: what the VMM can build.
const MAX_MEMORY_MB: i64 = 1 << 20;
/// The longest idle time of one sandbox in seconds: 30 days.
const MAX_TIMEOUT_SEC: i64 = 30 * 24 * 3600;
/// The longest time of one command in seconds: a day.
pub const MAX_EXEC_TIMEOUT_SEC: i64 = 24 * 3600;
/// The most sandboxes of one fork.
const MAX_FORKS: i64 = 100;
/// The longest description of a snapshot in bytes.
const MAX_DESCRIPTION: usize = 4096;
/// The longest path in the guest in bytes: `PATH_MAX` of Linux, with its final zero byte.
const MAX_PATH: usize = 4095;

/// A sandbox as it is asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSpec {
    /// Template.
    pub template: String,
    /// Virtual CPUs.
    pub vcpus: i64,
    /// RAM in MiB.
    pub memory_mb: i64,
    /// Idle time in seconds.
    pub timeout_sec: i64,
    /// How it shall be connected.
    pub network: NetworkSpec,
}

/// A snapshot as it is asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSpec {
    /// A name for it.
    pub name: Option<String>,
    /// What to say of it.
    pub description: Option<String>,
    /// Whether it has the memory, and so the processes, of the sandbox.
    pub include_memory: bool,
}

impl Default for SnapshotSpec {
    fn default() -> Self {
        Self {
            name: None,
            description: None,
            include_memory: true,
        }
    }
}

/// A command as it is asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables to set.
    pub env: BTreeMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// Seconds that it may take.
    pub timeout_sec: i64,
}

/// The sandbox that is asked for, if `host` can run it.
pub fn check_spec(spec: CreateSpec, host: &HostInfo) -> Result<Spec, String> {
    if !is_name(&spec.template) {
        return Err(bad_name("template"));
    }
    if !host.templates.contains(&spec.template) {
        let known = if host.templates.is_empty() {
            "this host has none".to_owned()
        } else {
            format!("known are: {}", host.templates.join(", "))
        };
        return Err(format!("unknown template {:?}; {known}", spec.template));
    }
    let host_mb = i64::try_from(host.memory_mb)
        .unwrap_or(i64::MAX)
        .min(MAX_MEMORY_MB);
    Ok(Spec {
        template: spec.template,
        vcpus: in_range("vcpus", spec.vcpus, 1, MAX_VCPUS, "")?,
        memory_mb: in_range(
            "memory_mb",
            spec.memory_mb,
            MIN_MEMORY_MB,
            host_mb,
            " (MiB)",
        )?,
        timeout_sec: in_range(
            "timeout_sec",
            spec.timeout_sec,
            0,
            MAX_TIMEOUT_SEC,
            " (seconds, 0 is never)",
        )?,
        network: check_network(spec.network, host)?,
    })
}

/// How the sandbox that is asked for is connected on `host`; not at all, if that has no network.
fn check_network(spec: NetworkSpec, host: &HostInfo) -> Result<Option<Connection>, String> {
    let Some(network) = &host.network else {
        let wants_none = matches!(spec.egress, None | Some(Egress::None));
        return if wants_none && spec.address.is_none() && spec.rate_limits == RateLimits::default()
        {
            Ok(None)
        } else {
            Err(AddressError::NoNetwork.to_string())
        };
    };
    let egress = match spec.egress {
        Some(egress) => egress.check().map_err(|error| error.to_string())?,
        None => network.default_egress.clone(),
    };
    Ok(Some(Connection {
        egress,
        rate_limits: spec.rate_limits.check()?,
    }))
}

/// The command that is asked for.
pub fn check_command(command: Command) -> Result<ExecRequest, String> {
    if command.argv.first().is_none_or(String::is_empty) {
        return Err("cmd is required".to_owned());
    }
    if command.argv.iter().any(|arg| arg.contains('\0')) {
        return Err("cmd and args must not contain a zero byte".to_owned());
    }
    for (name, value) in &command.env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(format!(
                "the name of a variable must have a character, and neither `=` nor a zero byte, \
                 unlike {name:?}"
            ));
        }
        if value.contains('\0') {
            return Err(format!("the variable {name} must not contain a zero byte"));
        }
    }
    if let Some(cwd) = &command.cwd {
        check_path(cwd).map_err(|problem| problem.replacen("path", "cwd", 1))?;
    }
    let timeout_sec = in_range(
        "timeout_sec",
        command.timeout_sec,
        1,
        MAX_EXEC_TIMEOUT_SEC,
        " (seconds)",
    )?;
    Ok(ExecRequest {
        argv: command.argv,
        env: command.env,
        cwd: command.cwd,
        timeout_sec,
    })
}

/// Checks the path of a file in a guest.
pub fn check_path(path: &str) -> Result<(), String> {
    let problem = if path.is_empty() {
        "path is required"
    } else if !path.starts_with('/') {
        "path must be absolute"
    } else if path.len() > MAX_PATH {
        "path is longer than 4095 bytes"
    } else if path.contains('\0') {
        "path must not contain a zero byte"
    } else {
        return Ok(());
    };
    Err(problem.to_owned())
}

/// Checks a snapshot as it is asked for.
pub fn check_snapshot(spec: &SnapshotSpec) -> Result<(), String> {
    if spec.name.as_deref().is_some_and(|name| !is_name(name)) {
        return Err(bad_name("name"));
    }
    match &spec.description {
        Some(text) if text.len() > MAX_DESCRIPTION => Err(format!(
            "description has {} bytes; at most {MAX_DESCRIPTION} are kept",
            text.len()
        )),
        _ => Ok(()),
    }
}

/// How many sandboxes are to be forked.
pub fn check_count(count: i64) -> Result<usize, String> {
    in_range("count", count, 1, MAX_FORKS, "")
}

fn bad_name(what: &str) -> String {
    format!(
        "{what} must be 1 to 64 letters, digits, `.`, `_` or `-`, and begin with a letter or digit"
    )
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= 64
        && name.bytes().all(allowed)
        && name
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
}

/// `value`, if it is in the range; otherwise a sentence that says so.
fn in_range<T: TryFrom<i64>>(
    what: &str,
    value: i64,
    min: i64,
    max: i64,
    unit: &str,
) -> Result<T, String> {
    let checked = if (min..=max).contains(&value) {
        T::try_from(value).ok()
    } else {
        None
    };
    checked.ok_or_else(|| format!("{what} must be {min} to {max}{unit}, not {value}"))
}
