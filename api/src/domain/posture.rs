//! What holds a sandbox on the host, as it is found there.

use serde::{Deserialize, Serialize};

/// What there is to say of a sandbox from outside.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Posture {
    /// Its VMM; `None` if it has none now.
    pub vmm: Option<VmmPosture>,
    /// Files with its disk or memory that others than their owner and group may read or write.
    pub exposed: Vec<String>,
}

/// The process that runs a guest, as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VmmPosture {
    /// Whether it was started to be jailed.
    pub is_jailed: bool,
    /// Whether each of its threads has a filter of system calls.
    pub has_seccomp: bool,
    /// Whether it can gain no privileges.
    pub has_no_new_privs: bool,
    /// Whether it has any capability.
    pub has_capabilities: bool,
    /// Whether its user is another than the daemon's.
    pub has_own_user: bool,
}
