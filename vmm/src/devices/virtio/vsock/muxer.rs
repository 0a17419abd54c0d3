//! All connections of the device, what they wait for, and whose turn it is.
//!
//! Everything that the host side waits for hangs on one epoll descriptor, which is what the
//! event loop watches. The sockets of connections are watched edge-triggered: an edge is
//! remembered in the stream until a read finds nothing. So a socket that is full of data for a
//! guest that gives no credit, or no receive buffers, costs nothing until the guest does.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::mem;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tracing::{debug, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::Connection;
use super::host::{Greeting, HostStream, Listener, read_greeting};
use super::packet::{HEADER_SIZE, Header, Op, RxBuffer, TYPE_STREAM, TxPacket};
use super::stream::{Fate, Ports, Stream};

/// The CID of the host (`VMADDR_CID_HOST`).
pub(super) const HOST_CID: u64 = 2;

/// The most connections, in any state.
pub(super) const MAX_CONNECTIONS: usize = 1023;

/// The most host programs that may owe us their greeting.
pub(super) const MAX_GREETINGS: usize = 128;

/// The most resets of unknown connections that wait for a receive buffer. A guest that sends
/// more of what earns a reset, and takes none, loses them.
const MAX_RESETS: usize = 1024;

/// Receive buffer of a connection, while there are few. Linux has the same.
pub(super) const LARGE_BUFFER: u32 = 256 << 10;

/// Receive buffer of a connection, once there are many: it still takes the largest packet.
const SMALL_BUFFER: u32 = 64 << 10;

/// Connections that get a large buffer. All buffers together hold at most 88 MiB.
const MAX_LARGE_BUFFERS: usize = 128;

/// How long no host program is accepted after the host ran out of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Host ports that requests come from: far above those of services.
const EPHEMERAL_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// Events handled at a time.
const MAX_EVENTS: usize = 64;

// What the events of the epoll descriptor belong to; everything from `FIRST_ID` on is a peer.
const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_ID: u64 = 2;

/// A host program, by what it has to do with the guest.
enum Peer {
    /// It has not said what it wants. Gone at the deadline.
    Greeting(UnixStream, Instant),
    /// It has a connection, or has asked for one.
    Connected(Stream),
    /// The guest has closed the connection, and the program has not read everything.
    Flushing(HostStream),
}

/// All connections of a device.
pub(super) struct Muxer {
    cid: u64,
    patience: Duration,
    listener: Listener,
    epoll: Epoll,
    timer: OwnedFd,
    /// Serving a guest. Host programs that come earlier wait in the backlog.
    active: bool,
    /// The listener hangs on the epoll descriptor.
    accepting: bool,
    /// The host had no resources: nobody is accepted until then.
    accept_pause: Option<Instant>,
    /// Peers by id; ids are never used again.
    peers: HashMap<u64, Peer>,
    next_id: u64,
    /// How many of the peers are in the state `Greeting`.
    greetings: usize,
    /// Connected peers.
    by_ports: HashMap<Ports, u64>,
    next_port: u32,
    /// Connected peers that may have a packet for the guest, each once.
    ready: VecDeque<u64>,
    /// Answers to packets that belong to no connection.
    resets: VecDeque<Header>,
    /// What the timer is for, by id; `LISTENER` is the accept pause.
    deadlines: BTreeSet<(Instant, u64)>,
    /// When the timer goes off.
    armed: Option<Instant>,
    /// Whether the log says that this user may not connect to a host program.
    told_of_denial: bool,
}

