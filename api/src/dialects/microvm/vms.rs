//! Virtual machines: list, create, get, start, stop, restart, delete.

use std::collections::HashMap;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use jiff::Timestamp;
use serde::Serialize;
use tracing::error;
use utoipa::ToSchema;

use super::at_vm::{AtVm, no_vm};
use super::body::FromFields;
use super::error::{ApiError, ErrorBody};
use super::extract::{Path, Query};
use super::fields::Fields;
use super::metrics::{ResourceUsageBody, in_short};
use super::rfc3339;
use super::vm_requests::{CreateVmRequest, StopRequest, page, spec, stop_spec};
use crate::chain;
use crate::domain::{
    CreateError, CreateSpec, InUse, MacAddress, Manager, NetworkInfo, Sandbox, Standing, Status,
};
use crate::http::Caller;

/// A machine.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Vm)]
pub struct VmBody {
    /// Its name; its id, if it was given none.
    pub name: String,
    /// Its id, which it never shares.
    #[schema(example = "sb-0a1b2c3d")]
    pub id: String,
    /// `created`, `running` or `stopped`; also `paused` and `error`.
    pub status: &'static str,
    /// The same in other words: `running`, `stopped` or `error`.
    pub state: &'static str,
    /// Why it is `error`, or was stopped otherwise than by a request.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub status_reason: Option<String>,
    /// `linux`.
    pub os_type: &'static str,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Template of its disk.
    pub template: String,
    /// When it was asked for.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When its record last changed.
    #[schema(format = DateTime)]
    pub updated_at: String,
    /// When its agent answered after its last start.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    pub started_at: Option<String>,
    /// When it was last stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, format = DateTime)]
    pub stopped_at: Option<String>,
    /// Seconds since `started_at`, if it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub uptime_seconds: Option<u64>,
    /// What it takes; of one machine by itself, if it runs and can be measured now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, inline)]
    pub resource_usage: Option<ResourceUsageBody>,
    /// Its address, if it has a network card.
    #[schema(format = Ipv4)]
    pub ip_address: Option<String>,
    /// How it is connected, if it has a network card.
    pub network_config: Option<NetworkConfigBody>,
}

/// How a machine is connected.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = NetworkConfig)]
pub struct NetworkConfigBody {
    /// Its address.
    #[schema(format = Ipv4)]
    pub ip: String,
    /// The bridge that it is in, if the host has a network now.
    pub bridge: Option<String>,
    /// Address of its card.
    pub mac_address: String,
}

/// A page of the list of machines.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmList)]
pub struct VmListBody {
    /// Those of this page.
    pub vms: Vec<VmBody>,
    /// How many there are on all pages.
    pub total: u64,
    /// How many a page has at most.
    pub limit: u32,
    /// How many come before this page.
    pub offset: u64,
}

/// A machine was started.
#[derive(Debug, Serialize, ToSchema)]
pub struct StartedBody {
    /// A sentence.
    pub message: &'static str,
    /// Which.
    pub vm_name: String,
    /// `running`.
    pub status: &'static str,
    /// When its agent answered.
    #[schema(format = DateTime)]
    pub started_at: String,
}

/// A machine was stopped.
#[derive(Debug, Serialize, ToSchema)]
pub struct StoppedBody {
    /// A sentence.
    pub message: &'static str,
    /// Which.
    pub vm_name: String,
    /// `stopped`.
    pub status: &'static str,
    /// When.
    #[schema(format = DateTime)]
    pub stopped_at: String,
}

/// A machine was restarted.
#[derive(Debug, Serialize, ToSchema)]
pub struct RestartedBody {
    /// A sentence.
    pub message: &'static str,
    /// Which.
    pub vm_name: String,
    /// `running`.
    pub status: &'static str,
    /// When its agent answered.
    #[schema(format = DateTime)]
    pub restarted_at: String,
}

/// What a machine is called: its name, or its id.
pub fn name_of(sandbox: &Sandbox) -> String {
    let name = sandbox.name.clone();
    name.unwrap_or_else(|| sandbox.id.to_string())
}

/// The word for a state of one that has run.
pub fn word_of(status: Status) -> &'static str {
    match status {
        Status::Pending | Status::Off | Status::Stopping | Status::Stopped => "stopped",
        Status::Running => "running",
        Status::Pausing | Status::Paused | Status::Resuming => "paused",
        Status::Error => "error",
    }
}

/// The word for the state of a machine.
pub fn status_of(sandbox: &Sandbox) -> &'static str {
    word_at(sandbox.standing())
}

/// The word for where a machine stands.
pub fn word_at(standing: Standing) -> &'static str {
    match standing.status {
        Status::Off | Status::Pending if !standing.was_on => "created",
        status => word_of(status),
    }
}

/// Starts a machine that has no name. One that does not start is gone: its caller has nothing to find it by,
/// and its address would be taken.
async fn create_nameless(manager: &Manager, spec: CreateSpec) -> Result<Sandbox, CreateError> {
    let created = manager.create(spec).await;
    if let Err(CreateError::Host { id, .. }) = &created
        && let Err(source) = manager.destroy(id.as_str()).await
    {
        error!(sandbox = %id, error = chain(&source), "a machine that did not start is left");
    }
    created
}

