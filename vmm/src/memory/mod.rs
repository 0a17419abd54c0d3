//! Guest physical memory.

/// All RAM of the guest, addressed by guest physical address.
///
/// Cloning is cheap: clones share the same mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
