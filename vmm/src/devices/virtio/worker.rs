//! The event loop's side of a virtio device: it runs the device's behaviour when a queue is
//! notified or a descriptor is ready, takes activation and reset from the registers, and changes
//! from whoever holds a [`DeviceHandle`].
//!
//! ```text
//!              activate                  pause
//!   Inactive ───────────► Active  ◄────────────────► Resting
//!      ▲                    │           resume          │
//!      └────────────────────┴──── reset, failure ───────┘
//! ```
//!
//! In Active alone the notifications and sources of the device are watched.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::block::ImageFiles;
use super::control::{Control, ControlError, Counters, DeviceHandle};
use super::mmio::MmioTransport;
use super::state::{DeviceState, RestoreError, VirtioState, restore_queues};
use super::{Activation, DeviceError, Interrupt, Source, VirtioDevice};
use crate::events::{Event, EventStream};
use crate::memory::GuestMemory;

/// What others ask of the event loop. Each is answered when it is done; if the event loop is gone
/// the sender is dropped, which frees the waiting thread as well.
enum Request {
    Activate {
        features: u64,
        queues: Vec<Queue>,
        done: SyncSender<()>,
    },
    Reset {
        done: SyncSender<()>,
    },
    Control {
        control: Control,
        outcome: SyncSender<Result<(), ControlError>>,
    },
    Counters {
        counters: SyncSender<Counters>,
    },
    Pause {
        outcome: SyncSender<Result<(), ControlError>>,
    },
    Resume {
        done: SyncSender<()>,
    },
    ReplaceImage {
        files: Box<ImageFiles>,
        outcome: SyncSender<Result<(), ControlError>>,
    },
    Save {
        state: SyncSender<Result<DeviceState, ControlError>>,
    },
}

/// The way of other threads to the event loop.
#[derive(Clone)]
pub(super) struct Link {
    requests: Sender<Request>,
    wake: Arc<EventFd>,
}

impl Link {
    /// Activates the device and waits until that has worked or failed.
    pub(super) fn activate(&self, features: u64, queues: Vec<Queue>) {
        self.call(|done| Request::Activate {
            features,
            queues,
            done,
        });
    }

    /// Resets the device and waits until it no longer touches guest memory.
    pub(super) fn reset(&self) {
        self.call(|done| Request::Reset { done });
    }

    pub(super) fn control(&self, control: Control) -> Result<(), ControlError> {
        self.call(|outcome| Request::Control { control, outcome })
            .unwrap_or(Err(ControlError::Ended))
    }

    pub(super) fn counters(&self) -> Result<Counters, ControlError> {
        self.call(|counters| Request::Counters { counters })
            .ok_or(ControlError::Ended)
    }

    pub(super) fn pause(&self) -> Result<(), ControlError> {
        self.call(|outcome| Request::Pause { outcome })
            .unwrap_or(Err(ControlError::Ended))
    }

    pub(super) fn resume(&self) -> Result<(), ControlError> {
        self.call(|done| Request::Resume { done })
            .ok_or(ControlError::Ended)
    }

    pub(super) fn replace_image(&self, files: ImageFiles) -> Result<(), ControlError> {
        let files = Box::new(files);
        self.call(|outcome| Request::ReplaceImage { files, outcome })
            .unwrap_or(Err(ControlError::Ended))
    }

    pub(super) fn save(&self) -> Result<DeviceState, ControlError> {
        self.call(|state| Request::Save { state })
            .unwrap_or(Err(ControlError::Ended))
    }

    /// The answer, or `None` if the event loop, and with it the machine, is ending.
    fn call<T>(&self, request: impl FnOnce(SyncSender<T>) -> Request) -> Option<T> {
        let (sender, answer) = mpsc::sync_channel(1);
        self.requests.send(request(sender)).ok()?;
        self.wake.write(1).ok()?;
        answer.recv().ok()
    }
}

