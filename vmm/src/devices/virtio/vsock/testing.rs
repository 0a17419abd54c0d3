//! A guest: the driver's side of the queues, and just enough of a socket layer.
//!
//! The driver notifies and waits strictly by the rules of event indices (virtio 1.2, 2.7.10):
//! it calls the device only if the device asked for it, and looks at a used ring only after an
//! interrupt. A notification that the device forgets is thus a test that hangs, and fails.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::device::{RX_QUEUE, TX_QUEUE, Vsock};
use super::muxer::{LARGE_BUFFER, MAX_CONNECTIONS};
pub use super::packet::{HEADER_SIZE, Header, MAX_DATA, Op, TYPE_STREAM};
use crate::config::VsockConfig;
use crate::devices::virtio::{Activation, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

pub const CID: u64 = 52;
const RING_SIZE: u16 = 64;
const RING_SPACING: u64 = 0x4000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;
const TX_BUFFER_SPACING: u64 = 0x1_1000;
const MEMORY: usize = 16 << 20;

/// How long a test waits for what must come.
pub const LIMIT: Duration = Duration::from_secs(20);

/// Length of the guest's receive buffers: as Linux has them.
pub const RX_BUFFER_LEN: u32 = 4096;

const WRITE: u16 = 2;

/// The driver's side of one queue of single-descriptor chains.
pub struct Ring {
    base: u64,
    event_idx: bool,
    avail: u16,
    used: u16,
    pub free: Vec<u16>,
}

impl Ring {
    fn new(index: usize, event_idx: bool) -> Self {
        Self {
            base: index as u64 * RING_SPACING,
            event_idx,
            avail: 0,
            used: 0,
            free: (0..RING_SIZE).rev().collect(),
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(RING_SIZE)
    }

    fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(RING_SIZE).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail_ring() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used_ring() as u32), Some(0));
        queue.set_event_idx(self.event_idx);
        queue.set_ready(true);
        queue
    }

    /// Writes a descriptor and makes it available; tells whether the device wants to know.
    pub fn add(&mut self, memory: &GuestMemory, id: u16, addr: u64, len: u32, flags: u16) -> bool {
        let descriptor = self.base + 16 * u64::from(id);
        memory.write_obj(addr, GuestAddress(descriptor)).unwrap();
        memory.write_obj(len, GuestAddress(descriptor + 8)).unwrap();
        memory
            .write_obj(flags, GuestAddress(descriptor + 12))
            .unwrap();
        memory
            .write_obj(0u16, GuestAddress(descriptor + 14))
            .unwrap();
        self.offer(memory, id)
    }

    /// Makes a chain available; tells whether the device wants to know.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) -> bool {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % RING_SIZE);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        let old = self.avail;
        self.avail = old.wrapping_add(1);
        memory
            .write_obj(self.avail, GuestAddress(self.avail_ring() + 2))
            .unwrap();
        if self.event_idx {
            let event_at = self.used_ring() + 4 + 8 * u64::from(RING_SIZE);
            let event: u16 = memory.read_obj(GuestAddress(event_at)).unwrap();
            self.avail.wrapping_sub(event).wrapping_sub(1) < self.avail.wrapping_sub(old)
        } else {
            let flags: u16 = memory.read_obj(GuestAddress(self.used_ring())).unwrap();
            flags & 1 == 0
        }
    }

    /// Breaks the rules: claims that far more is available than the ring holds.
    pub fn overrun(&mut self, memory: &GuestMemory) {
        let index = self.avail.wrapping_add(RING_SIZE + 1);
        memory
            .write_obj(index, GuestAddress(self.avail_ring() + 2))
            .unwrap();
    }

    fn next_used(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        if index == self.used {
            // Asks for an interrupt for the next one.
            let event_at = self.avail_ring() + 4 + 2 * u64::from(RING_SIZE);
            memory.write_obj(self.used, GuestAddress(event_at)).unwrap();
            return None;
        }
        let slot = self.used_ring() + 4 + 8 * u64::from(self.used % RING_SIZE);
        let id: u32 = memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(slot + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((id as u16, len))
    }
}

/// A guest with its socket device.
pub struct Guest {
    pub device: Vsock,
    pub memory: GuestMemory,
    pub rx: Ring,
    pub tx: Ring,
    /// What came from the device.
    pub inbox: VecDeque<(Header, Vec<u8>)>,
    /// Whether used receive buffers are offered again at once.
    pub refill: bool,
    interrupt: Interrupt,
    event_idx: bool,
    /// The device is to be notified of what the transmit queue holds.
    notification_due: bool,
    directory: TempDir,
}

