//! What checks found, and what that comes to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Write};

use serde::{Deserialize, Serialize};

use super::control::{Area, Framework};

/// The most findings of one scan that are told; of more, the least severe are counted only.
pub const MAX_FINDINGS: usize = 2000;
/// The most things that one finding names.
const MAX_DETAILS: usize = 20;
/// How much of each is told, in characters.
const MAX_DETAIL: usize = 200;
/// How much the details of one scan take together, in bytes; a finding whose own do not fit is told
/// without them.
const MAX_TOLD: usize = 4 << 20;
/// The greatest risk.
const MAX_RISK: u32 = 100;

/// How bad a failed check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It is to be known.
    Info,
    /// It helps an attacker who is in already.
    Low,
    /// It makes an attack possible that needs something else as well.
    Medium,
    /// It makes an attack possible.
    High,
    /// It lets anybody in.
    Critical,
}

impl Severity {
    /// What a failed check of this severity adds to the risk.
    fn weight(self) -> u32 {
        match self {
            Self::Critical => 25,
            Self::High => 10,
            Self::Medium => 5,
            Self::Low | Self::Info => 1,
        }
    }
}

/// Something that is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// Its name.
    pub id: &'static str,
    /// What a failure is, as a sentence without a full stop.
    pub failure: &'static str,
    /// What to do about it.
    pub recommendation: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub area: Area,
}

/// What a check found. However much that is, and it may be a guest that decides, only the first
/// [`MAX_DETAILS`] are ever written out, shortened; the others are counted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Details {
    told: Vec<String>,
    more: usize,
}

impl Details {
    /// One thing.
    pub fn one(text: impl Display) -> Self {
        [text].into_iter().collect()
    }

    /// Adds one more.
    pub fn add(&mut self, text: impl Display) {
        match self.told.len() < MAX_DETAILS {
            true => self.told.push(Plain::of(text)),
            false => self.add_untold(1),
        }
    }

    /// Adds so many that are not there to be written out.
    pub fn add_untold(&mut self, count: usize) {
        self.more = self.more.saturating_add(count);
    }

    /// Whether nothing was found.
    pub fn is_empty(&self) -> bool {
        self.told.is_empty() && self.more == 0
    }

    /// The lines of a finding.
    fn into_lines(self) -> Vec<String> {
        let (mut lines, more) = (self.told, self.more);
        lines.extend((more > 0).then(|| format!("and {more} more")));
        lines
    }
}

impl<T: Display> FromIterator<T> for Details {
    fn from_iter<I: IntoIterator<Item = T>>(found: I) -> Self {
        let mut details = Self::default();
        found.into_iter().for_each(|text| details.add(text));
        details
    }
}

/// Takes the first [`MAX_DETAIL`] characters of a text, without what could be taken for something else
/// than text.
struct Plain {
    text: String,
    left: usize,
}

impl Plain {
    fn of(text: impl Display) -> String {
        let mut plain = Self {
            text: String::new(),
            left: MAX_DETAIL,
        };
        // It fails when enough was written.
        let _ = write!(plain, "{text}");
        plain.text
    }
}

impl Write for Plain {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        for one in piece.chars() {
            self.left = self.left.checked_sub(1).ok_or(fmt::Error)?;
            let is_plain = !one.is_control();
            self.text.push(if is_plain { one } else { '\u{fffd}' });
        }
        Ok(())
    }
}

/// What a check came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is as it should be.
    Passed,
    /// It is not; what exactly.
    Failed(Details),
    /// It is to be looked at, or could not be looked at; why.
    Warning(Details),
    /// There is nothing to look at.
    NotApplicable,
}

impl Verdict {
    /// Failed if there is anything.
    pub fn unless<T: Display>(found: impl IntoIterator<Item = T>) -> Self {
        found.into_iter().collect::<Details>().into()
    }

    /// A warning of one thing.
    pub fn warning(why: impl Display) -> Self {
        Self::Warning(Details::one(why))
    }
}

