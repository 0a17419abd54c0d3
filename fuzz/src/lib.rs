//! What the fuzz targets share. All of them take the bytes of an input in order, so that a seed
//! can be written by hand and a change of one byte changes one step.

pub mod devices;
pub mod event_loop;
pub mod file;
pub mod programs;

use libfuzzer_sys::arbitrary::{Result, Unstructured};

/// What the Rust runtime does at the start of every program, and the fuzzer's does not: a peer that
/// goes away while it is written to is an error, and not the end of the process.
pub fn ignore_sigpipe() {
    // SAFETY: the disposition is one that is not a function.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Takes steps as long as there is input, `most` at most.
///
/// # Errors
/// The input ends in the middle of a step.
pub fn steps(
    input: &mut Unstructured<'_>,
    most: usize,
    mut step: impl FnMut(&mut Unstructured<'_>) -> Result<()>,
) -> Result<()> {
    for _ in 0..most {
        if input.is_empty() {
            break;
        }
        step(input)?;
    }
    Ok(())
}
