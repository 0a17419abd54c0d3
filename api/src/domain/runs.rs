//! When sandboxes ran, and what they had: how many run at a time, and what they had together in a day.

use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp};

/// For how many days what ran is known.
pub const KEPT_DAYS: i64 = 366;

/// A time in which a sandbox ran and had the same vCPUs and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// From when on.
    pub began: Timestamp,
    /// Until when; `None`: it runs.
    pub ended: Option<Timestamp>,
    /// Its vCPUs.
    pub vcpus: u8,
    /// Its memory, in MiB.
    pub memory_mb: u32,
}

/// What sandboxes that run at the same time have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reserved {
    /// How many run.
    pub running: u64,
    /// Their vCPUs.
    pub vcpus: u64,
    /// Their memory, in MiB.
    pub memory_mb: u64,
}

impl Reserved {
    fn add(&mut self, run: &Run) {
        self.running += 1;
        self.vcpus += u64::from(run.vcpus);
        self.memory_mb += u64::from(run.memory_mb);
    }

    /// Takes away what was added before.
    fn remove(&mut self, run: &Run) {
        self.running -= 1;
        self.vcpus -= u64::from(run.vcpus);
        self.memory_mb -= u64::from(run.memory_mb);
    }

    /// Follows a run over one of its edges.
    fn cross(&mut self, edge: Edge, run: &Run) {
        match edge {
            Edge::Beginning => self.add(run),
            Edge::End => self.remove(run),
        }
    }
}

/// What sandboxes had in a day.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DayUsage {
    /// Which day, in UTC.
    pub date: Date,
    /// Minutes that they ran, each times its vCPUs.
    pub vcpu_minutes: f64,
    /// Minutes that they ran, each times its memory in MiB.
    pub memory_mb_minutes: f64,
}

impl DayUsage {
    fn new(date: Date) -> Self {
        Self {
            date,
            vcpu_minutes: 0.0,
            memory_mb_minutes: 0.0,
        }
    }

    /// Counts what was reserved from `since` to `until`.
    fn add(&mut self, reserved: Reserved, since: Timestamp, until: Timestamp) {
        let minutes = until.duration_since(since).as_secs_f64() / 60.0;
        self.vcpu_minutes += minutes * reserved.vcpus as f64;
        self.memory_mb_minutes += minutes * reserved.memory_mb as f64;
    }
}

/// All that ran in some time.
#[derive(Debug, Clone, Default)]
pub struct Runs(Vec<Run>);

impl From<Vec<Run>> for Runs {
    fn from(runs: Vec<Run>) -> Self {
        Self(runs)
    }
}

/// The edges of a run. At the same time, ends come before beginnings: a sandbox whose size
/// changes is not there twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Edge {
    End,
    Beginning,
}

impl Runs {
    /// What changed, in the order of time.
    fn changes(&self) -> Vec<(Timestamp, Edge, &Run)> {
        let mut changes = Vec::with_capacity(self.0.len() * 2);
        for run in &self.0 {
            // A clock that was set back may have ended it before it began.
            let ended = run.ended.map(|ended| ended.max(run.began));
            if ended == Some(run.began) {
                continue;
            }
            changes.push((run.began, Edge::Beginning, run));
            changes.extend(ended.map(|ended| (ended, Edge::End, run)));
        }
        changes.sort_by_key(|(at, edge, _)| (*at, *edge));
        changes
    }

    /// What was reserved at each of these times, which are in order.
    pub fn at(&self, times: &[Timestamp]) -> Vec<Reserved> {
        let mut changes = self.changes().into_iter().peekable();
        let mut reserved = Reserved::default();
        let step = |time: &Timestamp| {
            while let Some((_, edge, run)) = changes.next_if(|(at, ..)| at <= time) {
                reserved.cross(edge, run);
            }
            reserved
        };
        times.iter().map(step).collect()
    }

    /// The most of each that was reserved at any time from `since` on.
    pub fn peaks(&self, since: Timestamp) -> Reserved {
        let (mut reserved, mut peaks) = (Reserved::default(), Reserved::default());
        let mut changes = self.changes().into_iter().peekable();
        while let Some((at, edge, run)) = changes.next() {
            reserved.cross(edge, run);
            // What was reserved until `since` counts if it still was then.
            let until = changes.peek().map(|(at, ..)| *at);
            if at >= since || until.is_none_or(|until| until > since) {
                peaks.running = peaks.running.max(reserved.running);
                peaks.vcpus = peaks.vcpus.max(reserved.vcpus);
                peaks.memory_mb = peaks.memory_mb.max(reserved.memory_mb);
            }
        }
        peaks
    }

    /// What was had in each day from `first` to `last`, until `now`.
    pub fn by_day(&self, first: Date, last: Date, now: Timestamp) -> Vec<DayUsage> {
        let over = self.0.iter().map(|run| Run {
            ended: Some(run.ended.unwrap_or(now)),
            ..*run
        });
        let over = Self(over.collect());
        let mut changes = over.changes().into_iter().peekable();
        let mut reserved = Reserved::default();
        let usage_of = |date: Date| {
            let begin = start_of(date);
            let end = start_of(date.saturating_add(Span::new().days(1)));
            let mut usage = DayUsage::new(date);
            let mut since = begin;
            while let Some((at, edge, run)) = changes.next_if(|(at, ..)| *at < end) {
                // Those before the first day happen at its beginning.
                let at = at.max(begin);
                usage.add(reserved, since, at);
                since = at;
                reserved.cross(edge, run);
            }
            usage.add(reserved, since, end);
            usage
        };
        let days = first.series(Span::new().days(1));
        let days = days.take_while(|date| *date <= last);
        days.map(usage_of).collect()
    }
}

