//! What the end of a `vmm` process means.

use std::fmt::Write as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::process::Signal;

use super::monitor::Told;
use crate::domain::End;

/// Exit statuses of the VMM.
pub mod exit {
    pub const POWER_OFF: i32 = 0;
    pub const ERROR: i32 = 1;
    pub const USAGE: i32 = 2;
    pub const REBOOT: i32 = 10;
    pub const PANIC: i32 = 11;
    pub const TRIPLE_FAULT: i32 = 12;
}

/// The signal that ends a process for a system call that its filter forbids.
const SIGSYS: i32 = Signal::SYS.as_raw();

/// What an exit status means. The VMM's own sentence, `told` by its event monitor, comes before
/// one made here; the end of its standard error is for ends that it could not tell of.
pub fn describe_end(
    status: &io::Result<Option<ExitStatus>>,
    told: Option<Told>,
    stderr: &str,
) -> End {
    let status = match (status, &told) {
        (Ok(Some(status)), _) => status,
        (Ok(None), Some(Told { is_orderly, reason })) => {
            let reason = reason.clone();
            return match is_orderly {
                true => End::Orderly { reason },
                false => End::Failed { reason },
            };
        }
        (Ok(None), None) => {
            let mut reason = "the vmm ended without a word, as when it is killed".to_owned();
            if !stderr.is_empty() {
                let _ = write!(reason, ": {stderr}");
            }
            return End::Failed { reason };
        }
        (Err(error), _) => {
            return End::Failed {
                reason: format!("the vmm's exit status is unknown: {error}"),
            };
        }
    };
    let what = match (status.code(), status.signal()) {
        (Some(exit::POWER_OFF), _) => "the guest powered off",
        (Some(exit::REBOOT), _) => "the guest asked for a reboot",
        (Some(exit::PANIC), _) => "the guest's kernel panicked",
        (Some(exit::TRIPLE_FAULT), _) => "the guest caused a triple fault",
        (Some(exit::ERROR), _) => "the vmm failed",
        (Some(exit::USAGE), _) => "the vmm refused its configuration",
        (Some(code), _) => &format!("the vmm exited with status {code}"),
        (None, Some(signal @ SIGSYS)) => &format!(
            "the vmm was killed by signal {signal} (SIGSYS): it made a system call that its jail \
             forbids"
        ),
        (None, Some(signal)) => &format!("the vmm was killed by signal {signal}"),
        (None, None) => "the vmm ended",
    };
    let reason = match (told, stderr) {
        (Some(told), _) => told.reason,
        (None, "") => what.to_owned(),
        (None, stderr) => format!("{what}: {stderr}"),
    };
    match status.code() {
        Some(exit::POWER_OFF | exit::REBOOT) => End::Orderly { reason },
        _ => End::Failed { reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_have_their_meaning() {
        let told = |is_orderly, reason: &str| Told {
            is_orderly,
            reason: reason.to_owned(),
        };
        let describe = |status, told, stderr| match describe_end(&Ok(status), told, stderr) {
            End::Orderly { reason } => (true, reason),
            End::Failed { reason } => (false, reason),
        };
        let end = |raw, reason: Option<&str>, stderr| {
            let told = reason.map(|reason| told(false, reason));
            describe(Some(ExitStatus::from_raw(raw)), told, stderr)
        };
        // Of one that an earlier daemon has started, nothing is known but what it says.
        for (orderly, reason) in [(true, "the guest powered off"), (false, "it panicked")] {
            let told = Some(told(orderly, reason));
            assert_eq!(describe(None, told, ""), (orderly, reason.to_owned()));
        }
        let killed = "the vmm ended without a word, as when it is killed: last words";
        assert_eq!(
            describe(None, None, "last words"),
            (false, killed.to_owned())
        );
        let exit = |code: i32| code << 8;
        for (raw, told, stderr, orderly, reason) in [
            (exit(0), None, "", true, "the guest powered off"),
            (exit(0), Some("asked to end"), "", true, "asked to end"),
            (exit(10), None, "", true, "the guest asked for a reboot"),
            (exit(11), Some("it panicked"), "noise", false, "it panicked"),
            (exit(12), None, "", false, "the guest caused a triple fault"),
            (
                exit(1),
                None,
                "no /dev/kvm",
                false,
                "the vmm failed: no /dev/kvm",
            ),
            (
                exit(2),
                None,
                "bad",
                false,
                "the vmm refused its configuration: bad",
            ),
            (exit(3), None, "", false, "the vmm exited with status 3"),
            (9, None, "", false, "the vmm was killed by signal 9"),
            (
                31,
                None,
                "",
                false,
                "the vmm was killed by signal 31 (SIGSYS): it made a system call that its jail \
                 forbids",
            ),
        ] {
            assert_eq!(end(raw, told, stderr), (orderly, reason.to_owned()));
        }
    }
}
