//! What machines and the host take.

use axum::Json;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::AtVm;
use super::error::{ApiError, ErrorBody};
use super::extract::Path;
use super::rfc3339;
use super::vms::name_of;
use crate::domain::{HostMeasured, Manager, MeasureError, Measured, Sandbox, Status};
use crate::http::Caller;

const MIB: u64 = 1 << 20;
const GIB: f64 = (1_u64 << 30) as f64;

/// What a machine takes.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmMetricsBody {
    /// Which.
    pub vm_name: String,
    /// When it was measured.
    #[schema(format = DateTime)]
    pub timestamp: String,
    /// Processor time.
    #[schema(inline)]
    pub cpu: VmCpuBody,
    /// Memory.
    #[schema(inline)]
    pub memory: VmMemoryBody,
    /// Its disk.
    #[schema(inline)]
    pub disk: VmDiskBody,
    /// What has passed its network card since it was last started; null if it has none.
    #[schema(inline)]
    pub network: Option<VmNetworkBody>,
}

/// Processor time of a machine.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmCpuBody {
    /// Share of the time of all its vCPUs that it has had in the last seconds, 0 to 100.
    pub usage_percent: f64,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// Processor time of the host that it has had since it was last started.
    pub cpu_time_seconds: f64,
}

/// Memory of a machine.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmMemoryBody {
    /// What it was given, in MiB.
    pub allocated_mb: u64,
    /// What its programs and its kernel take of what the kernel hands out, in MiB.
    pub used_mb: u64,
    /// Share of that, 0 to 100.
    pub usage_percent: f64,
    /// What its programs could still have, in MiB.
    pub available_mb: u64,
}

/// The disk of a machine.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmDiskBody {
    /// Its size, in GiB.
    pub allocated_gb: f64,
    /// What is taken in its root file system, in GiB.
    pub used_gb: f64,
    /// Share of what can be taken by users other than root, 0 to 100.
    pub usage_percent: f64,
    /// What such users could still take, in GiB.
    pub available_gb: f64,
}

/// What has passed a network card.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmNetworkBody {
    /// Bytes that the machine has received.
    pub bytes_in: u64,
    /// Bytes that it has sent.
    pub bytes_out: u64,
    /// Frames that it has received.
    pub packets_in: u64,
    /// Frames that it has sent.
    pub packets_out: u64,
}

/// What a machine takes, in short.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResourceUsageBody {
    /// Share of the time of all its vCPUs that it has had in the last seconds, 0 to 100.
    pub cpu_usage_percent: f64,
    /// What its programs and its kernel take of its memory, in MiB.
    pub memory_used_mb: u64,
    /// What is taken in its root file system, in GiB.
    pub disk_usage_gb: f64,
}

/// What the host takes.
#[derive(Debug, Serialize, ToSchema)]
pub struct SystemMetricsBody {
    /// When it was measured.
    #[schema(format = DateTime)]
    pub timestamp: String,
    /// The host, with all that runs on it.
    #[schema(inline)]
    pub host: HostMetricsBody,
    /// The machines that the caller sees.
    #[schema(inline)]
    pub vms: VmCountsBody,
}

/// What is taken of the host.
#[derive(Debug, Serialize, ToSchema)]
pub struct HostMetricsBody {
    /// Share of the time of its processors in the last seconds that they were not idle, 0 to 100.
    pub cpu_usage_percent: f64,
    /// How many processors it has.
    pub cpu_cores: u32,
    /// Its memory, in GiB.
    pub memory_total_gb: f64,
    /// What of it is taken, in GiB.
    pub memory_used_gb: f64,
    /// Share of that, 0 to 100.
    pub memory_usage_percent: f64,
    /// Size of the file system that holds the machines' disks, in GiB.
    pub disk_total_gb: f64,
    /// What of it is taken, in GiB.
    pub disk_used_gb: f64,
    /// Share of what the daemon can take that is taken, 0 to 100.
    pub disk_usage_percent: f64,
}

/// Machines, counted.
#[derive(Debug, Serialize, ToSchema)]
pub struct VmCountsBody {
    /// Those that are not deleted.
    pub total_count: u64,
    /// Of those, the ones that run.
    pub running_count: u64,
    /// Virtual CPUs of those that run.
    pub total_vcpus_allocated: u64,
    /// Memory of those that run, in GiB.
    pub total_memory_allocated_gb: f64,
}

impl AtVm for MeasureError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::NotRunning(gone) if gone.status == Status::Stopped => super::at_vm::no_vm(name),
            Self::NotRunning(standing) => super::at_vm::not_running(name, standing),
            Self::Host(source) => super::at_vm::of_host(source),
        }
    }
}

/// A number with this many digits behind the point.
fn rounded(value: f64, digits: i32) -> f64 {
    let factor = 10_f64.powi(digits);
    (value * factor).round() / factor
}

