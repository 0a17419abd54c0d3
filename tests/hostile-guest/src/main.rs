//! A guest that attacks the devices of its virtual machine.
//!
//! It is booted in place of a kernel by the 64-bit boot protocol and needs no operating system.
//! With `seed=N rounds=N` from the command line it makes attack after attack on every device
//! register and ring, random ones and crafted ones, and then powers off, or with `linger=1` stops
//! and leaves the machine to be looked at. The same seed makes the same attacks. The VMM must neither fail nor hang nor grow, whatever comes.
//!
//! It spares what ends a machine by right: the registers of power, reset and panic.

#![no_std]
#![no_main]

mod chance;
mod cpu;
mod driver;
mod memory;
mod payload;

use core::fmt::Write;

use chance::Chance;
use cpu::{Serial, inb, outb};
use driver::{DEVICES, WINDOW, window};

/// Called by the entry code with the address of the boot parameters.
#[unsafe(no_mangle)]
extern "C" fn guest_main(boot_params: *const u8) -> ! {
    cpu::map_four_gib();
    let cmdline = cpu::command_line(boot_params);
    let seed = parameter(cmdline, b"seed=").unwrap_or(1);
    let rounds = parameter(cmdline, b"rounds=").unwrap_or(1);
    let mut chance = Chance::new(seed);
    let _ = writeln!(Serial, "hostile-guest: seed {seed}, {rounds} rounds");
    let mut devices = 0;
    for slot in 0..DEVICES {
        if driver::kind(slot).is_some() {
            devices += 1;
        }
    }
    for round in 0..rounds {
        match chance.below(8) {
            0 => registers(&mut chance),
            1 => unclaimed(&mut chance),
            2 => ports(&mut chance),
            _ => driver::attack(&mut chance),
        }
        if round % 1000 == 999 {
            let _ = writeln!(Serial, "hostile-guest: {} rounds so far", round + 1);
        }
    }
    for slot in 0..DEVICES {
        driver::reset(slot);
    }
    let _ = writeln!(
        Serial,
        "hostile-guest: {rounds} rounds against {devices} devices are over"
    );
    if parameter(cmdline, b"linger=").is_some() {
        cpu::halt();
    }
    cpu::power_off()
}

/// The number after `name` on the command line.
fn parameter(cmdline: &[u8], name: &[u8]) -> Option<u64> {
    let word = cmdline
        .split(|byte| *byte == b' ')
        .find(|word| word.starts_with(name))?;
    word[name.len()..].iter().try_fold(0_u64, |number, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        number.checked_mul(10)?.checked_add(digit.into())
    })
}

/// Any access to any register of any slot, with or without a device.
fn registers(chance: &mut Chance) {
    for _ in 0..64 {
        let offset = chance.below(WINDOW);
        // Most registers are in the first 256 bytes, the configuration space right behind.
        let offset = if chance.one_in(4) {
            offset
        } else {
            offset % 0x180
        };
        let address = window(chance.below(DEVICES)) + offset;
        access(chance, address);
    }
}

/// Accesses to device addresses at which there is nothing.
fn unclaimed(chance: &mut Chance) {
    for _ in 0..8 {
        let address = 0xc000_0000 + chance.below(0x1000_0000);
        access(chance, address);
        let address = window(DEVICES) + chance.below(0x100_0000);
        access(chance, address);
    }
}

fn access(chance: &mut Chance, address: u64) {
    let value = chance.number();
    let write = chance.one_in(2);
    match chance.below(4) {
        0 => cpu::mmio::<u8>(address, value as u8, write),
        1 => cpu::mmio::<u16>(address, value as u16, write),
        2 => cpu::mmio::<u32>(address, value as u32, write),
        _ => cpu::mmio::<u64>(address, value, write),
    }
}

/// Any access to an I/O port but those that end the machine or go to KVM's own devices.
fn ports(chance: &mut Chance) {
    for _ in 0..32 {
        let port = match chance.below(4) {
            0 => 0x3f8 + chance.below(8) as u16,
            1 => 0x60 + chance.below(5) as u16,
            _ => chance.below(0x1_0000) as u16,
        };
        let ends_machine = matches!(port, 0x64 | 0x505 | 0x600..=0x602);
        let of_kvm = matches!(
            port,
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 | 0x40..=0x43 | 0x61
        );
        if of_kvm {
            continue;
        }
        if chance.one_in(2) || ends_machine {
            inb(port);
        } else {
            outb(port, chance.number() as u8);
        }
    }
    // What the attacks have done to the serial port, its next user undoes.
    Serial::reset();
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    let _ = writeln!(Serial, "hostile-guest: {info}");
    cpu::give_up()
}
