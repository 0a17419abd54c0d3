//! The threads that do a disk's I/O, so that a slow disk holds up nobody else.
//!
//! The event loop takes requests from the rings and hands them over as [`Job`]s; any idle thread
//! carries one out, on the guest's memory itself; the event loop collects the [`Completion`]s and
//! writes them to the rings. So rings and interrupts have one owner, and a request that waits for
//! the host keeps one thread waiting, while the others go on with the next.
//!
//! Why threads: the library that reads the images has an asynchronous interface, but the system
//! calls beneath it block, so one thread could have only one request at the host. io_uring would
//! have no need of threads; but what it does passes by the seccomp filter, and many hosts have
//! switched it off.
//!
//! ```text
//!            submit                thread takes it            thread is through
//!  (nothing) ──────► queued ─────────────────────► running ─────────────────────► done ─► collected
//!                      └────────── cancel drops those queued and done, and waits for the running
//! ```

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::buffers::ChainPieces;
use crate::machine::STACK_SIZE;
use crate::memory::GuestMemory;
use crate::sandboxing::ThreadKind;
use crate::sandboxing::seccomp;

/// A request for a thread.
pub struct Job {
    /// Index of the queue that it came from.
    pub queue: usize,
    /// The head of its chain.
    pub head: u16,
    /// What the chain points into.
    pub memory: Arc<GuestMemory>,
    /// The chain.
    pub pieces: ChainPieces,
}

/// A request that was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Index of the queue that it came from.
    pub queue: usize,
    /// The head of its chain.
    pub head: u16,
    /// The bytes written to the front of the chain's writable part.
    pub written: u32,
}

/// Carries out a request and returns the number of bytes written to its chain.
pub type Work = dyn Fn(&Job) -> u32 + Send + Sync;

/// The threads of one disk. Dropping it ends them, and waits for what they are doing.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// There is a job, or the end has come.
    wake: Condvar,
    /// A thread is through with its job.
    rest: Condvar,
    /// Readable while there are completions.
    completed: EventFd,
    work: Box<Work>,
}

#[derive(Default)]
struct State {
    queued: VecDeque<Job>,
    running: usize,
    done: Vec<Completion>,
    ended: bool,
}

