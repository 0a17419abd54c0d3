//! When a guest's first instruction runs, as the host's kernel sees it.
//!
//! KVM's tracepoint `kvm_entry` fires each time a vCPU enters the guest, whichever VMM runs it:
//! so all peers are timed at the same point and at the same cost. A tracing instance of our own
//! (Documentation/trace/ftrace.rst, "Instances") takes the events of this process and its
//! descendants only. Its buffer is the smallest there is and keeps the oldest events, so the
//! first entry stays and the many that follow are dropped at once.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::clock::Moment;

/// Where the tracing file system is usually mounted; the second is its old place.
const MOUNTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
/// What the names of our instances begin with; our process id follows.
const PREFIX: &str = "microvm-bench-";

/// Why first entries cannot be seen.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file system is not mounted, or we may not see it.
    #[error(
        "no tracing file system at /sys/kernel/tracing; mount tracefs there and run this as root"
    )]
    NotMounted,
    /// A file of it did not do what was asked.
    #[error("cannot set up tracing through {path}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A tracing instance that catches first entries. Dropping it removes it.
#[derive(Debug)]
pub struct Tracer {
    instance: PathBuf,
}

impl Tracer {
    /// Sets up tracing of the processes that the calling thread will start.
    ///
    /// # Errors
    /// There is no tracing file system, this is not root, or KVM is not loaded.
    pub fn new() -> Result<Self, TraceError> {
        let mount = MOUNTS
            .iter()
            .map(Path::new)
            .find(|mount| mount.join("instances").is_dir())
            .ok_or(TraceError::NotMounted)?;
        remove_leftovers(&mount.join("instances"));

        let instance = mount
            .join("instances")
            .join(format!("{PREFIX}{}", std::process::id()));
        fs::create_dir(&instance).map_err(|source| TraceError::File {
            path: instance.clone(),
            source,
        })?;
        let tracer = Self { instance };
        let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
        for (file, value) in [
            ("trace_clock", "mono"),
            ("buffer_size_kb", "4"),
            ("options/overwrite", "0"),
            // New processes and threads of a traced one are traced too.
            ("options/event-fork", "1"),
            ("set_event_pid", thread.as_str()),
            ("events/kvm/kvm_entry/enable", "1"),
        ] {
            tracer.write(file, value)?;
        }
        Ok(tracer)
    }

    /// Forgets what was seen so far.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn clear(&self) -> Result<(), TraceError> {
        // Opening it for truncation is what empties it.
        self.write("trace", "")
    }

    /// When a guest was first entered since [`clear`](Self::clear).
    ///
    /// # Errors
    /// The trace cannot be read.
    pub fn first_entry(&self) -> Result<Option<Moment>, TraceError> {
        let path = self.instance.join("trace");
        let trace = fs::read(&path).map_err(|source| TraceError::File { path, source })?;
        Ok(first_entry_in(&String::from_utf8_lossy(&trace)))
    }

    fn write(&self, file: &str, value: &str) -> Result<(), TraceError> {
        let path = self.instance.join(file);
        fs::write(&path, value).map_err(|source| TraceError::File { path, source })
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.instance);
    }
}

/// Removes instances of runs that were killed.
fn remove_leftovers(instances: &Path) {
    for entry in fs::read_dir(instances).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// The time of the earliest `kvm_entry` in the text of a trace.
fn first_entry_in(trace: &str) -> Option<Moment> {
    trace
        .lines()
        .filter_map(|line| {
            // A thread's name may hold anything; the time is the word before the event's name.
            let (before, _) = line.split_once(": kvm_entry:")?;
            let (seconds, micros) = before.split_whitespace().last()?.split_once('.')?;
            let micros: u32 = (micros.len() == 6).then(|| micros.parse().ok())??;
            Some(Duration::new(seconds.parse().ok()?, micros * 1_000))
        })
        .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
#
# entries-in-buffer/entries-written: 3/3   #P:2
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
          vcpu 0-411     [001] d...1    67.060512: kvm_entry: vcpu 0, rip 0x1000200
       CPU 0/KVM-411     [000] d...1    67.059998: kvm_entry: vcpu 0, rip 0xfff0
            vmm-410      [001] .....    67.000001: kvm_exit: reason EXIT_HLT
";

    #[test]
    fn the_earliest_entry_counts_whatever_the_order() {
        assert_eq!(
            first_entry_in(TRACE),
            Some(Duration::new(67, 59_998_000)),
            "lines of different CPUs may come in any order"
        );
    }

    #[test]
    fn other_lines_are_no_entries() {
        assert_eq!(first_entry_in(""), None);
        assert_eq!(
            first_entry_in("x-1 [0] d 1.5: kvm_entry: vcpu 0\n 7: kvm_entry: x"),
            None
        );
    }
}
