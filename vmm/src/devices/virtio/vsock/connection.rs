//! The state machine of one connection (virtio 1.2, 5.10.6.3 to 5.10.6.5), without its sockets
//! and queues. The module above tells the life of a connection; this file holds the states
//! `Requested` and `Open`, the two half-closes of each side, and the credit.
//!
//! Credit: each side tells the size of its receive buffer and how many bytes have ever left it.
//! The other side may have that many more bytes under way. All counters wrap at 2^32.

use std::num::Wrapping;

use super::packet::{Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What a packet of the guest means for the host side of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// The guest has accepted the connection.
    Opened,
    /// The packet's data is to be forwarded.
    Data,
    /// The guest has ended one direction.
    HalfClosed,
    /// The guest has ended both directions. It expects RST.
    Closed,
    /// The guest has dropped the connection.
    Reset,
}

/// How a packet of the guest breaks the protocol. The answer is RST.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("the operation is unknown")]
    Operation,
    #[error("the operation does not fit the state of the connection")]
    State,
    #[error("the packet is shorter than its header says, or longer than allowed")]
    Length,
    #[error("there is more data than the device gave credit for")]
    Credit,
    #[error("there is data after the end of data")]
    AfterShutdown,
}

/// Directions that one side has ended.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Ended {
    send: bool,
    receive: bool,
}

impl Ended {
    const BOTH: Self = Self {
        send: true,
        receive: true,
    };

    fn flags(self) -> u32 {
        (if self.send { SHUTDOWN_SEND } else { 0 })
            | (if self.receive { SHUTDOWN_RECEIVE } else { 0 })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest has been, or is to be, asked.
    Requested,
    Open,
}

/// One connection as both ends of the virtqueues see it.
#[derive(Debug)]
pub(super) struct Connection {
    phase: Phase,
    /// What the guest has ended.
    guest: Ended,
    /// What the host program has ended.
    host: Ended,
    /// What of `host` the guest has been told.
    announced: Ended,

    request_due: bool,
    response_due: bool,
    credit_update_due: bool,
    credit_request_due: bool,
    /// The guest has been asked for credit, and has not given any since.
    credit_requested: bool,

    /// Size of our receive buffer.
    buf_alloc: u32,
    /// Bytes that came from the guest.
    received: Wrapping<u32>,
    /// Those of them that have left our buffer.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest knows it.
    reported: Wrapping<u32>,

    /// Size of the guest's receive buffer.
    guest_buf_alloc: u32,
    /// Bytes that went to the guest.
    sent: Wrapping<u32>,
    /// Those of them that have left the guest's buffer, as it says.
    guest_fwd_cnt: Wrapping<u32>,
}

impl Connection {
    fn new(phase: Phase, buf_alloc: u32) -> Self {
        Self {
            phase,
            guest: Ended::default(),
            host: Ended::default(),
            announced: Ended::default(),
            request_due: phase == Phase::Requested,
            response_due: phase == Phase::Open,
            credit_update_due: false,
            credit_request_due: false,
            credit_requested: false,
            buf_alloc,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            reported: Wrapping(0),
            guest_buf_alloc: 0,
            sent: Wrapping(0),
            guest_fwd_cnt: Wrapping(0),
        }
    }

    /// A connection that a host program asks for. `buf_alloc` is the size in bytes of the
    /// buffer for what the guest sends.
    pub(super) fn request(buf_alloc: u32) -> Self {
        Self::new(Phase::Requested, buf_alloc)
    }

    /// A connection that the guest asked for by `request`, and got.
    pub(super) fn accept(request: &Header, buf_alloc: u32) -> Self {
        let mut connection = Self::new(Phase::Open, buf_alloc);
        connection.take_credit(request);
        connection
    }

