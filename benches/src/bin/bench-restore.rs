//! The `bench-restore` program: how long a restore takes, by the size of the guest's memory.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use benches::machine::Machine;
use benches::random::Random;
use benches::restore::{Dialect, Restore, Restorer, SavedMachine};
use benches::stage::Stage;
use benches::stats::Summary;
use benches::{error_chain, interrupt, report};
use clap::Parser;
use serde_json::json;

/// Measures restores of a saved guest: from the start of the VMM's process until the agent in the
/// guest has answered, for guests of different memory sizes, in random order in each round.
///
/// Nothing else should use the machine meanwhile. Prints a table, and writes every sample to a file.
#[derive(Debug, Parser)]
#[command(name = "bench-restore", version)]
struct Cli {
    /// Rounds; each restores every guest once.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// One round: shows that everything works, measures nothing.
    #[arg(long, conflicts_with = "samples")]
    quick: bool,
    /// What the order comes from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Memory of the guests, in MiB.
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = [256, 4096])]
    memory: Vec<u64>,
    /// How long a step may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    time_limit: u64,
    /// This project's VMM.
    #[arg(long, value_name = "PATH", default_value = "target/release/vmm")]
    vmm: PathBuf,
    /// Kernel of the guest, an ELF file.
    #[arg(long, value_name = "PATH", default_value = "target/images/vmlinux")]
    kernel: PathBuf,
    /// Initramfs of the guest, with the agent.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/images/initramfs.cpio"
    )]
    initramfs: PathBuf,
    /// Firecracker, to be measured too.
    #[arg(long, value_name = "PATH", env = "MVS_BENCH_FIRECRACKER")]
    firecracker: Option<PathBuf>,
    /// Cloud Hypervisor, to be measured too.
    #[arg(long, value_name = "PATH", env = "MVS_BENCH_CLOUD_HYPERVISOR")]
    cloud_hypervisor: Option<PathBuf>,
    /// Kernel for Cloud Hypervisor, whose devices are on PCI, which this project's kernel does not
    /// have.
    #[arg(long, value_name = "PATH", env = "MVS_BENCH_PCI_KERNEL")]
    pci_kernel: Option<PathBuf>,
    /// Initramfs for that kernel, with the agent and modules.
    #[arg(long, value_name = "PATH", env = "MVS_BENCH_PCI_INITRAMFS")]
    pci_initramfs: Option<PathBuf>,
    /// Where to write the samples.
    #[arg(long, value_name = "PATH", default_value = "target/bench/restore.json")]
    output: PathBuf,
}

/// The samples of one guest.
struct Series<'a> {
    name: String,
    memory_mib: u64,
    restorer: &'static str,
    machine: SavedMachine<'a>,
    samples: Vec<Restore>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-restore: {}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Box<dyn Error>> {
    interrupt::catch_signals()?;
    let machine = Machine::describe();
    let stage = Stage::new()?;
    let restorers = restorers(cli, &stage)?;
    let mut series = save_all(cli, &restorers, &stage)?;

    let rounds = if cli.quick { 1 } else { cli.samples };
    let mut random = Random::new(cli.seed);
    for round in 1..=rounds {
        random.shuffle(&mut series);
        for one in &mut series {
            if interrupt::interrupted() {
                return Err("interrupted".into());
            }
            let restore = one.machine.restore()?;
            eprintln!(
                "bench-restore: round {round} of {rounds}: {}: {:.1} ms",
                one.name, restore.answered_ms
            );
            one.samples.push(restore);
        }
    }
    series.sort_by_key(|one| (one.restorer, one.memory_mib));
    print(&series, &machine);
    let all: Vec<_> = series
        .iter()
        .map(|one| json!({"vmm": one.restorer, "memory_mib": one.memory_mib, "samples": one.samples}))
        .collect();
    let results = json!({"machine": machine, "seed": cli.seed, "restores": all});
    report::write(&cli.output, &results)?;
    Ok(())
}

