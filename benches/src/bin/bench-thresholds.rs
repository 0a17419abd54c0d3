//! The `bench-thresholds` program: the bounds that the tests of the project have which published the API
//! `/api/v1`, measured with virtual machines of this one, through that API.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use benches::machine::Machine;
use benches::sandboxes::{Daemon, Programs, SandboxError, Starts};
use benches::stage::Stage;
use benches::stats::Summary;
use benches::thresholds::{Row, WANTED, deviation};
use benches::{error_chain, interrupt, report};
use clap::Parser;
use serde_json::{Value, json};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Measures what the published tests of the API /api/v1 have bounds for, and prints value, bound and
/// margin.
///
/// Nothing else should use the machine meanwhile.
#[derive(Debug, Parser)]
#[command(name = "bench-thresholds", version)]
struct Cli {
    /// Samples of a boot, and machines in each measure of many; the bounds are for 5 and more.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(2..=20))]
    samples: u16,
    #[command(flatten)]
    programs: Programs,
    /// Where to write the values.
    #[arg(
        long,
        value_name = "PATH",
        default_value = "target/bench/thresholds.json"
    )]
    output: PathBuf,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-thresholds: {}", error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    interrupt::catch_signals()?;
    let machine = Machine::describe();
    let stage = Stage::new()?;
    let programs = cli.programs.copied_to(&stage)?;
    let mut daemon = Daemon::start(&programs, Starts::Warm)?;
    daemon.log_in()?;
    let (rows, failures) = measure(&daemon, usize::from(cli.samples))?;
    println!("{machine}\n");
    println!("| measure | value | bound | margin | at best |\n|---|---|---|---|---|");
    for row in &rows {
        println!("{}", row.line());
    }
    let not_well: Vec<_> = rows.iter().filter(|row| !row.is_well()).collect();
    println!(
        "\n{} of {} are {WANTED} times better than their bounds, or meet those that cannot be",
        rows.len() - not_well.len(),
        rows.len()
    );
    for row in not_well {
        println!("- not: {}", row.name);
    }
    let results = json!({"machine": machine, "rows": rows, "failures": failures});
    report::write(&cli.output, &results)?;
    match failures.is_empty() {
        true => Ok(()),
        false => Err(format!("not all was measured: {}", failures.join("; ")).into()),
    }
}

/// Measures something, and adds what it was.
type Step = fn(&Bench<'_>, &mut Vec<Row>) -> Result<()>;

/// What was measured, and what was not and why.
fn measure(daemon: &Daemon, samples: usize) -> Result<(Vec<Row>, Vec<String>)> {
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    let steps: [(&str, Step); 8] = [
        ("boots", boots),
        ("stops", stops),
        ("shapes", shapes),
        ("many at once", many),
        ("cleanup", cleanup),
        ("cycles", cycles),
        ("resources", resources),
        ("load", load),
    ];
    let bench = Bench { daemon, samples };
    for (name, step) in steps {
        if interrupt::interrupted() {
            return Err("interrupted".into());
        }
        eprintln!("bench-thresholds: {name}");
        let known = rows.len();
        if let Err(error) = step(&bench, &mut rows) {
            let why = error_chain(&*error);
            eprintln!(
                "bench-thresholds: {why}; the end of the daemon's log:\n{}",
                daemon.last_words()
            );
            failures.push(format!("{name}: {why}"));
            bench.delete_all()?;
        }
        for row in &rows[known..] {
            eprintln!("{}", row.line());
        }
    }
    Ok((rows, failures))
}

/// The daemon, through the API.
struct Bench<'a> {
    daemon: &'a Daemon,
    samples: usize,
}

