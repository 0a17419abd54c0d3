//! The `vmm` program.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::filter::LevelFilter;

use vmm::builder::{self, BuildError};
use vmm::cli::{BootArgs, Cli, Command};
use vmm::config::ConsoleMode;
use vmm::doctor;
use vmm::error_chain;
use vmm::events::{Event, EventStream};
use vmm::exit::ExitReason;
use vmm::resources::HostResources;
use vmm::terminal::RawTerminal;

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

    let built = HostResources::open(&config)
        .and_then(|host| builder::build_for_boot(&config, host, events.clone()));
    let machine = match built {
        Ok(machine) => machine,
        Err(error) => {
            let reason = error_chain(&error);
            events.emit(&Event::from(&ExitReason::Error(reason.clone())));
            let wrong_config = matches!(error, BuildError::Config(_));
            return failure(
                &reason,
                if wrong_config {
                    STATUS_USAGE
                } else {
                    STATUS_FAILED
                },
            );
        }
    };
    let terminal = if config.serial.mode == ConsoleMode::Tty {
        match RawTerminal::enter() {
            Ok(terminal) => terminal,
            Err(error) => return failure(&format!("terminal: {error}"), STATUS_FAILED),
        }
    } else {
        None
    };
    let reason = machine.run();
    drop(terminal);
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