impl From<Details> for Verdict {
    /// Failed if there is anything.
    fn from(found: Details) -> Self {
        match found.is_empty() {
            true => Self::Passed,
            false => Self::Failed(found),
        }
    }
}

/// Something to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Name of the check.
    pub check: String,
    /// How bad it is.
    pub severity: Severity,
    /// Whether the check has failed, and not only warned.
    pub is_failure: bool,
    /// `configuration`, `isolation`, `vulnerability` or `audit`.
    pub category: String,
    /// What is wrong.
    pub description: String,
    /// What exactly, as far as it is told.
    pub details: Vec<String>,
    /// What to do about it.
    pub recommendation: String,
    /// Name of the machine, or `daemon`.
    pub affected_resource: String,
    /// Numbers of controls by framework.
    pub controls: BTreeMap<Framework, Vec<String>>,
}

/// What a scan came to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Results {
    /// Checks that came to something: the next three together.
    pub total_checks: u32,
    /// Those that found all as it should be.
    pub passed: u32,
    /// Those that did not.
    pub failed: u32,
    /// Those that found something to look at, or could not look.
    pub warnings: u32,
    /// Those that had nothing to look at.
    pub not_applicable: u32,
    /// 0, nothing found, to 100.
    pub risk_score: u32,
    /// What to do, worst first.
    pub findings: Vec<Finding>,
    /// How many more there are.
    pub findings_left_off: u32,
}

/// Collects what checks come to.
#[derive(Debug)]
pub struct Report {
    frameworks: BTreeSet<Framework>,
    /// All but the findings.
    results: Results,
    /// Each with how much of `room` it takes.
    findings: BTreeMap<Severity, Vec<(Finding, usize)>>,
    /// The risk of each thing that was looked at.
    risks: BTreeMap<String, u32>,
    /// How many more bytes of details there may be.
    room: usize,
}

impl Report {
    /// With the checks that count for one of these frameworks; with all, if there are none.
    pub fn new(frameworks: &[Framework]) -> Self {
        Self {
            frameworks: frameworks.iter().copied().collect(),
            results: Results::default(),
            findings: BTreeMap::new(),
            risks: BTreeMap::new(),
            room: MAX_TOLD,
        }
    }

    /// Whether a check about this is part of it.
    pub fn wants(&self, area: Area) -> bool {
        self.frameworks.is_empty()
            || self
                .frameworks
                .iter()
                .any(|framework| !area.controls(*framework).is_empty())
    }

    /// Adds what a check came to at this machine.
    pub fn add(&mut self, check: &Check, resource: &str, verdict: Verdict) {
        if !self.wants(check.area) {
            return;
        }
        let controls = self.controls(check.area);
        let results = &mut self.results;
        let (is_failure, severity, details) = match verdict {
            Verdict::NotApplicable => {
                results.not_applicable += 1;
                return;
            }
            Verdict::Passed => {
                results.passed += 1;
                results.total_checks += 1;
                return;
            }
            Verdict::Failed(details) => {
                results.failed += 1;
                (true, check.severity, details)
            }
            Verdict::Warning(details) => {
                results.warnings += 1;
                (false, check.severity.min(Severity::Low), details)
            }
        };
        results.total_checks += 1;
        let weight = match is_failure {
            true => severity.weight(),
            false => 1,
        };
        let risk = self.risks.entry(resource.to_owned()).or_default();
        *risk = risk.saturating_add(weight);
        self.tell(Finding {
            check: check.id.to_owned(),
            severity,
            is_failure,
            category: category(check.area).to_owned(),
            description: check.failure.to_owned(),
            details: details.into_lines(),
            recommendation: check.recommendation.to_owned(),
            affected_resource: resource.to_owned(),
            controls,
        });
    }