impl Bench<'_> {
    fn create(&self, name: &str, vcpus: u32, memory_mb: u32) -> Result<Value, SandboxError> {
        let spec = json!({"name": name, "vcpus": vcpus, "memory_mb": memory_mb});
        self.daemon.api("POST", "/vms", Some(&spec), 201)
    }

    /// The id of one that runs.
    fn create_started(&self, vcpus: u32, memory_mb: u32) -> Result<String, SandboxError> {
        let spec = json!({"template": "minimal", "vcpus": vcpus, "memory_mb": memory_mb});
        let created = self.daemon.api("POST", "/vms", Some(&spec), 201)?;
        Ok(created["id"].as_str().unwrap_or_default().to_owned())
    }

    fn start(&self, name: &str) -> Result<(), SandboxError> {
        let path = format!("/vms/{name}/start");
        self.daemon.api("POST", &path, None, 200).map(drop)
    }

    fn execute(&self, name: &str, command: &str) -> Result<Value, SandboxError> {
        let path = format!("/vms/{name}/execute");
        let body = json!({"command": command, "timeout_seconds": 300});
        let done = self.daemon.api("POST", &path, Some(&body), 200)?;
        match done["exit_code"] == 0 {
            true => Ok(done),
            false => Err(SandboxError::Refused {
                request: command.to_owned(),
                status: 200,
                body: done,
            }),
        }
    }

    fn stop(&self, name: &str, force: bool) -> Result<(), SandboxError> {
        let path = format!("/vms/{name}/stop");
        let body = json!({"force": force});
        self.daemon.api("POST", &path, Some(&body), 200).map(drop)
    }

    fn delete(&self, name: &str) -> Result<(), SandboxError> {
        let path = format!("/vms/{name}");
        self.daemon.api("DELETE", &path, None, 204).map(drop)
    }

    /// What a measure that has failed has left.
    fn delete_all(&self) -> Result<(), SandboxError> {
        let all = self.daemon.api("GET", "/vms?limit=100", None, 200)?;
        let all = all["vms"].as_array().into_iter().flatten();
        all.filter_map(|vm| vm["id"].as_str())
            .try_for_each(|id| self.delete(id))
    }

    /// Creates a machine, and tells how long it takes from its start to its first command, in seconds.
    fn boot(&self, name: &str, vcpus: u32, memory_mb: u32) -> Result<f64, SandboxError> {
        self.create(name, vcpus, memory_mb)?;
        seconds(|| self.start_ready(name))
    }

    fn start_ready(&self, name: &str) -> Result<(), SandboxError> {
        self.start(name)?;
        self.execute(name, "echo ready").map(drop)
    }

    /// The same of the first of its shape. Those after it start warm.
    fn first_boot(&self, name: &str, vcpus: u32, memory_mb: u32) -> Result<f64, SandboxError> {
        let took = self.boot(name, vcpus, memory_mb)?;
        self.delete(name)?;
        self.daemon.wait_until_warm()?;
        Ok(took)
    }
}

/// How long this takes, in seconds.
fn seconds<T, E>(work: impl FnOnce() -> Result<T, E>) -> Result<f64, E> {
    let begun = Instant::now();
    work()?;
    Ok(begun.elapsed().as_secs_f64())
}

/// The names of so many machines.
fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|index| format!("{prefix}-{index}"))
        .collect()
}