/// When a day begins in UTC.
pub fn start_of(date: Date) -> Timestamp {
    let zoned = date.to_zoned(TimeZone::UTC);
    // Only days at the ends of all time are in no time.
    zoned.map_or(Timestamp::MAX, |zoned| zoned.timestamp())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use jiff::civil::date;
    use proptest::prelude::*;

    use super::*;

    /// Seconds of a day.
    const DAY: i64 = 24 * 3600;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn run(began: i64, ended: Option<i64>, vcpus: u8, memory_mb: u32) -> Run {
        Run {
            began: at(began),
            ended: ended.map(at),
            vcpus,
            memory_mb,
        }
    }

    fn reserved(running: u64, vcpus: u64, memory_mb: u64) -> Reserved {
        Reserved {
            running,
            vcpus,
            memory_mb,
        }
    }

    #[test]
    fn what_is_reserved_at_a_time_is_of_those_that_run_then() {
        let runs = Runs(vec![
            run(30, None, 4, 2048),
            run(10, Some(20), 1, 512),
            // Its size changes, and the clock is set back.
            run(20, Some(30), 2, 1024),
            run(25, Some(5), 32, 1),
        ]);
        let times = [5, 10, 19, 20, 29, 30, 1000].map(at);
        let expected = [
            reserved(0, 0, 0),
            reserved(1, 1, 512),
            reserved(1, 1, 512),
            reserved(1, 2, 1024),
            reserved(1, 2, 1024),
            reserved(1, 4, 2048),
            reserved(1, 4, 2048),
        ];
        assert_eq!(runs.at(&times), expected);
        assert_eq!(runs.peaks(at(0)), reserved(1, 4, 2048));
    }

    #[test]
    fn peaks_are_of_what_still_ran_then() {
        let runs = Runs(vec![run(0, Some(10), 8, 100), run(5, Some(20), 1, 700)]);
        assert_eq!(runs.peaks(at(0)), reserved(2, 9, 800));
        assert_eq!(runs.peaks(at(9)), reserved(2, 9, 800));
        assert_eq!(runs.peaks(at(10)), reserved(1, 1, 700));
        assert_eq!(runs.peaks(at(20)), reserved(0, 0, 0));
        assert_eq!(Runs::default().peaks(at(0)), reserved(0, 0, 0));
    }

    #[test]
    fn a_run_counts_in_each_day_for_the_minutes_of_it() {
        // From 23:00 to 02:00, and one that runs since noon of the second day.
        let runs = Runs(vec![
            run(23 * 3600, Some(DAY + 2 * 3600), 2, 512),
            run(DAY + 12 * 3600, None, 1, 1024),
        ]);
        let (first, last) = (date(1970, 1, 1), date(1970, 1, 3));
        let days = runs.by_day(first, last, at(DAY + 13 * 3600));
        let told: Vec<_> = days
            .iter()
            .map(|usage| {
                (
                    usage.date.day(),
                    usage.vcpu_minutes,
                    usage.memory_mb_minutes,
                )
            })
            .collect();
        let second = (120.0 * 512.0) + (60.0 * 1024.0);
        let expected = [(1, 120.0, 60.0 * 512.0), (2, 300.0, second), (3, 0.0, 0.0)];
        assert_eq!(told, expected);
    }

    /// Runs of which each is `(beginning, length, whether it is over, vCPUs)`, in seconds; a length below 0 is
    /// of a clock that was set back.
    fn runs(began: Range<i64>, length: Range<i64>) -> impl Strategy<Value = Runs> {
        let runs =
            (began, length, any::<bool>(), 1_u8..5).prop_map(|(began, length, is_over, vcpus)| {
                run(began, is_over.then_some(began + length), vcpus, 10)
            });
        proptest::collection::vec(runs, 0..20).prop_map(Runs)
    }

    proptest! {
        #[test]
        fn both_ways_of_counting_agree(runs in runs(0..100, 0..100)) {
            let times: Vec<_> = (0..250).map(at).collect();
            let by_sweep = runs.at(&times);
            for (time, reserved) in times.iter().zip(&by_sweep) {
                let live = runs.0.iter().filter(|run| {
                    run.began <= *time && run.ended.is_none_or(|ended| ended > *time)
                });
                prop_assert_eq!(live.map(|run| u64::from(run.vcpus)).sum::<u64>(), reserved.vcpus);
            }
            let most = by_sweep.iter().map(|reserved| reserved.vcpus).max().unwrap();
            prop_assert_eq!(runs.peaks(at(0)).vcpus, most);
        }

        #[test]
        fn days_have_what_each_run_had_of_them(
            runs in runs(0..6 * DAY, -DAY..3 * DAY),
            now in 0..8 * DAY,
        ) {
            let days = runs.by_day(date(1970, 1, 2), date(1970, 1, 5), at(now));
            prop_assert_eq!(days.len(), 4);
            for (day, usage) in (1..).zip(days) {
                let (begin, end) = (at(day * DAY), at((day + 1) * DAY));
                prop_assert_eq!(start_of(usage.date), begin);
                let minutes = |run: &Run| {
                    let (began, ended) = (run.began.max(begin), run.ended.unwrap_or(at(now)).min(end));
                    ended.duration_since(began).as_secs_f64().max(0.0) / 60.0
                };
                let vcpus: f64 = runs.0.iter().map(|run| minutes(run) * f64::from(run.vcpus)).sum();
                let memory: f64 = runs.0.iter().map(|run| minutes(run) * f64::from(run.memory_mb)).sum();
                prop_assert!((usage.vcpu_minutes - vcpus).abs() < 1e-6);
                prop_assert!((usage.memory_mb_minutes - memory).abs() < 1e-6);
            }
        }
    }
}
