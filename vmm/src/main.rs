//! The `vmm` program.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;

use vmm::api::{ApiServer, ApiTarget, Listener};
use vmm::boot_timer::{BootTimer, Phase};
use vmm::cli::{BootArgs, Cli, Command, EventTarget, MergeArgs, Start};
use vmm::control::request::{Fault, Refusal};
use vmm::control::{Control, KvmLauncher};
use vmm::debugging::DebuggingAids;
use vmm::devices::virtio::block::merge::merge;
use vmm::doctor;
use vmm::error_chain;
use vmm::events::{Event, EventStream};
use vmm::exit::ExitReason;
use vmm::log;
use vmm::sandboxing::{self, JailConfig, ThreadKind};
use vmm::signals::Signals;

// Exit statuses, beside those of the guest's end.
const STATUS_FAILED: u8 = 1;
const STATUS_USAGE: u8 = 2;

fn main() -> ExitCode {
    let start = Instant::now();
    // By default each thread gets a heap of its own, and touches some hundred KiB of it. Threads
    // here allocate so little that they need not be kept apart.
    // SAFETY: there is no other thread yet, and the call only stores a number.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Doctor { json }) => doctor(json),
        Some(Command::MergeDisk(args)) => merge_disk(&args),
        None => boot(&cli.boot, start),
    }
}

fn boot(args: &BootArgs, start: Instant) -> ExitCode {
    let log_file = match args.log_file.as_deref().map(log::open).transpose() {
        Ok(file) => file,
        Err(error) => return failure(&format!("--log-file: {error}"), STATUS_USAGE),
    };
    log::start(args.verbose, log_file);

    match run(args, start) {
        Ok(reason) if reason.status() == 0 => ExitCode::SUCCESS,
        Ok(reason) => failure(&reason.describe(), reason.status()),
        Err((what, status)) => failure(&what, status),
    }
}

/// Why the VMM has to end before it has begun, and with which status.
type Failure = (String, u8);

fn run(args: &BootArgs, start: Instant) -> Result<ExitReason, Failure> {
    let sink = args.event_monitor.as_ref().map(EventTarget::open);
    let sink = sink
        .transpose()
        .map_err(|error| (format!("--event-monitor: {error}"), STATUS_USAGE))?;
    let events = EventStream::new(start, sink);
    // The jail gives it another.
    let pid = std::process::id();
    let boot_timer = args.boot_timer.as_ref().map(EventTarget::open);
    let boot_timer = boot_timer
        .transpose()
        .map_err(|error| (format!("--boot-timer: {error}"), STATUS_USAGE))?
        .map_or_else(BootTimer::default, |sink| BootTimer::new(start, sink));
    boot_timer.reached(Phase::ArgumentsParsed);
    // Before there is any other thread.
    let signals = Signals::new().map_err(|error| (format!("signals: {error}"), STATUS_FAILED))?;
    let listener = listen(args.api_socket.as_ref(), "--api-socket")?;
    let aids = DebuggingAids {
        boot_timer,
        gdb: listen(args.gdb.as_ref(), "--gdb")?.map(Arc::new),
    };

    let launcher = KvmLauncher::new(events.clone(), args.jail.clone(), aids);
    let mut control = Control::new(launcher, events.clone(), args.no_shutdown)
        .map_err(|error| (format!("eventfd: {error}"), STATUS_FAILED))?;
    let started = match args.start().map_err(|error| (error, STATUS_USAGE))? {
        Start::Nothing => Ok(()),
        Start::Boot(config) => control.create_and_boot(*config),
        Start::Restore(restore) => control.create_and_restore(*restore),
    };
    started.map_err(|refusal| refused(&refusal, &events))?;
    // Clients that connect earlier wait in the queue of the socket.
    let server = listener.map(|listener| ApiServer::start(listener, control.mailbox(), pid));
    let _server = server
        .transpose()
        .map_err(|error| (format!("the API's thread: {error}"), STATUS_FAILED))?;
    Ok(control.run(&signals))
}

fn listen(target: Option<&ApiTarget>, flag: &str) -> Result<Option<Listener>, Failure> {
    let listener = target.map(Listener::open).transpose();
    listener.map_err(|error| (format!("{flag}: {}", error_chain(&error)), STATUS_USAGE))
}

fn refused(refusal: &Refusal, events: &EventStream) -> Failure {
    let reason = error_chain(refusal);
    events.emit(&Event::from(&ExitReason::Error(reason.clone())));
    let status = match refusal.fault() {
        Fault::Busy | Fault::Failed => STATUS_FAILED,
        Fault::Request | Fault::Conflict | Fault::NotFound => STATUS_USAGE,
    };
    (reason, status)
}

fn failure(what: &str, status: u8) -> ExitCode {
    eprintln!("vmm: {what}");
    ExitCode::from(status)
}

fn merge_disk(args: &MergeArgs) -> ExitCode {
    log::start(0, None);
    let (layers, output) = match args.open() {
        Ok(files) => files,
        Err(error) => return failure(&format!("--layer, --output: {error}"), STATUS_USAGE),
    };
    let merged = jail(args.jail.as_ref())
        .and_then(|()| merge(layers, output, args.size).map_err(|error| error_chain(&error)));
    match merged {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => failure(&reason, STATUS_FAILED),
    }
}

/// Confines this process to what reading and writing open files takes.
fn jail(config: Option<&JailConfig>) -> Result<(), String> {
    if let Some(config) = config {
        sandboxing::enter(config, None).map_err(|error| error_chain(&error))?;
    }
    sandboxing::seccomp::apply(ThreadKind::Io).map_err(|error| error_chain(&error))
}

fn doctor(json: bool) -> ExitCode {
    let options = doctor::Options {
        json,
        ..doctor::Options::default()
    };
    match doctor::run(&options, &mut std::io::stdout().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(STATUS_FAILED),
        Err(error) => failure(&format!("standard output: {error}"), STATUS_USAGE),
    }
}