/// The eventfd of a queue's notifications.
#[derive(Clone)]
pub(super) struct Notifier(Arc<EventFd>);

impl Notifier {
    pub(super) fn notify(&self) {
        // Fails only if the counter is full, and then a notification is pending anyway.
        let _ = self.0.write(1);
    }
}

/// A device taken apart for the two kinds of threads that it lives on.
pub struct Parts {
    /// The registers, for the bus.
    pub transport: Arc<Mutex<MmioTransport>>,
    /// The behaviour, for the event loop.
    pub worker: Worker,
    /// The device for everybody else.
    pub handle: DeviceHandle,
    /// One eventfd a queue, to be bound to the QueueNotify register.
    pub notifications: Vec<Arc<EventFd>>,
}

impl Parts {
    /// Takes over the state of another device. The driver is served when the handle says so by
    /// [`resume`](DeviceHandle::resume).
    ///
    /// # Errors
    /// The device is another one, or cannot go on here.
    pub fn restore(&mut self, state: &VirtioState) -> Result<(), RestoreError> {
        let mut transport = self
            .transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        transport.restore(&state.transport)?;
        let features = state.transport.driver_features;
        self.worker.restore(features, &state.device)
    }
}

/// Takes a device apart.
///
/// # Errors
/// The host has no eventfd left, or the device names a queue size that is no power of two.
pub fn split(
    name: String,
    device: impl VirtioDevice + 'static,
    memory: GuestMemory,
    interrupt: Interrupt,
    events: EventStream,
) -> Result<Parts, SplitError> {
    let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Arc::new);
    let sizes = device.queue_max_sizes().to_vec();
    let queues = sizes
        .iter()
        .map(|size| Queue::new(*size).map_err(SplitError::Queue))
        .collect::<Result<Vec<_>, _>>()?;
    let notifications = sizes
        .iter()
        .map(|_| eventfd().map_err(SplitError::EventFd))
        .collect::<Result<Vec<_>, _>>()?;
    let wake = eventfd().map_err(SplitError::EventFd)?;
    let (sender, requests) = mpsc::channel();
    let device: Arc<Mutex<dyn VirtioDevice>> = Arc::new(Mutex::new(device));
    let needs_reset = Arc::new(AtomicBool::new(false));
    let generation = Arc::new(AtomicU32::new(0));
    let link = Link {
        requests: sender,
        wake: wake.clone(),
    };
    let transport = MmioTransport::new(
        device.clone(),
        queues,
        notifications.iter().cloned().map(Notifier).collect(),
        interrupt.clone(),
        needs_reset.clone(),
        generation.clone(),
        link.clone(),
    );
    let transport = Arc::new(Mutex::new(transport));
    let handle = DeviceHandle::new(&name, link, transport.clone());
    let worker = Worker {
        name,
        device,
        memory,
        interrupt,
        needs_reset,
        generation,
        requests,
        wake,
        notifications: notifications.clone(),
        events,
        failures: 0,
        state: State::Inactive,
    };
    Ok(Parts {
        transport,
        worker,
        handle,
        notifications,
    })
}

