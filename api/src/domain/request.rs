//! Requests and what makes them acceptable. A refusal is a sentence for whoever asked.

use std::collections::BTreeMap;

use super::build::{BuildFrom, BuildSpec, Recipe};
use super::host::{ExecRequest, HostInfo};
use super::id::SandboxId;
use super::network::{AddressError, Connection, Egress, NetworkSpec, RateLimits};
use super::resources::Resources;
use super::sandbox::Spec;
use super::template::{DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Readiness, Settings};

/// The most vCPUs of one sandbox: what the VMM can build.
pub const MAX_VCPUS: i64 = 32;
/// The least RAM of one sandbox in MiB: what a kernel, an initramfs and a small program need.
pub const MIN_MEMORY_MB: i64 = 128;
/// The most RAM of one sandbox in MiB: what the VMM can build.
pub const MAX_MEMORY_MB: i64 = 1 << 20;
/// The longest idle time of one sandbox in seconds: 30 days.
const MAX_TIMEOUT_SEC: i64 = 30 * 24 * 3600;
/// The longest time of one command in seconds: a day.
pub const MAX_EXEC_TIMEOUT_SEC: i64 = 24 * 3600;
/// The most sandboxes of one fork.
const MAX_FORKS: i64 = 100;
/// The longest time of a readiness command in seconds: an hour.
const MAX_READINESS_SEC: i64 = 3600;
/// The most steps of a recipe.
const MAX_STEPS: usize = 1000;
/// The most environment of a template, in bytes.
const MAX_ENV: usize = 64 * 1024;
/// The least disk of a template that brings its own, in MiB: what ext4 with a journal needs.
const MIN_DISK_MB: i64 = 16;
/// The most disk of such a template, in MiB: 1 TiB.
const MAX_DISK_MB: i64 = 1 << 20;
/// The longest description of a snapshot in bytes.
const MAX_DESCRIPTION: usize = 4096;
/// The longest tag of a process in bytes.
const MAX_TAG: usize = 128;
/// The longest path in the guest in bytes: `PATH_MAX` of Linux, with its final zero byte.
const MAX_PATH: usize = 4095;

/// A sandbox as it is asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateSpec {
    /// Template.
    pub template: String,
    /// Virtual CPUs; `None` for what the template says.
    pub vcpus: Option<i64>,
    /// RAM in MiB; `None` for what the template says.
    pub memory_mb: Option<i64>,
    /// Idle time in seconds.
    pub timeout_sec: i64,
    /// How it shall be connected.
    pub network: NetworkSpec,
    /// A name for it.
    pub name: Option<String>,
    /// Size of its disk in MiB; `None` for that of its template.
    pub disk_mb: Option<i64>,
    /// Whether its disk is kept when it ends otherwise than by being deleted.
    pub is_kept: bool,
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
    /// Whether the name is one among those of its sandbox's snapshots only.
    pub is_own: bool,
    /// Whether it replaces the one that has the name, once it is taken.
    pub overwrite: bool,
}

impl Default for SnapshotSpec {
    fn default() -> Self {
        Self {
            name: None,
            description: None,
            include_memory: true,
            is_own: false,
            overwrite: false,
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

/// Something that is wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Of what it is wrong.
    pub field: &'static str,
    /// What is wrong, as a sentence.
    pub sentence: String,
}

/// All that is wrong with the sandbox that is asked for, of a template with these settings, on `host`;
/// but for its template.
pub fn problems(spec: &CreateSpec, settings: &Settings, host: &HostInfo) -> Vec<Problem> {
    let good = CreateSpec {
        template: spec.template.clone(),
        vcpus: None,
        memory_mb: None,
        timeout_sec: 0,
        network: NetworkSpec::default(),
        name: None,
        disk_mb: None,
        is_kept: spec.is_kept,
    };
    // Each thing that is asked for, alone.
    let each = [
        (
            "vcpus",
            CreateSpec {
                vcpus: spec.vcpus,
                ..good.clone()
            },
        ),
        (
            "memory_mb",
            CreateSpec {
                memory_mb: spec.memory_mb,
                ..good.clone()
            },
        ),
        (
            "timeout_sec",
            CreateSpec {
                timeout_sec: spec.timeout_sec,
                ..good.clone()
            },
        ),
        (
            "network",
            CreateSpec {
                network: spec.network.clone(),
                ..good.clone()
            },
        ),
        (
            "disk_mb",
            CreateSpec {
                disk_mb: spec.disk_mb,
                ..good
            },
        ),
    ];
    let name = spec.name.as_deref().map(check_name);
    let name = name
        .and_then(Result::err)
        .map(|sentence| ("name", sentence));
    let others = each.into_iter().filter_map(|(field, alone)| {
        let checked = check_spec(alone, settings, host);
        checked.err().map(|sentence| (field, sentence))
    });
    name.into_iter()
        .chain(others)
        .map(|(field, sentence)| Problem { field, sentence })
        .collect()
}

/// Checks the name of a sandbox.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(allowed) {
        Err("name must be 1 to 64 letters, digits, `_` or `-`".to_owned())
    } else if name.parse::<SandboxId>().is_ok() {
        Err("name must not look like the id of a sandbox".to_owned())
    } else {
        Ok(())
    }
}

