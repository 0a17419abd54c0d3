//! A debugger for the guest: the remote protocol of GDB, served on a UNIX socket.
//!
//! ```text
//!  gdb ──socket──► thread `gdb` ──holds, asks, releases──► vCPUs (their gates and threads)
//!                      ▲                                     │
//!                      └─────── stops: KVM_EXIT_DEBUG ───────┘
//!
//!            a debugger connects               it lets the guest go on
//!   no debugger ───────────────────► stopped ◄──────────────────────────► running
//!        ▲                              │     breakpoint, step, Ctrl-C       │
//!        └──── it leaves: the guest runs on without ────────────────────────┘
//! ```
//!
//! The guest is born stopped. All vCPUs stop together and go on together, but for single steps.
//! A vCPU that is held takes part in everything else: it can be paused, described and ended.
//!
//! - [`guest`]: what can be done to the guest; [`breakpoints`], [`registers`] and [`paging`]: its
//!   parts.
//! - [`target`]: the same in the words of `gdbstub`, which speaks the protocol.

mod breakpoints;
mod guest;
mod paging;
mod registers;
mod target;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use gdbstub::conn;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::api::Listener;
use crate::exit::{ExitReason, ExitSignal};
use crate::kvm::vcpu::{StoppedError, Vcpu, VcpuGate};
use crate::machine::STACK_SIZE;
use crate::memory::GuestMemory;
use guest::{Guest, Stop};
use target::{DebuggedGuest, StopReason};

