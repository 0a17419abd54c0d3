//! The `bench-sandboxes` program: what a user of the daemon waits for.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use benches::machine::Machine;
use benches::sandboxes::{Created, Daemon, Programs, SandboxError, Starts, growth};
use benches::stage::Stage;
use benches::stats::Summary;
use benches::{error_chain, interrupt, report};
use clap::{Parser, ValueEnum};
use serde_json::json;

/// Sandboxes of one fork.
const FORKS: [usize; 3] = [1, 10, 20];
/// Memory that a sandbox touches before it is paused, in MiB.
const TOUCHED: [u32; 3] = [0, 16, 64];
/// Of rounds, how many fork.
const FORK_EVERY: usize = 4;

/// Measures creation (cold and warm), pause, resume and forks of sandboxes through the daemon, the
/// memory of a clone, and how long a command's output is on its way. A time ends when a first command has answered.
///
/// Nothing else should use the machine meanwhile. Prints a table, and writes every sample to a file.
#[derive(Debug, Parser)]
#[command(name = "bench-sandboxes", version)]
struct Cli {
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// One round, with few forks: shows that everything works, measures nothing.
    #[arg(long, conflicts_with = "samples")]
    quick: bool,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_values = ["create", "pause", "fork", "stream"])]
    parts: Vec<Part>,
    /// Memory of a sandbox, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u32,
    #[command(flatten)]
    programs: Programs,
    /// Where to write the samples.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/bench/sandboxes.json"
    )]
    output: PathBuf,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Creation: cold, warm, and from the pool.
    Create,
    /// Pause and resume.
    Pause,
    /// Forks.
    Fork,
    /// The way of a byte from a command to the client that follows it.
    Stream,
}

/// Samples by what they are of, in the order in which they are to be shown.
#[derive(Default)]
struct Samples(Vec<(String, Vec<f64>)>);

impl Samples {
    fn add(&mut self, name: &str, value: f64) {
        match self.0.iter_mut().find(|(other, _)| other == name) {
            Some((_, samples)) => samples.push(value),
            None => self.0.push((name.to_owned(), vec![value])),
        }
    }

