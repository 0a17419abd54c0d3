//! Processes that run in a sandbox without anybody who waits for them.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use rand::Rng;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use super::host::{ExecRequest, ExitInfo, HostError};
use super::id::SandboxId;

/// The number of SIGKILL.
pub const KILL: i32 = 9;

/// The size of a terminal in characters, each at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// Start this process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartProcess {
    /// What to run; it may run for as long as it likes, whatever its timeout.
    pub command: ExecRequest,
    /// Who runs it, `USER` or `USER:GROUP`, each a name or a number; root, if nobody is given.
    pub user: Option<String>,
    /// Names it.
    pub tag: String,
    /// The size of its terminal, if it has one.
    pub terminal: Option<TerminalSize>,
}

/// A process that is or was in the background.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id in the guest.
    pub pid: u32,
    /// Names it.
    pub tag: String,
    /// Program and arguments; long ones are cut off.
    pub argv: Vec<String>,
    /// Whether it has a terminal.
    pub has_terminal: bool,
    /// How it ended, if it has.
    pub exit: Option<ExitInfo>,
}

/// Names a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessRef {
    /// By its id.
    Pid(u32),
    /// By its tag.
    Tag(String),
}

impl From<&str> for ProcessRef {
    /// A number is an id, anything else a tag.
    fn from(text: &str) -> Self {
        match text.parse() {
            Ok(pid) => Self::Pid(pid),
            Err(_) => Self::Tag(text.to_owned()),
        }
    }
}

impl fmt::Display for ProcessRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pid(pid) => write!(f, "{pid}"),
            Self::Tag(tag) => write!(f, "{tag:?}"),
        }
    }
}

/// A tag that no other process has: `prefix` and eight random hexadecimal digits.
pub fn random_tag(prefix: &str) -> String {
    format!("{prefix}{:08x}", rand::rng().random::<u32>())
}

/// Something that a process did, or had done before it was followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It is followed. Nothing comes before.
    Attached(Process),
    /// It wrote to its standard output, or to its terminal.
    Stdout(Bytes),
    /// It wrote to its standard error.
    Stderr(Bytes),
    /// It wrote so many bytes that are not kept any more.
    Lost(u64),
    /// It ended. Nothing follows.
    Exited(ExitInfo),
}

/// What is done at the terminal of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TerminalInput {
    /// This is typed.
    Typed(Bytes),
    /// It has this size from now on.
    Resized(TerminalSize),
}

/// Events of a process.
pub type ProcessEvents = BoxStream<'static, Result<ProcessEvent, HostError>>;

/// What is done at a terminal.
pub type TerminalInputs = BoxStream<'static, TerminalInput>;

/// Bytes both ways.
pub trait Bidirectional: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bidirectional for T {}

/// A connection to a port in a guest.
pub type PortStream = Box<dyn Bidirectional>;

/// What goes on in the guests of a host beside commands that somebody waits for.
#[async_trait]
pub trait GuestHost: Send + Sync {
    /// Starts a process, which runs until it ends by itself or is killed.
    ///
    /// # Errors
    /// It was not started: [`HostError::Conflict`] if its tag is in use.
    async fn start_process(
        &self,
        id: &SandboxId,
        request: StartProcess,
    ) -> Result<Process, HostError>;

    /// Processes that run in the background, and the latest that did, in the order in which they were
    /// started.
    ///
    /// # Errors
    /// It cannot tell.
    async fn processes(&self, id: &SandboxId) -> Result<Vec<Process>, HostError>;

    /// Sends a signal, 1 to 31, to a process and its group; [`KILL`] to all that it has started.
    ///
    /// # Errors
    /// [`HostError::NoProcess`], or the signal was not sent.
    async fn signal_process(
        &self,
        id: &SandboxId,
        process: &ProcessRef,
        signal: i32,
    ) -> Result<(), HostError>;

    /// Follows a process: its output begins with what is kept of it, and its end comes last. Who
    /// drops the stream, or reads it slowly, does nothing to the process. `input` is taken as fast as
    /// it is read from the terminal; it must be empty if the process has none.
    ///
    /// # Errors
    /// [`HostError::NoProcess`], or it cannot be followed.
    async fn attach_process(
        &self,
        id: &SandboxId,
        process: &ProcessRef,
        input: TerminalInputs,
    ) -> Result<ProcessEvents, HostError>;

    /// Connects to a TCP port of the guest's loopback interface.
    ///
    /// # Errors
    /// [`HostError::PortClosed`] if nothing listens there.
    async fn connect(&self, id: &SandboxId, port: u16) -> Result<PortStream, HostError>;
}
