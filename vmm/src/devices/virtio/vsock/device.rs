//! The device itself: its registers and its queues (virtio 1.2, 5.10.2 to 5.10.6).

use std::io;
use std::time::Duration;

use tracing::debug;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::epoll::EventSet;

use super::host::{Listener, VsockError};
use super::muxer::Muxer;
use super::packet::{RxBuffer, TxPacket};
use crate::config::VsockConfig;
use crate::devices::virtio::{
    Activation, DeviceError, DeviceKind, Interrupt, Source, VirtioDevice,
};
use crate::memory::GuestMemory;

/// Packets for the guest.
pub(super) const RX_QUEUE: usize = 0;

/// Packets from the guest.
pub(super) const TX_QUEUE: usize = 1;

/// Size limits of the queues for reception, transmission and events. The device has no events
/// of its own to report.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// `VIRTIO_VSOCK_F_STREAM`.
const FEATURE_STREAM: u64 = 1 << 0;

/// How long a host program may take for its greeting, and the guest for its answer to a request
/// or to the end of a connection. Linux gives its own peers 2 s and 8 s.
const PATIENCE: Duration = Duration::from_secs(10);

/// Packets handled in each direction before other devices get their turn: at most 4 MiB.
const BUDGET: usize = 64;

/// The socket device.
pub struct Vsock {
    cid: u64,
    muxer: Muxer,
    driver: Option<Driver>,
}

/// What serving the driver takes.
struct Driver {
    memory: GuestMemory,
    rx: Queue,
    tx: Queue,
    interrupt: Interrupt,
    /// The budget ended before the transmit queue did.
    tx_left: bool,
    /// The budget ended before the packets for the guest did.
    rx_left: bool,
}

impl Vsock {
    /// A device that listens on its UNIX socket from now on. Host programs that connect before
    /// the guest's driver is there wait in the backlog.
    ///
    /// # Errors
    /// The path of the socket is not usable, or the host lacks resources.
    pub fn new(config: &VsockConfig) -> Result<Self, VsockError> {
        Self::with_patience(config, PATIENCE)
    }

    pub(super) fn with_patience(
        config: &VsockConfig,
        patience: Duration,
    ) -> Result<Self, VsockError> {
        let cid = u64::from(config.cid);
        let listener = Listener::bind(&config.socket)?;
        let muxer = Muxer::new(cid, listener, patience)
            .map_err(|source| VsockError::Descriptors { source })?;
        Ok(Self {
            cid,
            muxer,
            driver: None,
        })
    }

    /// Takes packets from the guest.
    fn transmit(&mut self) -> Result<(), DeviceError> {
        match &mut self.driver {
            Some(driver) if driver.tx.ready() => {
                let used = driver.transmit(&mut self.muxer).map_err(queue(TX_QUEUE))?;
                driver.signal(TX_QUEUE, used)
            }
            _ => Ok(()),
        }
    }

    /// Gives the guest what waits for it. Comes last in every step: the packets of the guest
    /// and the events of the host have made what it works on.
    fn deliver(&mut self) -> Result<(), DeviceError> {
        let Some(driver) = &mut self.driver else {
            return Ok(());
        };
        if driver.rx.ready() {
            let used = driver.receive(&mut self.muxer).map_err(queue(RX_QUEUE))?;
            driver.signal(RX_QUEUE, used)?;
        }
        if driver.tx_left || driver.rx_left {
            self.muxer
                .wake()
                .map_err(host("cannot wake the socket device"))?;
        }
        self.muxer
            .settle()
            .map_err(host("cannot watch the sockets of host programs"))
    }
}

impl Driver {
    /// Handles what the driver transmits, as far as the budget reaches. Tells whether the used
    /// ring has grown.
    fn transmit(&mut self, muxer: &mut Muxer) -> Result<bool, virtio_queue::Error> {
        let mut used = false;
        self.tx_left = false;
        self.tx.disable_notification(&self.memory)?;
        for _ in 0..BUDGET {
            let Some(chain) = self.tx.iter(&self.memory)?.next() else {
                // The driver may add a packet before it sees that it has to notify again.
                if self.tx.enable_notification(&self.memory)? {
                    self.tx.disable_notification(&self.memory)?;
                    continue;
                }
                return Ok(used);
            };
            let head = chain.head_index();
            match TxPacket::parse(&self.memory, chain) {
                Ok(packet) => muxer.receive(&packet),
                Err(error) => debug!(%error, "dropped a transmit buffer"),
            }
            self.tx.add_used(&self.memory, head, 0)?;
            used = true;
        }
        self.tx_left = true;
        Ok(used)
    }