impl Guest {
    pub fn new() -> Self {
        let mut guest = Self::powered_on(true, Duration::from_secs(10));
        guest.activate();
        guest
    }

    /// A guest whose driver has not yet started.
    pub fn powered_on(event_idx: bool, patience: Duration) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = VsockConfig {
            id: None,
            cid: CID as u32,
            socket: directory.path().join("vsock"),
        };
        Self {
            device: Vsock::with_patience(&config, patience).unwrap(),
            memory: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
            rx: Ring::new(RX_QUEUE, event_idx),
            tx: Ring::new(TX_QUEUE, event_idx),
            inbox: VecDeque::new(),
            refill: true,
            interrupt: Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            event_idx,
            notification_due: false,
            directory,
        }
    }

    /// The driver starts.
    pub fn activate(&mut self) {
        self.memory
            .write_slice(&vec![0; 3 * RING_SPACING as usize], GuestAddress(0))
            .unwrap();
        self.rx = Ring::new(RX_QUEUE, self.event_idx);
        self.tx = Ring::new(TX_QUEUE, self.event_idx);
        self.inbox.clear();
        let events = Ring::new(2, self.event_idx);
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                features: 0,
                queues: vec![self.rx.queue(), self.tx.queue(), events.queue()],
                interrupt: self.interrupt.clone(),
            })
            .unwrap();
        for index in 0..3 {
            self.device.process_queue(index).unwrap();
        }
        if self.refill {
            self.offer_buffers(usize::from(RING_SIZE));
        }
    }

    /// Offers up to `count` receive buffers.
    pub fn offer_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let Some(id) = self.rx.free.pop() else { break };
            let addr = RX_BUFFERS + u64::from(id) * u64::from(RX_BUFFER_LEN);
            if self.rx.add(&self.memory, id, addr, RX_BUFFER_LEN, WRITE) {
                self.device.process_queue(RX_QUEUE).unwrap();
            }
        }
    }

    /// Whether the device holds no more than it may, whatever the guest and host programs did.
    pub fn check_bounds(&self) {
        let muxer = self.device.muxer();
        let peers = muxer.peer_count();
        assert!(peers <= MAX_CONNECTIONS, "{peers} host programs");
        let buffered = muxer.buffered();
        assert!(
            buffered <= peers * LARGE_BUFFER as usize,
            "{buffered} bytes"
        );
        let queued = muxer.queued();
        assert!(queued <= 2 * MAX_CONNECTIONS, "{queued} packets are due");
    }

    pub fn socket_path(&self, suffix: &str) -> PathBuf {
        self.directory.path().join(format!("vsock{suffix}"))
    }

    /// A host program connects, and says nothing yet.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.socket_path("")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// Puts a packet into the transmit queue; `notify` as a driver does that has no more.
    pub fn transmit(&mut self, header: &Header, data: &[u8], notify: bool) {
        let deadline = Instant::now() + LIMIT;
        while self.tx.free.is_empty() {
            assert!(
                Instant::now() < deadline,
                "the device does not take packets"
            );
            self.turn(Duration::from_millis(100));
        }
        let id = self.tx.free.pop().unwrap();
        let addr = TX_BUFFERS + u64::from(id) * TX_BUFFER_SPACING;
        self.memory
            .write_slice(&header.encode(), GuestAddress(addr))
            .unwrap();
        let data = &data[..data.len().min(MAX_DATA)];
        self.memory
            .write_slice(data, GuestAddress(addr + HEADER_SIZE as u64))
            .unwrap();
        let len = (HEADER_SIZE + data.len()) as u32;
        self.notification_due |= self.tx.add(&self.memory, id, addr, len, 0);
        if notify && std::mem::take(&mut self.notification_due) {
            self.device.process_queue(TX_QUEUE).unwrap();
        }
    }

    pub fn send(&mut self, header: &Header, data: &[u8]) {
        self.transmit(header, data, true);
        self.handle_interrupt();
    }

    /// The tokens of the sources that are ready.
    fn ready_sources(&self, timeout: Duration) -> Vec<u32> {
        let sources = self.device.sources();
        let fds: Vec<_> = sources
            .iter()
            // SAFETY: the device owns the descriptors and outlives these borrows.
            .map(|source| unsafe { BorrowedFd::borrow_raw(source.fd) })
            .collect();
        let mut polled: Vec<_> = fds
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        poll(&mut polled, Some(&Timespec::try_from(timeout).unwrap())).unwrap();
        sources
            .iter()
            .zip(&polled)
            .filter(|(_, polled)| !polled.revents().is_empty())
            .map(|(source, _)| source.token)
            .collect()
    }

    /// Whether the device wants to be called.
    pub fn wants_turn(&self) -> bool {
        !self.ready_sources(Duration::ZERO).is_empty()
    }

    /// One turn of the event loop and of the interrupt handler.
    pub fn turn(&mut self, timeout: Duration) -> bool {
        let ready = self.ready_sources(timeout);
        for token in &ready {
            self.device.process_source(*token, EventSet::IN).unwrap();
        }
        self.handle_interrupt();
        !ready.is_empty()
    }

    /// Turns until the device has nothing to do.
    pub fn idle(&mut self) {
        for _ in 0..100_000 {
            if !self.turn(Duration::ZERO) {
                return;
            }
        }
        panic!("the device spins");
    }

    pub fn handle_interrupt(&mut self) {
        while self.interrupt.irqfd().read().is_ok() {
            while let Some((id, _)) = self.tx.next_used(&self.memory) {
                self.tx.free.push(id);
            }
            while let Some((id, len)) = self.rx.next_used(&self.memory) {
                self.rx.free.push(id);
                if len > 0 {
                    let mut bytes = vec![0; len as usize];
                    let addr = RX_BUFFERS + u64::from(id) * u64::from(RX_BUFFER_LEN);
                    self.memory
                        .read_slice(&mut bytes, GuestAddress(addr))
                        .unwrap();
                    let data = bytes.split_off(HEADER_SIZE);
                    let header = Header::decode(&bytes.try_into().unwrap());
                    assert_eq!(header.len as usize, data.len());
                    assert_eq!(header.dst_cid, CID);
                    self.inbox.push_back((header, data));
                }
                if self.refill {
                    self.offer_buffers(1);
                }
            }
        }
    }

    /// The next packet of the device.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        let deadline = Instant::now() + LIMIT;
        loop {
            self.handle_interrupt();
            if let Some(packet) = self.inbox.pop_front() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet comes");
            self.turn(Duration::from_millis(100));
        }
    }

    /// The next packet of the device, which must be of this kind.
    pub fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(Op::from_number(header.op), Some(op), "{header:?}");
        (header, data)
    }

    /// Turns the device while a host program waits for it on another thread.
    pub fn turn_until<T: Send>(&mut self, wait: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let waiter = scope.spawn(wait);
            while !waiter.is_finished() {
                self.turn(Duration::from_millis(5));
            }
            waiter.join().unwrap()
        })
    }
}

