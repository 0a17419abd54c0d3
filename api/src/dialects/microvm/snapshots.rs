//! Snapshots of a virtual machine.
//!
//! Their names are the machine's own: another machine may have a snapshot of the same name.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::at_vm::AtVm;
use super::body::{FromFields, parse};
use super::error::{ApiError, ErrorBody};
use super::extract::Path;
use super::fields::Fields;
use super::rfc3339;
use super::vms::{find, name_of, running_or_why, word_of};
use crate::domain::{
    Manager, Sandbox, Snapshot, SnapshotSpec, check_snapshot_description, check_snapshot_name,
};
use crate::http::Caller;

/// The snapshot that is asked for.
#[derive(Debug, ToSchema)]
#[schema(as = CreateVmSnapshotRequest)]
pub struct CreateSnapshotRequest {
    /// Its name; its id if not given.
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// What there is to say of it.
    #[schema(nullable = false)]
    pub description: Option<String>,
    /// Whether it has the machine's memory too. If not, the file system is frozen while it is taken.
    #[schema(default = true, nullable = false)]
    pub include_memory: Option<bool>,
}

impl FromFields for CreateSnapshotRequest {
    fn read(fields: &mut Fields) -> Self {
        Self {
            name: fields.checked("name", check_snapshot_name),
            description: fields.checked("description", check_snapshot_description),
            include_memory: fields.boolean("include_memory"),
        }
    }
}

/// A snapshot.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmSnapshot)]
pub struct SnapshotBody {
    /// Its name; its id, if it was given none.
    pub name: String,
    /// Its id.
    pub id: String,
    /// The machine.
    pub vm_name: String,
    /// When it was taken.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// Size on the host's disk, in bytes. Some of it may be shared with others.
    pub size_bytes: u64,
    /// What was said of it.
    pub description: Option<String>,
    /// `sha256:` and the digest of the manifest of its memory, which has those of all memory and state;
    /// without memory, of its topmost disk image.
    pub checksum: String,
    /// The machine as it was.
    pub metadata: MetadataBody,
}

/// A machine as it was when a snapshot was taken.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmSnapshotMetadata)]
pub struct MetadataBody {
    /// `running`, `paused` or `stopped`.
    pub vm_status: &'static str,
    /// Virtual CPUs.
    pub vcpus: u8,
    /// RAM in MiB.
    pub memory_mb: u32,
    /// Whether its memory is in the snapshot, so that it goes on where it was.
    pub include_memory: bool,
}

/// The snapshots of a machine.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = VmSnapshotList)]
pub struct SnapshotListBody {
    /// Newest first.
    pub snapshots: Vec<SnapshotBody>,
}

/// A machine was rolled back.
#[derive(Debug, Serialize, ToSchema)]
pub struct RestoredBody {
    /// A sentence.
    pub message: &'static str,
    /// Which.
    pub vm_name: String,
    /// To what.
    pub snapshot_name: String,
    /// When it was done.
    #[schema(format = DateTime)]
    pub restored_at: String,
    /// Where the machine stands since.
    pub status: &'static str,
}

fn body(snapshot: Snapshot, vm: &Sandbox) -> SnapshotBody {
    let content = snapshot.content.as_ref();
    SnapshotBody {
        name: shown(&snapshot),
        vm_name: name_of(vm),
        created_at: rfc3339(snapshot.created_at),
        size_bytes: content.map_or(0, |content| content.size_bytes),
        checksum: content.map_or_else(String::new, |content| {
            format!("sha256:{}", content.checksum)
        }),
        description: snapshot.description,
        metadata: MetadataBody {
            vm_status: word_of(snapshot.status),
            vcpus: snapshot.spec.vcpus,
            memory_mb: snapshot.spec.memory_mb,
            include_memory: !snapshot.layers.memory.is_empty(),
        },
        id: snapshot.id.into(),
    }
}

fn shown(snapshot: &Snapshot) -> String {
    let name = snapshot.own_name().map(str::to_owned);
    name.unwrap_or_else(|| snapshot.id.to_string())
}

/// The snapshot of this machine of this name or id.
async fn find_snapshot(manager: &Manager, vm: &Sandbox, name: &str) -> Result<Snapshot, ApiError> {
    let found = manager.snapshot_of(&vm.id, name).await;
    found.map_err(|error| match error {
        crate::domain::SnapshotError::NotFound => ApiError::not_found(format!(
            "Snapshot '{name}' of VM '{}' not found",
            name_of(vm)
        )),
        other => other.at_vm(&name_of(vm)),
    })
}

