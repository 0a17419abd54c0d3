//! The boot timer: when each phase of a boot was reached, from the start of the process to the
//! guest's own word, as one line of JSON.
//!
//! Times are microseconds since the start of the process, which is its first instruction of our
//! own: loading the program comes before. `start_monotonic_us` is that moment on the host's
//! CLOCK_MONOTONIC, so that whoever started the process can tell what came before.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::devices::bus::BusDevice;

/// A phase of a boot, named for what has just been done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The process has started.
    ProcessStart,
    /// The command line is understood.
    ArgumentsParsed,
    /// The files, sockets and devices of the host that the machine uses are open.
    HostOpened,
    /// The process is jailed.
    Jailed,
    /// The virtual machine has its memory and vCPUs.
    MachineCreated,
    /// The devices are connected.
    DevicesBuilt,
    /// Kernel, initramfs and tables are in the guest's memory.
    KernelLoaded,
    /// The first vCPU enters the guest for the first time.
    FirstEntry,
    /// The guest's agent, its first process, has begun.
    GuestMarker,
}

#[derive(Debug, Serialize)]
struct Mark {
    phase: Phase,
    at_us: u64,
}

#[derive(Serialize)]
struct Timeline<'a> {
    start_monotonic_us: u64,
    /// Whether the guest has given its marker.
    complete: bool,
    phases: &'a [Mark],
}

/// Times the first boot of a process, if that was asked for. Clones are the same timer.
///
/// The line is written with the guest's marker, or when the last clone goes without one.
#[derive(Clone, Default)]
pub struct BootTimer(Option<Arc<Running>>);

struct Running {
    start: Instant,
    start_monotonic_us: u64,
    state: Mutex<State>,
}

struct State {
    marks: Vec<Mark>,
    /// `None` once the line is written.
    sink: Option<File>,
}

impl BootTimer {
    /// A timer that writes to `sink`, for a process that started at `start`.
    pub fn new(start: Instant, sink: File) -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let now_us = now.tv_sec.unsigned_abs() * 1_000_000 + now.tv_nsec.unsigned_abs() / 1000;
        let mark = Mark {
            phase: Phase::ProcessStart,
            at_us: 0,
        };
        Self(Some(Arc::new(Running {
            start,
            start_monotonic_us: now_us.saturating_sub(micros_since(start)),
            state: Mutex::new(State {
                marks: vec![mark],
                sink: Some(sink),
            }),
        })))
    }

    /// Whether anybody wants to know.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Notes that a phase was reached. The first time counts.
    pub fn reached(&self, phase: Phase) {
        let Some(running) = &self.0 else { return };
        let at_us = micros_since(running.start);
        let mut state = running.lock();
        if state.sink.is_none() || state.marks.iter().any(|mark| mark.phase == phase) {
            return;
        }
        state.marks.push(Mark { phase, at_us });
        if phase == Phase::GuestMarker {
            running.write(&mut state);
        }
    }

    /// The register that takes the guest's marker, for the bus: a write of one byte, whatever it
    /// is.
    pub fn register(&self) -> MarkerRegister {
        MarkerRegister(self.clone())
    }
}

impl Running {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, state: &mut State) {
        let Some(mut sink) = state.sink.take() else {
            return;
        };
        let line = serde_json::to_vec(&Timeline {
            start_monotonic_us: self.start_monotonic_us,
            complete: state
                .marks
                .iter()
                .any(|mark| mark.phase == Phase::GuestMarker),
            phases: &state.marks,
        });
        let written = line.map_err(std::io::Error::from).and_then(|mut line| {
            line.push(b'\n');
            sink.write_all(&line)
        });
        if let Err(error) = written {
            tracing::warn!(%error, "the times of the boot cannot be written");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.lock();
        self.write(&mut state);
    }
}

fn micros_since(start: Instant) -> u64 {
    start.elapsed().as_micros().try_into().unwrap_or(u64::MAX)
}

/// See [`BootTimer::register`].
pub struct MarkerRegister(BootTimer);

impl BusDevice for MarkerRegister {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _offset: u64, _data: &[u8]) {
        self.0.reached(Phase::GuestMarker);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    fn text(file: &mut File) -> String {
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    fn phases(line: &str) -> (serde_json::Value, Vec<String>) {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let phases = line["phases"].as_array().unwrap();
        let names = phases
            .iter()
            .map(|mark| mark["phase"].as_str().unwrap().to_owned())
            .collect();
        let times: Vec<_> = phases
            .iter()
            .map(|mark| mark["at_us"].as_u64().unwrap())
            .collect();
        assert!(times.is_sorted(), "{times:?}");
        (line, names)
    }

    #[test]
    fn the_marker_completes_the_line_once() {
        let mut file = tempfile::tempfile().unwrap();
        let timer = BootTimer::new(Instant::now(), file.try_clone().unwrap());
        timer.reached(Phase::HostOpened);
        timer.reached(Phase::FirstEntry);
        // A second machine of the same process.
        timer.reached(Phase::HostOpened);
        assert_eq!(text(&mut file), "");
        timer.register().write(0, &[1]);
        timer.register().write(0, &[1]);
        timer.reached(Phase::Jailed);
        drop(timer);

        let text = text(&mut file);
        assert_eq!(text.lines().count(), 1);
        let (line, names) = phases(&text);
        assert_eq!(line["complete"], true);
        assert!(line["start_monotonic_us"].as_u64().unwrap() > 0);
        assert_eq!(
            names,
            [
                "process_start",
                "host_opened",
                "first_entry",
                "guest_marker"
            ]
        );
    }

    #[test]
    fn a_boot_that_does_not_get_there_is_told_at_the_end() {
        let mut file = tempfile::tempfile().unwrap();
        let timer = BootTimer::new(Instant::now(), file.try_clone().unwrap());
        let clone = timer.clone();
        timer.reached(Phase::MachineCreated);
        drop(timer);
        assert_eq!(text(&mut file), "");
        drop(clone);
        let (line, names) = phases(&text(&mut file));
        assert_eq!(line["complete"], false);
        assert_eq!(names, ["process_start", "machine_created"]);
    }

    #[test]
    fn without_one_nothing_happens() {
        let timer = BootTimer::default();
        assert!(!timer.is_on());
        timer.reached(Phase::GuestMarker);
        let mut data = [0xff];
        timer.register().read(0, &mut data);
        assert_eq!(data, [0]);
    }
}