/// Does this for each at once.
fn at_once<T: Sync>(
    all: &[T],
    work: impl Fn(&T) -> Result<(), SandboxError> + Sync,
) -> Result<(), SandboxError> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = all
            .iter()
            .map(|one| scope.spawn(move || work(one)))
            .collect();
        threads.into_iter().try_for_each(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

fn boots(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    // Caches are filled by a machine that is not measured, as they are where machines run.
    bench.first_boot("other", 1, 192)?;
    rows.push(Row::at_most(
        "boot: from its start to `echo ready`; 2 vCPUs, 512 MiB; the first of its shape, s",
        3.0,
        bench.first_boot("first", 2, 512)?,
    ));
    let mut all = Vec::new();
    for name in names("boot", bench.samples) {
        all.push(bench.boot(&name, 2, 512)?);
        bench.delete(&name)?;
    }
    let mean = all.iter().sum::<f64>() / all.len() as f64;
    let most = all.iter().copied().fold(0.0, f64::max);
    rows.push(Row::at_most("boot, mean of the others, s", 3.0, mean));
    rows.push(Row::at_most("boot, the longest, s", 5.0, most));
    rows.push(Row::at_most(
        "boot, standard deviation, s",
        1.0,
        deviation(&all),
    ));
    // Without a name it is started with its creation, and its machine cannot grow: another model.
    let id = bench.create_started(2, 512)?;
    bench.delete(&id)?;
    bench.daemon.wait_until_warm()?;
    let mut unnamed = 0.0;
    for _ in 0..bench.samples {
        let mut id = String::new();
        unnamed += seconds(|| {
            id = bench.create_started(2, 512)?;
            bench.execute(&id, "echo ready").map(drop)
        })?;
        bench.delete(&id)?;
    }
    rows.push(Row::at_most(
        "boot of one without a name, whose creation starts it: mean, s",
        3.0,
        unnamed / bench.samples as f64,
    ));
    bench.first_boot("first", 1, 256)?;
    let five = names("five", 5);
    at_once(&five, |name| bench.create(name, 1, 256).map(drop))?;
    let took = seconds(|| at_once(&five, |name| bench.start_ready(name)))?;
    rows.push(Row::at_most(
        "five boots at once; 1 vCPU, 256 MiB; all together, s",
        10.0,
        took,
    ));
    Ok(at_once(&five, |name| bench.delete(name))?)
}

fn stops(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    bench.boot("stop", 2, 512)?;
    let took = seconds(|| bench.stop("stop", false))?;
    rows.push(Row::at_most("stop, by the guest, s", 5.0, took));
    bench.start("stop")?;
    let took = seconds(|| bench.stop("stop", true))?;
    rows.push(Row::at_most("stop, with force, s", 2.0, took));
    Ok(bench.delete("stop")?)
}

fn shapes(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let small = bench.first_boot("small", 1, 128)?;
    let large = bench.first_boot("large", 8, 2048)?;
    rows.push(
        Row::at_most(
            "boot with 8 vCPUs and 2 GiB, to one with 1 and 128 MiB: the first of each, from its kernel on",
            2.0,
            large / small,
        )
        .limited("2: both are as fast"),
    );
    let later = |name: &str, vcpus, memory_mb| -> Result<f64> {
        let mut all = 0.0;
        for _ in 0..bench.samples {
            all += bench.boot(name, vcpus, memory_mb)?;
            bench.delete(name)?;
        }
        Ok(all)
    };
    let (small, large) = (later("small", 1, 128)?, later("large", 8, 2048)?);
    rows.push(
        Row::at_most("the same, means of later ones", 2.0, large / small)
            .limited("2: both are as fast"),
    );
    Ok(())
}

fn many(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let ten = names("ten", 10);
    let took = seconds(|| at_once(&ten, |name| bench.create(name, 1, 256).map(drop)))?;
    rows.push(Row::at_most("ten are created at once, s", 10.0, took));
    let took = seconds(|| at_once(&ten[..8], |name| bench.start(name)))?;
    rows.push(Row::at_most(
        "eight of them are started at once, s",
        16.0,
        took,
    ));
    at_once(&ten, |name| bench.delete(name))?;

    let five = names("five", 5);
    at_once(&five, |name| bench.boot(name, 2, 512).map(drop))?;
    thread::sleep(REST);
    let took = seconds(|| at_once(&five, |name| bench.execute(name, "sleep 1").map(drop)))?;
    rows.push(
        Row::at_most("`sleep 1` in five at once, s", 2.5, took).limited("2.5: it sleeps for 1 s"),
    );
    at_once(&five, |name| bench.delete(name))?;

    let before = bench.daemon.vmm_pss()?;
    let twenty = names("twenty", 20);
    for five in twenty.chunks(5) {
        at_once(five, |name| {
            bench.create(name, 1, 128)?;
            bench.start(name)
        })?;
    }
    let running = bench
        .daemon
        .api("GET", "/vms?status=running&limit=1", None, 200)?;
    let running = running["total"].as_f64().unwrap_or_default();
    rows.push(
        Row::at_least("running at once, of 20 that are tried", 10.0, running)
            .limited("2: there are 20"),
    );
    let memory = benches::sandboxes::growth(&before, &bench.daemon.vmm_pss()?);
    rows.push(Row::at_most(
        "memory of one with 128 MiB on the host (PSS), MB",
        200.0,
        memory * 1.024 / 1000.0 / running,
    ));
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(seconds(|| bench.daemon.api("GET", "/vms", None, 200))? * 1000.0);
    }
    if let Some(summary) = Summary::of(&answers) {
        rows.push(Row::at_most(
            "`GET /vms` meanwhile, median, ms",
            100.0,
            summary.median,
        ));
    }
    Ok(at_once(&twenty, |name| bench.delete(name))?)
}

