//! A built machine: paused until it is run, then running until it ends.

use std::sync::Arc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::DeviceHandle;
use crate::events::{Event, EventStream};
use crate::exit::{ExitReason, ExitSignal};
use crate::kvm::vcpu::{Buses, VcpuHandle};
use crate::kvm::vm::Vm;

/// The event loop's participants.
pub type EventLoop = EventManager<Box<dyn MutEventSubscriber>>;

/// A machine with all its devices, whose vCPUs are paused.
///
/// The order of the fields is the order in which they are dropped: first the event loop, which
/// frees vCPUs that wait for it; then the vCPUs, whose threads end; then the devices, which
/// remove what they made on the host; then the virtual machine.
pub struct Machine {
    pub(crate) event_loop: EventLoop,
    pub(crate) vcpus: Vec<VcpuHandle>,
    pub(crate) devices: Vec<DeviceHandle>,
    pub(crate) _buses: Arc<Buses>,
    pub(crate) _vm: Vm,
    pub(crate) _generation_irqfd: EventFd,
    pub(crate) exit: ExitSignal,
    pub(crate) events: EventStream,
}

impl Machine {
    /// The virtio devices in the order of their slots. They answer while the machine runs.
    pub fn devices(&self) -> &[DeviceHandle] {
        &self.devices
    }

    /// Runs the machine on this thread until it ends, and returns why it did.
    pub fn run(mut self) -> ExitReason {
        self.events.emit(&Event::Booting);
        for vcpu in &self.vcpus {
            // A vCPU that ended already has given its reason.
            let _ = vcpu.resume();
        }
        loop {
            if let Some(reason) = self.exit.reason() {
                let reason = reason.clone();
                let events = self.events.clone();
                drop(self);
                events.emit(&Event::from(&reason));
                return reason;
            }
            if let Err(error) = self.event_loop.run() {
                self.exit
                    .end(ExitReason::Error(format!("the event loop failed: {error}")));
            }
        }
    }
}

/// Wakes the event loop when the machine ends.
pub(crate) struct ExitWatch(pub(crate) ExitSignal);

impl MutEventSubscriber for ExitWatch {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.event().read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        if let Err(error) = ops.add(Events::new(self.0.event(), EventSet::IN)) {
            tracing::error!(%error, "the end of the machine cannot be watched");
        }
    }
}