impl Muxer {
    /// `patience` is how long a host program may take for its greeting, and the guest for its
    /// answer to a request or to the end of a connection.
    pub(super) fn new(cid: u64, listener: Listener, patience: Duration) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let timer = timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let event = EpollEvent::new(EventSet::IN, TIMER);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
        Ok(Self {
            cid,
            patience,
            listener,
            epoll,
            timer,
            active: false,
            accepting: false,
            accept_pause: None,
            peers: HashMap::new(),
            next_id: FIRST_ID,
            greetings: 0,
            by_ports: HashMap::new(),
            next_port: EPHEMERAL_PORTS.start,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            deadlines: BTreeSet::new(),
            armed: None,
            told_of_denial: false,
        })
    }

    /// The sockets of host programs are in `directory` from now on.
    pub(super) fn move_to(&mut self, directory: &Path) {
        self.listener.move_to(directory);
    }

    /// The port that the next connection of a host program comes from.
    pub(super) fn next_port(&self) -> u32 {
        self.next_port
    }

    /// Goes on with this port, if it is one that connections of host programs come from.
    pub(super) fn set_next_port(&mut self, port: u32) {
        if EPHEMERAL_PORTS.contains(&port) {
            self.next_port = port;
        }
    }

    /// Readable when [`process_events`](Self::process_events) has something to do.
    pub(super) fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Begins to accept connections.
    pub(super) fn start(&mut self) -> io::Result<()> {
        self.active = true;
        self.settle()
    }

    /// Drops all connections, and accepts no more.
    pub(super) fn stop(&mut self) -> io::Result<()> {
        self.active = false;
        self.accept_pause = None;
        self.peers.clear();
        self.greetings = 0;
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.deadlines.clear();
        self.settle()
    }

    /// Handles what happened on the host side.
    ///
    /// # Errors
    /// The host side is broken as a whole; no single connection can cause that.
    pub(super) fn process_events(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.accept_programs(),
                // Spurious wake-ups are no matter: the work is found elsewhere.
                TIMER => {
                    let _ = rustix::io::read(&self.timer, &mut [0; 8]);
                    self.armed = None;
                    self.expire(Instant::now());
                }
                id => self.process_peer(id, event.event_set()),
            }
        }
        self.settle()
    }

    /// Handles a packet of the guest.
    pub(super) fn receive(&mut self, packet: &TxPacket<'_>) {
        let header = &packet.header;
        let op = Op::from_number(header.op);
        if header.src_cid != self.cid {
            debug!(
                cid = header.src_cid,
                "dropped a packet from a CID not the guest's"
            );
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        match self.by_ports.get(&ports) {
            Some(&id) => self.receive_connected(id, packet),
            None if op == Some(Op::Request) => self.connect_program(header, ports),
            None => self.refuse(header),
        }
    }

    /// There may be a packet for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Fills `buffer` with the next packet for the guest, connections taking turns. Returns its
    /// size; `None` if there is no packet after all.
    pub(super) fn next_packet(&mut self, buffer: &RxBuffer<'_>) -> Option<u32> {
        if let Some(reset) = self.resets.pop_front() {
            buffer.write_header(&reset);
            return Some(HEADER_SIZE as u32);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(Peer::Connected(stream)) = self.peers.get_mut(&id) else {
                continue;
            };
            stream.queued = false;
            let ports = stream.ports;
            let header = match stream.next_packet(buffer) {
                Ok(Some(header)) => header,
                Ok(None) => continue,
                Err(error) => {
                    debug!(?ports, %error, "the host program's socket failed");
                    drop(self.take(id));
                    reset_header()
                }
            };
            buffer.write_header(&Header {
                src_cid: HOST_CID,
                dst_cid: self.cid,
                src_port: ports.host,
                dst_port: ports.guest,
                kind: TYPE_STREAM,
                ..header
            });
            self.update(id);
            return Some(HEADER_SIZE as u32 + header.len);
        }
        None
    }

    /// Accepts host programs, as many as there is room for.
    fn accept_programs(&mut self) {
        while self.has_room() {
            match self.listener.accept() {
                Ok(Some(socket)) => self.greet(socket),
                Ok(None) => return,
                Err(error) => {
                    debug!(%error, "cannot accept host programs for now");
                    let until = Instant::now() + ACCEPT_PAUSE;
                    self.accept_pause = Some(until);
                    self.deadlines.insert((until, LISTENER));
                    return;
                }
            }
        }
    }

    fn has_room(&self) -> bool {
        self.active
            && self.accept_pause.is_none()
            && self.peers.len() < MAX_CONNECTIONS
            && self.greetings < MAX_GREETINGS
    }

    fn greet(&mut self, socket: UnixStream) {
        let Some(id) = self.watch(socket.as_raw_fd()) else {
            return;
        };
        let deadline = Instant::now() + self.patience;
        self.deadlines.insert((deadline, id));
        self.peers.insert(id, Peer::Greeting(socket, deadline));
        self.greetings += 1;
    }

    /// Gives a socket an id and hangs it on the epoll descriptor, which forgets it when it is
    /// closed.
    fn watch(&mut self, fd: RawFd) -> Option<u64> {
        let id = self.next_id;
        match self
            .epoll
            .ctl(ControlOperation::Add, fd, interest(id, false))
        {
            Ok(()) => {
                self.next_id += 1;
                Some(id)
            }
            Err(error) => {
                debug!(%error, "cannot watch a socket");
                None
            }
        }
    }

    /// Connects the guest to the host program that serves the port it asks for.
    fn connect_program(&mut self, request: &Header, ports: Ports) {
        if self.peers.len() >= MAX_CONNECTIONS {
            debug!(?ports, "refused the guest a connection: there are too many");
            self.refuse(request);
            return;
        }
        let socket = match self.listener.connect_port(ports.host) {
            Ok(socket) => socket,
            Err(error) => {
                let denied = error.kind() == io::ErrorKind::PermissionDenied;
                if denied && !mem::replace(&mut self.told_of_denial, true) {
                    warn!(
                        port = ports.host,
                        %error,
                        "a host program's socket is out of the guest's reach: the user that this \
                         VMM runs as must be able to search its directory and write to it"
                    );
                }
                debug!(?ports, %error, "no host program to connect the guest to");
                self.refuse(request);
                return;
            }
        };
        let Some(id) = self.watch(socket.as_raw_fd()) else {
            self.refuse(request);
            return;
        };
        let connection = Connection::accept(request, self.buffer_size());
        let stream = Stream::new(ports, connection, HostStream::new(socket, false));
        self.insert_stream(id, stream);
    }

    /// Asks the guest for a connection in the name of a host program.
    fn connect_guest(&mut self, id: u64, socket: UnixStream, port: u32) {
        let ports = Ports {
            host: self.free_port(),
            guest: port,
        };
        let connection = Connection::request(self.buffer_size());
        // The edge of data that follows the greeting has come with that of the greeting.
        let stream = Stream::new(ports, connection, HostStream::new(socket, true));
        self.insert_stream(id, stream);
    }

    fn insert_stream(&mut self, id: u64, stream: Stream) {
        self.by_ports.insert(stream.ports, id);
        self.peers.insert(id, Peer::Connected(stream));
        self.update(id);
    }

    fn buffer_size(&self) -> u32 {
        if self.by_ports.len() < MAX_LARGE_BUFFERS {
            LARGE_BUFFER
        } else {
            SMALL_BUFFER
        }
    }

    /// A host port without connections, and as long as possible so.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port + 1 == EPHEMERAL_PORTS.end {
                EPHEMERAL_PORTS.start
            } else {
                port + 1
            };
            // The guest may have connected to a service with such a port.
            if self.by_ports.keys().all(|ports| ports.host != port) {
                return port;
            }
        }
    }

    fn process_peer(&mut self, id: u64, events: EventSet) {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match self.peers.get_mut(&id) {
            // Removed by an event of the same batch.
            None => {}
            Some(Peer::Greeting(socket, _)) => match read_greeting(socket) {
                Ok(Greeting::Connect(port)) => {
                    if let Some(Peer::Greeting(socket, deadline)) = self.peers.remove(&id) {
                        self.greetings -= 1;
                        self.deadlines.remove(&(deadline, id));
                        self.connect_guest(id, socket, port);
                    }
                }
                Ok(Greeting::Incomplete) if !gone && !events.contains(EventSet::READ_HANG_UP) => {}
                _ => {
                    debug!("dropped a host program: expected the line CONNECT <port>");
                    drop(self.take(id));
                }
            },
            Some(Peer::Connected(stream)) => {
                let input = EventSet::IN | EventSet::READ_HANG_UP;
                stream.host.readable |= gone || events.intersects(input);
                if events.contains(EventSet::OUT) {
                    stream.flush();
                }
                if gone {
                    stream.hang_up();
                }
                self.update(id);
            }
            Some(Peer::Flushing(host)) => {
                let done = gone || host.flush().is_err() || host.unread() == 0;
                if done {
                    drop(self.take(id));
                }
            }
        }
    }

    fn receive_connected(&mut self, id: u64, packet: &TxPacket<'_>) {
        let Some(Peer::Connected(stream)) = self.peers.get_mut(&id) else {
            return;
        };
        let ports = stream.ports;
        match stream.receive(packet) {
            Ok(Fate::Continues) => self.update(id),
            Ok(Fate::Reset) => drop(self.take(id)),
            Ok(Fate::Closed) => {
                self.refuse(&packet.header);
                self.finish(id);
            }
            Err(violation) => {
                debug!(?ports, %violation, "reset a connection for a packet of the guest");
                self.refuse(&packet.header);
                drop(self.take(id));
            }
        }
    }

    /// Ends a connection that the guest has closed. What it sent before is still delivered.
    fn finish(&mut self, id: u64) {
        let Some(Peer::Connected(mut stream)) = self.take(id) else {
            return;
        };
        stream.flush();
        if stream.host.unread() > 0 {
            stream.host.shutdown(Shutdown::Read);
            self.peers.insert(id, Peer::Flushing(stream.host));
        }
    }

    /// After anything that changes a stream: lines it up if it has a packet, and waits for what
    /// it needs.
    fn update(&mut self, id: u64) {
        let Some(Peer::Connected(stream)) = self.peers.get_mut(&id) else {
            return;
        };
        if !stream.queued && stream.has_packet() {
            stream.queued = true;
            self.ready.push_back(id);
        }
        if stream.connection.awaits_guest() {
            if stream.deadline.is_none() {
                let deadline = Instant::now() + self.patience;
                stream.deadline = Some(deadline);
                self.deadlines.insert((deadline, id));
            }
        } else if let Some(deadline) = stream.deadline.take() {
            self.deadlines.remove(&(deadline, id));
        }
        let wants_room = stream.host.unread() > 0;
        if wants_room != stream.watches_room {
            let fd = stream.host.as_fd().as_raw_fd();
            let event = interest(id, wants_room);
            match self.epoll.ctl(ControlOperation::Modify, fd, event) {
                Ok(()) => stream.watches_room = wants_room,
                Err(error) => debug!(%error, "cannot watch a socket"),
            }
        }
    }

    /// Ends whatever waited until `now`.
    fn expire(&mut self, now: Instant) {
        while let Some(&(deadline, id)) = self.deadlines.first()
            && deadline <= now
        {
            self.deadlines.pop_first();
            if id == LISTENER {
                self.accept_pause = None;
                continue;
            }
            if let Some(Peer::Connected(stream)) = self.take(id) {
                debug!(ports = ?stream.ports, "reset a connection that the guest left unanswered");
                self.queue_reset(Header {
                    src_cid: HOST_CID,
                    dst_cid: self.cid,
                    src_port: stream.ports.host,
                    dst_port: stream.ports.guest,
                    kind: TYPE_STREAM,
                    ..reset_header()
                });
            }
        }
    }

    /// Takes a peer out of all tables.
    fn take(&mut self, id: u64) -> Option<Peer> {
        let peer = self.peers.remove(&id)?;
        match &peer {
            Peer::Greeting(_, deadline) => {
                self.greetings -= 1;
                self.deadlines.remove(&(*deadline, id));
            }
            Peer::Connected(stream) => {
                self.by_ports.remove(&stream.ports);
                if stream.queued {
                    self.ready.retain(|&other| other != id);
                }
                if let Some(deadline) = stream.deadline {
                    self.deadlines.remove(&(deadline, id));
                }
            }
            Peer::Flushing(_) => {}
        }
        Some(peer)
    }

    /// Answers a packet by RST, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op != Op::Reset as u16 {
            self.queue_reset(header.reset_reply());
        }
    }

    fn queue_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    /// Brings the listener's place on the epoll descriptor and the timer in line with the rest.
    /// To be called after any number of [`receive`](Self::receive) and
    /// [`next_packet`](Self::next_packet).
    ///
    /// # Errors
    /// The host side is broken as a whole.
    pub(super) fn settle(&mut self) -> io::Result<()> {
        let accepting = self.has_room();
        if accepting != self.accepting {
            let operation = if accepting {
                ControlOperation::Add
            } else {
                ControlOperation::Delete
            };
            let event = EpollEvent::new(EventSet::IN, LISTENER);
            self.epoll
                .ctl(operation, self.listener.as_raw_fd(), event)?;
            self.accepting = accepting;
        }
        let first = self.deadlines.first().map(|&(deadline, _)| deadline);
        // A timer that goes off too early is armed again then.
        if let Some(first) = first
            && self.armed.is_none_or(|armed| armed > first)
        {
            let left = first.saturating_duration_since(Instant::now());
            // Zero would disarm it.
            let left = left.max(Duration::from_nanos(1));
            let value = Itimerspec {
                it_interval: Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                },
                it_value: Timespec::try_from(left).map_err(io::Error::other)?,
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value)?;
            self.armed = Some(first);
        }
        Ok(())
    }
}

/// RST without addresses.
fn reset_header() -> Header {
    Header {
        op: Op::Reset as u16,
        ..Header::default()
    }
}

/// What to wait for on the socket of a host program.
fn interest(id: u64, room: bool) -> EpollEvent {
    let mut events = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    if room {
        events |= EventSet::OUT;
    }
    EpollEvent::new(events, id)
}

#[cfg(any(test, fuzzing))]
impl Muxer {
    /// Number of peers in any state.
    pub(super) fn peer_count(&self) -> usize {
        self.peers.len()
    }

    /// What waits for a turn or a receive buffer.
    pub(super) fn queued(&self) -> usize {
        self.ready.len() + self.resets.len()
    }

    /// Bytes held for host programs that do not read.
    pub(super) fn buffered(&self) -> usize {
        self.peers
            .values()
            .map(|peer| match peer {
                Peer::Greeting(..) => 0,
                Peer::Connected(stream) => stream.host.unread(),
                Peer::Flushing(host) => host.unread(),
            })
            .sum()
    }
}
