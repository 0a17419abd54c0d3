//! A running guest: how fast its disk and its sockets are, and how fast the VMM answers its API
//! meanwhile.
//!
//! The guest stays in its initramfs; the one program that it needs beside the agent, busybox, is
//! sent to it. Its disk is a new raw file on the host, cached by the host. What is read and written
//! passes by the guest's own cache (`O_DIRECT`), and is timed by the guest's clock, from the start of
//! `dd` to its exit.
//! Streams are those of an exec, through the agent, and timed by the host's clock. Its network card
//! is on a tap, if one can be made.

use std::{
    fs::File,
    io,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use agent_protocol::READY_PORT;
use serde::Serialize;

use crate::{
    agent,
    api::Api,
    boot::{self, BootError, context_id},
    channel::Channel,
    clock::{self, Moment},
    interrupt,
    network::{self, Seen, Tap},
    peer::{Guest, Peer},
    process::Process,
    rounds::{self, Metric, Rounds, Sample},
    stage::Stage,
    stats::quantile,
};

/// Where busybox is in the guest.
pub(crate) const BUSYBOX: &str = "/busybox";
const DISK: &str = "/dev/vda";
const MIB: u64 = 1 << 20;
/// Guests of this measure have other context ids than those of the measure before.
const FIRST_GUEST: usize = 0x800;
/// The pause between two requests to the API.
const PAUSE: Duration = Duration::from_millis(2);

/// How long a VMM without a machine may take for anything.
const IDLE_LIMIT: Duration = Duration::from_secs(10);

/// How often and with what a guest is put to work.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Rounds; each boots every peer once.
    #[serde(flatten)]
    pub rounds: Rounds,
    /// How long anything may take, in seconds.
    pub time_limit_s: u64,
    /// What is booted.
    pub guest: Guest,
    /// busybox, a static program.
    pub busybox: PathBuf,
    /// What is written and read in large pieces, and sent each way, in MiB.
    pub mib: u64,
    /// How many pieces of 4 KiB are written, and read.
    pub small_requests: u64,
    /// Whether the guest has a network card.
    pub network: bool,
}

/// What was seen of a guest and its VMM.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// What the API's answers took from the start of the process until the agent's line was
    /// here, in µs.
    pub api_booting_us: Vec<f64>,
    /// The same while the guest worked.
    pub api_working_us: Vec<f64>,
    /// Writing 1 MiB at a time, in MiB/s.
    pub disk_write: f64,
    /// Reading 1 MiB at a time, in MiB/s.
    pub disk_read: f64,
    /// Writing 4 KiB at a time, in requests a second.
    pub disk_write_small: f64,
    /// Reading 4 KiB at a time, in requests a second.
    pub disk_read_small: f64,
    /// From the host to a program of the guest, in MiB/s.
    pub to_guest: f64,
    /// From a program of the guest to the host, in MiB/s.
    pub from_guest: f64,
    /// What its network card does; `None` if it has none.
    #[serde(flatten)]
    pub network: Option<Seen>,
}

const fn metric(
    name: &'static str,
    title: &'static str,
    unit: &'static str,
    of: fn(&Run) -> Option<f64>,
) -> Metric<Run> {
    Metric {
        name,
        title,
        unit,
        of,
    }
}

/// All that a run says.
pub const METRICS: [Metric<Run>; 13] = [
    metric(
        "api_booting_p50",
        "API during the boot, median",
        "µs",
        |run| percentile(&run.api_booting_us, 0.5),
    ),
    metric("api_booting_p99", "API during the boot, p99", "µs", |run| {
        percentile(&run.api_booting_us, 0.99)
    }),
    metric(
        "api_working_p50",
        "API while the guest works, median",
        "µs",
        |run| percentile(&run.api_working_us, 0.5),
    ),
    metric(
        "api_working_p99",
        "API while the guest works, p99",
        "µs",
        |run| percentile(&run.api_working_us, 0.99),
    ),
    metric(
        "disk_write",
        "disk: write, 1 MiB at a time",
        "MiB/s",
        |run| Some(run.disk_write),
    ),
    metric("disk_read", "disk: read, 1 MiB at a time", "MiB/s", |run| {
        Some(run.disk_read)
    }),
    metric(
        "disk_write_small",
        "disk: write, 4 KiB at a time",
        "1/s",
        |run| Some(run.disk_write_small),
    ),
    metric(
        "disk_read_small",
        "disk: read, 4 KiB at a time",
        "1/s",
        |run| Some(run.disk_read_small),
    ),
    metric(
        "to_guest",
        "vsock: host → program in the guest",
        "MiB/s",
        |run| Some(run.to_guest),
    ),
    metric(
        "from_guest",
        "vsock: program in the guest → host",
        "MiB/s",
        |run| Some(run.from_guest),
    ),
    metric(
        "net_to_guest",
        "TCP: host → program in the guest",
        "MiB/s",
        |run| Some(run.network?.to_guest),
    ),
    metric(
        "net_from_guest",
        "TCP: program in the guest → host",
        "MiB/s",
        |run| Some(run.network?.from_guest),
    ),
    metric(
        "net_round_trip",
        "ping: guest → host → guest",
        "µs",
        |run| Some(run.network?.round_trip_us),
    ),
];

