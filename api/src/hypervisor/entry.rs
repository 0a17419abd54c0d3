//! A sandbox as the rest of this host sees it: what it can be asked, and what became of it.

use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::process::ProcessId;
use crate::agent::AgentClient;
use crate::domain::{Created, End, HostError, Identity, Nic as NicRequest, SaveRequest, Saved};
use crate::images::Base;

/// A sandbox that this host holds something for.
pub struct Entry {
    /// Its agent.
    pub agent: AgentClient,
    /// What is at the bottom of its disk.
    pub base: Base,
    /// Its VMM, once that is started.
    pub process: OnceLock<ProcessId>,
    /// Asks its task to save it. One at a time; who asks waits.
    pub orders: mpsc::Sender<Order>,
    /// Claims it, while it is held.
    claims: Mutex<Option<oneshot::Sender<Claim>>>,
    /// Its agent has answered, and it has not ended.
    running: AtomicBool,
    /// It was paused.
    paused: CancellationToken,
    /// It is being powered off, so that its end is no news.
    powering_off: AtomicBool,
    /// How it ended by itself.
    ended: OnceLock<End>,
    /// Asks its task to end it.
    end: CancellationToken,
    /// Its task is done.
    gone: CancellationToken,
    /// What could not be removed, once it is gone.
    leftover: OnceLock<String>,
}

/// Start this sandbox, which is held.
pub struct Claim {
    /// Who its guest is.
    pub identity: Identity,
    /// What its network card is.
    pub nic: Option<NicRequest>,
    /// Where to tell how it went.
    pub reply: Started,
}

/// Where to tell how a start went.
pub type Started = oneshot::Sender<Result<Created, HostError>>;

/// Save this sandbox.
pub struct Order {
    /// How.
    pub request: SaveRequest,
    /// What becomes of it.
    pub then: Then,
    /// Where to tell how it went.
    pub reply: oneshot::Sender<Result<Saved, HostError>>,
}

/// What becomes of a sandbox that was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It ends.
    End,
    /// It goes on.
    GoOn,
}

impl Entry {
    /// A sandbox whose vsock is there, and where its task gets its orders.
    pub fn new(vsock: PathBuf, base: Base) -> (Arc<Self>, mpsc::Receiver<Order>) {
        let (orders, received) = mpsc::channel(1);
        let entry = Self {
            agent: AgentClient::new(vsock),
            base,
            process: OnceLock::new(),
            orders,
            claims: Mutex::default(),
            running: AtomicBool::new(false),
            paused: CancellationToken::new(),
            powering_off: AtomicBool::new(false),
            ended: OnceLock::new(),
            end: CancellationToken::new(),
            gone: CancellationToken::new(),
            leftover: OnceLock::new(),
        };
        (Arc::new(entry), received)
    }

    /// Whether its agent has answered, and it has not ended.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Claims it for a sandbox. Returns whether it has been held; if it has just ended, the reply is
    /// dropped.
    pub fn claim(&self, claim: Claim) -> bool {
        let mut claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let task = claims.take();
        task.is_some_and(|task| {
            let _ = task.send(claim);
            true
        })
    }

    /// From now on it can be claimed, once.
    pub fn hold(&self) -> oneshot::Receiver<Claim> {
        let (sender, claim) = oneshot::channel();
        *self.claims.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        claim
    }

    /// Waits until it is asked to end.
    pub async fn end_asked(&self) {
        self.end.cancelled().await;
    }

    /// Whether its agent has answered, from now on.
    pub fn set_running(&self, is_running: bool) {
        self.running.store(is_running, Ordering::Release);
    }

    /// From now on its end is told by [`Entry::ended`] alone.
    pub fn set_powering_off(&self) {
        self.powering_off.store(true, Ordering::Release);
    }

    /// Whether its end is told by [`Entry::ended`] alone.
    pub fn is_powering_off(&self) -> bool {
        self.powering_off.load(Ordering::Acquire)
    }

    /// It was paused: whoever works in it hears so.
    pub fn set_paused(&self) {
        self.set_running(false);
        self.paused.cancel();
    }

    /// Nothing of it is left. `end` is how it ended by itself.
    pub fn set_gone(&self, end: Option<End>) {
        if let Some(end) = end {
            let _ = self.ended.set(end);
        }
        self.gone.cancel();
    }

    /// How it ended by itself, when nothing of it is left; `None` if it was ended.
    pub async fn ended(&self) -> Option<End> {
        self.gone.cancelled().await;
        self.ended.get().cloned()
    }

    /// Ends it, and waits until nothing of it is left.
    pub async fn destroy(&self) -> Result<(), HostError> {
        self.end.cancel();
        self.gone.cancelled().await;
        match self.leftover.get() {
            Some(reason) => Err(HostError::Internal {
                reason: reason.clone(),
            }),
            None => Ok(()),
        }
    }

    /// What has ended, or is about to end, whatever is under way in it; `None` if it runs.
    fn interruption(&self) -> Option<HostError> {
        if self.paused.is_cancelled() {
            Some(HostError::Paused)
        } else if self.is_powering_off() {
            Some(HostError::PoweredOff)
        } else {
            self.end.is_cancelled().then_some(HostError::Destroyed)
        }
    }

    /// Waits until it is paused or ended.
    async fn interrupted(&self) -> HostError {
        tokio::select! {
            () = self.paused.cancelled() => {}
            () = self.end.cancelled() => {}
        }
        self.interruption().unwrap_or(HostError::Destroyed)
    }

    /// What `work` in it comes to, if it is not paused, powered off or destroyed before. A guest that is
    /// shutting down may answer until its agent is gone.
    pub async fn unless_interrupted<T>(
        &self,
        work: impl Future<Output = Result<T, HostError>>,
    ) -> Result<T, HostError> {
        tokio::select! {
            biased;
            why = self.interrupted() => Err(why),
            result = work => match result {
                Err(HostError::AgentUnreachable { reason }) => {
                    let unreachable = HostError::AgentUnreachable { reason };
                    Err(self.interruption().unwrap_or(unreachable))
                }
                result => result,
            },
        }
    }

    /// The same stream, which ends with what `error` makes of it when it is paused, powered off or
    /// destroyed.
    pub fn until_interrupted<T: Send + 'static, E: Send + 'static>(
        self: Arc<Self>,
        stream: BoxStream<'static, Result<T, E>>,
        error: fn(HostError) -> E,
    ) -> BoxStream<'static, Result<T, E>> {
        stream::unfold(Some((self, stream)), move |state| async move {
            let (entry, mut stream): (Arc<Self>, BoxStream<'static, Result<T, E>>) = state?;
            let item = tokio::select! {
                biased;
                why = entry.interrupted() => Err(error(why)),
                item = stream.next() => match item? {
                    // Its agent goes before the machine does.
                    Err(broken) => Err(entry.interruption().map_or(broken, error)),
                    item => item,
                },
            };
            let rest = item.is_ok().then_some((entry, stream));
            Some((item, rest))
        })
        .boxed()
    }

    /// Something of it cannot be removed. `reason` is a sentence.
    pub fn left(&self, reason: String) {
        let _ = self.leftover.set(reason);
    }
}
