//! What a machine is booted from: any configuration, command line, kernel and initramfs, up to the
//! tables that the guest finds in its memory.
//!
//! An input starts with the numbers of the configuration; the lengths of command line and
//! initramfs are among them. The kernel is what is left.
#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use linux_loader::bootparam::boot_params;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm::arch::x86_64::acpi::{self, VirtioMmioSlot};
use vmm::arch::x86_64::boot::{self, BootFile};
use vmm::arch::x86_64::layout::{
    ACPI_ADDR, MAX_VIRTIO_DEVICES, VIRTIO_GSI_START, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START,
    ZERO_PAGE_ADDR,
};
use vmm::arch::x86_64::{regs, reset_vector};
use vmm::config::{
    ConsoleConfig, CpusConfig, HotplugMethod, MemoryConfig, PayloadConfig, RngConfig, SerialConfig,
    VmConfig,
};
use vmm::devices::vmgenid;
use vmm::memory::{self, GuestMemory, Ram};
use vmm_fuzz::file::MemoryFile;

fuzz_target!(|input: &[u8]| {
    // An input that ends in the middle of the configuration boots nothing.
    let _ = run(&mut Unstructured::new(input));
});

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    let cpus = CpusConfig {
        boot_vcpus: input.arbitrary()?,
        max_vcpus: input.arbitrary()?,
    };
    let memory = memory_config(input)?;
    let virtio = usize::from(input.arbitrary::<u8>()?) % (MAX_VIRTIO_DEVICES + 1);
    let serial: bool = input.arbitrary()?;
    let cmdline_length = usize::from(input.arbitrary::<u16>()? % 2100);
    let initramfs_length = usize::from(input.arbitrary::<u16>()?);
    let has_initramfs: bool = input.arbitrary()?;
    let cmdline = String::from_utf8_lossy(input.bytes(cmdline_length)?).into_owned();
    let initramfs = has_initramfs.then(|| MemoryFile::new(&vec![0x77; initramfs_length]));
    let kernel = MemoryFile::new(input.bytes(input.len())?);
    let config = VmConfig {
        cpus,
        memory,
        payload: Some(PayloadConfig {
            kernel: kernel.path(),
            cmdline: Some(cmdline),
            initramfs: initramfs.as_ref().map(MemoryFile::path),
        }),
        disks: Vec::new(),
        net: Vec::new(),
        rng: RngConfig::default(),
        balloon: None,
        serial: SerialConfig::default(),
        console: ConsoleConfig::default(),
        vsock: None,
    };
    if config.validate_for_boot().is_ok() {
        build(&config, virtio, serial);
    }
    Ok(())
}

/// Sizes around those that make a difference, and any.
fn memory_config(input: &mut Unstructured<'_>) -> Result<MemoryConfig> {
    let hotplug: u16 = input.arbitrary()?;
    let size = match input.arbitrary::<u8>()? % 8 {
        0..=3 => 64 << 20,
        4 => 3 << 30,
        5 => (3 << 30) + (1 << 20),
        6 => u64::from(input.arbitrary::<u32>()?) << 20,
        _ => input.arbitrary()?,
    };
    Ok(MemoryConfig {
        size,
        thp: false,
        hotplug_method: HotplugMethod::VirtioMem,
        hotplug_size: Some(u64::from(hotplug) << 27),
        hotplugged_size: None,
    })
}

/// As [`vmm::builder`] does it, without KVM.
fn build(config: &VmConfig, virtio: usize, serial: bool) {
    // A host may have no room for a large guest.
    let Ok(ram) = memory::allocate(config.memory.size, false) else {
        return;
    };
    let size = config.memory.hotplug_size.unwrap_or_default();
    let owner = match memory::with_pluggable_region(&ram, size.max(1 << 27), false) {
        Ok((memory, _)) => Ram::new(memory),
        Err(_) => {
            drop(Ram::new(ram));
            return;
        }
    };
    let payload = config.payload.as_ref().unwrap();
    let kernel = BootFile::open(&payload.kernel).unwrap();
    let initramfs = payload
        .initramfs
        .as_deref()
        .map(|path| BootFile::open(path).unwrap());
    let cmdline = payload.cmdline.as_deref().unwrap_or_default();
    let loaded = boot::load(&ram, kernel, initramfs, cmdline);
    let slots: Vec<_> = (0..virtio as u32)
        .map(|index| VirtioMmioSlot {
            address: (VIRTIO_MMIO_START + u64::from(index) * VIRTIO_MMIO_SIZE) as u32,
            size: VIRTIO_MMIO_SIZE as u32,
            gsi: VIRTIO_GSI_START + index,
        })
        .collect();
    let devices = acpi::Devices {
        serial,
        boot_timer: serial,
        virtio: &slots,
    };
    acpi::write_tables(owner.memory(), config.cpus, devices).unwrap();
    regs::write_boot_tables(owner.memory()).unwrap();
    reset_vector::write(owner.memory()).unwrap();
    vmgenid::renew(owner.memory()).unwrap();
    if loaded.is_ok() {
        check_memory_map(&ram);
    }
    check_tables(&ram);
    drop(ram);
}

/// The map that the guest is given (Documentation/arch/x86/zero-page.rst) names what there is, in
/// order.
fn check_memory_map(memory: &GuestMemory) {
    let params: boot_params = memory.read_obj(ZERO_PAGE_ADDR).unwrap();
    let table = params.e820_table;
    let mut end = 0;
    for entry in &table[..params.e820_entries.into()] {
        let (start, size) = (entry.addr, entry.size);
        assert!(start >= end && size > 0);
        end = start + size;
        assert!(memory.check_range(GuestAddress(start), size as usize));
    }
}

/// Every table that is reached from the RSDP has a proper checksum (ACPI 6.5, 5.2).
fn check_tables(memory: &GuestMemory) {
    let bytes = |address: u64, length: usize| {
        let mut bytes = vec![0; length];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        bytes
    };
    let table = |address: u64| {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        bytes(address, length as usize)
    };
    let address = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let rsdp = bytes(ACPI_ADDR.0, 36);
    let xsdt = table(address(&rsdp[24..32]));
    for entry in xsdt[36..].chunks_exact(8) {
        table(address(entry));
    }
}
