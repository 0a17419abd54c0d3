//! Packets and the descriptor chains that hold them (virtio 1.2, 5.10.6).
//!
//! A chain is a header and then data. How the driver cuts the two into descriptors is its own
//! affair (2.7.4.1): Linux puts both into one descriptor, or the header into one and a list of
//! pages into others.

use crate::devices::virtio::buffers::{Buffers, ChainBuffers, ChainError};
use crate::devices::virtio::queue::Chain;
use crate::memory::GuestMemory;

/// Size of `struct virtio_vsock_hdr`.
pub const HEADER_SIZE: usize = 44;

/// The most data that one packet may carry, as in Linux's `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`. The
/// specification sets no limit, and a packet must be handled in one step.
pub const MAX_DATA: usize = 64 << 10;

/// The most descriptors of one packet: a full packet cut into 4 KiB pages needs 18.
const MAX_DESCRIPTORS: usize = 128;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub const TYPE_STREAM: u16 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;

/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// What a packet asks for (`enum virtio_vsock_op`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// `OP_REQUEST`: a connection.
    Request = 1,
    /// `OP_RESPONSE`: the connection is accepted.
    Response = 2,
    /// `OP_RST`: there is no connection, or no longer.
    Reset = 3,
    /// `OP_SHUTDOWN`: the sender will not receive or not send any more.
    Shutdown = 4,
    /// `OP_RW`: data.
    Data = 5,
    /// `OP_CREDIT_UPDATE`: nothing but the sender's credit fields.
    CreditUpdate = 6,
    /// `OP_CREDIT_REQUEST`: the receiver's credit fields, please.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Reset,
            4 => Self::Shutdown,
            5 => Self::Data,
            6 => Self::CreditUpdate,
            7 => Self::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Address of the sender.
    pub src_cid: u64,
    /// Address of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of data after the header.
    pub len: u32,
    /// Type of the socket: [`TYPE_STREAM`].
    pub kind: u16,
    /// Number of the [`Op`].
    pub op: u16,
    /// What a shutdown is of.
    pub flags: u32,
    /// Size of the sender's receive buffer for this connection.
    pub buf_alloc: u32,
    /// Bytes that have ever left that buffer, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header from its wire format.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The header in its wire format.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The packet that tells the sender of this one that there is no such connection.
    pub(super) fn reset_reply(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: Op::Reset as u16,
            ..Self::default()
        }
    }
}

/// Takes `N` bytes off the front of `rest`, which holds at least that many.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest.split_at(N);
    *rest = tail;
    let mut bytes = [0; N];
    bytes.copy_from_slice(head);
    bytes
}

/// Why a chain holds no packet, or has no room for one.
#[derive(Debug, thiserror::Error)]
pub(super) enum BadChain {
    #[error(transparent)]
    Malformed(#[from] ChainError),
    #[error("the chain is too short for a packet header")]
    NoHeader,
    #[error("the chain has no room for data")]
    NoRoom,
}

/// A packet that the driver sent.
pub(super) struct TxPacket<'m> {
    /// A copy: what the guest does to its memory from now on changes nothing.
    pub(super) header: Header,
    /// The data, `header.len` bytes; `None` if the chain is shorter than that or the packet
    /// longer than [`MAX_DATA`].
    pub(super) data: Option<Buffers<'m>>,
}

impl<'m> TxPacket<'m> {
    /// Reads the header of the packet in `chain` and finds its data.
    ///
    /// # Errors
    /// There is no header to answer to.
    pub(super) fn parse(memory: &'m GuestMemory, chain: Chain) -> Result<Self, BadChain> {
        let mut buffers = ChainBuffers::collect(memory, chain, MAX_DESCRIPTORS)?.readable;
        let header = Header::decode(&buffers.read_front().ok_or(BadChain::NoHeader)?);
        let len = header.len as usize;
        let data = (len <= MAX_DATA)
            .then(|| buffers.split_front(len))
            .flatten();
        Ok(Self { header, data })
    }
}

