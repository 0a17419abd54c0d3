//! The `bench` program: measures this project's VMM beside its peers.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use benches::{
    boot, error_chain, interrupt,
    machine::{Machine, Virtualization},
    network::Tap,
    peer::{Guest, Peer, QEMU_MICROVM, VMM},
    report::{self, FORMAT, Measure, PeerRecord, PeerState, Results},
    rounds::{Outcome, Rounds, Sample},
    running::{self, Run},
    stage::Stage,
    trace::Tracer,
};
use clap::Parser;

/// Rounds of a short run: enough to see that everything works, too few to compare.
const QUICK_ROUNDS: usize = 3;
/// Data in large pieces, in MiB, and number of small ones; the same of a short run.
const WORK: (u64, u64) = (64, 2000);
const QUICK_WORK: (u64, u64) = (8, 100);
const STATUS_INTERRUPTED: u8 = 130;

/// Measures this project's VMM beside QEMU's machine type microvm, with the same kernel, initramfs
/// and guest: cold boots, then the API, disk and sockets of running guests.
///
/// Nothing else should use the machine meanwhile. The numbers that docs/specification.md names are
/// those of 20 rounds, the default: `benches/run`.
///
/// Prints a table, and writes every sample to a file. Progress goes to standard error.
///
/// Exit status: 0 measured, whatever the times; 1 something failed, such as a boot of our VMM;
/// 2 wrong options; 130 ended by a signal.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Cli {
    /// Rounds to measure; each boots every peer once, in random order.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..))]
    samples: u16,
    /// Measure 3 boots and one running guest of each peer only, with little work: a test that the
    /// bench works, not a comparison.
    #[arg(long, conflicts_with = "samples")]
    quick: bool,
    /// Measure nothing but N answers of our VMM's API when it has no machine. This needs no KVM, and
    /// writes no file.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    idle_api: Option<u32>,
    /// Rounds before those that count, to fill caches.
    #[arg(long, value_name = "N", default_value_t = 1)]
    warmup: u16,
    /// Where the order of the peers comes from; a new one unless given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// This project's VMM.
    #[arg(long, value_name = "PATH", default_value = "target/release/vmm")]
    vmm: PathBuf,
    /// QEMU (qemu-system-x86_64); by default the one that the emulated KVM host brings along, if
    /// this runs in it, else the system's.
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
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
    /// Raw ext4 image to boot from, read-only; without it the guest stays in the initramfs.
    #[arg(long, value_name = "PATH")]
    rootfs: Option<PathBuf>,
    /// busybox, a static program, which works in running guests; without it only boots are measured.
    #[arg(long, value_name = "PATH")]
    busybox: Option<PathBuf>,
    /// Data that a running guest reads, writes and sends in each way, in MiB; 64 by default.
    #[arg(long, value_name = "MIB", conflicts_with = "quick", value_parser = clap::value_parser!(u64).range(1..=128))]
    work: Option<u64>,
    /// Memory of the guest, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(64..=1_048_576))]
    memory: u64,
    /// How long a boot may take, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    time_limit: u64,
    /// Where to write the results.
    #[arg(long, value_name = "PATH", default_value = "target/bench/results.json")]
    output: PathBuf,
    /// What was built, to be recorded with the results.
    #[arg(long, value_name = "NAME")]
    commit: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("bench: {}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode, Box<dyn Error>> {
    interrupt::catch_signals()?;
    let machine = Machine::describe();
    let stage = Stage::new()?;
    let ours = Peer::vmm(&cli.vmm, &stage)?;
    if let Some(count) = cli.idle_api {
        let took = running::idle_api(&ours, count as usize, &stage)?;
        println!("{}", idle_api(&took));
        return Ok(ExitCode::SUCCESS);
    }
    let guest = stage_guest(cli, &stage)?;

    let (mut peers, mut records) = (Vec::new(), Vec::new());
    let unpacked = (machine.virtualization == Virtualization::Emulated)
        .then(kvm_host_cache)
        .flatten();
    let qemu = Peer::qemu_microvm(cli.qemu.as_deref(), unpacked.as_deref(), &stage);
    for (name, peer) in [(VMM, Ok(ours)), (QEMU_MICROVM, qemu)] {
        let state = match peer {
            Ok(peer) => {
                let version = peer.version().to_owned();
                peers.push(peer);
                PeerState::Version(version)
            }
            Err(error) => {
                let why = error_chain(&error);
                eprintln!("bench: {name}: peer not available: {why}");
                PeerState::NotAvailable(why)
            }
        };
        records.push(PeerRecord { name, state });
    }

    let (tracer, first_instruction) = match Tracer::new() {
        Ok(tracer) => {
            let how = "KVM's tracepoint kvm_entry, for all peers";
            (Some(tracer), how.to_owned())
        }
        Err(error) => (None, format!("not timed: {}", error_chain(&error))),
    };
    let rounds = Rounds {
        rounds: if cli.quick {
            QUICK_ROUNDS
        } else {
            usize::from(cli.samples)
        },
        warmup_rounds: usize::from(cli.warmup),
        seed: cli.seed.unwrap_or_else(new_seed),
    };
    let plan = boot::Plan {
        rounds,
        time_limit_s: cli.time_limit,
        guest,
    };
    let interrupted = || {
        eprintln!("bench: ended by a signal; nothing was written");
        Ok(ExitCode::from(STATUS_INTERRUPTED))
    };
    let boots = boot::measure(&peers, &plan, &stage, tracer.as_ref(), |sample| {
        tell(sample, "boot", |boot| format!("{:.1} ms", boot.answered_ms));
    });
    let Some(boots) = boots else {
        return interrupted();
    };
    let mut running = None;
    if let Some(busybox) = &cli.busybox {
        let plan = work_plan(cli, &plan, busybox);
        let runs = running::measure(&peers, &plan, &stage, |sample| {
            tell(sample, "run", describe);
        });
        let Some(runs) = runs else {
            return interrupted();
        };
        let plan = running::Plan {
            guest: origins(cli, &plan.guest),
            ..plan
        };
        let seed = plan.rounds.seed;
        running = Some(Measure::new(plan, seed, &running::METRICS, &records, runs));
    }

    let plan = boot::Plan {
        guest: origins(cli, &plan.guest),
        ..plan
    };
    let cold_boot = Measure::new(plan, rounds.seed, &boot::METRICS, &records, boots);
    let results = Results {
        format: FORMAT,
        commit: cli.commit.clone(),
        machine,
        peers: records,
        first_instruction,
        cold_boot,
        running,
    };
    let failed = results.failed(VMM);
    print!("{}", results.table());
    report::write(&cli.output, &results)
        .map_err(|error| format!("cannot write {}: {error}", cli.output.display()))?;
    println!("\nAll samples: {}", cli.output.display());
    if failed > 0 {
        eprintln!("bench: {failed} samples of {VMM} failed; the tables tell why");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
}

/// What the answers of an idle VMM say.
fn idle_api(took: &[f64]) -> String {
    let at = |q| running::percentile(took, q).unwrap_or(f64::NAN);
    let [median, p99, max] = [0.5, 0.99, 1.0].map(at);
    format!(
        "API without a machine, {} answers [µs]: median {median:.0}, p99 {p99:.0}, max {max:.0}",
        took.len()
    )
}

/// What running guests are to do.
fn work_plan(cli: &Cli, boots: &boot::Plan, busybox: &Path) -> running::Plan {
    let (mib, small_requests) = match cli.work {
        _ if cli.quick => QUICK_WORK,
        Some(mib) => (mib, WORK.1),
        None => WORK,
    };
    let mut rounds = boots.rounds;
    if cli.quick {
        (rounds.rounds, rounds.warmup_rounds) = (1, 0);
    }
    running::Plan {
        rounds,
        time_limit_s: boots.time_limit_s,
        guest: boots.guest.clone(),
        busybox: busybox.to_owned(),
        mib,
        small_requests,
        network: can_network(),
    }
}

/// Whether guests can have network cards here; if not, that is told.
fn can_network() -> bool {
    Tap::new()
        .inspect_err(|error| eprintln!("bench: guests have no network card: {error}"))
        .is_ok()
}

/// What the copies in `guest` were made from: they are gone when the results are read.
fn origins(cli: &Cli, guest: &Guest) -> Guest {
    Guest {
        kernel: cli.kernel.clone(),
        initramfs: cli.initramfs.clone(),
        rootfs: guest.rootfs.as_ref().and(cli.rootfs.clone()),
        ..guest.clone()
    }
}

/// Copies what the guest is made of, and says what it is told: to be quiet, to end soon after a
/// panic, to take the CPU's entropy, and where its root is.
fn stage_guest(cli: &Cli, stage: &Stage) -> Result<Guest, Box<dyn Error>> {
    let mut cmdline = "quiet loglevel=4 panic=1 random.trust_cpu=on".to_owned();
    let rootfs = match &cli.rootfs {
        Some(rootfs) => {
            cmdline.push_str(" root=/dev/vda rootfstype=ext4 ro");
            Some(stage.copy(rootfs, "rootfs")?)
        }
        None => None,
    };
    Ok(Guest {
        kernel: stage.copy(&cli.kernel, "kernel")?,
        initramfs: stage.copy(&cli.initramfs, "initramfs")?,
        rootfs,
        data: None,
        tap: None,
        api: false,
        cmdline,
        memory_mib: cli.memory,
    })
}

/// Where scripts/kvm-host keeps the parts of the emulated machine, if it has any.
fn kvm_host_cache() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(Path::new(&std::env::var_os("HOME")?).join(".cache")))?;
    let directory = cache.join("microvm-sandbox/kvm-host");
    fs::metadata(&directory).is_ok().then_some(directory)
}

fn new_seed() -> u64 {
    // Microseconds, so that it is short to write down.
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |time| time.as_micros() as u64)
}

fn tell<T>(sample: &Sample<T>, what: &str, describe: impl Fn(&T) -> String) {
    let phase = if sample.warmup { "warm-up" } else { "round" };
    let outcome = match &sample.outcome {
        Outcome::Measured(measured) => describe(measured),
        Outcome::Error(error) => format!("failed: {error}"),
    };
    eprintln!(
        "bench: {what}, {phase} {}: {}: {outcome}",
        sample.round + 1,
        sample.peer
    );
}

fn describe(run: &Run) -> String {
    let Run {
        disk_write,
        disk_read,
        to_guest,
        from_guest,
        ..
    } = run;
    format!("disk {disk_write:.0}/{disk_read:.0} MiB/s, vsock {to_guest:.0}/{from_guest:.0} MiB/s")
}