/// A socket of the guest.
pub struct Socket {
    pub host_port: u32,
    pub port: u32,
    /// What the guest advertises.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub sent: u32,
    pub device_buf_alloc: u32,
    pub device_fwd_cnt: u32,
}

impl Socket {
    pub fn new(port: u32, host_port: u32) -> Self {
        Self {
            host_port,
            port,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            sent: 0,
            device_buf_alloc: 0,
            device_fwd_cnt: 0,
        }
    }

    pub fn header(&self, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: self.port,
            dst_port: self.host_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }

    /// The socket that the guest answers the device's request with.
    pub fn accept(guest: &mut Guest) -> Self {
        let (request, _) = guest.expect(Op::Request);
        let mut socket = Self::new(request.dst_port, request.src_port);
        socket.learn(&request);
        guest.send(&socket.header(Op::Response), &[]);
        socket
    }

    /// Connects to a port that a host program serves.
    pub fn connect(guest: &mut Guest, port: u32, host_port: u32) -> Self {
        let mut socket = Self::new(port, host_port);
        guest.send(&socket.header(Op::Request), &[]);
        let (response, _) = guest.expect(Op::Response);
        assert_eq!((response.src_port, response.dst_port), (host_port, port));
        socket.learn(&response);
        socket
    }

    pub fn learn(&mut self, header: &Header) {
        self.device_buf_alloc = header.buf_alloc;
        self.device_fwd_cnt = header.fwd_cnt;
    }

    pub fn credit(&self) -> u32 {
        self.device_buf_alloc - self.sent.wrapping_sub(self.device_fwd_cnt)
    }

    pub fn send(&mut self, guest: &mut Guest, data: &[u8]) {
        self.sent = self.sent.wrapping_add(data.len() as u32);
        let header = Header {
            len: data.len() as u32,
            ..self.header(Op::Data)
        };
        guest.send(&header, data);
    }

    pub fn shutdown(&self, guest: &mut Guest, flags: u32) {
        let header = Header {
            flags,
            ..self.header(Op::Shutdown)
        };
        guest.send(&header, &[]);
    }
}
