//! Why the manager did not do what it was asked for.

use super::exec::CollectError;
use super::host::HostError;
use super::id::SandboxId;
use super::network::{AddressError, Forward};
use super::quota::QuotaExceeded;
use super::sandbox::{Standing, Status};
use super::store::StoreError;

/// Why a sandbox was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// It would be more than the quota.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// The request asks for something that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// Its template is not ready.
    #[error("template {name:?} is {status}, and not ready; {what}")]
    TemplateNotReady {
        /// Its name.
        name: String,
        /// Where it stands.
        status: &'static str,
        /// What to do.
        what: &'static str,
    },
    /// The daemon is ending.
    #[error("the daemon is shutting down and starts no more sandboxes")]
    ShuttingDown,
    /// It cannot have the address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The host did not start it. Its record says so too.
    #[error("sandbox {id} was not created")]
    Host {
        /// Its record.
        id: SandboxId,
        /// Why.
        #[source]
        source: HostError,
    },
    /// The host cannot be asked.
    #[error("the host cannot say what it offers")]
    Describe(#[source] HostError),
    /// It ended before it was ready to be used.
    #[error("sandbox {id} ended as soon as it was started: {reason}")]
    EndedAtOnce {
        /// Its record.
        id: SandboxId,
        /// Why.
        reason: String,
    },
    /// Another sandbox has the name.
    #[error("a sandbox named {0:?} exists already; delete it, or choose another name")]
    NameTaken(String),
    /// It cannot be written down.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The task that created it is gone.
    #[error("the creation was interrupted")]
    Interrupted,
}

