//! What the guest sends through its socket device, to and from programs that connect, read, write
//! and go away.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use vmm::devices::virtio::VirtioDevice;
use vmm::devices::virtio::vsock::testing::{CID, Guest, HEADER_SIZE, Header, TYPE_STREAM};
use vmm_fuzz::programs::{PORTS, Programs};
use vmm_fuzz::{ignore_sigpipe, steps};

/// The most steps of one input.
const MAX_STEPS: usize = 64;

fuzz_target!(init: ignore_sigpipe(), |input: &[u8]| {
    // An input that ends in the middle of a step has done what it could.
    let _ = run(&mut Unstructured::new(input));
});

fn run(input: &mut Unstructured<'_>) -> Result<()> {
    // Nothing waits for as long as a test of patience would take.
    let mut guest = Guest::powered_on(input.arbitrary()?, Duration::from_secs(3600));
    guest.activate();
    let mut programs = Programs::new(guest.socket_path(""));
    // The ports of the last packet to the guest: its own, and that of the host.
    let mut last = (0, 0);
    let outcome = steps(input, MAX_STEPS, |input| {
        match input.arbitrary::<u8>()? % 9 {
            0..=2 => {
                let header = likely_header(input, last)?;
                send(&mut guest, &header);
            }
            // As much as a program that does not read can be sent, and more.
            8 => {
                let header = likely_header(input, last)?;
                for _ in 0..input.arbitrary::<u8>()? % 32 {
                    send(&mut guest, &header);
                }
            }
            3 => {
                let bytes: [u8; HEADER_SIZE] = input.arbitrary()?;
                send(&mut guest, &Header::decode(&bytes));
            }
            4 | 5 => programs.act(input)?,
            6 => {
                guest.refill = input.arbitrary()?;
                if guest.refill {
                    guest.offer_buffers(input.arbitrary::<u8>()?.into());
                }
            }
            _ => {
                if input.ratio(1, 8)? {
                    guest.device.reset();
                    guest.activate();
                }
            }
        }
        guest.idle();
        for (header, _) in guest.inbox.drain(..) {
            last = (header.dst_port, header.src_port);
        }
        guest.check_bounds();
        Ok(())
    });
    guest.device.reset();
    outcome
}

/// As much data as the header claims, as far as the driver has room for it.
fn send(guest: &mut Guest, header: &Header) {
    guest.send(header, &vec![0x5a; (header.len as usize).min(1 << 16)]);
}

/// A header that belongs to a stream that there may be, and differs from a proper one in little.
fn likely_header(input: &mut Unstructured<'_>, last: (u32, u32)) -> Result<Header> {
    let (port, peer) = match input.arbitrary::<u8>()? % 4 {
        0 | 1 => (
            u32::from(input.arbitrary::<u8>()? % 8),
            *input.choose(&PORTS)?,
        ),
        2 => last,
        _ => (input.arbitrary()?, input.arbitrary()?),
    };
    Ok(Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: port,
        dst_port: peer,
        len: input.arbitrary::<u16>()?.into(),
        kind: TYPE_STREAM,
        op: (input.arbitrary::<u8>()? % 9).into(),
        flags: (input.arbitrary::<u8>()? % 4).into(),
        buf_alloc: match input.arbitrary()? {
            true => 0x4_0000,
            false => input.arbitrary()?,
        },
        fwd_cnt: input.arbitrary()?,
    })
}
