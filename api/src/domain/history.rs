//! What was measured of one sandbox until now: the last minutes in detail, the last day roughly.

use std::collections::VecDeque;
use std::time::Duration;

use jiff::Timestamp;

use super::usage::Point;

/// How much time a point stands for at least, and how many are kept, from the finest. The first holds
/// each that was measured, some more than ten minutes of one every five seconds; the others means of
/// those, of two hours and of a day.
const TIERS: [(Duration, usize); 3] = [
    (Duration::ZERO, 125),
    (Duration::from_secs(30), 245),
    (Duration::from_secs(300), 290),
];

/// From how long ago on each tier is what is asked.
const REACH: [Duration; 2] = [Duration::from_secs(600), Duration::from_secs(7200)];

/// Points of one sandbox.
#[derive(Debug, Default)]
pub struct History {
    tiers: [Tier; TIERS.len()],
}

/// Points that stand for the same time each.
#[derive(Debug, Default)]
struct Tier {
    points: VecDeque<Point>,
    /// Those that the next point will be the mean of.
    open: Option<Mean>,
}

/// A mean that grows.
#[derive(Debug, Clone, Copy)]
struct Mean {
    began: Timestamp,
    count: u32,
    cpu_percent: f64,
    memory_bytes: f64,
    disk_bytes: f64,
}

impl History {
    /// Adds what was measured now.
    pub fn push(&mut self, point: Point) {
        for (tier, (step, most)) in self.tiers.iter_mut().zip(TIERS) {
            if let Some(point) = tier.take(point, step) {
                if tier.points.len() == most {
                    tier.points.pop_front();
                }
                tier.points.push_back(point);
            }
        }
    }

    /// What was measured in the last `range` before `now`, oldest first: the longer it is, the rougher.
    pub fn since(&self, range: Duration, now: Timestamp) -> Vec<Point> {
        let tier = REACH.iter().take_while(|reach| range > **reach).count();
        let points = self.tiers[tier].points.iter();
        let is_in = |point: &&Point| age(point.at, now) <= range;
        points.filter(is_in).copied().collect()
    }
}

impl Tier {
    /// Adds one to the mean. Returns that when it stands for long enough.
    fn take(&mut self, point: Point, step: Duration) -> Option<Point> {
        let mean = self.open.get_or_insert(Mean {
            began: point.at,
            count: 0,
            cpu_percent: 0.0,
            memory_bytes: 0.0,
            disk_bytes: 0.0,
        });
        mean.count += 1;
        let weight = 1.0 / f64::from(mean.count);
        let add = |mean: &mut f64, value: f64| *mean += (value - *mean) * weight;
        add(&mut mean.cpu_percent, point.cpu_percent);
        add(&mut mean.memory_bytes, point.memory_bytes as f64);
        add(&mut mean.disk_bytes, point.disk_bytes as f64);
        if age(mean.began, point.at) < step {
            return None;
        }
        let mean = self.open.take()?;
        Some(Point {
            at: point.at,
            cpu_percent: mean.cpu_percent,
            memory_bytes: mean.memory_bytes as u64,
            disk_bytes: mean.disk_bytes as u64,
        })
    }
}

/// How long `at` is before `now`; nothing if it is after it, as when the clock was set.
fn age(at: Timestamp, now: Timestamp) -> Duration {
    now.duration_since(at).try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn point(second: i64, cpu_percent: f64) -> Point {
        Point {
            at: at(second),
            cpu_percent,
            memory_bytes: 100 + second.cast_unsigned(),
            disk_bytes: 7,
        }
    }

    #[test]
    fn the_last_minutes_are_told_in_detail_and_the_day_roughly() {
        let mut history = History::default();
        let day = 24 * 3600;
        for second in (0..=day + 600).step_by(5) {
            history.push(point(second, 50.0));
        }
        let now = at(day + 600);
        let last = |seconds| history.since(Duration::from_secs(seconds), now);
        assert_eq!(last(300).len(), 61);
        assert_eq!(last(600).len(), 121);
        for (range, step, least) in [(3600_u32, 35, 100), (7200, 35, 200), (86_400, 305, 280)] {
            let points = last(range.into());
            assert!(points.len() >= least, "{range}: {}", points.len());
            for pair in points.windows(2) {
                assert_eq!(pair[1].at.as_second() - pair[0].at.as_second(), step);
            }
            assert!(points[0].at >= at(day + 600 - i64::from(range)));
        }
    }

    #[test]
    fn a_rough_point_is_the_mean_of_fine_ones() {
        let mut history = History::default();
        for (second, cpu) in [(0, 0.0), (10, 100.0), (20, 0.0), (30, 100.0)] {
            history.push(point(second, cpu));
        }
        let points = history.since(Duration::from_secs(3600), at(30));
        assert_eq!(
            points,
            [Point {
                at: at(30),
                cpu_percent: 50.0,
                memory_bytes: 115,
                disk_bytes: 7
            }]
        );
    }

    #[test]
    fn a_clock_that_was_set_back_does_no_harm() {
        let mut history = History::default();
        for second in [1000, 10, 20, 5000] {
            history.push(point(second, 1.0));
        }
        assert_eq!(history.since(Duration::from_secs(60), at(20)).len(), 4);
    }
}
