//! Sandboxes, their life and what can be done with them. Knows no HTTP and no SQL.

mod build;
mod error;
mod events;
mod exec;
mod haste;
mod history;
mod host;
mod id;
mod idle;
mod layer;
mod manager;
mod network;
mod observe;
mod posture;
mod principal;
mod process;
mod quota;
mod request;
mod resources;
mod runs;
mod sandbox;
mod shared;
mod snapshot;
mod spool;
mod store;
mod template;
mod timings;
mod turns;
mod usage;

pub use build::{BuildFrom, BuildSpec, OutputLines, Progress, Recipe, Step};
pub use error::{
    CreateError, DestroyError, ExecError, FileError, ForkError, InsertError, LookupError,
    NetworkChangeError, PauseError, PowerError, ResumeError, SnapshotError, StartRefused,
    TemplateError,
};
pub use events::{Change, Event, Events, Named, News, Over, Subject, Subscription};
pub use exec::{CollectError, ExecEnd, ExecLimits, ExecOutput};
pub use host::{
    AdoptRequest, Adopted, ClaimRequest, CreateRequest, Created, End, ExecEvent, ExecRequest,
    ExitInfo, FileContent, FileInfo, FileKind, Host, HostError, HostEvent, HostInfo, Identity,
    ImageDigest, ImageInfo, KeepDiskRequest, KeptDisk, MergeRequest, Nic, PowerOffRequest,
    PrepareRequest, Presence, ReadFileRequest, SaveRequest, Saved, Shape, WalkCut, WalkSpec,
    WalkStep, WalkSteps, WriteFileRequest,
};
pub use id::{Id, KeyId, Kind, LayerId, ParseIdError, SandboxId, SnapshotId, TemplateId, UserId};
pub use layer::{Layers, MAX_DISK};
pub use manager::{
    Divergence, Forked, InUse, Inspected, Limits, MAX_DEPTH, Manager, OnStop, PoolLimits,
    PortConnection, ProcessSpec, RecoverError, SandboxNetwork, StopSpec, WhenIdle, check_size,
};
pub use network::{
    AddressError, AllowRule, Cidr, Connection, Counter, Denied, DeniedWhat, Destination,
    DomainPattern, Egress, EgressError, FIRST_AUTO_PORT, Forward, ForwardSpec, KeptForward,
    LAST_AUTO_PORT, MAX_DESCRIPTION, MAX_FORWARDS, MAX_RULES, MacAddress, NetworkActivity,
    NetworkInfo, NetworkSpec, PortRange, RateLimits, Subnet, SubnetError, Traffic, Transport,
    port_in_use,
};
pub use observe::Observer;
pub use posture::{Posture, VmmPosture};
pub use principal::{Account, Principal, Role, User};
pub use process::{
    Bidirectional, GuestHost, KILL, PortStream, Process, ProcessEvent, ProcessEvents, ProcessRef,
    StartProcess, TerminalInput, TerminalInputs, TerminalSize,
};
pub use quota::{Quota, QuotaExceeded, QuotaOf, Quotas, Usage};
pub use request::{
    Command, CreateSpec, MAX_EXEC_TIMEOUT_SEC, MAX_MEMORY_MB, MAX_VCPUS, MIN_MEMORY_MB, Problem,
    SettingsSpec, SnapshotSpec, check_path, check_snapshot_description, check_snapshot_name,
    check_variable,
};
pub use resources::{
    Booted, MEMORY_STEP_MB, ResizeError, ResizeRequest, ResourceChange, Resources, withheld_mb,
};
pub use runs::{DayUsage, KEPT_DAYS, Reserved, Run, Runs, start_of};
pub use sandbox::{Desired, IllegalTransition, Sandbox, Spec, Standing, Status, Transition};
pub use snapshot::{LayersInfo, Model, Snapshot, WarmSnapshot};
pub use spool::{Spool, SpoolSpace, Spooled};
pub use store::{Page, SortBy, Store, StoreError, TakenAddresses, Totals};
pub use template::{
    DEFAULT_MEMORY_MB, DEFAULT_VCPUS, Readiness, Settings, Source, Template, TemplateContent,
    TemplateInfo, TemplateStatus,
};
pub use timings::{SaveTimings, Start, Timings};
pub use usage::{
    CardUsage, GuestUsage, HostHealth, HostMeasured, HostUsage, MeasureError, Measured, MeterHost,
    PartHealth, Point, SandboxUsage, VmmUsage, VmmVersion,
};
