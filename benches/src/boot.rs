//! Cold boot: from the start of a VMM's process until its guest's agent answers.
//!
//! ```text
//! process start ─▶ first guest instruction ─▶ kernel's clock ─▶ agent starts ─▶ agent serves
//!   └──────────────────────── host's clock ────────────────────────────────▶ Ready ─▶ request
//!                                                                           arrives   answered
//! ```
//!
//! The host's clock gives the moment before the process is started, that of the first entry into
//! the guest ([`trace`](crate::trace)), that at which the agent's line `Ready` is here, and that
//! at which its answer to a first request is. The guest's clock gives, in that line, when the
//! agent began and when it served. Nothing is polled: the harness sleeps until the next of these.
//!
//! The two clocks are joined at `Ready`: what the guest's clock had not yet counted when the line
//! arrived lies between the first instruction and the start of the kernel's clock. The line's own
//! way to the host is in there too.

use std::{io, os::fd::AsFd, time::Duration};

use agent_protocol::{AGENT_PORT, Health, PATH_HEALTH, READY_PORT, Ready};
use serde::Serialize;

use crate::{
    agent::get,
    channel::{self, Channel, Listener},
    clock::{self, Moment, millis_between},
    memory::{self, Overhead, OverheadError},
    peer::{Guest, Peer},
    process::{Process, StartError, WaitError},
    rounds::{self, Metric, Rounds, Sample},
    stage::Stage,
    trace::{TraceError, Tracer},
};

/// The longest `Ready` that makes sense, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// How often and with what guests are booted.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// Rounds; each boots every peer once.
    #[serde(flatten)]
    pub rounds: Rounds,
    /// How long a boot may take, in seconds.
    pub time_limit_s: u64,
    /// What is booted.
    pub guest: Guest,
}

/// What was seen of a boot. Times of the host's clock count from the start of the process.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Boot {
    /// The first entry into the guest, in ms; `None` without tracing.
    pub first_entry_ms: Option<f64>,
    /// The arrival of the VMM's own first event, in ms; `None` if it reports none.
    pub booting_event_ms: Option<f64>,
    /// The arrival of `Ready`, in ms.
    pub ready_ms: f64,
    /// The arrival of the answer to the first request, in ms.
    pub answered_ms: f64,
    /// When the agent began, in ms of the guest's clock.
    pub agent_entered_ms: f64,
    /// When the agent served, in ms of the guest's clock.
    pub agent_serving_ms: f64,
    /// The VMM's memory beyond the guest's, once it has answered.
    pub overhead: Overhead,
}

/// All that a boot says: the phases in order, their sum, the VMM's own word, and memory.
pub const METRICS: [Metric<Boot>; 9] = [
    Metric {
        name: "first_instruction",
        title: "process start → first guest instruction",
        unit: "ms",
        of: |boot| boot.first_entry_ms,
    },
    Metric {
        name: "kernel_clock",
        title: "→ kernel's clock runs",
        unit: "ms",
        of: |boot| Some(boot.ready_ms - boot.agent_serving_ms - boot.first_entry_ms?),
    },
    Metric {
        name: "userspace",
        title: "→ userspace (agent starts)",
        unit: "ms",
        of: |boot| Some(boot.agent_entered_ms),
    },
    Metric {
        name: "agent_serving",
        title: "→ agent serves",
        unit: "ms",
        of: |boot| Some(boot.agent_serving_ms - boot.agent_entered_ms),
    },
    Metric {
        name: "first_request",
        title: "→ first request answered",
        unit: "ms",
        of: |boot| Some(boot.answered_ms - boot.ready_ms),
    },
    Metric {
        name: "answered",
        title: "process start → agent answers",
        unit: "ms",
        of: |boot| Some(boot.answered_ms),
    },
    Metric {
        name: "booting_event",
        title: "process start → its own event `booting`",
        unit: "ms",
        of: |boot| boot.booting_event_ms,
    },
    Metric {
        name: "rss",
        title: "RSS beyond guest memory",
        unit: "MiB",
        of: |boot| Some(boot.overhead.rss_kib as f64 / 1024.0),
    },
    Metric {
        name: "pss",
        title: "PSS beyond guest memory",
        unit: "MiB",
        of: |boot| Some(boot.overhead.pss_kib as f64 / 1024.0),
    },
];

