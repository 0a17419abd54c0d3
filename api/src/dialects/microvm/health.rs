//! Health: each part is asked.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use jiff::Timestamp;
use serde::Serialize;
use tracing::warn;
use utoipa::ToSchema;

use super::rfc3339;
use crate::domain::{PartHealth, Principal};
use crate::http::AppState;

const HEALTHY: &str = "healthy";
const UNHEALTHY: &str = "unhealthy";
/// Of a part that is not to be there.
const DISABLED: &str = "disabled";

/// The health of the daemon.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MicrovmHealth)]
pub struct HealthBody {
    /// `healthy` if all parts are, else `unhealthy`.
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
    /// Since when the daemon serves, in seconds.
    pub uptime_seconds: u64,
    /// With 503: `service_unavailable`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<&'static str>,
    /// With 503: a sentence for each part that is unhealthy.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub message: Option<String>,
}

/// The parts that were asked, each `healthy` or `unhealthy`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ComponentsBody {
    /// This answer.
    pub api: &'static str,
    /// Whether its records can be read.
    pub database: &'static str,
    /// Whether KVM can be opened, and the VMM has answered.
    pub cloud_hypervisor: &'static str,
    /// Whether bridges and packet filter are as the daemon has set them up; `disabled` if there are to be
    /// none.
    pub network: &'static str,
    /// Whether there is room for the disks of machines.
    pub disk: &'static str,
    /// Whether kernel, agent and templates can be read.
    pub images: &'static str,
    /// Whether the audit log can be read, and was written the last time.
    pub audit_log: &'static str,
}

/// Parts that were asked.
#[derive(Debug, Default)]
struct Asked {
    problems: Vec<String>,
}

impl Asked {
    /// The word for a part.
    fn word(&mut self, part: PartHealth) -> &'static str {
        match part {
            Ok(()) => HEALTHY,
            Err(problem) => {
                self.problems.push(problem);
                UNHEALTHY
            }
        }
    }
}

/// Tell how the daemon is
#[utoipa::path(
    get, path = "/api/v1/health", operation_id = "microvmHealth", tag = "service",
    responses(
        (status = 200, description = "All of it is well", body = HealthBody),
        (status = 503, description = "A part of it is not", body = HealthBody),
    ),
)]
pub async fn health(State(state): State<AppState>) -> (StatusCode, Json<HealthBody>) {
    let manager = state.manager.acting_for(Principal::Local);
    let (host, database, audit) = tokio::join!(
        manager.host_health(),
        state.identity.is_healthy(),
        state.audit.check()
    );
    let database = match database {
        true => Ok(()),
        false => Err("the records cannot be read; the daemon's log says why".to_owned()),
    };
    let mut asked = Asked::default();
    let components = ComponentsBody {
        api: HEALTHY,
        database: asked.word(database),
        cloud_hypervisor: asked.word(host.vmm.map(drop)),
        network: host.network.map_or(DISABLED, |network| asked.word(network)),
        disk: asked.word(host.disk),
        images: asked.word(host.images),
        audit_log: asked.word(audit),
    };
    let is_healthy = asked.problems.is_empty();
    let message = (!is_healthy).then(|| asked.problems.join("; "));
    if let Some(message) = &message {
        warn!(reason = message, "the daemon is not well");
    }
    let body = HealthBody {
        status: if is_healthy { HEALTHY } else { UNHEALTHY },
        timestamp: rfc3339(Timestamp::now()),
        version: env!("CARGO_PKG_VERSION"),
        components,
        uptime_seconds: state.metrics.uptime().as_secs(),
        error: (!is_healthy).then_some("service_unavailable"),
        message,
    };
    let status = match is_healthy {
        true => StatusCode::OK,
        false => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(body))
}
