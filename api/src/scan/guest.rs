//! What the evidence of a guest comes to. See [`sysctl`](super::sysctl) and
//! [`accounts`](super::accounts) for more.

use std::fmt;

use super::accounts;
use super::control::Area;
use super::evidence::{Evidence, MAX_EVIDENCE};
use super::files::Paths;
use super::listeners::{Listener, listeners};
use super::report::{Check, Details, Report, Severity, Verdict};
use super::settings::{ssh, sudo};
use super::sysctl;

/// Ports of services that pass passwords and commands on as they are: FTP, telnet, finger, rexec,
/// rlogin, rsh, and Docker without TLS.
const PLAIN_SERVICES: [u16; 7] = [21, 23, 79, 512, 513, 514, 2375];
/// Programs that run as their owner on any Debian.
const KNOWN_SET_ID: [&str; 24] = [
    "chage",
    "chfn",
    "chsh",
    "crontab",
    "dbus-daemon-launch-helper",
    "dotlockfile",
    "expiry",
    "fusermount",
    "fusermount3",
    "gpasswd",
    "mount",
    "mount.nfs",
    "newgidmap",
    "newgrp",
    "newuidmap",
    "passwd",
    "ping",
    "ssh-agent",
    "ssh-keysign",
    "su",
    "sudo",
    "umount",
    "unix_chkpwd",
    "wall",
];

type Judge = fn(&Evidence) -> Verdict;

/// What the paths begin with of the files that tell of accounts.
const ACCOUNTS: &[&str] = &["/etc/passwd", "/etc/shadow"];
/// The same of settings of sshd, and of their parts.
const SSH: &[&str] = &["/etc/ssh/sshd_config"];
/// The same of settings of sudo, and of their parts.
const SUDO: &[&str] = &["/etc/sudoers"];
/// The same of sockets.
const SOCKETS: &[&str] = &["/proc/net/"];

const fn check(
    id: &'static str,
    area: Area,
    severity: Severity,
    failure: &'static str,
    recommendation: &'static str,
) -> Check {
    Check {
        id,
        failure,
        recommendation,
        severity,
        area,
    }
}