/// List the snapshots of a machine
#[utoipa::path(
    get, path = "/api/v1/vms/{vm_name}/snapshots", operation_id = "listVmSnapshots",
    tag = "snapshots",
    params(("vm_name" = String, Path, description = "Its name or id")),
    responses(
        (status = 200, description = "All of them", body = SnapshotListBody),
        (status = 404, description = "No such machine", body = ErrorBody),
    ),
)]
pub async fn list(
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<SnapshotListBody>, ApiError> {
    let vm = find(&caller.manager, &name).await?;
    let snapshots = caller.manager.list_snapshots().await?;
    let snapshots = snapshots.into_iter();
    let snapshots = snapshots.filter(|snapshot| snapshot.sandbox == vm.id);
    Ok(Json(SnapshotListBody {
        snapshots: snapshots.map(|snapshot| body(snapshot, &vm)).collect(),
    }))
}

/// Take a snapshot
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/snapshots", operation_id = "createVmSnapshot",
    tag = "snapshots",
    params(("vm_name" = String, Path, description = "Its name or id")),
    request_body = Option<CreateSnapshotRequest>,
    responses(
        (status = 201, description = "It is taken", body = SnapshotBody),
        (status = 404, description = "No such machine", body = ErrorBody),
        (status = 409, description = "The name is taken, or there is nothing to take",
            body = ErrorBody),
        (status = 422, description = "Fields are wrong", body = ErrorBody),
        (status = 502, description = "It was not saved, and runs on", body = ErrorBody),
    ),
)]
pub async fn create(
    caller: Caller,
    Path(name): Path<String>,
    request: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<SnapshotBody>), ApiError> {
    let request: CreateSnapshotRequest = parse(request)?;
    let vm = find(&caller.manager, &name).await?;
    let spec = SnapshotSpec {
        name: request.name,
        description: request.description,
        include_memory: request.include_memory.unwrap_or(true),
        is_own: true,
        overwrite: false,
    };
    let taken = caller.manager.snapshot(vm.id.as_str(), spec).await;
    let snapshot = taken.map_err(|error| error.at_vm(&name))?;
    Ok((StatusCode::CREATED, Json(body(snapshot, &vm))))
}

/// Restore a machine from one of its snapshots
///
/// In place: it keeps its id, name and address. What it has written since is lost. It runs then if it
/// ran before, or if the snapshot has its memory.
#[utoipa::path(
    post, path = "/api/v1/vms/{vm_name}/snapshots/{snapshot_name}/restore",
    operation_id = "restoreVmSnapshot", tag = "snapshots",
    params(
        ("vm_name" = String, Path, description = "Its name or id"),
        ("snapshot_name" = String, Path, description = "Its name or id"),
    ),
    responses(
        (status = 200, description = "It is as it was", body = RestoredBody),
        (status = 404, description = "No such machine or snapshot", body = ErrorBody),
        (status = 409, description = "It neither runs nor is paused or stopped", body = ErrorBody),
        (status = 502, description = "It did not start, and is stopped", body = ErrorBody),
        (status = 503, description = "No machine can start now", body = ErrorBody),
    ),
)]
pub async fn restore(
    caller: Caller,
    Path((name, snapshot)): Path<(String, String)>,
) -> Result<Json<RestoredBody>, ApiError> {
    let vm = find(&caller.manager, &name).await?;
    let snapshot = find_snapshot(&caller.manager, &vm, &snapshot).await?;
    let id = snapshot.id.as_str();
    let restored = caller.manager.roll_back(vm.id.as_str(), id).await;
    let sandbox = running_or_why(&caller.manager, &name, restored).await?;
    Ok(Json(RestoredBody {
        message: "VM restored successfully",
        vm_name: name_of(&sandbox),
        snapshot_name: shown(&snapshot),
        restored_at: rfc3339(sandbox.updated_at),
        status: super::vms::status_of(&sandbox),
    }))
}

/// Delete a snapshot
///
/// The machine is as before.
#[utoipa::path(
    delete, path = "/api/v1/vms/{vm_name}/snapshots/{snapshot_name}",
    operation_id = "deleteVmSnapshot", tag = "snapshots",
    params(
        ("vm_name" = String, Path, description = "Its name or id"),
        ("snapshot_name" = String, Path, description = "Its name or id"),
    ),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "No such machine or snapshot", body = ErrorBody),
    ),
)]
pub async fn delete(
    caller: Caller,
    Path((name, snapshot)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let vm = find(&caller.manager, &name).await?;
    let snapshot = find_snapshot(&caller.manager, &vm, &snapshot).await?;
    let deleted = caller.manager.delete_snapshot(snapshot.id.as_str()).await;
    deleted.map_err(|error| error.at_vm(&name))?;
    Ok(StatusCode::NO_CONTENT)
}
