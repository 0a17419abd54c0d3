//! The values of flags, turned into the parts of a configuration.

use std::os::fd::RawFd;
use std::path::PathBuf;

use super::options::{Options, elements};
use super::{EventTarget, RestoreArgs};
use crate::api::ApiTarget;
use crate::config::{
    BackingImage, BalloonConfig, ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, HotplugMethod,
    ImageType, MemoryConfig, NetConfig, RngConfig, SerialConfig, VsockConfig,
};
use crate::sandboxing::JailConfig;
use crate::snapshot::{Prefault, RestoreConfig};

pub(super) fn parse_restore(text: &str) -> Result<RestoreArgs, String> {
    let known = [
        "source_url",
        "base_url",
        "config",
        "resume",
        "prefault",
        "verify",
    ];
    let options = Options::parse(text, &known)?;
    let directory = |url: &str| match url.strip_prefix("file://") {
        Some(path) if path.starts_with('/') => Ok(PathBuf::from(path)),
        _ => Err(format!("{url:?} is no directory: expected file:///PATH")),
    };
    let bases = options.list("base_url");
    Ok(RestoreArgs {
        snapshot: RestoreConfig {
            source: directory(options.required("source_url")?)?,
            bases: bases.map(directory).collect::<Result<_, _>>()?,
            prefault: match options.text("prefault") {
                Some("working-set") => Prefault::WorkingSet,
                _ if options.switch("prefault", false)? => Prefault::On,
                _ => Prefault::Off,
            },
            verify: options.switch("verify", false)?,
        },
        config_by_flags: match options.text("config") {
            None | Some("snapshot") => false,
            Some("flags") => true,
            Some(other) => return Err(format!("config={other}: expected snapshot or flags")),
        },
        resume: options.switch("resume", true)?,
    })
}

pub(super) fn parse_image_type(text: &str) -> Result<ImageType, String> {
    match text {
        "raw" => Ok(ImageType::Raw),
        "qcow2" => Ok(ImageType::Qcow2),
        other => Err(format!(
            "{other:?} is no type of image: expected raw or qcow2"
        )),
    }
}

pub(super) fn parse_cpus(text: &str) -> Result<CpusConfig, String> {
    let options = Options::parse(text, &["boot", "max"])?;
    let boot_vcpus = options.get("boot")?.unwrap_or(1);
    Ok(CpusConfig {
        boot_vcpus,
        max_vcpus: options.get("max")?.unwrap_or(boot_vcpus),
    })
}

pub(super) fn parse_memory(text: &str) -> Result<MemoryConfig, String> {
    let known = [
        "size",
        "thp",
        "hotplug_method",
        "hotplug_size",
        "hotplugged_size",
    ];
    let options = Options::parse(text, &known)?;
    Ok(MemoryConfig {
        size: parse_size(options.required("size")?)?,
        thp: options.switch("thp", true)?,
        hotplug_method: match options.text("hotplug_method") {
            None | Some("acpi") => HotplugMethod::Acpi,
            Some("virtio-mem") => HotplugMethod::VirtioMem,
            Some(other) => {
                return Err(format!(
                    "hotplug_method={other}: expected acpi or virtio-mem"
                ));
            }
        },
        hotplug_size: options.text("hotplug_size").map(parse_size).transpose()?,
        hotplugged_size: options
            .text("hotplugged_size")
            .map(parse_size)
            .transpose()?,
    })
}

/// A number of bytes, or of KiB, MiB or GiB with the suffix K, M or G.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size: expected a number with K, M or G, as in 512M"))
}

pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let known = [
        "path",
        "readonly",
        "image_type",
        "backing_files",
        "backing",
        "id",
        "serial",
        "num_queues",
        "queue_size",
        "direct",
        "sparse",
    ];
    let options = Options::parse_limited(text, &known)?;
    let default = DiskConfig::new(options.required("path")?);
    Ok(DiskConfig {
        id: options.text("id").map(str::to_owned),
        readonly: options.switch("readonly", false)?,
        image_type: parse_image_type(options.text("image_type").unwrap_or("raw"))?,
        backing_files: options.switch("backing_files", false)?,
        backing: options
            .list("backing")
            .map(|image| {
                let (kind, path) = image
                    .split_once(':')
                    .ok_or_else(|| format!("backing={image}: expected TYPE:PATH"))?;
                Ok(BackingImage {
                    image_type: parse_image_type(kind)?,
                    path: path.into(),
                })
            })
            .collect::<Result<_, String>>()?,
        serial: options.text("serial").map(str::to_owned),
        num_queues: options.get("num_queues")?.unwrap_or(default.num_queues),
        queue_size: options.get("queue_size")?.unwrap_or(default.queue_size),
        direct: options.switch("direct", default.direct)?,
        sparse: options.switch("sparse", default.sparse)?,
        rate_limiter_config: options.rate_limits()?,
        ..default
    })
}

