//! Block device (virtio 1.2, 5.2).
//!
//! [`Image`] is the disk as the host stores it, [`Disk`] what requests are carried out on,
//! [`request`] carries out one of them, [`pool`] has the threads that do so, and [`Block`] is the
//! device around them, on the event loop.
//!
//! A request is on its way as follows. Whatever keeps it from going on, the next station calls it:
//!
//! ```text
//!  available ──taken──► under way (pool) ──completed──► used
//!      │ ▲
//!      │ └── timer of the rate limiter, or completion of another request
//!      └──── no tokens, or as many under way as the queue has descriptors
//! ```
//!
//! Requests may overtake each other. A flush makes durable what was completed before it was made
//! available, which is all that a driver may expect (5.2.6.2). A reset and a pause wait for what
//! the threads are at.

mod config;
mod disk;
mod files;
pub mod image;
pub mod merge;
mod pool;
mod request;

use std::io;
use std::sync::Arc;

use tracing::debug;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::epoll::EventSet;

use super::buffers::ChainPieces;
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState, RestoreError};
use super::{
    Activation, Control, ControlError, Counters, DeviceError, DeviceKind, Source, VirtioDevice,
};
use crate::config::DiskConfig;
use crate::events::EventStream;
use crate::rate_limiter::RateLimiter;
use config::ConfigSpace;
use disk::{Disk, Serial};
pub use files::ImageFiles;
pub use image::{Image, ImageError};
use pool::{Job, Pool};

/// The unit of offsets and sizes in requests and in `capacity`, in bytes (virtio 1.2, 5.2.4).
pub const SECTOR_SIZE: u64 = 512;

/// The most bytes of a data segment. With the number of segments it bounds how long one request
/// can keep a thread.
const SIZE_MAX: u32 = 256 << 10;

/// The most segments of a request to discard or to write zeros.
const MAX_SEGMENTS: u32 = 16;

/// The size of such a segment in the request, in bytes (virtio 1.2, 5.2.6).
const SEGMENT_SIZE: usize = 16;

/// The most sectors of such a segment: 32 MiB, which a host that cannot do better writes out.
const SEGMENT_SECTORS: u32 = 1 << 16;

/// Threads for each queue of a disk: one may wait for a flush and others still read and write.
const THREADS_PER_QUEUE: u16 = 4;

/// The most threads of a disk.
const MAX_THREADS: u16 = 16;

/// Tokens of the device's sources; a queue's own is its index on top of the first.
const TOKEN_COMPLETED: u32 = 0;
const TOKEN_TIMER: u32 = 1;
const TOKEN_FIRST_QUEUE: u32 = 2;

