//! The REST API on a UNIX socket, compatible with that of Cloud Hypervisor v54.
//!
//! ```text
//!  clients ──► thread `api`: connections, HTTP, JSON ──mailbox──► main thread: `control`
//!                   │ answers vmm.ping itself    ◄──answer──            owns the machine
//! ```
//!
//! - [`routes`]: every endpoint, what it takes and what it asks of the owner of the machine.
//! - [`body`]: the JSON that endpoints take; [`compat`]: fields of it that this VMM has no use for.
//! - [`socket`]: the listening socket and who may have it; [`server`] and [`stream`]:
//!   connections, and the descriptors that clients send along.
//! - [`answer`]: statuses, headers and bodies of what is sent back.
//!
//! What a client can observe beside the endpoints is kept too: errors are a JSON array of
//! strings, outermost first; a body where none is taken is an error; header names are sent in
//! the case in which the client of Cloud Hypervisor looks for them.

pub mod answer;
pub mod body;
pub mod compat;
#[cfg(test)]
mod openapi_tests;
pub mod routes;
pub mod server;
pub mod socket;
pub mod stream;
#[cfg(test)]
mod tests;

pub use server::ApiServer;
pub use socket::{ApiTarget, Listener};

/// What the paths of all endpoints start with.
pub const BASE_PATH: &str = "/api/v1/";

/// Version of the Cloud Hypervisor API that is spoken here.
pub const API_VERSION: &str = "54.0.0";