    /// Handles a packet of the guest. `complete` tells whether all its data is there.
    ///
    /// # Errors
    /// The connection is to be reset.
    pub(super) fn receive(&mut self, header: &Header, complete: bool) -> Result<Effect, Violation> {
        let op = Op::from_number(header.op).ok_or(Violation::Operation)?;
        if op == Op::Reset {
            return Ok(Effect::Reset);
        }
        if self.phase == Phase::Requested {
            if op != Op::Response || self.request_due {
                return Err(Violation::State);
            }
            self.phase = Phase::Open;
            self.take_credit(header);
            return Ok(Effect::Opened);
        }
        self.take_credit(header);
        match op {
            Op::Request | Op::Response | Op::Reset => Err(Violation::State),
            Op::Data if self.response_due => Err(Violation::State),
            Op::Data => self.receive_data(header.len, complete),
            Op::CreditUpdate => Ok(Effect::None),
            Op::CreditRequest => {
                self.credit_update_due = true;
                Ok(Effect::None)
            }
            Op::Shutdown => {
                self.guest.send |= header.flags & SHUTDOWN_SEND != 0;
                self.guest.receive |= header.flags & SHUTDOWN_RECEIVE != 0;
                Ok(if self.guest == Ended::BOTH {
                    Effect::Closed
                } else if self.guest == Ended::default() {
                    Effect::None
                } else {
                    Effect::HalfClosed
                })
            }
        }
    }

    fn receive_data(&mut self, len: u32, complete: bool) -> Result<Effect, Violation> {
        if self.guest.send {
            return Err(Violation::AfterShutdown);
        }
        if !complete {
            return Err(Violation::Length);
        }
        let buffered = (self.received - self.forwarded).0;
        if len > self.buf_alloc.saturating_sub(buffered) {
            return Err(Violation::Credit);
        }
        self.received += len;
        if self.host.receive {
            // Under way before the guest knew that nobody reads.
            self.forwarded(len);
            return Ok(Effect::None);
        }
        Ok(if len == 0 { Effect::None } else { Effect::Data })
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_requested = false;
            self.credit_request_due = false;
        }
    }

    /// Bytes that the guest has room for. None, if it claims to have taken more than it got.
    pub(super) fn credit(&self) -> usize {
        let under_way = (self.sent - self.guest_fwd_cnt).0;
        self.guest_buf_alloc.saturating_sub(under_way) as usize
    }

    /// `len` bytes from the guest have left our buffer.
    pub(super) fn forwarded(&mut self, len: u32) {
        self.forwarded += len;
        // A guest without credit waits for news. It has at least three quarters of the buffer
        // once everything is forwarded and this was not reached, so it cannot wait forever.
        if (self.forwarded - self.reported).0 >= self.buf_alloc / 4 && !self.guest.send {
            self.credit_update_due = true;
        }
    }

    /// The guest will send no more.
    pub(super) fn guest_ended_sending(&self) -> bool {
        self.guest.send
    }

    /// The guest will receive no more.
    pub(super) fn guest_ended_receiving(&self) -> bool {
        self.guest.receive
    }

    /// The host program will send no more.
    pub(super) fn end_host_sending(&mut self) {
        self.host.send = true;
    }

    /// The host program will receive no more.
    pub(super) fn end_host_receiving(&mut self) {
        self.host.receive = true;
    }

    /// Data of the host program may go to the guest, as far as credit reaches.
    pub(super) fn passes_data(&self) -> bool {
        self.phase == Phase::Open && !self.guest.receive && !self.host.send
    }

    /// The guest has to answer, to the request or to the end of both directions, before the
    /// connection can go on.
    pub(super) fn awaits_guest(&self) -> bool {
        self.phase == Phase::Requested || self.host == Ended::BOTH
    }

    /// Data waits, and the guest has no room for it: ask once.
    pub(super) fn want_credit(&mut self) {
        if !self.credit_requested {
            self.credit_requested = true;
            self.credit_request_due = true;
        }
    }

    /// A packet other than data is due.
    pub(super) fn control_due(&self) -> bool {
        match self.phase {
            Phase::Requested => self.request_due,
            Phase::Open => {
                self.response_due
                    || self.announced != self.host
                    || self.credit_request_due
                    || self.credit_update_due
            }
        }
    }

    /// The next packet other than data, without its addresses, if one is due.
    pub(super) fn next_control(&mut self) -> Option<Header> {
        if self.phase == Phase::Requested {
            return std::mem::take(&mut self.request_due).then(|| self.header(Op::Request, 0));
        }
        if std::mem::take(&mut self.response_due) {
            Some(self.header(Op::Response, 0))
        } else if self.announced != self.host {
            self.announced = self.host;
            Some(self.header(Op::Shutdown, self.host.flags()))
        } else if std::mem::take(&mut self.credit_request_due) {
            Some(self.header(Op::CreditRequest, 0))
        } else if self.credit_update_due {
            Some(self.header(Op::CreditUpdate, 0))
        } else {
            None
        }
    }

