//! Everything that the guest sees as hardware besides CPUs, memory and interrupt controllers.

pub mod bus;
pub mod cpu_hotplug;
pub mod events;
pub mod legacy;
pub mod virtio;
pub mod vmgenid;
