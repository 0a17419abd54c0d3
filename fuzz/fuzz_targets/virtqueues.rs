//! The queues of every device: chains of any shape in rings of any content, notifications, and what
//! the host does meanwhile.
#![no_main]

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use virtio_queue::desc::split::Descriptor;
use vmm::devices::virtio::testing::{BUFFERS, Driver, Piece, is_ready, readable, writable};
use vmm::devices::virtio::{Control, DeviceError, VirtioDevice};
use vmm::memory::GuestMemory;
use vmm_fuzz::devices::{self, Guest, Host};
use vmm_fuzz::{ignore_sigpipe, steps};
use vmm_sys_util::epoll::EventSet;

/// The most steps of one input, and pieces of one chain.
const MAX_STEPS: usize = 64;
const MAX_PIECES: u8 = 24;

/// Where the driver puts indirect tables and messages; buffers lie behind.
const TABLES: u64 = BUFFERS;
const MESSAGES: u64 = BUFFERS + 0x1000;

fuzz_target!(init: ignore_sigpipe(), |input: &[u8]| {
    // An input that ends in the middle of a step has done what it could.
    let _ = devices::attack(&mut Unstructured::new(input), Rings);
});

struct Rings;

impl Guest for Rings {
    fn attack(
        self,
        input: &mut Unstructured<'_>,
        memory: GuestMemory,
        mut device: impl VirtioDevice + 'static,
        mut host: Host,
    ) -> Result<()> {
        let mut driver = Driver::new(input.arbitrary()?);
        driver.memory = memory;
        let features = device.features() & !input.arbitrary::<u64>()?;
        driver.activate(&mut device, features);
        let outcome = steps(input, MAX_STEPS, |input| {
            step(input, &mut driver, &mut device, features, &mut host)
        });
        device.reset();
        outcome
    }
}

fn step(
    input: &mut Unstructured<'_>,
    driver: &mut Driver,
    device: &mut dyn VirtioDevice,
    features: u64,
    host: &mut Host,
) -> Result<()> {
    let action = input.arbitrary::<u8>()? % 16;
    let queues = device.queue_max_sizes().len();
    let queue = usize::from(input.arbitrary::<u8>()?) % queues;
    let size = device.queue_max_sizes()[queue];
    let mut outcome = Ok(());
    match action {
        0..=2 => {
            let count = input.arbitrary::<u8>()? % MAX_PIECES;
            let pieces = pieces(input, count)?;
            if action == 2 {
                driver.add_indirect(queue, TABLES, &pieces);
            } else {
                driver.add(queue, &pieces);
            }
        }
        3..=5 => {
            let length = usize::from(input.arbitrary::<u8>()? % 64);
            driver.write(MESSAGES, input.bytes(length)?);
            let answer = u32::from(input.arbitrary::<u16>()?);
            // In order: what the driver wrote, and two places for the device.
            let chain = [
                readable(MESSAGES, length as u32),
                writable(MESSAGES + 0x1000, answer),
                writable(MESSAGES + 0x800, 1),
            ];
            driver.add(queue, &chain);
            outcome = serve(device, queue);
        }
        6 => {
            let (index, next) = (input.arbitrary::<u16>()? % size, input.arbitrary()?);
            let Piece { addr, len, .. } = piece(input)?;
            let descriptor = Descriptor::new(addr, len, input.arbitrary()?, next);
            driver.write_descriptor(queue, index, descriptor);
        }
        7 => driver.offer(queue, input.arbitrary()?),
        8 => driver.set_avail_index(queue, input.arbitrary()?),
        9 => driver.set_used_event(queue, input.arbitrary()?),
        10 => {
            let address = u64::from(input.arbitrary::<u32>()?) % (1 << 20);
            let length = usize::from(input.arbitrary::<u8>()?).min((1 << 20) - address as usize);
            driver.write(address, input.bytes(length)?);
        }
        11 => host.act(input)?,
        12 => {
            let offset = u64::from(input.arbitrary::<u8>()?);
            let mut data = input.arbitrary::<[u8; 8]>()?;
            let width = 1 << (input.arbitrary::<u8>()? % 4);
            device.write_config(offset, &data[..width]);
            device.read_config(offset, &mut data[..width]);
        }
        13 => {
            // Up to 2 MiB, or 32 for memory: what is written to a disk is the host's memory here.
            let size = u64::from(input.arbitrary::<u16>()? % 0x1000) << 9;
            let controls = [
                Control::ResizeDisk { size },
                Control::ResizeBalloon { size },
                Control::ResizeMemory { size: size << 4 },
            ];
            // Most devices know at most one of them.
            let _ = device.control(*input.choose(&controls)?);
            device.counters();
        }
        14 => {
            outcome = device.pause();
            if outcome.is_ok() {
                outcome = (0..queues).try_for_each(|index| device.process_queue(index));
            }
        }
        _ => outcome = serve(device, queue),
    }
    if outcome.is_err() {
        // As the event loop and a driver do that goes on.
        device.reset();
        driver.activate(device, features);
    }
    Ok(())
}

/// A notification of a queue, and the turn of the event loop that follows it.
fn serve(device: &mut dyn VirtioDevice, queue: usize) -> std::result::Result<(), DeviceError> {
    device.process_queue(queue)?;
    let sources = device.sources();
    for source in sources.iter().filter(|source| is_ready(source)) {
        device.process_source(source.token, EventSet::IN)?;
    }
    Ok(())
}

fn pieces(input: &mut Unstructured<'_>, count: u8) -> Result<Vec<Piece>> {
    (0..count).map(|_| piece(input)).collect()
}

/// Mostly memory that there is, and that has nothing in it but buffers.
fn piece(input: &mut Unstructured<'_>) -> Result<Piece> {
    let kind: u8 = input.arbitrary()?;
    let addr = match kind & 3 {
        0 | 1 => BUFFERS + u64::from(input.arbitrary::<u16>()?),
        2 => u64::from(input.arbitrary::<u32>()?),
        _ => input.arbitrary()?,
    };
    let len = match kind >> 2 & 3 {
        0 | 1 => input.arbitrary::<u8>()?.into(),
        2 => input.arbitrary::<u16>()?.into(),
        _ => input.arbitrary()?,
    };
    Ok(Piece {
        addr,
        len,
        writable: kind & 16 != 0,
    })
}
