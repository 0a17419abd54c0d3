//! The device under a simulated driver ([`super::testing`]), with real UNIX sockets on the other
//! side.

mod hostile;
mod limits;
mod streams;
