//! The `vmm` program.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

use vmm::api::{ApiServer, Listener};
use vmm::cli::{BootArgs, Cli, Command, EventTarget, Start};
use vmm::control::request::{Fault, Refusal};
use vmm::control::{Control, KvmLauncher};
use vmm::doctor;
use vmm::error_chain;
use vmm::events::{Event, EventStream};
use vmm::exit::ExitReason;
use vmm::signals::Signals;

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
        None => boot(&cli.boot, start),
    }
}

fn boot(args: &BootArgs, start: Instant) -> ExitCode {
    let level = match args.verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The crate that reads the rings logs an error for each that is malformed, as often as the
    // guest likes. The device tells of it too, and not as often.
    let filter = Targets::new()
        .with_default(level)
        .with_target("virtio_queue", LevelFilter::OFF);
    tracing_subscriber::registry()
        .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr))
        .with(filter)
        .init();

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
    // Before there is any other thread.
    let signals = Signals::new().map_err(|error| (format!("signals: {error}"), STATUS_FAILED))?;
    let listener = args.api_socket.as_ref().map(Listener::open);
    let listener = listener.transpose().map_err(|error| {
        (
            format!("--api-socket: {}", error_chain(&error)),
            STATUS_USAGE,
        )
    })?;

    let launcher = KvmLauncher::new(events.clone(), args.jail.clone());
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