/// A machine, on a host with these networks.
pub fn vm(sandbox: Sandbox, networks: &[NetworkInfo]) -> VmBody {
    let runs = sandbox.status == Status::Running;
    let started = sandbox.started_at.filter(|_| runs);
    let connection = sandbox.spec.network.as_ref();
    let network = match connection.and_then(|connection| connection.network.as_ref()) {
        Some(name) => networks.iter().find(|network| network.name == *name),
        None => networks.first(),
    };
    let template = sandbox.made_from().to_owned();
    let uptime = started.map(|at| Timestamp::now().as_second().saturating_sub(at.as_second()));
    VmBody {
        name: name_of(&sandbox),
        status: status_of(&sandbox),
        state: match sandbox.status {
            Status::Running => "running",
            Status::Error => "error",
            _ => "stopped",
        },
        status_reason: sandbox.status_reason,
        os_type: "linux",
        vcpus: sandbox.spec.vcpus,
        memory_mb: sandbox.spec.memory_mb,
        template,
        created_at: rfc3339(sandbox.created_at),
        updated_at: rfc3339(sandbox.updated_at),
        started_at: sandbox.started_at.map(rfc3339),
        stopped_at: sandbox.stopped_at.map(rfc3339),
        uptime_seconds: uptime.and_then(|seconds| u64::try_from(seconds).ok()),
        resource_usage: None,
        ip_address: sandbox.address.map(|address| address.to_string()),
        network_config: sandbox.address.map(|address| NetworkConfigBody {
            ip: address.to_string(),
            bridge: network.map(|network| network.name.clone()),
            mac_address: MacAddress::of(address).to_string(),
        }),
        id: sandbox.id.into(),
    }
}

/// The machine of this name or id, unless it is deleted.
pub async fn find(manager: &Manager, name: &str) -> Result<Sandbox, ApiError> {
    match manager.get(name).await {
        Ok(sandbox) if sandbox.status != Status::Stopped => Ok(sandbox),
        Ok(_) => Err(no_vm(name)),
        Err(error) => Err(error.at_vm(name)),
    }
}

/// The machine of this name or id, which runs and is in use until this is dropped.
pub async fn running(manager: &Manager, name: &str) -> Result<InUse, ApiError> {
    find(manager, name).await?;
    let in_use = manager.running(name).await;
    in_use.map_err(|error| error.at_vm(name))
}

/// The networks that the host has now.
async fn networks(manager: &Manager) -> Result<Vec<NetworkInfo>, ApiError> {
    let networks = manager.host_networks().await;
    networks.map_err(|error| ApiError::internal(&error))
}

/// The machine that was to start, or why it did not: 503 if none can, since the host has no KVM or its VMM does
/// not answer.
pub async fn running_or_why<E: AtVm>(
    manager: &Manager,
    name: &str,
    done: Result<Sandbox, E>,
) -> Result<Sandbox, ApiError> {
    let error = match done {
        Ok(sandbox) => return Ok(sandbox),
        Err(error) => error.at_vm(name),
    };
    if error.status() == StatusCode::BAD_GATEWAY && manager.host_health().await.vmm.is_err() {
        return Err(ApiError::unavailable(
            "Cloud Hypervisor service unavailable: this host cannot start virtual machines now; \
             GET /api/v1/health tells more, to administrators why",
        ));
    }
    Err(error)
}

/// List virtual machines
#[utoipa::path(
    get, path = "/api/v1/vms", operation_id = "listVms", tag = "vms",
    params(
        ("status" = Option<String>, Query, description = "Only those: `created`, `running`, `stopped`, `paused` or `error`"),
        ("os_type" = Option<String>, Query, description = "Only those: `linux` or `windows`"),
        ("limit" = Option<u32>, Query, description = "At most so many, 1 to 100; 50 if not given"),
        ("offset" = Option<u64>, Query, description = "Leave out so many"),
        ("sort" = Option<String>, Query, description = "`created_at`, `name`, `status`, `vcpus` or `memory_mb`"),
        ("order" = Option<String>, Query, description = "`asc` or `desc`; `desc` for `created_at` if not given"),
    ),
    responses(
        (status = 200, description = "A page of them", body = VmListBody),
        (status = 400, description = "A parameter makes no sense", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Json<VmListBody>, ApiError> {
    let (page, is_empty) = page(&query)?;
    let (sandboxes, total) = match is_empty {
        true => (Vec::new(), 0),
        false => caller.manager.page(&page).await?,
    };
    let networks = networks(&caller.manager).await?;
    let vms = sandboxes.into_iter();
    Ok(Json(VmListBody {
        vms: vms.map(|sandbox| vm(sandbox, &networks)).collect(),
        total,
        limit: page.limit,
        offset: page.offset,
    }))
}

/// Create a virtual machine
///
/// One with a name is `created` until it is started. One without gets its id as its name, and is
/// started at once.
#[utoipa::path(
    post, path = "/api/v1/vms", operation_id = "createVm", tag = "vms",
    request_body = Option<CreateVmRequest>,
    responses(
        (status = 201, description = "It is there", body = VmBody),
        (status = 400, description = "The body is not JSON", body = ErrorBody),
        (status = 409, description = "The name or address is taken", body = ErrorBody),
        (status = 422, description = "Fields are wrong; all of them are named", body = ErrorBody),
        (status = 502, description = "It did not start", body = ErrorBody),
        (status = 503, description = "No machine can start now, or the daemon is shutting down", body = ErrorBody),
    ),
)]
pub async fn create(
    caller: Caller,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<VmBody>), ApiError> {
    let mut fields = Fields::parse_optional(body)?;
    let request = CreateVmRequest::read(&mut fields);
    let networks = networks(&caller.manager).await?;
    let spec = spec(&caller.manager, request, fields).await?;
    let name = spec.name.clone().unwrap_or_default();
    let created = match spec.name {
        Some(_) => caller.manager.create_off(spec).await,
        None => create_nameless(&caller.manager, spec).await,
    };
    let sandbox = running_or_why(&caller.manager, &name, created).await?;
    Ok((StatusCode::CREATED, Json(vm(sandbox, &networks))))
}

