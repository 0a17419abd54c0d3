//! What a measure found: as JSON with every sample, and as a table.

use std::{collections::BTreeMap, fmt::Write, fs, io, path::Path};

use serde::Serialize;

use crate::{
    boot::{self, Boot},
    machine::Machine,
    peer::VMM,
    random::Random,
    rounds::{Metric, Outcome, Rounds, Sample},
    running::{self, Run},
    stats::{MIN_ROUNDS, Ratio, Summary, Verdict},
};

/// Version of the JSON's shape.
pub const FORMAT: u32 = 2;

/// All that was measured in one run.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Version of this shape, [`FORMAT`].
    pub format: u32,
    /// What was built, as git names it; `None` if nobody said.
    pub commit: Option<String>,
    /// What it ran on.
    pub machine: Machine,
    /// Who took part, or why not.
    pub peers: Vec<PeerRecord>,
    /// How first instructions were timed, or why they were not.
    pub first_instruction: String,
    /// From start to answer.
    pub cold_boot: Measure<boot::Plan, Boot>,
    /// What a running guest and its VMM do; `None` if it was not measured.
    pub running: Option<Measure<running::Plan, Run>>,
}

/// One measure.
#[derive(Debug, Serialize)]
pub struct Measure<P, T: 'static> {
    /// How it was done.
    pub plan: P,
    /// Every sample, in the order in which they were taken.
    pub samples: Vec<Sample<T>>,
    /// What they say together; the warm-up does not count.
    pub metrics: Vec<MetricRecord>,
    #[serde(skip)]
    titles: &'static [Metric<T>],
}

/// A peer that took part, or was to.
#[derive(Debug, Clone, Serialize)]
pub struct PeerRecord {
    /// Its name.
    pub name: &'static str,
    /// What it says of its version, or why it did not take part.
    #[serde(flatten)]
    pub state: PeerState,
}

/// Whether a peer took part.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerState {
    /// It did; its version.
    Version(String),
    /// It did not; why.
    NotAvailable(String),
}

/// What the samples say of one metric.
#[derive(Debug, Serialize)]
pub struct MetricRecord {
    /// Its name.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// By peer; one without a sample is left out.
    pub peers: BTreeMap<&'static str, Summary>,
    /// Our VMM's median by the other peer's, by that peer.
    pub ratios: BTreeMap<&'static str, Ratio>,
}

impl Results {
    /// The tables, and what they say in words.
    pub fn table(&self) -> String {
        let mut text = self.heading();
        let memory = self.cold_boot.plan.guest.memory_mib;
        let root = match self.cold_boot.plan.guest.rootfs {
            Some(_) => "root disk",
            None => "initramfs only",
        };
        line(
            &mut text,
            format_args!(
                "\nCold boot: {}; 1 vCPU, {memory} MiB, {root}\nfirst instruction: {}",
                describe(self.cold_boot.plan.rounds),
                self.first_instruction
            ),
        );
        text.push_str(&self.cold_boot.table(&self.peers));
        if let Some(running) = &self.running {
            let plan = &running.plan;
            line(
                &mut text,
                format_args!(
                    "\nRunning: {}; 1 vCPU, {memory} MiB; {} MiB in large pieces, {} small ones",
                    describe(plan.rounds),
                    plan.mib,
                    plan.small_requests
                ),
            );
            text.push_str(&running.table(&self.peers));
        }
        text
    }

    /// How many samples of `peer` failed, those of warm-ups included.
    pub fn failed(&self, peer: &str) -> usize {
        let running = self.running.as_ref().map(|running| running.failed(peer));
        self.cold_boot.failed(peer) + running.unwrap_or(0)
    }