/// The VMMs that take part, with copies of what they read.
fn restorers(cli: &Cli, stage: &Stage) -> Result<Vec<Restorer>, Box<dyn Error>> {
    let kernel = stage.copy(&cli.kernel, "kernel")?;
    let initramfs = stage.copy(&cli.initramfs, "initramfs")?;
    let ours = Restorer {
        name: "vmm",
        program: stage.copy(&cli.vmm, "vmm")?,
        dialect: Dialect::CloudHypervisor,
        kernel: kernel.clone(),
        initramfs: initramfs.clone(),
    };
    let mut all = vec![ours];
    if let Some(program) = &cli.firecracker {
        all.push(Restorer {
            name: "firecracker",
            program: stage.copy(program, "firecracker")?,
            dialect: Dialect::Firecracker,
            kernel: kernel.clone(),
            initramfs: initramfs.clone(),
        });
    }
    if let Some(program) = &cli.cloud_hypervisor {
        let copied = |path: &Option<PathBuf>, name, otherwise: PathBuf| match path {
            Some(path) => stage.copy(path, name),
            None => Ok(otherwise),
        };
        all.push(Restorer {
            name: "cloud-hypervisor",
            program: stage.copy(program, "cloud-hypervisor")?,
            dialect: Dialect::CloudHypervisor,
            kernel: copied(&cli.pci_kernel, "pci-kernel", kernel)?,
            initramfs: copied(&cli.pci_initramfs, "pci-initramfs", initramfs)?,
        });
    }
    Ok(all)
}

/// Boots and saves every guest with every VMM. A peer that cannot is left out, and told of; ours has
/// to.
fn save_all<'a>(
    cli: &Cli,
    restorers: &'a [Restorer],
    stage: &Stage,
) -> Result<Vec<Series<'a>>, Box<dyn Error>> {
    // Quiet, soon at an end after a panic, and with the CPU's entropy.
    let cmdline = "quiet loglevel=4 panic=1 random.trust_cpu=on";
    let limit = Duration::from_secs(cli.time_limit);
    let mut series = Vec::new();
    for restorer in restorers {
        for &memory_mib in &cli.memory {
            let name = format!("{}, {memory_mib} MiB", restorer.name);
            eprintln!("bench-restore: {name}: booting and saving");
            match SavedMachine::make(restorer, memory_mib, cmdline, stage, limit) {
                Ok(machine) => series.push(Series {
                    name,
                    memory_mib,
                    restorer: restorer.name,
                    machine,
                    samples: Vec::new(),
                }),
                Err(error) if restorer.name == "vmm" => return Err(error.into()),
                Err(error) => {
                    eprintln!("bench-restore: {name}: left out: {}", error_chain(&error));
                }
            }
        }
    }
    Ok(series)
}

fn print(series: &[Series<'_>], machine: &Machine) {
    println!("{machine}");
    println!(
        "\n{:<28} {:>3} {:>18} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "restore, ms", "n", "guest runs, median", "answered", "p95", "min", "max", "PSS, MiB"
    );
    let of = |one: &Series<'_>, what: fn(&Restore) -> f64| {
        let values: Vec<f64> = one.samples.iter().map(what).collect();
        Summary::of(&values)
    };
    for one in series {
        let runs = of(one, |restore| restore.runs_ms);
        let memory = of(one, |restore| restore.pss_kib as f64 / 1024.0);
        let answered = of(one, |restore| restore.answered_ms);
        if let (Some(runs), Some(memory), Some(answered)) = (runs, memory, answered) {
            println!(
                "{:<28} {:>3} {:>18.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1}",
                one.name,
                answered.n,
                runs.median,
                answered.median,
                answered.p95,
                answered.min,
                answered.max,
                memory.median
            );
        }
    }
    println!();
    let median = |one: &Series<'_>| of(one, |restore| restore.answered_ms).map(|all| all.median);
    for one in series {
        let first = series
            .iter()
            .find(|other| other.restorer == one.restorer)
            .filter(|first| first.memory_mib != one.memory_mib);
        if let Some(first) = first
            && let (Some(this), Some(that)) = (median(one), median(first))
        {
            println!("{} / {}: {:.2}", one.name, first.name, this / that);
        }
        let peers = series.iter().filter(|peer| {
            one.restorer == "vmm" && peer.restorer != "vmm" && peer.memory_mib == one.memory_mib
        });
        for peer in peers {
            if let (Some(this), Some(that)) = (median(one), median(peer)) {
                println!("{} / {}: {:.2}", one.name, peer.name, this / that);
            }
        }
    }
}