/// Checks of guests, but for those of [`sysctl`], each with the files that it looks at.
static CHECKS: [(Check, Judge, &[&str]); 14] = [
    (
        check(
            "ssh.root_login",
            Area::Authentication,
            Severity::Medium,
            "SSH root login enabled",
            "Disable root SSH access: PermitRootLogin no",
        ),
        |evidence| ssh(evidence, "permitrootlogin", "yes"),
        SSH,
    ),
    (
        check(
            "ssh.empty_passwords",
            Area::Authentication,
            Severity::High,
            "SSH lets accounts in that have no password",
            "Set PermitEmptyPasswords no",
        ),
        |evidence| ssh(evidence, "permitemptypasswords", "yes"),
        SSH,
    ),
    (
        check(
            "account.empty_password",
            Area::Authentication,
            Severity::High,
            "Accounts have no password",
            "Give them one, or lock them: passwd -l NAME",
        ),
        accounts::empty_passwords,
        ACCOUNTS,
    ),
    (
        check(
            "account.default_password",
            Area::Authentication,
            Severity::Critical,
            "Accounts have a password that everybody tries first",
            "Give them another: passwd NAME",
        ),
        accounts::default_passwords,
        ACCOUNTS,
    ),
    (
        check(
            "account.weak_hash",
            Area::Authentication,
            Severity::Medium,
            "Passwords are kept as DES or MD5 hashes, which can be broken",
            "Set them anew with ENCRYPT_METHOD SHA512 or YESCRYPT in /etc/login.defs",
        ),
        accounts::weak_hashes,
        ACCOUNTS,
    ),
    (
        check(
            "account.other_root",
            Area::LeastPrivilege,
            Severity::High,
            "Accounts beside root have its user id",
            "Give them another user id, or remove them",
        ),
        accounts::other_roots,
        ACCOUNTS,
    ),
    (
        check(
            "sudo.no_password",
            Area::LeastPrivilege,
            Severity::Medium,
            "sudo asks for no password",
            "Remove NOPASSWD and !authenticate from the sudoers files",
        ),
        sudo,
        SUDO,
    ),
    (
        check(
            "file.secrets_exposed",
            Area::Files,
            Severity::High,
            "Files with secrets can be read or changed by everybody",
            "Take the permissions of others away: chmod o-rwx FILE",
        ),
        |evidence| of_files(evidence, &evidence.files.exposed),
        &[],
    ),
    (
        check(
            "file.world_writable",
            Area::Files,
            Severity::Medium,
            "Files, or directories without the sticky bit, can be changed by everybody",
            "chmod o-w FILE, or chmod +t DIRECTORY",
        ),
        |evidence| of_files(evidence, &evidence.files.world_writable),
        &[],
    ),
    (
        check(
            "file.set_id",
            Area::LeastPrivilege,
            Severity::Medium,
            "Programs run as their owner or group that no Debian system has so",
            "chmod ug-s FILE, if that is not meant",
        ),
        set_id,
        &[],
    ),
    (
        check(
            "file.unowned",
            Area::Files,
            Severity::Low,
            "Files belong to users or groups that there are not",
            "chown them, or remove them",
        ),
        |evidence| of_files(evidence, &evidence.files.unowned),
        &["/etc/passwd", "/etc/group"],
    ),
    (
        check(
            "service.plain",
            Area::Services,
            Severity::High,
            "Services listen that pass passwords or commands on unencrypted",
            "Stop them, and use SSH or TLS",
        ),
        |evidence| services(evidence, |listener| PLAIN_SERVICES.contains(&listener.port)),
        SOCKETS,
    ),
    (
        check(
            "service.reachable",
            Area::Services,
            Severity::Low,
            "Services listen on addresses that others reach",
            "Let them listen on 127.0.0.1, if nobody else is to reach them",
        ),
        |evidence| match services(evidence, |_| true) {
            Verdict::Failed(found) => Verdict::Warning(found),
            other => other,
        },
        SOCKETS,
    ),
    (
        check(
            "guest.unreadable",
            Area::Files,
            Severity::Low,
            "Some of the guest was too large to be looked at",
            "Look at it in the guest",
        ),
        |evidence| {
            let mut cut = Details::default();
            if evidence.is_over_budget {
                let most = MAX_EVIDENCE >> 20;
                cut.add(format_args!(
                    "what there is to read is more than {most} MiB"
                ));
            }
            let files = evidence.cut.iter().chain(&evidence.files.incomplete);
            files.for_each(|file| cut.add(file));
            match cut.is_empty() {
                true => Verdict::Passed,
                false => Verdict::Warning(cut),
            }
        },
        &[],
    ),
];

/// Adds what all checks of a guest come to.
pub fn judge(evidence: &Evidence, vm: &str, report: &mut Report) {
    for (check, judge, files) in &CHECKS {
        if report.wants(check.area) {
            let verdict = unless_cut(judge(evidence), evidence, files);
            report.add(check, vm, verdict);
        }
    }
    for wanted in &sysctl::WANTED {
        let verdict = sysctl::judge(wanted, &evidence.sysctls);
        let verdict = unless_cut(verdict, evidence, &[&wanted.path()]);
        report.add(&wanted.check, vm, verdict);
    }
}

/// That nothing was found says nothing, if these files were not read to their ends.
fn unless_cut(verdict: Verdict, evidence: &Evidence, files: &[&str]) -> Verdict {
    let is_looked_at = |path: &&String| files.iter().any(|file| path.starts_with(file));
    let cut = evidence.cut.iter().filter(is_looked_at);
    let cut = cut.map(|path| fmt::from_fn(move |f| write!(f, "{path} was not read to its end")));
    let cut: Details = cut.collect();
    match verdict {
        Verdict::Passed | Verdict::NotApplicable if !cut.is_empty() => Verdict::Warning(cut),
        verdict => verdict,
    }
}

