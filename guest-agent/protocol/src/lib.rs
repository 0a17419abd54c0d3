//! What the host and the guest agent say to each other.
//!
//! # Transport
//!
//! The agent listens on AF_VSOCK port [`AGENT_PORT`] and accepts connections from the host
//! (CID 2) only. Each connection carries one HTTP/1.1 request and is closed after its response, unless
//! the request is one for [`PATH_USAGE`], which may be followed by more of them: a guest that is snapshotted
//! between two operations holds no half-spoken stream. Once it serves, the agent connects once to CID 2, port [`READY_PORT`], writes one JSON [`Ready`]
//! followed by a newline, and closes; that nobody listens there is no error.
//!
//! # Operations
//!
//! | Request | Answer |
//! |---|---|
//! | `GET /v1/health` | 200, JSON [`Health`] |
//! | `GET /v1/usage` | 200, JSON [`Usage`] |
//! | `POST /v1/exec`, JSON [`ExecRequest`] | 101, then frames both ways; see below |
//! | `POST /v1/processes`, JSON [`StartProcess`] | 201, JSON [`Process`]; see below |
//! | `GET /v1/processes` | 200, JSON [`ProcessList`] |
//! | `POST /v1/processes/signal`, JSON [`SignalRequest`] | 204 |
//! | `POST /v1/processes/attach`, JSON [`AttachRequest`] | 101, then frames both ways; see below |
//! | `POST /v1/connect`, JSON [`ConnectRequest`] | 101, then the bytes of a TCP connection both ways; see below |
//! | `PUT /v1/files?path=&mode=&user=`, raw bytes | 201 (created) or 200 (replaced), JSON [`Entry`] |
//! | `GET /v1/files?path=` | 200, raw bytes, metadata in the headers [`HEADER_MODE`] … |
//! | `GET /v1/stat?path=` | 200, JSON [`Entry`]; a symbolic link is described, not followed |
//! | `DELETE /v1/files?path=` | 204; a directory goes with all that is in it, a symbolic link alone |
//! | `PUT /v1/dir?path=` | 201 (created, with its parents) or 200 (it was there), JSON [`Entry`] |
//! | `GET /v1/dir?path=` | 200, one JSON [`Entry`] per line, in no order, without `.` and `..` |
//! | `POST /v1/walk`, JSON [`WalkRequest`] | 200, one JSON [`WalkLine`] per line; see below |
//! | `POST /v1/resumed`, JSON [`ResumedRequest`] | 200, JSON [`Resumed`] |
//! | `POST /v1/freeze`, JSON [`FreezeRequest`] | 101, then one byte each way; see below |
//! | `POST /v1/shutdown`, JSON [`ShutdownRequest`] | 202 with an empty body, then the guest goes down |
//!
//! Every failure is answered with the status of its [`ErrorCode`] and a JSON [`ErrorBody`].
//! JSON request bodies are limited to [`MAX_JSON_BODY`] bytes; unknown fields are refused.
//!
//! Query values are percent-encoded as in RFC 3986 (a `+` is a plus sign); [`FileQuery`] writes
//! and reads them. A path is a sequence of bytes, starts with `/`, holds no NUL, and is at most
//! [`MAX_PATH`] bytes long.
//!
//! # Exec
//!
//! The request names [`EXEC_UPGRADE`] as the protocol to switch to:
//!
//! ```text
//! POST /v1/exec HTTP/1.1
//! Host: agent
//! Connection: Upgrade
//! Upgrade: exec-frames/1
//! Content-Type: application/json
//! Content-Length: 27
//!
//! {"argv":["ls","-l","/etc"]}
//! ```
//!
//! A program that cannot be started gives an ordinary HTTP error, so that nothing has to be
//! undone: [`ErrorCode::CommandNotFound`] (a shell would report 127),
//! [`ErrorCode::CommandNotExecutable`] (126), [`ErrorCode::BadCwd`], [`ErrorCode::UnknownUser`],
//! [`ErrorCode::BadRequest`].
//!
//! Otherwise the answer is `101 Switching Protocols`, and from the next byte on both directions
//! carry frames: one byte of type ([`FrameKind`]), the payload's length as a 32-bit big-endian
//! number, at most [`MAX_FRAME_PAYLOAD`], and the payload.
//!
//! | Direction | Frames, in order |
//! |---|---|
//! | agent → host | `Started`, any number of `Stdout` and `Stderr`, `Exit` (or `Error`); then the agent closes |
//! | host → agent | if `stdin` was asked for: any number of `Stdin`, `StdinEnd` |
//!
//! - The order within a stream is kept; between stdout and stderr it is only roughly so.
//! - Nothing is buffered beyond one frame per direction and the kernel's pipes and sockets: a
//!   host that does not read stops the program's writes, a program that does not read stops the
//!   host's.
//! - The host keeps its side of the connection open until it has read `Exit`. If it closes or
//!   half-closes earlier, the program is killed together with all its descendants.
//!   A close arrives behind the bytes sent before it: over vsock, it is not seen as long as a
//!   program that does not read its stdin holds these up, so such an exec needs a timeout.
//! - With a timeout, the same happens when it runs out; the output up to then and an `Exit` with
//!   `timed_out` follow. "All descendants" means the exec's own cgroup where the guest has
//!   cgroup v2, and its process group where it has not.
//! - The exec ends when its first process has exited and both output streams have ended. If
//!   processes left in the background keep them open, it ends [`BACKGROUND_GRACE`] after that
//!   exit, with everything that was written by then. These processes go on running; what they
//!   write later is read and dropped.
//! - Bytes for stdin that the program did not read are dropped.
//! - A frame that breaks these rules is answered with `Error`, and the program is killed.
//!
//! # Processes
//!
//! A process that is started by `POST /v1/processes` belongs to no connection: it runs until it ends
//! by itself or is killed. At most [`MAX_PROCESSES`] run at the same time; the last [`MAX_ENDED`] that
//! have ended are remembered. The agent reads what a process writes as fast as it comes, and keeps
//! the last [`MAX_BACKLOG`] bytes of it.
//!
//! `POST /v1/processes/attach` with the header `Upgrade:` [`PROCESS_UPGRADE`] follows one. The frames
//! are those of an exec, of these types:
//!
//! | Direction | Frames, in order |
//! |---|---|
//! | agent → host | `Attached`, any number of `Stdout`, `Stderr` and `Lost`, `Exit` (or `Error`); then the agent closes |
//! | host → agent | if it has a terminal: any number of `Stdin` and `Resize` |
//!
//! - The output begins with what is kept of it. A host that reads more slowly than the process writes
//!   for so long that bytes are dropped is told `Lost` where they are missing; it does not stop the
//!   process. At most [`MAX_ATTACHED`] are attached at the same time.
//! - If the host closes or half-closes, it is no longer attached, and the process runs on.
//! - The end of a process is that of an exec: its first process has exited and its output has ended,
//!   or [`BACKGROUND_GRACE`] is over. Then its terminal is closed, which hangs up what is left on it.
//! - A terminal holds up the host's `Stdin` frames while nobody reads what was typed.
//! - A frame that breaks these rules is answered with `Error`; the process runs on.
//!
//! # Connections
//!
//! `POST /v1/connect` with the header `Upgrade:` [`CONNECT_UPGRADE`] connects to a TCP port of the
//! guest's loopback interface, 127.0.0.1 or else ::1. From the next byte after the answer on, both
//! directions carry the connection's bytes; each ends by itself, but once one has ended, the other
//! has to go on within [`CONNECT_LINGER`] from byte to byte. At most [`MAX_CONNECTIONS`] exist at the
//! same time. If nothing listens there, the answer is [`ErrorCode::PortClosed`].
//!
//! # Identity
//!
//! The host says who the guest is, and what time it is, by `POST /v1/resumed`: once the agent of a
//! guest that was booted is ready, and as the first thing after a restore. The agent does what it
//! can in this order: random pool, clock, host name, `/etc/machine-id` (replaced by a rename, and
//! only where there is one), and, if the machine id is not the one that it was told before, a new
//! random id bound over `/proc/sys/kernel/random/boot_id`. Doing it again is harmless, so the host repeats it until the clock
//! that the answer tells is right. An agent that is not process 1 changes nothing.
//!
//! # Freezing
//!
//! `POST /v1/freeze` with the header `Upgrade:` [`FREEZE_UPGRADE`] writes all that the guest has in
//! memory for its root file system to the disk, and holds up every write to it (`FIFREEZE`). The
//! answer `101 Switching Protocols` says that this is done. The host then sends one byte, of any
//! value; the agent thaws the file system, answers with one byte, and closes: [`FROZEN`] if it was
//! frozen up to then, [`NOT_FROZEN`] if not. It is thawed too if the connection ends, and when
//! `timeout_ms` of the guest's monotonic clock are over, whatever the agent is at. While it is frozen,
//! programs that write wait, and so may other operations of the agent. An agent that is not process 1
//! freezes nothing and answers as if it had.
//!
//! # Files
//!
//! `PUT` writes a temporary file in the target's directory and renames it over the target: a
//! reader sees the old content or the new one, and a failed or interrupted transfer leaves
//! nothing behind. Missing parent directories are made (mode 0755, owned by `user`). A symbolic
//! link to an existing file is followed. Without `mode`, a replaced file keeps its mode and a
//! new one gets 0644; without `user`, a replaced file keeps its owner and a new one belongs to
//! the agent's user (root). The content is not forced to the disk, as with any other program's
//! write.
//!
//! `GET` sends as many bytes as the file had when it was opened, with `Content-Length`; for a
//! file that reports size 0 (as those of `/proc` do) it sends all there is, chunked. Only regular
//! files are read and written. A body that ends early means that the read failed.
//!
//! # Walks
//!
//! `POST /v1/walk` tells what is in a directory and in those below it, one directory after the other. Symbolic
//! links are told and not followed; a directory of another file system is told and not entered, unless the
//! request says so. The entries that follow a line `directory` are in that; a directory may be told more
//! than once, each time with others of its entries. What cannot be listed is told, and the walk goes on. The last line is `end`, which
//! tells whether a bound of the request has cut something off; without it, the walk broke off. An agent
//! that does not know walks answers [`ErrorCode::UnknownOperation`]; the host then lists each directory.

