//! The owner of all sandboxes.
//!
//! Every change is written before and after the act: a create writes `pending`, starts the
//! sandbox, and writes `running` or `error`; a delete writes the wish, ends the sandbox, and
//! writes `stopped`. What ends by itself is told by the host's events. One lock is held while a
//! record is read, changed and written back, never while the host works.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::Timestamp;
use tokio::sync::Mutex;
use tracing::{Instrument, debug, error, info, warn};

use super::error::{CreateError, DestroyError, ExecError, FileError, LookupError};
use super::exec::{self, ExecLimits, ExecOutput};
use super::host::{
    CreateRequest, End, FileContent, Host, HostError, HostEvent, ReadFileRequest, WriteFileRequest,
};
use super::request::{self, Command, CreateSpec};
use super::sandbox::{Desired, Sandbox, SandboxId, Spec, Status, Transition};
use super::store::{SandboxStore, StoreError};
use crate::chain;

/// What the manager allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Output of commands.
    pub exec: ExecLimits,
}

/// The owner of all sandboxes; clones share it.
#[derive(Clone)]
pub struct Manager {
    inner: Arc<Inner>,
}

struct Inner {
    host: Arc<dyn Host>,
    store: Arc<dyn SandboxStore>,
    limits: Limits,
    /// Held while a record is read, changed and written back.
    records: Mutex<()>,
    closing: AtomicBool,
}

impl Manager {
    /// A manager of what is in `store`, on `host`.
    pub fn new(host: Arc<dyn Host>, store: Arc<dyn SandboxStore>, limits: Limits) -> Self {
        Self {
            inner: Arc::new(Inner {
                host,
                store,
                limits,
                records: Mutex::new(()),
                closing: AtomicBool::new(false),
            }),
        }
    }

    /// Settles the records of an earlier daemon, whose sandboxes the host has ended.
    ///
    /// # Errors
    /// The store failed.
    pub async fn recover(&self) -> Result<(), StoreError> {
        for sandbox in self.inner.store.list_live().await? {
            let transition = match sandbox.desired {
                Desired::Stopped => Transition::Stopped { reason: None },
                Desired::Running => Transition::Failed {
                    reason: format!(
                        "the daemon ended without notice while the sandbox was {}",
                        sandbox.status
                    ),
                },
            };
            self.record(&sandbox.id, transition).await?;
        }
        Ok(())
    }

    /// Writes down what happens on the host, until it tells no more.
    pub async fn follow(&self, mut events: BoxStream<'static, HostEvent>) {
        while let Some(HostEvent::Ended { id, end }) = events.next().await {
            let transition = match end {
                End::Orderly { reason } => Transition::Stopped {
                    reason: Some(reason),
                },
                End::Failed { reason } => Transition::Failed { reason },
            };
            if let Err(source) = self.record(&id, transition).await {
                error!(sandbox = %id, error = %chain(&source), "end of sandbox not recorded");
            }
        }
    }

    /// Creates a sandbox and waits until it can be used. It goes on if the caller goes away.
    ///
    /// # Errors
    /// Nothing of it is left but, if it was tried, a record with the reason.
    pub async fn create(&self, spec: CreateSpec) -> Result<Sandbox, CreateError> {
        let spec = self.check(spec).await?;
        let manager = self.clone();
        tokio::spawn(async move { manager.create_checked(spec).await }.in_current_span())
            .await
            .unwrap_or(Err(CreateError::Interrupted))
    }

    async fn create_checked(&self, spec: Spec) -> Result<Sandbox, CreateError> {
        let sandbox = self.insert(spec).await?;
        let id = sandbox.id;
        info!(sandbox = %id, template = sandbox.spec.template, vcpus = sandbox.spec.vcpus,
            memory_mb = sandbox.spec.memory_mb, "creating sandbox");
        let request = CreateRequest {
            id: id.clone(),
            template: sandbox.spec.template,
            vcpus: sandbox.spec.vcpus,
            memory_mb: sandbox.spec.memory_mb,
        };
        match self.inner.host.create(request).await {
            Ok(created) => {
                let started = self.record(&id, Transition::Started(created.timings)).await;
                let sandbox = match started {
                    Ok(Some(sandbox)) => sandbox,
                    // What is not recorded as running must not run.
                    unrecorded => {
                        if let Err(source) = self.inner.host.destroy(&id).await {
                            error!(sandbox = %id, error = chain(&source), "sandbox is left");
                        }
                        unrecorded?;
                        return Err(CreateError::Interrupted);
                    }
                };
                if sandbox.status == Status::Running {
                    info!(sandbox = %id, total_us = created.timings.total_us, "sandbox is running");
                    Ok(sandbox)
                } else {
                    let reason = sandbox
                        .status_reason
                        .unwrap_or_else(|| "it was deleted".into());
                    Err(CreateError::EndedAtOnce { id, reason })
                }
            }
            Err(source) => {
                let reason = match &source {
                    HostError::Start { reason } => reason.clone(),
                    other => other.to_string(),
                };
                self.record(&id, Transition::Failed { reason }).await?;
                Err(CreateError::Host { id, source })
            }
        }
    }

    async fn insert(&self, spec: Spec) -> Result<Sandbox, CreateError> {
        loop {
            let sandbox = Sandbox::new(SandboxId::random(), spec.clone(), Timestamp::now());
            if self.inner.store.insert(&sandbox).await? {
                return Ok(sandbox);
            }
        }
    }

    async fn check(&self, spec: CreateSpec) -> Result<Spec, CreateError> {
        if self.inner.closing.load(Ordering::Acquire) {
            return Err(CreateError::ShuttingDown);
        }
        let host = self
            .inner
            .host
            .describe()
            .await
            .map_err(CreateError::Describe)?;
        request::check_spec(spec, &host).map_err(CreateError::Invalid)
    }

