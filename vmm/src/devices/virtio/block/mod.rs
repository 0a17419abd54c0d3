//! Block device (virtio 1.2, 5.2).
//!
//! [`Image`] is the disk as the host stores it, [`request`] carries out one request of the
//! driver on it, and [`Block`] is the device around them.

mod files;
pub mod image;
mod request;

use tracing::debug;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_ID_BYTES,
};
use vmm_sys_util::epoll::EventSet;

use super::buffers::ChainBuffers;
use super::queue::ActiveQueue;
use super::{Activation, DeviceError, DeviceKind, Source, VirtioDevice, config_space};
use crate::config::DiskConfig;
pub use files::ImageFiles;
pub use image::{Image, ImageError};
use request::{Disk, Request};

/// The unit of offsets and sizes in requests and in `capacity`, in bytes (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

const QUEUE_SIZE: u16 = 256;

/// The most data segments of a request: a chain may be as long as the queue (virtio 1.2, 2.7.5.3),
/// and two of its descriptors hold the header and the status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The most bytes of a data segment. With [`SEG_MAX`] it bounds how long one request can hold up
/// the event loop.
const SIZE_MAX: u32 = 256 << 10;

/// The most bytes of a request that keeps to the limits above.
const REQUEST_MAX: usize = SEG_MAX as usize * SIZE_MAX as usize;

/// Why a block device cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The image cannot be used.
    #[error("cannot use a disk image")]
    Image(#[source] ImageError),
}

/// A block device.
pub struct Block {
    disk: Disk,
    config: [u8; CONFIG_SIZE],
    queue: Option<ActiveQueue>,
}

/// The configuration space up to and including `blk_size` (virtio 1.2, 5.2.4).
const CONFIG_SIZE: usize = 24;

impl Block {
    /// A block device on the image that `config` names.
    ///
    /// # Errors
    /// The image cannot be opened, is in use, or is not what `config` says.
    pub fn new(config: &DiskConfig) -> Result<Self, BlockError> {
        Self::with_files(config, Self::open(config)?)
    }

    /// Opens the files of the image that `config` names.
    ///
    /// # Errors
    /// One of them cannot be opened, or is in use.
    pub fn open(config: &DiskConfig) -> Result<ImageFiles, BlockError> {
        ImageFiles::open(
            &config.path,
            config.image_type,
            config.readonly,
            config.backing_files,
        )
        .map_err(BlockError::Image)
    }

    /// A block device on the image that `config` describes and `files` hold. Needs no path.
    ///
    /// # Errors
    /// The image is not what `config` says.
    pub fn with_files(config: &DiskConfig, files: ImageFiles) -> Result<Self, BlockError> {
        let name = config
            .id
            .clone()
            .unwrap_or_else(|| config.path.display().to_string());
        let image = Image::new(files).map_err(BlockError::Image)?;
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        let text = config.serial.as_ref().or(config.id.as_ref());
        for (to, from) in serial
            .iter_mut()
            .zip(text.into_iter().flat_map(|text| text.bytes()))
        {
            *to = from;
        }
        Ok(Self::with_image(name, image, serial))
    }

    fn with_image(name: String, image: Image, serial: [u8; VIRTIO_BLK_ID_BYTES as usize]) -> Self {
        let disk = Disk::new(name, image, serial);
        let mut config = [0; CONFIG_SIZE];
        config[0..8].copy_from_slice(&disk.sectors().to_le_bytes());
        config[8..12].copy_from_slice(&SIZE_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
        // 16..20 is the geometry, which is not offered.
        config[20..24].copy_from_slice(&(SECTOR_SIZE as u32).to_le_bytes());
        Self {
            disk,
            config,
            queue: None,
        }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let disk = &mut self.disk;
        queue.serve(|memory, chain| {
            let buffers = ChainBuffers::collect(memory, chain, QUEUE_SIZE.into());
            Ok(match buffers.map(Request::new) {
                Ok(Some(request)) => request.execute(disk),
                Ok(None) => {
                    debug!(disk = disk.name(), "request without room for a status");
                    0
                }
                Err(error) => {
                    debug!(disk = disk.name(), %error, "malformed request");
                    0
                }
            })
        })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.disk.readonly() {
            features | 1 << VIRTIO_BLK_F_RO
        } else {
            features
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // A driver that cannot flush relies on every write being durable (virtio 1.2, 5.2.6.2).
        self.disk
            .set_writethrough(activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0);
        let [queue] = ActiveQueue::from_activation(activation)?;
        self.queue = Some(queue);
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        self.queue.iter().map(|queue| queue.source(0)).collect()
    }

    fn process_queue(&mut self, _index: usize) -> Result<(), DeviceError> {
        self.serve()
    }

    fn process_source(&mut self, _token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        self.serve()
    }

    fn reset(&mut self) {
        self.queue = None;
    }
}

#[cfg(test)]
mod tests;
