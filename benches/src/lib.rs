//! Measures of this project's virtual machine monitor beside others, under equal conditions.
//!
//! A measure starts each [`peer`] in turn, in random order within each round, and times what
//! happens: a cold [`boot`], and what a [`running`] guest does. Every sample is kept, the failed ones too; [`stats`] condenses them, and
//! [`report`] writes them down and prints a table.

pub mod agent;
pub mod api;
pub mod boot;
pub mod channel;
pub mod clock;
pub mod interrupt;
pub mod machine;
pub mod memory;
pub mod network;
pub mod peer;
pub mod process;
pub mod random;
pub mod report;
pub mod restore;
pub mod rounds;
pub mod running;
pub mod sandboxes;
pub mod stage;
pub mod stats;
pub mod stream;
pub mod thresholds;
pub mod trace;

/// An error with its causes, as one sentence.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
