//! Who is told what sandboxes do, without being able to change it.

use super::sandbox::{Sandbox, Status};

/// Is told of each change of a state, once it is written down. It must not block.
pub trait Observer: Send + Sync {
    /// A sandbox has changed its state; this is its record now.
    fn changed(&self, before: Status, sandbox: &Sandbox);
}
