//! The device itself: its registers and its queues (virtio 1.2, 5.10.2 to 5.10.6).

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tracing::debug;
use vmm_sys_util::epoll::EventSet;

use super::host::{Listener, VsockError};
use super::muxer::Muxer;
use super::packet::{RxBuffer, TxPacket};
use crate::config::VsockConfig;
use crate::devices::virtio::buffers::ChainBuffers;
use crate::devices::virtio::config_space;
use crate::devices::virtio::queue::ActiveQueue;
use crate::devices::virtio::state::{DeviceState, OwnState, RestoreError};
use crate::devices::virtio::{
    Activation, ControlError, DeviceError, DeviceKind, Source, VirtioDevice,
};

/// Packets for the guest.
pub(super) const RX_QUEUE: usize = 0;

/// Packets from the guest.
pub(super) const TX_QUEUE: usize = 1;

/// Size limits of the queues for reception, transmission and events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, the only event there is.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// `VIRTIO_VSOCK_F_STREAM`.
const FEATURE_STREAM: u64 = 1 << 0;

/// How long a host program may take for its greeting, and the guest for its answer to a request
/// or to the end of a connection. Linux gives its own peers 2 s and 8 s.
const PATIENCE: Duration = Duration::from_secs(10);

// The sources of the device.
const TOKEN_RX: u32 = 0;
const TOKEN_TX: u32 = 1;
const TOKEN_HOST: u32 = 2;

/// The socket device.
pub struct Vsock {
    cid: u64,
    muxer: Muxer,
    queues: Option<Queues>,
}

/// The queues of an active device.
struct Queues {
    rx: ActiveQueue,
    tx: ActiveQueue,
    event: ActiveQueue,
    reset: TransportReset,
}

/// What the driver of a restored device has to learn: its connections are gone, and it may have
/// another CID (virtio 1.2, 5.10.6.7).
///
/// The driver closes all connections that it finds then, new ones included. So it gets no packet
/// before it is through with that, which shows by the event's buffer being made available again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransportReset {
    /// Nothing.
    Done,
    /// It is not told yet.
    Due,
    /// It is told, and has made this many event buffers available before.
    Told { offered: u16 },
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

    /// The directory of the device's socket, and so of those of host programs, is at `directory`
    /// from now on. The file of the device's socket is then no longer removed.
    pub fn move_to(&mut self, directory: &Path) {
        self.muxer.move_to(directory);
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
            queues: None,
        })
    }

    /// Gives the guest what waits for it. Comes last in every step: the packets of the guest
    /// and the events of the host have made what it works on.
    fn deliver(&mut self) -> Result<(), DeviceError> {
        if let Some(queues) = &mut self.queues {
            queues.deliver(&mut self.muxer)?;
        }
        self.muxer
            .settle()
            .map_err(host("watching the sockets of host programs"))
    }
}

impl Queues {
    /// Handles what the driver transmits.
    fn transmit(&mut self, muxer: &mut Muxer) -> Result<(), DeviceError> {
        self.tx.serve(|memory, chain| {
            match TxPacket::parse(memory, chain) {
                Ok(packet) => muxer.receive(&packet),
                Err(error) => debug!(%error, "dropped what the guest transmits"),
            }
            Ok(0)
        })
    }

    /// Fills the driver's receive buffers, as far as there are packets. Receive buffers matter
    /// to the device only while it has a packet: it asks for notifications only then.
    fn deliver(&mut self, muxer: &mut Muxer) -> Result<(), DeviceError> {
        self.advance_reset()?;
        if self.reset != TransportReset::Done {
            return Ok(());
        }
        let memory = Arc::clone(self.rx.memory());
        let mut visit = self.rx.visit()?;
        while muxer.has_packets()
            && let Some(chain) = visit.next()?
        {
            let head = chain.head_index();
            let len = match RxBuffer::parse(&memory, chain) {
                Ok(buffer) => match muxer.next_packet(&buffer) {
                    Some(len) => len,
                    None => {
                        visit.queue.undo_pop();
                        break;
                    }
                },
                Err(error) => {
                    debug!(%error, "gave a receive buffer back");
                    0
                }
            };
            visit.queue.add_used(head, len)?;
        }
        self.rx.announce()
    }
}

impl Queues {
    /// Tells the driver of a reset that is due, and finds out whether it has acted on it.
    fn advance_reset(&mut self) -> Result<(), DeviceError> {
        match self.reset {
            TransportReset::Done => Ok(()),
            TransportReset::Due => self.tell_reset(),
            TransportReset::Told { offered } => {
                if self.event.offered()? != offered {
                    self.reset = TransportReset::Done;
                }
                Ok(())
            }
        }
    }

    fn tell_reset(&mut self) -> Result<(), DeviceError> {
        let offered = self.event.offered()?;
        let memory = Arc::clone(self.event.memory());
        let limit = self.event.size().into();
        let Some(chain) = self.event.pop()? else {
            // A driver that wants no events has none to act on.
            self.reset = TransportReset::Done;
            return Ok(());
        };
        let head = chain.head_index();
        let written = match ChainBuffers::collect(&memory, chain, limit) {
            Ok(buffers) => buffers
                .writable
                .copy_from(&EVENT_TRANSPORT_RESET.to_le_bytes()),
            Err(error) => {
                debug!(%error, "malformed event buffer");
                0
            }
        };
        // Before the driver can act, or it might do so unnoticed.
        self.event.notify_beyond(offered)?;
        // At most the four bytes of the event.
        self.event.add_used(head, written as u32)?;
        self.event.announce()?;
        self.reset = TransportReset::Told { offered };
        Ok(())
    }
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
        config_space::read(&self.cid.to_le_bytes(), offset, data);
    }

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        let queues = self.queues.as_ref();
        Ok(DeviceState {
            queues: queues.map(|queues| {
                [&queues.rx, &queues.tx, &queues.event]
                    .map(ActiveQueue::save)
                    .to_vec()
            }),
            own: OwnState::Vsock {
                next_port: self.muxer.next_port(),
            },
        })
    }

    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError> {
        let OwnState::Vsock { next_port } = *own else {
            return Err(RestoreError::OwnState);
        };
        self.muxer.set_next_port(next_port);
        if let Some(queues) = &mut self.queues {
            queues.reset = TransportReset::Due;
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let [rx, tx, event] = ActiveQueue::from_activation(activation)?;
        self.muxer
            .start()
            .map_err(host("accepting host programs"))?;
        self.queues = Some(Queues {
            rx,
            tx,
            event,
            reset: TransportReset::Done,
        });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let mut sources = vec![Source {
            fd: self.muxer.as_raw_fd(),
            token: TOKEN_HOST,
            events: EventSet::IN,
        }];
        if let Some(queues) = &self.queues {
            sources.push(queues.rx.source(TOKEN_RX));
            sources.push(queues.tx.source(TOKEN_TX));
        }
        sources
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        if index == TX_QUEUE
            && let Some(queues) = &mut self.queues
        {
            queues.transmit(&mut self.muxer)?;
        }
        self.deliver()
    }

    fn process_source(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        match token {
            TOKEN_RX => self.process_queue(RX_QUEUE),
            TOKEN_TX => self.process_queue(TX_QUEUE),
            _ => {
                self.muxer
                    .process_events()
                    .map_err(host("handling the sockets of host programs"))?;
                self.deliver()
            }
        }
    }

    fn reset(&mut self) {
        self.queues = None;
        if let Err(error) = self.muxer.stop() {
            debug!(%error, "cannot stop accepting host programs");
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Vsock {
    pub(super) fn muxer(&self) -> &Muxer {
        &self.muxer
    }
}
