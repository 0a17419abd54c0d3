//! Errors of the domain as statuses and codes.
//!
//! | Status | Code | When |
//! |---|---|---|
//! | 400 | `invalid_request` | the request makes no sense |
//! | 404 | `not_found` | no such sandbox, snapshot, template or file |
//! | 408 | `request_timeout` | the body came too slowly |
//! | 409 | `invalid_state` | the sandbox's status does not allow it, or it was paused in the midst |
//! | 409 | `conflict` | it clashes with what is there, such as a name that is taken, or a template that is in use |
//! | 413 | `too_large` | the upload is too large |
//! | 500 | `db_error` | the daemon's records cannot be read or written |
//! | 500 | `internal_error` | the daemon itself failed |
//! | 502 | `agent_error` | the sandbox, its VMM or its agent failed |
//! | 503 | `host_unavailable` | the daemon is shutting down |

use axum::body::Bytes;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;
use tracing::{error, warn};

use crate::chain;
use crate::dialects::brief;
use crate::domain::{
    AddressError, CollectError, CreateError, DestroyError, ExecError, FileError, ForkError,
    HostError, LookupError, NetworkChangeError, PauseError, QuotaExceeded, ResumeError,
    SnapshotError, StoreError, TemplateError,
};
use crate::http::error_response;

/// An error as this dialect tells it.
#[derive(Debug)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// For programs.
    pub code: &'static str,
    /// For people.
    pub message: String,
}

impl ApiError {
    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// The sandbox's status does not allow it.
    pub fn state(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "invalid_state", message)
    }

    /// It clashes with what is there.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// Who asks may not.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// The upload is too large.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// The sandbox, its VMM or its agent failed.
    pub fn agent(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "agent_error", message)
    }

    /// The daemon is ending.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "host_unavailable", message)
    }

    /// The daemon itself failed.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: brief::message(message.into()),
        }
    }

    /// A host's error in the midst of an operation on a running sandbox.
    pub(super) fn host(source: HostError) -> Self {
        let text = source.to_string();
        match source {
            HostError::FileNotFound { .. } => Self::new(StatusCode::NOT_FOUND, "not_found", text),
            HostError::NoProcess { .. } => Self::new(StatusCode::NOT_FOUND, "not_found", text),
            HostError::Conflict { .. } => Self::conflict(text),
            HostError::Invalid { .. } | HostError::Upload { .. } => Self::invalid(text),
            _ if source.is_interruption() => Self::state(text),
            _ => Self::agent(text),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            warn!(code = self.code, reason = self.message, "request failed");
        }
        error_response(self.status, self.code, self.message)
    }
}

impl From<StoreError> for ApiError {
    fn from(source: StoreError) -> Self {
        // The cause names files of the host, which are none of the caller's business.
        error!(error = chain(&source), "store failed");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "db_error",
            "the daemon's records cannot be read or written; its log says why",
        )
    }
}

impl From<LookupError> for ApiError {
    fn from(source: LookupError) -> Self {
        match source {
            LookupError::NotFound => {
                Self::new(StatusCode::NOT_FOUND, "not_found", source.to_string())
            }
            LookupError::Store(source) => source.into(),
        }
    }
}

impl From<QuotaExceeded> for ApiError {
    fn from(source: QuotaExceeded) -> Self {
        let status = StatusCode::TOO_MANY_REQUESTS;
        Self::new(status, "quota_exceeded", source.to_string())
    }
}

impl From<CreateError> for ApiError {
    fn from(source: CreateError) -> Self {
        match source {
            CreateError::Quota(source) => source.into(),
            CreateError::Invalid(message) => Self::invalid(message),
            CreateError::TemplateNotReady { .. } => Self::state(source.to_string()),
            CreateError::ShuttingDown => Self::unavailable(source.to_string()),
            CreateError::Address(source) => source.into(),
            CreateError::NameTaken(_) => Self::conflict(source.to_string()),
            CreateError::Store(source) => source.into(),
            CreateError::Interrupted => Self::internal(source.to_string()),
            CreateError::Host { .. }
            | CreateError::Describe(_)
            | CreateError::EndedAtOnce { .. } => Self::agent(chain(&source)),
        }
    }
}

impl From<AddressError> for ApiError {
    fn from(source: AddressError) -> Self {
        match source {
            AddressError::OutOfRange { .. } | AddressError::UnknownNetwork { .. } => {
                Self::invalid(source.to_string())
            }
            AddressError::Taken(_) | AddressError::Exhausted(..) | AddressError::NoNetwork => {
                Self::conflict(source.to_string())
            }
        }
    }
}

impl From<NetworkChangeError> for ApiError {
    fn from(source: NetworkChangeError) -> Self {
        match source {
            NetworkChangeError::Lookup(source) => source.into(),
            NetworkChangeError::Invalid(message) => Self::invalid(message),
            NetworkChangeError::WrongState(_) => Self::state(source.to_string()),
            NetworkChangeError::NoNetwork
            | NetworkChangeError::PortTaken { .. }
            | NetworkChangeError::TooManyForwards(_)
            | NetworkChangeError::Host(HostError::PortInUse { .. }) => {
                Self::conflict(last_of(&source))
            }
            NetworkChangeError::NoForward => {
                Self::new(StatusCode::NOT_FOUND, "not_found", source.to_string())
            }
            NetworkChangeError::Host(source @ HostError::NotRunning { .. }) => {
                Self::state(source.to_string())
            }
            NetworkChangeError::Host(source) => Self::host(source),
            NetworkChangeError::Interrupted => Self::internal(source.to_string()),
        }
    }
}

