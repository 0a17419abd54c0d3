//! Typed failures, as JSON bodies and as `Error` frames.

use serde::{Deserialize, Serialize};

/// The JSON body of every answer with a status of 400 or above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed.
    pub error: ErrorDetail,
}

/// One failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ErrorDetail {
    /// The kind of failure, for programs.
    pub code: ErrorCode,
    /// What was wrong, for people.
    pub message: String,
}

impl ErrorDetail {
    /// A failure of kind `code`, told by `message`.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// The kinds of failure. In JSON they are snake case; a code that this version does not know
/// reads as [`ErrorCode::Internal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request, its JSON, a query value or a frame is malformed. 400.
    BadRequest,
    /// No operation has this path. 404.
    UnknownOperation,
    /// The operation has another method. 405.
    MethodNotAllowed,
    /// The JSON body is larger than [`MAX_JSON_BODY`](crate::MAX_JSON_BODY). 413.
    BodyTooLarge,
    /// No file has this path. 404.
    NotFound,
    /// The path names a directory, where a file was expected. 409.
    IsADirectory,
    /// The path, or a part of it, is no directory where one was expected. 409.
    NotADirectory,
    /// The path names a device, FIFO or socket, where a regular file was expected. 409.
    NotARegularFile,
    /// The path, or a name in it, is too long, or its symbolic links form a loop. 400.
    BadPath,
    /// The system refuses the access, or the file system is mounted read-only. 403.
    PermissionDenied,
    /// The disk, or a quota, is full. 507.
    NoSpace,
    /// The program does not exist, in `PATH` or at the given path. 404; shells exit with 127.
    CommandNotFound,
    /// The program exists and cannot be executed. 403; shells exit with 126.
    CommandNotExecutable,
    /// The working directory does not exist or cannot be entered. 400.
    BadCwd,
    /// The user or group does not exist in the guest. 400.
    UnknownUser,
    /// The guest has run out of processes, memory or file descriptors. 503.
    OutOfResources,
    /// No process that is kept has this id or tag. 404.
    NoSuchProcess,
    /// A process that runs has this tag already. 409.
    TagInUse,
    /// Nothing in the guest listens on this port. 502.
    PortClosed,
    /// The agent is not the guest's init process, and so cannot do this. 409.
    NotInit,
    /// Anything else, such as an I/O error of the disk. 500.
    #[serde(other)]
    Internal,
}

impl ErrorCode {
    /// The HTTP status that goes with this kind.
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::BadPath | Self::BadCwd | Self::UnknownUser => 400,
            Self::PermissionDenied | Self::CommandNotExecutable => 403,
            Self::UnknownOperation
            | Self::NotFound
            | Self::NoSuchProcess
            | Self::CommandNotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::IsADirectory
            | Self::NotADirectory
            | Self::NotARegularFile
            | Self::TagInUse
            | Self::NotInit => 409,
            Self::BodyTooLarge => 413,
            Self::Internal => 500,
            Self::PortClosed => 502,
            Self::OutOfResources => 503,
            Self::NoSpace => 507,
        }
    }

    /// The exit status with which a shell reports that a program could not be started, where it
    /// has one for this failure.
    pub const fn shell_status(self) -> Option<i32> {
        match self {
            Self::CommandNotFound => Some(127),
            Self::CommandNotExecutable => Some(126),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_of_a_later_version_is_internal() {
        let body: ErrorBody =
            serde_json::from_str(r#"{"error":{"code":"melted","message":"m"}}"#).unwrap();
        assert_eq!(body.error.code, ErrorCode::Internal);
    }

    #[test]
    fn codes_are_snake_case() {
        let body = ErrorBody {
            error: ErrorDetail::new(ErrorCode::CommandNotFound, "no such command"),
        };
        assert_eq!(
            serde_json::to_string(&body).unwrap(),
            r#"{"error":{"code":"command_not_found","message":"no such command"}}"#
        );
    }
}
