//! Small devices at I/O ports. They hold no guest pointers and finish in no time, so the vCPU
//! threads run them.

pub mod i8042;
pub mod power;
pub mod pvpanic;
pub mod serial;