/// A buffer of the driver, to be filled with a packet.
pub(super) struct RxBuffer<'m> {
    header: Buffers<'m>,
    data: Buffers<'m>,
}

impl<'m> RxBuffer<'m> {
    /// Finds the places for header and data in `chain`.
    ///
    /// # Errors
    /// No packet fits in there.
    pub(super) fn parse(memory: &'m GuestMemory, chain: Chain) -> Result<Self, BadChain> {
        let mut data = ChainBuffers::collect(memory, chain, MAX_DESCRIPTORS)?.writable;
        let header = data.split_front(HEADER_SIZE).ok_or(BadChain::NoHeader)?;
        if data.is_empty() {
            return Err(BadChain::NoRoom);
        }
        Ok(Self { header, data })
    }

    /// Where data goes.
    pub(super) fn data(&self) -> &Buffers<'m> {
        &self.data
    }

    /// Writes the header.
    pub(super) fn write_header(&self, header: &Header) {
        self.header.copy_from(&header.encode());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};
    use virtio_queue::mock::MockSplitQueue;
    use virtio_queue::{Queue, QueueOwnedT};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    const WRITE: u16 = 2;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[
            (GuestAddress(0), 0x10_0000),
            (GuestAddress(0x10_0000), 0x10_0000),
        ])
        .unwrap()
    }

    /// Address, length and flags of a descriptor.
    type Buffer = (u64, u32, u16);

    fn chain(memory: &GuestMemory, buffers: &[Buffer]) -> Chain {
        let rings = MockSplitQueue::new(memory, 256);
        let descriptors: Vec<_> = buffers
            .iter()
            .map(|&(addr, len, flags)| RawDescriptor::from(Descriptor::new(addr, len, flags, 0)))
            .collect();
        rings.build_desc_chain(&descriptors).unwrap();
        let mut queue: Queue = rings.create_queue().unwrap();
        queue
            .iter(Arc::new(memory.clone()))
            .unwrap()
            .next()
            .unwrap()
    }

    fn header(len: u32) -> Header {
        Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len,
            kind: TYPE_STREAM,
            op: Op::Data as u16,
            flags: 3,
            buf_alloc: 0x3132_3334,
            fwd_cnt: 0x4142_4344,
        }
    }

    #[test]
    fn header_has_the_layout_of_the_specification() {
        let bytes = header(5).encode();
        assert_eq!(bytes[0], 8);
        assert_eq!(bytes[8], 2);
        assert_eq!(bytes[16], 0x14);
        assert_eq!(bytes[20], 0x24);
        assert_eq!(bytes[24], 5);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[32], 3);
        assert_eq!(bytes[36], 0x34);
        assert_eq!(bytes[40], 0x44);
        assert_eq!(Header::decode(&bytes), header(5));
    }

    #[test]
    fn header_and_data_may_be_cut_anywhere() {
        let memory = memory();
        let mut packet = header(1000).encode().to_vec();
        packet.extend((0..1000).map(|i| i as u8));
        // The last cut lies where two memory regions meet.
        let start = 0x10_0000 - 500;
        memory.write_slice(&packet, GuestAddress(start)).unwrap();
        let layouts: [&[u32]; 4] = [&[1044], &[44, 1000], &[10, 0, 34, 500, 500], &[43, 1001]];
        for layout in layouts {
            let mut at = start;
            let buffers: Vec<_> = layout
                .iter()
                .map(|&len| {
                    let buffer = (at, len, 0);
                    at += u64::from(len);
                    buffer
                })
                .collect();
            let found = TxPacket::parse(&memory, chain(&memory, &buffers)).unwrap();
            assert_eq!(found.header, header(1000));
            let mut data = [0; 1000];
            assert_eq!(found.data.unwrap().copy_to(&mut data), 1000);
            assert_eq!(data, packet[HEADER_SIZE..]);
        }
    }

    #[test]
    fn data_beyond_the_chain_or_the_limit_is_not_found() {
        let memory = memory();
        for (claimed, there) in [
            (1001, 1000),
            (MAX_DATA as u32 + 1, 0x2_0000),
            (u32::MAX, 10),
        ] {
            memory
                .write_slice(&header(claimed).encode(), GuestAddress(0x1_0000))
                .unwrap();
            let chain = chain(&memory, &[(0x1_0000, 44 + there, 0)]);
            assert!(TxPacket::parse(&memory, chain).unwrap().data.is_none());
        }
    }

    #[test]
    fn chains_without_a_packet_are_refused() {
        let memory = memory();
        let many = vec![(0x1_0000, 1, 0); 200];
        let no_packets: [&[Buffer]; 5] = [
            &[(0x1_0000, 43, 0)],
            &[(0x1_0000, 44, WRITE)],
            &[(0x1_0000, 40, 0), (0x2_0000, 4, WRITE)],
            &[(0x1f_fff0, 44, 0)],
            &many,
        ];
        for buffers in no_packets {
            assert!(TxPacket::parse(&memory, chain(&memory, buffers)).is_err());
        }
        let no_room: [&[Buffer]; 3] = [
            &[(0x1_0000, 44, WRITE)],
            &[(0x1_0000, 43, WRITE)],
            &[(0x1_0000, 44, 0), (0x2_0000, 43, WRITE)],
        ];
        for buffers in no_room {
            assert!(RxBuffer::parse(&memory, chain(&memory, buffers)).is_err());
        }
    }

    #[test]
    fn receive_buffer_takes_header_and_data() {
        let memory = memory();
        let buffers = [
            (0x1_0000, 20, WRITE),
            (0x2_0000, 30, WRITE),
            (0x3_0000, 100, WRITE),
        ];
        let buffer = RxBuffer::parse(&memory, chain(&memory, &buffers)).unwrap();
        buffer.write_header(&header(7));
        assert_eq!(buffer.data().len(), 106);
        let mut bytes = [0; HEADER_SIZE];
        memory
            .read_slice(&mut bytes[..20], GuestAddress(0x1_0000))
            .unwrap();
        memory
            .read_slice(&mut bytes[20..], GuestAddress(0x2_0000))
            .unwrap();
        assert_eq!(Header::decode(&bytes), header(7));
    }

    proptest! {
        /// Whatever a chain looks like, a packet found in it lies within its descriptors.
        #[test]
        fn no_chain_yields_more_than_it_holds(
            buffers in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..4), 1..40),
            near in any::<bool>(),
            claimed in any::<u32>(),
        ) {
            let memory = memory();
            let buffers: Vec<_> = buffers
                .into_iter()
                .map(|(addr, len, flags)| {
                    if near {
                        (0x1_0000 + addr % 0x1f_0000, len % 0x3_0000, flags & WRITE)
                    } else {
                        (addr, len, flags & WRITE)
                    }
                })
                .collect();
            let _ = memory.write_slice(&header(claimed).encode(), GuestAddress(buffers[0].0));
            let total: u64 = buffers.iter().map(|&(_, len, _)| u64::from(len)).sum();
            let chain = chain(&memory, &buffers);
            if let Ok(packet) = TxPacket::parse(&memory, chain.clone())
                && let Some(data) = packet.data
            {
                prop_assert_eq!(data.len(), packet.header.len as usize);
                prop_assert!(data.len() <= MAX_DATA);
                prop_assert!((data.len() + HEADER_SIZE) as u64 <= total);
            }
            if let Ok(buffer) = RxBuffer::parse(&memory, chain) {
                buffer.write_header(&header(claimed));
                prop_assert!((buffer.data().len() + HEADER_SIZE) as u64 <= total);
            }
        }
    }
}
