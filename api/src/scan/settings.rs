//! Settings of a guest's SSH server, and of its sudo.

use std::fmt;

use super::evidence::Evidence;
use super::report::{Details, Verdict};

/// Fails if a keyword of sshd_config(5), in lower case, has this value: for all, where the first line
/// counts, or in a `Match` block.
pub fn ssh(evidence: &Evidence, keyword: &str, bad: &str) -> Verdict {
    let Some(config) = &evidence.sshd else {
        return Verdict::NotApplicable;
    };
    let (mut is_set, mut found) = (false, Details::default());
    each_ssh_line(
        config,
        &evidence.sshd_parts,
        |path, line, is_conditional| {
            let words = line.split(|one: char| one.is_whitespace() || one == '=');
            let mut words = words.filter(|word| !word.is_empty());
            if !words
                .next()
                .is_some_and(|word| word.eq_ignore_ascii_case(keyword))
            {
                return;
            }
            let value = words.next().unwrap_or_default().trim_matches('"');
            if (is_conditional || !is_set) && value.eq_ignore_ascii_case(bad) {
                found.add(format_args!("{path}: {line}"));
            }
            is_set |= !is_conditional;
        },
    );
    found.into()
}

/// Calls `visit` with the path and the text of each line with a setting, in the order in which sshd
/// reads them, and with whether it is in a `Match` block.
fn each_ssh_line<'a>(
    config: &'a str,
    parts: &'a [(String, String)],
    mut visit: impl FnMut(&'a str, &'a str, bool),
) {
    const MAIN: &str = "/etc/ssh/sshd_config";
    let first_word = |line: &'a str| line.split_whitespace().next().unwrap_or_default();
    let (mut is_conditional, mut was_included, mut was_included_for_all) = (false, false, false);
    for line in settings(config) {
        let word = first_word(line);
        if word.eq_ignore_ascii_case("match") {
            is_conditional = true;
        } else if word.eq_ignore_ascii_case("include") && line.contains("sshd_config.d") {
            // Of each setting the first value counts, so that the same parts change nothing when they
            // are read again, unless their settings were for all before and are conditional now. One
            // megabyte holds so many of these lines that following each would never end.
            let was_read = match is_conditional {
                true => &mut was_included,
                false => &mut was_included_for_all,
            };
            if std::mem::replace(was_read, true) {
                continue;
            }
            for (path, text) in parts {
                let mut is_conditional = is_conditional;
                for line in settings(text) {
                    is_conditional |= first_word(line).eq_ignore_ascii_case("match");
                    visit(path, line, is_conditional);
                }
            }
        } else {
            visit(MAIN, line, is_conditional);
        }
    }
}

/// Lines that are neither empty nor comments.
fn settings(text: &str) -> impl Iterator<Item = &str> {
    let lines = text.lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// Fails if sudo lets somebody do something without a password.
pub fn sudo(evidence: &Evidence) -> Verdict {
    if evidence.sudoers.is_empty() {
        return Verdict::NotApplicable;
    }
    let files = evidence.sudoers.iter();
    let lines = files.flat_map(|(path, text)| settings(text).map(move |line| (path, line)));
    let is_open = |line: &str| line.contains("NOPASSWD") || line.contains("!authenticate");
    let found = lines.filter(|(_, line)| is_open(line));
    Verdict::unless(found.map(|(path, line)| fmt::from_fn(move |f| write!(f, "{path}: {line}"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sshd(config: &str, parts: &[(&str, &str)]) -> Evidence {
        let parts = parts
            .iter()
            .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()));
        Evidence {
            sshd: Some(config.to_owned()),
            sshd_parts: parts.collect(),
            ..Evidence::default()
        }
    }

    fn failed(found: &[&str]) -> Verdict {
        Verdict::unless(found)
    }

    #[test]
    fn of_sshs_settings_the_first_counts() {
        let root = |evidence: &Evidence| ssh(evidence, "permitrootlogin", "yes");
        let main = "/etc/ssh/sshd_config: ";
        for (config, parts, expected) in [
            ("", &[][..], Verdict::Passed),
            ("#PermitRootLogin yes\n", &[], Verdict::Passed),
            (
                "permitrootlogin=YES\n",
                &[],
                failed(&[&format!("{main}permitrootlogin=YES")]),
            ),
            (
                "PermitRootLogin no\nPermitRootLogin yes\n",
                &[],
                Verdict::Passed,
            ),
            (
                "Include /etc/ssh/sshd_config.d/*.conf\nPermitRootLogin no\n",
                &[("/p", "PermitRootLogin yes")],
                failed(&["/p: PermitRootLogin yes"]),
            ),
            (
                "PermitRootLogin no\nMatch User bob\n  PermitRootLogin yes\n",
                &[],
                failed(&[&format!("{main}PermitRootLogin yes")]),
            ),
            ("PermitRootLogin prohibit-password\n", &[], Verdict::Passed),
            (
                "PermitRootLogin no\nInclude sshd_config.d/*\nMatch User bob\nInclude sshd_config.d/*\n",
                &[("/p", "PermitRootLogin yes")],
                failed(&["/p: PermitRootLogin yes"]),
            ),
        ] {
            assert_eq!(root(&sshd(config, parts)), expected, "{config}");
        }
        assert_eq!(root(&Evidence::default()), Verdict::NotApplicable);
    }

    #[test]
    fn parts_of_sshs_settings_are_read_once_however_often_they_are_included() {
        let part = format!("Match User bob\n{}", "PermitRootLogin yes\n".repeat(30));
        let config = "Include sshd_config.d/*\n".repeat(1000);
        let root = ssh(&sshd(&config, &[("/p", &part)]), "permitrootlogin", "yes");
        assert_eq!(root, failed(&["/p: PermitRootLogin yes"; 30]));
    }

    #[test]
    fn sudo_without_a_password_is_found() {
        let of = |text: &str| Evidence {
            sudoers: vec![("/etc/sudoers.d/x".into(), text.to_owned())],
            ..Evidence::default()
        };
        let line = "bob ALL=(ALL) NOPASSWD: ALL";
        assert_eq!(
            sudo(&of(line)),
            failed(&[&format!("/etc/sudoers.d/x: {line}")])
        );
        assert_eq!(
            sudo(&of("# bob ALL=(ALL) NOPASSWD: ALL\nroot ALL=(ALL) ALL")),
            Verdict::Passed
        );
        assert_eq!(sudo(&Evidence::default()), Verdict::NotApplicable);
    }
}
