//! What the daemon and its host are, and how much goes on.

use axum::Json;
use axum::extract::State;
use jiff::Timestamp;
use serde::Serialize;
use utoipa::ToSchema;

use super::error::ApiError;
use super::rfc3339;
use crate::http::{AppState, Caller};

/// The daemon and its host.
#[derive(Debug, Serialize, ToSchema)]
pub struct StatusBody {
    /// Version of the daemon.
    #[schema(example = "0.1.0")]
    pub api_version: &'static str,
    /// When this was asked.
    #[schema(format = DateTime)]
    pub timestamp: String,
    /// What it runs on.
    #[schema(inline)]
    pub system: SystemBody,
    /// How much goes on.
    #[schema(inline)]
    pub statistics: StatisticsBody,
}

/// What the daemon runs on.
#[derive(Debug, Serialize, ToSchema)]
pub struct SystemBody {
    /// The host's system.
    #[schema(example = "Debian GNU/Linux 13 (trixie)")]
    pub host_os: String,
    /// The version of Cloud Hypervisor whose API the VMM has; null if the VMM cannot be asked, which
    /// `/api/v1/health` explains.
    pub cloud_hypervisor_version: Option<String>,
    /// Version of the VMM, in its own words; null if it cannot be asked.
    pub vmm_version: Option<String>,
    /// Always null: there is no Python in this service.
    pub python_version: Option<String>,
    /// The compiler that the daemon was built with.
    #[schema(example = "1.91.0")]
    pub rust_version: &'static str,
}

/// How much goes on, as far as the caller sees it.
#[derive(Debug, Serialize, ToSchema)]
pub struct StatisticsBody {
    /// Machines that are not deleted.
    pub total_vms: u64,
    /// Of those, the ones that run.
    pub running_vms: u64,
    /// Snapshots.
    pub total_snapshots: u64,
    /// Requests to the daemon since it was started, or since midnight UTC if that was later: the caller's,
    /// or everybody's for an administrator.
    pub api_requests_today: u64,
    /// How long it took on average until the answers to these began; 0 if there were none.
    pub average_response_time_ms: f64,
}

/// Tell what the daemon and its host are
#[utoipa::path(
    get, path = "/api/v1/status", operation_id = "status", tag = "service",
    responses((status = 200, description = "What they are", body = StatusBody)),
)]
pub async fn status(
    State(state): State<AppState>,
    caller: Caller,
) -> Result<Json<StatusBody>, ApiError> {
    let measured = caller.manager.measure_host().await;
    let measured = measured.map_err(|error| ApiError::internal(&error))?;
    let snapshots = caller.manager.list_snapshots().await?;
    let statistics = state.metrics.statistics(&caller.principal);
    let vmm = caller.manager.host_health().await.vmm.ok();
    let (build, api) = vmm.map(|vmm| (vmm.build, vmm.api)).unzip();
    let average = statistics.average.unwrap_or_default().as_secs_f64() * 1000.0;
    Ok(Json(StatusBody {
        api_version: env!("CARGO_PKG_VERSION"),
        timestamp: rfc3339(Timestamp::now()),
        system: SystemBody {
            host_os: host_os(),
            cloud_hypervisor_version: api,
            vmm_version: build,
            python_version: None,
            rust_version: crate::RUST_VERSION,
        },
        statistics: StatisticsBody {
            total_vms: measured.totals.all,
            running_vms: measured.totals.running,
            total_snapshots: snapshots.len() as u64,
            api_requests_today: statistics.count,
            average_response_time_ms: (average * 1000.0).round() / 1000.0,
        },
    }))
}

/// What the host's system calls itself (os-release(5)); else the name of its kernel.
fn host_os() -> String {
    let files = ["/etc/os-release", "/usr/lib/os-release"];
    let found = files.iter().find_map(|file| {
        let text = std::fs::read_to_string(file).ok()?;
        pretty_name(&text)
    });
    found.unwrap_or_else(|| {
        let kernel = rustix::system::uname();
        let word = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
        format!("{} {}", word(kernel.sysname()), word(kernel.release()))
    })
}

fn pretty_name(text: &str) -> Option<String> {
    let mut lines = text.lines();
    let name = lines.find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    let name = name.trim().trim_matches(['"', '\'']);
    (!name.is_empty()).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_name_is_found() {
        let of = |text| pretty_name(text);
        assert_eq!(of("ID=x\nPRETTY_NAME=\"A B 1\"\n"), Some("A B 1".into()));
        assert_eq!(of("PRETTY_NAME=AB\n"), Some("AB".into()));
        assert_eq!(of("PRETTY_NAME=\nNAME=x\n"), None);
        assert!(!host_os().is_empty());
    }
}
