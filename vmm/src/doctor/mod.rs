//! Whether this machine's KVM runs Linux guests, and if not, why and what to do.
//!
//! Four checks in this order, each only if those before it found no failure: the device node
//! opens; the kernel speaks the API version of this VMM; it has the capabilities that every
//! machine needs; a guest that uses what Linux cannot do without gets it. Only the last one
//! tells a KVM that emulates part of the processor in software from a real one, since all its
//! ioctls look alike. What makes machines faster and no machine needs is told besides.

mod checks;
mod probe;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

/// What to examine, and how to tell.
#[derive(Debug, Clone)]
pub struct Options {
    /// The device node of KVM.
    pub device: PathBuf,
    /// Write the report as JSON rather than as text.
    pub json: bool,
    /// The longest that the guest of the last check may run.
    pub time_limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: PathBuf::from("/dev/kvm"),
            json: false,
            // The guest runs eight instructions. A host whose every core is busy still runs
            // them at once.
            time_limit: Duration::from_secs(10),
        }
    }
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Guests run, with a restriction.
    Warn,
    /// Guests do not run.
    Fail,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Name of the check.
    pub check: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found, in a sentence.
    pub detail: String,
    /// What to do about it; `None` if nothing needs to be done.
    pub advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, detail: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Ok,
            detail: detail.into(),
            advice: None,
        }
    }

    fn warn(check: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Warn,
            detail: detail.into(),
            advice: Some(advice.into()),
        }
    }

    fn fail(check: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            check,
            status: Status::Fail,
            detail: detail.into(),
            advice: Some(advice.into()),
        }
    }
}

/// All findings, and what they amount to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Linux guests run here.
    pub usable: bool,
    /// What the checks found, in their order.
    pub findings: Vec<Finding>,
}

impl Report {
    fn new(findings: Vec<Finding>) -> Self {
        Self {
            usable: findings
                .iter()
                .all(|finding| finding.status != Status::Fail),
            findings,
        }
    }

    /// Writes one line for each finding and one for the verdict.
    ///
    /// # Errors
    /// `out` does not take it.
    pub fn write_text(&self, out: &mut impl Write) -> io::Result<()> {
        for finding in &self.findings {
            write!(
                out,
                "{:<4}  {:<12}  {}",
                finding.status.as_str(),
                finding.check,
                finding.detail
            )?;
            match &finding.advice {
                Some(advice) => writeln!(out, " What to do: {advice}")?,
                None => writeln!(out)?,
            }
        }
        writeln!(
            out,
            "{}",
            if self.usable {
                "KVM is usable: Linux guests run on this machine."
            } else {
                "KVM is not usable: Linux guests do not run on this machine."
            }
        )
    }

    /// Writes one JSON object and a line feed.
    ///
    /// # Errors
    /// `out` does not take it.
    pub fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer_pretty(&mut *out, self)?;
        writeln!(out)
    }
}

/// Examines this machine's KVM.
pub fn examine(options: &Options) -> Report {
    let mut findings = Vec::new();
    match checks::open(&options.device) {
        Err(finding) => findings.push(finding),
        Ok((kvm, finding)) => {
            findings.push(finding);
            findings.extend(checks::kernel(&kvm));
            if findings
                .iter()
                .all(|finding| finding.status != Status::Fail)
            {
                findings.push(probe::run(kvm, options.time_limit).into());
            }
        }
    }
    Report::new(findings)
}

/// Examines this machine's KVM, writes the report to `out`, and returns whether guests run.
///
/// # Errors
/// `out` does not take the report.
pub fn run(options: &Options, out: &mut impl Write) -> io::Result<bool> {
    let report = examine(options);
    if options.json {
        report.write_json(out)?;
    } else {
        report.write_text(out)?;
    }
    out.flush()?;
    Ok(report.usable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings() -> Vec<Finding> {
        vec![
            Finding::ok("device", "It opens."),
            Finding::warn("vcpus", "Few.", "Ask for fewer."),
            Finding::fail("guest", "It does not run.", "use another machine."),
        ]
    }

    #[test]
    fn one_failure_makes_it_unusable_and_a_warning_does_not() {
        assert!(!Report::new(findings()).usable);
        assert!(Report::new(findings()[..2].to_vec()).usable);
    }

    #[test]
    fn text_has_one_line_for_each_finding_and_the_verdict_last() {
        let mut out = Vec::new();
        Report::new(findings()).write_text(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "ok    device        It opens.\n\
             warn  vcpus         Few. What to do: Ask for fewer.\n\
             fail  guest         It does not run. What to do: use another machine.\n\
             KVM is not usable: Linux guests do not run on this machine.\n"
        );
    }

    #[test]
    fn json_holds_the_same() {
        let mut out = Vec::new();
        Report::new(findings()).write_json(&mut out).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(
            value,
            serde_json::json!({"usable": false, "findings": [
                {"check": "device", "status": "ok", "detail": "It opens.", "advice": null},
                {"check": "vcpus", "status": "warn", "detail": "Few.", "advice": "Ask for fewer."},
                {"check": "guest", "status": "fail", "detail": "It does not run.",
                 "advice": "use another machine."},
            ]})
        );
    }

    #[test]
    fn a_missing_device_ends_the_examination() {
        let directory = tempfile::tempdir().unwrap();
        let options = Options {
            device: directory.path().join("kvm"),
            ..Options::default()
        };
        let report = examine(&options);
        assert!(!report.usable);
        assert_eq!(report.findings.len(), 1);
        assert_eq!(report.findings[0].check, "device");
    }

    #[test]
    fn a_file_that_is_no_kvm_is_told_apart() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let options = Options {
            device: file.path().to_owned(),
            json: true,
            ..Options::default()
        };
        let mut out = Vec::new();
        assert!(!run(&options, &mut out).unwrap());
        let value: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(value["findings"][1]["check"], "api");
        assert_eq!(value["findings"][1]["status"], "fail");
    }
}
