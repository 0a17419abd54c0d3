//! Token buckets, which hold a device to a rate.
//!
//! A bucket of `size` tokens fills evenly, from empty to full in `refill_time`. An operation takes
//! one token from the bucket for operations and one for each of its bytes from the bucket for
//! bandwidth. What the one-time burst still holds is taken first and never comes back.
//!
//! Over any stretch of time T, what goes through is at most the one-time burst, plus `size`, plus
//! what flows into the bucket in T. An operation that costs more than the bucket can hold would
//! wait for ever, so it goes through when the bucket is full, and leaves a debt that is paid off
//! before the next one: only by that debt, the bound may be exceeded, and only once at a time.
//!
//! Nothing is polled: whoever has to wait is woken by a timer that is set to the moment at which
//! there are enough tokens.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};

/// How a bucket fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucketConfig {
    /// Tokens in a full bucket: bytes or operations. 0 sets no limit.
    pub size: u64,
    /// Tokens on top of those, which are there once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds in which an empty bucket fills up. 0 sets no limit.
    pub refill_time: u64,
}

/// The limits of one device, for each direction by itself if it has two.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiterConfig {
    /// Bytes of data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucketConfig>,
    /// Requests of a disk, frames of a card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucketConfig>,
}

/// Limits operations to the rate of a [`RateLimiterConfig`].
#[derive(Debug)]
pub struct RateLimiter {
    bandwidth: Option<Bucket>,
    ops: Option<Bucket>,
    /// Set to when an operation that had to wait can go on. `None` without limits.
    timer: Option<OwnedFd>,
    /// What times are counted from.
    origin: Instant,
}

impl RateLimiter {
    /// A limiter whose buckets are full. Without a configuration it limits nothing.
    ///
    /// # Errors
    /// The host has no timer descriptors left.
    pub fn new(config: Option<&RateLimiterConfig>) -> io::Result<Self> {
        let config = config.copied().unwrap_or_default();
        let bandwidth = config.bandwidth.and_then(Bucket::new);
        let ops = config.ops.and_then(Bucket::new);
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = if bandwidth.is_some() || ops.is_some() {
            Some(timerfd_create(TimerfdClockId::Monotonic, flags)?)
        } else {
            None
        };
        Ok(Self {
            bandwidth,
            ops,
            timer,
            origin: Instant::now(),
        })
    }

    /// What becomes readable when an operation that was not admitted can be tried again; `None` if
    /// every operation is admitted.
    pub fn timer(&self) -> Option<RawFd> {
        self.timer.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Whether an operation of up to `bytes` may be carried out now. If not, the timer is set.
    ///
    /// # Errors
    /// The timer refused.
    pub fn admits(&mut self, bytes: u64) -> io::Result<bool> {
        let Some(timer) = &self.timer else {
            return Ok(true);
        };
        let now = now(self.origin);
        let delay = |bucket: &mut Option<Bucket>, cost| {
            bucket
                .as_mut()
                .map_or(0, |bucket| bucket.nanoseconds_until(now, cost))
        };
        let wait = delay(&mut self.bandwidth, bytes).max(delay(&mut self.ops, 1));
        if wait == 0 {
            return Ok(true);
        }
        const SECOND: u64 = 1_000_000_000;
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = Timespec {
            tv_sec: (wait / SECOND).try_into().unwrap_or(i64::MAX),
            tv_nsec: (wait % SECOND) as _,
        };
        let setting = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        timerfd_settime(timer, TimerfdTimerFlags::empty(), &setting)?;
        Ok(false)
    }

    /// Takes the tokens for an operation of `bytes` that is carried out.
    pub fn charge(&mut self, bytes: u64) {
        if self.timer.is_none() {
            return;
        }
        let now = now(self.origin);
        if let Some(bucket) = &mut self.bandwidth {
            bucket.take(now, bytes);
        }
        if let Some(bucket) = &mut self.ops {
            bucket.take(now, 1);
        }
    }

    /// Makes the timer unreadable until it is set again.
    pub fn acknowledge_timer(&self) {
        if let Some(timer) = &self.timer {
            // Fails only if it was not readable.
            let _ = rustix::io::read(timer, &mut [0; 8]);
        }
    }
}

/// Nanoseconds since `origin`; they last for 584 years.
fn now(origin: Instant) -> u64 {
    origin.elapsed().as_nanos().try_into().unwrap_or(u64::MAX)
}

/// One bucket. Times are in nanoseconds since any fixed moment, and never go back.
#[derive(Debug)]
struct Bucket {
    size: u64,
    /// Nanoseconds in which `size` tokens flow in.
    refill_time: u128,
    burst: u64,
    /// What the bucket holds: `size` at most, and less than nothing while there is a debt.
    tokens: i128,
    /// What flowed in on top, less than a token, in units of 1/`refill_time`.
    fraction: u128,
    /// Up to when `tokens` and `fraction` are right.
    filled_at: u64,
}

impl Bucket {
    /// A full bucket at time 0; `None` if it would set no limit.
    fn new(config: TokenBucketConfig) -> Option<Self> {
        if config.size == 0 || config.refill_time == 0 {
            return None;
        }
        Some(Self {
            size: config.size,
            refill_time: u128::from(config.refill_time) * 1_000_000,
            burst: config.one_time_burst.unwrap_or(0),
            tokens: config.size.into(),
            fraction: 0,
            filled_at: 0,
        })
    }

