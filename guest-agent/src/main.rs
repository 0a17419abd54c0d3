//! The guest agent: process 1 of every guest.
//!
//! Started by the kernel as `/init` of an initramfs, it sets the guest up ([`init`]) and serves
//! the host over vsock ([`server`]). Started with `--listen unix:PATH` it serves the same over a
//! UNIX socket, without touching the system: so programs that talk to it can be tested without a
//! virtual machine.
//!
//! Everything runs on one thread, except for reads and writes of files, which may block.

mod body;
mod boot_id;
mod connect;
mod connections;
mod exec;
mod files;
mod freeze;
mod host_clock;
mod identity;
mod init;
mod log;
mod network;
mod process;
mod reaper;
mod server;
mod shutdown;
mod system;
mod usage;
mod users;
mod vsock;

use std::{
    cell::Cell,
    future::Future,
    io,
    io::Write,
    path::PathBuf,
    process::ExitCode,
    rc::Rc,
    sync::{Arc, Mutex},
};

use agent_protocol::{AGENT_PORT, READY_PORT, Ready};
use exec::Cgroups;
use log::{chain, info, warning};
use reaper::Reaper;
use server::Agent;
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    task::LocalSet,
};

const USAGE: &str = "\
usage: guest-agent --listen unix:PATH [--cgroup DIRECTORY]
       guest-agent --version | --help

Serves the agent's protocol on a UNIX socket. Programs run and files are read and
written on this system, as this user; the system itself is not touched. SIGTERM and
SIGINT end the agent.

  --listen unix:PATH    the socket to make; what is there already is an error. One
                        line of JSON on standard output says when it is served
  --cgroup DIRECTORY    put each exec in a cgroup of its own below this directory,
                        which is made in a cgroup v2 file system

As process 1 without --listen it sets up a guest and serves on vsock port 1024.
";

/// How many file operations may block at once; more wait for their turn.
const BLOCKING_THREADS: usize = 8;
/// Stack of a thread for blocking work, in bytes. Nothing there recurses.
const BLOCKING_STACK: usize = 128 * 1024;
/// Blocks of memory of this size and above go back to the system when they are freed.
const MMAP_THRESHOLD: i32 = 32 * 1024;