    fn median(&self, name: &str) -> Option<f64> {
        let (_, samples) = self.0.iter().find(|(other, _)| other == name)?;
        Summary::of(samples).map(|summary| summary.median)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-sandboxes: {}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Box<dyn Error>> {
    interrupt::catch_signals()?;
    let machine = Machine::describe();
    let stage = Stage::new()?;
    let programs = cli.programs.copied_to(&stage)?;
    let cold = Daemon::start(&programs, Starts::Cold)?;
    let bare = Daemon::start(&programs, Starts::Bare)?;
    let warm = Daemon::start(&programs, Starts::Warm)?;
    let pool = Daemon::start(&programs, Starts::Pool)?;
    let daemons = [
        ("cold", &cold),
        ("warm, no prefetch", &bare),
        ("warm", &warm),
        ("pool", &pool),
    ];
    let samples = measure(cli, daemons).inspect_err(|_| {
        for (_, daemon) in daemons {
            eprintln!("--- the end of a daemon's log:\n{}", daemon.last_words());
        }
    })?;
    print(&samples, &machine);
    let all: serde_json::Map<_, _> = samples
        .0
        .into_iter()
        .map(|(name, samples)| (name, json!(samples)))
        .collect();
    let results = json!({"machine": machine, "memory_mib": cli.memory, "samples": all});
    report::write(&cli.output, &results)?;
    Ok(())
}

fn measure(cli: &Cli, daemons: [(&str, &Daemon); 4]) -> Result<Samples, Box<dyn Error>> {
    eprintln!("bench-sandboxes: waiting for the first warm start");
    let [_, (_, bare), (_, warm), (_, pool)] = daemons;
    for daemon in [bare, warm] {
        daemon.warm_up(1, cli.memory)?;
    }
    pool.delete(&pool.create(cli.memory)?.id)?;
    pool.wait_until_ready()?;

    let rounds = if cli.quick {
        1
    } else {
        usize::from(cli.samples)
    };
    let mut samples = Samples::default();
    for round in 0..rounds {
        if interrupt::interrupted() {
            return Err("interrupted".into());
        }
        eprintln!("bench-sandboxes: round {} of {rounds}", round + 1);
        // Each time another one first.
        let mut order = daemons;
        let first = round % order.len();
        order.rotate_left(first);
        let is_asked = |part| cli.parts.contains(&part);
        for (kind, daemon) in order.into_iter().filter(|_| is_asked(Part::Create)) {
            create(daemon, kind, cli.memory, &mut samples)?;
            if kind == "pool" {
                // Or it would be made ready during what is measured next.
                daemon.wait_until_ready()?;
            }
        }
        if is_asked(Part::Pause) {
            pause(warm, cli.memory, &mut samples)?;
        }
        if is_asked(Part::Stream) {
            stream(warm, cli.memory, &mut samples)?;
        }
        if is_asked(Part::Fork) && round % FORK_EVERY == 0 {
            let counts = if cli.quick { &FORKS[..1] } else { &FORKS[..] };
            fork(warm, cli.memory, counts, &mut samples)?;
        }
    }
    Ok(samples)
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn create(
    daemon: &Daemon,
    kind: &str,
    memory: u32,
    samples: &mut Samples,
) -> Result<(), SandboxError> {
    let begun = Instant::now();
    let Created { id, start, phases } = daemon.create(memory)?;
    let created = millis(begun);
    daemon.exec(&id, "true")?;
    let all = millis(begun);
    if kind.starts_with(&start) {
        samples.add(&format!("create, {kind}: first command, ms"), all);
        samples.add(&format!("create, {kind}: answered, ms"), created);
        for (phase, took) in phases {
            samples.add(&format!("create, {kind}:   {phase}, ms"), took);
        }
    }
    daemon.delete(&id)
}

/// One sandbox, paused again and again, each time after it has touched some memory.
fn pause(daemon: &Daemon, memory: u32, samples: &mut Samples) -> Result<(), SandboxError> {
    let id = daemon.create(memory)?.id;
    for touched in TOUCHED {
        if touched > 0 {
            daemon.exec(
                &id,
                &format!("head -c {} /dev/urandom > /dev/shm/touched", touched << 20),
            )?;
        }
        let saved = daemon.saved_bytes()?;
        let begun = Instant::now();
        daemon.change(&id, "pause")?;
        samples.add(&format!("pause, {touched} MiB touched, ms"), millis(begun));
        let written = daemon.saved_bytes()?.saturating_sub(saved) as f64 / f64::from(1 << 20);
        samples.add(
            &format!("pause, {touched} MiB touched: written, MiB"),
            written,
        );
        let begun = Instant::now();
        daemon.change(&id, "resume")?;
        samples.add("resume: answered, ms", millis(begun));
        daemon.exec(&id, "true")?;
        samples.add("resume: first command, ms", millis(begun));
    }
    daemon.delete(&id)
}

/// What a command writes, on its way to the client.
fn stream(daemon: &Daemon, memory: u32, samples: &mut Samples) -> Result<(), SandboxError> {
    let id = daemon.create(memory)?.id;
    // The first one finds nothing in memory.
    daemon.stream(&id)?;
    let latencies = daemon.stream(&id)?;
    for took in latencies.one_way {
        samples.add("stream: a byte, from the guest to the client, ms", took);
    }
    for took in latencies.round_trip {
        samples.add("stream: a line there and back, ms", took);
    }
    samples.add("stream: the clocks are known to, ms", latencies.uncertainty);
    daemon.delete(&id)
}

fn fork(
    daemon: &Daemon,
    memory: u32,
    counts: &[usize],
    samples: &mut Samples,
) -> Result<(), SandboxError> {
    let parent = daemon.create(memory)?.id;
    daemon.exec(&parent, "true")?;
    // The first one saves what the parent has touched so far; those that count find it warm.
    let (first, _) = daemon.fork(&parent, 1)?;
    for id in &first {
        daemon.delete(id)?;
    }
    for count in counts {
        let before = daemon.vmm_pss()?;
        let begun = Instant::now();
        let (ids, stall) = daemon.fork(&parent, *count)?;
        samples.add(&format!("fork of {count}, ms"), millis(begun));
        samples.add(
            &format!("fork of {count}: the parent stands still, ms"),
            stall,
        );
        let memory = growth(&before, &daemon.vmm_pss()?) / 1024.0 / *count as f64;
        samples.add(
            &format!("fork of {count}: memory of a clone (PSS), MiB"),
            memory,
        );
        for id in &ids {
            daemon.delete(id)?;
        }
    }
    daemon.delete(&parent)
}

fn print(samples: &Samples, machine: &Machine) {
    println!("{machine}");
    println!(
        "\n{:<48} {:>3} {:>9} {:>9} {:>9} {:>9}",
        "", "n", "median", "p95", "min", "max"
    );
    for (name, values) in &samples.0 {
        if let Some(summary) = Summary::of(values) {
            println!(
                "{name:<48} {:>3} {:>9.1} {:>9.1} {:>9.1} {:>9.1}",
                summary.n, summary.median, summary.p95, summary.min, summary.max
            );
        }
    }
    println!();
    let ratio = |name: &str, one: &str, other: &str| {
        if let (Some(one), Some(other)) = (samples.median(one), samples.median(other)) {
            println!("{name:<48} {:.2}", one / other);
        }
    };
    ratio(
        "warm / cold, to the first command",
        "create, warm: first command, ms",
        "create, cold: first command, ms",
    );
    ratio(
        "pool / cold, to the first command",
        "create, pool: first command, ms",
        "create, cold: first command, ms",
    );
    ratio(
        "warm / warm without prefetch, to the first command",
        "create, warm: first command, ms",
        "create, warm, no prefetch: first command, ms",
    );
    ratio("fork of 20 / fork of 1", "fork of 20, ms", "fork of 1, ms");
}
