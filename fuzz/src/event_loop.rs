//! The event loop behind a device, as in a machine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use vmm::devices::virtio::worker;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

/// A new eventfd.
///
/// # Panics
/// The host has no descriptors left.
pub fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
}

/// Ends the event loop.
#[derive(Clone)]
pub struct Stop {
    stopped: Arc<AtomicBool>,
    event: Arc<EventFd>,
}

impl Default for Stop {
    fn default() -> Self {
        Self {
            stopped: Arc::default(),
            event: Arc::new(eventfd()),
        }
    }
}

impl Stop {
    /// Ends it.
    ///
    /// # Panics
    /// It cannot be told.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.event.write(1).unwrap();
    }

    /// Runs it until it is ended.
    ///
    /// # Panics
    /// The host has no descriptors left.
    pub fn run(self, worker: worker::Worker) {
        let mut event_loop = EventManager::<Box<dyn MutEventSubscriber>>::new().unwrap();
        event_loop.add_subscriber(Box::new(worker));
        event_loop.add_subscriber(Box::new(self.clone()));
        while !self.stopped.load(Ordering::SeqCst) {
            event_loop.run().unwrap();
        }
    }
}

impl MutEventSubscriber for Stop {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {}

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(self.event.as_ref(), EventSet::IN))
            .unwrap();
    }
}