/// Why a sandbox may not start.
#[derive(Debug, thiserror::Error)]
pub enum StartRefused {
    /// It would be more than the quota.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The host cannot be asked.
    #[error("the host cannot say how large the disk is")]
    Host(#[source] HostError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a new sandbox was not written down.
#[derive(Debug, thiserror::Error)]
pub enum InsertError {
    /// It cannot have an address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// Another sandbox has the name.
    #[error("a sandbox named {0:?} exists already; delete it, or choose another name")]
    NameTaken(String),
    /// The host cannot be asked.
    #[error("the host cannot say what it offers")]
    Describe(#[source] HostError),
    /// It would be more than the quota.
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<StartRefused> for InsertError {
    fn from(source: StartRefused) -> Self {
        match source {
            StartRefused::Quota(source) => Self::Quota(source),
            StartRefused::Host(source) => Self::Describe(source),
            StartRefused::Store(source) => Self::Store(source),
        }
    }
}

impl From<StartRefused> for CreateError {
    fn from(source: StartRefused) -> Self {
        InsertError::from(source).into()
    }
}

impl From<StartRefused> for ResumeError {
    fn from(source: StartRefused) -> Self {
        match source {
            StartRefused::Quota(source) => Self::Quota(source),
            StartRefused::Host(source) => Self::Host(source),
            StartRefused::Store(source) => Self::Lookup(source.into()),
        }
    }
}

impl From<InsertError> for CreateError {
    fn from(source: InsertError) -> Self {
        match source {
            InsertError::Address(source) => Self::Address(source),
            InsertError::NameTaken(name) => Self::NameTaken(name),
            InsertError::Describe(source) => Self::Describe(source),
            InsertError::Quota(source) => Self::Quota(source),
            InsertError::Store(source) => Self::Store(source),
        }
    }
}

/// Why the network of a sandbox is as it was.
#[derive(Debug, thiserror::Error)]
pub enum NetworkChangeError {
    /// There is no such sandbox, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// It has no network card.
    #[error("the sandbox has no network card, since this host had no network when it was made")]
    NoNetwork,
    /// It is gone, or on the way somewhere.
    #[error("the sandbox's network cannot be changed now (status: {0})")]
    WrongState(Standing),
    /// Another sandbox has the port.
    #[error(
        "{} port {} already leads into sandbox {id}; choose another, or none to get one that is free",
        forward.transport, forward.host
    )]
    PortTaken {
        /// Whose it is.
        id: SandboxId,
        /// The forward that has it.
        forward: Forward,
    },
    /// It has too many.
    #[error("the sandbox has {0} forwards, and can have no more; remove one")]
    TooManyForwards(usize),
    /// There is no such forward.
    #[error("the sandbox has no such forward")]
    NoForward,
    /// The host did not do it.
    #[error("the sandbox's network was not changed")]
    Host(#[source] HostError),
    /// The task that was at it is gone.
    #[error("the change was interrupted")]
    Interrupted,
}

impl From<StoreError> for NetworkChangeError {
    fn from(source: StoreError) -> Self {
        Self::Lookup(source.into())
    }
}

/// Why a sandbox was not found.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// There is none of that id.
    #[error("sandbox not found")]
    NotFound,
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a sandbox was not destroyed.
#[derive(Debug, thiserror::Error)]
pub enum DestroyError {
    /// There is none of that id, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// The host could not end it.
    #[error("the sandbox could not be ended")]
    Host(#[source] HostError),
    /// The task that destroyed it is gone.
    #[error("the deletion was interrupted")]
    Interrupted,
}

/// Why a sandbox was not paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// There is none of that id, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It does not run.
    #[error("sandbox is not running (status: {0})")]
    NotRunning(Status),
    /// Its disk has too many layers.
    #[error(
        "the sandbox's disk has {0} layers, and can have no more; make a new sandbox and copy what \
         is needed"
    )]
    TooManyLayers(usize),
    /// The host did not save it.
    #[error("the sandbox could not be paused")]
    Host(#[source] HostError),
    /// The task that paused it is gone.
    #[error("the pause was interrupted")]
    Interrupted,
}

/// Why a sandbox was not resumed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// It would be more than the quota.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// There is none of that id, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It is not paused.
    #[error("sandbox is not paused (status: {0})")]
    NotPaused(Status),
    /// The daemon is ending.
    #[error("the daemon is shutting down and resumes no more sandboxes")]
    ShuttingDown,
    /// The host did not start it. It is paused as before.
    #[error("the sandbox could not be resumed, and is paused as before")]
    Host(#[source] HostError),
    /// It ended before it was ready to be used.
    #[error("sandbox {id} ended as soon as it was resumed: {reason}")]
    EndedAtOnce {
        /// Its record.
        id: SandboxId,
        /// Why.
        reason: String,
    },
    /// The task that resumed it is gone.
    #[error("the resume was interrupted")]
    Interrupted,
}

/// Why a sandbox was not started, stopped or rolled back.
#[derive(Debug, thiserror::Error)]
pub enum PowerError {
    /// There is none of that id or name, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// There is no such snapshot, or it is not of this sandbox.
    #[error("snapshot not found")]
    NoSnapshot,
    /// Its state does not allow it.
    #[error("sandbox is {standing} and cannot be {verb}: it must be {needed}")]
    WrongState {
        /// What was asked for, as in `started`.
        verb: &'static str,
        /// What it is.
        standing: Standing,
        /// What it had to be.
        needed: &'static str,
    },
    /// Its disk has too many layers.
    #[error("the sandbox's disk has {0} layers until they are merged; try again in a while")]
    TooManyLayers(usize),
    /// The daemon is ending.
    #[error("the daemon is shutting down and starts no more sandboxes")]
    ShuttingDown,
    /// It did not start, and is off as before.
    #[error(transparent)]
    NotStarted(#[from] CreateError),
    /// The host did not do it.
    #[error("the sandbox was not {verb}")]
    Host {
        /// What was asked for.
        verb: &'static str,
        /// Why.
        #[source]
        source: HostError,
    },
    /// The task that was at it is gone.
    #[error("the change was interrupted")]
    Interrupted,
}

impl From<StoreError> for PowerError {
    fn from(source: StoreError) -> Self {
        Self::Lookup(source.into())
    }
}

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// It would be more than the quota.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// There is no such sandbox, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// There is no such snapshot.
    #[error("snapshot not found")]
    NotFound,
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Another snapshot has the name.
    #[error("a snapshot named {0:?} exists already; delete it, or choose another name")]
    NameTaken(String),
    /// A template has the name.
    #[error("a template is named {0:?}, and goes before a snapshot of that name; choose another")]
    NameOfTemplate(String),
    /// It neither runs nor is paused.
    #[error("sandbox is neither running nor paused (status: {0})")]
    NotSaveable(Standing),
    /// Its disk has too many layers.
    #[error(
        "the sandbox's disk has {0} layers, and can have no more; make a new sandbox and copy what \
         is needed"
    )]
    TooManyLayers(usize),
    /// A clone cannot have an address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The host did not save it.
    #[error("no snapshot could be taken")]
    Host(#[source] HostError),
    /// The guest wrote on to the disk while it was being saved.
    #[error(
        "no snapshot could be taken: the guest's file system did not stay frozen, which a host under \
         load may cause; try again"
    )]
    NotAtRest,
    /// The task that took it is gone.
    #[error("the snapshot was interrupted")]
    Interrupted,
}

