//! Disks.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, validate_queue_size, yes};
use crate::rate_limiter::RateLimiterConfig;

/// The most queues of one disk.
pub const MAX_DISK_QUEUES: u16 = 16;

/// The format of a disk image.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// The bytes of the disk.
    #[default]
    Raw,
    /// QEMU copy-on-write version 2 or 3.
    Qcow2,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Name of the device in the API and in events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Image file.
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// How the image is read. Never guessed from its content, which the guest may have written.
    #[serde(default)]
    pub image_type: ImageType,
    /// Whether a qcow2 image may name a backing file. Off by default: the name in the image is
    /// a path on the host.
    #[serde(default)]
    pub backing_files: bool,
    /// The images that a qcow2 image builds on, nearest first. What the images name is then not
    /// looked at: they may have been written by somebody who would like other files to be opened.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingImage>,
    /// Serial number that the guest reads, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Request queues, 1 to [`MAX_DISK_QUEUES`].
    #[serde(default = "one_queue")]
    pub num_queues: u16,
    /// Descriptors of each queue: a power of two, [`MIN_QUEUE_SIZE`](super::MIN_QUEUE_SIZE) to [`MAX_QUEUE_SIZE`](super::MAX_QUEUE_SIZE).
    #[serde(default = "default_disk_queue_size")]
    pub queue_size: u16,
    /// Past the page cache of the host (`O_DIRECT`).
    #[serde(default)]
    pub direct: bool,
    /// What the guest discards is given back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// Limits for all queues together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
}

/// An image that another one builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingImage {
    /// Image file. It is only read.
    pub path: PathBuf,
    /// How the image is read.
    pub image_type: ImageType,
}

impl DiskConfig {
    /// The disk in the raw image at `path`, with the defaults of everything else.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            id: None,
            path: path.into(),
            readonly: false,
            image_type: ImageType::default(),
            backing_files: false,
            backing: Vec::new(),
            serial: None,
            num_queues: one_queue(),
            queue_size: default_disk_queue_size(),
            direct: false,
            sparse: true,
            rate_limiter_config: None,
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(serial) = self.serial.as_ref().filter(|serial| serial.len() > 20) {
            return Err(ConfigError::DiskSerial {
                serial: serial.clone(),
            });
        }
        if !self.backing.is_empty() && (self.image_type == ImageType::Raw || self.backing_files) {
            return Err(ConfigError::DiskBacking);
        }
        if !(1..=MAX_DISK_QUEUES).contains(&self.num_queues) {
            return Err(ConfigError::DiskQueues {
                asked: self.num_queues,
            });
        }
        validate_queue_size(self.queue_size)
    }
}

fn one_queue() -> u16 {
    1
}

fn default_disk_queue_size() -> u16 {
    128
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_has_its_default() {
        let disk: DiskConfig = serde_json::from_str(r#"{"path":"/disk.raw"}"#).unwrap();
        assert_eq!(disk, DiskConfig::new("/disk.raw"));
    }

    #[test]
    fn disks_that_cannot_be_are_refused() {
        let disk = || DiskConfig::new("/disk.raw");
        assert!(disk().validate().is_ok());
        for num_queues in [0, 17, u16::MAX] {
            let disk = DiskConfig {
                num_queues,
                ..disk()
            };
            assert!(matches!(
                disk.validate(),
                Err(ConfigError::DiskQueues { .. })
            ));
        }
        for queue_size in [0, 8, 100, 2048, 1 << 15] {
            let disk = DiskConfig {
                queue_size,
                ..disk()
            };
            assert!(matches!(
                disk.validate(),
                Err(ConfigError::QueueSize { .. })
            ));
        }
    }
}
