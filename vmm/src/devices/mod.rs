//! Everything that the guest sees as hardware besides CPUs, memory and interrupt controllers.

pub mod virtio;