    /// Adds a finding, as far as there is room, or in the place of one that is less severe.
    fn tell(&mut self, mut finding: Finding) {
        if self.findings.values().map(Vec::len).sum::<usize>() >= MAX_FINDINGS {
            self.results.findings_left_off += 1;
            let least = self.findings.iter_mut().find(|(_, all)| !all.is_empty());
            let less = least.filter(|(severity, _)| **severity < finding.severity);
            let Some((_, size)) = less.and_then(|(_, all)| all.pop()) else {
                return;
            };
            self.room += size;
        }
        let mut size = finding.details.iter().map(String::len).sum();
        if size > self.room {
            finding.details = vec!["there is too much in all to be told".to_owned()];
            size = 0;
        }
        self.room -= size;
        let all = self.findings.entry(finding.severity).or_default();
        all.push((finding, size));
    }

    /// Adds all of another, of the same frameworks.
    pub fn merge(&mut self, other: Self) {
        let (results, more) = (&mut self.results, other.results);
        results.total_checks += more.total_checks;
        results.passed += more.passed;
        results.failed += more.failed;
        results.warnings += more.warnings;
        results.not_applicable += more.not_applicable;
        results.findings_left_off += more.findings_left_off;
        let findings = other.findings.into_values().rev().flatten();
        findings.for_each(|(finding, _)| self.tell(finding));
        for (resource, risk) in other.risks {
            let sum = self.risks.entry(resource).or_default();
            *sum = sum.saturating_add(risk);
        }
    }

    /// Of the frameworks that were asked for, or of all.
    fn controls(&self, area: Area) -> BTreeMap<Framework, Vec<String>> {
        let asked = |framework: &Framework| {
            self.frameworks.is_empty() || self.frameworks.contains(framework)
        };
        let numbers = Framework::ALL.into_iter().filter(asked).map(|framework| {
            let numbers = area.controls(framework);
            (
                framework,
                numbers
                    .iter()
                    .map(|number| (*number).to_owned())
                    .collect::<Vec<_>>(),
            )
        });
        numbers.filter(|(_, numbers)| !numbers.is_empty()).collect()
    }

    /// What all of it comes to. The risk is that of the thing that has most.
    pub fn finish(mut self) -> Results {
        let risk = self.risks.values().copied().max().unwrap_or(0);
        self.results.risk_score = risk.min(MAX_RISK);
        for mut findings in self.findings.into_values().rev() {
            findings.sort_by(|(a, _), (b, _)| a.check.cmp(&b.check));
            let findings = findings.into_iter().map(|(finding, _)| finding);
            self.results.findings.extend(findings);
        }
        self.results
    }
}