fn main() -> ExitCode {
    let entered_us = system::boottime_us();
    // SAFETY: sets limits of the allocator, before there are other threads. One arena is enough
    // for one thread that works and a few that wait for disks.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MMAP_THRESHOLD);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    // The kernel passes words of its command line that it does not know to its first process.
    let as_init = std::process::id() == 1 && !arguments.iter().any(|arg| arg == "--listen");
    let result = if as_init {
        run_as_init(entered_us)
    } else {
        match parse(&arguments) {
            Ok(Command::Serve { socket, cgroup }) => run_on_socket(socket, cgroup, entered_us),
            Ok(Command::Print(text)) => {
                print!("{text}");
                return ExitCode::SUCCESS;
            }
            Err(message) => {
                eprint!("guest-agent: {message}\n\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // As process 1, ending makes the kernel panic, which the monitor of the machine sees.
        Err(error) => {
            log::write(log::Level::Emergency, format_args!("{}", chain(&*error)));
            ExitCode::FAILURE
        }
    }
}

enum Command {
    Serve {
        socket: PathBuf,
        cgroup: Option<PathBuf>,
    },
    Print(String),
}

fn parse(arguments: &[String]) -> Result<Command, String> {
    let (mut socket, mut cgroup) = (None, None);
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--help" | "-h" => return Ok(Command::Print(USAGE.to_owned())),
            "--version" | "-V" => {
                let version = env!("CARGO_PKG_VERSION");
                return Ok(Command::Print(format!("guest-agent {version}\n")));
            }
            "--listen" => match value()?.strip_prefix("unix:") {
                Some(path) if !path.is_empty() => socket = Some(PathBuf::from(path)),
                _ => return Err("--listen takes unix:PATH".to_owned()),
            },
            "--cgroup" => cgroup = Some(PathBuf::from(value()?)),
            _ => return Err(format!("unknown argument {argument:?}")),
        }
    }
    match socket {
        Some(socket) => Ok(Command::Serve { socket, cgroup }),
        None => Err("nothing to listen on".to_owned()),
    }
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Serves as the first process of a guest; does not return but to fail.
fn run_as_init(entered_us: u64) -> Outcome {
    init::run()?;
    let added_cpus = init::online_cpus();
    let cgroups = Cgroups::new(init::CGROUPS.as_ref())
        .inspect_err(|error| warning!("no cgroups for execs: {error}"))
        .ok();
    block_on(async {
        let listener = vsock::Listener::bind(AGENT_PORT)?;
        tokio::task::spawn_local(report_ready(entered_us));
        tokio::task::spawn_local(async {
            let followed = async { init::online_added_cpus(added_cpus?).await };
            if let Err(error) = followed.await {
                warning!("CPUs that are added will not be used: {error}");
            }
        });
        let (reaper, reaping) = Reaper::start()?;
        let agent = Rc::new(Agent {
            reaper,
            cgroups,
            init: true,
            execs: Cell::new(0),
            processes: Rc::default(),
            connections: Rc::default(),
            itself: Arc::new(Mutex::new(identity::Itself::of_guest())),
        });
        tokio::select! {
            result = reaping => result?,
            () = accept(&agent, || listener.accept()) => {}
            result = shut_down_on_signal(&agent) => result?,
        }
        Ok(())
    })
}

/// Serves on a UNIX socket until a signal says stop.
fn run_on_socket(socket: PathBuf, cgroup: Option<PathBuf>, entered_us: u64) -> Outcome {
    use tokio::signal::unix::{SignalKind, signal};
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let cgroups = cgroup.map(|path| Cgroups::new(&path)).transpose()?;
    block_on(async {
        let (mut terminate, mut interrupt) = (
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        );
        let listener = UnixListener::bind(&socket)?;
        let mut stdout = io::stdout().lock();
        stdout.write_all(&ready_line(entered_us)?)?;
        stdout.flush()?;
        drop(stdout);
        let (reaper, reaping) = Reaper::start()?;
        let agent = Rc::new(Agent {
            reaper,
            cgroups,
            init: false,
            execs: Cell::new(0),
            processes: Rc::default(),
            connections: Rc::default(),
            itself: Arc::default(),
        });
        let next = || async { listener.accept().await.map(|(stream, _)| stream) };
        tokio::select! {
            result = reaping => result?,
            () = accept(&agent, next) => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        std::fs::remove_file(&socket)?;
        Ok(())
    })
}

fn block_on(work: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(BLOCKING_STACK)
        .build()?;
    LocalSet::new().block_on(&runtime, work)
}

async fn accept<F: Future<Output = io::Result<UnixStream>>>(
    agent: &Rc<Agent>,
    mut next: impl FnMut() -> F,
) {
    loop {
        match next().await {
            Ok(connection) => {
                tokio::task::spawn_local(agent.clone().serve(connection));
            }
            Err(error) => server::after_failed_accept(&error).await,
        }
    }
}

async fn shut_down_on_signal(agent: &Agent) -> io::Result<()> {
    loop {
        let action = shutdown::requested().await?;
        shutdown::run(action, shutdown::DEFAULT_GRACE, &agent.reaper).await;
    }
}

fn ready_line(entered_us: u64) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Ready {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: system::kernel_release(),
        entered_us,
        serving_us: system::boottime_us(),
    })?;
    line.push(b'\n');
    Ok(line)
}

/// Tells the host that the agent serves. A host that does not listen does not want to know.
async fn report_ready(entered_us: u64) {
    let report = async {
        let mut connection = vsock::connect_to_host(READY_PORT).await?;
        connection.write_all(&ready_line(entered_us)?).await?;
        connection.shutdown().await
    };
    match report.await {
        Ok(()) => info!("serving on vsock port {AGENT_PORT}"),
        Err(error) => info!("serving on vsock port {AGENT_PORT}; nobody waits for it: {error}"),
    }
}