/// Why a block device cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// The image cannot be used.
    #[error("cannot use a disk image")]
    Image(#[source] ImageError),
    /// The host has no threads or descriptors left.
    #[error("cannot start the threads of a disk")]
    Threads(#[source] io::Error),
    /// The host has no timer left.
    #[error("cannot set up the rate limits of a disk")]
    RateLimiter(#[source] io::Error),
}

/// A block device.
pub struct Block {
    disk: Arc<Disk>,
    /// Whether images are used past the host's page cache.
    direct: bool,
    pool: Pool,
    config: ConfigSpace,
    queue_sizes: Vec<u16>,
    limiter: RateLimiter,
    active: Option<Active>,
}

struct Active {
    features: u64,
    queues: Vec<RequestQueue>,
    /// The queue whose turn is first when the rate limiter lets requests through again.
    next: usize,
}

struct RequestQueue {
    queue: ActiveQueue,
    /// Requests that the pool has. A driver that offers a chain over and over could have any number
    /// of them; there are never more than the queue has descriptors.
    under_way: usize,
    /// Whether requests were left because of that.
    full: bool,
}

impl Block {
    /// Opens the files of the image that `config` names.
    ///
    /// # Errors
    /// One of them cannot be opened, or is in use.
    pub fn open(config: &DiskConfig) -> Result<ImageFiles, BlockError> {
        let files = if config.backing.is_empty() {
            ImageFiles::open(
                &config.path,
                config.image_type,
                config.readonly,
                config.backing_files,
            )
        } else {
            ImageFiles::open_chain(
                &config.path,
                config.image_type,
                config.readonly,
                &config.backing,
            )
        };
        files.map_err(BlockError::Image)
    }

    /// The block device `name` on the image that `config` describes and `files` hold. Needs no
    /// path. The first failure of the host is told to `events`.
    ///
    /// # Errors
    /// The image is not what `config` says, or the host has no threads or descriptors left.
    pub fn with_files(
        name: String,
        config: &DiskConfig,
        files: ImageFiles,
        events: EventStream,
    ) -> Result<Self, BlockError> {
        let image = Image::new(files, config.direct).map_err(BlockError::Image)?;
        let mut serial = Serial::default();
        let text = config.serial.as_ref().or(config.id.as_ref());
        for (to, from) in serial
            .iter_mut()
            .zip(text.into_iter().flat_map(|text| text.bytes()))
        {
            *to = from;
        }
        // A chain may be as long as the queue (virtio 1.2, 2.7.5.3), and two of its descriptors
        // hold the header and the status.
        let seg_max = u32::from(config.queue_size).saturating_sub(2).max(1);
        let disk = Disk::new(name, image, serial, config.sparse, seg_max, events);
        let disk = Arc::new(disk);
        let threads = config
            .num_queues
            .saturating_mul(THREADS_PER_QUEUE)
            .min(MAX_THREADS);
        let worker = Arc::clone(&disk);
        let pool = Pool::new(threads.into(), Box::new(move |job| worker.serve(job)))
            .map_err(BlockError::Threads)?;
        Ok(Self {
            config: ConfigSpace::new(&disk, seg_max, config.num_queues),
            disk,
            direct: config.direct,
            pool,
            queue_sizes: vec![config.queue_size; config.num_queues.into()],
            limiter: RateLimiter::new(config.rate_limiter_config.as_ref())
                .map_err(BlockError::RateLimiter)?,
            active: None,
        })
    }

    /// Hands the available requests of a queue to the pool, as far as the limits allow.
    fn take_requests(&mut self, index: usize) -> Result<(), DeviceError> {
        let slot = self
            .active
            .as_mut()
            .and_then(|active| active.queues.get_mut(index));
        let Some(RequestQueue {
            queue,
            under_way,
            full,
        }) = slot
        else {
            return Ok(());
        };
        let memory = Arc::clone(queue.memory());
        let limit = usize::from(queue.size());
        *full = false;
        let mut visit = queue.visit()?;
        loop {
            if *under_way >= limit {
                *full = true;
                break;
            }
            let Some(chain) = visit.next()? else {
                break;
            };
            let head = chain.head_index();
            match ChainPieces::collect(&memory, chain, limit) {
                Ok(pieces) => {
                    let cost = transfer_len(&pieces);
                    if !self.limiter.admits(cost).map_err(timer_failed)? {
                        visit.queue.undo_pop();
                        break;
                    }
                    self.limiter.charge(cost);
                    *under_way += 1;
                    self.pool.submit(Job {
                        queue: index,
                        head,
                        memory: Arc::clone(&memory),
                        pieces,
                    });
                }
                Err(error) => {
                    debug!(disk = self.disk.name(), %error, "malformed request");
                    visit.queue.add_used(head, 0)?;
                }
            }
        }
        queue.announce()
    }

    /// Gives back to the driver what the pool has completed, and goes on with what had to wait for
    /// that.
    fn complete(&mut self) -> Result<(), DeviceError> {
        let completions = self.pool.collect();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        for completion in completions {
            if let Some(slot) = active.queues.get_mut(completion.queue) {
                slot.queue.add_used(completion.head, completion.written)?;
                slot.under_way -= 1;
            }
        }
        for slot in &mut active.queues {
            slot.queue.announce()?;
        }
        let full = |slot: &RequestQueue| slot.full;
        let full: Vec<_> = active.queues.iter().map(full).collect();
        for (index, full) in full.into_iter().enumerate() {
            if full {
                self.take_requests(index)?;
            }
        }
        Ok(())
    }

    /// The rate limiter may let requests through again: every queue gets its turn, each time
    /// another one first.
    fn take_limited_requests(&mut self) -> Result<(), DeviceError> {
        self.limiter.acknowledge_timer();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let count = active.queues.len();
        let first = active.next;
        active.next = (first + 1) % count.max(1);
        for turn in 0..count {
            self.take_requests((first + turn) % count)?;
        }
        Ok(())
    }
}

/// The bytes that a request transfers, whatever its kind: all but the header and the status.
fn transfer_len(pieces: &ChainPieces) -> u64 {
    // `struct virtio_blk_req` up to its data (virtio 1.2, 5.2.6), in bytes.
    const HEADER_LEN: usize = 16;
    let output = pieces.readable_len().saturating_sub(HEADER_LEN);
    let input = pieces.writable_len().saturating_sub(1);
    (output + input) as u64
}

fn timer_failed(source: io::Error) -> DeviceError {
    DeviceError::Host {
        action: "setting the timer of the rate limits",
        source,
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        if self.queue_sizes.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.disk.readonly() {
            return features | 1 << VIRTIO_BLK_F_RO;
        }
        if self.disk.discards() {
            features |= 1 << VIRTIO_BLK_F_DISCARD;
        }
        features | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let negotiated = self
            .active
            .as_ref()
            .is_some_and(|active| active.features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0);
        if negotiated && let Some(writeback) = self.config.write(offset, data) {
            self.disk.set_writethrough(!writeback);
        }
    }

    fn counters(&self) -> Counters {
        self.disk.counters().by_name()
    }

    fn control(&mut self, control: Control) -> Result<(), ControlError> {
        let Control::ResizeDisk { size } = control else {
            return Err(ControlError::NotSupported);
        };
        if self.disk.readonly() {
            let reason = "a read-only disk cannot be resized";
            return Err(ControlError::Refused(reason.to_owned()));
        }
        if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
            return Err(ControlError::Refused(format!(
                "a disk cannot have {size} bytes: expected a multiple of {SECTOR_SIZE}"
            )));
        }
        self.disk
            .image()
            .resize(size)
            .map_err(|source| ControlError::Host {
                action: "resizing the disk image",
                source,
            })?;
        self.config.set_capacity(self.disk.sectors());
        Ok(())
    }

    /// The new image may build on the one that there is, which is written out and given up first.
    fn replace_image(&mut self, files: ImageFiles) -> Result<(), ControlError> {
        let host = |action| move |source| ControlError::Host { action, source };
        let image = |source| ControlError::Image(source);
        let old = self.disk.image();
        old.flush()
            .map_err(host("writing out what the disk image holds back"))?;
        old.unlock().map_err(host("giving up the disk image"))?;
        let lock_again = || {
            // What was just given up can be had again, unless somebody else was faster.
            if let Err(error) = old.lock() {
                tracing::warn!(disk = self.disk.name(), %error, "the disk image is not locked");
            }
        };
        let new = files
            .lock()
            .and_then(|()| Image::new(files, self.direct))
            .inspect_err(|_| lock_again())
            .map_err(image)?;
        let same = (new.size(), new.writable(), new.can_discard())
            == (old.size(), old.writable(), old.can_discard());
        if !same {
            // The new one's locks go with it.
            drop(new);
            lock_again();
            return Err(ControlError::Refused(format!(
                "the new image has to be like the one that it replaces: of {} bytes, {}, and {}",
                old.size(),
                if old.writable() {
                    "writable"
                } else {
                    "read-only"
                },
                if old.can_discard() {
                    "able to discard"
                } else {
                    "unable to discard"
                },
            )));
        }
        self.disk.set_image(new);
        Ok(())
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        self.pool.drain();
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        // What is left in the rings stays there until the device goes on.
        for slot in &mut active.queues {
            slot.full = false;
        }
        self.complete()
    }

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        self.disk
            .image()
            .flush()
            .map_err(|source| ControlError::Host {
                action: "writing out what the disk image holds back",
                source,
            })?;
        let active = self.active.as_ref();
        Ok(DeviceState {
            queues: active.map(|active| {
                let queues = active.queues.iter();
                queues.map(|slot| slot.queue.save()).collect()
            }),
            own: OwnState::Block {
                sectors: self.disk.sectors(),
                writeback: !self.disk.writethrough(),
            },
        })
    }

    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError> {
        let OwnState::Block { sectors, writeback } = *own else {
            return Err(RestoreError::OwnState);
        };
        let here = self.disk.sectors();
        if sectors != here {
            return Err(RestoreError::DiskSize {
                saved: sectors,
                here,
            });
        }
        self.disk.set_writethrough(!writeback);
        self.config.set_writeback(writeback);
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        // A driver that can neither flush nor choose relies on every write being durable
        // (virtio 1.2, 5.2.6.2).
        let chooses = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        self.disk.set_writethrough(features & chooses == 0);
        self.config.set_writeback(features & chooses != 0);
        let queues = ActiveQueue::all(activation)?
            .into_iter()
            .map(|queue| RequestQueue {
                queue,
                under_way: 0,
                full: false,
            })
            .collect();
        self.active = Some(Active {
            features,
            queues,
            next: 0,
        });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        let readable = |fd, token| Source {
            fd,
            token,
            events: EventSet::IN,
        };
        let mut sources = vec![readable(self.pool.completed(), TOKEN_COMPLETED)];
        sources.extend(self.limiter.timer().map(|fd| readable(fd, TOKEN_TIMER)));
        sources.extend(
            (TOKEN_FIRST_QUEUE..)
                .zip(&active.queues)
                .map(|(token, slot)| slot.queue.source(token)),
        );
        sources
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.take_requests(index)
    }

    fn process_source(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        match token {
            TOKEN_COMPLETED => self.complete(),
            TOKEN_TIMER => self.take_limited_requests(),
            queue => self.take_requests((queue - TOKEN_FIRST_QUEUE) as usize),
        }
    }

    fn reset(&mut self) {
        self.pool.cancel();
        self.active = None;
    }
}

#[cfg(test)]
mod tests;