/// That nothing was found says nothing, if not all was looked at.
fn of_files(evidence: &Evidence, found: &Paths) -> Verdict {
    let mut details: Details = found.kept.iter().collect();
    details.add_untold(found.left_off);
    match (Verdict::from(details), &evidence.files.incomplete) {
        (Verdict::Passed, Some(why)) => Verdict::warning(why),
        (verdict, _) => verdict,
    }
}

fn set_id(evidence: &Evidence) -> Verdict {
    let is_known = |path: &String| {
        let system = [
            "/bin/",
            "/sbin/",
            "/usr/bin/",
            "/usr/sbin/",
            "/usr/lib/",
            "/usr/libexec/",
        ];
        let name = path.rsplit('/').next().unwrap_or_default();
        KNOWN_SET_ID.contains(&name) && system.iter().any(|start| path.starts_with(start))
    };
    let Paths { kept, left_off } = &evidence.files.set_id;
    let unknown = Paths {
        kept: kept
            .iter()
            .filter(|path| !is_known(path))
            .cloned()
            .collect(),
        left_off: 0,
    };
    match of_files(evidence, &unknown) {
        Verdict::Passed if *left_off > 0 => Verdict::warning(format_args!(
            "there are {left_off} more of them than are looked at"
        )),
        verdict => verdict,
    }
}

