//! The registers of every device, with the event loop behind them on a thread of its own as in a
//! machine: accesses of any width, in any order, and the owner's pauses and changes in between.
#![no_main]

use std::thread;
use std::time::Instant;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::bus::BusDevice;
use vmm::devices::virtio::mmio::MmioTransport;
use vmm::devices::virtio::worker::{self, Parts};
use vmm::devices::virtio::{Control, DeviceHandle, Interrupt, VirtioDevice};
use vmm::events::EventStream;
use vmm::memory::GuestMemory;
use vmm_fuzz::devices::{self, Guest, Host};
use vmm_fuzz::event_loop::{Stop, eventfd};
use vmm_fuzz::{ignore_sigpipe, steps};

/// The most steps of one input.
const MAX_STEPS: usize = 96;

// The registers that lead a device to life (virtio 1.2, 4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SELECT: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const STATUS: u64 = 0x70;
const QUEUE_DESCRIPTORS: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;

/// The registers that there are, and the start of the configuration space.
const REGISTERS: [u64; 30] = [
    0x00, 0x04, 0x08, 0x0c, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70,
    0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0xac, 0xb0, 0xb4, 0xb8, 0xbc, 0xfc, 0x100, 0x104,
];

const FOUND: u32 = 3;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 64;

fuzz_target!(init: ignore_sigpipe(), |input: &[u8]| {
    // An input that ends in the middle of a step has done what it could.
    let _ = devices::attack(&mut Unstructured::new(input), Registers);
});

struct Registers;

impl Guest for Registers {
    fn attack(
        self,
        input: &mut Unstructured<'_>,
        memory: GuestMemory,
        device: impl VirtioDevice + 'static,
        mut host: Host,
    ) -> Result<()> {
        let interrupt = Interrupt::new(eventfd());
        let events = EventStream::new(Instant::now(), None);
        let name = "fuzzed".to_owned();
        let parts = worker::split(name, device, memory.clone(), interrupt, events).unwrap();
        let Parts {
            transport,
            worker,
            handle,
            ..
        } = parts;
        let mut transport = transport.lock().unwrap();
        let stop = Stop::default();
        thread::scope(|scope| {
            let serve = stop.clone();
            let event_loop = scope.spawn(move || serve.run(worker));
            let outcome = steps(input, MAX_STEPS, |input| {
                step(input, &memory, &mut transport, &handle, &mut host)
            });
            handle.resume().unwrap();
            write(&mut transport, STATUS, 0);
            assert_eq!(read(&mut transport, STATUS), 0);
            bring_up(&mut transport, 0x1000, 16);
            // Whatever was before, a driver that keeps to the rules gets its device. Only what
            // lies in the rings may break it.
            let status = read(&mut transport, STATUS) & !NEEDS_RESET;
            assert_eq!(status, FOUND | FEATURES_OK | DRIVER_OK);
            stop.stop();
            // The scope waits for what the thread does, and not for the thread.
            event_loop.join().unwrap();
            outcome
        })
    }
}

fn step(
    input: &mut Unstructured<'_>,
    memory: &GuestMemory,
    transport: &mut MmioTransport,
    handle: &DeviceHandle,
    host: &mut Host,
) -> Result<()> {
    match input.arbitrary::<u8>()? % 12 {
        0..=2 => {
            let register = *input.choose(&REGISTERS)?;
            write(transport, register, input.arbitrary::<u16>()?.into());
            read(transport, *input.choose(&REGISTERS)?);
        }
        3 | 4 => {
            // 4 KiB of registers, of which most are none.
            let range = if input.arbitrary()? { 0x140 } else { 0xff9 };
            let offset = u64::from(input.arbitrary::<u16>()? % range);
            let mut data: [u8; 8] = input.arbitrary()?;
            let width = 1 << (input.arbitrary::<u8>()? % 4);
            if input.arbitrary()? {
                transport.write(offset, &data[..width]);
            } else {
                transport.read(offset, &mut data[..width]);
            }
        }
        5 => bring_up(
            transport,
            u32::from(input.arbitrary::<u8>()?) << 12,
            input.arbitrary()?,
        ),
        6 => write(transport, STATUS, 0),
        7 => {
            let address = u64::from(input.arbitrary::<u32>()?) % (1 << 20);
            let length = usize::from(input.arbitrary::<u8>()?).min((1 << 20) - address as usize);
            let bytes = input.bytes(length)?;
            memory.write_slice(bytes, GuestAddress(address)).unwrap();
        }
        8 => handle.pause().unwrap_or_default(),
        9 => handle.resume().unwrap(),
        10 => {
            // Up to 2 MiB, or 32 for memory: what is written to a disk is the host's memory here.
            let size = u64::from(input.arbitrary::<u16>()? % 0x1000) << 9;
            let controls = [
                Control::ResizeDisk { size },
                Control::ResizeBalloon { size },
                Control::ResizeMemory { size: size << 4 },
            ];
            // Most devices know at most one of them.
            let _ = handle.control(*input.choose(&controls)?);
        }
        _ => host.act(input)?,
    }
    // What was notified has been served when this has: the event loop takes one after the other.
    handle.counters().unwrap();
    Ok(())
}

/// What a driver does at its start, with the rings of its first queue at `rings`.
fn bring_up(transport: &mut MmioTransport, rings: u32, size: u32) {
    for status in [1, FOUND] {
        write(transport, STATUS, status);
    }
    for half in [0, 1] {
        write(transport, DEVICE_FEATURES_SELECT, half);
        let offered = read(transport, DEVICE_FEATURES);
        write(transport, DRIVER_FEATURES_SELECT, half);
        write(transport, DRIVER_FEATURES, offered);
    }
    write(transport, STATUS, FOUND | FEATURES_OK);
    for (register, value) in [
        (QUEUE_SELECT, 0),
        (QUEUE_SIZE, size),
        (QUEUE_DESCRIPTORS, rings),
        (QUEUE_AVAILABLE, rings.wrapping_add(0x1000)),
        (QUEUE_USED, rings.wrapping_add(0x2000)),
        (QUEUE_READY, 1),
    ] {
        write(transport, register, value);
    }
    write(transport, STATUS, FOUND | FEATURES_OK | DRIVER_OK);
}

fn read(transport: &mut MmioTransport, register: u64) -> u32 {
    let mut data = [0; 4];
    transport.read(register, &mut data);
    u32::from_le_bytes(data)
}

fn write(transport: &mut MmioTransport, register: u64, value: u32) {
    transport.write(register, &value.to_le_bytes());
}
