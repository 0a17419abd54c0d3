//! ACPI tables: hardware-reduced, so that there is no SCI, no PM timer and no legacy interrupt
//! controller, and every device is found in the DSDT (ACPI 6.5).

mod boot_timer;
mod cpus;
mod events;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{
    ACPI_ADDR, ACPI_END, IOAPIC_ADDR, LAPIC_ADDR, PVPANIC_PORT, RESET_PORT, SERIAL_GSI,
    SERIAL_PORT, SERIAL_PORT_COUNT, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use crate::config::CpusConfig;
use crate::devices::legacy::power::{RESET_VALUE, SLEEP_TYPE_S5};
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"MVSBX ";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

/// A virtio-mmio device as the DSDT describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioMmioSlot {
    /// Guest physical address of the registers.
    pub address: u32,
    /// Size of the register area in bytes.
    pub size: u32,
    /// Interrupt line.
    pub gsi: u32,
}

/// The devices that only some machines have.
#[derive(Debug, Clone, Copy)]
pub struct Devices<'a> {
    /// Whether there is a serial port.
    pub serial: bool,
    /// Whether there is the register of the boot timer.
    pub boot_timer: bool,
    /// The virtio devices.
    pub virtio: &'a [VirtioMmioSlot],
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// The tables outgrew their area.
    #[error("the ACPI tables need {size} bytes, {room} are reserved for them")]
    TooLarge {
        /// Size of the tables in bytes.
        size: u64,
        /// Size of the area in bytes.
        room: u64,
    },
    /// The guest has no RAM there.
    #[error("cannot write the ACPI tables to guest memory")]
    Memory(#[source] GuestMemoryError),
}

/// Writes RSDP, XSDT, FADT, MADT and DSDT to the area that the boot parameters name.
///
/// # Errors
/// The tables are larger than their area, or the guest has no RAM there.
pub fn write_tables(
    memory: &GuestMemory,
    cpus: CpusConfig,
    devices: Devices<'_>,
) -> Result<(), AcpiError> {
    let mut area = TableArea {
        next: ACPI_ADDR.0 + Rsdp::len().next_multiple_of(16) as u64,
        tables: Vec::new(),
    };
    let dsdt = area.add(&dsdt(cpus, devices));
    let fadt = area.add(&fadt(dsdt));
    let madt = area.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.add(&xsdt);

    let room = ACPI_END.0 - ACPI_ADDR.0;
    let size = area.next - ACPI_ADDR.0;
    if size > room {
        return Err(AcpiError::TooLarge { size, room });
    }
    area.tables
        .push((ACPI_ADDR.0, bytes_of(&Rsdp::new(OEM_ID, xsdt))));
    for (address, bytes) in area.tables {
        memory
            .write_slice(&bytes, GuestAddress(address))
            .map_err(AcpiError::Memory)?;
    }
    Ok(())
}

/// Tables with their addresses, laid one behind the other.
struct TableArea {
    next: u64,
    tables: Vec<(u64, Vec<u8>)>,
}

impl TableArea {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let address = self.next;
        let bytes = bytes_of(table);
        self.next = (address + bytes.len() as u64).next_multiple_of(16);
        self.tables.push((address, bytes));
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: CpusConfig) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(LAPIC_ADDR),
    );
    for id in 0..cpus.max_vcpus {
        let status = if id < cpus.boot_vcpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        madt.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    madt.add_structure(IoApic::new(0, IOAPIC_ADDR, 0));
    madt
}

fn dsdt(cpus: CpusConfig, devices: Devices<'_>) -> impl Aml + use<> {
    let mut body = Vec::new();
    for (index, slot) in devices.virtio.iter().enumerate() {
        virtio_device(&mut body, index, *slot);
    }
    if devices.serial {
        serial_device(&mut body);
    }
    if devices.boot_timer {
        boot_timer::append(&mut body);
    }
    cpus::append(&mut body, cpus);
    events::append(&mut body);
    panic_device(&mut body);
    // What a driver writes to the sleep control register to power off.
    let zero = aml::ZERO;
    aml::Name::new(
        "_S5_".into(),
        &aml::Package::new(vec![&SLEEP_TYPE_S5, &zero, &zero, &zero]),
    )
    .to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    table
}

