//! Why a machine ended, and how everybody learns of it.

use std::io;
use std::sync::{Arc, OnceLock};

use vmm_sys_util::eventfd::EventFd;

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered off (ACPI sleep state S5).
    PowerOff,
    /// The guest asked for a reset (ACPI reset register or keyboard controller).
    Reboot,
    /// The guest's kernel reported a panic.
    Panic,
    /// A vCPU could not handle an exception: the processor would reset.
    TripleFault,
    /// The host asked for the end: a signal, the API, or the escape sequence of the terminal.
    Requested,
    /// The machine cannot go on.
    Error(String),
}

impl ExitReason {
    /// The status with which the `vmm` process ends.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::Requested => 0,
            Self::Error(_) => 1,
            Self::Reboot => 10,
            Self::Panic => 11,
            Self::TripleFault => 12,
        }
    }

    /// The name of the event that tells of it.
    pub fn event(&self) -> &'static str {
        match self {
            Self::PowerOff | Self::Requested => "shutdown",
            Self::Error(_) => "error",
            Self::Reboot => "reboot",
            Self::Panic => "panic",
            Self::TripleFault => "triple_fault",
        }
    }

    /// One sentence for people.
    pub fn describe(&self) -> String {
        match self {
            Self::PowerOff => "the guest powered off".to_owned(),
            Self::Requested => "the host ended the machine".to_owned(),
            Self::Reboot => "the guest asked for a reboot".to_owned(),
            Self::Panic => "the guest's kernel panicked; its console says why".to_owned(),
            Self::TripleFault => "the guest caused a triple fault".to_owned(),
            Self::Error(what) => what.clone(),
        }
    }
}

/// Ends the machine. Clones end the same machine; the first reason given is the one that counts.
#[derive(Debug, Clone)]
pub struct ExitSignal {
    reason: Arc<OnceLock<ExitReason>>,
    event: Arc<EventFd>,
}

impl ExitSignal {
    /// A signal that nobody has given yet.
    ///
    /// # Errors
    /// The host has no eventfd left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            reason: Arc::default(),
            event: Arc::new(event),
        })
    }

    /// Ends the machine for this reason, unless it has already been ended.
    pub fn end(&self, reason: ExitReason) {
        if self.reason.set(reason).is_ok() {
            // Fails only if the counter is full, and then the event loop is awake anyway.
            let _ = self.event.write(1);
        }
    }

    /// Why the machine was ended, if it was.
    pub fn reason(&self) -> Option<&ExitReason> {
        self.reason.get()
    }

    /// Becomes readable when the machine is ended.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let signal = ExitSignal::new().unwrap();
        assert_eq!(signal.reason(), None);
        signal.clone().end(ExitReason::Panic);
        signal.end(ExitReason::Reboot);
        assert_eq!(signal.reason(), Some(&ExitReason::Panic));
        assert_eq!(signal.event().read().unwrap(), 1);
    }

    #[test]
    fn reboot_panic_and_errors_are_told_apart() {
        let reasons = [
            ExitReason::PowerOff,
            ExitReason::Error(String::new()),
            ExitReason::Reboot,
            ExitReason::Panic,
            ExitReason::TripleFault,
        ];
        let statuses: std::collections::HashSet<_> =
            reasons.iter().map(ExitReason::status).collect();
        assert_eq!(statuses.len(), reasons.len());
    }
}