impl Pool {
    /// Starts `count` threads that do `work`.
    ///
    /// # Errors
    /// The host has no threads or descriptors left.
    pub fn new(count: usize, work: Box<Work>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            rest: Condvar::new(),
            completed: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            work,
        });
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(count),
        };
        for _ in 0..count {
            let shared = Arc::clone(&pool.shared);
            let builder = thread::Builder::new()
                .name("disk".to_owned())
                .stack_size(STACK_SIZE);
            let run = move || match seccomp::apply(ThreadKind::Io) {
                Ok(()) => shared.run(),
                // The disk would wait forever for a thread that is not there.
                Err(error) => {
                    tracing::error!(error = crate::error_chain(&error), "disk thread");
                    std::process::abort();
                }
            };
            pool.threads.push(builder.spawn(run)?);
        }
        Ok(pool)
    }

    /// What becomes readable when there are completions to collect.
    pub fn completed(&self) -> RawFd {
        self.shared.completed.as_raw_fd()
    }

    /// Hands over a request.
    pub fn submit(&self, job: Job) {
        self.shared.state().queued.push_back(job);
        self.shared.wake.notify_one();
    }

    /// What was carried out since the last call.
    pub fn collect(&self) -> Vec<Completion> {
        // Fails only if nothing was completed.
        let _ = self.shared.completed.read();
        std::mem::take(&mut self.shared.state().done)
    }

    /// Waits until everything handed over is done.
    pub fn drain(&self) {
        let state = self.shared.state();
        let busy = |state: &mut State| !state.queued.is_empty() || state.running > 0;
        drop(self.shared.rest.wait_while(state, busy));
    }

    /// Drops everything handed over and not collected. When this returns, no thread touches guest
    /// memory.
    pub fn cancel(&self) {
        self.shared.state().queued.clear();
        self.drain();
        self.collect();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let mut state = self.shared.state();
            state.queued.clear();
            state.ended = true;
        }
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        loop {
            let idle = |state: &mut State| state.queued.is_empty() && !state.ended;
            let mut state = self
                .wake
                .wait_while(self.state(), idle)
                .unwrap_or_else(PoisonError::into_inner);
            let Some(job) = state.queued.pop_front() else {
                return;
            };
            state.running += 1;
            drop(state);

            let completion = Completion {
                queue: job.queue,
                head: job.head,
                written: (self.work)(&job),
            };
            drop(job);

            let mut state = self.state();
            state.running -= 1;
            state.done.push(completion);
            if state.done.len() == 1 {
                // Under the lock: whoever finds everything done finds it told as well. Fails only
                // if the counter is full, and then it is readable.
                let _ = self.completed.write(1);
            }
            drop(state);
            self.rest.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::devices::virtio::testing::{Driver, wait_readable};

    fn job(head: u16) -> Job {
        Job {
            queue: 0,
            head,
            memory: Arc::new(Driver::new(false).memory),
            pieces: ChainPieces::default(),
        }
    }

    fn completion(head: u16) -> Completion {
        Completion {
            queue: 0,
            head,
            written: u32::from(head) * 2,
        }
    }

    /// Two threads, each of which tells which job it has begun, and then waits for a word.
    fn gated() -> (Pool, mpsc::Receiver<u16>, mpsc::Sender<()>) {
        let (begun, begins) = mpsc::channel();
        let (gate, open) = mpsc::channel();
        let open = Mutex::new(open);
        let work = move |job: &Job| {
            begun.send(job.head).unwrap();
            // Without a gatekeeper the gate is open.
            let _ = open.lock().unwrap().recv();
            u32::from(job.head) * 2
        };
        (Pool::new(2, Box::new(work)).unwrap(), begins, gate)
    }

    #[test]
    fn one_request_does_not_wait_for_another() {
        let (pool, begins, gate) = gated();
        for head in [1, 2, 3] {
            pool.submit(job(head));
        }
        let mut first = [begins.recv().unwrap(), begins.recv().unwrap()];
        first.sort_unstable();
        assert_eq!(first, [1, 2]);
        assert!(!wait_readable(pool.completed(), 0));
        assert_eq!(pool.collect(), []);

        for _ in 0..3 {
            gate.send(()).unwrap();
        }
        pool.drain();
        assert!(wait_readable(pool.completed(), 0));
        let mut done = pool.collect();
        done.sort_unstable_by_key(|completion| completion.head);
        assert_eq!(done, [1, 2, 3].map(completion));
        assert!(!wait_readable(pool.completed(), 0));
    }

    #[test]
    fn cancelling_waits_for_what_runs_and_forgets_the_rest() {
        let (pool, begins, gate) = gated();
        for head in 1..=10 {
            pool.submit(job(head));
        }
        let running = [begins.recv().unwrap(), begins.recv().unwrap()];
        assert!(running.iter().all(|head| *head <= 2));
        thread::scope(|scope| {
            let cancel = scope.spawn(|| pool.cancel());
            gate.send(()).unwrap();
            gate.send(()).unwrap();
            // The threads take what they can until the queue is cleared.
            drop(gate);
            cancel.join().unwrap();
        });
        assert!(!wait_readable(pool.completed(), 0));
        assert_eq!(pool.collect(), []);
        drop(pool);
    }

    #[test]
    fn the_end_waits_for_what_runs() {
        let (pool, begins, gate) = gated();
        pool.submit(job(1));
        begins.recv().unwrap();
        gate.send(()).unwrap();
        drop(pool);
        assert_eq!(gate.send(()), Err(mpsc::SendError(())), "no thread is left");
    }
}