/// The quantile `q` (0 to 1) of `samples`; `None` if there are none.
pub fn percentile(samples: &[f64], q: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    (!sorted.is_empty()).then(|| quantile(&sorted, q))
}

/// Why a run gave no sample.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The guest did not come up.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// No file for its disk.
    #[error("cannot make its disk")]
    Disk(#[source] io::Error),
    /// No tap for its network card.
    #[error("cannot make a tap")]
    Tap(#[source] io::Error),
    /// busybox cannot be read, or sent.
    #[error("cannot send busybox")]
    Busybox(#[source] io::Error),
    /// The API did not answer.
    #[error("asking the VMM")]
    Api(#[source] io::Error),
    /// A program in the guest failed.
    #[error("{what}")]
    Work {
        /// What it was to do.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// Puts guests of `peers` to work as `plan` says, and tells `progress` each sample as it comes.
///
/// A run that fails is a sample too. `None` if a signal ended the measure early.
pub fn measure(
    peers: &[Peer],
    plan: &Plan,
    stage: &Stage,
    progress: impl FnMut(&Sample<Run>),
) -> Option<Vec<Sample<Run>>> {
    let take = |peer: &Peer, number| run(peer, plan, context_id(FIRST_GUEST + number), stage);
    rounds::measure(peers, plan.rounds, take, progress)
}

fn run(peer: &Peer, plan: &Plan, cid: u32, stage: &Stage) -> Result<Run, RunError> {
    let directory = tempfile::tempdir_in(stage.directory()).map_err(BootError::Directory)?;
    let directory = directory.path();
    let disk = directory.join("disk");
    File::create_new(&disk)
        .and_then(|file| file.set_len(plan.mib * MIB))
        .map_err(RunError::Disk)?;
    let made = if plan.network {
        Tap::new().map(Some)
    } else {
        Ok(None)
    };
    let tap = made.map_err(RunError::Tap)?;
    let guest = Guest {
        data: Some(disk),
        tap: tap.as_ref().map(|tap| tap.name().to_owned()),
        api: true,
        ..plan.guest.clone()
    };
    let program = std::fs::read(&plan.busybox).map_err(RunError::Busybox)?;
    let limit = Duration::from_secs(plan.time_limit_s);
    let channel = peer.channel(directory, cid);
    let listener = channel.listen(READY_PORT).map_err(BootError::Listen)?;
    let mut command = peer.boot(&guest, directory, cid);
    let deadline = clock::now() + limit;
    let mut process = Process::start(&mut command, directory).map_err(BootError::Start)?;

    let api = peer.api(directory);
    let (booted, api_booting_us) = while_asked(&api, deadline, || {
        boot::await_ready(&mut process, peer, &listener, deadline, limit)
    });
    booted?;
    agent::install(&channel, BUSYBOX, &program, limit).map_err(RunError::Busybox)?;
    let work = Work {
        channel: &channel,
        plan,
        limit,
    };
    let (worked, api_working_us) = while_asked(&api, clock::now() + limit, || work.all());
    let run = worked?;
    Ok(Run {
        api_booting_us: api_booting_us.map_err(RunError::Api)?,
        api_working_us: api_working_us.map_err(RunError::Api)?,
        ..run
    })
}

/// What `act` returns, and what each answer of `api` took meanwhile, in µs.
fn while_asked<T>(
    api: &Api,
    deadline: Moment,
    act: impl FnOnce() -> T,
) -> (T, io::Result<Vec<f64>>) {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| ask(api, deadline, &is_over));
        let result = act();
        is_over.store(true, Ordering::Relaxed);
        let failed = || Err(io::Error::other("the thread that asks failed"));
        (result, asking.join().unwrap_or_else(|_| failed()))
    })
}

/// What `count` answers of our VMM `peer` took, in µs, when it has no machine. It needs no KVM.
///
/// # Errors
/// The VMM does not start, or does not answer.
pub fn idle_api(peer: &Peer, count: usize, stage: &Stage) -> Result<Vec<f64>, RunError> {
    let directory = tempfile::tempdir_in(stage.directory()).map_err(BootError::Directory)?;
    let directory = directory.path();
    let mut command = peer.without_machine(directory);
    let _process = Process::start(&mut command, directory).map_err(BootError::Start)?;
    let deadline = clock::now() + IDLE_LIMIT;
    let mut client = loop {
        match peer.api(directory).connect(IDLE_LIMIT) {
            Ok(client) => break client,
            // The VMM has to make its socket first.
            Err(error) if clock::now() > deadline => return Err(RunError::Api(error)),
            Err(_) => thread::sleep(PAUSE),
        }
    };
    (0..count)
        .map(|_| Ok(client.ask().map_err(RunError::Api)?.as_secs_f64() * 1e6))
        .collect()
}

fn ask(api: &Api, deadline: Moment, is_over: &AtomicBool) -> io::Result<Vec<f64>> {
    let goes_on =
        || !is_over.load(Ordering::Relaxed) && !interrupt::interrupted() && clock::now() < deadline;
    let left = deadline.saturating_sub(clock::now());
    let mut took = Vec::new();
    let mut client = None;
    while goes_on() {
        match &mut client {
            // The VMM has to make its socket first.
            None => client = api.connect(left).ok(),
            Some(client) => took.push(client.ask()?.as_secs_f64() * 1e6),
        }
        thread::sleep(PAUSE);
    }
    Ok(took)
}

/// A guest that is put to work.
struct Work<'a> {
    channel: &'a Channel,
    plan: &'a Plan,
    limit: Duration,
}

impl Work<'_> {
    fn all(&self) -> Result<Run, RunError> {
        let (mib, small) = (self.plan.mib, self.plan.small_requests);
        let write = |size: &str, count: u64| {
            let count = format!("count={count}");
            let to = format!("of={DISK}");
            let argv = ["if=/dev/zero", &to, size, &count, "oflag=direct"];
            self.dd("writing the disk", &argv)
        };
        let read = |size: &str, count: u64| {
            let count = format!("count={count}");
            let from = format!("if={DISK}");
            let argv = [from.as_str(), "of=/dev/null", size, &count, "iflag=direct"];
            self.dd("reading the disk", &argv)
        };
        Ok(Run {
            api_booting_us: Vec::new(),
            api_working_us: Vec::new(),
            disk_write: mib as f64 / write("bs=1M", mib)?,
            disk_read: mib as f64 / read("bs=1M", mib)?,
            disk_write_small: small as f64 / write("bs=4k", small)?,
            disk_read_small: small as f64 / read("bs=4k", small)?,
            to_guest: self.send()?,
            from_guest: self.receive()?,
            network: self.network()?,
        })
    }

    fn network(&self) -> Result<Option<Seen>, RunError> {
        let plan = self.plan;
        let used = plan.network.then(|| {
            network::measure(self.channel, plan.mib, plan.small_requests / 10, self.limit)
        });
        used.transpose().map_err(|source| RunError::Work {
            what: "using the network card",
            source,
        })
    }

    /// Runs dd, and returns the seconds that it took.
    fn dd(&self, what: &'static str, arguments: &[&str]) -> Result<f64, RunError> {
        let argv = [&[BUSYBOX, "dd"], arguments].concat();
        let ran = agent::run(self.channel, &argv, 0, self.limit);
        let ran = ran.map_err(|source| RunError::Work { what, source })?;
        Ok(ran.took_in_guest.as_secs_f64())
    }

    /// To the guest, in MiB/s.
    fn send(&self) -> Result<f64, RunError> {
        let bytes = self.plan.mib * MIB;
        let failed = |source| RunError::Work {
            what: "sending to the guest",
            source,
        };
        let ran = agent::run(self.channel, &[BUSYBOX, "wc", "-c"], bytes, self.limit);
        let ran = ran.map_err(failed)?;
        let count = String::from_utf8_lossy(&ran.said).trim().to_owned();
        if count != bytes.to_string() {
            let what = format!("{count} of {bytes} bytes have arrived");
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(self.plan.mib as f64 / ran.took.as_secs_f64())
    }

    /// From the guest, in MiB/s.
    fn receive(&self) -> Result<f64, RunError> {
        let bytes = self.plan.mib * MIB;
        let failed = |source| RunError::Work {
            what: "receiving from the guest",
            source,
        };
        let size = bytes.to_string();
        let argv = [BUSYBOX, "head", "-c", &size, "/dev/zero"];
        let ran = agent::run(self.channel, &argv, 0, self.limit).map_err(failed)?;
        if ran.written != bytes {
            let what = format!("{} of {bytes} bytes have arrived", ran.written);
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        Ok(self.plan.mib as f64 / ran.took.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_all_answers_of_one_run() {
        let samples: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.5), Some(50.0));
        assert_eq!(percentile(&samples, 0.99), Some(99.0));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