fn category(area: Area) -> &'static str {
    match area {
        Area::Isolation | Area::Network | Area::StoredData => "isolation",
        Area::Vulnerabilities => "vulnerability",
        Area::Audit => "audit",
        _ => "configuration",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn check(id: &'static str, severity: Severity, area: Area) -> Check {
        Check {
            id,
            failure: "It is bad",
            recommendation: "Make it good.",
            severity,
            area,
        }
    }

    const BAD: Check = check("bad", Severity::Critical, Area::Authentication);
    const HARD: Check = check("hard", Severity::Medium, Area::Hardening);

    #[test]
    fn all_is_counted_and_the_worst_thing_is_the_risk() {
        let mut report = Report::new(&[]);
        report.add(&BAD, "one", Verdict::Passed);
        report.add(&HARD, "one", Verdict::unless(["x\u{1b}[2J"]));
        report.add(&HARD, "one", Verdict::NotApplicable);
        report.add(&HARD, "two", Verdict::warning("?"));
        report.add(&BAD, "two", Verdict::unless(0..25));
        let results = report.finish();
        let counts = (
            results.total_checks,
            results.passed,
            results.failed,
            results.warnings,
        );
        assert_eq!(counts, (4, 1, 2, 1));
        assert_eq!(results.not_applicable, 1);
        assert_eq!(results.risk_score, 26);
        let ids: Vec<_> = results
            .findings
            .iter()
            .map(|finding| finding.check.as_str())
            .collect();
        assert_eq!(ids, ["bad", "hard", "hard"]);
        assert_eq!(results.findings[0].details.len(), MAX_DETAILS + 1);
        assert_eq!(results.findings[1].details, ["x\u{fffd}[2J"]);
        assert_eq!(results.findings[2].severity, Severity::Low);
        assert_eq!(results.findings[0].controls[&Framework::Soc2], ["CC6.1"]);
    }

    #[test]
    fn of_what_is_found_only_the_first_are_written_out() {
        let written = std::cell::Cell::new(0);
        let endless = fmt::from_fn(|f| {
            loop {
                written.set(written.get() + 1);
                f.write_str("xx")?;
            }
        });
        let details: Details = std::iter::repeat_n(&endless, 1_000_000).collect();
        assert_eq!(written.get(), MAX_DETAILS * (MAX_DETAIL / 2 + 1));
        let lines = details.into_lines();
        assert_eq!(lines.len(), MAX_DETAILS + 1);
        assert_eq!(lines[0], "x".repeat(MAX_DETAIL));
        assert_eq!(lines[MAX_DETAILS], "and 999980 more");
    }

    #[test]
    fn what_all_findings_tell_is_bounded_together() {
        let long = "\u{20ac}".repeat(MAX_DETAIL);
        let mut all = Report::new(&[]);
        for resource in 0..4 {
            let mut one = Report::new(&[]);
            for _ in 0..MAX_FINDINGS / 4 {
                let details = std::iter::repeat_n(&long, MAX_DETAILS);
                one.add(&BAD, &resource.to_string(), Verdict::unless(details));
            }
            all.merge(one);
        }
        let results = all.finish();
        assert_eq!(
            (results.findings.len(), results.findings_left_off),
            (MAX_FINDINGS, 0)
        );
        let told = results.findings.iter().flat_map(|finding| &finding.details);
        let told: usize = told
            .map(String::len)
            .filter(|size| *size == long.len())
            .sum();
        assert!(told > MAX_TOLD / 2 && told <= MAX_TOLD, "{told}");
    }

    #[test]
    fn of_more_than_are_told_the_least_severe_are_left_off() {
        const LOW: Check = check("low", Severity::Low, Area::Files);
        let mut report = Report::new(&[]);
        let long = "x".repeat(MAX_DETAIL);
        for _ in 0..MAX_FINDINGS {
            let details = std::iter::repeat_n(&long, MAX_DETAILS);
            report.add(&LOW, "one", Verdict::unless(details));
        }
        report.add(&LOW, "one", Verdict::unless(["x"]));
        let mut last = Report::new(&[]);
        last.add(&BAD, "last", Verdict::unless(["y"]));
        last.add(&HARD, "last", Verdict::unless(["z"]));
        report.merge(last);
        let results = report.finish();
        let (told, left_off) = (results.findings.len(), results.findings_left_off);
        assert_eq!((told, left_off), (MAX_FINDINGS, 3));
        let first = results.findings.iter().take(3);
        let first: Vec<_> = first
            .map(|one| (one.check.as_str(), &one.details[0]))
            .collect();
        assert_eq!(
            first[..2],
            [("bad", &"y".to_owned()), ("hard", &"z".to_owned())]
        );
        assert_eq!(first[2].0, "low");
        assert_eq!(results.failed, MAX_FINDINGS as u32 + 3);
    }

    #[test]
    fn frameworks_select_checks_and_the_risk_ends_at_a_hundred() {
        let mut report = Report::new(&[Framework::Hipaa]);
        assert!(!report.wants(Area::Hardening));
        report.add(&HARD, "one", Verdict::Failed(Details::default()));
        for _ in 0..5 {
            report.add(&BAD, "one", Verdict::Failed(Details::default()));
        }
        let results = report.finish();
        assert_eq!((results.total_checks, results.risk_score), (5, 100));
        let controls = &results.findings[0].controls;
        assert_eq!(controls.len(), 1);
        assert_eq!(controls[&Framework::Hipaa][0], "164.312(a)(2)(i)");
    }
}
