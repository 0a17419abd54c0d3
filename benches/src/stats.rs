//! What samples say together: where they lie, how far they spread, and whether two sets differ.
//!
//! Boot times are skewed and have outliers, so everything here rests on order statistics, and
//! nothing assumes a distribution.

use serde::Serialize;

use crate::random::Random;

/// Rounds below which no comparison is made: the interval of a bootstrap from fewer is too
/// narrow to be believed.
pub const MIN_ROUNDS: usize = 10;
/// How often the bootstrap draws.
const RESAMPLES: usize = 5_000;
/// The share of resamples that the interval holds.
const CONFIDENCE: f64 = 0.95;

/// Where samples lie and how far they spread, in the samples' unit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// How many samples.
    pub n: usize,
    /// Half of the samples are at most this.
    pub median: f64,
    /// 95 of 100 samples are at most this.
    pub p95: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// From the first to the third quartile: the width of the middle half.
    pub iqr: f64,
    /// Median absolute deviation from the median, not scaled to a standard deviation.
    pub mad: f64,
}

impl Summary {
    /// Condenses `samples`; `None` if there are none.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let sorted = sorted(samples);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let median = quantile(&sorted, 0.5);
        let deviations: Vec<f64> = sorted.iter().map(|x| (x - median).abs()).collect();
        Some(Self {
            n: sorted.len(),
            median,
            p95: quantile(&sorted, 0.95),
            min,
            max,
            iqr: quantile(&sorted, 0.75) - quantile(&sorted, 0.25),
            mad: median_of(&deviations),
        })
    }
}

/// What a ratio of medians says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The whole interval lies below 1.
    Less,
    /// The whole interval lies above 1.
    More,
    /// The interval covers 1.
    NotDistinguishable,
    /// There are fewer than [`MIN_ROUNDS`] rounds.
    TooFew,
}

/// The ratio of two medians, with its bootstrap interval.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Ratio {
    /// Rounds in which both sides have a sample; the others are left out.
    pub rounds: usize,
    /// Median of the one side by the median of the other.
    pub ratio: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// The share of resamples that lie within the interval.
    pub confidence: f64,
    /// How many resamples were drawn.
    pub resamples: usize,
    /// What that says.
    pub verdict: Verdict,
}

impl Ratio {
    /// The ratio of the medians of the first to those of the second sample of each round.
    ///
    /// The interval is the percentile bootstrap's. It draws whole rounds: both samples of a round
    /// were taken under the same conditions of the host, so what they share cancels out.
    ///
    /// `None` without rounds, or if a median is not positive: then a ratio has no meaning.
    pub fn of_rounds(rounds: &[(f64, f64)], random: &mut Random) -> Option<Self> {
        let ratio = ratio_of_medians(rounds)?;
        let mut drawn = Vec::with_capacity(rounds.len());
        let mut ratios = Vec::with_capacity(RESAMPLES);
        for _ in 0..RESAMPLES {
            drawn.clear();
            drawn.extend((0..rounds.len()).map(|_| rounds[random.below(rounds.len())]));
            // A draw of nothing but odd rounds may have no ratio; it then says nothing.
            ratios.extend(ratio_of_medians(&drawn));
        }
        let ratios = sorted(&ratios);
        let tail = (1.0 - CONFIDENCE) / 2.0;
        let (low, high) = (quantile(&ratios, tail), quantile(&ratios, 1.0 - tail));
        let verdict = if rounds.len() < MIN_ROUNDS {
            Verdict::TooFew
        } else if high < 1.0 {
            Verdict::Less
        } else if low > 1.0 {
            Verdict::More
        } else {
            Verdict::NotDistinguishable
        };
        Some(Self {
            rounds: rounds.len(),
            ratio,
            low,
            high,
            confidence: CONFIDENCE,
            resamples: ratios.len(),
            verdict,
        })
    }
}

fn ratio_of_medians(rounds: &[(f64, f64)]) -> Option<f64> {
    let (ours, theirs): (Vec<f64>, Vec<f64>) = rounds.iter().copied().unzip();
    let (ours, theirs) = (median_of(&ours), median_of(&theirs));
    (ours > 0.0 && theirs > 0.0).then(|| ours / theirs)
}

fn median_of(samples: &[f64]) -> f64 {
    quantile(&sorted(samples), 0.5)
}

fn sorted(samples: &[f64]) -> Vec<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted
}

