//! Public APIs: thin adapters that translate names, shapes, status words and errors, and hold no
//! behaviour of their own.

mod brief;
mod forms;
pub mod microvm;
mod output;
mod upload;
pub mod wrenn;
