//! The device under a simulated driver, with real UNIX sockets on the other side.
//!
//! The driver notifies and waits strictly by the rules of event indices (virtio 1.2, 2.7.10):
//! it calls the device only if the device asked for it, and looks at a used ring only after an
//! interrupt. A notification that the device forgets is thus a test that hangs, and fails.

mod driver;
mod hostile;
mod limits;
mod streams;
