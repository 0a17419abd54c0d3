//! Public APIs: thin adapters that translate names, shapes, status words and errors, and hold no
//! behaviour of their own.

pub mod microvm;
pub mod wrenn;