    /// Fills the driver's receive buffers, as far as there are packets and the budget reaches.
    /// Tells whether the used ring has grown.
    fn receive(&mut self, muxer: &mut Muxer) -> Result<bool, virtio_queue::Error> {
        let mut used = false;
        self.rx_left = false;
        self.rx.disable_notification(&self.memory)?;
        for _ in 0..BUDGET {
            if !muxer.has_packets() {
                return Ok(used);
            }
            let position = self.rx.next_avail();
            let Some(chain) = self.rx.iter(&self.memory)?.next() else {
                // Only now do new buffers matter, and again one may come just before.
                if self.rx.enable_notification(&self.memory)? {
                    self.rx.disable_notification(&self.memory)?;
                    continue;
                }
                return Ok(used);
            };
            let head = chain.head_index();
            let len = match RxBuffer::parse(&self.memory, chain) {
                Ok(buffer) => match muxer.next_packet(&buffer) {
                    Some(len) => len,
                    None => {
                        self.rx.set_next_avail(position);
                        return Ok(used);
                    }
                },
                Err(error) => {
                    debug!(%error, "gave a receive buffer back");
                    0
                }
            };
            self.rx.add_used(&self.memory, head, len)?;
            used = true;
        }
        self.rx_left = muxer.has_packets();
        Ok(used)
    }

    /// Tells the driver about used buffers, if it wants to know.
    fn signal(&mut self, index: usize, used: bool) -> Result<(), DeviceError> {
        let ring = if index == RX_QUEUE {
            &mut self.rx
        } else {
            &mut self.tx
        };
        if used
            && ring
                .needs_notification(&self.memory)
                .map_err(queue(index))?
        {
            self.interrupt
                .signal_used_buffers()
                .map_err(host("cannot raise the interrupt"))?;
        }
        Ok(())
    }
}

fn queue(index: usize) -> impl Fn(virtio_queue::Error) -> DeviceError {
    move |source| DeviceError::Queue { index, source }
}

fn host(action: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host { action, source }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_vsock_config is the guest's CID.
        let config = self.cid.to_le_bytes();
        let start = config
            .len()
            .min(usize::try_from(offset).unwrap_or(usize::MAX));
        for (byte, value) in data.iter_mut().zip(&config[start..]) {
            *byte = *value;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut queues = activation.queues.into_iter();
        let mut next = |index| {
            queues
                .next()
                .ok_or(virtio_queue::Error::QueueNotReady)
                .map_err(queue(index))
        };
        self.driver = Some(Driver {
            rx: next(RX_QUEUE)?,
            tx: next(TX_QUEUE)?,
            memory: activation.memory,
            interrupt: activation.interrupt,
            tx_left: false,
            rx_left: false,
        });
        self.muxer
            .start()
            .map_err(host("cannot accept host programs"))
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.muxer.as_raw_fd(),
            token: 0,
            events: EventSet::IN,
        }]
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        if index == TX_QUEUE {
            self.transmit()?;
        }
        self.deliver()
    }

    fn process_source(&mut self, _token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        self.muxer
            .process_events()
            .map_err(host("cannot handle the sockets of host programs"))?;
        if self.driver.as_ref().is_some_and(|driver| driver.tx_left) {
            self.transmit()?;
        }
        self.deliver()
    }

    fn reset(&mut self) {
        self.driver = None;
        if let Err(error) = self.muxer.stop() {
            debug!(%error, "cannot stop accepting host programs");
        }
    }
}

#[cfg(test)]
impl Vsock {
    pub(super) fn muxer(&self) -> &Muxer {
        &self.muxer
    }
}