    fn fill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.filled_at);
        self.filled_at = self.filled_at.max(now);
        let inflow = (u128::from(elapsed) * u128::from(self.size)).saturating_add(self.fraction);
        let tokens = i128::try_from(inflow / self.refill_time).unwrap_or(i128::MAX);
        self.tokens = self.tokens.saturating_add(tokens);
        self.fraction = inflow % self.refill_time;
        if self.tokens >= i128::from(self.size) {
            self.tokens = self.size.into();
            self.fraction = 0;
        }
    }

    /// How long it takes until something of this cost can go through.
    fn nanoseconds_until(&mut self, now: u64, cost: u64) -> u64 {
        self.fill(now);
        let cost = cost.saturating_sub(self.burst);
        if cost == 0 {
            return 0;
        }
        let missing = i128::from(cost.min(self.size)).saturating_sub(self.tokens);
        let Ok(missing @ 1..) = u128::try_from(missing) else {
            return 0;
        };
        missing
            .saturating_mul(self.refill_time)
            .saturating_sub(self.fraction)
            .div_ceil(u128::from(self.size))
            .try_into()
            .unwrap_or(u64::MAX)
    }

    fn take(&mut self, now: u64, cost: u64) {
        self.fill(now);
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        self.tokens = self.tokens.saturating_sub((cost - from_burst).into());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::devices::virtio::testing::wait_readable;

    fn bucket(size: u64, burst: u64, refill_time: u64) -> Bucket {
        Bucket::new(TokenBucketConfig {
            size,
            one_time_burst: Some(burst),
            refill_time,
        })
        .unwrap()
    }

    #[test]
    fn the_burst_is_there_once_and_the_bucket_again_and_again() {
        let mut bucket = bucket(100, 50, 1000);
        assert_eq!(bucket.nanoseconds_until(0, 150), 0);
        bucket.take(0, 150);
        // 10 tokens come in 100 ms.
        assert_eq!(bucket.nanoseconds_until(0, 10), 100_000_000);
        assert_eq!(bucket.nanoseconds_until(100_000_000, 10), 0);
        bucket.take(100_000_000, 10);
        let hour = 3_600_000_000_000;
        assert_eq!(bucket.nanoseconds_until(hour, 100), 0);
        bucket.take(hour, 100);
        assert_eq!(bucket.nanoseconds_until(hour, 1), 10_000_000);
    }

    #[test]
    fn what_costs_more_than_a_full_bucket_is_paid_for_afterwards() {
        let mut bucket = bucket(100, 0, 1000);
        bucket.take(0, 1);
        assert_eq!(bucket.nanoseconds_until(0, 1000), 10_000_000);
        assert_eq!(bucket.nanoseconds_until(10_000_000, 1000), 0);
        bucket.take(10_000_000, 1000);
        assert_eq!(bucket.nanoseconds_until(10_000_000, 1), 9_010_000_000);
    }

    #[test]
    fn extreme_numbers_neither_overflow_nor_let_everything_through() {
        let mut slow = bucket(1, 0, u64::MAX);
        slow.take(0, u64::MAX);
        slow.take(0, u64::MAX);
        assert_eq!(slow.nanoseconds_until(0, u64::MAX), u64::MAX);
        slow.take(u64::MAX, u64::MAX);
        assert!(slow.nanoseconds_until(u64::MAX, 1) > 0);

        let mut fast = bucket(u64::MAX, u64::MAX, 1);
        fast.take(0, u64::MAX);
        fast.take(0, u64::MAX);
        assert_eq!(fast.nanoseconds_until(0, u64::MAX), 1_000_000);
        assert_eq!(fast.nanoseconds_until(u64::MAX, u64::MAX), 0);
        // Time that goes back is taken for time that stands still.
        assert_eq!(fast.nanoseconds_until(0, u64::MAX), 0);
    }

    #[test]
    fn without_limits_everything_is_admitted() {
        let nothing = TokenBucketConfig {
            size: 0,
            one_time_burst: None,
            refill_time: 100,
        };
        let config = RateLimiterConfig {
            bandwidth: Some(nothing),
            ops: Some(TokenBucketConfig {
                size: 1,
                refill_time: 0,
                ..nothing
            }),
        };
        for config in [None, Some(&config)] {
            let mut limiter = RateLimiter::new(config).unwrap();
            assert_eq!(limiter.timer(), None);
            for _ in 0..100 {
                assert!(limiter.admits(u64::MAX).unwrap());
                limiter.charge(u64::MAX);
            }
        }
    }

    #[test]
    fn the_timer_tells_when_to_go_on() {
        let bucket = |size, refill_time| {
            Some(TokenBucketConfig {
                size,
                one_time_burst: None,
                refill_time,
            })
        };
        let config = RateLimiterConfig {
            bandwidth: bucket(1 << 30, 1),
            ops: bucket(1, 20),
        };
        let start = Instant::now();
        let mut limiter = RateLimiter::new(Some(&config)).unwrap();
        assert!(limiter.admits(1).unwrap());
        limiter.charge(1);
        let timer = limiter.timer().unwrap();
        for _ in 0..3 {
            while !limiter.admits(1).unwrap() {
                assert!(wait_readable(timer, -1));
                limiter.acknowledge_timer();
                assert!(!wait_readable(timer, 0));
            }
            limiter.charge(1);
        }
        assert!(start.elapsed().as_millis() >= 60);
    }

    #[test]
    fn the_configuration_is_that_of_cloud_hypervisor() {
        let json = r#"{"bandwidth":{"size":1,"one_time_burst":2,"refill_time":3}}"#;
        let config: RateLimiterConfig = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&config).unwrap(), json);
        let unknown = r#"{"bandwidth":{"size":1,"refill_time":3,"burst":1}}"#;
        assert!(serde_json::from_str::<RateLimiterConfig>(unknown).is_err());
    }

    /// Costs and the pauses before them.
    fn operations(largest: u64) -> impl Strategy<Value = Vec<(u64, u64)>> {
        prop::collection::vec((0..50_000_000_u64, 1..=largest), 1..60)
    }

    proptest! {
        /// Beside a bucket that is counted in the smallest units, where nothing is ever rounded.
        #[test]
        fn no_token_is_lost_or_made_up(
            size in 1_u64..1000,
            burst in 0_u64..1000,
            refill_time in 1_u64..1000,
            operations in operations(2000),
        ) {
            let mut tested = bucket(size, burst, refill_time);
            let unit = i128::from(refill_time) * 1_000_000;
            let full = i128::from(size) * unit;
            let (mut level, mut burst, mut now) = (full, burst, 0);
            for (pause, cost) in operations {
                now += pause;
                level = full.min(level + i128::from(pause) * i128::from(size));
                let rest = cost.saturating_sub(burst);
                let admitted = rest == 0 || level >= i128::from(rest.min(size)) * unit;
                prop_assert_eq!(tested.nanoseconds_until(now, cost) == 0, admitted);
                if admitted {
                    tested.take(now, cost);
                    burst -= cost.min(burst);
                    level -= i128::from(rest) * unit;
                }
            }
        }

        /// Over no stretch of time goes more through than is promised, and nothing waits longer
        /// than it was told.
        #[test]
        fn the_promise_is_kept(
            size in 1_u64..1000,
            burst in 0_u64..1000,
            refill_time in 1_u64..1000,
            operations in operations(2000),
        ) {
            let mut bucket = bucket(size, burst, refill_time);
            let mut passed: Vec<(u64, u64)> = Vec::new();
            let mut now = 0;
            for (pause, cost) in operations {
                now += pause;
                now += bucket.nanoseconds_until(now, cost);
                prop_assert_eq!(bucket.nanoseconds_until(now, cost), 0);
                bucket.take(now, cost);
                passed.push((now, cost));
            }
            for first in 0..passed.len() {
                let mut total = 0;
                for &(time, cost) in &passed[first..] {
                    total += cost;
                    let inflow = u128::from(time - passed[first].0) * u128::from(size);
                    // Of the last one, the debt: it did not have to be there before.
                    let debt = cost.saturating_sub(size);
                    let bound = size + burst + debt
                        + u64::try_from(inflow.div_ceil(u128::from(refill_time) * 1_000_000)).unwrap();
                    prop_assert!(total <= bound, "{} above {}", total, bound);
                }
            }
        }

        #[test]
        fn no_configuration_breaks_it(
            size in any::<u64>(),
            burst in any::<u64>(),
            refill_time in any::<u64>(),
            steps in prop::collection::vec((any::<u64>(), any::<u64>()), 0..20),
        ) {
            let config = TokenBucketConfig { size, one_time_burst: Some(burst), refill_time };
            let Some(mut bucket) = Bucket::new(config) else {
                prop_assert!(size == 0 || refill_time == 0);
                return Ok(());
            };
            for (now, cost) in steps {
                bucket.nanoseconds_until(now, cost);
                bucket.take(now, cost);
            }
        }
    }
}
