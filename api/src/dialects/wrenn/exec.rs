//! Execute a command.

use std::collections::BTreeMap;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, parse};
use super::extract::Path;
use super::processes::BackgroundExecBody;
use crate::dialects::output::{self, Encoding};
use crate::domain::{Command, ExecEnd, ExecOutput, ProcessSpec};
use crate::http::{Caller, ErrorBody, ErrorDetail};

/// A command to run.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(as = ExecRequest)]
pub struct ExecRequestBody {
    /// The program, a path or a name in `PATH`. No shell is involved.
    #[serde(default)]
    #[schema(required)]
    pub cmd: String,
    /// Its arguments.
    #[serde(default)]
    #[schema(nullable = false)]
    pub args: Option<Vec<String>>,
    /// Variables to set, beside `PATH`, `HOME` and the like.
    #[serde(default)]
    #[schema(nullable = false)]
    pub envs: Option<BTreeMap<String, String>>,
    /// Its working directory, absolute; `/root` if not given.
    #[serde(default)]
    #[schema(nullable = false)]
    pub cwd: Option<String>,
    /// Seconds after which it is killed with all its children, 1 to 86400.
    #[serde(default)]
    #[schema(default = 30, nullable = false)]
    pub timeout_sec: Option<i64>,
    /// Start it and do not wait for it. It runs until it ends by itself or is killed, whatever
    /// `timeout_sec` says, and is found among the processes of the sandbox.
    #[serde(default)]
    #[schema(default = false, nullable = false)]
    pub background: Option<bool>,
    /// A name for a command in the background: 1 to 128 bytes, no number, and not that of one that
    /// runs. One is made up if there is none.
    #[serde(default)]
    #[schema(nullable = false)]
    pub tag: Option<String>,
}

/// What a command left behind.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ExecResponse)]
pub struct ExecResponseBody {
    /// The sandbox.
    pub sandbox_id: String,
    /// The program.
    pub cmd: String,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Its exit status; 128 and the signal's number if a signal ended it, 127 if there is no such
    /// program, 126 if it cannot be executed.
    pub exit_code: i32,
    /// Milliseconds from the request to its end.
    pub duration_ms: u64,
    /// Output encoding. `base64`, of both streams, when one of them is not UTF-8.
    pub encoding: Encoding,
}

/// Execute a command
///
/// Output is limited to a configured size, 1 GiB by default. A command that outruns its timeout
/// or that limit is killed with all its children; the answer is then 502 `agent_error`, and has
/// the fields of the ordinary answer, with the output so far, beside `error`.
///
/// With `background`, the answer comes as soon as the command runs; it goes on whatever becomes of
/// who started it.
#[utoipa::path(
    post, path = "/v1/sandboxes/{id}/exec", operation_id = "execCommand", tag = "sandboxes",
    params(("id" = String, Path)),
    request_body = ExecRequestBody,
    responses(
        (status = 200, description = "Command output", body = ExecResponseBody),
        (status = 202, description = "The command runs in the background",
            body = BackgroundExecBody),
        (status = 400, description = "The request makes no sense", body = ErrorBody),
        (status = 404, description = "Sandbox not found", body = ErrorBody),
        (status = 409, description = "Sandbox not running, or the tag is in use",
            body = ErrorBody),
        (status = 502, description = "Timeout, too much output, or the agent failed",
            body = ErrorBody),
    ),
)]
pub async fn exec(
    caller: Caller,
    Path(id): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let in_use = caller.manager.running(&id).await?;
    let request: ExecRequestBody = parse(body)?;
    let timeout_sec = request.timeout_sec.unwrap_or(30);
    let mut argv = vec![request.cmd.clone()];
    argv.extend(request.args.unwrap_or_default());
    let command = Command {
        argv,
        env: request.envs.unwrap_or_default(),
        cwd: request.cwd,
        timeout_sec,
    };
    if request.background == Some(true) {
        let spec = ProcessSpec {
            command,
            user: None,
            tag: request.tag,
            terminal: None,
        };
        let process = caller.manager.start_process(&in_use, spec).await?;
        let body = BackgroundExecBody {
            sandbox_id: in_use.sandbox.id.to_string(),
            cmd: request.cmd,
            pid: process.pid,
            tag: process.tag,
        };
        return Ok((StatusCode::ACCEPTED, Json(body)).into_response());
    }
    let output = caller.manager.exec(&in_use, command).await?;
    let limit = caller.manager.limits().exec.max_output;
    answer(
        in_use.sandbox.id.as_str(),
        &request.cmd,
        timeout_sec,
        limit,
        output,
    )
}

fn answer(
    id: &str,
    cmd: &str,
    timeout_sec: i64,
    limit: u64,
    output: ExecOutput,
) -> Result<Response, ApiError> {
    let (exit_code, problem) = match output.end {
        ExecEnd::Exited(code) => (code, None),
        ExecEnd::TimedOut => (
            137,
            Some(format!(
                "the command did not end within {timeout_sec} s and was killed; \
                 raise timeout_sec if it needs longer"
            )),
        ),
        ExecEnd::TooMuchOutput => (
            137,
            Some(format!(
                "the command wrote more than {limit} bytes and was killed; \
                 let it write to a file, and read that"
            )),
        ),
        ExecEnd::NoRoom => (
            137,
            Some(
                "the command wrote more than there is room for and was killed, since answers to other \
                 commands have not been read yet; read them first"
                    .to_owned(),
            ),
        ),
    };
    let status = if problem.is_some() {
        StatusCode::BAD_GATEWAY
    } else {
        StatusCode::OK
    };
    let encoding = output::encoding(&output.stdout, &output.stderr);
    let head = Head {
        error: problem.map(|message| ErrorDetail {
            code: "agent_error".to_owned(),
            message,
        }),
        sandbox_id: id,
        cmd,
        exit_code,
        duration_ms: u64::try_from(output.duration.as_millis()).unwrap_or(u64::MAX),
        encoding,
    };
    let body = output::body(&head, output.stdout, output.stderr)
        .map_err(|error| ApiError::internal(format!("the answer cannot be written: {error}")))?;
    Ok((status, [(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// The fields of an answer that are short.
#[derive(Serialize)]
struct Head<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorDetail>,
    sandbox_id: &'a str,
    cmd: &'a str,
    exit_code: i32,
    duration_ms: u64,
    encoding: Encoding,
}
