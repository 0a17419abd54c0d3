//! Requests of one day.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::{Method, StatusCode};
use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

use crate::domain::{Principal, UserId};

/// How many users are counted for by themselves in a day; those beyond are in the sum alone.
const MAX_USERS: usize = 1 << 16;

/// A request that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// How it was asked.
    pub method: &'static str,
    /// Where: the path with the names of its parameters.
    pub route: String,
    /// What the answer was.
    pub status: StatusCode,
    /// How long it took until the answer began.
    pub took: Duration,
}

/// The word for a method; there are as many as anybody cares to make up.
pub fn method_word(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Requests of a day until now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// How many.
    pub count: u64,
    /// How long it took on average until answers began; nothing of none.
    pub average: Option<Duration>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    count: u64,
    took: Duration,
}

impl Sum {
    fn add(&mut self, took: Duration) {
        self.count += 1;
        self.took = self.took.saturating_add(took);
    }
}

impl From<Sum> for Statistics {
    fn from(sum: Sum) -> Self {
        let count = u32::try_from(sum.count).unwrap_or(u32::MAX);
        Self {
            count: sum.count,
            average: sum.took.checked_div(count),
        }
    }
}

/// Requests of the current day, in UTC.
#[derive(Debug, Default)]
pub struct Today(Mutex<Day>);

#[derive(Debug, Default)]
struct Day {
    date: Date,
    all: Sum,
    of_users: HashMap<UserId, Sum>,
}

impl Today {
    /// Counts one.
    pub fn count(&self, who: Option<&Principal>, took: Duration, now: Timestamp) {
        let mut day = self.on(now);
        day.all.add(took);
        if let Some(user) = who.and_then(Principal::owner) {
            if let Some(sum) = day.of_users.get_mut(user) {
                sum.add(took);
            } else if day.of_users.len() < MAX_USERS {
                let mut sum = Sum::default();
                sum.add(took);
                day.of_users.insert(user.clone(), sum);
            }
        }
    }

    /// Those of everybody for whoever sees all, and else their own.
    pub fn statistics(&self, who: &Principal, now: Timestamp) -> Statistics {
        let day = self.on(now);
        let sum = match who.owner() {
            Some(user) if !who.is_admin() => day.of_users.get(user).copied(),
            _ => Some(day.all),
        };
        sum.unwrap_or_default().into()
    }

    fn on(&self, now: Timestamp) -> std::sync::MutexGuard<'_, Day> {
        let date = now.to_zoned(TimeZone::UTC).date();
        let mut day = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if day.date != date {
            *day = Day {
                date,
                ..Day::default()
            };
        }
        day
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Role, User};

    fn user(role: Role) -> Principal {
        Principal::User(User {
            id: UserId::random(),
            name: "x".into(),
            role,
        })
    }

    #[test]
    fn each_hears_of_their_own_requests_of_the_day_and_administrators_of_all() {
        let today = Today::default();
        let (alice, bob, root) = (user(Role::User), user(Role::User), user(Role::Admin));
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let now = at("2025-10-01T23:59:00Z");
        let ms = Duration::from_millis;
        today.count(Some(&alice), ms(10), now);
        today.count(Some(&alice), ms(30), now);
        today.count(None, ms(2), now);
        let of = |who: &Principal, now| {
            let statistics = today.statistics(who, now);
            (statistics.count, statistics.average)
        };
        assert_eq!(of(&alice, now), (2, Some(ms(20))));
        assert_eq!(of(&bob, now), (0, None));
        assert_eq!(of(&root, now), (3, Some(ms(14))));
        assert_eq!(of(&Principal::Local, now), (3, Some(ms(14))));
        assert_eq!(of(&alice, at("2025-10-02T00:00:00Z")), (0, None));
    }
}
