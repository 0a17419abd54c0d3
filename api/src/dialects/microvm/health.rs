//! Health: each part is asked.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{MethodRouter, get};
use axum::{Extension, Json};
use jiff::Timestamp;
use serde::Serialize;
use tracing::{info, warn};
use utoipa::ToSchema;

use super::rfc3339;
use crate::domain::{PartHealth, Principal};
use crate::http::{AppState, Identified};

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
    /// With 503: a sentence for each part that is unhealthy. Administrators are told why; it may name files
    /// of the host.
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

/// A part that is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Database,
    Vmm,
    Network,
    Disk,
    Images,
    AuditLog,
}

impl Part {
    /// Its name among the components.
    fn name(self) -> &'static str {
        match self {
            Self::Database => "database",
            Self::Vmm => "cloud_hypervisor",
            Self::Network => "network",
            Self::Disk => "disk",
            Self::Images => "images",
            Self::AuditLog => "audit_log",
        }
    }

    /// What is wrong with it, for anybody.
    fn in_general(self) -> &'static str {
        match self {
            Self::Database => "the records cannot be read",
            Self::Vmm => "machines cannot be started: KVM or the VMM does not answer",
            Self::Network => "the network of machines is not as it was set up",
            Self::Disk => "there is no room for disks of machines",
            Self::Images => "kernel, agent or templates of machines cannot be read",
            Self::AuditLog => "the audit log cannot be read or written",
        }
    }
}

/// What was asked.
#[derive(Debug, Default)]
struct Asked {
    /// The parts that are unhealthy, each with a sentence for administrators.
    problems: Vec<(Part, String)>,
}

impl Asked {
    /// The word for a part.
    fn word(&mut self, part: Part, health: PartHealth) -> &'static str {
        match health {
            Ok(()) => HEALTHY,
            Err(problem) => {
                self.problems.push((part, problem));
                UNHEALTHY
            }
        }
    }

    /// What `caller` is told; `None` if all is well.
    fn message(&self, caller: Option<&Principal>) -> Option<String> {
        let may_know = caller.is_some_and(Principal::is_admin);
        let sentences = self.problems.iter().map(|(part, problem)| match may_know {
            true => problem,
            false => part.in_general(),
        });
        let sentences: Vec<_> = sentences.collect();
        (!sentences.is_empty()).then(|| sentences.join("; "))
    }
}

/// The parts that were unhealthy the last time; clones share it.
#[derive(Debug, Clone, Default)]
struct Known(Arc<Mutex<BTreeSet<Part>>>);

impl Known {
    /// Logs what has changed. Anybody may ask as often as they like, and sentences have figures that
    /// change all the time, so that a part is told of when it becomes unhealthy or healthy.
    fn follow(&self, asked: &Asked) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (part, reason) in &asked.problems {
            if !known.contains(part) {
                warn!(part = part.name(), reason, "a part is unhealthy");
            }
        }
        let now: BTreeSet<_> = asked.problems.iter().map(|(part, _)| *part).collect();
        for part in known.difference(&now) {
            info!(part = part.name(), "a part is healthy again");
        }
        *known = now;
    }
}

/// The route of [`health`].
pub fn route() -> MethodRouter<AppState> {
    get(health).layer(Extension(Known::default()))
}

/// Tell how the daemon is
///
/// Anybody may ask which parts are unhealthy; administrators are told why.
#[utoipa::path(
    get, path = "/api/v1/health", operation_id = "microvmHealth", tag = "service",
    responses(
        (status = 200, description = "All of it is well", body = HealthBody),
        (status = 503, description = "A part of it is not", body = HealthBody),
    ),
)]
async fn health(
    State(state): State<AppState>,
    Extension(caller): Extension<Identified>,
    Extension(known): Extension<Known>,
) -> (StatusCode, Json<HealthBody>) {
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
        database: asked.word(Part::Database, database),
        cloud_hypervisor: asked.word(Part::Vmm, host.vmm.map(drop)),
        network: host
            .network
            .map_or(DISABLED, |network| asked.word(Part::Network, network)),
        disk: asked.word(Part::Disk, host.disk),
        images: asked.word(Part::Images, host.images),
        audit_log: asked.word(Part::AuditLog, audit),
    };
    known.follow(&asked);
    let message = asked.message(caller.principal.as_ref());
    let is_healthy = message.is_none();
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