    fn heading(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "machine: {}, {} CPUs, {} MiB, Linux {}, load {:.1}\n\
             KVM here: {}\n\
             commit: {}\n",
            machine.cpu,
            machine.cores,
            machine.memory_mib,
            machine.kernel,
            machine.load,
            machine.virtualization.describe(),
            self.commit.as_deref().unwrap_or("unknown"),
        );
        for peer in &self.peers {
            let (what, value) = match &peer.state {
                PeerState::Version(version) => ("", version),
                PeerState::NotAvailable(why) => ("peer not available: ", why),
            };
            line(&mut text, format_args!("{}: {what}{value}", peer.name));
        }
        text
    }
}

fn describe(rounds: Rounds) -> String {
    let Rounds {
        rounds,
        warmup_rounds,
        seed,
    } = rounds;
    format!("{rounds} rounds after {warmup_rounds} of warm-up, seed {seed}")
}

impl<P, T> Measure<P, T> {
    /// Condenses `samples`, taken with the seed `seed`.
    pub fn new(
        plan: P,
        seed: u64,
        titles: &'static [Metric<T>],
        peers: &[PeerRecord],
        samples: Vec<Sample<T>>,
    ) -> Self {
        // Not the generator of the order, which a change of the statistics must not touch.
        let mut random = Random::new(seed);
        let metrics = titles
            .iter()
            .map(|metric| record(metric, peers, &samples, &mut random))
            .collect();
        Self {
            plan,
            samples,
            metrics,
            titles,
        }
    }

    fn table(&self, peers: &[PeerRecord]) -> String {
        let mut text = self.summaries(peers);
        text.push_str(&self.comparisons());
        text.push_str(&self.failures());
        text
    }

    /// How many samples of `peer` failed, the warm-up included.
    fn failed(&self, peer: &str) -> usize {
        self.errors()
            .filter(|(sample, _)| sample.peer == peer)
            .count()
    }

    fn errors(&self) -> impl Iterator<Item = (&Sample<T>, &str)> {
        self.samples
            .iter()
            .filter_map(|sample| match &sample.outcome {
                Outcome::Error(error) => Some((sample, error.as_str())),
                Outcome::Measured(_) => None,
            })
    }

    fn summaries(&self, peers: &[PeerRecord]) -> String {
        let mut text = format!(
            "\n{:<46} {:<13} {:>3} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}\n",
            "", "peer", "n", "median", "p95", "min", "max", "IQR", "MAD"
        );
        for (metric, record) in self.titles.iter().zip(&self.metrics) {
            let mut title = format!("{} [{}]", metric.title, metric.unit);
            for peer in peers {
                let Some(s) = record.peers.get(peer.name) else {
                    continue;
                };
                line(
                    &mut text,
                    format_args!(
                        "{title:<46} {:<13} {:>3} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1}",
                        peer.name, s.n, s.median, s.p95, s.min, s.max, s.iqr, s.mad
                    ),
                );
                title.clear();
            }
        }
        text
    }

    fn comparisons(&self) -> String {
        let mut text = String::new();
        for (metric, record) in self.titles.iter().zip(&self.metrics) {
            for (peer, ratio) in &record.ratios {
                if text.is_empty() {
                    text.push_str("\nRatio of medians, with its bootstrap interval\n");
                }
                line(
                    &mut text,
                    format_args!("{:<46} {}", metric.title, compare(peer, ratio)),
                );
            }
        }
        text
    }

    fn failures(&self) -> String {
        let mut text = String::new();
        for (sample, error) in self.errors() {
            if text.is_empty() {
                text.push_str("\nFailed samples, which the numbers above leave out\n");
            }
            let phase = if sample.warmup {
                "warm-up round"
            } else {
                "round"
            };
            line(
                &mut text,
                format_args!("{phase} {}, {}: {error}", sample.round + 1, sample.peer),
            );
        }
        text
    }
}

