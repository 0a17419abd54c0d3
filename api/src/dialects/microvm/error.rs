//! Errors as this dialect tells them.
//!
//! | status | `error` | when | besides `message` |
//! |---|---|---|---|
//! | 400 | `bad_request` | the body is no JSON object, or a parameter makes no sense | `details.field`, `details.issue` if it is one field |
//! | 401 | `unauthorized` | no credentials, or not good ones | |
//! | 403 | `forbidden` | the caller may not do that | |
//! | 404 | `not_found` | there is no such thing, for this caller | |
//! | 405 | `method_not_allowed` | the path does not take the method | |
//! | 408 | `request_timeout` | the body came too slowly | |
//! | 409 | `conflict` | it clashes with what is there, or its state does not allow it | |
//! | 413 | `payload_too_large` | the body is too large | |
//! | 422 | `validation_error` | fields of the body make no sense: the first 32 reasons at once | `details`: a list of `field` and `error` |
//! | 429 | `rate_limit_exceeded` | too many requests, failures or things | `retry_after_seconds`, if waiting helps |
//! | 500 | `internal_error` | the daemon failed; its log says why under the id | `request_id` |
//! | 503 | `service_unavailable` | it cannot serve now | |

use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};
use tracing::error;
use utoipa::ToSchema;

use crate::chain;
use crate::dialects::brief;
use crate::domain::StoreError;
use crate::http::RequestId;

/// An error.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = MicrovmError)]
pub struct ErrorBody {
    /// For programs.
    #[schema(example = "not_found")]
    pub error: String,
    /// For people: what was wrong, what was expected, what to do.
    #[schema(example = "VM 'test-vm' not found")]
    pub message: String,
    /// With 400, `field` and `issue`; with 422, a list of `field` and `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub details: Option<Value>,
    /// With 429: after how many seconds to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub retry_after_seconds: Option<u64>,
    /// With 500: under which id the daemon's log tells more. Also the header `X-Request-Id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub request_id: Option<String>,
}

/// The longest name of a field that is told, in bytes. Names may be the client's, as those of variables are.
const MAX_FIELD: usize = 128;
/// The longest sentence about a field, in bytes. It may quote what the field has.
const MAX_SENTENCE: usize = 512;

/// One field of a body that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldError {
    /// Its name, with those of what it is in and a dot before.
    pub field: String,
    /// What was expected.
    pub error: String,
}

impl FieldError {
    /// That this field makes no sense. What is too long to be read is shortened.
    pub fn new(field: impl Into<String>, error: impl Into<String>) -> Self {
        Self {
            field: brief::shortened(field.into(), MAX_FIELD),
            error: brief::shortened(error.into(), MAX_SENTENCE),
        }
    }
}

/// An error as this dialect tells it.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    error: &'static str,
    message: String,
    details: Option<Value>,
    retry_after_seconds: Option<u64>,
}

impl ApiError {
    /// One that has no function of its own here.
    pub fn new(status: StatusCode, error: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            error,
            message: brief::message(message.into()),
            details: None,
            retry_after_seconds: None,
        }
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The same with details.
    #[must_use]
    pub fn with_details(mut self, details: Value) -> Self {
        self.details = Some(details);
        self
    }

    /// The request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
    }

    /// A parameter makes no sense.
    pub fn bad_parameter(field: &str, issue: impl Into<String>) -> Self {
        let FieldError { field, error } = FieldError::new(field, issue);
        Self::bad_request("Invalid request parameters")
            .with_details(json!({"field": field, "issue": error}))
    }

    /// No credentials, or not good ones.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    /// The caller may not do that.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// There is no such thing, for this caller.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// It clashes with what is there, or its state does not allow it.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// Fields of the body make no sense: these, and `untold` more.
    pub fn validation(fields: &[FieldError], untold: usize) -> Self {
        let message = match untold {
            0 => "Request validation failed".to_owned(),
            more => format!("Request validation failed; {more} more problems are not told"),
        };
        Self::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "validation_error",
            message,
        )
        .with_details(json!(fields))
    }

    /// Too many; with `None`, waiting does not help.
    pub fn too_many(message: impl Into<String>, retry_after_seconds: Option<u64>) -> Self {
        let status = StatusCode::TOO_MANY_REQUESTS;
        Self {
            retry_after_seconds,
            ..Self::new(status, "rate_limit_exceeded", message)
        }
    }

    /// The daemon failed. The reason is for its log only.
    pub fn internal(reason: &dyn std::error::Error) -> Self {
        error!(reason = chain(reason), "request failed");
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        Self::new(status, "internal_error", "An unexpected error occurred")
    }

    /// It cannot serve now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "service_unavailable", message)
    }
}

impl From<StoreError> for ApiError {
    fn from(source: StoreError) -> Self {
        Self::internal(&source)
    }
}

/// An answer that wants the request's id.
#[derive(Debug, Clone)]
struct Unnamed(ErrorBody);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = ErrorBody {
            error: self.error.to_owned(),
            message: self.message,
            details: self.details,
            retry_after_seconds: self.retry_after_seconds,
            request_id: None,
        };
        let mut response = (self.status, Json(&body)).into_response();
        if let Some(seconds) = self.retry_after_seconds {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer");
            response
                .headers_mut()
                .insert(header::WWW_AUTHENTICATE, scheme);
        }
        if self.status == StatusCode::INTERNAL_SERVER_ERROR {
            response.extensions_mut().insert(Unnamed(body));
        }
        response
    }
}

/// Puts the id of the request into what tells that the daemon failed.
pub async fn name_failures(request: Request, next: Next) -> Response {
    let id = request.extensions().get::<RequestId>().cloned();
    let mut response = next.run(request).await;
    match (response.extensions_mut().remove::<Unnamed>(), id) {
        (Some(Unnamed(mut body)), Some(id)) => {
            body.request_id = Some(id.0);
            with_body(response, &body)
        }
        _ => response,
    }
}

/// The answer with another body. Its other headers stay: they are about the caller.
fn with_body(response: Response, body: &ErrorBody) -> Response {
    let (mut parts, _) = response.into_parts();
    // Those that are about the old body are its length, and its type, which is the new one's too.
    parts.headers.remove(header::CONTENT_LENGTH);
    (parts, Json(body)).into_response()
}