    /// The packet that carries `len` bytes to the guest, without its addresses.
    pub(super) fn next_data(&mut self, len: u32) -> Header {
        self.sent += len;
        Header {
            len,
            ..self.header(Op::Data, 0)
        }
    }

    /// Every packet tells our credit.
    fn header(&mut self, op: Op, flags: u32) -> Header {
        self.reported = self.forwarded;
        self.credit_update_due = false;
        Header {
            op: op as u16,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded.0,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BUFFER: u32 = 1000;

    fn packet(op: Op) -> Header {
        Header {
            op: op as u16,
            buf_alloc: 500,
            ..Header::default()
        }
    }

    fn data(len: u32) -> Header {
        Header {
            len,
            ..packet(Op::Data)
        }
    }

    fn shutdown(flags: u32) -> Header {
        Header {
            flags,
            ..packet(Op::Shutdown)
        }
    }

    fn open() -> Connection {
        let mut connection = Connection::accept(&packet(Op::Request), BUFFER);
        let response = connection.next_control().unwrap();
        assert_eq!(
            (response.op, response.buf_alloc),
            (Op::Response as u16, BUFFER)
        );
        connection
    }

    #[test]
    fn host_request_opens_on_response_only() {
        for op in [
            Op::Request,
            Op::Data,
            Op::Shutdown,
            Op::CreditUpdate,
            Op::CreditRequest,
        ] {
            let mut connection = Connection::request(BUFFER);
            assert!(connection.next_control().is_some());
            assert_eq!(connection.receive(&packet(op), true), Err(Violation::State));
        }
        let mut connection = Connection::request(BUFFER);
        assert_eq!(
            connection.receive(&packet(Op::Response), true),
            Err(Violation::State),
            "a response before the request is no answer"
        );
        assert_eq!(connection.next_control().unwrap().op, Op::Request as u16);
        assert!(connection.next_control().is_none());
        assert!(connection.awaits_guest() && !connection.passes_data());
        assert_eq!(
            connection.receive(&packet(Op::Response), true),
            Ok(Effect::Opened)
        );
        assert!(!connection.awaits_guest() && connection.passes_data());
        assert_eq!(connection.credit(), 500);
        assert_eq!(
            connection.receive(&packet(Op::Response), true),
            Err(Violation::State)
        );
    }

    #[test]
    fn guest_data_is_bounded_by_the_buffer() {
        let mut connection = open();
        assert_eq!(connection.receive(&data(BUFFER), true), Ok(Effect::Data));
        assert_eq!(connection.receive(&data(1), true), Err(Violation::Credit));
        assert!(!connection.control_due());
        connection.forwarded(BUFFER / 4 - 1);
        assert!(!connection.control_due());
        connection.forwarded(1);
        let update = connection.next_control().unwrap();
        assert_eq!(
            (update.op, update.fwd_cnt),
            (Op::CreditUpdate as u16, BUFFER / 4)
        );
        assert!(!connection.control_due());
        assert_eq!(
            connection.receive(&data(BUFFER / 4), true),
            Ok(Effect::Data)
        );
        assert_eq!(connection.receive(&data(1), true), Err(Violation::Credit));
    }

    #[test]
    fn any_packet_carries_the_credit_update() {
        let mut connection = open();
        assert_eq!(connection.receive(&data(BUFFER), true), Ok(Effect::Data));
        connection.forwarded(BUFFER);
        assert!(connection.control_due());
        assert_eq!(connection.next_data(3).fwd_cnt, BUFFER);
        assert!(!connection.control_due());
    }

    #[test]
    fn credit_is_asked_for_once_until_it_comes() {
        let mut connection = open();
        connection.next_data(500);
        assert_eq!(connection.credit(), 0);
        connection.want_credit();
        connection.want_credit();
        assert_eq!(
            connection.next_control().unwrap().op,
            Op::CreditRequest as u16
        );
        connection.want_credit();
        assert!(connection.next_control().is_none());
        let nothing_yet = packet(Op::CreditUpdate);
        assert_eq!(connection.receive(&nothing_yet, true), Ok(Effect::None));
        connection.want_credit();
        assert!(connection.next_control().is_none());
        let update = Header {
            fwd_cnt: 200,
            ..packet(Op::CreditUpdate)
        };
        assert_eq!(connection.receive(&update, true), Ok(Effect::None));
        assert_eq!(connection.credit(), 200);
        connection.want_credit();
        assert_eq!(
            connection.next_control().unwrap().op,
            Op::CreditRequest as u16
        );
    }

    #[test]
    fn credit_survives_the_wrap_of_the_counters() {
        let mut connection = open();
        connection.sent = Wrapping(u32::MAX - 100);
        connection.guest_fwd_cnt = connection.sent;
        connection.next_data(300);
        assert_eq!(connection.credit(), 200);
        connection.received = Wrapping(u32::MAX - 10);
        connection.forwarded = connection.received;
        connection.reported = connection.received;
        assert_eq!(connection.receive(&data(BUFFER), true), Ok(Effect::Data));
        assert_eq!(connection.receive(&data(1), true), Err(Violation::Credit));
        connection.forwarded(BUFFER);
        assert_eq!(connection.next_control().unwrap().fwd_cnt, BUFFER - 11);
    }

    #[test]
    fn a_guest_that_claims_too_much_gets_nothing() {
        let mut connection = open();
        let update = Header {
            fwd_cnt: 1,
            ..packet(Op::CreditUpdate)
        };
        assert_eq!(connection.receive(&update, true), Ok(Effect::None));
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn directions_end_one_by_one() {
        let mut connection = open();
        assert_eq!(connection.receive(&shutdown(0), true), Ok(Effect::None));
        assert_eq!(
            connection.receive(&shutdown(SHUTDOWN_SEND), true),
            Ok(Effect::HalfClosed)
        );
        assert!(connection.guest_ended_sending() && !connection.guest_ended_receiving());
        assert!(connection.passes_data());
        assert_eq!(
            connection.receive(&data(1), true),
            Err(Violation::AfterShutdown)
        );
        assert_eq!(
            connection.receive(&shutdown(SHUTDOWN_RECEIVE), true),
            Ok(Effect::Closed),
            "the flags add up"
        );
        assert!(!connection.passes_data());
    }

    #[test]
    fn the_end_of_the_host_is_announced_once() {
        let mut connection = open();
        connection.end_host_sending();
        assert!(!connection.passes_data() && !connection.awaits_guest());
        let packet = connection.next_control().unwrap();
        assert_eq!(
            (packet.op, packet.flags),
            (Op::Shutdown as u16, SHUTDOWN_SEND)
        );
        assert!(connection.next_control().is_none());
        connection.end_host_receiving();
        assert!(connection.awaits_guest());
        assert_eq!(
            connection.next_control().unwrap().flags,
            SHUTDOWN_SEND | SHUTDOWN_RECEIVE
        );
        assert_eq!(
            connection.receive(&data(BUFFER), true),
            Ok(Effect::None),
            "data under way is dropped"
        );
        assert_eq!(connection.next_control().unwrap().fwd_cnt, BUFFER);
    }

    proptest! {
        /// Whatever the guest sends, it never gets more into the buffer than the buffer holds,
        /// and never more data than it gave room for.
        #[test]
        fn no_packet_overdraws(
            packets in prop::collection::vec(
                (0u16..10, 0u32..1500, 0u32..5, 0u32..2000, any::<u32>(), any::<bool>()), 1..100),
            host_asked in any::<bool>(),
        ) {
            let mut connection = if host_asked {
                Connection::request(BUFFER)
            } else {
                Connection::accept(&packet(Op::Request), BUFFER)
            };
            let mut buffered = 0;
            for (op, len, flags, buf_alloc, fwd_cnt, complete) in packets {
                let header = Header { op, len, flags, buf_alloc, fwd_cnt, ..Header::default() };
                match connection.receive(&header, complete) {
                    Ok(Effect::Data) => buffered += len,
                    Ok(Effect::Reset | Effect::Closed) | Err(_) => break,
                    Ok(_) => {}
                }
                prop_assert!(buffered <= BUFFER);
                prop_assert!(connection.credit() <= buf_alloc as usize);
                while let Some(control) = connection.next_control() {
                    prop_assert!(Op::from_number(control.op).is_some());
                }
                prop_assert!(!connection.control_due());
                let part = buffered / 2;
                connection.forwarded(part);
                buffered -= part;
            }
        }
    }
}
