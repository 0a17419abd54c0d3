//! What the fuzz targets share. All of them take the bytes of an input in order, so that a seed
//! can be written by hand and a change of one byte changes one step.

pub mod devices;
pub mod file;
pub mod programs;

use libfuzzer_sys::arbitrary::{Result, Unstructured};

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