/// Checks the name of a template.
pub fn check_template_name(name: &str) -> Result<(), String> {
    if is_name(name) {
        Ok(())
    } else {
        Err(bad_name("template"))
    }
}

/// What to say of a template that there is not; `known` are those that there are.
pub fn unknown_template(name: &str, known: &[String]) -> String {
    let known = if known.is_empty() {
        "this host has none".to_owned()
    } else {
        format!("known are: {}", known.join(", "))
    };
    format!("unknown template {name:?}; {known}")
}

/// The sandbox that is asked for, of a template with these settings, if `host` can run it.
pub fn check_spec(spec: CreateSpec, settings: &Settings, host: &HostInfo) -> Result<Spec, String> {
    let vcpus = settings.vcpus.unwrap_or(DEFAULT_VCPUS).into();
    let memory_mb = settings.memory_mb.unwrap_or(DEFAULT_MEMORY_MB).into();
    Ok(Spec {
        template: spec.template,
        vcpus: check_vcpus(spec.vcpus.unwrap_or(vcpus))?,
        memory_mb: check_memory(spec.memory_mb.unwrap_or(memory_mb), host)?,
        timeout_sec: in_range(
            "timeout_sec",
            spec.timeout_sec,
            0,
            MAX_TIMEOUT_SEC,
            " (seconds, 0 is never)",
        )?,
        network: check_network(spec.network, host)?,
        disk_mb: spec.disk_mb.map(check_disk).transpose()?,
        resources: Resources::default(),
    })
}

/// How the sandbox that is asked for is connected on `host`; not at all, if that has no network.
fn check_network(spec: NetworkSpec, host: &HostInfo) -> Result<Option<Connection>, String> {
    let network = match host.network(spec.name.as_deref()) {
        Ok(network) => network,
        Err(AddressError::NoNetwork) if asks_for_none(&spec) => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let is_first = host.networks.first() == Some(network);
    let egress = match spec.egress {
        Some(egress) => egress.check().map_err(|error| error.to_string())?,
        None => network.default_egress.clone(),
    };
    Ok(Some(Connection {
        network: spec.name.filter(|_| !is_first),
        egress,
        rate_limits: spec.rate_limits.check()?,
    }))
}

fn asks_for_none(spec: &NetworkSpec) -> bool {
    matches!(spec.egress, None | Some(Egress::None))
        && spec.name.is_none()
        && spec.address.is_none()
        && spec.rate_limits == RateLimits::default()
}

/// Checks how many vCPUs a sandbox is to have.
pub fn check_vcpus(vcpus: i64) -> Result<u8, String> {
    in_range("vcpus", vcpus, 1, MAX_VCPUS, "")
}

/// Checks how much memory a sandbox on `host` is to have.
pub fn check_memory(memory_mb: i64, host: &HostInfo) -> Result<u32, String> {
    let host_mb = i64::try_from(host.memory_mb)
        .unwrap_or(i64::MAX)
        .min(MAX_MEMORY_MB);
    in_range("memory_mb", memory_mb, MIN_MEMORY_MB, host_mb, " (MiB)")
}

/// The settings of a template as they are asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SettingsSpec {
    /// Virtual CPUs.
    pub vcpus: Option<i64>,
    /// RAM in MiB.
    pub memory_mb: Option<i64>,
    /// Program and arguments that must succeed, and seconds in which they must.
    pub readiness: Option<(Vec<String>, i64)>,
    /// Environment of commands.
    pub env: BTreeMap<String, String>,
    /// Working directory of commands.
    pub cwd: Option<String>,
}

/// The settings that are asked for, if `host` can run such sandboxes.
pub fn check_settings(spec: SettingsSpec, host: &HostInfo) -> Result<Settings, String> {
    let readiness = match spec.readiness {
        Some((argv, timeout_sec)) => {
            let what = "readiness.timeout_sec";
            let timeout_sec = in_range(what, timeout_sec, 1, MAX_READINESS_SEC, " (seconds)")?;
            check_argv(&argv).map_err(|problem| format!("readiness: {problem}"))?;
            Some(Readiness { argv, timeout_sec })
        }
        None => None,
    };
    check_env(&spec.env)?;
    if let Some(cwd) = &spec.cwd {
        check_path(cwd).map_err(|problem| format!("cwd: {problem}"))?;
    }
    Ok(Settings {
        vcpus: spec.vcpus.map(check_vcpus).transpose()?,
        memory_mb: spec
            .memory_mb
            .map(|memory_mb| check_memory(memory_mb, host))
            .transpose()?,
        readiness,
        env: spec.env,
        cwd: spec.cwd,
        ..Settings::default()
    })
}