fn cleanup(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let ten = names("cleanup", 10);
    let (used, busy) = (used_memory_percent()?, host_cpu(REST)?);
    at_once(&ten, |name| {
        bench.create(name, 1, 256)?;
        bench.start(name)
    })?;
    thread::sleep(REST);
    at_once(&ten, |name| bench.stop(name, false))?;
    at_once(&ten, |name| bench.delete(name))?;
    thread::sleep(REST);
    rows.push(Row::at_most(
        "memory of the host after the end of ten, to before: difference, % of all",
        5.0,
        (used_memory_percent()? - used).abs(),
    ));
    rows.push(Row::at_most(
        "CPU of the host after their end, to before: difference, % of all",
        20.0,
        (host_cpu(REST)? - busy).abs(),
    ));
    Ok(())
}

/// Memory of the host that is neither free nor a cache, in percent of all.
fn used_memory_percent() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let field = |name: &str| -> Option<f64> {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.split_whitespace().next()?.parse().ok()
    };
    let used = field("MemTotal:").zip(field("MemAvailable:"));
    let (total, available) = used.ok_or("/proc/meminfo has no MemAvailable")?;
    Ok((total - available) / total * 100.0)
}

/// How long the host is watched.
const REST: Duration = Duration::from_secs(10);

/// Share of the time of the host's CPUs that is spent meanwhile on anything, in percent.
fn host_cpu(during: Duration) -> Result<f64> {
    // proc_stat(5): user, nice, system, idle, iowait and others.
    let times = || -> Result<(f64, f64)> {
        let text = std::fs::read_to_string("/proc/stat")?;
        let all = text.lines().next().unwrap_or_default();
        let times: Vec<f64> = all
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        let idle = times.iter().skip(3).take(2).sum();
        Ok((times.iter().take(8).sum(), idle))
    };
    let (before, idle_before) = times()?;
    thread::sleep(during);
    let (after, idle_after) = times()?;
    let (all, idle) = (after - before, idle_after - idle_before);
    Ok((all - idle) / all.max(1.0) * 100.0)
}

fn cycles(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let five = names("cycle", 5);
    let mut all = Vec::new();
    for _ in 0..3 {
        all.push(seconds(|| {
            at_once(&five, |name| {
                bench.boot(name, 1, 256)?;
                bench.stop(name, false)?;
                bench.delete(name)
            })
        })?);
    }
    let mean = all.iter().sum::<f64>() / 3.0;
    let most = all.iter().copied().fold(0.0, f64::max);
    rows.push(Row::at_most(
        "five from creation to deletion, mean of three times, s",
        30.0,
        mean,
    ));
    rows.push(
        Row::at_most("the longest of the three, to their mean", 1.5, most / mean)
            .limited("1.5: all take the same"),
    );
    Ok(())
}

