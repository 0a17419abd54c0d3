//! What the process may do, and how much: limits, capabilities, keyring.

use std::io;

use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    set_capabilities, set_capabilities_secure_bits, set_no_new_privs,
};

use super::{JailError, check, step};

/// Descriptors: 1023 connections of the socket device, a few dozen of devices, vCPUs and the
/// control socket, and room to spare.
const MAX_DESCRIPTORS: u64 = 4096;

/// Threads: 32 vCPUs, the event loop, a few for each disk and for the control socket.
const MAX_THREADS: u64 = 256;

/// Leaves the keyring of the session that the process was started in, for an empty one.
pub(super) fn leave_keyring() -> io::Result<()> {
    // keyctl(2), `linux/keyctl.h`.
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: without a name, the call reads no memory.
    let result = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Sets limits that cannot be raised again. After the namespaces: the number of processes then
/// counts in the jail alone.
///
/// Not limited are the size of files, which is that of disks, and memory, which is the guest's and
/// for a cgroup to limit.
pub(super) fn limit_resources() -> Result<(), JailError> {
    for (resource, limit) in [
        // A core holds the guest's memory.
        (Resource::Core, 0),
        (Resource::Nofile, MAX_DESCRIPTORS),
        (Resource::Nproc, MAX_THREADS),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Nice, 0),
        (Resource::Rtprio, 0),
    ] {
        let hard = getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let limit = Some(limit.min(hard));
        let both = Rlimit {
            current: limit,
            maximum: limit,
        };
        setrlimit(resource, both).map_err(step("limit its resources"))?;
    }
    Ok(())
}

/// Gives up all capabilities and every way to get one again.
pub(super) fn drop_all() -> Result<(), JailError> {
    let failed = || step("drop its capabilities");
    // The capabilities of the kernel that runs are numbered from 0, without a gap.
    for capability in 0..u64::BITS {
        // SAFETY: this operation takes numbers only.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match check(result) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && capability > 0 => break,
            Err(error) => return Err(failed()(error)),
        }
    }
    clear_ambient_capability_set().map_err(step("drop its capabilities"))?;
    // Nobody, not even a user 0, has capabilities by being someone, for good.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(step("lock its capabilities"))?;
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
    .map_err(step("drop its capabilities"))?;
    set_no_new_privs(true).map_err(step("refuse new privileges"))?;
    // Neither traced nor dumped by others of the same user, and what /proc shows is root's.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(step("refuse to be traced"))
}