fn percent(part: u64, whole: u64) -> f64 {
    match whole {
        0 => 0.0,
        whole => rounded(part as f64 * 100.0 / whole as f64, 1).min(100.0),
    }
}

/// Bytes in GiB.
fn gib(bytes: u64) -> f64 {
    rounded(bytes as f64 / GIB, 3)
}

impl From<Measured> for VmMetricsBody {
    fn from(measured: Measured) -> Self {
        let Measured {
            sandbox,
            at,
            cpu_percent,
            usage,
        } = measured;
        let guest = usage.guest;
        let used = guest.memory_total.saturating_sub(guest.memory_available);
        Self {
            vm_name: name_of(&sandbox),
            timestamp: rfc3339(at),
            cpu: VmCpuBody {
                usage_percent: rounded(cpu_percent, 1),
                vcpus: sandbox.spec.vcpus,
                cpu_time_seconds: rounded(usage.vmm.cpu_us as f64 / 1e6, 2),
            },
            memory: VmMemoryBody {
                allocated_mb: sandbox.spec.memory_mb.into(),
                used_mb: used / MIB,
                usage_percent: percent(used, guest.memory_total),
                available_mb: guest.memory_available / MIB,
            },
            disk: VmDiskBody {
                allocated_gb: gib(usage.disk_size),
                used_gb: gib(guest.disk_used),
                usage_percent: percent(
                    guest.disk_used,
                    guest.disk_used.saturating_add(guest.disk_available),
                ),
                available_gb: gib(guest.disk_available),
            },
            network: usage.card.map(|card| VmNetworkBody {
                bytes_in: card.received_bytes,
                bytes_out: card.sent_bytes,
                packets_in: card.received_frames,
                packets_out: card.sent_frames,
            }),
        }
    }
}

impl From<HostMeasured> for SystemMetricsBody {
    fn from(measured: HostMeasured) -> Self {
        let usage = measured.usage;
        let used = usage.memory_total.saturating_sub(usage.memory_available);
        Self {
            timestamp: rfc3339(measured.at),
            host: HostMetricsBody {
                cpu_usage_percent: rounded(measured.cpu_percent, 1),
                cpu_cores: usage.cpus,
                memory_total_gb: gib(usage.memory_total),
                memory_used_gb: gib(used),
                memory_usage_percent: percent(used, usage.memory_total),
                disk_total_gb: gib(usage.disk_total),
                disk_used_gb: gib(usage.disk_used),
                disk_usage_percent: percent(
                    usage.disk_used,
                    usage.disk_used.saturating_add(usage.disk_available),
                ),
            },
            vms: VmCountsBody {
                total_count: measured.totals.all,
                running_count: measured.totals.running,
                total_vcpus_allocated: measured.totals.vcpus,
                total_memory_allocated_gb: gib(measured.totals.memory_mb.saturating_mul(MIB)),
            },
        }
    }
}

/// What a machine takes, in short; `None` if it does not run, or cannot be measured now.
pub async fn in_short(manager: &Manager, sandbox: &Sandbox) -> Option<ResourceUsageBody> {
    if sandbox.status != Status::Running {
        return None;
    }
    let measured = manager.measure(sandbox.id.as_str()).await;
    let metrics: VmMetricsBody = measured
        .inspect_err(|error| {
            tracing::debug!(sandbox = %sandbox.id, %error, "sandbox is not measured");
        })
        .ok()?
        .into();
    Some(ResourceUsageBody {
        cpu_usage_percent: metrics.cpu.usage_percent,
        memory_used_mb: metrics.memory.used_mb,
        disk_usage_gb: metrics.disk.used_gb,
    })
}

/// Tell what a virtual machine takes
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}/metrics", operation_id = "vmMetrics", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "What it takes now", body = VmMetricsBody),
        (status = 404, description = "There is none of that name", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 502, description = "Its agent does not answer", body = ErrorBody),
    ),
)]
pub async fn get(
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<VmMetricsBody>, ApiError> {
    let measured = caller.manager.measure(&name).await;
    let measured = measured.map_err(|error| error.at_vm(&name))?;
    Ok(Json(measured.into()))
}

/// Tell what the host takes
#[utoipa::path(
    get, path = "/api/v1/system/metrics", operation_id = "systemMetrics", tag = "service",
    responses((status = 200, description = "What it takes now", body = SystemMetricsBody)),
)]
pub async fn system(caller: Caller) -> Result<Json<SystemMetricsBody>, ApiError> {
    let measured = caller.manager.measure_host().await;
    let measured = measured.map_err(|error| ApiError::internal(&error))?;
    Ok(Json(measured.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_rounded_and_shares_stay_shares() {
        assert_eq!(gib(5 << 29), 2.5);
        assert_eq!(gib(123_456_789), 0.115);
        assert_eq!(percent(1, 3), 33.3);
        assert_eq!(percent(5, 3), 100.0);
        assert_eq!(percent(5, 0), 0.0);
    }
}