impl From<StoreError> for SnapshotError {
    fn from(source: StoreError) -> Self {
        Self::Lookup(source.into())
    }
}

impl From<InsertError> for SnapshotError {
    fn from(source: InsertError) -> Self {
        match source {
            InsertError::Address(source) => Self::Address(source),
            // A clone has none.
            InsertError::NameTaken(name) => Self::NameTaken(name),
            InsertError::Describe(source) => Self::Host(source),
            InsertError::Quota(source) => Self::Quota(source),
            InsertError::Store(source) => source.into(),
        }
    }
}

/// Why nothing was forked.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The daemon is ending.
    #[error("the daemon is shutting down and starts no more sandboxes")]
    ShuttingDown,
    /// There is nothing to fork from.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The task that forked is gone.
    #[error("the fork was interrupted")]
    Interrupted,
}

/// Why a template was not built, found or deleted.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is none of that name.
    #[error("template not found")]
    NotFound,
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// It may be used, but not deleted.
    #[error("template {0:?} is everybody's to use, and an administrator's to delete")]
    NotYours(String),
    /// Another template has the name.
    #[error("a template named {0:?} exists already; delete it, or choose another name")]
    NameTaken(String),
    /// Something needs it.
    #[error("template {name:?} is in use by {users}; delete those first")]
    InUse {
        /// Its name.
        name: String,
        /// What needs it, for people.
        users: String,
    },
    /// It is an image on the host.
    #[error("template {0:?} is an image on this host; remove its file and start the daemon again")]
    Image(String),
    /// The disk of the sandbox cannot be taken.
    #[error("sandbox is neither running nor paused (status: {0})")]
    NotSaveable(Status),
    /// A disk has too many layers.
    #[error(
        "the disk has {0} layers, and can have no more; make a new sandbox and copy what is needed"
    )]
    TooManyLayers(usize),
    /// There is no such sandbox, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// The host cannot say what it has.
    #[error("the host cannot say what it offers")]
    Host(#[source] HostError),
    /// The daemon is ending.
    #[error("the daemon is shutting down and builds no more templates")]
    ShuttingDown,
    /// The task that did it is gone.
    #[error("the work on the template was interrupted")]
    Interrupted,
}

impl From<StoreError> for TemplateError {
    fn from(source: StoreError) -> Self {
        Self::Lookup(source.into())
    }
}

/// Why a command has no result.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is no such sandbox, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It does not run.
    #[error("sandbox is not running (status: {0})")]
    NotRunning(Standing),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The host did not start it.
    #[error("the command was not started")]
    Host(#[source] HostError),
    /// It was started, and then lost.
    #[error(transparent)]
    Collect(#[from] CollectError),
}

/// Why a file was not moved.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is no such sandbox, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// It does not run.
    #[error("sandbox is not running (status: {0})")]
    NotRunning(Standing),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The host could not do it.
    #[error("the file was not transferred")]
    Host(#[source] HostError),
}
