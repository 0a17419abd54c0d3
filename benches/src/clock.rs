//! The clock of all host-side times: `CLOCK_MONOTONIC`, which the kernel's tracing can use too.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A moment, as time since the clock's arbitrary start.
pub type Moment = Duration;

/// The current moment.
pub fn now() -> Moment {
    let time = clock_gettime(ClockId::Monotonic);
    // The kernel gives neither negative seconds nor more than 999 999 999 ns.
    Duration::new(
        time.tv_sec.try_into().unwrap_or_default(),
        time.tv_nsec.try_into().unwrap_or_default(),
    )
}

/// Milliseconds from `start` to `end`; negative if `end` came first.
pub fn millis_between(start: Moment, end: Moment) -> f64 {
    (end.as_secs_f64() - start.as_secs_f64()) * 1e3
}
