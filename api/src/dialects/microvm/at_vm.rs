//! Errors of the domain at a virtual machine, in the words of this dialect.
//!
//! Beside those of [`ApiError`]: 416 `range_not_satisfiable` for a file that has no such bytes, 502
//! `agent_error` for a machine or agent that failed, and 504 `timeout` for a command that outran its
//! timeout.

use axum::http::StatusCode;
use tracing::warn;

use super::error::{ApiError, FieldError};
use super::vms::word_at;
use crate::chain;
use crate::domain::{
    AddressError, CollectError, CreateError, DestroyError, ExecError, FileError, HostError,
    LookupError, NetworkChangeError, PowerError, Problem, SnapshotError, Standing,
};

impl From<Problem> for FieldError {
    fn from(problem: Problem) -> Self {
        Self::new(problem.field, problem.sentence)
    }
}

/// There is no such virtual machine.
pub fn no_vm(name: &str) -> ApiError {
    ApiError::not_found(format!("VM '{name}' not found"))
}

/// One field of the body is wrong.
pub fn wrong(field: &str, error: impl Into<String>) -> ApiError {
    ApiError::validation(&[FieldError::new(field, error)], 0)
}

/// The upload or output is too large.
pub fn too_large(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", message)
}

/// The machine or its agent failed.
fn agent(message: impl Into<String>) -> ApiError {
    let message = message.into();
    warn!(reason = message, "request failed");
    ApiError::new(StatusCode::BAD_GATEWAY, "agent_error", message)
}

/// An error of the host at a running machine.
pub fn of_host(source: HostError) -> ApiError {
    let text = source.to_string();
    match source {
        HostError::FileNotFound { .. } => ApiError::not_found(text),
        HostError::Invalid { .. } | HostError::Upload { .. } => ApiError::bad_request(text),
        HostError::NotRunning { .. } => ApiError::conflict(text),
        _ if source.is_interruption() => ApiError::conflict(text),
        HostError::Internal { .. } => ApiError::internal(&source),
        _ => agent(text),
    }
}

/// An error at a virtual machine that was called `name`.
pub trait AtVm {
    /// In the words of this dialect.
    fn at_vm(self, name: &str) -> ApiError;
}

impl AtVm for LookupError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::NotFound => no_vm(name),
            Self::Store(source) => source.into(),
        }
    }
}

impl AtVm for CreateError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            // Waiting does not help.
            Self::Quota(source) => ApiError::too_many(source.to_string(), None),
            Self::Invalid(sentence) => wrong("body", sentence),
            Self::NameTaken(name) => ApiError::conflict(format!("VM '{name}' already exists")),
            Self::TemplateNotReady { .. } => ApiError::conflict(self.to_string()),
            Self::ShuttingDown => ApiError::unavailable(self.to_string()),
            Self::Address(source @ AddressError::OutOfRange { .. }) => {
                wrong("network_config.ip", source.to_string())
            }
            Self::Address(source) => ApiError::conflict(source.to_string()),
            Self::Store(source) => source.into(),
            Self::Interrupted | Self::Describe(_) => ApiError::internal(&self),
            Self::Host { id, source } => {
                let name = if name.is_empty() { id.as_str() } else { name };
                agent(format!("VM '{name}' did not start: {source}"))
            }
            Self::EndedAtOnce { .. } => agent(self.to_string()),
        }
    }
}

impl AtVm for PowerError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::NoSnapshot => ApiError::not_found(format!("VM '{name}' has no such snapshot")),
            Self::WrongState {
                verb,
                standing,
                needed,
            } => {
                let needed = match needed {
                    "off" => "created or stopped",
                    "running, paused or off" => "running, paused or stopped",
                    other => other,
                };
                let word = word_at(standing);
                ApiError::conflict(format!(
                    "VM '{name}' is {word} and cannot be {verb}: it must be {needed}"
                ))
            }
            Self::TooManyLayers(_) => ApiError::conflict(self.to_string()),
            Self::ShuttingDown => ApiError::unavailable(self.to_string()),
            Self::NotStarted(source) => source.at_vm(name),
            Self::Host { .. } | Self::Interrupted => ApiError::internal(&self),
        }
    }
}

impl AtVm for DestroyError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::Host(_) | Self::Interrupted => ApiError::internal(&self),
        }
    }
}

impl AtVm for ExecError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::NotRunning(standing) => not_running(name, standing),
            Self::Invalid(sentence) => wrong("command", sentence),
            Self::Host(source) => of_host(source),
            Self::Collect(CollectError::Host(source)) if source.is_interruption() => {
                of_host(source)
            }
            Self::Collect(source) => agent(chain(&source)),
        }
    }
}

impl AtVm for FileError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::NotRunning(standing) => not_running(name, standing),
            Self::Invalid(sentence) => ApiError::bad_parameter("path", sentence),
            Self::Host(source) => of_host(source),
        }
    }
}

impl AtVm for SnapshotError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Quota(source) => ApiError::too_many(source.to_string(), None),
            Self::Lookup(source) => source.at_vm(name),
            Self::NotFound => ApiError::not_found("Snapshot not found"),
            Self::Invalid(sentence) => wrong("name", sentence),
            Self::NameTaken(snapshot) => ApiError::conflict(format!(
                "Snapshot '{snapshot}' of VM '{name}' already exists"
            )),
            Self::NotSaveable(standing) => {
                let word = word_at(standing);
                ApiError::conflict(format!(
                    "VM '{name}' is {word} and has nothing to snapshot: it must be running or \
                     paused, or stopped after it has run"
                ))
            }
            Self::NameOfTemplate(_)
            | Self::TooManyLayers(_)
            | Self::Address(_)
            | Self::NotAtRest => ApiError::conflict(self.to_string()),
            Self::Host(HostError::NotSaved { reason, .. }) => {
                agent(format!("no snapshot could be taken: {reason}"))
            }
            Self::Host(source) => of_host(source),
            Self::Interrupted => ApiError::internal(&self),
        }
    }
}

impl AtVm for NetworkChangeError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::Invalid(sentence) => wrong("body", sentence),
            Self::WrongState(standing) => {
                let word = word_at(standing);
                ApiError::conflict(format!(
                    "the network of VM '{name}' cannot be changed while it is {word}"
                ))
            }
            Self::NoNetwork | Self::PortTaken { .. } | Self::TooManyForwards(_) => {
                ApiError::conflict(self.to_string())
            }
            Self::NoForward => ApiError::not_found(format!("VM '{name}' has no such port forward")),
            Self::Host(HostError::PortInUse { reason }) => ApiError::conflict(reason),
            Self::Host(source) => of_host(source),
            Self::Interrupted => ApiError::internal(&self),
        }
    }
}

/// It does not run, which it must.
pub fn not_running(name: &str, standing: Standing) -> ApiError {
    let word = word_at(standing);
    ApiError::conflict(format!(
        "VM '{name}' is {word}; it must be running for this"
    ))
}