pub(super) fn parse_net(text: &str) -> Result<NetConfig, String> {
    let known = [
        "tap",
        "fd",
        "mac",
        "id",
        "num_queues",
        "queue_size",
        "offload_tso",
        "offload_ufo",
        "offload_csum",
    ];
    let options = Options::parse_limited(text, &known)?;
    let default = NetConfig::default();
    Ok(NetConfig {
        id: options.text("id").map(str::to_owned),
        tap: options.text("tap").map(str::to_owned),
        fds: options.text("fd").map(parse_descriptors).transpose()?,
        mac: options.get("mac")?,
        num_queues: options.get("num_queues")?.unwrap_or(default.num_queues),
        queue_size: options.get("queue_size")?.unwrap_or(default.queue_size),
        offload_tso: options.switch("offload_tso", default.offload_tso)?,
        offload_ufo: options.switch("offload_ufo", default.offload_ufo)?,
        offload_csum: options.switch("offload_csum", default.offload_csum)?,
        rate_limiter_config: options.rate_limits()?,
    })
}

/// One descriptor that the VMM inherited, or a list of them in brackets.
pub(super) fn parse_descriptors(text: &str) -> Result<Vec<RawFd>, String> {
    elements(text)
        .map(|fd| match fd.parse() {
            Ok(fd @ 3..) => Ok(fd),
            _ => Err(format!(
                "fd={text}: expected a number above 2, or several as in [3,4]"
            )),
        })
        .collect()
}

pub(super) fn parse_vsock(text: &str) -> Result<VsockConfig, String> {
    let options = Options::parse(text, &["cid", "socket", "id"])?;
    let cid = options.get("cid")?.ok_or("cid is missing")?;
    Ok(VsockConfig {
        id: options.text("id").map(str::to_owned),
        cid,
        socket: options.required("socket")?.into(),
    })
}

pub(super) fn parse_rng(text: &str) -> Result<RngConfig, String> {
    let options = Options::parse(text, &["src"])?;
    Ok(RngConfig {
        src: options.required("src")?.into(),
    })
}

pub(super) fn parse_balloon(text: &str) -> Result<BalloonConfig, String> {
    let options = Options::parse(text, &["size", "deflate_on_oom", "free_page_reporting"])?;
    Ok(BalloonConfig {
        size: parse_size(options.required("size")?)?,
        deflate_on_oom: options.switch("deflate_on_oom", false)?,
        free_page_reporting: options.switch("free_page_reporting", false)?,
    })
}

pub(super) fn parse_serial(text: &str) -> Result<SerialConfig, String> {
    let mode = match text {
        "tty" => ConsoleMode::Tty,
        "null" => ConsoleMode::Null,
        "off" => ConsoleMode::Off,
        _ => {
            let path = text
                .strip_prefix("file=")
                .ok_or("expected tty, null, off or file=PATH")?;
            return Ok(SerialConfig {
                mode: ConsoleMode::File,
                file: Some(path.into()),
            });
        }
    };
    Ok(SerialConfig { mode, file: None })
}

pub(super) fn parse_console(text: &str) -> Result<ConsoleConfig, String> {
    match text {
        "off" => Ok(ConsoleConfig {
            mode: ConsoleMode::Off,
        }),
        _ => Err("this VMM has no virtio console; use --serial and --console off".to_owned()),
    }
}

pub(super) fn parse_api_target(text: &str) -> Result<ApiTarget, String> {
    match text.split_once('=') {
        Some(("fd", number)) => {
            // 0 to 2 are the terminal's.
            let fd = number.parse().ok().filter(|fd| *fd > 2);
            fd.map(ApiTarget::Fd)
                .ok_or_else(|| format!("fd={number}: expected a descriptor above 2"))
        }
        Some(("path", path)) if !path.is_empty() => Ok(ApiTarget::Path(path.into())),
        None if !text.is_empty() => Ok(ApiTarget::Path(text.into())),
        _ => Err("expected path=PATH or fd=N".to_owned()),
    }
}

pub(super) fn parse_jail(text: &str) -> Result<JailConfig, String> {
    if text.is_empty() {
        return Ok(JailConfig::default());
    }
    let options = Options::parse(text, &["uid", "gid", "cgroup"])?;
    Ok(JailConfig {
        uid: options.get("uid")?,
        gid: options.get("gid")?,
        cgroup: options.text("cgroup").map(PathBuf::from),
    })
}

pub(super) fn parse_event_target(text: &str) -> Result<EventTarget, String> {
    match text.split_once('=') {
        Some(("fd", number)) => {
            // 0 to 2 are the terminal's: taking one over would mix events into other output.
            let fd = number.parse().ok().filter(|fd| *fd > 2);
            fd.map(EventTarget::Fd)
                .ok_or_else(|| format!("fd={number}: expected a descriptor above 2"))
        }
        Some(("path", path)) => Ok(EventTarget::Path(path.into())),
        _ => Err("expected fd=N or path=PATH".to_owned()),
    }
}
