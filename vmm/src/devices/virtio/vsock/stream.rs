//! One connection together with the UNIX socket of its host program.

use std::io;
use std::net::Shutdown;
use std::time::Instant;

use super::connection::{Connection, Effect, Violation};
use super::host::HostStream;
use super::packet::{Header, MAX_DATA, RxBuffer, TxPacket};

/// The two ends of a connection. The host's CID is always 2, and the guest's its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// What becomes of a stream after a packet of the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Continues,
    /// The guest is through with it, in good order.
    Closed,
    /// The guest has dropped it.
    Reset,
}

/// A connection in the state `Requested` or `Open`.
pub(super) struct Stream {
    pub(super) ports: Ports,
    pub(super) connection: Connection,
    pub(super) host: HostStream,
    /// In the muxer's line of streams that have something for the guest.
    pub(super) queued: bool,
    /// Epoll also waits for room in the socket.
    pub(super) watches_room: bool,
    /// When the guest's silence ends the connection.
    pub(super) deadline: Option<Instant>,
}

impl Stream {
    pub(super) fn new(ports: Ports, connection: Connection, host: HostStream) -> Self {
        Self {
            ports,
            connection,
            host,
            queued: false,
            watches_room: false,
            deadline: None,
        }
    }

    /// Handles a packet of the guest.
    pub(super) fn receive(&mut self, packet: &TxPacket<'_>) -> Result<Fate, Violation> {
        let effect = self
            .connection
            .receive(&packet.header, packet.data.is_some())?;
        match effect {
            Effect::None => {}
            Effect::Opened => {
                // Whoever sent a request and left still wants it delivered.
                if self.host.confirm(self.ports.host).is_err() {
                    self.stop_writing();
                }
            }
            Effect::Data => {
                if let Some(data) = &packet.data {
                    let written = self.host.write(data);
                    self.account(written);
                }
            }
            Effect::HalfClosed => {
                self.end_writing();
                if self.connection.guest_ended_receiving() {
                    self.host.shutdown(Shutdown::Read);
                }
            }
            Effect::Closed => return Ok(Fate::Closed),
            Effect::Reset => return Ok(Fate::Reset),
        }
        Ok(Fate::Continues)
    }

    /// The socket has room again.
    pub(super) fn flush(&mut self) {
        let written = self.host.flush();
        self.account(written);
        self.end_writing();
    }

    /// The host program is gone.
    pub(super) fn hang_up(&mut self) {
        self.stop_writing();
        if !self.connection.passes_data() && !self.connection.awaits_guest() {
            // There is no end of file to come, or nobody to care.
            self.connection.end_host_sending();
        }
    }

    /// There is, or may be, a packet for the guest.
    pub(super) fn has_packet(&self) -> bool {
        self.connection.control_due() || (self.host.readable && self.connection.passes_data())
    }

    /// Makes the next packet for the guest: fills in the data and returns the header, without
    /// its addresses. `None` if there was nothing after all.
    ///
    /// # Errors
    /// The socket failed: the connection is to be reset.
    pub(super) fn next_packet(&mut self, buffer: &RxBuffer<'_>) -> io::Result<Option<Header>> {
        if let Some(header) = self.connection.next_control() {
            return Ok(Some(header));
        }
        if !self.host.readable || !self.connection.passes_data() {
            return Ok(None);
        }
        let limit = self.connection.credit().min(MAX_DATA);
        if limit == 0 {
            self.connection.want_credit();
            return Ok(self.connection.next_control());
        }
        match self.host.read(buffer.data(), limit)? {
            None => Ok(None),
            Some(0) => {
                self.connection.end_host_sending();
                Ok(self.connection.next_control())
            }
            // At most MAX_DATA, so that it fits.
            Some(len) => Ok(Some(self.connection.next_data(len as u32))),
        }
    }

    /// Takes note of what left the buffer, or of a host program that does not read.
    fn account(&mut self, written: io::Result<usize>) {
        match written {
            Ok(len) => self.connection.forwarded(len as u32),
            Err(_) => self.stop_writing(),
        }
    }

    /// Passes the end of the guest's data on, once all data is.
    fn end_writing(&mut self) {
        if self.connection.guest_ended_sending() && self.host.unread() == 0 {
            self.host.shutdown(Shutdown::Write);
        }
    }

    /// Nobody reads what the guest sends.
    fn stop_writing(&mut self) {
        self.host.discard();
        self.connection.end_host_receiving();
    }
}
