//! The JSON that endpoints take.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::compat::{self, CompatError, Shape};
use crate::config::{DiskConfig, NetConfig, VmConfig, VsockConfig};
use crate::control::request::{Action, Resize};

/// Why a body is not what its endpoint takes.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// No JSON, or not of this shape.
    #[error("the body is not what this endpoint takes")]
    Json(#[from] serde_json::Error),
    /// It asks for something that this VMM has not.
    #[error("the body asks for what this VMM does not have")]
    Compat(#[from] CompatError),
    /// Not a file.
    #[error("{url:?} is no URL of a file; expected file:///PATH")]
    Url {
        /// The URL.
        url: String,
    },
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, BodyError> {
    // An array would do for an object, its elements for the fields in their order.
    let value: serde_json::Map<String, Value> = serde_json::from_slice(body)?;
    Ok(serde_json::from_value(Value::Object(value))?)
}

/// The same, of something that Cloud Hypervisor describes with more fields than this VMM.
fn parse_compatible<T: DeserializeOwned>(shape: Shape, body: &[u8]) -> Result<T, BodyError> {
    let fields: serde_json::Map<String, Value> = serde_json::from_slice(body)?;
    let mut value = Value::Object(fields);
    compat::reduce(shape, &mut value)?;
    Ok(serde_json::from_value(value)?)
}

pub(super) fn create(body: &[u8]) -> Result<Action, BodyError> {
    let config: VmConfig = parse_compatible(Shape::Vm, body)?;
    Ok(Action::Create(Box::new(config)))
}

pub(super) fn add_disk(body: &[u8]) -> Result<Action, BodyError> {
    parse_compatible::<DiskConfig>(Shape::Disk, body).map(Action::AddDisk)
}

/// The numbers in `fds` are those of the client, if they mean anything: the descriptors are those
/// that came along.
pub(super) fn add_net(body: &[u8], descriptors: Vec<OwnedFd>) -> Result<Action, BodyError> {
    let mut fields: serde_json::Map<String, Value> = serde_json::from_slice(body)?;
    if !descriptors.is_empty() {
        fields.remove("fds");
    }
    let mut value = Value::Object(fields);
    compat::reduce(Shape::Net, &mut value)?;
    let mut card: NetConfig = serde_json::from_value(value)?;
    if !descriptors.is_empty() {
        card.fds = Some(descriptors.iter().map(AsRawFd::as_raw_fd).collect());
    }
    Ok(Action::AddNet(card, descriptors))
}

pub(super) fn add_vsock(body: &[u8]) -> Result<Action, BodyError> {
    parse_compatible::<VsockConfig>(Shape::Vsock, body).map(Action::AddVsock)
}

pub(super) fn resize(body: &[u8]) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        desired_vcpus: Option<u8>,
        desired_ram: Option<u64>,
        desired_balloon: Option<u64>,
    }
    let body: Body = parse(body)?;
    Ok(Action::Resize(Resize {
        vcpus: body.desired_vcpus,
        memory: body.desired_ram,
        balloon: body.desired_balloon,
    }))
}

pub(super) fn resize_disk(body: &[u8]) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        id: String,
        desired_size: u64,
    }
    let Body { id, desired_size } = parse(body)?;
    Ok(Action::ResizeDisk {
        id,
        size: desired_size,
    })
}

pub(super) fn remove_device(body: &[u8]) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        id: String,
    }
    let Body { id } = parse(body)?;
    Ok(Action::RemoveDevice { id })
}

pub(super) fn core_dump(body: &[u8]) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        destination_url: String,
    }
    let Body { destination_url } = parse(body)?;
    let path = file_of_url(destination_url)?;
    Ok(Action::CoreDump { path })
}

/// The path of a `file:///PATH`, taken literally: no escapes.
fn file_of_url(url: String) -> Result<PathBuf, BodyError> {
    match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') && !path.contains('\0') => Ok(PathBuf::from(path)),
        _ => Err(BodyError::Url { url }),
    }
}
