//! Accounts are locked after repeated failures to log in.
//!
//! Failures count for names, whether there is such a user or not, so that nobody can tell. They are
//! kept in memory: a daemon that starts anew has forgotten them. An attempt counts as a failure from
//! its beginning until it has succeeded, so that many at once are no way around it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// From how many failures on an account is locked.
pub const MAX_FAILURES: u32 = 5;
/// In what time they count.
const WINDOW: Duration = Duration::from_secs(3600);
/// For how long it is locked.
const LOCKED: Duration = Duration::from_secs(1800);
/// How many names are remembered at most.
const MAX_NAMES: usize = 1 << 16;

#[derive(Debug, Clone, Copy)]
struct Record {
    failures: u32,
    /// When the first of them was.
    since: Instant,
    attempts: u32,
    locked_until: Option<Instant>,
}

impl Record {
    fn is_over(&self, now: Instant) -> bool {
        let forgotten = match self.locked_until {
            Some(until) => until <= now,
            None => now.duration_since(self.since) >= WINDOW,
        };
        self.attempts == 0 && forgotten
    }
}

/// Failures to log in.
#[derive(Debug, Default)]
pub struct Lockout {
    records: Mutex<HashMap<String, Record>>,
}

/// An attempt to log in, which has failed unless it says otherwise.
#[must_use]
#[derive(Debug)]
pub struct Attempt<'a> {
    lockout: &'a Lockout,
    name: String,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Failed,
    Succeeded,
    Undecided,
}

impl Lockout {
    /// Begins an attempt.
    ///
    /// # Errors
    /// The account is locked, or all that may be tried is being tried: for how long.
    pub fn begin(&self, name: &str) -> Result<Attempt<'_>, Duration> {
        self.begin_at(name, Instant::now())
    }

    fn begin_at(&self, name: &str, now: Instant) -> Result<Attempt<'_>, Duration> {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.get(name).is_some_and(|record| record.is_over(now)) {
            records.remove(name);
        }
        if !records.contains_key(name) {
            make_room(&mut records, now);
        }
        let record = records.entry(name.to_owned()).or_insert(Record {
            failures: 0,
            since: now,
            attempts: 0,
            locked_until: None,
        });
        if let Some(until) = record.locked_until {
            return Err(until.saturating_duration_since(now));
        }
        if record.failures + record.attempts >= MAX_FAILURES {
            return Err(Duration::from_secs(1));
        }
        record.attempts += 1;
        Ok(Attempt {
            lockout: self,
            name: name.to_owned(),
            end: End::Failed,
        })
    }

    fn end(&self, name: &str, end: End, now: Instant) {
        let mut records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(record) = records.get_mut(name) else {
            return;
        };
        record.attempts = record.attempts.saturating_sub(1);
        match end {
            End::Succeeded => record.failures = 0,
            End::Undecided => {}
            End::Failed => {
                if record.failures == 0 || now.duration_since(record.since) >= WINDOW {
                    (record.failures, record.since) = (0, now);
                }
                record.failures += 1;
                if record.failures >= MAX_FAILURES {
                    record.locked_until = Some(now + LOCKED);
                }
            }
        }
        if record.failures == 0 && record.attempts == 0 {
            records.remove(name);
        }
    }
}

/// Makes room for one more name. Who fails with many names makes the daemon forget those that failed
/// least, and not those that are locked.
fn make_room(records: &mut HashMap<String, Record>, now: Instant) {
    if records.len() < MAX_NAMES {
        return;
    }
    records.retain(|_, record| !record.is_over(now));
    for failures in 1..=MAX_FAILURES {
        if records.len() < MAX_NAMES {
            return;
        }
        records.retain(|_, record| record.attempts > 0 || record.failures > failures);
    }
}

impl Attempt<'_> {
    /// It has succeeded: earlier failures are forgotten.
    pub fn succeeded(mut self) {
        self.end = End::Succeeded;
    }

    /// It could not be tried, and does not count.
    pub fn undecided(mut self) {
        self.end = End::Undecided;
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        self.lockout.end(&self.name, self.end, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(lockout: &Lockout, name: &str, times: u32) {
        for _ in 0..times {
            drop(lockout.begin(name).unwrap());
        }
    }

    #[test]
    fn the_fifth_failure_locks_for_half_an_hour() {
        let lockout = Lockout::default();
        fail(&lockout, "a", 4);
        lockout.begin("a").unwrap().succeeded();
        fail(&lockout, "a", 5);
        let rest = lockout.begin("a").unwrap_err();
        assert!(rest > LOCKED - Duration::from_secs(60) && rest <= LOCKED);
        fail(&lockout, "b", 1);
        let later = Instant::now() + LOCKED + Duration::from_secs(1);
        lockout.begin_at("a", later).unwrap().succeeded();
        fail(&lockout, "a", 4);
    }

    #[test]
    fn failures_count_for_an_hour() {
        let lockout = Lockout::default();
        fail(&lockout, "a", 4);
        let later = Instant::now() + WINDOW;
        drop(lockout.begin_at("a", later).unwrap());
        fail(&lockout, "a", 4);
        assert!(lockout.begin("a").is_err());
    }

    #[test]
    fn attempts_at_once_count_too() {
        let lockout = Lockout::default();
        let attempts: Vec<_> = (0..5).map(|_| lockout.begin("a").unwrap()).collect();
        assert_eq!(lockout.begin("a").unwrap_err(), Duration::from_secs(1));
        for attempt in attempts {
            attempt.undecided();
        }
        let attempts: Vec<_> = (0..5).map(|_| lockout.begin("a").unwrap()).collect();
        drop(attempts);
        assert!(lockout.begin("a").unwrap_err() > Duration::from_secs(60));
    }

    #[test]
    fn memory_is_bounded_and_what_is_locked_stays_so() {
        let lockout = Lockout::default();
        fail(&lockout, "victim", 5);
        for name in 0..MAX_NAMES + 100 {
            fail(&lockout, &name.to_string(), 1);
        }
        assert!(lockout.records.lock().unwrap().len() <= MAX_NAMES);
        assert!(lockout.begin("victim").is_err());
    }
}