/// Why a device could not be taken apart.
#[derive(Debug, thiserror::Error)]
pub enum SplitError {
    /// No eventfd.
    #[error("cannot create an eventfd")]
    EventFd(#[source] std::io::Error),
    /// A queue that cannot be.
    #[error("the device has a queue of impossible size")]
    Queue(#[source] virtio_queue::Error),
}

/// Runs one device on the event loop.
pub struct Worker {
    name: String,
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: GuestMemory,
    interrupt: Interrupt,
    needs_reset: Arc<AtomicBool>,
    /// Counts the changes of the device's configuration.
    generation: Arc<AtomicU32>,
    requests: Receiver<Request>,
    wake: Arc<EventFd>,
    notifications: Vec<Arc<EventFd>>,
    events: EventStream,
    /// How often the device had to give up on its driver.
    failures: u64,
    state: State,
}

/// See the module's drawing.
enum State {
    Inactive,
    Active {
        /// What is watched besides `wake` and the notifications.
        watched: Vec<Source>,
    },
    Resting,
}

const TOKEN_WAKE: u32 = 0;
const TOKEN_FIRST_QUEUE: u32 = 1;
/// Set in the tokens of the device's own sources.
const TOKEN_SOURCE: u32 = 1 << 31;

impl Worker {
    fn with_device<T>(&self, use_it: impl FnOnce(&mut dyn VirtioDevice) -> T) -> T {
        use_it(&mut *self.device.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn serve_requests(&mut self, ops: &mut EventOps) {
        let _ = self.wake.read();
        loop {
            match self.requests.try_recv() {
                Ok(Request::Activate {
                    features,
                    queues,
                    done,
                }) => {
                    if let Err(error) = self.activate(features, queues, ops) {
                        self.fail(&error, ops);
                    }
                    let _ = done.send(());
                }
                Ok(Request::Reset { done }) => {
                    self.deactivate(ops);
                    let _ = done.send(());
                }
                Ok(Request::Control { control, outcome }) => {
                    let _ = outcome.send(self.control(control));
                }
                Ok(Request::Counters { counters }) => {
                    let _ = counters.send(self.with_device(|device| device.counters()));
                }
                Ok(Request::Pause { outcome }) => {
                    let _ = outcome.send(self.pause(ops));
                }
                Ok(Request::Resume { done }) => {
                    if let Err(error) = self.resume(ops) {
                        self.fail(&error, ops);
                    }
                    let _ = done.send(());
                }
                Ok(Request::ReplaceImage { files, outcome }) => {
                    let _ = outcome.send(self.replace_image(*files));
                }
                Ok(Request::Save { state }) => {
                    let _ = state.send(self.save());
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return,
            }
        }
    }

    fn activate(
        &mut self,
        features: u64,
        queues: Vec<Queue>,
        ops: &mut EventOps,
    ) -> Result<(), DeviceError> {
        self.activate_device(features, queues)?;
        self.watch(ops)
    }

    fn activate_device(&self, features: u64, queues: Vec<Queue>) -> Result<(), DeviceError> {
        for (index, queue) in queues.iter().enumerate() {
            if queue.ready() && !queue.is_valid(&self.memory) {
                return Err(DeviceError::Queue {
                    index,
                    source: virtio_queue::Error::QueueNotReady,
                });
            }
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
        };
        self.with_device(|device| device.activate(activation))
    }

    fn check_rest(&self) -> Result<(), ControlError> {
        match self.state {
            State::Active { .. } => {
                Err(ControlError::Refused("the device does not rest".to_owned()))
            }
            State::Inactive | State::Resting => Ok(()),
        }
    }

    fn replace_image(&self, files: ImageFiles) -> Result<(), ControlError> {
        self.check_rest()?;
        self.with_device(|device| device.replace_image(files))
    }

    fn save(&self) -> Result<DeviceState, ControlError> {
        self.check_rest()?;
        self.with_device(|device| device.save())
    }

    /// Takes over the state of another device, and rests until it is to go on.
    fn restore(&mut self, features: u64, state: &DeviceState) -> Result<(), RestoreError> {
        if let Some(saved) = &state.queues {
            let max_sizes = self.with_device(|device| device.queue_max_sizes().to_vec());
            let queues = restore_queues(saved, &max_sizes)?;
            self.activate_device(features, queues)
                .map_err(RestoreError::Activate)?;
            self.state = State::Resting;
        }
        self.with_device(|device| device.restore(&state.own))
    }

    /// Watches the device and serves what came before it was watched.
    fn watch(&mut self, ops: &mut EventOps) -> Result<(), DeviceError> {
        let failed = |error| DeviceError::Host {
            action: "watching the descriptors of the device",
            source: std::io::Error::other(error),
        };
        let sources = self.with_device(|device| device.sources());
        self.state = State::Active {
            watched: sources.clone(),
        };
        for (token, notification) in (TOKEN_FIRST_QUEUE..).zip(&self.notifications) {
            let events = Events::with_data(notification.as_ref(), token, EventSet::IN);
            ops.add(events).map_err(failed)?;
        }
        for source in sources {
            let token = source.token | TOKEN_SOURCE;
            ops.add(Events::with_data_raw(source.fd, token, source.events))
                .map_err(failed)?;
        }
        for index in 0..self.notifications.len() {
            self.with_device(|device| device.process_queue(index))?;
        }
        Ok(())
    }

    /// Stops watching the device, if it was watched, for it to be in `state`.
    fn unwatch(&mut self, state: State, ops: &mut EventOps) {
        if let State::Active { watched } = std::mem::replace(&mut self.state, state) {
            // Removing what was never added (activation failed half-way) is an error that does
            // not matter.
            for notification in &self.notifications {
                let _ = ops.remove(Events::empty(notification.as_ref()));
            }
            for source in watched {
                let _ = ops.remove(Events::empty_raw(source.fd));
            }
        }
    }

    fn deactivate(&mut self, ops: &mut EventOps) {
        if !matches!(self.state, State::Inactive) {
            self.unwatch(State::Inactive, ops);
            self.with_device(|device| device.reset());
        }
    }

    fn pause(&mut self, ops: &mut EventOps) -> Result<(), ControlError> {
        if matches!(self.state, State::Active { .. }) {
            self.unwatch(State::Resting, ops);
            if let Err(error) = self.with_device(|device| device.pause()) {
                self.fail(&error, ops);
                return Err(ControlError::Device(error));
            }
        }
        Ok(())
    }

    fn resume(&mut self, ops: &mut EventOps) -> Result<(), DeviceError> {
        match self.state {
            State::Resting => self.watch(ops),
            State::Inactive | State::Active { .. } => Ok(()),
        }
    }

    fn control(&mut self, control: Control) -> Result<(), ControlError> {
        self.with_device(|device| device.control(control))?;
        self.generation.fetch_add(1, Ordering::SeqCst);
        if !matches!(self.state, State::Inactive) {
            // Without the interrupt the driver finds out when it next reads its configuration.
            let _ = self.interrupt.signal_config_change();
        }
        Ok(())
    }

    fn fail(&mut self, error: &DeviceError, ops: &mut EventOps) {
        self.deactivate(ops);
        // A guest can break and reset a device as often as it likes, and somebody keeps the events.
        self.failures += 1;
        if self.failures.is_power_of_two() {
            self.events.emit(&Event::DeviceError {
                device: self.name.clone(),
                reason: crate::error_chain(error),
                failures: self.failures,
            });
        }
        self.needs_reset.store(true, Ordering::SeqCst);
        // Without the interrupt the driver finds out when it next reads the status.
        let _ = self.interrupt.signal_config_change();
    }
}

impl MutEventSubscriber for Worker {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let token = events.data();
        if token == TOKEN_WAKE {
            self.serve_requests(ops);
            return;
        }
        // An event that was already on its way when the device was reset or paused.
        if !matches!(self.state, State::Active { .. }) {
            return;
        }
        let outcome = if token & TOKEN_SOURCE != 0 {
            let ready = events.event_set();
            self.with_device(|device| device.process_source(token & !TOKEN_SOURCE, ready))
        } else {
            let index = (token - TOKEN_FIRST_QUEUE) as usize;
            if let Some(notification) = self.notifications.get(index) {
                let _ = notification.read();
            }
            self.with_device(|device| device.process_queue(index))
        };
        if let Err(error) = outcome {
            self.fail(&error, ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let wake = Events::with_data(self.wake.as_ref(), TOKEN_WAKE, EventSet::IN);
        if let Err(error) = ops.add(wake) {
            tracing::error!(device = self.name, %error, "the device cannot be activated");
        }
    }
}
