//! x86-64: what a Linux kernel finds when it is entered, and how vCPUs are set up for that.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod msrs;
pub mod regs;
pub mod reset_vector;
