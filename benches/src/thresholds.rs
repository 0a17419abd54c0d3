//! Numbers that have a published bound: what was measured, what it may be, and how far it is from it.

use serde::Serialize;

/// What a value may be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No more than this.
    AtMost(f64),
    /// No less than this.
    AtLeast(f64),
}

/// A value and its bound.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// What it is of, with its unit.
    pub name: &'static str,
    /// The value.
    pub value: f64,
    /// What it may be.
    pub bound: Bound,
    /// Why it cannot be [`WANTED`] times better than its bound; `None` if it can.
    pub limited: Option<&'static str>,
}

/// How many times better than its bound a value is to be, where it can.
pub const WANTED: f64 = 3.0;

impl Row {
    /// A value that may be no more than this.
    pub fn at_most(name: &'static str, most: f64, value: f64) -> Self {
        Self {
            name,
            value,
            bound: Bound::AtMost(most),
            limited: None,
        }
    }

    /// A value that may be no less than this.
    pub fn at_least(name: &'static str, least: f64, value: f64) -> Self {
        Self {
            name,
            value,
            bound: Bound::AtLeast(least),
            limited: None,
        }
    }

    /// The same, which for this reason cannot be [`WANTED`] times better than its bound.
    #[must_use]
    pub fn limited(self, why: &'static str) -> Self {
        Self {
            limited: Some(why),
            ..self
        }
    }

    /// Whether it is as much better than its bound as is wanted, or as its bound asks where it cannot be.
    pub fn is_well(&self) -> bool {
        let wanted = match self.limited {
            Some(_) => 1.0,
            None => WANTED,
        };
        self.margin() >= wanted
    }

    /// How many times better than its bound it is; below 1 it is worse.
    pub fn margin(&self) -> f64 {
        match self.bound {
            // Nothing is better than none.
            Bound::AtMost(most) => most / self.value.max(f64::MIN_POSITIVE),
            Bound::AtLeast(least) => self.value / least,
        }
    }

    /// A line of the table.
    pub fn line(&self) -> String {
        let (sign, bound) = match self.bound {
            Bound::AtMost(most) => ('≤', most),
            Bound::AtLeast(least) => ('≥', least),
        };
        let margin = match self.margin() {
            margin if margin > 1000.0 => "> 1000".to_owned(),
            margin => format!("{margin:.1}"),
        };
        let why = self.limited.unwrap_or_default();
        format!(
            "| {} | {:.3} | {sign} {bound} | {margin} | {why} |",
            self.name, self.value
        )
    }
}

/// Standard deviation of a sample, with n − 1; 0 of fewer than two.
pub fn deviation(samples: &[f64]) -> f64 {
    let n = samples.len() as f64;
    if n < 2.0 {
        return 0.0;
    }
    let mean = samples.iter().sum::<f64>() / n;
    let squares: f64 = samples.iter().map(|sample| (sample - mean).powi(2)).sum();
    (squares / (n - 1.0)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_above_one_if_a_bound_is_met() {
        let most = Row::at_most("x, s", 3.0, 0.5);
        assert_eq!(most.line(), "| x, s | 0.500 | ≤ 3 | 6.0 |  |");
        assert!(most.is_well());
        let worse = Row::at_most("x, s", 3.0, 4.0);
        assert!(worse.margin() < 1.0 && !worse.is_well());
        assert!(Row::at_most("x, s", 5.0, 0.0).line().contains("> 1000"));
        let twice = Row::at_least("x", 10.0, 20.0);
        assert!(twice.margin() > 1.9 && !twice.is_well());
        assert!(twice.limited("20 are tried").is_well());
        assert!(!worse.limited("it is slow").is_well());
    }

    #[test]
    fn deviations() {
        assert!((deviation(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) - 2.138).abs() < 0.001);
        assert!(deviation(&[1.0]).abs() < f64::EPSILON);
    }
}
