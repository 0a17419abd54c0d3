//! What is asked for of virtual machines: bodies of requests, and pages of the list.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use utoipa::ToSchema;

use super::at_vm::AtVm;
use super::body::{FromFields, parse};
use super::error::ApiError;
use super::fields::Fields;
use crate::domain::{CreateSpec, Manager, NetworkSpec, Page, Problem, SortBy, Status, StopSpec};

/// How many machines a list has unless it is asked for.
const DEFAULT_LIMIT: u32 = 50;
/// The most machines of one list.
const MAX_LIMIT: u32 = 100;
/// How long a guest has to shut down unless it is asked for, in seconds.
const DEFAULT_STOP_SEC: i64 = 30;
/// How long it can have, in seconds.
const STOP_SEC: RangeInclusive<i64> = 0..=3600;
/// The largest disk, in GiB: 1 TiB.
const MAX_DISK_GB: i64 = 1024;
/// What the default template is called here.
const DEFAULT_TEMPLATE: &str = "linux-default";
/// What it is called by the domain.
const PLAIN_TEMPLATE: &str = "minimal";
/// Of one GB of a disk, MiB.
const MB_PER_GB: i64 = 1024;

/// The machine that is asked for.
#[derive(Debug, Default, ToSchema)]
pub struct CreateVmRequest {
    /// Its name: 1 to 64 letters, digits, `_` or `-`. Without one, it gets its id as its name and is
    /// started at once.
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// `linux`.
    #[schema(nullable = false)]
    pub os_type: Option<String>,
    /// Virtual CPUs, 1 to 32. What the template says if not given, or 1.
    #[schema(nullable = false)]
    pub vcpus: Option<i64>,
    /// RAM in MiB, 128 to what the host has. What the template says if not given, or 512.
    #[schema(nullable = false)]
    pub memory_mb: Option<i64>,
    /// Template of its disk, or name or id of a snapshot; `linux-default` is the template `minimal`.
    #[schema(default = "linux-default", nullable = false)]
    pub template: Option<String>,
    /// How it shall be connected.
    #[schema(nullable = false)]
    pub network_config: Option<NetworkConfigRequest>,
    /// Its disk.
    #[schema(nullable = false)]
    pub storage_config: Option<StorageConfigRequest>,
}

/// How a machine shall be connected.
#[derive(Debug, Default, ToSchema)]
pub struct NetworkConfigRequest {
    /// A bridge of the host; its first if not given.
    #[schema(nullable = false)]
    pub bridge: Option<String>,
    /// Its address; one that is free if not given.
    #[schema(nullable = false, value_type = Option<String>, format = Ipv4)]
    pub ip: Option<String>,
}

/// What disk a machine shall have.
#[derive(Debug, Default, ToSchema)]
pub struct StorageConfigRequest {
    /// Size of its disk in GiB; that of its template if not given, and not less. An ext4 file system on it
    /// is made as large at each start.
    #[schema(nullable = false)]
    pub disk_size_gb: Option<i64>,
    /// `ssd`: there is one kind of disk.
    #[schema(nullable = false)]
    pub disk_type: Option<String>,
}

impl FromFields for CreateVmRequest {
    fn read(fields: &mut Fields) -> Self {
        Self {
            name: fields.string("name"),
            os_type: fields.string("os_type"),
            vcpus: fields.integer("vcpus", i64::MIN..=i64::MAX),
            memory_mb: fields.integer("memory_mb", i64::MIN..=i64::MAX),
            template: fields.string("template"),
            network_config: fields.object("network_config", |fields| NetworkConfigRequest {
                bridge: fields.string("bridge"),
                ip: fields.string("ip"),
            }),
            storage_config: fields.object("storage_config", |fields| StorageConfigRequest {
                disk_size_gb: fields.integer("disk_size_gb", 1..=MAX_DISK_GB),
                disk_type: fields.string("disk_type"),
            }),
        }
    }
}

/// How a machine shall be stopped.
#[derive(Debug, Default, ToSchema)]
pub struct StopRequest {
    /// Whether its power is cut at once. Its disk is then as after a power failure.
    #[schema(default = false, nullable = false)]
    pub force: Option<bool>,
    /// Seconds that it has to shut down before its power is cut, 0 to 3600.
    #[schema(default = 30, nullable = false)]
    pub timeout_seconds: Option<i64>,
}

impl FromFields for StopRequest {
    fn read(fields: &mut Fields) -> Self {
        Self {
            force: fields.boolean("force"),
            timeout_seconds: fields.integer("timeout_seconds", STOP_SEC),
        }
    }
}