fn record<T>(
    metric: &Metric<T>,
    peers: &[PeerRecord],
    samples: &[Sample<T>],
    random: &mut Random,
) -> MetricRecord {
    let of_peer = |peer: &str| -> BTreeMap<usize, f64> {
        samples
            .iter()
            .filter(|sample| sample.peer == peer && !sample.warmup)
            .filter_map(|sample| match &sample.outcome {
                Outcome::Measured(measured) => Some((sample.round, (metric.of)(measured)?)),
                Outcome::Error(_) => None,
            })
            .collect()
    };
    let ours = of_peer(VMM);
    let (mut summaries, mut ratios) = (BTreeMap::new(), BTreeMap::new());
    for peer in peers {
        let theirs = of_peer(peer.name);
        let values: Vec<f64> = theirs.values().copied().collect();
        summaries.extend(Summary::of(&values).map(|summary| (peer.name, summary)));
        if peer.name != VMM {
            let rounds: Vec<(f64, f64)> = ours
                .iter()
                .filter_map(|(round, &value)| Some((value, *theirs.get(round)?)))
                .collect();
            ratios.extend(Ratio::of_rounds(&rounds, random).map(|ratio| (peer.name, ratio)));
        }
    }
    MetricRecord {
        name: metric.name,
        unit: metric.unit,
        peers: summaries,
        ratios,
    }
}

/// A ratio in words.
fn compare(peer: &str, ratio: &Ratio) -> String {
    let words = match ratio.verdict {
        Verdict::Less => "less",
        Verdict::More => "more",
        Verdict::NotDistinguishable => "not distinguishable",
        Verdict::TooFew => {
            return format!(
                "{VMM} / {peer} = {:.2}: {} rounds are too few to compare ({MIN_ROUNDS} are needed)",
                ratio.ratio, ratio.rounds
            );
        }
    };
    format!(
        "{VMM} / {peer} = {:.2} ({:.0} % interval {:.2} to {:.2}): {words}",
        ratio.ratio,
        ratio.confidence * 100.0,
        ratio.low,
        ratio.high
    )
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a string does not fail.
    let _ = writeln!(text, "{content}");
}

