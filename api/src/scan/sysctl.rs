//! Settings of the guest's kernel.

use std::collections::BTreeMap;

use super::control::Area;
use super::report::{Check, Severity, Verdict};

/// A setting, and what it should be.
#[derive(Debug)]
pub struct Wanted {
    /// Its name.
    pub name: &'static str,
    /// Values that are good.
    good: &'static [&'static str],
    /// The check.
    pub check: Check,
}

const fn wanted(
    name: &'static str,
    good: &'static [&'static str],
    failure: &'static str,
    recommendation: &'static str,
    severity: Severity,
) -> Wanted {
    Wanted {
        name,
        good,
        check: Check {
            id: name,
            failure,
            recommendation,
            severity,
            area: Area::Hardening,
        },
    }
}

impl Wanted {
    /// The file with its value.
    pub fn path(&self) -> String {
        format!("/proc/sys/{}", self.name.replace('.', "/"))
    }
}

/// Settings that are looked at; one that the kernel does not have is not.
pub static WANTED: [Wanted; 8] = [
    wanted(
        "kernel.randomize_va_space",
        &["2"],
        "Addresses of programs are not randomized in full",
        "Set kernel.randomize_va_space to 2.",
        Severity::Medium,
    ),
    wanted(
        "kernel.kptr_restrict",
        &["1", "2"],
        "Addresses of the kernel are shown to everybody",
        "Set kernel.kptr_restrict to 1 or 2.",
        Severity::Low,
    ),
    wanted(
        "kernel.dmesg_restrict",
        &["1"],
        "The kernel's log is shown to everybody",
        "Set kernel.dmesg_restrict to 1.",
        Severity::Low,
    ),
    wanted(
        "fs.protected_symlinks",
        &["1"],
        "Symbolic links of others are followed in directories that everybody may write",
        "Set fs.protected_symlinks to 1.",
        Severity::Medium,
    ),
    wanted(
        "fs.protected_hardlinks",
        &["1"],
        "Hard links can be made to files of others",
        "Set fs.protected_hardlinks to 1.",
        Severity::Medium,
    ),
    wanted(
        "fs.suid_dumpable",
        &["0"],
        "Programs that run as their owner leave their memory on the disk when they crash",
        "Set fs.suid_dumpable to 0.",
        Severity::Low,
    ),
    wanted(
        "net.ipv4.conf.all.accept_redirects",
        &["0"],
        "Others in the network may change routes",
        "Set net.ipv4.conf.all.accept_redirects to 0.",
        Severity::Low,
    ),
    wanted(
        "net.ipv4.conf.all.accept_source_route",
        &["0"],
        "Packets may say on which way they are to be answered",
        "Set net.ipv4.conf.all.accept_source_route to 0.",
        Severity::Low,
    ),
];

/// What this setting comes to.
pub fn judge(wanted: &Wanted, found: &BTreeMap<&'static str, String>) -> Verdict {
    match found.get(wanted.name) {
        None => Verdict::NotApplicable,
        Some(value) if wanted.good.contains(&value.as_str()) => Verdict::Passed,
        Some(value) => Verdict::unless([format_args!("{} = {value}", wanted.name)]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_judged_by_their_values() {
        let found = BTreeMap::from([
            ("kernel.randomize_va_space", "2".to_owned()),
            ("kernel.kptr_restrict", "0".to_owned()),
        ]);
        assert_eq!(judge(&WANTED[0], &found), Verdict::Passed);
        let failed = Verdict::unless(["kernel.kptr_restrict = 0"]);
        assert_eq!(judge(&WANTED[1], &found), failed);
        assert_eq!(judge(&WANTED[2], &found), Verdict::NotApplicable);
    }
}
