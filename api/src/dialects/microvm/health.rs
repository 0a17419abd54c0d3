//! Health.

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::rfc3339;
use crate::http::AppState;

/// The health of the daemon.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MicrovmHealth)]
pub struct HealthBody {
    /// `healthy` if all that was asked is, else `unhealthy`.
    #[schema(example = "healthy")]
    pub status: &'static str,
    /// When this was asked.
    #[schema(value_type = String, format = DateTime)]
    pub timestamp: String,
    /// Version of the daemon.
    #[schema(example = "0.1.0")]
    pub version: &'static str,
    /// The parts that were asked.
    #[schema(inline)]
    pub components: ComponentsBody,
}

/// The parts that were asked, each `healthy` or `unhealthy`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ComponentsBody {
    /// This answer.
    pub api: &'static str,
    /// Whether its records can be read.
    pub database: &'static str,
}

/// Tell how the daemon is
#[utoipa::path(
    get, path = "/api/v1/health", operation_id = "microvmHealth", tag = "service",
    responses((status = 200, description = "How it is", body = HealthBody)),
)]
pub async fn health(State(state): State<AppState>) -> Json<HealthBody> {
    let database = match state.identity.is_healthy().await {
        true => "healthy",
        false => "unhealthy",
    };
    Json(HealthBody {
        status: database,
        timestamp: rfc3339(Timestamp::now()),
        version: env!("CARGO_PKG_VERSION"),
        components: ComponentsBody {
            api: "healthy",
            database,
        },
    })
}
