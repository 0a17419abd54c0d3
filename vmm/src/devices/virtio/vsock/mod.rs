//! Socket device (virtio 1.2, 5.10): stream connections between the guest and UNIX sockets of
//! the host.
//!
//! A host program reaches port P of the guest through the device's UNIX socket: it sends
//! `CONNECT P\n`, reads `OK <its own port>\n`, and then has a stream. A guest program that
//! connects to port P of the host (CID 2) reaches whoever listens on the UNIX socket
//! `<path>_P`.
//!
//! # Parts
//!
//! - `packet`: the wire format, and where packets lie in guest memory.
//! - `connection`: the state machine of one connection, free of any input or output.
//! - `host`: the UNIX sockets.
//! - `stream`: one connection together with its UNIX socket.
//! - `muxer`: all connections, what they wait for, and whose turn it is.
//! - `device`: the queues.
//!
//! # Life of a connection
//!
//! ```text
//!  host program connects ──▶ Greeting ──line──▶ Requested ──RESPONSE──▶ Open
//!                               │ bad line,        │ RST,                ▲ │
//!                               │ timeout          │ timeout             │ │
//!                               ▼                  ▼                     │ │
//!                             gone               gone                    │ │
//!  guest sends REQUEST ── UNIX socket answers ── RESPONSE queued ────────┘ │
//!                      └─ nobody listens, or too many: RST                 │
//!                                                                          │
//!   guest shuts down both ways: RST ◀──────────────────────────────────────┤
//!     └─▶ Flushing (no longer a connection: what the guest sent is         │
//!         written to the host program) ──all written, or program gone──▶ gone
//!   guest sends RST, or breaks the protocol (answered by RST) ─────────▶ gone
//!   host program gone: SHUTDOWN both ways, then RST from the guest or timeout ─▶ gone
//! ```
//!
//! While it is open, each of the two directions ends by itself:
//!
//! - Guest → host: after `SHUTDOWN(SEND)` of the guest, and once everything is written, the
//!   UNIX socket is shut down for writing. A host program that no longer reads turns into
//!   `SHUTDOWN(RECEIVE)`, and what the guest sends in spite of it is dropped.
//! - Host → guest: the end of file turns into `SHUTDOWN(SEND)`. After `SHUTDOWN(RECEIVE)` of
//!   the guest, the UNIX socket is shut down for reading.
//!
//! # Bounds
//!
//! Every connection owns at most its advertised receive buffer (`buf_alloc`), which holds what
//! the host program has not yet read; the guest stalls when it is full. Data for the guest is
//! never buffered here: it stays in the UNIX socket until the guest has given credit and a
//! receive buffer. The number of connections is limited; host programs beyond it wait in the
//! backlog, guest programs are refused.

mod connection;
mod device;
mod host;
mod muxer;
mod packet;
mod stream;
#[cfg(any(test, fuzzing))]
#[allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::panic,
    clippy::new_without_default,
    reason = "for tests and fuzz targets only"
)]
pub mod testing;
#[cfg(test)]
mod tests;

pub use device::Vsock;
pub use host::VsockError;
