//! The serial port COM1: a 16550A whose output goes to a bounded sink and whose input comes
//! from the terminal, if there is one.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::bounded_log::BoundedLog;
use crate::devices::bus::BusDevice;
use crate::exit::{ExitReason, ExitSignal};
use crate::memory::GuestMemory;

/// Size at which the log of a serial port starts over, in bytes.
pub const LOG_LIMIT: u64 = 4 << 20;

/// Ctrl-A, which introduces a command to the VMM instead of to the guest.
const ESCAPE: u8 = 0x01;

/// Where the guest's output goes.
pub enum Output {
    /// Nowhere.
    Null,
    /// The standard output of the VMM.
    Stdout,
    /// A file that never grows past [`LOG_LIMIT`].
    Log(BoundedLog),
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match self {
            Self::Null => Ok(data.len()),
            Self::Stdout => io::stdout().write(data),
            Self::Log(log) => log.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().flush(),
            Self::Null | Self::Log(_) => Ok(()),
        }
    }
}

/// The interrupt line of the port.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the input side that the guest has read everything it was given.
struct Drained(Arc<EventFd>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // Fails only if the counter is full, and then the input side is awake anyway.
        let _ = self.0.write(1);
    }
}

/// The registers of the port in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialRegisters {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

impl SerialRegisters {
    fn of(state: SerialState) -> Self {
        Self {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    fn state(&self) -> SerialState {
        SerialState {
            baud_divisor_low: self.baud_divisor_low,
            baud_divisor_high: self.baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.in_buffer.clone(),
        }
    }
}

/// The registers of the port. Clones are the same port.
#[derive(Clone)]
pub struct SerialPort {
    uart: Arc<Mutex<Serial<Line, Drained, Output>>>,
    drained: Arc<EventFd>,
}

impl SerialPort {
    /// A port that raises its interrupt by `irqfd`, in the state that another one had, if there is
    /// one. It then raises the interrupts that were pending once more.
    ///
    /// # Errors
    /// The host has no eventfd left, or no port can be in that state.
    pub fn new(
        irqfd: EventFd,
        output: Output,
        saved: Option<&SerialRegisters>,
    ) -> io::Result<Self> {
        let drained = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let events = Drained(drained.clone());
        let uart = match saved {
            None => Serial::with_events(Line(irqfd), events, output),
            Some(saved) => Serial::from_state(&saved.state(), Line(irqfd), events, output)
                .map_err(|error| io::Error::other(format!("serial port: {error}")))?,
        };
        Ok(Self {
            uart: Arc::new(Mutex::new(uart)),
            drained,
        })
    }

    /// The registers as they are.
    pub fn save(&self) -> SerialRegisters {
        SerialRegisters::of(self.with_uart(|uart| uart.state()))
    }

    fn with_uart<T>(&self, use_it: impl FnOnce(&mut Serial<Line, Drained, Output>) -> T) -> T {
        use_it(&mut self.uart.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [value] = data {
            *value = self.with_uart(|uart| uart.read(offset as u8));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [value] = data {
            // A byte that the sink cannot take is lost, as on a line that nobody listens to:
            // the guest cannot do anything about it.
            let _ = self.with_uart(|uart| uart.write(offset as u8, *value));
        }
    }

    fn describe(&self, _memory: &GuestMemory) -> Vec<String> {
        let state = self.with_uart(|uart| uart.state());
        vec![format!(
            "serial port interrupt_enable={:#x} interrupt_identification={:#x} line_control={:#x} \
             line_status={:#x} modem_control={:#x} modem_status={:#x} unread_input={}",
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.in_buffer.len(),
        )]
    }
}

/// Feeds the terminal's input to the port. Ctrl-A x ends the machine, Ctrl-A Ctrl-A is Ctrl-A.
pub struct SerialInput<R> {
    port: SerialPort,
    input: R,
    exit: ExitSignal,
    /// Bytes read but not yet taken by the port.
    pending: Vec<u8>,
    escaped: bool,
}

impl<R: Read + AsFd> SerialInput<R> {
    /// Connects `input` to `port`.
    pub fn new(port: SerialPort, input: R, exit: ExitSignal) -> Self {
        Self {
            port,
            input,
            exit,
            pending: Vec::new(),
            escaped: false,
        }
    }

    fn receive(&mut self, ops: &mut EventOps) {
        let mut buffer = [0; 256];
        match self.input.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // End of input: the machine runs on without.
            Ok(0) | Err(_) => {
                let _ = ops.remove(Events::empty_raw(self.input.as_fd().as_raw_fd()));
            }
            Ok(length) => {
                for byte in &buffer[..length] {
                    self.interpret(*byte);
                }
                self.forward(ops);
            }
        }
    }

    fn interpret(&mut self, byte: u8) {
        match (self.escaped, byte) {
            (false, ESCAPE) => self.escaped = true,
            (true, b'x') => self.exit.end(ExitReason::Requested),
            (_, byte) => {
                self.escaped = false;
                self.pending.push(byte);
            }
        }
    }

    /// Hands on what fits into the port, and reads on only when all of it did.
    fn forward(&mut self, ops: &mut EventOps) {
        let taken = self
            .port
            .with_uart(|uart| uart.enqueue_raw_bytes(&self.pending))
            .unwrap_or_default();
        self.pending.drain(..taken);
        let interest = if self.pending.is_empty() {
            EventSet::IN
        } else {
            EventSet::empty()
        };
        // Fails only once the input has ended and is watched no more.
        let _ = ops.modify(Events::new_raw(self.input.as_fd().as_raw_fd(), interest));
    }
}

impl<R: Read + AsFd> MutEventSubscriber for SerialInput<R> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.port.drained.as_raw_fd() {
            let _ = self.port.drained.read();
            self.forward(ops);
        } else {
            self.receive(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let input = Events::new_raw(self.input.as_fd().as_raw_fd(), EventSet::IN);
        let drained = Events::new(self.port.drained.as_ref(), EventSet::IN);
        // epoll refuses regular files: there is no input to wait for then.
        if ops.add(input).is_ok() {
            let _ = ops.add(drained);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use event_manager::{EventManager, SubscriberOps};

    use super::*;

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;

    fn port(output: Output) -> SerialPort {
        SerialPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), output, None).unwrap()
    }

    fn read(port: &mut SerialPort, offset: u64) -> u8 {
        let mut data = [0xff];
        port.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_log_never_outgrows_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut port = port(Output::Log(BoundedLog::create(&path, 100).unwrap()));
        for byte in 0..=254 {
            port.write(DATA, &[byte]);
        }
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content, (200..=254).collect::<Vec<_>>());
    }

    #[test]
    fn typed_input_reaches_the_guest_however_slowly_it_reads() {
        let mut port = port(Output::Null);
        let (input, mut terminal) = UnixStream::pair().unwrap();
        input.set_nonblocking(true).unwrap();
        let exit = ExitSignal::new().unwrap();
        let mut events = EventManager::<SerialInput<UnixStream>>::new().unwrap();
        events.add_subscriber(SerialInput::new(port.clone(), input, exit.clone()));

        // More than the FIFO of the UART holds.
        let typed: Vec<u8> = (b' '..=b'~').cycle().take(200).collect();
        terminal.write_all(&typed).unwrap();
        let mut received = Vec::new();
        while received.len() < typed.len() {
            events.run().unwrap();
            while read(&mut port, LINE_STATUS) & 1 != 0 {
                received.push(read(&mut port, DATA));
            }
        }
        assert_eq!(received, typed);

        terminal.write_all(&[ESCAPE, ESCAPE, ESCAPE, b'x']).unwrap();
        while exit.reason().is_none() {
            events.run().unwrap();
        }
        assert_eq!(exit.reason(), Some(&ExitReason::Requested));
    }
}
