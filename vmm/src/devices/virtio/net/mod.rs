//! Network card (virtio 1.2, 5.1) on a tap of the host.
//!
//! Checksums and segmentation are left to whoever does them best: the header in front of each
//! frame says what is still to be done to it, and tap and guest understand the same header.
//!
//! A card has one or more pairs of queues, each a queue to receive and one to transmit, and as many
//! queues of the tap. A driver that knows of several pairs says how many it uses ([`control`]);
//! what the tap has for the others goes to those that are used.

mod control;
mod counters;
mod receive;
mod tap;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libc::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, c_uint};
use tracing::debug;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;

use super::buffers::ChainBuffers;
use super::queue::ActiveQueue;
use super::state::{DeviceState, OwnState, RestoreError};
use super::{
    Activation, ControlError, Counters, DeviceError, DeviceKind, Source, VirtioDevice, config_space,
};
use crate::config::NetConfig;
use crate::rate_limiter::RateLimiter;
use control::Command;
use counters::NetCounters;
use receive::{Inlet, Receiver};
pub use tap::{Tap, TapError};

/// Tokens of the device's sources: the timers, the queues and the taps, the latter two with their
/// index.
const TOKEN_RECEIVE_TIMER: u32 = 0;
const TOKEN_TRANSMIT_TIMER: u32 = 1;
const TOKEN_FIRST_QUEUE: u32 = 1 << 8;
const TOKEN_FIRST_TAP: u32 = 1 << 16;

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

/// What may be left to the other side.
struct Offload {
    /// By the guest to the host. A tap understands all of it.
    host: u32,
    /// By the host to the guest, and how the tap calls it.
    guest: (u32, c_uint),
    /// Whether the configuration allows it.
    allowed: fn(&NetConfig) -> bool,
}

