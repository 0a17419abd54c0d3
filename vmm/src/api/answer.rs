//! What is sent back.

use std::error::Error;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue, SERVER};
use hyper::{Response, StatusCode};
use serde::Serialize;

use crate::control::request::{Answer, Fault, Refusal};

/// What this server calls itself: clients may look for it.
const SERVER_NAME: HeaderValue = HeaderValue::from_static("Cloud Hypervisor API");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A response whose body is all there.
pub type ApiResponse = Response<Full<Bytes>>;

fn response(status: StatusCode, body: Vec<u8>) -> ApiResponse {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(SERVER, SERVER_NAME);
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
}

/// Success, with something to tell.
pub fn json(value: &impl Serialize) -> ApiResponse {
    match serde_json::to_vec(value) {
        Ok(body) => response(StatusCode::OK, body),
        Err(error) => failure(
            StatusCode::INTERNAL_SERVER_ERROR,
            &["the answer", &error.to_string()],
        ),
    }
}

/// A failure: an array of strings, the outermost first.
pub fn failure(status: StatusCode, chain: &[&str]) -> ApiResponse {
    let body = serde_json::to_vec(chain).unwrap_or_default();
    response(status, body)
}

/// A request that could not be taken: `what` is the outermost string.
pub fn bad_request(what: &str, error: &dyn Error) -> ApiResponse {
    failure_chain(StatusCode::BAD_REQUEST, what, error)
}

fn failure_chain(status: StatusCode, what: &str, error: &dyn Error) -> ApiResponse {
    let mut chain = vec![what.to_owned()];
    let mut cause = Some(error);
    while let Some(error) = cause {
        chain.push(error.to_string());
        cause = error.source();
    }
    let chain: Vec<&str> = chain.iter().map(String::as_str).collect();
    failure(status, &chain)
}

/// What the owner of the machine says to a request.
pub fn from_control(endpoint: &str, result: Result<Answer, Refusal>) -> ApiResponse {
    match result {
        Ok(Answer::Done) => response(StatusCode::NO_CONTENT, Vec::new()),
        Ok(Answer::Info(info)) => json(&info),
        Ok(Answer::Counters(counters)) => json(&counters),
        Err(refusal) => {
            let status = match refusal.fault() {
                Fault::Request => StatusCode::BAD_REQUEST,
                Fault::NotFound => StatusCode::NOT_FOUND,
                Fault::Conflict => StatusCode::CONFLICT,
                Fault::Busy => StatusCode::TOO_MANY_REQUESTS,
                Fault::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            };
            failure_chain(status, &failed(endpoint), &refusal)
        }
    }
}

/// The outermost string of every failure of an endpoint.
pub fn failed(endpoint: &str) -> String {
    format!("{endpoint} failed")
}