/// Checks environment variables.
pub fn check_env(env: &BTreeMap<String, String>) -> Result<(), String> {
    let bytes: usize = env
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if bytes > MAX_ENV {
        return Err(format!("env has {bytes} bytes; at most {MAX_ENV} are kept"));
    }
    match env
        .iter()
        .find(|(name, value)| name.is_empty() || name.contains(['=', '\0']) || value.contains('\0'))
    {
        Some((name, _)) => Err(format!(
            "env: {name:?} must have a name without `=`, and no zero byte"
        )),
        None => Ok(()),
    }
}

/// Checks a template that is to be built, but for what its archive holds.
pub fn check_build(spec: &BuildSpec) -> Result<(), String> {
    if !is_name(&spec.name) {
        return Err(bad_name("name"));
    }
    match &spec.from {
        BuildFrom::Sandbox(_) => Ok(()),
        BuildFrom::Recipe(recipe) => check_recipe(recipe),
        BuildFrom::Oci { disk_mb, .. } => {
            check_disk(*disk_mb)?;
            Ok(())
        }
    }
}

/// The size of a disk, in MiB.
pub fn check_disk(disk_mb: i64) -> Result<u32, String> {
    in_range("disk_mb", disk_mb, MIN_DISK_MB, MAX_DISK_MB, " (MiB)")
}

fn check_recipe(recipe: &Recipe) -> Result<(), String> {
    check_template_name(&recipe.base).map_err(|_| bad_name("recipe.base"))?;
    if recipe.steps.len() > MAX_STEPS {
        let count = recipe.steps.len();
        return Err(format!(
            "the recipe has {count} steps; at most {MAX_STEPS} are run"
        ));
    }
    for (index, step) in recipe.steps.iter().enumerate() {
        let number = index + 1;
        if step.run.trim().is_empty() || step.run.contains('\0') {
            return Err(format!(
                "step {number} must be a command without zero bytes"
            ));
        }
        step_timeout(step.timeout_sec).map_err(|problem| format!("step {number}: {problem}"))?;
    }
    Ok(())
}

/// How long a step may take, in seconds.
pub fn step_timeout(timeout_sec: i64) -> Result<u32, String> {
    in_range(
        "timeout_sec",
        timeout_sec,
        1,
        MAX_EXEC_TIMEOUT_SEC,
        " (seconds)",
    )
}

fn check_argv(argv: &[String]) -> Result<(), String> {
    if argv.first().is_none_or(String::is_empty) {
        return Err("cmd is required".to_owned());
    }
    if argv.iter().any(|arg| arg.contains('\0')) {
        return Err("cmd and args must not contain a zero byte".to_owned());
    }
    Ok(())
}

/// The command that is asked for, in a sandbox of a template with these settings.
pub fn check_command(command: Command, settings: &Settings) -> Result<ExecRequest, String> {
    check_argv(&command.argv)?;
    for (name, value) in &command.env {
        check_variable(name, value)?;
    }
    if let Some(cwd) = &command.cwd {
        check_path(cwd).map_err(|problem| problem.replacen("path", "cwd", 1))?;
    }
    // What is given with the command comes before what the template has.
    let mut env = settings.env.clone();
    env.extend(command.env);
    let timeout_sec = in_range(
        "timeout_sec",
        command.timeout_sec,
        1,
        MAX_EXEC_TIMEOUT_SEC,
        " (seconds)",
    )?;
    Ok(ExecRequest {
        argv: command.argv,
        env,
        cwd: command.cwd.or_else(|| settings.cwd.clone()),
        timeout_sec,
    })
}

/// Checks a variable of a command's environment.
pub fn check_variable(name: &str, value: &str) -> Result<(), String> {
    if name.is_empty() || name.contains(['=', '\0']) {
        return Err(format!(
            "the name of a variable must have a character, and neither `=` nor a zero byte, \
             unlike {name:?}"
        ));
    }
    match value.contains('\0') {
        true => Err(format!("the variable {name} must not contain a zero byte")),
        false => Ok(()),
    }
}

/// Checks the tag of a process.
pub fn check_tag(tag: &str) -> Result<(), String> {
    if tag.is_empty() || tag.len() > MAX_TAG {
        Err(format!("tag must be 1 to {MAX_TAG} bytes long"))
    } else if tag.chars().any(char::is_control) {
        Err("tag must not contain control characters".to_owned())
    } else if tag.bytes().all(|byte| byte.is_ascii_digit()) {
        Err("tag must not be a number, for it would be taken for a process id".to_owned())
    } else {
        Ok(())
    }
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
    if let Some(name) = &spec.name {
        check_snapshot_name(name)?;
    }
    if let Some(text) = &spec.description {
        check_snapshot_description(text)?;
    }
    Ok(())
}

/// Checks the name of a snapshot.
pub fn check_snapshot_name(name: &str) -> Result<(), String> {
    match is_name(name) {
        true => Ok(()),
        false => Err(bad_name("name")),
    }
}

/// Checks what is said of a snapshot.
pub fn check_snapshot_description(text: &str) -> Result<(), String> {
    match text.len() > MAX_DESCRIPTION {
        true => Err(format!(
            "description has {} bytes; at most {MAX_DESCRIPTION} are kept",
            text.len()
        )),
        false => Ok(()),
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
pub(super) fn in_range<T: TryFrom<i64>>(
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