/// All but the checksums themselves rest on those (virtio 1.2, 5.1.3.1).
const OFFLOADS: [Offload; 5] = [
    Offload {
        host: VIRTIO_NET_F_CSUM,
        guest: (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
        allowed: |config| config.offload_csum,
    },
    Offload {
        host: VIRTIO_NET_F_HOST_TSO4,
        guest: (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
        allowed: |config| config.offload_csum && config.offload_tso,
    },
    Offload {
        host: VIRTIO_NET_F_HOST_TSO6,
        guest: (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
        allowed: |config| config.offload_csum && config.offload_tso,
    },
    Offload {
        host: VIRTIO_NET_F_HOST_ECN,
        guest: (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
        allowed: |config| config.offload_csum && config.offload_tso,
    },
    Offload {
        host: VIRTIO_NET_F_HOST_UFO,
        guest: (VIRTIO_NET_F_GUEST_UFO, TUN_F_UFO),
        allowed: |config| config.offload_csum && config.offload_ufo,
    },
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
    /// The host has no timer left.
    #[error("cannot set up the rate limits of a network card")]
    RateLimiter(#[source] io::Error),
}

/// A network card.
pub struct Net {
    /// One for each pair of queues.
    inlets: Vec<Inlet>,
    /// The features that are offered.
    features: u64,
    queue_sizes: Vec<u16>,
    config: [u8; CONFIG_SIZE],
    mtu: Option<u16>,
    receive_limiter: RateLimiter,
    transmit_limiter: RateLimiter,
    counters: NetCounters,
    active: Option<Active>,
}

struct Active {
    pairs: Vec<Pair>,
    control: Option<ActiveQueue>,
    /// Queues that the driver does not know of.
    unused: Vec<ActiveQueue>,
    /// The pairs on which the driver wants to receive: the first ones.
    used_pairs: usize,
    /// The pair whose turn is first when a limiter lets frames through again.
    next: usize,
}

struct Pair {
    receiver: Receiver,
    transmit: ActiveQueue,
}

/// What a queue is for.
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
    Unused,
}

impl Net {
    /// A network card on the tap that `config` names.
    ///
    /// # Errors
    /// The tap does not exist or cannot be used.
    pub fn new(config: &NetConfig) -> Result<Self, NetError> {
        let pairs = config.queue_pairs();
        let taps: Result<Vec<_>, _> = match (&config.tap, &config.fds) {
            (_, Some(fds)) => fds.iter().map(|fd| Tap::duplicate(*fd)).collect(),
            (tap, None) => (0..pairs)
                .map(|_| Tap::open(tap.as_deref().unwrap_or_default(), pairs > 1))
                .collect(),
        };
        let taps = taps.map_err(|source| NetError::Tap {
            name: config.id.clone().or(config.tap.clone()).unwrap_or_default(),
            source,
        })?;
        Self::with_taps(taps, config)
    }

    /// A network card on `taps`, one for each pair of queues, with a random locally administered
    /// address if none is given.
    ///
    /// # Errors
    /// The host has no random bytes or no timers.
    pub fn with_taps(taps: Vec<Tap>, card: &NetConfig) -> Result<Self, NetError> {
        let octets = match card.mac {
            Some(mac) => mac.octets(),
            None => random_address().map_err(NetError::Address)?,
        };
        let mtu = taps.first().and_then(Tap::mtu);
        let mut config = [0; CONFIG_SIZE];
        config[0..6].copy_from_slice(&octets);
        config[6..8].copy_from_slice(&(VIRTIO_NET_S_LINK_UP as u16).to_le_bytes());
        config[8..10].copy_from_slice(&(taps.len() as u16).to_le_bytes());
        config[10..12].copy_from_slice(&mtu.unwrap_or_default().to_le_bytes());
        let limiter =
            || RateLimiter::new(card.rate_limiter_config.as_ref()).map_err(NetError::RateLimiter);
        let control = usize::from(taps.len() > 1);
        Ok(Self {
            features: features(&taps, card),
            queue_sizes: vec![card.queue_size; 2 * taps.len() + control],
            inlets: taps.into_iter().map(Inlet::new).collect(),
            config,
            mtu,
            receive_limiter: limiter()?,
            transmit_limiter: limiter()?,
            counters: NetCounters::default(),
            active: None,
        })
    }

    /// What queue `index` of an active card is for (virtio 1.2, 5.1.2). The control queue follows
    /// the last pair that the driver knows of.
    fn role(&self, index: usize) -> Role {
        let Some(active) = &self.active else {
            return Role::Unused;
        };
        let pair = index / 2;
        if pair < active.pairs.len() {
            if index.is_multiple_of(2) {
                Role::Receive(pair)
            } else {
                Role::Transmit(pair)
            }
        } else if index == 2 * active.pairs.len() && active.control.is_some() {
            Role::Control
        } else {
            Role::Unused
        }
    }

    fn process(&mut self, index: usize) -> Result<(), DeviceError> {
        match self.role(index) {
            Role::Receive(pair) => self.receive(pair),
            Role::Transmit(pair) => self.transmit(pair),
            Role::Control => self.obey(),
            Role::Unused => Ok(()),
        }
    }

    fn receive(&mut self, pair: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let used = active.used_pairs;
        if pair >= used {
            return Ok(());
        }
        let Some(Pair { receiver, .. }) = active.pairs.get_mut(pair) else {
            return Ok(());
        };
        let mut inlets: Vec<_> = self.inlets.iter_mut().skip(pair).step_by(used).collect();
        receiver.receive(&mut inlets, &mut self.receive_limiter, &self.counters)
    }

    fn transmit(&mut self, pair: usize) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let (Some(Pair { transmit, .. }), Some(inlet)) =
            (active.pairs.get_mut(pair), self.inlets.get(pair))
        else {
            return Ok(());
        };
        let (limiter, counters) = (&mut self.transmit_limiter, &self.counters);
        let memory = Arc::clone(transmit.memory());
        let limit = transmit.size().into();
        let mut visit = transmit.visit()?;
        while let Some(chain) = visit.next()? {
            let head = chain.head_index();
            match ChainBuffers::collect(&memory, chain, limit) {
                Ok(buffers) if buffers.readable.len() <= LARGEST_UNSEGMENTED => {
                    let frame = buffers.readable.len().saturating_sub(HEADER_SIZE) as u64;
                    if !limiter.admits(frame).map_err(timer_failed)? {
                        visit.queue.undo_pop();
                        break;
                    }
                    limiter.charge(frame);
                    // Whatever keeps the host from taking a frame, it is lost as on any wire.
                    match inlet.tap().send(&buffers.readable) {
                        Ok(()) => counters.sent(frame),
                        Err(error) => {
                            debug!(%error, "net: a frame was dropped");
                            counters.send_dropped();
                        }
                    }
                }
                Ok(buffers) => {
                    debug!(len = buffers.readable.len(), "net: a frame was too large");
                    counters.send_dropped();
                }
                Err(error) => {
                    debug!(%error, "net: malformed frame");
                    counters.send_dropped();
                }
            }
            visit.queue.add_used(head, 0)?;
        }
        transmit.announce()
    }

    /// Carries out the commands of the driver.
    fn obey(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(control) = &mut active.control else {
            return Ok(());
        };
        let (most, used) = (active.pairs.len(), &mut active.used_pairs);
        let limit = control.size().into();
        control.serve(|memory, chain| {
            Ok(match ChainBuffers::collect(memory, chain, limit) {
                Ok(buffers) => control::execute(buffers, |command| match command {
                    Command::UsePairs(pairs) if (1..=most).contains(&pairs) => {
                        *used = pairs;
                        true
                    }
                    Command::UsePairs(_) => false,
                }),
                Err(error) => {
                    debug!(%error, "net: malformed command");
                    0
                }
            })
        })?;
        // What the tap has may have another queue to go to now.
        (0..most).try_for_each(|pair| self.receive(pair))
    }

    /// A limiter may let frames through again: every pair gets its turn, each time another one
    /// first.
    fn all_pairs(
        &mut self,
        mut visit: impl FnMut(&mut Self, usize) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let count = active.pairs.len();
        let first = active.next;
        active.next = (first + 1) % count.max(1);
        (0..count).try_for_each(|turn| visit(self, (first + turn) % count))
    }
}

/// What is offered to the driver.
fn features(taps: &[Tap], card: &NetConfig) -> u64 {
    let mut features =
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | 1 << VIRTIO_NET_F_MRG_RXBUF;
    if taps.len() > 1 {
        features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    }
    let Some(tap) = taps.first() else {
        return features;
    };
    if tap.mtu().is_some() {
        features |= 1 << VIRTIO_NET_F_MTU;
    }
    for offload in OFFLOADS {
        if (offload.allowed)(card) {
            features |= 1 << offload.host;
            let (guest, flag) = offload.guest;
            if tap.offloads() & flag != 0 {
                features |= 1 << guest;
            }
        }
    }
    features
}

fn timer_failed(source: io::Error) -> DeviceError {
    DeviceError::Host {
        action: "setting the timer of the rate limits",
        source,
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
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config_space::read(&self.config, offset, data);
    }

    fn counters(&self) -> Counters {
        self.counters.by_name()
    }

    fn pause(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        for pair in &mut active.pairs {
            pair.receiver.put_back()?;
        }
        // What a tap tells while nobody watches is not told again.
        for inlet in &mut self.inlets {
            inlet.set_ready();
        }
        Ok(())
    }

    fn save(&mut self) -> Result<DeviceState, ControlError> {
        let active = self.active.as_ref();
        Ok(DeviceState {
            queues: active.map(|active| {
                let pairs = active.pairs.iter();
                let pairs = pairs.flat_map(|pair| [pair.receiver.queue(), &pair.transmit]);
                let known = pairs.chain(&active.control);
                let mut queues: Vec<_> = known.map(ActiveQueue::save).collect();
                queues.extend(active.unused.iter().map(ActiveQueue::save));
                queues
            }),
            own: OwnState::Net {
                used_pairs: active.map_or(1, |active| active.used_pairs),
            },
        })
    }

    fn restore(&mut self, own: &OwnState) -> Result<(), RestoreError> {
        let OwnState::Net { used_pairs } = *own else {
            return Err(RestoreError::OwnState);
        };
        if let Some(active) = &mut self.active {
            active.used_pairs = used_pairs.clamp(1, active.pairs.len().max(1));
        }
        Ok(())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        let has = |feature: u32| features & 1 << feature != 0;
        let offloads = OFFLOADS
            .iter()
            .map(|offload| offload.guest)
            .filter(|(feature, _)| has(*feature))
            .fold(0, |flags, (_, flag)| flags | flag);
        for inlet in &mut self.inlets {
            inlet
                .tap_mut()
                .set_offloads(offloads)
                .map_err(|source| DeviceError::Host {
                    action: "telling the tap which offloads the guest takes",
                    source,
                })?;
            inlet.set_ready();
        }
        let large = [
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_UFO,
        ];
        let largest = if large.into_iter().any(has) {
            LARGEST_UNSEGMENTED
        } else {
            HEADER_SIZE + ETHERNET_SIZE + usize::from(self.mtu.unwrap_or(DEFAULT_MTU))
        };
        let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
        let mut queues = ActiveQueue::all(activation)?.into_iter();
        // A driver that does not know of several pairs has one, with the control queue behind it.
        let count = if has(VIRTIO_NET_F_MQ) {
            self.inlets.len()
        } else {
            1
        };
        let mut pairs = Vec::with_capacity(count);
        while pairs.len() < count
            && let (Some(receive), Some(transmit)) = (queues.next(), queues.next())
        {
            pairs.push(Pair {
                receiver: Receiver::new(receive, largest, mergeable),
                transmit,
            });
        }
        let control = has(VIRTIO_NET_F_CTRL_VQ).then(|| queues.next()).flatten();
        self.active = Some(Active {
            pairs,
            control,
            unused: queues.collect(),
            used_pairs: 1,
            next: 0,
        });
        Ok(())
    }

    fn sources(&self) -> Vec<Source> {
        let Some(active) = &self.active else {
            return Vec::new();
        };
        let mut sources = Vec::new();
        for (limiter, token) in [
            (&self.receive_limiter, TOKEN_RECEIVE_TIMER),
            (&self.transmit_limiter, TOKEN_TRANSMIT_TIMER),
        ] {
            sources.extend(limiter.timer().map(|fd| Source {
                fd,
                token,
                events: EventSet::IN,
            }));
        }
        let queues = active
            .pairs
            .iter()
            .flat_map(|pair| [pair.receiver.queue(), &pair.transmit])
            .chain(&active.control);
        sources.extend(
            (TOKEN_FIRST_QUEUE..)
                .zip(queues)
                .map(|(token, queue)| queue.source(token)),
        );
        sources.extend((TOKEN_FIRST_TAP..).zip(&self.inlets).map(|(token, inlet)| {
            Source {
                fd: inlet.tap().as_raw_fd(),
                token,
                // A level would keep the event loop busy while the guest has no buffers.
                events: EventSet::IN | EventSet::EDGE_TRIGGERED,
            }
        }));
        sources
    }

    fn process_queue(&mut self, index: usize) -> Result<(), DeviceError> {
        self.process(index)
    }

    fn process_source(&mut self, token: u32, _ready: EventSet) -> Result<(), DeviceError> {
        match token {
            TOKEN_RECEIVE_TIMER => {
                self.receive_limiter.acknowledge_timer();
                self.all_pairs(Self::receive)
            }
            TOKEN_TRANSMIT_TIMER => {
                self.transmit_limiter.acknowledge_timer();
                self.all_pairs(Self::transmit)
            }
            TOKEN_FIRST_QUEUE..TOKEN_FIRST_TAP => {
                self.process((token - TOKEN_FIRST_QUEUE) as usize)
            }
            tap => {
                let index = (tap - TOKEN_FIRST_TAP) as usize;
                let Some(inlet) = self.inlets.get_mut(index) else {
                    return Ok(());
                };
                inlet.set_ready();
                let used = self.active.as_ref().map_or(1, |active| active.used_pairs);
                self.receive(index % used)
            }
        }
    }

    fn reset(&mut self) {
        self.active = None;
    }
}

#[cfg(test)]
mod tests;
