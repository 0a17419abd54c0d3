//! How many files and sockets the daemon may have open.
//!
//! Many systems start a process with room for 1024, for programs that use select(2), and allow more to who asks
//! for them (setrlimit(2), systemd's `LimitNOFILESoft`). Each connection is one, and so is much of each sandbox.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The most connections of clients, however many files may be open.
const MAX_CONNECTIONS: u64 = 16_384;

/// Raises the limit as far as that is allowed, and tells how many connections there may be: half of it, so that
/// clients who only connect take nothing from sandboxes.
///
/// # Errors
/// The kernel does not allow what it says that it allows.
pub fn raise() -> io::Result<usize> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, raised)?;
    let half = limit.maximum.map_or(MAX_CONNECTIONS, |most| most / 2);
    Ok(usize::try_from(half.min(MAX_CONNECTIONS)).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_as_high_as_it_may_be() {
        let connections = raise().unwrap();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        let most = limit.maximum.unwrap_or(u64::MAX);
        assert!(connections > 0 && connections as u64 <= most / 2);
    }
}
