//! Network card (virtio 1.2, 5.1) on a tap of the host.
//!
//! Checksums and segmentation are left to whoever does them best: the header in front of each
//! frame says what is still to be done to it, and tap and guest understand the same header.

mod receive;
mod tap;

use std::io;
use std::os::fd::AsRawFd;

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, c_uint};
use tracing::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;

use super::buffers::ChainBuffers;
use super::queue::ActiveQueue;
use super::{Activation, DeviceError, DeviceKind, Source, VirtioDevice, config_space};
use crate::config::{MacAddress, NetConfig};
use receive::Receiver;
pub use tap::{Tap, TapError};

const QUEUE_SIZE: u16 = 256;

const RECEIVE_QUEUE: usize = 0;
const TRANSMIT_QUEUE: usize = 1;

/// Tokens of the device's sources: the two queues by their index, and the tap.
const TOKEN_RECEIVE: u32 = RECEIVE_QUEUE as u32;
const TOKEN_TRANSMIT: u32 = TRANSMIT_QUEUE as u32;
const TOKEN_TAP: u32 = 2;

/// The size of the header in front of each frame, `num_buffers` included (virtio 1.2, 5.1.6).
const HEADER_SIZE: usize = 12;

/// Where `num_buffers` lies in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// Ethernet header with a VLAN tag.
const ETHERNET_SIZE: usize = 18;

/// The payload of a frame if the tap does not tell its MTU.
const DEFAULT_MTU: u16 = 1500;

/// The largest frame that the guest's stack may leave for others to cut up, with its header
/// (virtio 1.2, 5.1.6.3.1).
const LARGEST_UNSEGMENTED: usize = 65550 + HEADER_SIZE;

/// The configuration space up to and including `mtu` (virtio 1.2, 5.1.4).
const CONFIG_SIZE: usize = 12;

/// What the guest may have the host do. A tap understands all of it.
const HOST_FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;

/// What the host may leave to the guest, and how the tap calls it.
const GUEST_OFFLOADS: [(u32, c_uint); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
];

/// Why a network card cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap cannot be used.
    #[error("network card {name}")]
    Tap {
        /// Name of the card or its tap.
        name: String,
        /// What is wrong with the tap.
        #[source]
        source: TapError,
    },
    /// No random address.
    #[error("cannot choose a random Ethernet address")]
    Address(#[source] io::Error),
}

/// A network card.
pub struct Net {
    tap: Tap,
    config: [u8; CONFIG_SIZE],
    active: Option<Active>,
}

struct Active {
    receiver: Receiver,
    transmit: ActiveQueue,
}

impl Net {
    /// A network card on the tap that `config` names.
    ///
    /// # Errors
    /// The tap does not exist or cannot be used.
    pub fn new(config: &NetConfig) -> Result<Self, NetError> {
        let tap = config.tap.as_deref().unwrap_or_default();
        let tap = Tap::open(tap).map_err(|source| NetError::Tap {
            name: config.id.clone().unwrap_or_else(|| tap.to_owned()),
            source,
        })?;
        Self::with_tap(tap, config.mac)
    }

    /// A network card on `tap`, with a random locally administered address if `mac` is `None`.
    ///
    /// # Errors
    /// The host has no random bytes.
    pub fn with_tap(tap: Tap, mac: Option<MacAddress>) -> Result<Self, NetError> {
        let octets = match mac {
            Some(mac) => mac.octets(),
            None => random_address().map_err(NetError::Address)?,
        };
        let mut config = [0; CONFIG_SIZE];
        config[0..6].copy_from_slice(&octets);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        // 8..10 is the number of queue pairs, which is not offered.
        config[10..12].copy_from_slice(&tap.mtu().unwrap_or_default().to_le_bytes());
        Ok(Self {
            tap,
            config,
            active: None,
        })
    }

    fn receive(&mut self) -> Result<(), DeviceError> {
        match &mut self.active {
            Some(active) => active.receiver.receive(&self.tap),
            None => Ok(()),
        }
    }

    fn transmit(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let tap = &self.tap;
        active.transmit.serve(|memory, chain| {
            match ChainBuffers::collect(memory, chain, QUEUE_SIZE.into()) {
                Ok(buffers) if buffers.readable.len() <= LARGEST_UNSEGMENTED => {
                    // Whatever keeps the host from taking a frame, it is lost as on any wire.
                    if let Err(error) = tap.send(&buffers.readable) {
                        debug!(%error, "net: a frame was dropped");
                    }
                }
                Ok(buffers) => {
                    debug!(len = buffers.readable.len(), "net: a frame was too large");
                }
                Err(error) => debug!(%error, "net: malformed frame"),
            }
            Ok(0)
        })
    }
}

fn random_address() -> io::Result<[u8; 6]> {
    let mut octets = [0; 6];
    // So few bytes are never cut short.
    rustix::rand::getrandom(&mut octets, rustix::rand::GetRandomFlags::empty())?;
    // Locally administered, and of one station.
    octets[0] = octets[0] & !0b01 | 0b10;
    Ok(octets)
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        let mut features = HOST_FEATURES
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF;
        if self.tap.mtu().is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        for (feature, offload) in GUEST_OFFLOADS {
            if self.tap.offloads() & offload != 0 {
                features |= 1 << feature;
            }
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        let has = |feature: u32| features & 1 << feature != 0;
        let offloads = GUEST_OFFLOADS
            .into_iter()
            .filter(|(feature, _)| has(*feature))
            .fold(0, |flags, (_, offload)| flags | offload);
        self.tap
            .set_offloads(offloads)
            .map_err(|source| DeviceError::Host {
                action: "telling the tap which offloads the guest takes",
                source,
            })?;
        let largest = if has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6) {
            LARGEST_UNSEGMENTED
        } else {
            HEADER_SIZE + ETHERNET_SIZE + usize::from(self.tap.mtu().unwrap_or(DEFAULT_MTU))
        };
        let [receive, transmit] = ActiveQueue::from_activation(activation)?;
        self.active = Some(Active {
            receiver: Receiver::new(receive, largest, has(VIRTIO_NET_F_MRG_RXBUF)),
            transmit,
        });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        vec![
            active.receiver.queue().source(TOKEN_RECEIVE),
            active.transmit.source(TOKEN_TRANSMIT),
            Source {
                fd: self.tap.as_raw_fd(),
                token: TOKEN_TAP,
                // A level would keep the event loop busy while the guest has no buffers.
                events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            },
        ]
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        match index {
            RECEIVE_QUEUE => self.receive(),
            TRANSMIT_QUEUE => self.transmit(),
            _ => Ok(()),
        }
    }

    fn process_source(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        match token {
            TOKEN_RECEIVE => self.receive(),
            TOKEN_TRANSMIT => self.transmit(),
            _ => {
                if let Some(active) = &mut self.active {
                    active.receiver.tap_ready();
                }
                self.receive()
            }
        }
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

#[cfg(test)]
mod tests;
