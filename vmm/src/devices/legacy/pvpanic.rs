//! The panic notifier: one I/O port to which a guest kernel writes that it panicked
//! (QEMU documentation, specs/pvpanic).

use crate::devices::bus::BusDevice;
use crate::exit::{ExitReason, ExitSignal};

/// The guest panicked and nobody in it will handle that.
const PANICKED: u8 = 1 << 0;

/// The port. Reading it tells which events it takes.
pub struct PanicPort {
    exit: ExitSignal,
}

impl PanicPort {
    /// A port that ends the machine by `exit`.
    pub fn new(exit: ExitSignal) -> Self {
        Self { exit }
    }
}

impl BusDevice for PanicPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            self.exit.end(ExitReason::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reported_panic_ends_the_machine() {
        let exit = ExitSignal::new().unwrap();
        let mut port = PanicPort::new(exit.clone());
        let mut events = [0xff];
        port.read(0, &mut events);
        assert_eq!(events, [PANICKED]);
        port.write(0, &[1 << 1]);
        assert_eq!(exit.reason(), None);
        port.write(0, &[PANICKED]);
        assert_eq!(exit.reason(), Some(&ExitReason::Panic));
    }
}
