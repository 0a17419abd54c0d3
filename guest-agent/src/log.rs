//! Messages of the agent: to the kernel's log when it is the init process, else to stderr.
//!
//! The kernel's log keeps them all (`dmesg`), and shows on the console what its log level lets
//! through; a quiet boot stays quiet, as every character on a serial console costs time.

use std::{
    fmt::{self, Write as _},
    fs::{File, OpenOptions},
    io::Write as _,
    sync::OnceLock,
};

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// How much a message matters; the numbers are those of syslog(2).
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// The guest cannot go on.
    Emergency = 0,
    /// Something does not work as it should.
    Warning = 4,
    /// What the agent did.
    Info = 6,
}

/// Sends messages to the kernel's log from now on. Without `/dev/kmsg` they go to stderr.
pub fn use_kernel_log() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg") {
        let _ = KERNEL_LOG.set(file);
    }
}

/// Writes one message. A log that does not take it is no reason to fail.
pub fn write(level: Level, message: fmt::Arguments<'_>) {
    let mut line = String::new();
    if let Some(mut kernel) = KERNEL_LOG.get() {
        // One write is one record; the kernel cuts it at about 1 KiB.
        let _ = writeln!(line, "<{}>agent: {message}", level as u8);
        let _ = kernel.write_all(line.as_bytes());
    } else {
        let _ = writeln!(line, "guest-agent: {message}");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// The text of `error` and of everything that caused it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}

/// Writes a warning.
macro_rules! warning {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Warning, format_args!($($arg)*)) };
}

/// Writes what was done.
macro_rules! info {
    ($($arg:tt)*) => { $crate::log::write($crate::log::Level::Info, format_args!($($arg)*)) };
}

pub(crate) use {info, warning};
