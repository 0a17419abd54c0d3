//! What a snapshot of a freshly booted machine depends on.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::HostConfig;
use super::command::guest_cmdline;
use crate::domain::{Booted, LayerId, Model};

/// Changed when a new version of the daemon makes other machines of the same parts.
const FORMAT: u32 = 2;

/// The processor and the kernel of this machine, as far as a snapshot depends on them.
pub fn machine() -> io::Result<String> {
    const FIELDS: [&str; 6] = [
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "microcode",
        "flags",
    ];
    let cpus = std::fs::read_to_string("/proc/cpuinfo")?;
    // Of the first processor: KVM needs all of them to be of one kind.
    let first = cpus.lines().take_while(|line| !line.is_empty());
    let mut text = String::new();
    for line in first {
        let name = line.split(':').next().unwrap_or_default().trim();
        if FIELDS.contains(&name) {
            text.push_str(line);
            text.push('\n');
        }
    }
    let kernel = rustix::system::uname();
    let _ = writeln!(text, "{}", kernel.release().to_string_lossy());
    Ok(text)
}

/// The digest of all that a snapshot of this model depends on. A file that was replaced or written
/// to since is another: its inode, size or times are. `template` is the image at the bottom of the
/// disk, and `disk` the layers on it.
pub fn key(
    config: &HostConfig,
    machine: &str,
    template: &Path,
    disk: &[LayerId],
    model: &Model,
) -> io::Result<String> {
    let shape = &model.shape;
    let mut text = format!(
        "{FORMAT}\n{}\n{}\n{}\n{}\n{machine}",
        shape.template,
        shape.vcpus,
        shape.memory_mb,
        guest_cmdline(config)
    );
    if let Some(networks) = &config.networks {
        let _ = writeln!(text, "{}", networks.key());
    }
    if let Some(booted) = model.booted {
        let Booted {
            max_vcpus,
            max_memory_mb,
            ..
        } = booted;
        let _ = writeln!(text, "up to {max_vcpus} {max_memory_mb}");
    }
    // Layers do not change, and no two have the same id.
    for layer in disk {
        let _ = writeln!(text, "{layer}");
    }
    for path in [
        config.vmm.as_path(),
        &config.images.kernel,
        &config.images.initramfs,
        template,
    ] {
        let metadata = std::fs::metadata(path)?;
        let _ = writeln!(
            text,
            "{} {} {} {} {} {} {}",
            metadata.dev(),
            metadata.ino(),
            metadata.size(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        );
    }
    Ok(Sha256::digest(text)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}
