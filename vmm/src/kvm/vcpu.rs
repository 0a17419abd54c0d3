//! A vCPU and the thread that runs it.
//!
//! ```text
//!              resume                     the machine ends,
//!   (new) ──► Paused ──────────► Running ──or KVM fails──────► thread ends
//!               ▲                   │                              ▲
//!               └───────────────────┘                              │
//!               │      pause (kick)                                │
//!               └──────────────── handle dropped ──────────────────┘
//! ```
//!
//! Threads are born paused. Only the owner of the [`VcpuHandle`] moves a vCPU between Paused and
//! Running; a thread leaves Running by itself when the guest ends the machine.
//!
//! A vCPU that the guest does not have at the moment is parked by its [`VcpuGate`]: its thread
//! counts as running, but does not enter the guest. KVM cannot destroy a vCPU, so all that a
//! machine may ever have are made with it. The same gate holds vCPUs that a debugger has stopped.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{self, Receiver, RecvError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::{CpuId, Msrs, kvm_debug_exit_arch, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vm_memory::GuestAddress;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::state::{StateError, VcpuState, XsaveSize};
use crate::arch::x86_64::{msrs, regs};
use crate::devices::bus::Bus;
use crate::exit::{ExitReason, ExitSignal};
use crate::machine::STACK_SIZE;
use crate::sandboxing::ThreadKind;
use crate::sandboxing::seccomp;

/// Why a vCPU could not be made or set up.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("{ioctl} failed")]
    Ioctl {
        /// Name of the ioctl.
        ioctl: &'static str,
        /// What the kernel says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM does not know a register that every machine needs.
    #[error("KVM refuses to set the model-specific register {index:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
    },
    /// More registers or CPUID entries than KVM takes.
    #[error("too many entries for one call of KVM")]
    TooManyEntries,
    /// No thread.
    #[error("cannot start a thread for vCPU {index}")]
    Thread {
        /// Number of the vCPU.
        index: u8,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The signal that interrupts a running vCPU cannot be caught.
    #[error("cannot install the handler of the signal that interrupts vCPUs")]
    SignalHandler(#[source] vmm_sys_util::errno::Error),
}

/// A vCPU that no thread runs yet.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    gate: Arc<VcpuGate>,
    on_first_entry: Option<Box<dyn FnOnce() + Send>>,
    on_debug_exit: Option<DebugExitHandler>,
}

/// Told what KVM says about an exit for the debugger. The vCPU is held by then.
pub type DebugExitHandler = Box<dyn Fn(kvm_debug_exit_arch) + Send>;

impl Vcpu {
    /// Creates the vCPU and gives it its CPUID.
    pub(super) fn new(vm: &VmFd, index: u8, cpuid: &CpuId) -> Result<Self, VcpuError> {
        let fd = vm
            .create_vcpu(u64::from(index))
            .map_err(|source| VcpuError::Ioctl {
                ioctl: "KVM_CREATE_VCPU",
                source,
            })?;
        // Before any register that depends on CPUID: from Linux 6.13 on, KVM reports such MSRs
        // as zero and refuses to set them while the feature is not there.
        fd.set_cpuid2(cpuid).map_err(|source| VcpuError::Ioctl {
            ioctl: "KVM_SET_CPUID2",
            source,
        })?;
        Ok(Self {
            index,
            fd,
            gate: Arc::default(),
            on_first_entry: None,
            on_debug_exit: None,
        })
    }

