//! Sandboxes, their life and what can be done with them. Knows no HTTP and no SQL.

mod build;
mod error;
mod exec;
mod host;
mod id;
mod layer;
mod manager;
mod request;
mod sandbox;
mod snapshot;
mod spool;
mod store;
mod template;
mod timings;
mod turns;

pub use build::{BuildFrom, BuildSpec, OutputLines, Progress, Recipe, Step};
pub use error::{
    CreateError, DestroyError, ExecError, FileError, ForkError, LookupError, PauseError,
    ResumeError, SnapshotError, TemplateError,
};
pub use exec::{CollectError, ExecEnd, ExecLimits, ExecOutput};
pub use host::{
    CreateRequest, Created, End, ExecEvent, ExecRequest, ExitInfo, FileContent, Host, HostError,
    HostEvent, HostInfo, Identity, ImageInfo, KeepDiskRequest, KeptDisk, ReadFileRequest,
    SaveRequest, Saved, Shape, WriteFileRequest,
};
pub use id::{Id, Kind, LayerId, ParseIdError, SandboxId, SnapshotId, TemplateId};
pub use layer::{Layers, MAX_DISK};
pub use manager::{Forked, Limits, Manager, RecoverError};
pub use request::{Command, CreateSpec, SettingsSpec, SnapshotSpec};
pub use sandbox::{Desired, IllegalTransition, Sandbox, Spec, Status, Transition};
pub use snapshot::{LayersInfo, Snapshot, WarmSnapshot};
pub use spool::{Spool, Spooled};
pub use store::{Store, StoreError};
pub use template::{
    DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Readiness, Settings, Source, Template, TemplateContent,
    TemplateInfo, TemplateStatus,
};
pub use timings::{SaveTimings, Start, Timings};
