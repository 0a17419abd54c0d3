//! What the daemon counts, for Prometheus.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use tracing::error;

use super::{AppState, Caller, refuse};
use crate::chain;
use crate::domain::{MeasureError, Principal};
use crate::metrics::{CONTENT_TYPE, Now};

const PATH: &str = "/metrics";

/// Tell what the daemon counts
///
/// In the text format of OpenMetrics, which Prometheus reads. Only for administrators and the local
/// principal: it is about all sandboxes together.
#[utoipa::path(
    get, path = "/metrics", operation_id = "metrics", tag = "service",
    responses(
        (status = 200, description = "Metrics", body = String,
            content_type = "application/openmetrics-text"),
        (status = 401, description = "Credentials are needed", body = super::ErrorBody),
        (status = 403, description = "The caller is no administrator", body = super::ErrorBody),
    ),
)]
pub async fn metrics(State(state): State<AppState>, caller: Caller) -> Response {
    if !caller.principal.is_admin() {
        let message = "only administrators may see what the daemon counts";
        return refuse(PATH, StatusCode::FORBIDDEN, "forbidden", message);
    }
    match text(&state).await {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(source) => {
            error!(error = chain(&*source), "metrics cannot be told");
            let message = "the host or the records cannot be read; the daemon's log says why";
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            refuse(PATH, status, "internal_error", message)
        }
    }
}

async fn text(state: &AppState) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let manager = state.manager.acting_for(Principal::Local);
    let host = manager.measure_host().await?;
    let sandboxes = manager
        .list()
        .await
        .map_err(crate::domain::LookupError::from);
    let sandboxes = sandboxes.map_err(MeasureError::from)?;
    let now = Now {
        sandboxes: &sandboxes,
        healed: &manager.divergences(),
        host: host.usage,
    };
    Ok(state.metrics.encode(&now)?)
}