mod control;
mod error;
mod exec;
mod files;
mod frame;
mod process;
mod query;
mod usage;
mod walk;

use std::time::Duration;

pub use control::{
    FreezeRequest, GuestNetwork, Health, MAX_FREEZE_MS, MAX_HOSTNAME, MAX_SEED, Ready, Resumed,
    ResumedRequest, ShutdownAction, ShutdownRequest,
};
pub use error::{ErrorBody, ErrorCode, ErrorDetail};
pub use exec::{AgentFrame, ExecRequest, Exit, HostFrame, Started};
pub use files::{Entry, EntryKind, FileQuery, FileQueryError};
pub use frame::{FRAME_HEADER_LEN, FrameError, FrameKind, MAX_FRAME_PAYLOAD, encode, header};
pub use process::{
    AttachRequest, AttachedFrame, ConnectRequest, Lost, MAX_ATTACHED, MAX_BACKLOG, MAX_ENDED,
    MAX_PROCESSES, MAX_TAG, MAX_TOLD_ARGV, Process, ProcessList, ProcessRef, SignalRequest,
    StartProcess, TerminalFrame, TerminalSize, check_tag,
};
pub use query::{percent_decode, percent_encode};
pub use usage::Usage;
pub use walk::{
    MAX_WALK_BYTES, MAX_WALK_DEPTH, MAX_WALK_ENTRIES, MAX_WALK_SKIPPED, WalkCut, WalkLine,
    WalkRequest,
};

