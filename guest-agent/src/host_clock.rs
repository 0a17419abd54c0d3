//! The host's wall clock, as KVM tells it.
//!
//! A message from the host says what time it was when it was sent, and nobody knows how long it was
//! under way. KVM answers within one hypercall (`KVM_HC_CLOCK_PAIRING`, the kernel's
//! Documentation/virt/kvm/x86/hypercalls.rst), which the kernel offers as a PTP clock
//! (Documentation/driver-api/ptp.rst). There is none if the guest's kernel does not have it, or if the
//! host's own clock is not its time stamp counter.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::time::{ClockId, DynamicClockId, clock_gettime, clock_gettime_dynamic, clock_settime};

use crate::identity::{nanos, timespec};

/// What the kernel calls it (drivers/ptp/ptp_kvm_common.c).
const NAME: &str = "KVM virtual PTP";
/// How exact `CLOCK_REALTIME` is to become, in nanoseconds.
const GOOD_NS: u64 = 1_000_000;
/// How often it is set, at most: a vCPU may lose its processor between two instructions.
const TRIES: usize = 4;

/// The host's clock.
#[derive(Debug)]
pub struct HostClock(File);

impl HostClock {
    /// Opens it; `None` if KVM does not tell it.
    pub fn open() -> Option<Self> {
        let name = find(Path::new("/sys/class/ptp"))?;
        File::open(Path::new("/dev").join(name)).ok().map(Self)
    }

    /// Sets `CLOCK_REALTIME` by it. Returns how far that may be off at most, in nanoseconds.
    ///
    /// # Errors
    /// It cannot be read, or `CLOCK_REALTIME` not set.
    pub fn set_realtime(&self) -> io::Result<u64> {
        let mut error = u64::MAX;
        for _ in 0..TRIES {
            clock_settime(ClockId::Realtime, timespec(self.now()?)?)?;
            error = self.compare()?;
            if error <= GOOD_NS {
                break;
            }
        }
        Ok(error)
    }

    /// Nanoseconds since the Unix epoch.
    fn now(&self) -> io::Result<u64> {
        let now = clock_gettime_dynamic(DynamicClockId::Dynamic(self.0.as_fd()))?;
        Ok(nanos(now))
    }

    /// How far `CLOCK_REALTIME` may be off at most: it was read before and after the host's.
    fn compare(&self) -> io::Result<u64> {
        let before = nanos(clock_gettime(ClockId::Realtime));
        let host = self.now()?;
        let after = nanos(clock_gettime(ClockId::Realtime));
        Ok(before.abs_diff(host).max(after.abs_diff(host)))
    }
}

/// The name of the device, among those of this class.
fn find(class: &Path) -> Option<std::ffi::OsString> {
    let mut clocks = fs::read_dir(class).ok()?.flatten();
    let of_host = clocks.find(|clock| {
        let name = fs::read_to_string(clock.path().join("clock_name"));
        name.is_ok_and(|name| name.trim_end() == NAME)
    });
    of_host.map(|clock| clock.file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_by_its_name_among_others() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(&dir.path().join("none")), None);
        assert_eq!(find(dir.path()), None);
        for (clock, name) in [("ptp0", "a card's\n"), ("ptp1", "KVM virtual PTP\n")] {
            fs::create_dir(dir.path().join(clock)).unwrap();
            fs::write(dir.path().join(clock).join("clock_name"), name).unwrap();
        }
        assert_eq!(find(dir.path()).unwrap(), "ptp1");
    }
}