/// The quantile `q` (0 to 1) of sorted samples, with a straight line between neighbours
/// (definition 7 of Hyndman and Fan, "Sample Quantiles in Statistical Packages", 1996). NaN if
/// there are none.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let position = q * last as f64;
    let below = (position as usize).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (position - below as f64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_summary_of_known_numbers() {
        let samples = [7.0, 1.0, 3.0, 9.0, 5.0];
        let summary = Summary::of(&samples).unwrap();
        assert_eq!(
            summary,
            Summary {
                n: 5,
                median: 5.0,
                p95: 8.6,
                min: 1.0,
                max: 9.0,
                iqr: 4.0,
                mad: 2.0,
            }
        );
        let even = Summary::of(&[4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((even.median, even.iqr, even.mad), (2.5, 1.5, 1.0));
    }

    #[test]
    fn one_sample_has_no_spread_and_none_no_summary() {
        let summary = Summary::of(&[4.0]).unwrap();
        assert_eq!(
            (summary.median, summary.p95, summary.iqr, summary.mad),
            (4.0, 4.0, 0.0, 0.0)
        );
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn an_outlier_moves_neither_median_nor_mad() {
        let calm = Summary::of(&[10.0, 11.0, 12.0, 13.0, 14.0]).unwrap();
        let wild = Summary::of(&[10.0, 11.0, 12.0, 13.0, 14_000.0]).unwrap();
        assert_eq!((calm.median, calm.mad), (wild.median, wild.mad));
        assert!(wild.max > calm.max && wild.p95 > calm.p95);
    }

    /// Rounds whose two sides share the noise of their round, the first side being `factor`
    /// times the second but for noise of its own.
    fn rounds(count: usize, factor: f64, own_noise: f64, seed: u64) -> Vec<(f64, f64)> {
        let mut random = Random::new(seed);
        let mut unit = || random.below(1_000_001) as f64 / 1e6;
        (0..count)
            .map(|_| {
                let theirs = 100.0 * (1.0 + unit());
                (theirs * factor * (1.0 + own_noise * (unit() - 0.5)), theirs)
            })
            .collect()
    }

    #[test]
    fn a_clear_difference_is_named_in_both_directions() {
        let mut random = Random::new(1);
        let less = Ratio::of_rounds(&rounds(20, 0.5, 0.1, 2), &mut random).unwrap();
        assert_eq!(less.verdict, Verdict::Less);
        assert!(less.low < less.ratio && less.ratio < less.high);
        assert!((0.4..0.6).contains(&less.ratio), "{}", less.ratio);

        let more = Ratio::of_rounds(&rounds(20, 2.0, 0.1, 2), &mut random).unwrap();
        assert_eq!(more.verdict, Verdict::More);
    }

    #[test]
    fn noise_alone_is_rarely_taken_for_a_difference() {
        let mut random = Random::new(4);
        let wrong = (0..100)
            .filter(|&seed| {
                let rounds = rounds(20, 1.0, 0.6, seed);
                let ratio = Ratio::of_rounds(&rounds, &mut random).unwrap();
                ratio.verdict != Verdict::NotDistinguishable
            })
            .count();
        // 5 are to be expected; 15 would come once in ten thousand such tests.
        assert!(wrong < 15, "{wrong} of 100");
    }

    #[test]
    fn few_rounds_are_not_compared_and_none_have_no_ratio() {
        let mut random = Random::new(5);
        let ratio = Ratio::of_rounds(&rounds(MIN_ROUNDS - 1, 0.1, 0.0, 6), &mut random).unwrap();
        assert_eq!(ratio.verdict, Verdict::TooFew);
        assert_eq!(Ratio::of_rounds(&[], &mut random), None);
        assert_eq!(Ratio::of_rounds(&[(1.0, 0.0)], &mut random), None);
        assert_eq!(Ratio::of_rounds(&[(-1.0, 2.0)], &mut random), None);
    }

    #[test]
    fn the_same_seed_gives_the_same_interval() {
        let rounds = rounds(12, 0.9, 0.5, 7);
        let interval = |seed| Ratio::of_rounds(&rounds, &mut Random::new(seed)).unwrap();
        assert_eq!(interval(1), interval(1));
    }

    proptest! {
        #[test]
        fn a_summary_keeps_its_order(samples in prop::collection::vec(-1e6..1e6f64, 1..200)) {
            let summary = Summary::of(&samples).unwrap();
            prop_assert!(summary.min <= summary.median);
            prop_assert!(summary.median <= summary.p95);
            prop_assert!(summary.p95 <= summary.max);
            prop_assert!(summary.iqr >= 0.0 && summary.mad >= 0.0);
            prop_assert!(summary.iqr <= summary.max - summary.min);
            let at_most = samples.iter().filter(|&&x| x <= summary.median).count();
            prop_assert!(2 * at_most >= samples.len());
        }
    }
}