/// What is asked for, or all that is wrong with it.
pub async fn spec(
    manager: &Manager,
    request: CreateVmRequest,
    mut fields: Fields,
) -> Result<CreateSpec, ApiError> {
    let mut note = |field: &str, error: String| fields.wrong(field, error);
    match request.os_type.as_deref() {
        None | Some("linux") => {}
        Some("windows") => note(
            "os_type",
            "windows needs UEFI firmware and a PCI bus, which this VMM does not have; only linux \
             can run"
                .to_owned(),
        ),
        Some(other) => note("os_type", format!("must be linux, not {other:?}")),
    }
    let network = request.network_config.unwrap_or_default();
    let address = match network.ip.as_deref().map(str::parse::<Ipv4Addr>) {
        None => None,
        Some(Ok(address)) => Some(address),
        Some(Err(_)) => {
            note("network_config.ip", "must be an IPv4 address".to_owned());
            None
        }
    };
    let storage = request.storage_config.unwrap_or_default();
    if let Some(kind) = storage.disk_type.filter(|kind| kind != "ssd") {
        let problem = format!("must be \"ssd\", not {kind:?}: there is one kind of disk");
        note("storage_config.disk_type", problem);
    }
    let template = match request.template.as_deref() {
        None | Some(DEFAULT_TEMPLATE) => PLAIN_TEMPLATE.to_owned(),
        Some(other) => other.to_owned(),
    };
    let spec = CreateSpec {
        template,
        vcpus: request.vcpus,
        memory_mb: request.memory_mb,
        timeout_sec: 0,
        network: NetworkSpec {
            name: network.bridge,
            address,
            ..NetworkSpec::default()
        },
        name: request.name,
        disk_mb: storage
            .disk_size_gb
            .map(|size| size.saturating_mul(MB_PER_GB)),
        is_kept: true,
    };
    let problems = manager.problems(&spec).await;
    let problems = problems.map_err(|error| error.at_vm(""))?;
    for Problem { field, sentence } in problems {
        let field = match field {
            "network" => "network_config.bridge",
            "disk_mb" => "storage_config.disk_size_gb",
            other => other,
        };
        fields.wrong(field, sentence);
    }
    fields.finish(Some(spec))
}

/// How a machine shall be stopped, or all that is wrong with it.
pub fn stop_spec(body: Result<Bytes, BytesRejection>) -> Result<StopSpec, ApiError> {
    let request: StopRequest = parse(body)?;
    let seconds = request.timeout_seconds.unwrap_or(DEFAULT_STOP_SEC);
    Ok(StopSpec {
        force: request.force.unwrap_or(false),
        timeout: Duration::from_secs(seconds.cast_unsigned()),
    })
}

/// The page that is asked for, and whether nothing can be on it.
pub fn page(query: &HashMap<String, String>) -> Result<(Page, bool), ApiError> {
    let get = |name: &str| query.get(name).map(String::as_str);
    let (statuses, was_started) = match get("status") {
        None => (None, None),
        Some("created") => (Some(vec![Status::Off, Status::Pending]), Some(false)),
        Some("running") => (Some(vec![Status::Running]), None),
        Some("stopped") => (
            Some(vec![Status::Off, Status::Pending, Status::Stopping]),
            Some(true),
        ),
        Some("paused") => (
            Some(vec![Status::Pausing, Status::Paused, Status::Resuming]),
            None,
        ),
        Some("error") => (Some(vec![Status::Error]), None),
        Some(_) => {
            let issue = "must be created, running, stopped, paused or error";
            return Err(ApiError::bad_parameter("status", issue));
        }
    };
    let is_empty = match get("os_type") {
        None | Some("linux") => false,
        Some("windows") => true,
        Some(_) => {
            return Err(ApiError::bad_parameter(
                "os_type",
                "must be linux or windows",
            ));
        }
    };
    let limit = match get("limit") {
        None => DEFAULT_LIMIT,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=MAX_LIMIT).contains(limit))
            .ok_or_else(|| {
                ApiError::bad_parameter("limit", format!("must be between 1 and {MAX_LIMIT}"))
            })?,
    };
    let offset = match get("offset") {
        None => 0,
        Some(text) => text
            .parse()
            .map_err(|_| ApiError::bad_parameter("offset", "must be a number, 0 or more"))?,
    };
    let sort = match get("sort") {
        None | Some("created_at") => SortBy::CreatedAt,
        Some("name") => SortBy::Name,
        Some("status") => SortBy::Status,
        Some("vcpus") => SortBy::Vcpus,
        Some("memory_mb") => SortBy::MemoryMb,
        Some(_) => {
            let issue = "must be created_at, name, status, vcpus or memory_mb";
            return Err(ApiError::bad_parameter("sort", issue));
        }
    };
    let is_descending = match get("order") {
        None => sort == SortBy::CreatedAt,
        Some("asc") => false,
        Some("desc") => true,
        Some(_) => return Err(ApiError::bad_parameter("order", "must be asc or desc")),
    };
    let page = Page {
        owner: None,
        statuses,
        was_started,
        sort,
        is_descending,
        limit,
        offset,
    };
    Ok((page, is_empty))
}