/// The vsock port on which the agent serves.
pub const AGENT_PORT: u32 = 1024;
/// The vsock port on the host to which the agent sends [`Ready`].
pub const READY_PORT: u32 = 1025;
/// The largest JSON request body that the agent reads, in bytes.
pub const MAX_JSON_BODY: usize = 1 << 20;
/// The longest path, in bytes: Linux's `PATH_MAX` (4096) less the terminating NUL.
pub const MAX_PATH: usize = 4095;
/// The protocol that `POST /v1/exec` switches to, for the header `Upgrade`.
pub const EXEC_UPGRADE: &str = "exec-frames/1";
/// How long an exec waits for output streams that background processes keep open, once its
/// first process has exited.
pub const BACKGROUND_GRACE: Duration = Duration::from_millis(250);

/// Path of the health check.
pub const PATH_HEALTH: &str = "/v1/health";
/// Path of the operation `GET` usage.
pub const PATH_USAGE: &str = "/v1/usage";
/// Path of exec.
pub const PATH_EXEC: &str = "/v1/exec";
/// Path of starting and listing processes.
pub const PATH_PROCESSES: &str = "/v1/processes";
/// Path of sending a signal to a process.
pub const PATH_SIGNAL: &str = "/v1/processes/signal";
/// Path of following a process.
pub const PATH_ATTACH: &str = "/v1/processes/attach";
/// The protocol that `POST /v1/processes/attach` switches to, for the header `Upgrade`.
pub const PROCESS_UPGRADE: &str = "process-frames/1";
/// Path of connecting to a port of the guest.
pub const PATH_CONNECT: &str = "/v1/connect";
/// The protocol that `POST /v1/connect` switches to, for the header `Upgrade`.
pub const CONNECT_UPGRADE: &str = "bytes/1";
/// The most connections to ports of the guest at the same time.
pub const MAX_CONNECTIONS: usize = 128;
/// How long one direction of such a connection may rest once the other has ended.
pub const CONNECT_LINGER: Duration = Duration::from_secs(60);
/// Path of reading and writing files.
pub const PATH_FILES: &str = "/v1/files";
/// Path of describing one file.
pub const PATH_STAT: &str = "/v1/stat";
/// Path of listing a directory.
pub const PATH_DIR: &str = "/v1/dir";
/// Path of walking a tree of directories.
pub const PATH_WALK: &str = "/v1/walk";
/// Path of giving the guest its identity and the time.
pub const PATH_RESUMED: &str = "/v1/resumed";
/// Path of holding the root file system still.
pub const PATH_FREEZE: &str = "/v1/freeze";
/// The protocol that `POST /v1/freeze` switches to, for the header `Upgrade`.
pub const FREEZE_UPGRADE: &str = "freeze/1";
/// The root file system was frozen up to now.
pub const FROZEN: u8 = 1;
/// The root file system was thawed before.
pub const NOT_FROZEN: u8 = 0;
/// Path of shutting the guest down.
pub const PATH_SHUTDOWN: &str = "/v1/shutdown";

/// Header of `GET /v1/files`: permission bits in octal, as `0644`.
pub const HEADER_MODE: &str = "x-file-mode";
/// Header of `GET /v1/files`: numeric user id of the owner.
pub const HEADER_UID: &str = "x-file-uid";
/// Header of `GET /v1/files`: numeric group id of the owner.
pub const HEADER_GID: &str = "x-file-gid";
/// Header of `GET /v1/files`: size in bytes when the file was opened.
pub const HEADER_SIZE: &str = "x-file-size";
/// Header of `GET /v1/files`: last modification in microseconds since the Unix epoch.
pub const HEADER_MTIME_US: &str = "x-file-mtime-us";