/// The sentence of the last cause, which says what was wrong.
fn last_of(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

impl From<DestroyError> for ApiError {
    fn from(source: DestroyError) -> Self {
        match source {
            DestroyError::Lookup(source) => source.into(),
            DestroyError::Host(_) => Self::agent(chain(&source)),
            DestroyError::Interrupted => Self::internal(source.to_string()),
        }
    }
}

impl From<PauseError> for ApiError {
    fn from(source: PauseError) -> Self {
        match source {
            PauseError::Lookup(source) => source.into(),
            PauseError::NotRunning(_) => Self::state(source.to_string()),
            PauseError::TooManyLayers(_) => Self::conflict(source.to_string()),
            PauseError::Host(_) => Self::agent(chain(&source)),
            PauseError::Interrupted => Self::internal(source.to_string()),
        }
    }
}

impl From<ResumeError> for ApiError {
    fn from(source: ResumeError) -> Self {
        match source {
            ResumeError::Quota(source) => source.into(),
            ResumeError::Lookup(source) => source.into(),
            ResumeError::NotPaused(_) => Self::state(source.to_string()),
            ResumeError::ShuttingDown => Self::unavailable(source.to_string()),
            ResumeError::Host(_) | ResumeError::EndedAtOnce { .. } => Self::agent(chain(&source)),
            ResumeError::Interrupted => Self::internal(source.to_string()),
        }
    }
}

impl From<SnapshotError> for ApiError {
    fn from(source: SnapshotError) -> Self {
        match source {
            SnapshotError::Quota(source) => source.into(),
            SnapshotError::Lookup(source) => source.into(),
            SnapshotError::NotFound => {
                Self::new(StatusCode::NOT_FOUND, "not_found", source.to_string())
            }
            SnapshotError::Invalid(message) => Self::invalid(message),
            SnapshotError::NotSaveable(_) => Self::state(source.to_string()),
            SnapshotError::Address(source) => source.into(),
            SnapshotError::NameTaken(_)
            | SnapshotError::NameOfTemplate(_)
            | SnapshotError::TooManyLayers(_) => Self::conflict(source.to_string()),
            SnapshotError::Host(_) | SnapshotError::NotAtRest => Self::agent(chain(&source)),
            SnapshotError::Interrupted => Self::internal(source.to_string()),
        }
    }
}

impl From<ForkError> for ApiError {
    fn from(source: ForkError) -> Self {
        match source {
            ForkError::Invalid(message) => Self::invalid(message),
            ForkError::ShuttingDown => Self::unavailable(source.to_string()),
            ForkError::Snapshot(source) => source.into(),
            ForkError::Interrupted => Self::internal(source.to_string()),
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(source: TemplateError) -> Self {
        let text = source.to_string();
        match source {
            TemplateError::Lookup(source) => source.into(),
            TemplateError::NotFound => Self::new(StatusCode::NOT_FOUND, "not_found", text),
            TemplateError::Invalid(_) => Self::invalid(text),
            TemplateError::NotYours(_) => Self::new(StatusCode::FORBIDDEN, "forbidden", text),
            TemplateError::NotSaveable(_) => Self::state(text),
            TemplateError::NameTaken(_)
            | TemplateError::InUse { .. }
            | TemplateError::Image(_)
            | TemplateError::TooManyLayers(_) => Self::conflict(text),
            TemplateError::ShuttingDown => Self::unavailable(text),
            TemplateError::Host(_) => Self::agent(chain(&source)),
            TemplateError::Interrupted => Self::internal(text),
        }
    }
}

impl From<ExecError> for ApiError {
    fn from(source: ExecError) -> Self {
        match source {
            ExecError::Lookup(source) => source.into(),
            ExecError::NotRunning(_) => Self::state(source.to_string()),
            ExecError::Invalid(message) => Self::invalid(message),
            ExecError::Host(source) => Self::host(source),
            ExecError::Collect(CollectError::Host(source)) if source.is_interruption() => {
                Self::host(source)
            }
            ExecError::Collect(source) => Self::agent(chain(&source)),
        }
    }
}

impl From<FileError> for ApiError {
    fn from(source: FileError) -> Self {
        match source {
            FileError::Lookup(source) => source.into(),
            FileError::NotRunning(_) => Self::state(source.to_string()),
            FileError::Invalid(message) => Self::invalid(message),
            FileError::Host(source) => Self::host(source),
        }
    }
}

/// A JSON body. As in any JSON API of its time, the `Content-Type` does not matter, and neither
/// do unknown fields.
pub fn parse<T: DeserializeOwned>(body: Result<Bytes, impl IntoResponse>) -> Result<T, ApiError> {
    let body =
        body.map_err(|_| ApiError::too_large("the JSON body is larger than 1 MiB, or broke off"))?;
    let parsed = serde_json::from_slice(&body).map_err(|source| {
        // What follows the position is of no help to people.
        ApiError::invalid(format!("invalid JSON body: {source}"))
    })?;
    // A derived type also takes an array of its fields in their order, which nobody means.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(ApiError::invalid("invalid JSON body: expected an object"));
    }
    Ok(parsed)
}
