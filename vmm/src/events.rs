//! The event stream: what happens to the machine, one JSON object a line, for whoever started
//! the VMM.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::exit::ExitReason;

/// Something that happened to the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The vCPUs are about to run their first instruction.
    Booting,
    /// The vCPUs run. Whether the guest's kernel gets anywhere only the guest can tell.
    Booted,
    /// The guest has been stopped between two instructions.
    Paused,
    /// The guest runs on.
    Resumed,
    /// The machine has been written to files; its guest is still stopped.
    Snapshotted,
    /// The machine of a snapshot has been built; its guest does not run yet.
    Restored,
    /// The virtual machine has been removed from the VMM.
    Deleted,
    /// The guest has taken note of new vCPUs, or given one up.
    VcpusChanged {
        /// How many it has now.
        vcpus: u8,
    },
    /// The guest keeps a vCPU that it was asked to give up.
    VcpuRemovalRefused {
        /// Number of the vCPU.
        vcpu: u8,
    },
    /// The guest's driver can no longer use a device and must reset it, or the host has failed a
    /// request for the first time.
    DeviceError {
        /// Name of the device.
        device: String,
        /// What went wrong.
        reason: String,
        /// How often that has happened to the device.
        failures: u64,
    },
    /// The machine ended. The name of the event says how.
    #[serde(untagged)]
    Ended {
        /// `shutdown`, `reboot`, `panic`, `triple_fault` or `error`.
        event: &'static str,
        /// One sentence for people.
        reason: String,
    },
}

impl From<&ExitReason> for Event {
    fn from(reason: &ExitReason) -> Self {
        Self::Ended {
            event: reason.event(),
            reason: reason.describe(),
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    timestamp_us: u64,
    #[serde(flatten)]
    event: &'a Event,
}

/// Where events go. Clones write to the same stream.
#[derive(Debug, Clone)]
pub struct EventStream {
    start: Instant,
    sink: Option<Arc<Mutex<File>>>,
}

impl EventStream {
    /// A stream into `sink`, if there is one, with times counted from `start`.
    pub fn new(start: Instant, sink: Option<File>) -> Self {
        Self {
            start,
            sink: sink.map(|file| Arc::new(Mutex::new(file))),
        }
    }

    /// Reports an event. A reader that has gone away misses it; the machine runs on.
    pub fn emit(&self, event: &Event) {
        tracing::info!(?event, "event");
        let Some(sink) = &self.sink else { return };
        let timestamp_us = self
            .start
            .elapsed()
            .as_micros()
            .try_into()
            .unwrap_or(u64::MAX);
        let Ok(mut line) = serde_json::to_vec(&Line {
            timestamp_us,
            event,
        }) else {
            return;
        };
        line.push(b'\n');
        // One write, so that lines of different threads do not mix.
        let _ = sink
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(&line);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn events_are_one_json_object_a_line() {
        let mut file = tempfile::tempfile().unwrap();
        let stream = EventStream::new(Instant::now(), Some(file.try_clone().unwrap()));
        stream.emit(&Event::Booting);
        stream.emit(&Event::from(&ExitReason::Panic));

        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        let lines: Vec<serde_json::Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(lines[0]["event"], "booting");
        assert!(lines[0]["timestamp_us"].is_u64());
        assert_eq!(lines[1]["event"], "panic");
        assert!(lines[1]["reason"].is_string());
    }
}
