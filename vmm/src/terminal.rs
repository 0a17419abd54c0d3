//! The terminal of the user, in raw mode while the guest has it.

use std::io::{self, IsTerminal, Stdin};

use rustix::process::getpgrp;
use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The terminal in raw mode, so that every key goes to the guest. Dropping it restores the mode
/// that it had.
pub struct RawTerminal {
    stdin: Stdin,
    before: Termios,
}

impl RawTerminal {
    /// Puts the terminal into raw mode, if standard input is one and this process may use it.
    ///
    /// # Errors
    /// The terminal does not take the mode.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        // From the background, setting the mode would stop the process (SIGTTOU).
        if !stdin.is_terminal() || tcgetpgrp(&stdin).ok() != Some(getpgrp()) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // The guest's line feeds, and the VMM's own messages, still need carriage returns.
        raw.output_modes |= OutputModes::OPOST | OutputModes::ONLCR;
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { stdin, before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that has gone away cannot be restored, and need not be.
        let _ = tcsetattr(&self.stdin, OptionalActions::Now, &self.before);
    }
}
