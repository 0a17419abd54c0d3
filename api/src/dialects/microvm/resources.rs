//! Changing what a machine has.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::{AtVm, of_host, wrong};
use super::body::{FromFields, parse};
use super::error::{ApiError, ErrorBody};
use super::extract::Path;
use super::fields::Fields;
use super::rfc3339;
use super::vms::{find, name_of, word_at};
use crate::domain::{MAX_MEMORY_MB, MAX_VCPUS, MIN_MEMORY_MB, ResizeError, ResourceChange};
use crate::http::Caller;

/// What a machine is to have. What is not given stays.
#[derive(Debug, Default, ToSchema)]
pub struct ResourcesRequest {
    /// Virtual CPUs, 1 to 32; while it runs, up to twice as many as it was booted with.
    #[schema(nullable = false)]
    pub vcpus: Option<i64>,
    /// RAM in MiB, 128 to what the host has; while it runs, once to twice what it was booted with, in steps
    /// of 2 MiB.
    #[schema(nullable = false)]
    pub memory_mb: Option<i64>,
    /// Share of the time of its vCPUs that it has at most, 1 to 100.
    #[schema(nullable = false)]
    pub cpu_limit_percent: Option<i64>,
    /// Share of its memory that its guest has at most, 1 to 100.
    #[schema(nullable = false)]
    pub memory_limit_percent: Option<i64>,
}

impl FromFields for ResourcesRequest {
    fn read(fields: &mut Fields) -> Self {
        Self {
            vcpus: fields.integer("vcpus", 1..=MAX_VCPUS),
            memory_mb: fields.integer("memory_mb", MIN_MEMORY_MB..=MAX_MEMORY_MB),
            cpu_limit_percent: fields.integer("cpu_limit_percent", 1..=100),
            memory_limit_percent: fields.integer("memory_limit_percent", 1..=100),
        }
    }
}

/// A machine has other resources.
#[derive(Debug, Serialize, ToSchema)]
pub struct ResourcesBody {
    /// A sentence.
    pub message: &'static str,
    /// Which.
    pub vm_name: String,
    /// When.
    #[schema(format = DateTime)]
    pub updated_at: String,
    /// What it has now.
    #[schema(inline)]
    pub new_resources: NewResourcesBody,
}

/// What a machine has.
#[derive(Debug, Serialize, ToSchema)]
pub struct NewResourcesBody {
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Share of the time of its vCPUs that it has at most; 100 is no limit.
    pub cpu_limit_percent: u8,
    /// Share of its memory that its guest has at most; 100 is no limit.
    pub memory_limit_percent: u8,
}

impl AtVm for ResizeError {
    fn at_vm(self, name: &str) -> ApiError {
        match self {
            Self::Lookup(source) => source.at_vm(name),
            Self::Invalid(problem) => wrong(problem.field, problem.sentence),
            Self::WrongState(standing) => ApiError::conflict(format!(
                "the resources of VM '{name}' cannot be changed while it is {}; it must be running, or \
                 created or stopped",
                word_at(standing)
            )),
            Self::NotWhileRunning(_) | Self::HasMemory => {
                ApiError::conflict(format!("VM '{name}': {self}"))
            }
            Self::Quota(source) => ApiError::too_many(source.to_string(), None),
            Self::Host(source @ crate::domain::HostError::Conflict { .. }) => {
                ApiError::conflict(source.to_string())
            }
            Self::Host(source) => of_host(source),
            Self::Count(_) | Self::Interrupted => ApiError::internal(&self),
        }
    }
}

/// Change what a virtual machine has
///
/// One that was started from its disk changes while it runs, within the bounds of the fields. What is beyond
/// them is 409: it is to be stopped, changed, and started. What is asked for holds until it is changed again.
#[utoipa::path(
    put, path = "/api/v1/vms/{vm_name}/resources", operation_id = "setVmResources", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = ResourcesRequest,
    responses(
        (status = 200, description = "It has that", body = ResourcesBody),
        (status = 400, description = "The body is not JSON", body = ErrorBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "Not in this state, or not on this host", body = ErrorBody),
        (status = 422, description = "Fields are wrong", body = ErrorBody),
        (status = 429, description = "It would be more than the quota", body = ErrorBody),
        (status = 502, description = "The guest has not complied, and has what it had", body = ErrorBody),
    ),
)]
pub async fn set(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<ResourcesBody>, ApiError> {
    let sandbox = find(&caller.manager, &name).await?;
    let request: ResourcesRequest = parse(body)?;
    // They are 1 to 100.
    let percent = |value: Option<i64>| value.and_then(|value| u8::try_from(value).ok());
    let change = ResourceChange {
        vcpus: request.vcpus,
        memory_mb: request.memory_mb,
        cpu_limit_percent: percent(request.cpu_limit_percent),
        memory_limit_percent: percent(request.memory_limit_percent),
    };
    if change == ResourceChange::default() {
        let fields =
            "one of vcpus, memory_mb, cpu_limit_percent and memory_limit_percent is required";
        return Err(wrong("body", fields));
    }
    let changed = caller.manager.set_resources(sandbox.id.as_str(), change);
    let sandbox = changed.await.map_err(|error| error.at_vm(&name))?;
    let resources = sandbox.spec.resources;
    Ok(Json(ResourcesBody {
        message: "Resources updated successfully",
        vm_name: name_of(&sandbox),
        updated_at: rfc3339(sandbox.updated_at),
        new_resources: NewResourcesBody {
            vcpus: sandbox.spec.vcpus,
            memory_mb: sandbox.spec.memory_mb,
            cpu_limit_percent: resources.cpu_limit_percent.unwrap_or(100),
            memory_limit_percent: resources.memory_limit_percent.unwrap_or(100),
        },
    }))
}
