//! What helps whoever debugs a guest or its boot, as far as a machine is built with it.

use std::io;
use std::sync::Arc;

use crate::api::Listener;
use crate::boot_timer::BootTimer;
use crate::gdb::PreparedDebugger;
use crate::kvm::vcpu::Vcpu;

/// The aids that were asked for; by default none.
#[derive(Clone, Default)]
pub struct DebuggingAids {
    /// When the boot reached what.
    pub boot_timer: BootTimer,
    /// Where debuggers connect.
    pub gdb: Option<Arc<Listener>>,
}

impl DebuggingAids {
    /// Puts the vCPUs of a new machine into the hands of a debugger, if there is to be one.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub(crate) fn debugger(&self, vcpus: &mut [Vcpu]) -> io::Result<Option<PreparedDebugger>> {
        let Some(listener) = &self.gdb else {
            return Ok(None);
        };
        PreparedDebugger::new(listener.clone(), vcpus).map(Some)
    }
}
