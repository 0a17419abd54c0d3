//! Requests to the agent, and answers in JSON.

use std::io;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Body, MAX_JSON_ANSWER, unreachable};
use crate::domain::HostError;

/// What should not happen, whatever the agent says.
pub fn internal(error: impl std::fmt::Display) -> HostError {
    HostError::Internal {
        reason: error.to_string(),
    }
}

/// A request for what is at a path.
///
/// # Errors
/// It is no path.
pub fn get(path: &str) -> Result<Request<Body>, HostError> {
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    let request = Request::get(path).header(HOST, "agent");
    request.body(body).map_err(internal)
}

/// A request with a body in JSON.
///
/// # Errors
/// There is no such JSON.
pub fn post(path: &str, body: &impl Serialize) -> Result<Request<Body>, HostError> {
    let body = Full::<Bytes>::from(serde_json::to_vec(body).map_err(internal)?);
    Request::post(path)
        .header(HOST, "agent")
        .header(CONTENT_TYPE, "application/json")
        .body(body.map_err(io::Error::other).boxed_unsync())
        .map_err(internal)
}

/// The content of an answer, of at most [`MAX_JSON_ANSWER`] bytes.
///
/// # Errors
/// It breaks off, or is something else.
pub async fn read_json<T: DeserializeOwned>(response: Response<Incoming>) -> Result<T, HostError> {
    let body = Limited::new(response.into_body(), MAX_JSON_ANSWER)
        .collect()
        .await
        .map_err(|error| unreachable("its answer broke off", &*error))?;
    serde_json::from_slice(&body.to_bytes())
        .map_err(|error| unreachable("its answer makes no sense", &error))
}
