//! The boot timer's register as a device: how a program of the guest writes to it.
//!
//! A kernel without port access for programs still evaluates `_SUN`, the number of a device's slot,
//! for whoever reads the attribute `sun` of the device in sysfs, and nobody else asks for it.

use acpi_tables::aml::{self, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule};
use acpi_tables::{Aml, aml::OpRegionSpace};

use super::super::layout::BOOT_TIMER_PORT;

/// The identifier of the device; Linux names its first one `MVSB0001:00`.
const HID: &str = "MVSB0001";

/// Appends the device.
pub(super) fn append(sink: &mut Vec<u8>) {
    let region = aml::OpRegion::new(
        "BTRG".into(),
        OpRegionSpace::SystemIO,
        &BOOT_TIMER_PORT,
        &aml::ONE,
    );
    let field = aml::Field::new(
        "BTRG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"BTMK", 8)],
    );
    let register = aml::Path::new("BTMK");
    let mark = aml::Store::new(&register, &aml::ONE);
    let slot = aml::Return::new(&aml::ZERO);
    aml::Device::new(
        "\\_SB_.BTMR".into(),
        vec![
            &aml::Name::new("_HID".into(), &HID),
            &region,
            &field,
            &aml::Method::new("_SUN".into(), 0, true, vec![&mark, &slot]),
        ],
    )
    .to_aml_bytes(sink);
}
