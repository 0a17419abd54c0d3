//! A name and a log line for every request.

use std::time::Instant;

use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use tracing::{Instrument, info, info_span};

/// The header that names a request, in both directions.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The longest name that a caller may give, in bytes.
const MAX_LEN: usize = 64;

/// The name of a request, as an extension of it.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// Names the request, unless its caller did, and logs it when its answer begins.
pub async fn trace(mut request: Request, next: Next) -> Response {
    let id = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|id| id.to_str().ok())
        .filter(|id| is_name(id))
        .map_or_else(|| format!("{:016x}", rand::random::<u64>()), str::to_owned);
    request.extensions_mut().insert(RequestId(id.clone()));
    let span = info_span!("request", request_id = id, method = %request.method(),
        path = request.uri().path());
    async {
        let start = Instant::now();
        let mut response = next.run(request).await;
        let duration_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        info!(status = response.status().as_u16(), duration_us, "answered");
        if let Ok(id) = HeaderValue::from_str(&id) {
            response.headers_mut().insert(REQUEST_ID, id);
        }
        response
    }
    .instrument(span)
    .await
}

fn is_name(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=MAX_LEN).contains(&id.len()) && id.bytes().all(allowed)
}
