//! How many requests a caller of `/api/v1` may make: so many in each minute and in each hour, counted
//! in windows that begin with the first request in them.
//!
//! A caller is a user or, without credentials, an address. The headers tell of the window that leaves
//! fewer requests.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::http::HeaderName;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;

use super::auth::Identified;
use crate::dialects::microvm::ApiError;
use crate::domain::UserId;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
/// How many callers are remembered at most.
const MAX_CALLERS: usize = 1 << 16;

const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// How many requests are allowed; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// In a minute.
    pub per_minute: u32,
    /// In an hour.
    pub per_hour: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Who {
    Local,
    User(UserId),
    /// Of IPv6 the network of 64 bits, of which one caller has all addresses.
    Address(IpAddr),
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    count: u32,
}

impl Window {
    fn current(self, length: Duration, now: Instant) -> Self {
        match now.saturating_duration_since(self.began) < length {
            true => self,
            false => Self {
                began: now,
                count: 0,
            },
        }
    }
}

/// Where a caller stands in the window that leaves fewer requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    is_allowed: bool,
    limit: u32,
    remaining: u32,
    /// When the window ends.
    reset_in: Duration,
}

/// Counts requests; clones share the counts.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    rates: Rates,
    callers: Arc<Mutex<HashMap<Who, [Window; 2]>>>,
}

impl RateLimiter {
    /// One that allows so many.
    pub fn new(rates: Rates) -> Self {
        Self {
            rates,
            callers: Arc::default(),
        }
    }

    /// Counts a request, if it is allowed. `None` if there is no limit.
    fn count(&self, who: Who, now: Instant) -> Option<Standing> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if callers.len() >= MAX_CALLERS && !callers.contains_key(&who) {
            make_room(&mut callers, now);
        }
        let fresh = Window {
            began: now,
            count: 0,
        };
        let windows = callers.entry(who).or_insert([fresh; 2]);
        let rules = [(self.rates.per_minute, MINUTE), (self.rates.per_hour, HOUR)];
        for (window, (_, length)) in windows.iter_mut().zip(rules) {
            *window = window.current(length, now);
        }
        let standings = |windows: &[Window; 2]| {
            let limited = windows
                .iter()
                .zip(rules)
                .filter(|(_, (limit, _))| *limit > 0);
            limited
                .map(|(window, (limit, length))| Standing {
                    is_allowed: window.count < limit,
                    limit,
                    remaining: limit.saturating_sub(window.count),
                    reset_in: (window.began + length).saturating_duration_since(now),
                })
                .min_by_key(|standing| (standing.remaining, std::cmp::Reverse(standing.reset_in)))
        };
        let before = standings(windows)?;
        if !before.is_allowed {
            return Some(before);
        }
        for window in windows.iter_mut() {
            window.count = window.count.saturating_add(1);
        }
        let after = standings(windows)?;
        Some(Standing {
            is_allowed: true,
            ..after
        })
    }
}

/// Forgets who has not called for an hour; if that is nobody, who has called least.
fn make_room(callers: &mut HashMap<Who, [Window; 2]>, now: Instant) {
    callers.retain(|_, [_, hour]| now.saturating_duration_since(hour.began) < HOUR);
    let mut at_most = 1;
    while callers.len() >= MAX_CALLERS {
        callers.retain(|_, [_, hour]| hour.count > at_most);
        at_most *= 2;
    }
}

impl RateLimiter {
    /// The answer to a request of this caller, with the headers that tell where it stands; that there
    /// were too many, in place of `answer`, if there were.
    pub async fn limit(&self, by: &Identified, answer: impl Future<Output = Response>) -> Response {
        let who = match (&by.principal, by.source) {
            (Some(principal), _) => principal.owner().cloned().map_or(Who::Local, Who::User),
            (None, Some(source)) => Who::Address(network(source)),
            (None, None) => Who::Local,
        };
        let Some(standing) = self.count(who, Instant::now()) else {
            return answer.await;
        };
        let seconds = standing.reset_in.as_secs() + u64::from(standing.reset_in.subsec_nanos() > 0);
        let mut response = match standing.is_allowed {
            true => answer.await,
            false => ApiError::too_many("Too many requests", Some(seconds.max(1))).into_response(),
        };
        let reset = Timestamp::now()
            .as_second()
            .saturating_add_unsigned(seconds);
        let headers = response.headers_mut();
        headers.insert(LIMIT, standing.limit.into());
        headers.insert(REMAINING, standing.remaining.into());
        headers.insert(RESET, reset.into());
        response
    }
}

/// The answer `to` in place of `from`, which tells the same of where the caller stands.
pub fn told_as_in(from: &Response, mut to: Response) -> Response {
    for name in [LIMIT, REMAINING, RESET] {
        if let Some(value) = from.headers().get(&name) {
            to.headers_mut().insert(name, value.clone());
        }
    }
    to
}

fn network(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(network.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(per_minute: u32, per_hour: u32) -> RateLimiter {
        RateLimiter::new(Rates {
            per_minute,
            per_hour,
        })
    }

    #[test]
    fn the_window_that_leaves_less_is_told_and_holds() {
        let limiter = limiter(3, 5);
        let start = Instant::now();
        let count = |seconds: u64| {
            let now = start + Duration::from_secs(seconds);
            let standing = limiter.count(Who::Local, now).unwrap();
            let Standing {
                is_allowed,
                limit,
                remaining,
                reset_in,
            } = standing;
            (is_allowed, limit, remaining, reset_in.as_secs())
        };
        assert_eq!(count(0), (true, 3, 2, 60));
        assert_eq!(count(10), (true, 3, 1, 50));
        assert_eq!(count(20), (true, 3, 0, 40));
        assert_eq!(count(59), (false, 3, 0, 1));
        assert_eq!(count(60), (true, 5, 1, 3540), "refused ones do not count");
        assert_eq!(count(61), (true, 5, 0, 3539));
        assert_eq!(count(200), (false, 5, 0, 3400));
        assert_eq!(count(3600), (true, 3, 2, 60));
    }

    #[test]
    fn callers_are_counted_by_themselves_and_memory_is_bounded() {
        let unlimited = limiter(0, 0);
        let limiter = limiter(1, 10);
        let now = Instant::now();
        let user = Who::User(UserId::random());
        assert!(limiter.count(user.clone(), now).unwrap().is_allowed);
        assert!(!limiter.count(user, now).unwrap().is_allowed);
        for number in 0..100_000_u32 {
            let who = Who::Address(IpAddr::V4(number.into()));
            assert!(limiter.count(who, now).unwrap().is_allowed);
        }
        assert!(limiter.callers.lock().unwrap().len() <= MAX_CALLERS);
        let one: IpAddr = "2001:db8::1".parse().unwrap();
        let other: IpAddr = "2001:db8::ffff:1".parse().unwrap();
        assert_eq!(network(one), network(other));
        assert_eq!(unlimited.count(Who::Local, now), None);
    }
}
