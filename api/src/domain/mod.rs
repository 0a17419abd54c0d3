//! Sandboxes, their life and what can be done with them. Knows no HTTP and no SQL.

mod exec;
mod host;
mod manager;
mod sandbox;
mod spool;
mod store;

pub use exec::{Command, ExecEnd, ExecLimits, ExecOutput};
pub use host::{
    CreateRequest, Created, End, ExecEvent, ExecRequest, ExitInfo, FileContent, Host, HostError,
    HostEvent, HostInfo, ReadFileRequest, WriteFileRequest,
};
pub use manager::{
    CreateError, CreateSpec, DestroyError, ExecError, FileError, Limits, LookupError, Manager,
};
pub use sandbox::{
    Desired, IllegalTransition, ParseIdError, Sandbox, SandboxId, Spec, Status, Timings, Transition,
};
pub use spool::{Spool, Spooled};
pub use store::{SandboxStore, StoreError};
