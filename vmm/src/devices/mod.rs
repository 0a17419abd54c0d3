//! Everything that the guest sees as hardware besides CPUs, memory and interrupt controllers.

pub mod bus;
pub mod legacy;
pub mod virtio;
pub mod vmgenid;
