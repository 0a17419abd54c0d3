//! What helps whoever debugs a guest or its boot, as far as a machine is built with it.

use crate::boot_timer::BootTimer;

/// The aids that were asked for; by default none.
#[derive(Clone, Default)]
pub struct DebuggingAids {
    /// When the boot reached what.
    pub boot_timer: BootTimer,
}
