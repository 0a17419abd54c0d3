//! Rounds: each takes one sample of every peer, in random order.

use serde::Serialize;

use crate::{error_chain, interrupt, peer::Peer, random::Random};

/// How many rounds there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rounds {
    /// Rounds; each takes one sample of every peer.
    pub rounds: usize,
    /// Rounds before these, whose samples are kept but not counted: they fill the caches.
    pub warmup_rounds: usize,
    /// What the order of the peers within each round comes from.
    pub seed: u64,
}

/// One sample of one peer.
#[derive(Debug, Clone, Serialize)]
pub struct Sample<T> {
    /// Which round, from 0; within the warm-up, if it is one.
    pub round: usize,
    /// Whether it is a warm-up.
    pub warmup: bool,
    /// Which place in the round, from 0.
    pub position: usize,
    /// Which peer.
    pub peer: &'static str,
    /// What happened.
    #[serde(flatten)]
    pub outcome: Outcome<T>,
}

/// What came of a sample.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome<T> {
    /// What was measured.
    Measured(T),
    /// Nothing; why.
    Error(String),
}

/// Something that a sample says, as one number.
#[derive(Debug, Clone, Copy)]
pub struct Metric<T> {
    /// Its name in the results.
    pub name: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// How a sample gives it.
    pub of: fn(&T) -> Option<f64>,
}

/// Takes samples of `peers`, and tells `progress` each as it comes. `take` is told the peer and the
/// number of the sample.
///
/// A sample that fails is one too. `None` if a signal ended the measure early.
pub fn measure<T, E: std::error::Error + 'static>(
    peers: &[Peer],
    rounds: Rounds,
    mut take: impl FnMut(&Peer, usize) -> Result<T, E>,
    mut progress: impl FnMut(&Sample<T>),
) -> Option<Vec<Sample<T>>> {
    let mut random = Random::new(rounds.seed);
    let mut samples = Vec::new();
    let warmups = (0..rounds.warmup_rounds).map(|round| (round, true));
    let counted = (0..rounds.rounds).map(|round| (round, false));
    for (round, warmup) in warmups.chain(counted) {
        let mut order: Vec<&Peer> = peers.iter().collect();
        random.shuffle(&mut order);
        for (position, peer) in order.into_iter().enumerate() {
            let outcome = match take(peer, samples.len()) {
                Ok(measured) => Outcome::Measured(measured),
                Err(error) => Outcome::Error(error_chain(&error)),
            };
            if interrupt::interrupted() {
                return None;
            }
            let sample = Sample {
                round,
                warmup,
                position,
                peer: peer.name(),
                outcome,
            };
            progress(&sample);
            samples.push(sample);
        }
    }
    Some(samples)
}
