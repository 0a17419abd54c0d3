//! The `bench` program: measures this project's VMM beside its peers.

use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use benches::{
    boot::{self, Outcome, Plan, Sample},
    error_chain, interrupt,
    machine::{Machine, Virtualization},
    peer::{Guest, Peer, QEMU_MICROVM, VMM},
    report::{ColdBoot, PeerRecord, PeerState, Results},
    stage::Stage,
    trace::Tracer,
};
use clap::Parser;

/// Rounds of a short run: enough to see that everything works, too few to compare.
const QUICK_ROUNDS: usize = 3;
const STATUS_INTERRUPTED: u8 = 130;

/// Measures cold boots of this project's VMM beside QEMU's machine type microvm, with the same
/// kernel, initramfs and guest.
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
    /// Measure 3 rounds only: a test that the bench works, not a comparison.
    #[arg(long, conflicts_with = "samples")]
    quick: bool,
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
    let guest = stage_guest(cli, &stage)?;

    let (mut peers, mut records) = (Vec::new(), Vec::new());
    let ours = Peer::vmm(&cli.vmm, &stage)?;
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
    let plan = Plan {
        rounds: if cli.quick {
            QUICK_ROUNDS
        } else {
            usize::from(cli.samples)
        },
        warmup_rounds: usize::from(cli.warmup),
        seed: cli.seed.unwrap_or_else(new_seed),
        time_limit_s: cli.time_limit,
        guest,
    };
    let Some(samples) = boot::measure(&peers, &plan, &stage, tracer.as_ref(), tell) else {
        eprintln!("bench: ended by a signal; nothing was written");
        return Ok(ExitCode::from(STATUS_INTERRUPTED));
    };

    // The copies are gone after this: what they were made from is worth recording.
    let plan = Plan {
        guest: Guest {
            kernel: cli.kernel.clone(),
            initramfs: cli.initramfs.clone(),
            rootfs: cli.rootfs.clone(),
            ..plan.guest
        },
        ..plan
    };
    let cold_boot = ColdBoot::new(plan, first_instruction, records, samples);
    let failed = cold_boot.failed(VMM);
    let results = Results::new(cli.commit.clone(), machine, cold_boot);
    print!("{}", results.table());
    results
        .write(&cli.output)
        .map_err(|error| format!("cannot write {}: {error}", cli.output.display()))?;
    println!("\nAll samples: {}", cli.output.display());
    if failed > 0 {
        eprintln!("bench: {failed} boots of {VMM} failed; the table tells why");
        return Ok(ExitCode::FAILURE);
    }
    Ok(ExitCode::SUCCESS)
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

fn tell(sample: &Sample) {
    let phase = if sample.warmup { "warm-up" } else { "round" };
    let outcome = match &sample.outcome {
        Outcome::Booted(boot) => format!("{:.1} ms", boot.answered_ms),
        Outcome::Error(error) => format!("failed: {error}"),
    };
    eprintln!(
        "bench: {phase} {}: {}: {outcome}",
        sample.round + 1,
        sample.peer
    );
}