/// How long a debugger may leave what it is told unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the guest did not do what a debugger wants.
#[derive(Debug, thiserror::Error)]
enum DebugError {
    #[error("the machine has ended")]
    Ended(#[from] StoppedError),
    #[error("there is no such vCPU")]
    NoVcpu,
    #[error("KVM refuses")]
    Kvm(#[from] kvm_ioctls::Error),
    #[error("the guest has mapped nothing at {address:#x}")]
    NotMapped { address: u64 },
    #[error("the vCPU uses page tables of 32 bits, which are not understood")]
    Paging32,
    #[error("this is no memory of the guest's")]
    Memory(#[from] vm_memory::GuestMemoryError),
    #[error("segment registers cannot be changed")]
    Segments,
}

/// A debugger for a machine whose vCPUs do not run yet.
pub(crate) struct PreparedDebugger {
    listener: Arc<Listener>,
    vcpus: Vec<Arc<VcpuGate>>,
    stops: Receiver<Stop>,
    wake: Arc<OwnedFd>,
}

impl PreparedDebugger {
    /// Holds the vCPUs, and has them tell when they stop.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub(crate) fn new(listener: Arc<Listener>, vcpus: &mut [Vcpu]) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (sender, stops) = mpsc::channel();
        for (index, vcpu) in vcpus.iter_mut().enumerate() {
            vcpu.gate().hold();
            let (sender, wake) = (sender.clone(), wake.clone());
            vcpu.on_debug_exit(Box::new(move |exit| {
                // Without a debugger the machine is ending.
                let _ = sender.send(Stop { vcpu: index, exit });
                wake_up(&wake);
            }));
        }
        Ok(Self {
            listener,
            vcpus: vcpus.iter().map(|vcpu| vcpu.gate().clone()).collect(),
            stops,
            wake,
        })
    }

    /// Waits for debuggers, on a thread of its own. `exit` ends the machine if one says so.
    ///
    /// # Errors
    /// The host gives no thread.
    pub(crate) fn start(self, memory: GuestMemory, exit: ExitSignal) -> io::Result<Debugger> {
        let ended = Arc::new(AtomicBool::new(false));
        let server = Server {
            listener: self.listener,
            events: Events {
                wake: self.wake.clone(),
                ended: ended.clone(),
            },
            exit,
        };
        let guest = DebuggedGuest::new(Guest::new(self.vcpus, memory, self.stops));
        let thread = thread::Builder::new()
            .name("gdb".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || server.run(guest))?;
        Ok(Debugger {
            ended,
            wake: self.wake,
            thread: Some(thread),
        })
    }
}

/// The debugger of a machine. Dropping it tells a debugger that is connected that the guest is
/// gone, and waits for nobody else.
pub(crate) struct Debugger {
    ended: Arc<AtomicBool>,
    wake: Arc<OwnedFd>,
    /// `None` only while it is dropped.
    thread: Option<JoinHandle<()>>,
}

impl Drop for Debugger {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        wake_up(&self.wake);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

fn wake_up(wake: &OwnedFd) {
    // Fails only if the counter is full, and then the thread is awake anyway.
    let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
}

/// What wakes the thread besides its sockets.
struct Events {
    wake: Arc<OwnedFd>,
    ended: Arc<AtomicBool>,
}

/// Why the thread woke up.
enum Woken {
    /// The machine has ended.
    Ended,
    /// The socket is readable.
    Readable,
    /// A vCPU may have stopped.
    Stop,
}

impl Events {
    fn wait(&self, socket: BorrowedFd<'_>) -> io::Result<Woken> {
        loop {
            if self.ended.load(Ordering::SeqCst) {
                return Ok(Woken::Ended);
            }
            let mut polled = [
                PollFd::new(&self.wake, PollFlags::IN),
                PollFd::from_borrowed_fd(socket, PollFlags::IN),
            ];
            match poll(&mut polled, None) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            let [wake, socket] = polled.map(|fd| !fd.revents().is_empty());
            if wake {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                if !self.ended.load(Ordering::SeqCst) {
                    return Ok(Woken::Stop);
                }
            } else if socket {
                return Ok(Woken::Readable);
            }
        }
    }
}

struct Server {
    listener: Arc<Listener>,
    events: Events,
    exit: ExitSignal,
}

impl Server {
    /// Serves one debugger after the other until the machine ends.
    fn run(self, mut guest: DebuggedGuest) {
        loop {
            match self.events.wait(self.listener.socket().as_fd()) {
                Ok(Woken::Readable) => {}
                // A stop that nobody waits for was for a debugger that has left.
                Ok(Woken::Stop) => continue,
                Ok(Woken::Ended) => return,
                Err(error) => {
                    tracing::error!(%error, "debuggers are no longer served");
                    return;
                }
            }
            // Whoever it was may have gone again.
            let Ok((stream, _)) = self.listener.socket().accept() else {
                continue;
            };
            tracing::info!("a debugger has connected");
            match self.serve(stream, &mut guest) {
                Ok(DisconnectReason::Kill) => {
                    self.exit.end(ExitReason::Requested);
                    return;
                }
                Ok(reason) => tracing::info!(?reason, "the debugger has left"),
                Err(error) => tracing::info!(error, "the debugger is gone"),
            }
            if let Err(error) = guest.guest.let_go() {
                // The machine has ended.
                tracing::debug!(error = crate::error_chain(&error), "let go");
                return;
            }
        }
    }

    /// Serves one debugger until it leaves.
    fn serve(
        &self,
        stream: UnixStream,
        guest: &mut DebuggedGuest,
    ) -> Result<DisconnectReason, String> {
        let failed = |error: GdbStubError<DebugError, io::Error>| error.to_string();
        let client = Client::new(stream).map_err(|error| error.to_string())?;
        guest.interrupt().map_err(|error| error.to_string())?;
        let mut stub = GdbStub::new(client)
            .run_state_machine(guest)
            .map_err(failed)?;
        loop {
            stub = match stub {
                GdbStubStateMachine::Idle(mut stub) => {
                    match stub.borrow_conn().next(&self.events) {
                        Ok(Next::Byte(byte)) => stub.incoming_data(guest, byte).map_err(failed)?,
                        // Nothing runs, so nothing stops.
                        Ok(Next::Stop) => stub.into(),
                        Ok(Next::Ended) => return Ok(DisconnectReason::TargetExited(0)),
                        Err(error) => return Err(error.to_string()),
                    }
                }
                GdbStubStateMachine::Running(mut stub) => {
                    match stub.borrow_conn().next(&self.events) {
                        Ok(Next::Byte(byte)) => stub.incoming_data(guest, byte).map_err(failed)?,
                        Ok(Next::Stop) => {
                            match guest.next_stop().map_err(|error| error.to_string())? {
                                Some(reason) => stub.report_stop(guest, reason).map_err(failed)?,
                                None => stub.into(),
                            }
                        }
                        Ok(Next::Ended) => stub
                            .report_stop(guest, StopReason::Exited(0))
                            .map_err(failed)?,
                        Err(error) => return Err(error.to_string()),
                    }
                }
                GdbStubStateMachine::CtrlCInterrupt(stub) => {
                    let reason = guest.interrupt().map_err(|error| error.to_string())?;
                    stub.interrupt_handled(guest, Some(reason))
                        .map_err(failed)?
                }
                GdbStubStateMachine::Disconnected(stub) => return Ok(stub.get_reason()),
            };
        }
    }
}

/// What comes next in a session.
enum Next {
    Byte(u8),
    Stop,
    Ended,
}

/// A debugger's connection. What is written is sent when a packet is complete.
struct Client {
    stream: UnixStream,
    received: Vec<u8>,
    /// How much of `received` was handed on.
    taken: usize,
    unsent: Vec<u8>,
}

impl Client {
    fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Self {
            stream,
            received: Vec::new(),
            taken: 0,
            unsent: Vec::new(),
        })
    }

    fn next(&mut self, events: &Events) -> io::Result<Next> {
        if let Some(byte) = self.received.get(self.taken) {
            self.taken += 1;
            return Ok(Next::Byte(*byte));
        }
        match events.wait(self.stream.as_fd())? {
            Woken::Ended => return Ok(Next::Ended),
            Woken::Stop => return Ok(Next::Stop),
            Woken::Readable => {}
        }
        self.received.resize(4096, 0);
        self.taken = 0;
        let length = self.stream.read(&mut self.received)?;
        self.received.truncate(length);
        match self.received.first() {
            Some(byte) => {
                self.taken = 1;
                Ok(Next::Byte(*byte))
            }
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl conn::Connection for Client {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.unsent.push(byte);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = Write::write_all(&mut self.stream, &self.unsent);
        self.unsent.clear();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ApiTarget;
    use crate::memory;

    #[test]
    fn clients_may_say_anything_and_the_end_waits_for_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gdb.sock");
        let listener = Listener::open(&ApiTarget::Path(path.clone())).unwrap();
        let prepared = PreparedDebugger::new(Arc::new(listener), &mut []).unwrap();
        let memory = memory::allocate(64 << 20, false).unwrap();
        let exit = ExitSignal::new().unwrap();
        let debugger = prepared.start(memory, exit.clone()).unwrap();

        let mut junk: Vec<u8> = (0..=255).cycle().take(64 * 1024).collect();
        junk.extend(b"$m0,ffffffffffffffff#00$vCont;s:zzz#00$Z0,0,1#00$P0=1#00\x03\x03");
        for _ in 0..3 {
            let mut client = UnixStream::connect(&path).unwrap();
            // The server may have hung up by the end of it.
            let _ = client.write_all(&junk);
        }
        // One after the other: that this one is answered means that the others are gone.
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"$QStartNoAckMode#b0").unwrap();
        let mut answer = [0; 7];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+$OK#9a");
        drop(debugger);
        client.read_to_end(&mut Vec::new()).unwrap();
        assert_eq!(exit.reason(), None);
    }
}
