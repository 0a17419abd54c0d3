//! The objects of KVM: the virtual machine with its interrupt controllers, and its vCPUs.

pub mod prefault;
pub mod state;
pub mod vcpu;
pub mod vm;