/// Writes results to `path`, whose directories are made.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, results: &impl Serialize) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    let mut json = serde_json::to_vec_pretty(results)?;
    json.push(b'\n');
    fs::write(path, json)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        machine::Virtualization,
        memory::Overhead,
        peer::{Guest, QEMU_MICROVM},
    };

    fn sample(round: usize, warmup: bool, peer: &'static str, answered_ms: f64) -> Sample<Boot> {
        Sample {
            round,
            warmup,
            position: 0,
            peer,
            outcome: Outcome::Measured(Boot {
                first_entry_ms: None,
                booting_event_ms: None,
                ready_ms: answered_ms - 5.0,
                answered_ms,
                agent_entered_ms: 50.0,
                agent_serving_ms: 60.0,
                overhead: Overhead {
                    rss_kib: 4096,
                    pss_kib: 3072,
                },
            }),
        }
    }

    fn results(samples: Vec<Sample<Boot>>, qemu: PeerState) -> Results {
        let plan = boot::Plan {
            rounds: Rounds {
                rounds: 20,
                warmup_rounds: 1,
                seed: 42,
            },
            time_limit_s: 60,
            guest: Guest {
                kernel: "/k".into(),
                initramfs: "/i".into(),
                rootfs: None,
                data: None,
                tap: None,
                api: false,
                cmdline: "quiet".to_owned(),
                memory_mib: 256,
            },
        };
        let machine = Machine {
            cpu: "A CPU".to_owned(),
            cores: 2,
            memory_mib: 4096,
            kernel: "6.12.0".to_owned(),
            virtualization: Virtualization::Direct,
            load: 0.0,
        };
        let peers = vec![
            PeerRecord {
                name: VMM,
                state: PeerState::Version("vmm 0.1.0".to_owned()),
            },
            PeerRecord {
                name: QEMU_MICROVM,
                state: qemu,
            },
        ];
        let cold_boot = Measure::new(plan, 42, &boot::METRICS, &peers, samples);
        Results {
            format: FORMAT,
            commit: Some("abc".to_owned()),
            machine,
            peers,
            first_instruction: "not timed".to_owned(),
            cold_boot,
            running: None,
        }
    }

    fn version() -> PeerState {
        PeerState::Version("QEMU 10".to_owned())
    }

    fn answered(results: &Results) -> &MetricRecord {
        let mut metrics = results.cold_boot.metrics.iter();
        metrics.find(|metric| metric.name == "answered").unwrap()
    }

    #[test]
    fn warm_up_counts_nowhere_and_rounds_are_paired() {
        let mut samples = vec![sample(0, true, VMM, 9999.0)];
        for round in 0..20 {
            let noise = (round * 7 % 20) as f64;
            samples.push(sample(round, false, VMM, 100.0 + noise));
            // One round without a counterpart: it is summed up, but not compared.
            if round > 0 {
                samples.push(sample(round, false, QEMU_MICROVM, 200.0 + noise));
            }
        }
        let results = results(samples, version());
        let answered = answered(&results);
        assert_eq!(answered.peers[VMM].n, 20);
        assert_eq!(answered.peers[VMM].max, 119.0);
        let ratio = &answered.ratios[QEMU_MICROVM];
        assert_eq!((ratio.rounds, ratio.verdict), (19, Verdict::Less));
        let table = results.table();
        assert!(table.contains("95 % interval"), "{table}");
        assert!(table.contains(": less\n"), "{table}");
        assert!(!table.contains("Failed samples"), "{table}");
    }

    #[test]
    fn equal_peers_are_not_distinguishable() {
        let samples = (0..20)
            .flat_map(|round| {
                let (odd, even) = ((round % 2) as f64, (round / 2 % 2) as f64);
                [
                    sample(round, false, VMM, 100.0 + odd),
                    sample(round, false, QEMU_MICROVM, 100.0 + even),
                ]
            })
            .collect();
        let table = results(samples, version()).table();
        assert!(table.contains(": not distinguishable\n"), "{table}");
    }

    #[test]
    fn failures_and_missing_peers_are_told() {
        let mut failed = sample(3, false, VMM, 0.0);
        failed.outcome = Outcome::Error("triple fault".to_owned());
        let missing = PeerState::NotAvailable("qemu-system-x86_64 is not installed".to_owned());
        let results = results(vec![sample(0, false, VMM, 100.0), failed], missing);
        assert_eq!(results.failed(VMM), 1);
        assert_eq!(results.failed(QEMU_MICROVM), 0);
        let table = results.table();
        assert!(table.contains("round 4, vmm: triple fault"), "{table}");
        assert!(
            table.contains("qemu-microvm: peer not available: qemu-system-x86_64 is not"),
            "{table}"
        );
        assert!(answered(&results).ratios.is_empty());
    }

    #[test]
    fn a_short_run_makes_no_claim() {
        let samples = (0..3)
            .flat_map(|round| {
                [
                    sample(round, false, VMM, 100.0),
                    sample(round, false, QEMU_MICROVM, 200.0),
                ]
            })
            .collect();
        let table = results(samples, version()).table();
        assert!(table.contains("3 rounds are too few to compare"), "{table}");
        assert!(!table.contains(": less"), "{table}");
    }

    #[test]
    fn the_file_holds_every_sample() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bench/results.json");
        let mut failed = sample(1, false, QEMU_MICROVM, 0.0);
        failed.outcome = Outcome::Error("no answer".to_owned());
        let samples = vec![
            sample(0, true, VMM, 1.0),
            sample(0, false, VMM, 2.0),
            failed,
        ];
        write(&path, &results(samples, version())).unwrap();

        let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let samples = &json["cold_boot"]["samples"];
        assert_eq!(samples.as_array().unwrap().len(), 3);
        assert_eq!(samples[1]["measured"]["answered_ms"], 2.0);
        assert_eq!(samples[2]["error"], "no answer");
        assert_eq!(json["peers"][1]["version"], "QEMU 10");
        assert_eq!(json["cold_boot"]["plan"]["seed"], 42);
        assert_eq!(json["machine"]["virtualization"], "direct");
        assert_eq!(json["commit"], "abc");
    }
}