fn resources(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    bench.boot("memory", 1, 256)?;
    let command = "head -c 200000000 /dev/zero | tail -c 200000000 | wc -c";
    let held = bench.execute("memory", command)?;
    let held = held["stdout"]
        .as_str()
        .unwrap_or_default()
        .trim()
        .parse::<f64>()?;
    rows.push(
        Row::at_least(
            "memory that a program has in 256 MiB, MB",
            200.0,
            held / 1e6,
        )
        .limited("1.3: all of it"),
    );
    let body = json!({"cpu_limit_percent": 50});
    bench
        .daemon
        .api("PUT", "/vms/memory/resources", Some(&body), 200)?;
    let cpu = || -> Result<f64> {
        let metrics = bench.daemon.api("GET", "/vms/memory/metrics", None, 200)?;
        let time = metrics["cpu"]["cpu_time_seconds"].as_f64();
        time.ok_or_else(|| "no cpu_time_seconds".into())
    };
    let before = cpu()?;
    let work = "timeout 10 sh -c 'while :; do :; done' || true";
    let took = seconds(|| bench.execute("memory", work))?;
    let share = (cpu()? - before) / took * 100.0;
    rows.push(
        Row::at_most(
            "CPU that it takes with cpu_limit_percent 50, %",
            70.0,
            share,
        )
        .limited("1.4: it takes its 50 %"),
    );
    bench.delete("memory")?;

    bench.boot("resize", 2, 512)?;
    let resources = "/vms/resize/resources";
    let body = json!({"memory_mb": 1024});
    let took = seconds(|| bench.daemon.api("PUT", resources, Some(&body), 200))?;
    rows.push(Row::at_most("512 to 1024 MiB while it runs, s", 10.0, took));
    // A guest is not at rest as soon as it has its memory.
    thread::sleep(REST);
    let unseen = host_cpu(REST)?;
    let watched = AtomicBool::new(true);
    let seen = thread::scope(|scope| {
        scope.spawn(|| {
            while watched.load(Ordering::Relaxed) {
                let asked = bench.daemon.api("GET", "/system/metrics", None, 200);
                if let Err(error) = asked {
                    eprintln!("bench-thresholds: {}", error_chain(&error));
                }
                thread::sleep(Duration::from_secs(1));
            }
        });
        let seen = host_cpu(REST);
        watched.store(false, Ordering::Relaxed);
        seen
    })?;
    rows.push(Row::at_most(
        "CPU of the host with one machine that rests, % of all",
        5.0,
        unseen,
    ));
    rows.push(Row::at_most(
        "CPU of the host for its own metrics, asked for once a second, % of all",
        5.0,
        (seen - unseen).max(0.0),
    ));
    bench.delete("resize")?;

    let ten = names("metrics", 10);
    at_once(&ten, |name| bench.boot(name, 1, 256).map(drop))?;
    thread::sleep(REST);
    let mut all = 0.0;
    for _ in 0..bench.samples {
        all += seconds(|| {
            at_once(&ten, |name| {
                let path = format!("/vms/{name}/metrics");
                bench.daemon.api("GET", &path, None, 200).map(drop)
            })
        })?;
    }
    let took = all / bench.samples as f64;
    rows.push(Row::at_most("metrics of ten at once, mean, s", 2.0, took));
    rows.push(Row::at_most("a tenth of it, for one, s", 0.1, took / 10.0));
    Ok(at_once(&ten, |name| bench.delete(name))?)
}

fn load(bench: &Bench<'_>, rows: &mut Vec<Row>) -> Result<()> {
    let users = names("user", 10);
    let done = AtomicU32::new(0);
    let count = |result: Result<(), SandboxError>| match result {
        Ok(()) => {
            done.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => eprintln!("bench-thresholds: {}", error_chain(&error)),
    };
    at_once(&users, |name| {
        count(bench.create(name, 1, 128).map(drop));
        count(bench.start(name));
        count(bench.execute(name, "echo ready").map(drop));
        count(bench.stop(name, false));
        count(bench.delete(name));
        Ok(())
    })?;
    let done = f64::from(done.into_inner());
    rows.push(
        Row::at_least(
            "ten users, five operations each: done well, %",
            95.0,
            done * 2.0,
        )
        .limited("1.05: all of them"),
    );
    Ok(())
}