/// The bits of a value that a mask names, as a condition: true unless all of them are zero.
struct Masked<'a> {
    value: &'a dyn Aml,
    mask: u32,
}

impl<'a> Masked<'a> {
    fn new(value: &'a dyn Aml, mask: u32) -> Self {
        Self { value, mask }
    }
}

impl Aml for Masked<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // Without a target: the null name (ACPI 6.5, 20.2.5.4).
        aml::And::new(&aml::ZERO, self.value, &self.mask).to_aml_bytes(sink);
    }
}

/// Code made before.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// An edge-triggered interrupt of its own, consumed by the device.
fn interrupt(gsi: u32) -> aml::Interrupt {
    aml::Interrupt::new(true, true, false, false, gsi)
}

fn virtio_device(sink: &mut Vec<u8>, index: usize, slot: VirtioMmioSlot) {
    let registers = aml::Memory32Fixed::new(true, slot.address, slot.size);
    aml::Device::new(
        format!("\\_SB_.V{index:03}").as_str().into(),
        vec![
            // LNRO0005 is the identifier that Linux gives to virtio-mmio.
            &aml::Name::new("_HID".into(), &"LNRO0005"),
            &aml::Name::new("_UID".into(), &(index as u32)),
            &aml::Name::new("_CCA".into(), &aml::ONE),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&registers, &interrupt(slot.gsi)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn serial_device(sink: &mut Vec<u8>) {
    // The count is 8, so that it fits the byte of an I/O port descriptor.
    let ports = aml::IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORT_COUNT as u8);
    aml::Device::new(
        "\\_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new("_DDN".into(), &"COM1"),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&ports, &interrupt(SERIAL_GSI)]),
            ),
        ],
    )
    .to_aml_bytes(sink);
}

fn panic_device(sink: &mut Vec<u8>) {
    let port = aml::IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1);
    aml::Device::new(
        "\\_SB_.PEVT".into(),
        vec![
            &aml::Name::new("_HID".into(), &"QEMU0001"),
            &aml::Name::new("_STA".into(), &0xf_u8),
            &aml::Name::new("_CRS".into(), &aml::ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::super::layout::MAX_VIRTIO_DEVICES;
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        assert_eq!(sum(&bytes), 0, "checksum of {:?}", &bytes[..4]);
        bytes
    }

    fn u64_at(bytes: &[u8], offset: usize) -> u64 {
        u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_has_a_valid_checksum() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let cpus = CpusConfig {
            boot_vcpus: 3,
            max_vcpus: 32,
        };
        let slots = std::array::from_fn::<_, MAX_VIRTIO_DEVICES, _>(|index| VirtioMmioSlot {
            address: 0xd000_0000 + 0x1000 * index as u32,
            size: 0x1000,
            gsi: 6 + index as u32,
        });
        let devices = Devices {
            serial: true,
            boot_timer: true,
            virtio: &slots,
        };
        write_tables(&memory, cpus, devices).unwrap();

        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, ACPI_ADDR).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));

        let xsdt = table(&memory, u64_at(&rsdp, 24));
        let tables: Vec<_> = (36..xsdt.len())
            .step_by(8)
            .map(|offset| table(&memory, u64_at(&xsdt, offset)))
            .collect();
        assert_eq!(&tables[0][..4], b"FACP");
        assert_eq!(&tables[1][..4], b"APIC");
        let dsdt = table(&memory, u64_at(&tables[0], 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        let count = dsdt
            .windows(8)
            .filter(|bytes| *bytes == b"LNRO0005")
            .count();
        assert_eq!(count, MAX_VIRTIO_DEVICES);
        let processors = dsdt
            .windows(8)
            .filter(|bytes| *bytes == b"ACPI0007")
            .count();
        assert_eq!(processors, 32);
        // One local APIC structure (type 0, length 8) a vCPU behind the 44 bytes of the header.
        let flags: Vec<_> = tables[1][44..]
            .chunks(8)
            .take_while(|entry| entry[..2] == [0, 8])
            .map(|entry| entry[4])
            .collect();
        assert_eq!(flags.len(), 32);
        // Enabled, and online capable (ACPI 6.5, table 5.22).
        assert_eq!((&flags[..3], &flags[3..]), (&[1; 3][..], &[2; 29][..]));
    }
}