    /// The sandboxes that are pending or running, newest first.
    ///
    /// # Errors
    /// The store failed.
    pub async fn list(&self) -> Result<Vec<Sandbox>, StoreError> {
        self.inner.store.list_live().await
    }

    /// One sandbox, gone ones included.
    ///
    /// # Errors
    /// There is none of that id, or the store failed.
    pub async fn get(&self, id: &str) -> Result<Sandbox, LookupError> {
        let id = id.parse().map_err(|_| LookupError::NotFound)?;
        self.inner
            .store
            .get(&id)
            .await?
            .ok_or(LookupError::NotFound)
    }

    /// Ends a sandbox. Its record stays. It goes on if the caller goes away.
    ///
    /// # Errors
    /// There is none of that id, or something of it is left.
    pub async fn destroy(&self, id: &str) -> Result<(), DestroyError> {
        let id = self.get(id).await?.id;
        let manager = self.clone();
        tokio::spawn(async move { manager.destroy_known(&id).await }.in_current_span())
            .await
            .unwrap_or(Err(DestroyError::Interrupted))
    }

    async fn destroy_known(&self, id: &SandboxId) -> Result<(), DestroyError> {
        let store = |source: StoreError| DestroyError::Lookup(source.into());
        self.record(id, Transition::Unwanted).await.map_err(store)?;
        self.inner
            .host
            .destroy(id)
            .await
            .map_err(DestroyError::Host)?;
        self.record(id, Transition::Stopped { reason: None })
            .await
            .map_err(store)?;
        info!(sandbox = %id, "sandbox deleted");
        Ok(())
    }

    /// The sandbox of that id, if it runs.
    ///
    /// # Errors
    /// It does not.
    pub async fn running(&self, id: &str) -> Result<Sandbox, ExecError> {
        let sandbox = self.get(id).await?;
        match sandbox.status {
            Status::Running => Ok(sandbox),
            status => Err(ExecError::NotRunning(status)),
        }
    }

    /// Runs a command in a sandbox and collects its output.
    ///
    /// # Errors
    /// There is no result.
    pub async fn exec(&self, id: &SandboxId, command: Command) -> Result<ExecOutput, ExecError> {
        let start = Instant::now();
        let request = request::check_command(command).map_err(ExecError::Invalid)?;
        let events = self
            .inner
            .host
            .exec(id, request)
            .await
            .map_err(ExecError::Host)?;
        let output = exec::collect(events, &self.inner.limits.exec, start).await;
        self.used(id).await;
        Ok(output?)
    }

    /// Writes a file in a sandbox.
    ///
    /// # Errors
    /// The file is as it was.
    pub async fn write_file(
        &self,
        id: &SandboxId,
        path: String,
        content: BoxStream<'static, std::io::Result<Bytes>>,
    ) -> Result<(), FileError> {
        request::check_path(&path).map_err(FileError::Invalid)?;
        let request = WriteFileRequest { path };
        let result = self.inner.host.write_file(id, request, content).await;
        self.used(id).await;
        result.map_err(FileError::Host)
    }

    /// Reads a file in a sandbox.
    ///
    /// # Errors
    /// It cannot be read from its start; later errors are in the stream.
    pub async fn read_file(&self, id: &SandboxId, path: String) -> Result<FileContent, FileError> {
        request::check_path(&path).map_err(FileError::Invalid)?;
        let request = ReadFileRequest { path };
        let result = self.inner.host.read_file(id, request).await;
        self.used(id).await;
        result.map_err(FileError::Host)
    }

    /// Where output and uploads are spooled.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// Ends every sandbox and writes that down.
    pub async fn shutdown(&self) {
        self.inner.closing.store(true, Ordering::Release);
        self.inner.host.shutdown().await;
        let live = match self.inner.store.list_live().await {
            Ok(live) => live,
            Err(source) => {
                error!(error = %chain(&source), "end of sandboxes not recorded");
                return;
            }
        };
        for sandbox in live {
            let reason = Some("daemon shut down".to_owned());
            if let Err(source) = self
                .record(&sandbox.id, Transition::Stopped { reason })
                .await
            {
                error!(sandbox = %sandbox.id, error = %chain(&source), "end of sandbox not recorded");
            }
        }
    }

    async fn used(&self, id: &SandboxId) {
        if let Err(source) = self.record(id, Transition::Used).await {
            warn!(sandbox = %id, error = %chain(&source), "use of sandbox not recorded");
        }
    }

    /// Makes a transition and writes it down. One that is no longer possible, for something else
    /// came first, leaves the record as it is. Returns the record, if there is one.
    async fn record(
        &self,
        id: &SandboxId,
        transition: Transition,
    ) -> Result<Option<Sandbox>, StoreError> {
        let _records = self.inner.records.lock().await;
        let Some(mut sandbox) = self.inner.store.get(id).await? else {
            return Ok(None);
        };
        let before = sandbox.status;
        match sandbox.apply(transition, Timestamp::now()) {
            Ok(()) => self.inner.store.update(&sandbox).await?,
            Err(late) => debug!(sandbox = %id, "{late}"),
        }
        if sandbox.status != before {
            match (sandbox.status, &sandbox.status_reason) {
                (Status::Error, reason) => warn!(sandbox = %id, from = %before,
                    reason = reason.as_deref(), "sandbox is in error"),
                (status, reason) => info!(sandbox = %id, from = %before, to = %status,
                    reason = reason.as_deref(), "sandbox changed state"),
            }
        }
        Ok(Some(sandbox))
    }
}