/// Why a boot gave no sample.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No directory for its files.
    #[error("cannot make a directory for its files")]
    Directory(#[source] io::Error),
    /// No way for the agent to say that it is ready.
    #[error("cannot listen on port {READY_PORT} of the host")]
    Listen(#[source] io::Error),
    /// The VMM did not start.
    #[error("cannot start the VMM")]
    Start(#[from] StartError),
    /// The agent did not become ready.
    #[error("waiting for the agent")]
    Wait(#[from] WaitError),
    /// The agent's line did not come, or made no sense.
    #[error("reading the agent's line on port {READY_PORT}")]
    Ready(#[source] io::Error),
    /// The agent did not answer as it should.
    #[error("asking the agent for {PATH_HEALTH}")]
    Request(#[source] io::Error),
    /// No first entry was found.
    #[error("the trace has no entry into the guest")]
    NoEntry,
    /// Tracing failed.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The VMM's memory is not known.
    #[error(transparent)]
    Overhead(#[from] OverheadError),
}

/// Boots `peers` as `plan` says, and tells `progress` each sample as it comes.
///
/// A boot that fails is a sample too. `None` if a signal ended the measure early.
pub fn measure(
    peers: &[Peer],
    plan: &Plan,
    stage: &Stage,
    tracer: Option<&Tracer>,
    progress: impl FnMut(&Sample<Boot>),
) -> Option<Vec<Sample<Boot>>> {
    let take = |peer: &Peer, number| boot(peer, plan, context_id(number), stage, tracer);
    rounds::measure(peers, plan.rounds, take, progress)
}

/// A context id that no other guest of this host has: vhost takes each once, and a guest that
/// has just ended may still hold its own.
pub(crate) fn context_id(boots: usize) -> u32 {
    // 0 to 2 are taken by the standard (virtio 1.2, 5.10.4), and small ones by whoever counts up.
    let first = 0x4000_0000 + (std::process::id() % 0x1_0000) * 0x1000;
    first + (boots % 0x1000) as u32
}

fn boot(
    peer: &Peer,
    plan: &Plan,
    cid: u32,
    stage: &Stage,
    tracer: Option<&Tracer>,
) -> Result<Boot, BootError> {
    let directory = tempfile::tempdir_in(stage.directory()).map_err(BootError::Directory)?;
    let channel = peer.channel(directory.path(), cid);
    let listener = channel.listen(READY_PORT).map_err(BootError::Listen)?;
    let mut command = peer.boot(&plan.guest, directory.path(), cid);
    if let Some(tracer) = tracer {
        tracer.clear()?;
    }
    let limit = Duration::from_secs(plan.time_limit_s);

    let start = clock::now();
    let mut process = Process::start(&mut command, directory.path())?;
    let arrival = await_ready(&mut process, peer, &listener, start + limit, limit)?;
    let answered = ask_for_health(&channel, limit).map_err(BootError::Request)?;

    let overhead = memory::overhead(process.id(), plan.guest.memory_mib * 1024)?;
    drop(process);
    let first_entry = match tracer {
        Some(tracer) => Some(tracer.first_entry()?.ok_or(BootError::NoEntry)?),
        None => None,
    };
    let millis = |moment| millis_between(start, moment);
    Ok(Boot {
        first_entry_ms: first_entry.map(millis),
        booting_event_ms: arrival.booting_event.map(millis),
        ready_ms: millis(arrival.at),
        answered_ms: millis(answered),
        agent_entered_ms: arrival.ready.entered_us as f64 / 1e3,
        agent_serving_ms: arrival.ready.serving_us as f64 / 1e3,
        overhead,
    })
}

/// The agent's line.
pub(crate) struct Arrival {
    at: Moment,
    ready: Ready,
    booting_event: Option<Moment>,
}

/// Waits for the agent's line, and notes when the VMM's first event comes.
pub(crate) fn await_ready(
    process: &mut Process,
    peer: &Peer,
    listener: &Listener,
    deadline: Moment,
    limit: Duration,
) -> Result<Arrival, BootError> {
    let events = process.take_stdout();
    let mut booting_event = None;
    let mut stream = loop {
        let mut wanted = vec![listener.as_fd()];
        if let Some(events) = &events
            && peer.reports_events()
            && booting_event.is_none()
        {
            wanted.push(events.as_fd());
        }
        match process.wait_for(&wanted, deadline)? {
            0 => match listener.accept(limit).map_err(BootError::Ready)? {
                Some(stream) => break stream,
                None => continue,
            },
            _ => booting_event = Some(clock::now()),
        }
    };
    process.wait_for(&[stream.as_fd()], deadline)?;
    let line = channel::read_line(&mut stream, MAX_MESSAGE).map_err(BootError::Ready)?;
    let at = clock::now();
    let ready = serde_json::from_slice(&line).map_err(|e| BootError::Ready(e.into()))?;
    Ok(Arrival {
        at,
        ready,
        booting_event,
    })
}

/// Makes one request to the agent; when its answer was here.
fn ask_for_health(channel: &Channel, limit: Duration) -> io::Result<Moment> {
    let mut stream = channel.connect(AGENT_PORT, limit)?;
    let body = get(&mut stream, PATH_HEALTH)?;
    let answered = clock::now();
    serde_json::from_slice::<Health>(&body)?;
    Ok(answered)
}

#[cfg(test)]
mod tests {
    use std::{
        collections::HashSet,
        fs,
        io::Write,
        os::unix::{fs::PermissionsExt, net::UnixStream},
        thread,
    };

    use super::*;
    use crate::rounds::Outcome;

    const READY: &str =
        r#"{"version":"0","kernel":"6.12","entered_us":700000,"serving_us":712500}"#;

    #[test]
    fn the_phases_add_up_to_the_whole() {
        let boot = Boot {
            first_entry_ms: Some(10.0),
            booting_event_ms: None,
            ready_ms: 100.0,
            answered_ms: 104.0,
            agent_entered_ms: 60.0,
            agent_serving_ms: 65.0,
            overhead: Overhead {
                rss_kib: 2048,
                pss_kib: 1024,
            },
        };
        let value = |metric: &Metric<Boot>| (metric.of)(&boot).unwrap();
        let phases: Vec<f64> = METRICS[..5].iter().map(value).collect();
        assert_eq!(phases, [10.0, 25.0, 60.0, 5.0, 4.0]);
        assert_eq!(METRICS[5].name, "answered");
        assert_eq!(phases.iter().sum::<f64>(), value(&METRICS[5]));
        assert_eq!((value(&METRICS[7]), value(&METRICS[8])), (2.0, 1.0));

        let untraced = Boot {
            first_entry_ms: None,
            ..boot
        };
        assert_eq!((METRICS[0].of)(&untraced), None);
        assert_eq!((METRICS[1].of)(&untraced), None);
    }

    #[test]
    fn context_ids_differ_from_boot_to_boot() {
        let ids: HashSet<u32> = (0..1000).map(context_id).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|&id| id > 2 && id < u32::MAX));
    }

    /// A program in the place of our VMM.
    fn peer(stage: &Stage, script: &str) -> Peer {
        let program = stage.directory().join("script");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Peer::vmm(&program, stage).unwrap()
    }

    fn plan(rounds: usize) -> Plan {
        Plan {
            rounds: Rounds {
                rounds,
                warmup_rounds: 1,
                seed: 1,
            },
            time_limit_s: 60,
            guest: Guest {
                kernel: "/kernel".into(),
                initramfs: "/initramfs".into(),
                rootfs: None,
                data: None,
                tap: None,
                api: false,
                cmdline: String::new(),
                memory_mib: 256,
            },
        }
    }

    #[test]
    fn a_failed_boot_is_a_sample_that_says_why() {
        let stage = Stage::new().unwrap();
        let script = "[ $# = 1 ] && exit\necho vmm: no such kernel >&2; exit 2";
        let peers = [peer(&stage, script)];
        let mut seen = 0;
        let samples = measure(&peers, &plan(2), &stage, None, |_| seen += 1).unwrap();
        assert_eq!((samples.len(), seen), (3, 3));
        assert!(samples[0].warmup && !samples[1].warmup && !samples[2].warmup);
        for sample in samples {
            let Outcome::Error(error) = sample.outcome else {
                panic!("booted");
            };
            assert!(error.contains("no such kernel"), "{error}");
        }
    }

    #[test]
    fn the_agents_line_is_awaited_together_with_the_first_event() {
        let stage = Stage::new().unwrap();
        let script = r#"[ $# = 1 ] && exit; echo '{"event":"booting"}'; exec sleep 600"#;
        let peer = peer(&stage, script);
        let directory = tempfile::tempdir().unwrap();
        let channel = peer.channel(directory.path(), 3);
        let listener = channel.listen(READY_PORT).unwrap();
        let mut command = peer.boot(&plan(1).guest, directory.path(), 3);
        let mut process = Process::start(&mut command, directory.path()).unwrap();
        let path = directory.path().join("vsock_1025");
        let guest = thread::spawn(move || {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(format!("{READY}\n").as_bytes()).unwrap();
        });
        let limit = Duration::from_secs(60);
        let deadline = clock::now() + limit;
        let arrival = await_ready(&mut process, &peer, &listener, deadline, limit).unwrap();
        guest.join().unwrap();
        assert_eq!(arrival.ready.serving_us, 712_500);
        assert!(arrival.at < deadline);
    }
}
