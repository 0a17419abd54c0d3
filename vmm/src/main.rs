//! The `vmm` program.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::filter::LevelFilter;

use vmm::cli::{BootArgs, Cli, Command};
use vmm::control::request::Fault;
use vmm::control::{Control, KvmLauncher, OnGuestEnd};
use vmm::doctor;
use vmm::error_chain;
use vmm::events::{Event, EventStream};
use vmm::exit::ExitReason;
use vmm::signals::Signals;

const STATUS_FAILED: u8 = 1;
const STATUS_USAGE: u8 = 2;

fn main() -> ExitCode {
    let start = Instant::now();
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Doctor { json }) => doctor(json),
        None => boot(&cli.boot, start),
    }
}

fn boot(args: &BootArgs, start: Instant) -> ExitCode {
    tracing_subscriber::fmt()
        .with_max_level(match args.verbose {
            0 => LevelFilter::WARN,
            1 => LevelFilter::INFO,
            2 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
        .with_writer(std::io::stderr)
        .init();

    let Some(config) = args.vm_config() else {
        return failure("--kernel is missing", STATUS_USAGE);
    };
    let sink = match args
        .event_monitor
        .as_ref()
        .map(|target| target.open())
        .transpose()
    {
        Ok(sink) => sink,
        Err(error) => return failure(&format!("--event-monitor: {error}"), STATUS_USAGE),
    };
    let events = EventStream::new(start, sink);
    // Before there is any other thread.
    let signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => return failure(&format!("signals: {error}"), STATUS_FAILED),
    };
    let launcher = KvmLauncher::new(events.clone());
    let mut control = match Control::new(launcher, events.clone(), OnGuestEnd::Exit) {
        Ok(control) => control,
        Err(error) => return failure(&format!("eventfd: {error}"), STATUS_FAILED),
    };
    if let Err(refusal) = control.create_and_boot(config) {
        let reason = error_chain(&refusal);
        events.emit(&Event::from(&ExitReason::Error(reason.clone())));
        let status = match refusal.fault() {
            Fault::Failed => STATUS_FAILED,
            Fault::Request | Fault::Conflict | Fault::NotFound => STATUS_USAGE,
        };
        return failure(&reason, status);
    }
    let reason = control.run(&signals);
    if reason.status() == 0 {
        ExitCode::SUCCESS
    } else {
        failure(&reason.describe(), reason.status())
    }
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