/// Get a virtual machine
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}", operation_id = "getVm", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "What there is to say of it", body = VmBody),
        (status = 404, description = "No such machine", body = ErrorBody),
    ),
)]
pub async fn get(caller: Caller, Path(name): Path<String>) -> Result<Json<VmBody>, ApiError> {
    let sandbox = find(&caller.manager, &name).await?;
    let networks = networks(&caller.manager).await?;
    let resource_usage = in_short(&caller.manager, &sandbox).await;
    let body = vm(sandbox, &networks);
    Ok(Json(VmBody {
        resource_usage,
        ..body
    }))
}

/// Start a virtual machine
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/start", operation_id = "startVm", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "It runs, and its agent has answered", body = StartedBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "It is neither created nor stopped", body = ErrorBody),
        (status = 502, description = "It did not start, and is as before", body = ErrorBody),
        (status = 503, description = "No machine can start now", body = ErrorBody),
    ),
)]
pub async fn start(
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<StartedBody>, ApiError> {
    find(&caller.manager, &name).await?;
    let started = caller.manager.power_on(&name).await;
    let sandbox = running_or_why(&caller.manager, &name, started).await?;
    Ok(Json(StartedBody {
        message: "VM started successfully",
        vm_name: name_of(&sandbox),
        status: status_of(&sandbox),
        started_at: rfc3339(sandbox.started_at.unwrap_or(sandbox.updated_at)),
    }))
}

/// Stop a virtual machine
///
/// Its guest shuts down; if that takes too long, its power is cut. Its disk is kept.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/stop", operation_id = "stopVm", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = Option<StopRequest>,
    responses(
        (status = 200, description = "It is stopped", body = StoppedBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 422, description = "Fields are wrong", body = ErrorBody),
    ),
)]
pub async fn stop(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<StoppedBody>, ApiError> {
    let stop = stop_spec(body)?;
    find(&caller.manager, &name).await?;
    let stopped = caller.manager.power_off(&name, stop).await;
    let sandbox = stopped.map_err(|error| error.at_vm(&name))?;
    Ok(Json(StoppedBody {
        message: "VM stopped successfully",
        vm_name: name_of(&sandbox),
        status: status_of(&sandbox),
        stopped_at: rfc3339(sandbox.stopped_at.unwrap_or(sandbox.updated_at)),
    }))
}

/// Restart a virtual machine
///
/// As a stop and a start.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/restart", operation_id = "restartVm", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = Option<StopRequest>,
    responses(
        (status = 200, description = "It runs, and its agent has answered", body = RestartedBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "It does not run", body = ErrorBody),
        (status = 502, description = "It did not start, and is stopped", body = ErrorBody),
        (status = 503, description = "No machine can start now", body = ErrorBody),
    ),
)]
pub async fn restart(
    caller: Caller,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<RestartedBody>, ApiError> {
    let stop = stop_spec(body)?;
    find(&caller.manager, &name).await?;
    let restarted = caller.manager.restart(&name, stop).await;
    let sandbox = running_or_why(&caller.manager, &name, restarted).await?;
    Ok(Json(RestartedBody {
        message: "VM restarted successfully",
        vm_name: name_of(&sandbox),
        status: status_of(&sandbox),
        restarted_at: rfc3339(sandbox.started_at.unwrap_or(sandbox.updated_at)),
    }))
}

/// Delete a virtual machine
///
/// With its disk. Its snapshots stay.
#[utoipa::path(
    delete, path = "/api/v1/vms/{vm_name}", operation_id = "deleteVm", tag = "vms",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "No such machine", body = ErrorBody),
    ),
)]
pub async fn delete(caller: Caller, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    find(&caller.manager, &name).await?;
    let destroyed = caller.manager.destroy(&name).await;
    destroyed.map_err(|error| error.at_vm(&name))?;
    Ok(StatusCode::NO_CONTENT)
}
