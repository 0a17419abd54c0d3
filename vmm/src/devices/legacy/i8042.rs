//! The keyboard controller, as far as a machine without a keyboard needs it: its reset line.

use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use crate::devices::bus::BusDevice;
use crate::exit::{ExitReason, ExitSignal};

/// Offset of the command port from the data port.
const COMMAND: u64 = 4;

/// The ports 0x60 to 0x64.
pub struct KeyboardController {
    controller: I8042Device<ResetLine>,
}

struct ResetLine(ExitSignal);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.end(ExitReason::Reboot);
        Ok(())
    }
}

impl KeyboardController {
    /// A controller whose reset line ends the machine by `exit`.
    pub fn new(exit: ExitSignal) -> Self {
        Self {
            controller: I8042Device::new(ResetLine(exit)),
        }
    }
}

impl BusDevice for KeyboardController {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([value], 0 | COMMAND) = (data, offset) {
            *value = self.controller.read(offset as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([value], 0 | COMMAND) = (data, offset) {
            // The reset line cannot fail.
            let Ok(()) = self.controller.write(offset as u8, *value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_ends_the_machine() {
        let exit = ExitSignal::new().unwrap();
        let mut controller = KeyboardController::new(exit.clone());
        controller.write(0, &[0xfe]);
        controller.write(COMMAND, &[0xfe, 0]);
        assert_eq!(exit.reason(), None);
        controller.write(COMMAND, &[0xfe]);
        assert_eq!(exit.reason(), Some(&ExitReason::Reboot));
    }
}