fn services(evidence: &Evidence, is_meant: impl Fn(&Listener) -> bool) -> Verdict {
    if evidence.sockets.is_empty() {
        return Verdict::NotApplicable;
    }
    let tables = evidence.sockets.iter();
    let mut found: Vec<_> = tables
        .flat_map(|(name, table)| listeners(name, table))
        .filter(|listener| !listener.address.is_loopback() && is_meant(listener))
        .collect();
    found.sort_unstable();
    found.dedup();
    let told = found.iter().map(|listener| {
        let Listener {
            transport,
            port,
            address,
        } = listener;
        fmt::from_fn(move |f| write!(f, "{transport} port {port} on {address}"))
    });
    Verdict::unless(told)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn failed(found: &[&str]) -> Verdict {
        Verdict::unless(found)
    }

    #[test]
    fn sockets_that_others_reach_are_found() {
        let head = "  sl  local_address rem_address   st\n";
        let tcp = format!(
            "{head}   0: 00000000:0016 00000000:0000 0A 0\n   1: 0100007F:1F90 00000000:0000 0A\n   \
             2: 05C8A8C0:0017 00000000:0000 0A\n   3: 05C8A8C0:9C40 08080808:0050 01\nnonsense\n"
        );
        let tcp6 = format!(
            "{head}   0: 00000000000000000000000001000000:0050 0:0 0A\n   \
             1: 00000000000000000000000000000000:0050 0:0 0A\n"
        );
        let udp = format!("{head}   0: 00000000:0035 00000000:0000 07\n");
        let evidence = Evidence {
            sockets: vec![("tcp", tcp), ("tcp6", tcp6), ("udp", udp)],
            ..Evidence::default()
        };
        assert_eq!(
            services(&evidence, |_| true),
            failed(&[
                "tcp port 22 on 0.0.0.0",
                "tcp port 23 on 192.168.200.5",
                "tcp port 80 on ::",
                "udp port 53 on 0.0.0.0",
            ])
        );
        let mut report = Report::new(&[]);
        judge(&evidence, "vm", &mut report);
        let found = |id: &str| {
            let findings = report_findings(&evidence);
            findings.into_iter().find(|(check, _)| check == id)
        };
        assert_eq!(found("service.plain"), Some(("service.plain".into(), true)));
        assert_eq!(
            found("service.reachable"),
            Some(("service.reachable".into(), false))
        );
    }

    fn report_findings(evidence: &Evidence) -> Vec<(String, bool)> {
        let mut report = Report::new(&[]);
        judge(evidence, "vm", &mut report);
        let findings = report.finish().findings.into_iter();
        findings
            .map(|finding| (finding.check, finding.is_failure))
            .collect()
    }

    #[test]
    fn programs_that_run_as_their_owner_are_known_by_name_and_place() {
        let mut evidence = Evidence::default();
        evidence.files.set_id.kept = ["/usr/bin/su", "/usr/bin/nmap", "/tmp/su"]
            .map(str::to_owned)
            .into();
        assert_eq!(set_id(&evidence), failed(&["/usr/bin/nmap", "/tmp/su"]));
        evidence.files.set_id.kept.truncate(1);
        assert_eq!(set_id(&evidence), Verdict::Passed);
        evidence.files.set_id.left_off = 1;
        assert!(matches!(set_id(&evidence), Verdict::Warning(_)));
        evidence.files.incomplete = Some("why".into());
        assert_eq!(set_id(&evidence), Verdict::warning("why"));
    }

    #[test]
    fn what_was_not_read_to_its_end_has_not_passed() {
        let mut evidence = Evidence {
            passwd: Some("root:!:0:0::/root:/bin/sh\n".into()),
            sshd: Some("PermitRootLogin yes\n".into()),
            sockets: vec![("tcp", String::new())],
            ..Evidence::default()
        };
        let warned = |evidence: &Evidence| {
            let findings = report_findings(evidence).into_iter();
            let warned = findings.filter(|(_, is_failure)| !is_failure);
            warned.map(|(check, _)| check).collect::<Vec<_>>()
        };
        assert_eq!(warned(&evidence), [""; 0]);
        for (cut, checks) in [
            ("/etc/passwd", &ACCOUNT_CHECKS[..]),
            ("/etc/shadow", &ACCOUNT_CHECKS[..4]),
            ("/etc/group", &["file.unowned"]),
            // The other setting has failed.
            ("/etc/ssh/sshd_config", &["ssh.empty_passwords"]),
            ("/etc/ssh/sshd_config.d/1.conf", &["ssh.empty_passwords"]),
            ("/etc/sudoers.d", &["sudo.no_password"]),
            ("/proc/net/udp", &["service.plain", "service.reachable"]),
            ("/proc/sys/fs/suid_dumpable", &["fs.suid_dumpable"]),
        ] {
            evidence.cut = vec![cut.to_owned()];
            let mut expected = [checks, &["guest.unreadable"]].concat();
            let mut found = warned(&evidence);
            expected.sort_unstable();
            found.sort_unstable();
            assert_eq!(found, expected, "{cut}");
        }
        evidence.cut.clear();
        evidence.is_over_budget = true;
        assert_eq!(warned(&evidence), ["guest.unreadable"]);
        evidence.is_over_budget = false;
        evidence.files.exposed.left_off = 1;
        let lost = report_findings(&evidence);
        assert!(
            lost.contains(&("file.secrets_exposed".into(), true)),
            "{lost:?}"
        );
    }

    const ACCOUNT_CHECKS: [&str; 5] = [
        "account.empty_password",
        "account.default_password",
        "account.weak_hash",
        "account.other_root",
        "file.unowned",
    ];

    proptest! {
        #[test]
        fn nothing_that_a_guest_says_makes_a_judge_panic(
            one in "\\PC{0,200}", other in "[ :$/#=a-zA-Z0-9\n]{0,400}",
        ) {
            let evidence = Evidence {
                passwd: Some(other.clone()),
                shadow: Some(one.clone()),
                sshd: Some(format!("Include sshd_config.d\n{other}")),
                sshd_parts: vec![("p".into(), one.clone())],
                sudoers: vec![("s".into(), other.clone())],
                sockets: vec![("tcp", one), ("udp6", other)],
                ..Evidence::default()
            };
            let mut report = Report::new(&[]);
            judge(&evidence, "vm", &mut report);
            report.finish();
        }
    }
}
