//! The generic event device, and the devices whose events it tells of: the VM generation ID and
//! the power button. [`crate::devices::events`] has the register that says which event it was.

use acpi_tables::aml::{self, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule};
use acpi_tables::{Aml, aml::OpRegionSpace};

use super::super::layout::{EVENT_PORT, EVENT_PORT_COUNT, GED_GSI, VMGENID_ADDR};
use super::{Masked, cpus, interrupt};
use crate::devices::events::PlatformEvent;

/// The notification that the generation ID has changed.
const VMGENID_CHANGED: u8 = 0x80;
/// The notification that a button was pressed (ACPI 6.5, table 5.180).
const BUTTON_PRESSED: u8 = 0x80;

/// Appends the devices. Their methods call those of [`cpus`].
pub(super) fn append(sink: &mut Vec<u8>) {
    generation_id(sink);
    power_button(sink);
    event_device(sink);
}

/// The driver of Linux matches `_HID` VMGENCTR; other systems look for the compatible identifier
/// VM_Gen_Counter (Virtual Machine Generation ID, Microsoft 2018).
fn generation_id(sink: &mut Vec<u8>) {
    // Below 1 MiB, so the upper half is zero.
    let (low, high) = (VMGENID_ADDR.0 as u32, 0_u32);
    aml::Device::new(
        "\\_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(sink);
}

fn power_button(sink: &mut Vec<u8>) {
    let id = aml::EISAName::new("PNP0C0C");
    aml::Device::new(
        "\\_SB_.PWRB".into(),
        vec![
            &aml::Name::new("_HID".into(), &id),
            &aml::Name::new("_UID".into(), &aml::ZERO),
        ],
    )
    .to_aml_bytes(sink);
}

/// `_EVT` reads which events are pending, clears them, and then passes them on: an event that
/// occurs meanwhile raises the interrupt anew.
fn event_device(sink: &mut Vec<u8>) {
    let region = aml::OpRegion::new(
        "EVRG".into(),
        OpRegionSpace::SystemIO,
        &EVENT_PORT,
        &EVENT_PORT_COUNT,
    );
    let fields = aml::Field::new(
        "EVRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVNT", 32)],
    );

    let register = aml::Path::new("EVNT");
    let pending = aml::Local(0);
    let [generation, cpus, button] = [
        PlatformEvent::GenerationChanged,
        PlatformEvent::Cpus,
        PlatformEvent::PowerButton,
    ]
    .map(|event| event as u32);
    let generation_changed = Masked::new(&pending, generation);
    let cpus_changed = Masked::new(&pending, cpus);
    let button_pressed = Masked::new(&pending, button);
    let generation_device = aml::Path::new("\\_SB_.VGEN");
    let button_device = aml::Path::new("\\_SB_.PWRB");
    let is_ours = aml::Equal::new(&aml::Arg(0), &GED_GSI);
    aml::Device::new(
        "\\_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&interrupt(GED_GSI)]),
            ),
            &region,
            &fields,
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::If::new(
                    &is_ours,
                    vec![
                        &aml::Store::new(&pending, &register),
                        &aml::Store::new(&register, &pending),
                        &aml::If::new(
                            &generation_changed,
                            vec![&aml::Notify::new(&generation_device, &VMGENID_CHANGED)],
                        ),
                        &aml::If::new(
                            &cpus_changed,
                            vec![&aml::MethodCall::new(cpus::SCAN.into(), vec![])],
                        ),
                        &aml::If::new(
                            &button_pressed,
                            vec![&aml::Notify::new(&button_device, &BUTTON_PRESSED)],
                        ),
                    ],
                )],
            ),
        ],
    )
    .to_aml_bytes(sink);
}
