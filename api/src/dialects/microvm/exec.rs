//! Commands.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::{AtVm, wrong};
use super::body::{FromFields, parse};
use super::error::{ApiError, ErrorBody};
use super::extract::Path;
use super::fields::Fields;
use super::rfc3339;
use super::vms::running;
use crate::dialects::output::{self, Encoding};
use crate::domain::{Command, ExecEnd, ExecOutput, Manager, check_path};
use crate::http::Caller;

/// How long a command may take unless it is asked for, in seconds.
pub const DEFAULT_TIMEOUT_SEC: i64 = 30;
/// How long one may take, in seconds.
pub const TIMEOUT_SEC: RangeInclusive<i64> = 1..=3600;
/// The exit status of a command that was killed.
const KILLED: i32 = 137;

/// A command to run.
#[derive(Debug, ToSchema)]
#[schema(as = ExecuteRequest)]
pub struct ExecuteRequest {
    /// For `sh -c`.
    #[schema(required)]
    pub command: String,
    /// Seconds after which it is killed with all its children, 1 to 3600.
    #[schema(default = 30, nullable = false)]
    pub timeout_seconds: Option<i64>,
    /// Its working directory, absolute; that of the template, or `/root`, if not given.
    #[schema(nullable = false)]
    pub working_directory: Option<String>,
    /// Variables to set, beside `PATH`, `HOME` and the like.
    #[schema(nullable = false)]
    pub environment: Option<BTreeMap<String, String>>,
}

impl FromFields for ExecuteRequest {
    fn read(fields: &mut Fields) -> Self {
        let command = fields.required("command", Fields::string);
        Self {
            command: command.unwrap_or_default(),
            timeout_seconds: fields.integer("timeout_seconds", TIMEOUT_SEC),
            working_directory: fields.checked("working_directory", check_path),
            environment: fields.variables("environment"),
        }
    }
}

/// What a command left behind.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExecuteResponse)]
pub struct ExecuteBody {
    /// Its exit status; 128 and the signal's number if a signal ended it.
    pub exit_code: i32,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Seconds from the request to its end.
    pub execution_time_seconds: f64,
    /// What was run.
    pub command: String,
    /// When it was asked for.
    #[schema(format = DateTime)]
    pub executed_at: String,
    /// `utf-8`, or, if one of the two is not text, `base64` for both.
    #[schema(inline)]
    pub encoding: Encoding,
}

/// Execute a command
///
/// By `sh -c`. One that outruns its timeout is killed with all its children; the answer is then 504,
/// and has the fields of the ordinary one beside `error` and `message`, with the output so far.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/execute", operation_id = "executeInVm", tag = "guest",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = ExecuteRequest,
    responses(
        (status = 200, description = "It has ended", body = ExecuteBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 413, description = "It wrote too much and was killed", body = ErrorBody),
        (status = 422, description = "Fields are wrong", body = ErrorBody),
        (status = 502, description = "The agent failed", body = ErrorBody),
        (status = 504, description = "It outran its timeout and was killed", body = ErrorBody),
    ),
)]
pub async fn execute(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: ExecuteRequest = parse(body)?;
    let timeout_sec = request.timeout_seconds.unwrap_or(DEFAULT_TIMEOUT_SEC);
    let executed_at = rfc3339(Timestamp::now());
    let output = run(
        &caller.manager,
        &name,
        &request.command,
        timeout_sec,
        request.working_directory,
        request.environment.unwrap_or_default(),
    )
    .await?;
    let (status, exit_code, error) = end_of(&output, timeout_sec);
    let (error, message) = error.unzip();
    let head = Head {
        error,
        message,
        exit_code,
        execution_time_seconds: output.duration.as_secs_f64(),
        command: &request.command,
        executed_at,
        encoding: output::encoding(&output.stdout, &output.stderr),
    };
    answer(status, &head, output)
}

/// Runs a command by `sh -c` in a machine that runs.
pub async fn run(
    manager: &Manager,
    name: &str,
    command: &str,
    timeout_sec: i64,
    cwd: Option<String>,
    env: BTreeMap<String, String>,
) -> Result<ExecOutput, ApiError> {
    if command.is_empty() {
        return Err(wrong("command", "is required"));
    }
    let in_use = running(manager, name).await?;
    let command = Command {
        argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), command.to_owned()],
        env,
        cwd,
        timeout_sec,
    };
    let output = manager.exec(&in_use, command).await;
    output.map_err(|error| error.at_vm(name))
}

/// The status of the answer, the command's exit status, and what went wrong.
pub fn end_of(
    output: &ExecOutput,
    timeout_sec: i64,
) -> (StatusCode, i32, Option<(&'static str, String)>) {
    match output.end {
        ExecEnd::Exited(code) => (StatusCode::OK, code, None),
        ExecEnd::TimedOut => {
            let message = format!(
                "The command did not end within {timeout_sec} s and was killed; what it wrote so \
                 far is here"
            );
            (
                StatusCode::GATEWAY_TIMEOUT,
                KILLED,
                Some(("timeout", message)),
            )
        }
        ExecEnd::TooMuchOutput => {
            let message = "The command wrote more than is kept and was killed; let it write to a \
                           file, and download that"
                .to_owned();
            (
                StatusCode::PAYLOAD_TOO_LARGE,
                KILLED,
                Some(("payload_too_large", message)),
            )
        }
        ExecEnd::NoRoom => {
            let message =
                "The command wrote more than there is room for and was killed, since answers to \
                           other commands have not been read yet; read them first"
                    .to_owned();
            (
                StatusCode::TOO_MANY_REQUESTS,
                KILLED,
                Some(("rate_limit_exceeded", message)),
            )
        }
    }
}

/// The fields of an answer that are short.
#[derive(Serialize)]
struct Head<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<String>,
    exit_code: i32,
    execution_time_seconds: f64,
    command: &'a str,
    executed_at: String,
    encoding: Encoding,
}

/// An answer of these fields and the output.
pub fn answer(
    status: StatusCode,
    head: &impl Serialize,
    output: ExecOutput,
) -> Result<Response, ApiError> {
    let body = output::body(head, output.stdout, output.stderr);
    let body = body.map_err(|error| ApiError::internal(&error))?;
    Ok((status, [(header::CONTENT_TYPE, "application/json")], body).into_response())
}