    /// Sets the registers with which the machine boots. vCPU 0 starts at `entry`; the others
    /// wait for the kernel's INIT and SIPI as KVM creates them.
    ///
    /// # Errors
    /// KVM refuses a register.
    pub fn set_boot_state(&self, entry: GuestAddress) -> Result<(), VcpuError> {
        let ioctl = |ioctl| move |source| VcpuError::Ioctl { ioctl, source };
        let entries = msrs::boot_msrs();
        let msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooManyEntries)?;
        let accepted = self.fd.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
        if let Some(refused) = entries.get(accepted) {
            return Err(VcpuError::Msr {
                index: refused.index,
            });
        }
        self.fd
            .set_fpu(&regs::reset_fpu())
            .map_err(ioctl("KVM_SET_FPU"))?;
        if self.index == 0 {
            let reset = self.fd.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
            self.fd
                .set_sregs(&regs::boot_sregs(&reset))
                .map_err(ioctl("KVM_SET_SREGS"))?;
            self.fd
                .set_regs(&regs::boot_regs(entry))
                .map_err(ioctl("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    /// Gives the vCPU the state that another one had.
    ///
    /// # Errors
    /// This host cannot give it that state.
    pub fn restore(&self, state: &VcpuState, xsave: XsaveSize) -> Result<(), StateError> {
        state.restore(&self.fd, xsave)
    }

    /// Lets the vCPU into the guest and keeps it out.
    pub fn gate(&self) -> &Arc<VcpuGate> {
        &self.gate
    }

    /// Has `tell` called right before the vCPU enters the guest for the first time, unless its gate
    /// keeps it waiting then.
    pub fn on_first_entry(&mut self, tell: Box<dyn FnOnce() + Send>) {
        self.on_first_entry = Some(tell);
    }

    /// Has `tell` called whenever the guest stops for a debugger. Without, it never does.
    pub fn on_debug_exit(&mut self, tell: DebugExitHandler) {
        self.on_debug_exit = Some(tell);
    }

    /// Starts a thread for the vCPU, paused.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn spawn(self, buses: Arc<Buses>, exit: ExitSignal) -> Result<VcpuHandle, VcpuError> {
        register_signal_handler(kick_signal(), on_kick).map_err(VcpuError::SignalHandler)?;
        let index = self.index;
        let (commands, received) = mpsc::channel();
        let (acknowledge, acknowledged) = mpsc::channel();
        let runner = Runner {
            fd: self.fd,
            gate: self.gate.clone(),
            on_first_entry: self.on_first_entry,
            on_debug_exit: self.on_debug_exit,
            buses,
            exit,
            commands: received,
            acknowledge,
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK_SIZE)
            .spawn(move || runner.run())
            .map_err(|source| VcpuError::Thread { index, source })?;
        let link = Arc::new(Link {
            commands,
            thread: Mutex::new(Some(thread)),
        });
        // A vCPU is spawned once: it is consumed.
        let _ = self.gate.link.set(link.clone());
        Ok(VcpuHandle { link, acknowledged })
    }
}

/// The two address spaces that exits to user space come from.
#[derive(Default)]
pub struct Buses {
    /// I/O ports.
    pub pio: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
}

enum Command {
    Resume,
    Pause,
    /// Something to do with the vCPU between two instructions. Not acknowledged: it answers itself.
    Do(Box<dyn FnOnce(&VcpuFd) + Send>),
    /// The gate has moved. Not acknowledged.
    Look,
    End,
}

/// The way to a vCPU's thread.
struct Link {
    commands: Sender<Command>,
    /// `None` once somebody waits for its end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Link {
    /// Sends a command and takes the thread out of the guest, so that it looks at it.
    fn send(&self, command: Command) -> Result<(), StoppedError> {
        self.commands.send(command).map_err(|_| StoppedError)?;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.as_ref().filter(|thread| !thread.is_finished()) {
            // Fails only if the thread ends just now.
            let _ = thread.kill(kick_signal());
        }
        Ok(())
    }

    /// See [`VcpuHandle::with_fd`].
    fn with_fd<T: Send + 'static>(
        &self,
        task: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, StoppedError> {
        let (send, result) = mpsc::sync_channel(1);
        self.send(Command::Do(Box::new(move |fd| {
            // The receiver waits in this very function.
            let _ = send.send(task(fd));
        })))?;
        result.recv().map_err(|_| StoppedError)
    }
}

/// Keeps a vCPU out of the guest, or lets it in. Open at first.
///
/// Independent of pausing: a vCPU runs if it is neither paused nor parked nor held.
#[derive(Default)]
pub struct VcpuGate {
    /// The reasons for which it is closed: [`PARKED`], [`HELD`].
    closed: AtomicU8,
    link: OnceLock<Arc<Link>>,
}

/// The guest does not have the vCPU.
const PARKED: u8 = 1 << 0;
/// A debugger has stopped it.
const HELD: u8 = 1 << 1;

impl VcpuGate {
    /// Keeps the vCPU out of the guest from its next exit on, which this brings about but does
    /// not wait for: so it may be called by a vCPU's own thread.
    pub fn park(&self) {
        self.close(PARKED);
    }

    /// Lets the vCPU into the guest, where it goes on as it was, or starts if the guest sends it
    /// the interrupts for that.
    pub fn unpark(&self) {
        self.open(PARKED);
    }

    /// Keeps the vCPU out of the guest for a debugger, like [`park`](Self::park).
    pub fn hold(&self) {
        self.close(HELD);
    }

    /// Lets it go on.
    pub fn release(&self) {
        self.open(HELD);
    }

    /// As [`VcpuHandle::with_fd`], for those who do not own the vCPU. Of a vCPU that is held,
    /// KVM has nothing under way then.
    ///
    /// # Errors
    /// The thread has ended, or not begun.
    pub fn with_fd<T: Send + 'static>(
        &self,
        task: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, StoppedError> {
        self.link.get().ok_or(StoppedError)?.with_fd(task)
    }

    fn close(&self, reason: u8) {
        self.closed.fetch_or(reason, Ordering::SeqCst);
        self.tell();
    }

    fn open(&self, reason: u8) {
        self.closed.fetch_and(!reason, Ordering::SeqCst);
        self.tell();
    }

    fn tell(&self) {
        if let Some(link) = self.link.get() {
            // A thread that has ended needs to know no more.
            let _ = link.send(Command::Look);
        }
    }

    fn reasons(&self) -> u8 {
        self.closed.load(Ordering::SeqCst)
    }
}

/// The owner's hold on a vCPU thread. Dropping it ends the thread.
pub struct VcpuHandle {
    link: Arc<Link>,
    acknowledged: Receiver<()>,
}

/// The vCPU thread has ended: the machine is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the vCPU has stopped for good")]
pub struct StoppedError;

impl VcpuHandle {
    /// Lets the vCPU run.
    ///
    /// # Errors
    /// Its thread has ended.
    pub fn resume(&self) -> Result<(), StoppedError> {
        self.command(Command::Resume)
    }

    /// Stops the vCPU between two instructions, and returns when it has stopped.
    ///
    /// Not to be called from the event loop: the vCPU may be waiting for it (activation or
    /// reset of a device).
    ///
    /// # Errors
    /// Its thread has ended.
    pub fn pause(&self) -> Result<(), StoppedError> {
        self.command(Command::Pause)
    }

    /// Runs `task` with the vCPU on its own thread, between two instructions, and returns what it
    /// returns. The vCPU stays running or paused as it is.
    ///
    /// Not to be called from the event loop, for the same reason as [`pause`](Self::pause).
    ///
    /// # Errors
    /// The thread has ended.
    pub fn with_fd<T: Send + 'static>(
        &self,
        task: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<T, StoppedError> {
        self.link.with_fd(task)
    }

    fn command(&self, command: Command) -> Result<(), StoppedError> {
        self.link.send(command)?;
        self.acknowledged.recv().map_err(|_| StoppedError)
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        // Fails if the thread has ended already.
        let _ = self.link.send(Command::End);
        let thread = self
            .link
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread {
            // A panic of the thread has been reported by the panic hook already.
            let _ = thread.join();
        }
    }
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

thread_local! {
    /// The run structure of the vCPU that this thread runs, for the signal handler.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Makes a KVM_RUN that is about to start return at once. One that is under way is interrupted
/// by the signal itself.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while this very thread owns the vCPU whose mapping it
        // leads to. The field is read by the kernel and by nobody else; the write is volatile
        // because the interrupted code does not know of it.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

struct Runner {
    fd: VcpuFd,
    gate: Arc<VcpuGate>,
    on_first_entry: Option<Box<dyn FnOnce() + Send>>,
    on_debug_exit: Option<DebugExitHandler>,
    buses: Arc<Buses>,
    exit: ExitSignal,
    commands: Receiver<Command>,
    acknowledge: Sender<()>,
}

/// How a state of the runner was left.
enum Next {
    Running,
    Paused,
    End,
}

impl Runner {
    fn run(mut self) {
        if let Err(error) = seccomp::apply(ThreadKind::Vcpu) {
            self.exit.end(ExitReason::Error(crate::error_chain(&error)));
            return;
        }
        RUN.set(ptr::from_mut(self.fd.get_kvm_run()));
        let mut next = Next::Paused;
        loop {
            next = match next {
                Next::Paused => self.paused(),
                Next::Running => self.running(),
                Next::End => break,
            };
        }
        RUN.set(ptr::null_mut());
    }

    /// State Paused: waits for commands.
    fn paused(&mut self) -> Next {
        loop {
            let command = self.commands.recv();
            match self.obey(command) {
                None | Some(Next::Paused) => {}
                Some(next) => return next,
            }
        }
    }

    /// State Running.
    fn running(&mut self) -> Next {
        if let Some(tell) = self.on_first_entry.take() {
            tell();
        }
        loop {
            // Every command is looked at before the guest is entered: a kick that came between
            // two commands is not repeated.
            loop {
                let command = match self.gate.reasons() {
                    0 => match self.commands.try_recv() {
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => Err(RecvError),
                        Ok(command) => Ok(command),
                    },
                    reasons => {
                        if reasons & HELD != 0
                            && let Err(reason) = self.complete_access()
                        {
                            self.exit.end(reason);
                            return Next::End;
                        }
                        self.commands.recv()
                    }
                };
                // A paused vCPU is looked at, and may be saved: its registers have to be those
                // between two instructions.
                if matches!(command, Ok(Command::Pause))
                    && let Err(reason) = self.complete_access()
                {
                    self.exit.end(reason);
                    return Next::End;
                }
                match self.obey(command) {
                    None | Some(Next::Running) => {}
                    Some(next) => return next,
                }
            }
            if let Err(reason) = self.enter_guest() {
                self.exit.end(reason);
                return Next::End;
            }
            if self.exit.reason().is_some() {
                return Next::End;
            }
        }
    }

    /// Does what a command says, and returns the state that it asks for, if it asks for one.
    fn obey(&self, command: Result<Command, RecvError>) -> Option<Next> {
        let next = match command {
            Ok(Command::Look) => return None,
            Ok(Command::Resume) => Some(Next::Running),
            Ok(Command::Pause) => Some(Next::Paused),
            Ok(Command::Do(task)) => {
                task(&self.fd);
                return None;
            }
            Ok(Command::End) | Err(RecvError) => return Some(Next::End),
        };
        // The owner waits for this; if it has gone, so has the thread's purpose.
        let _ = self.acknowledge.send(());
        next
    }

    /// Runs the guest until it needs something from user space or is interrupted.
    fn enter_guest(&mut self) -> Result<(), ExitReason> {
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => self.buses.pio.read(u64::from(port), data),
            Ok(VcpuExit::IoOut(port, data)) => self.buses.pio.write(u64::from(port), data),
            Ok(VcpuExit::MmioRead(address, data)) => self.buses.mmio.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => self.buses.mmio.write(address, data),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::Debug(exit)) => match &self.on_debug_exit {
                Some(tell) => {
                    self.gate.hold();
                    tell(exit);
                }
                None => {
                    return Err(ExitReason::Error(
                        "KVM reports a breakpoint, but nobody has set one".to_owned(),
                    ));
                }
            },
            Ok(VcpuExit::Shutdown) => return Err(ExitReason::TripleFault),
            Ok(VcpuExit::InternalError) => return Err(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Err(ExitReason::Error(format!(
                    "the processor refused to enter the guest on CPU {cpu} (reason {reason:#x})"
                )));
            }
            Ok(exit) => {
                return Err(ExitReason::Error(format!(
                    "unexpected exit from the guest: {exit:?}"
                )));
            }
            Err(error) if error.errno() == libc::EINTR => self.fd.set_kvm_immediate_exit(0),
            Err(error) if error.errno() == libc::EAGAIN => {}
            Err(error) => return Err(ExitReason::Error(format!("KVM_RUN failed: {error}"))),
        }
        Ok(())
    }

    /// Has KVM complete the access to a device that the guest was left for, without entering the
    /// guest again: before that, its registers are those of neither instruction (Linux,
    /// Documentation/virt/kvm/api.rst, 5, `KVM_EXIT_IO` and `immediate_exit`).
    fn complete_access(&mut self) -> Result<(), ExitReason> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            self.enter_guest()?;
            // It takes the flag back when KVM has done nothing but return for it.
            if self.fd.get_kvm_run().immediate_exit == 0 {
                return Ok(());
            }
        }
    }

    fn internal_error(&mut self) -> ExitReason {
        // SAFETY: KVM_RUN has just returned KVM_EXIT_INTERNAL_ERROR, for which this is the
        // valid member of the union.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        ExitReason::Error(format!(
            "KVM cannot run the guest any further (internal error {suberror} at rip {rip:#x}); \
             `vmm doctor` tells whether this host's KVM runs Linux guests"
        ))
    }
}
