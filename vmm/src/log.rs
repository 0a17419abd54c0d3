//! The VMM's own log: where its lines go, and which of them there are.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Mutex;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::prelude::*;

use crate::bounded_log::BoundedLog;

/// Size at which a log file starts over, in bytes.
pub const LIMIT: u64 = 4 << 20;

/// Target of lines that were asked for, and so are logged at every level.
pub const ON_REQUEST: &str = "vmm::on_request";

/// Opens a log file to append to it. If it is made, its owner alone may read it.
///
/// # Errors
/// The file cannot be opened for writing.
pub fn open(path: &Path) -> io::Result<BoundedLog> {
    BoundedLog::append(path, LIMIT)
}

/// Starts to log into `file`, or else to standard error: warnings, and with each step of
/// `verbosity` one level more, up to traces. Once in a process.
pub fn start(verbosity: u8, file: Option<BoundedLog>) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // The crate that reads the rings logs an error for each that is malformed, as often as the
    // guest likes. The device tells of it too, and not as often.
    let filter = Targets::new()
        .with_default(level)
        .with_target(ON_REQUEST, LevelFilter::INFO)
        .with_target("virtio_queue", LevelFilter::OFF);
    let colours = file.is_none() && io::stderr().is_terminal();
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Mutex::new(file)),
        None => BoxMakeWriter::new(io::stderr),
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(colours)
        .with_writer(writer)
        // They would be told to standard error, whose own errors end the thread.
        .log_internal_errors(false);
    tracing_subscriber::registry()
        .with(lines)
        .with(filter)
        .init();
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_log_file_is_its_owners_and_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        open(&path).unwrap().write_all(b"one\n").unwrap();
        open(&path).unwrap().write_all(b"two\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);

        // What was there before counts.
        std::fs::write(&path, vec![b'.'; LIMIT as usize - 1]).unwrap();
        open(&path).unwrap().write_all(b"three\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        open(directory.path()).err().unwrap();
    }
}
