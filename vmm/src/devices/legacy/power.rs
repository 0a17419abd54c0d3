//! ACPI power off and reset: the sleep control, sleep status and reset registers of
//! hardware-reduced ACPI (ACPI 6.5, 4.8.3.6 and 4.8.3.7), one byte each, in this order.

use crate::devices::bus::BusDevice;
use crate::exit::{ExitReason, ExitSignal};

/// Sleep type of S5 ("soft off") in `\_S5_` and in the sleep control register.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the reset register takes to reset the machine.
pub const RESET_VALUE: u8 = 1;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;

/// Sleep enable, bit 5 of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
/// Sleep type, bits 2 to 4 of the sleep control register.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0x7;

/// The three registers.
pub struct PowerRegisters {
    exit: ExitSignal,
}

impl PowerRegisters {
    /// Registers that end the machine by `exit`.
    pub fn new(exit: ExitSignal) -> Self {
        Self { exit }
    }
}

impl BusDevice for PowerRegisters {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // No sleep state is ever left, so the wake status is never set.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        match offset {
            SLEEP_CONTROL
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 =>
            {
                self.exit.end(ExitReason::PowerOff);
            }
            RESET if value == RESET_VALUE => self.exit.end(ExitReason::Reboot),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after_writing(offset: u64, value: u8) -> Option<ExitReason> {
        let exit = ExitSignal::new().unwrap();
        PowerRegisters::new(exit.clone()).write(offset, &[value]);
        exit.reason().cloned()
    }

    #[test]
    fn only_the_documented_values_end_the_machine() {
        assert_eq!(
            after_writing(0, (5 << 2) | (1 << 5)),
            Some(ExitReason::PowerOff)
        );
        assert_eq!(after_writing(2, 1), Some(ExitReason::Reboot));
        for (offset, value) in [(0, 5 << 2), (0, 1 << 5), (1, 0xff), (2, 0)] {
            assert_eq!(after_writing(offset, value), None);
        }
    }
}
