//! Sandboxes, their life and what can be done with them. Knows no HTTP and no SQL.

mod error;
mod exec;
mod host;
mod manager;
mod request;
mod sandbox;
mod spool;
mod store;

pub use error::{CreateError, DestroyError, ExecError, FileError, LookupError};
pub use exec::{CollectError, ExecEnd, ExecLimits, ExecOutput};
pub use host::{
    CreateRequest, Created, End, ExecEvent, ExecRequest, ExitInfo, FileContent, Host, HostError,
    HostEvent, HostInfo, ReadFileRequest, WriteFileRequest,
};
pub use manager::{Limits, Manager};
pub use request::{Command, CreateSpec};
pub use sandbox::{
    Desired, IllegalTransition, ParseIdError, Sandbox, SandboxId, Spec, Status, Timings, Transition,
};
pub use spool::{Spool, Spooled};
pub use store::{SandboxStore, StoreError};
