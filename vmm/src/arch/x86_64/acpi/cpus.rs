//! The processor devices: how the guest learns of vCPUs that come and gives up those that are to
//! go, by the registers of [`crate::devices::cpu_hotplug`].

use acpi_tables::aml::{self, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};
use acpi_tables::{Aml, aml::OpRegionSpace};

use super::super::layout::CPU_HOTPLUG_PORT;
use super::{Masked, Raw, bytes_of};
use crate::config::CpusConfig;
use crate::devices::cpu_hotplug::REGISTERS_SIZE;

/// The method that tells the system what the registers hold.
pub(super) const SCAN: &str = "\\_SB_.CSCN";
const STATUS: &str = "\\_SB_.CSTA";
const EJECT: &str = "\\_SB_.CEJ0";
const OUTCOME: &str = "\\_SB_.COST";

/// Notifications (ACPI 6.5, table 5.161).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// Present, enabled, shown and functioning (ACPI 6.5, 6.3.7).
const DEVICE_PRESENT: u8 = 0xf;

/// Appends the registers, a device for each vCPU that the machine may ever have, and the methods
/// that they share. A single vCPU neither comes nor goes, and has no device: a guest would spend
/// a part of its boot on it.
pub(super) fn append(sink: &mut Vec<u8>, cpus: CpusConfig) {
    let count = match cpus.max_vcpus {
        1 => 0,
        count => count,
    };
    registers(sink);
    for id in 0..count {
        processor(sink, id);
    }
    status(sink);
    eject(sink);
    outcome(sink);
    scan(sink, count);
}

fn name(id: u8) -> String {
    format!("\\_SB_.C{id:03}")
}

fn registers(sink: &mut Vec<u8>) {
    let region = aml::OpRegion::new(
        "CPRG".into(),
        OpRegionSpace::SystemIO,
        &CPU_HOTPLUG_PORT,
        &REGISTERS_SIZE,
    );
    let names = [*b"CPPR", *b"CPIN", *b"CPLV", *b"CPEJ", *b"CPST"];
    let fields = aml::Field::new(
        "CPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        names.map(|name| FieldEntry::Named(name, 32)).to_vec(),
    );
    aml::Scope::new("\\_SB_".into(), vec![&region, &fields]).to_aml_bytes(sink);
}

fn processor(sink: &mut Vec<u8>, id: u8) {
    // The local APIC structure as a MADT has it, but enabled: asked for when it is.
    let apic = bytes_of(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    let apic = aml::BufferData::new(apic);
    let status = aml::MethodCall::new(STATUS.into(), vec![&id]);
    let status = aml::Return::new(&status);
    let status = aml::Method::new("_STA".into(), 0, true, vec![&status]);
    let eject = aml::MethodCall::new(EJECT.into(), vec![&id]);
    let eject = aml::Method::new("_EJ0".into(), 1, true, vec![&eject]);
    let outcome = aml::MethodCall::new(OUTCOME.into(), vec![&id, &aml::Arg(0), &aml::Arg(1)]);
    let outcome = aml::Method::new("_OST".into(), 3, true, vec![&outcome]);
    let hid = aml::Name::new("_HID".into(), &"ACPI0007");
    let uid = aml::Name::new("_UID".into(), &id);
    let madt = aml::Name::new("_MAT".into(), &apic);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &madt, &status, &outcome];
    // The first one never leaves.
    if id > 0 {
        children.push(&eject);
    }
    aml::Device::new(name(id).as_str().into(), children).to_aml_bytes(sink);
}

/// CSTA(number): `_STA` of a processor.
fn status(sink: &mut Vec<u8>) {
    let (number, bit) = (aml::Arg(0), aml::Local(0));
    let present = aml::Path::new("\\_SB_.CPPR");
    aml::Method::new(
        STATUS.into(),
        1,
        true,
        vec![
            &aml::ShiftLeft::new(&bit, &aml::ONE, &number),
            &aml::And::new(&bit, &bit, &present),
            &aml::If::new(&bit, vec![&aml::Return::new(&DEVICE_PRESENT)]),
            &aml::Return::new(&aml::ZERO),
        ],
    )
    .to_aml_bytes(sink);
}

/// CEJ0(number): `_EJ0` of a processor.
fn eject(sink: &mut Vec<u8>) {
    let register = aml::Path::new("\\_SB_.CPEJ");
    let store = aml::Store::new(&register, &aml::Arg(0));
    aml::Method::new(EJECT.into(), 1, true, vec![&store]).to_aml_bytes(sink);
}

/// COST(number, event, status): `_OST` of a processor.
fn outcome(sink: &mut Vec<u8>) {
    let register = aml::Path::new("\\_SB_.CPST");
    let (number, event, status) = (aml::Arg(0), aml::Arg(1), aml::Arg(2));
    let (value, part) = (aml::Local(0), aml::Local(1));
    aml::Method::new(
        OUTCOME.into(),
        3,
        true,
        vec![
            &aml::And::new(&part, &status, &0xffff_u16),
            &aml::ShiftLeft::new(&part, &part, &8_u8),
            &aml::Or::new(&value, &number, &part),
            &aml::And::new(&part, &event, &0xff_u8),
            &aml::ShiftLeft::new(&part, &part, &24_u8),
            &aml::Or::new(&value, &value, &part),
            &aml::Store::new(&register, &value),
        ],
    )
    .to_aml_bytes(sink);
}

/// CSCN(): notifies the devices of what is new. What was read is cleared before, so that what
/// comes meanwhile is not lost.
fn scan(sink: &mut Vec<u8>, count: u8) {
    let mut body = Vec::new();
    for (register, notification, bits) in [
        ("\\_SB_.CPIN", DEVICE_CHECK, aml::Local(0)),
        ("\\_SB_.CPLV", EJECT_REQUEST, aml::Local(1)),
    ] {
        let register = aml::Path::new(register);
        aml::Store::new(&bits, &register).to_aml_bytes(&mut body);
        aml::Store::new(&register, &bits).to_aml_bytes(&mut body);
        for id in 0..count {
            let device = aml::Path::new(&name(id));
            let notify = aml::Notify::new(&device, &notification);
            let concerned = Masked::new(&bits, 1 << id);
            aml::If::new(&concerned, vec![&notify]).to_aml_bytes(&mut body);
        }
    }
    aml::Method::new(SCAN.into(), 0, true, vec![&Raw(body)]).to_aml_bytes(sink);
}
