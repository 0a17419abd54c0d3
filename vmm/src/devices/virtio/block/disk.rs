//! What the requests of a driver are carried out on: an image, and what goes with it. Shared by
//! the threads of a disk.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tracing::{debug, warn};
use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::pool::Job;
use super::request::Request;
use super::{Image, SECTOR_SIZE, SIZE_MAX};
use crate::devices::virtio::Counters;
use crate::events::{Event, EventStream};

/// A serial number, padded with zeros (virtio 1.2, 5.2.6).
pub type Serial = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// A disk.
pub struct Disk {
    name: String,
    image: RwLock<Arc<Image>>,
    serial: Serial,
    /// Whether what the guest discards is given back.
    sparse: bool,
    /// The most bytes of one transfer.
    request_max: usize,
    /// Whether a write is durable before it is completed.
    writethrough: AtomicBool,
    /// Whether the host has failed a request before.
    failed: AtomicBool,
    counters: DiskCounters,
    events: EventStream,
}

impl Disk {
    pub fn new(
        name: String,
        image: Image,
        serial: Serial,
        sparse: bool,
        seg_max: u32,
        events: EventStream,
    ) -> Self {
        Self {
            name,
            image: RwLock::new(Arc::new(image)),
            serial,
            sparse,
            request_max: seg_max as usize * SIZE_MAX as usize,
            writethrough: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            counters: DiskCounters::default(),
            events,
        }
    }

    /// Carries out a request and returns the number of bytes written to its chain.
    pub fn serve(&self, job: &Job) -> u32 {
        match job.pieces.buffers(&job.memory).map(Request::new) {
            Ok(Some(request)) => request.execute(self),
            Ok(None) => {
                debug!(disk = self.name, "request without room for a status");
                0
            }
            Err(error) => {
                debug!(disk = self.name, %error, "malformed request");
                0
            }
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image. It may be another one the next time.
    pub fn image(&self) -> Arc<Image> {
        let image = self.image.read();
        Arc::clone(&image.unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another image in the place of the one that there is.
    pub fn set_image(&self, image: Image) {
        let mut place = self.image.write().unwrap_or_else(PoisonError::into_inner);
        *place = Arc::new(image);
    }

    pub fn serial(&self) -> &Serial {
        &self.serial
    }

    pub fn readonly(&self) -> bool {
        !self.image().writable()
    }

    /// Whether what the guest discards is given back.
    pub fn discards(&self) -> bool {
        self.sparse && self.image().can_discard()
    }

    /// The size. A last, partial sector is out of the driver's reach.
    pub fn sectors(&self) -> u64 {
        self.image().size() / SECTOR_SIZE
    }

    /// The most bytes of one transfer.
    pub fn request_max(&self) -> usize {
        self.request_max
    }

    pub fn writethrough(&self) -> bool {
        self.writethrough.load(Ordering::SeqCst)
    }

    pub fn set_writethrough(&self, writethrough: bool) {
        self.writethrough.store(writethrough, Ordering::SeqCst);
    }

    pub fn counters(&self) -> &DiskCounters {
        &self.counters
    }

    /// Counts a failure of the host, and tells of the first; a guest can bring about as many as it
    /// likes.
    pub fn report(&self, operation: &'static str, error: &io::Error) {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        if self.failed.swap(true, Ordering::Relaxed) {
            debug!(disk = self.name, operation, %error, "the host failed a request");
            return;
        }
        warn!(disk = self.name, operation, %error, "the host failed a request; later failures are logged at level debug");
        self.events.emit(&Event::DeviceError {
            device: self.name.clone(),
            reason: format!("{operation} failed: {error}"),
            failures: 1,
        });
    }
}

/// What a disk has done. A request counts when it has succeeded.
#[derive(Debug, Default)]
pub struct DiskCounters {
    pub read: OperationCounter,
    pub write: OperationCounter,
    pub flush: OperationCounter,
    pub discard: OperationCounter,
    pub write_zeroes: OperationCounter,
    failed: AtomicU64,
}

/// The requests of one kind.
#[derive(Debug, Default)]
pub struct OperationCounter {
    count: AtomicU64,
    bytes: AtomicU64,
    microseconds: AtomicU64,
}

impl OperationCounter {
    pub fn count(&self, bytes: impl TryInto<u64>, time: Duration) {
        let add = |counter: &AtomicU64, more| {
            counter.fetch_add(more, Ordering::Relaxed);
        };
        add(&self.count, 1);
        add(&self.bytes, bytes.try_into().unwrap_or(0));
        add(
            &self.microseconds,
            time.as_micros().try_into().unwrap_or(u64::MAX),
        );
    }
}

impl DiskCounters {
    /// The counters by name; times are the sums over all requests, in microseconds.
    pub fn by_name(&self) -> Counters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters::from([
            ("read_ops", get(&self.read.count)),
            ("read_bytes", get(&self.read.bytes)),
            ("read_time_us", get(&self.read.microseconds)),
            ("write_ops", get(&self.write.count)),
            ("write_bytes", get(&self.write.bytes)),
            ("write_time_us", get(&self.write.microseconds)),
            ("flush_ops", get(&self.flush.count)),
            ("flush_time_us", get(&self.flush.microseconds)),
            ("discard_ops", get(&self.discard.count)),
            ("discard_bytes", get(&self.discard.bytes)),
            ("write_zeroes_ops", get(&self.write_zeroes.count)),
            ("write_zeroes_bytes", get(&self.write_zeroes.bytes)),
            ("failed_ops", get(&self.failed)),
        ])
    }
}
