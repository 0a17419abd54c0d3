//! The JSON that endpoints take.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::compat::{self, CompatError, Shape};
use crate::config::{DiskConfig, ImageType, NetConfig, SerialConfig, VmConfig, VsockConfig};
use crate::control::request::{Action, Changes, Resize, Restore, SnapshotTarget, WorkingSetTarget};
use crate::devices::virtio::block::{ImageError, ImageFiles};
use crate::snapshot::{Destination, FileError, Prefault, RestoreConfig, WorkingSetFile};

/// Why a body is not what its endpoint takes.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// No JSON, or not of this shape.
    #[error("the body is not what this endpoint takes")]
    Json(#[from] serde_json::Error),
    /// It asks for something that this VMM has not.
    #[error("the body asks for what this VMM does not have")]
    Compat(#[from] CompatError),
    /// Descriptors for a card that is not there.
    #[error("net_fds names the card {id:?}, which is not in net")]
    NoCard {
        /// The id.
        id: String,
    },
    /// Other descriptors came along than the body says.
    #[error("{given} descriptors came with the request; expected {expected}")]
    Descriptors {
        /// How many came.
        given: usize,
        /// What should have come.
        expected: &'static str,
    },
    /// The descriptors cannot be used.
    #[error(transparent)]
    SnapshotFile(#[from] FileError),
    /// The descriptors cannot be used.
    #[error(transparent)]
    Image(#[from] ImageError),
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

/// The files are given by the directory that they are to be made in, or by descriptors: of new files
/// for manifest, state and memory, and perhaps of that for the memory once more, to read only.
pub(super) fn snapshot(body: &[u8], descriptors: Vec<OwnedFd>) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        destination_url: Option<String>,
        #[serde(default)]
        keep_base_layers: usize,
    }
    let Body {
        destination_url,
        keep_base_layers: keep,
    } = parse(body)?;
    let given = descriptors.len();
    let mut files = descriptors.into_iter().map(File::from);
    let target = match (destination_url, given) {
        (Some(url), 0) => SnapshotTarget::Directory(file_of_url(url)?),
        (None, 3 | 4) => {
            let (Some(manifest), Some(state), Some(memory)) =
                (files.next(), files.next(), files.next())
            else {
                return Err(BodyError::Descriptors {
                    given,
                    expected: "three or four",
                });
            };
            let files = Destination::from_files([manifest, state, memory], files.next())?;
            SnapshotTarget::Files(files)
        }
        (Some(_), _) => {
            return Err(BodyError::Descriptors {
                given,
                expected: "none beside a destination_url",
            });
        }
        (None, _) => {
            return Err(BodyError::Descriptors {
                given,
                expected: "a destination_url, or descriptors for manifest, state and memory",
            });
        }
    };
    Ok(Action::Snapshot { target, keep })
}

/// Takes the descriptors of network cards, in the order of `net_fds`.
pub(super) fn restore(body: &[u8], descriptors: Vec<OwnedFd>) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        source_url: String,
        #[serde(default)]
        base_urls: Vec<String>,
        #[serde(default)]
        prefault: bool,
        #[serde(default)]
        verify: bool,
        #[serde(default)]
        resume: bool,
        #[serde(default)]
        disks: Vec<DiskConfig>,
        #[serde(default)]
        net: Vec<NetConfig>,
        vsock: Option<VsockConfig>,
        serial: Option<SerialConfig>,
        #[serde(default)]
        net_fds: Vec<NetFds>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct NetFds {
        id: String,
        num_fds: usize,
    }
    let body: Body = parse_compatible(Shape::Restore, body)?;
    let given = descriptors.len();
    let mut net = body.net;
    let mut numbers = descriptors.iter().map(AsRawFd::as_raw_fd);
    for NetFds { id, num_fds } in &body.net_fds {
        let card = net.iter_mut().find(|card| card.id.as_ref() == Some(id));
        let card = card.ok_or_else(|| BodyError::NoCard { id: id.clone() })?;
        card.fds = Some(numbers.by_ref().take(*num_fds).collect());
    }
    let named: usize = body.net_fds.iter().map(|card| card.num_fds).sum();
    if named != given {
        return Err(BodyError::Descriptors {
            given,
            expected: "as many as the num_fds of all net_fds",
        });
    }
    let bases = body.base_urls.into_iter().map(file_of_url);
    Ok(Action::Restore(Box::new(Restore {
        snapshot: RestoreConfig {
            source: file_of_url(body.source_url)?,
            bases: bases.collect::<Result<_, _>>()?,
            prefault: match body.prefault {
                true => Prefault::On,
                false => Prefault::Off,
            },
            verify: body.verify,
        },
        config: None,
        changes: Changes {
            disks: body.disks,
            net,
            vsock: body.vsock,
            serial: body.serial,
        },
        descriptors,
        resume: body.resume,
    })))
}

/// The file is given by the directory of the snapshot, which it is made in, or by the descriptor of a
/// new one.
pub(super) fn working_set(body: &[u8], descriptors: Vec<OwnedFd>) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        destination_url: Option<String>,
    }
    let Body { destination_url } = parse(body)?;
    let given = descriptors.len();
    let mut files = descriptors.into_iter().map(File::from);
    let target = match (destination_url, files.next(), given) {
        (Some(url), None, _) => WorkingSetTarget::Directory(file_of_url(url)?),
        (None, Some(file), 1) => WorkingSetTarget::File(WorkingSetFile::from_file(file)?),
        _ => {
            return Err(BodyError::Descriptors {
                given,
                expected: "one, or a destination_url",
            });
        }
    };
    Ok(Action::SaveWorkingSet(target))
}

/// The image and those that it builds on come as descriptors, topmost first.
pub(super) fn replace_disk(body: &[u8], descriptors: Vec<OwnedFd>) -> Result<Action, BodyError> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        id: String,
        image_types: Vec<ImageType>,
    }
    let Body { id, image_types } = parse(body)?;
    let given = descriptors.len();
    if given == 0 || given != image_types.len() {
        return Err(BodyError::Descriptors {
            given,
            expected: "one for each of image_types, and at least one",
        });
    }
    let files = descriptors.into_iter().map(File::from);
    let image = ImageFiles::from_descriptors(image_types.into_iter().zip(files).collect())?;
    Ok(Action::ReplaceDisk { id, image })
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
