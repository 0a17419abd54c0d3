//! The machine that a measure ran on, as far as it explains the numbers.

use std::path::Path;
use std::{fmt, fs};

use serde::Serialize;

/// What a reader must know of the machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cores: usize,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// Release of the kernel.
    pub kernel: String,
    /// What the CPUs are.
    pub virtualization: Virtualization,
    /// Runnable threads, averaged over the minute before the start: much above 0 means that
    /// others used the machine too.
    pub load: f64,
}

/// What the CPUs of a machine are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Virtualization {
    /// Hardware.
    Direct,
    /// A hypervisor's, which passes on the hardware: guests are nested.
    Nested,
    /// A program's. Times compare only with each other.
    Emulated,
}

impl Virtualization {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nested => "itself a virtual machine",
            Self::Emulated => "emulated: times compare with each other, not with other machines'",
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}, {} cores, {}, kernel {}",
            self.cpu,
            self.cores,
            self.virtualization.describe(),
            self.kernel
        )
    }
}

impl Machine {
    /// This machine, now.
    pub fn describe() -> Self {
        let read = |path: &str| fs::read_to_string(Path::new(path)).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = value_in(&cpuinfo, "model name").unwrap_or("unknown");
        Self {
            cpu: cpu.to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: value_in(&read("/proc/meminfo"), "MemTotal")
                .and_then(|value| value.strip_suffix(" kB")?.parse::<u64>().ok())
                .unwrap_or_default()
                / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            virtualization: virtualization(cpu, value_in(&cpuinfo, "flags").unwrap_or_default()),
            load: read("/proc/loadavg")
                .split_whitespace()
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or_default(),
        }
    }
}

/// QEMU's software CPU says so in its model name; any other hypervisor's shows in the flags.
fn virtualization(cpu: &str, flags: &str) -> Virtualization {
    if cpu.contains("TCG") {
        Virtualization::Emulated
    } else if flags.split_whitespace().any(|flag| flag == "hypervisor") {
        Virtualization::Nested
    } else {
        Virtualization::Direct
    }
}

/// The value of the first line `key : value`.
fn value_in<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_tells_what_it_is() {
        let is = virtualization;
        assert_eq!(
            is("QEMU TCG CPU version 2.5+", "fpu hypervisor"),
            Virtualization::Emulated
        );
        assert_eq!(is("AMD EPYC", "fpu hypervisor svm"), Virtualization::Nested);
        assert_eq!(is("AMD EPYC", "fpu svm"), Virtualization::Direct);
    }

    #[test]
    fn this_machine_has_a_processor_memory_and_a_kernel() {
        let machine = Machine::describe();
        assert!(machine.cores > 0 && machine.memory_mib > 0);
        assert!(machine.kernel.contains('.'), "{}", machine.kernel);
    }
}
