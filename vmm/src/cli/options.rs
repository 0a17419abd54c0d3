//! The values of flags that have several parts, as in `size=512M,thp=on`.

use std::str::FromStr;

use crate::rate_limiter::{RateLimiterConfig, TokenBucketConfig};

const BANDWIDTH_KEYS: [&str; 3] = ["bw_size", "bw_one_time_burst", "bw_refill_time"];
const OPS_KEYS: [&str; 3] = ["ops_size", "ops_one_time_burst", "ops_refill_time"];

/// `key=value` pairs separated by commas, of which each key may come once. The commas of a list in
/// brackets belong to the value.
pub(super) struct Options<'a> {
    pairs: Vec<(&'a str, &'a str)>,
}

/// The elements of a list in brackets, or the only one without.
pub(super) fn elements(text: &str) -> impl Iterator<Item = &str> {
    let list = text
        .strip_prefix('[')
        .and_then(|list| list.strip_suffix(']'));
    list.unwrap_or(text).split(',')
}

impl<'a> Options<'a> {
    pub(super) fn parse(text: &'a str, known: &[&str]) -> Result<Self, String> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        let mut in_list = false;
        let separator = |character| {
            in_list = (in_list || character == '[') && character != ']';
            character == ',' && !in_list
        };
        for part in text.split(separator) {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| format!("expected key=value, found {part:?}"))?;
            if !known.contains(&key) {
                return Err(format!(
                    "unknown key {key:?}; known are {}",
                    known.join(", ")
                ));
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(format!("{key} is given twice"));
            }
            pairs.push((key, value));
        }
        Ok(Self { pairs })
    }

    /// As [`parse`](Self::parse), with the keys of rate limits besides.
    pub(super) fn parse_limited(text: &'a str, known: &[&str]) -> Result<Self, String> {
        Self::parse(text, &[known, &BANDWIDTH_KEYS, &OPS_KEYS].concat())
    }

    pub(super) fn rate_limits(&self) -> Result<Option<RateLimiterConfig>, String> {
        let bandwidth = self.token_bucket(BANDWIDTH_KEYS)?;
        let ops = self.token_bucket(OPS_KEYS)?;
        Ok((bandwidth.is_some() || ops.is_some()).then_some(RateLimiterConfig { bandwidth, ops }))
    }

    fn token_bucket(&self, keys: [&str; 3]) -> Result<Option<TokenBucketConfig>, String> {
        let [size, burst, refill_time] = keys;
        let one_time_burst = self.get(burst)?;
        match (self.get(size)?, self.get(refill_time)?) {
            (Some(size), Some(refill_time)) => Ok(Some(TokenBucketConfig {
                size,
                one_time_burst,
                refill_time,
            })),
            (None, None) if one_time_burst.is_none() => Ok(None),
            _ => Err(format!("a limit needs both {size} and {refill_time}")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        self.pairs
            .iter()
            .find(|(other, _)| *other == key)
            .map(|(_, value)| *value)
    }

    /// The elements of a list; none if it is not given.
    pub(super) fn list(&self, key: &str) -> impl Iterator<Item = &'a str> + use<'a> {
        self.text(key).into_iter().flat_map(elements)
    }

    pub(super) fn required(&self, key: &str) -> Result<&'a str, String> {
        self.text(key).ok_or_else(|| format!("{key} is missing"))
    }

    pub(super) fn get<T: FromStr<Err: std::fmt::Display>>(
        &self,
        key: &str,
    ) -> Result<Option<T>, String> {
        self.text(key)
            .map(|value| {
                value
                    .parse()
                    .map_err(|error| format!("{key}={value}: {error}"))
            })
            .transpose()
    }

    pub(super) fn switch(&self, key: &str, default: bool) -> Result<bool, String> {
        match self.text(key) {
            None => Ok(default),
            Some("off" | "false") => Ok(false),
            Some("on" | "true") => Ok(true),
            Some(other) => Err(format!("{key}={other}: expected on or off")),
        }
    }
}
