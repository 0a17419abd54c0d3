//! The card on a real tap, in a network namespace of its own.
//!
//! A namespace belongs to a thread, and a user namespace (without which only root may make one) to
//! a process. So the test starts the test program once more, in new namespaces, for the part that
//! needs them.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_int, c_short, sockaddr_ll};

use super::super::tap::{attach, check, request};
use super::*;
use crate::devices::virtio::testing::wait_readable;

/// An EtherType for experiments (IEEE 802).
const ETHER_TYPE: u16 = 0x88b5;

/// Set in the copy of the test program that runs in new namespaces.
const INSIDE: &str = "NET_TEST_IN_NAMESPACE";

#[test]
fn a_real_tap_carries_frames_both_ways() {
    if std::env::var_os(INSIDE).is_some() {
        carry_frames();
        carry_frames_in_two_queues();
        return;
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "--nocapture"])
        .arg(format!("{module}::a_real_tap_carries_frames_both_ways"))
        .env(INSIDE, "1");
    let flags = if rustix::process::geteuid().is_root() {
        libc::CLONE_NEWNET
    } else {
        libc::CLONE_NEWNET | libc::CLONE_NEWUSER
    };
    // SAFETY: between fork and exec the closure makes one system call, which takes no pointer.
    unsafe { command.pre_exec(move || check(libc::unshare(flags))) };
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn carry_frames() {
    let maker = make_tap("tap0", false);
    // Attached by someone else.
    assert!(matches!(
        Tap::open("tap0", false),
        Err(TapError::Attach { .. })
    ));
    drop(maker);
    let host = bring_up("tap0");
    let mut net = Net::new(&NetConfig {
        tap: Some("tap0".to_owned()),
        ..NetConfig::default()
    })
    .unwrap();
    let offered = net.features();
    for feature in [
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_MTU,
    ] {
        assert_ne!(offered & 1 << feature, 0, "feature {feature}");
    }
    let mut mtu = [0; 2];
    net.read_config(10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 1500);

    let mut driver = Driver::new(true);
    driver.activate(&mut net, offered);
    for index in 0..64 {
        driver.add(
            RECEIVE_QUEUE,
            &[writable((3 << 20) + index * 0x1000, 0x1000)],
        );
    }
    net.process_queue(RECEIVE_QUEUE).unwrap();

    let frame = frame(0x77);
    let arrived = (0..30).any(|_| {
        // The kernel drops what is sent before it has noticed that the tap is attached.
        rustix::net::send(&host, &frame, rustix::net::SendFlags::empty()).unwrap();
        if !wait_readable(net.inlets[0].tap().as_raw_fd(), 300) {
            return false;
        }
        net.process_source(TOKEN_FIRST_TAP, EventSet::IN).unwrap();
        // The host's own stack may have greeted its neighbours as well.
        driver.used(RECEIVE_QUEUE).into_iter().any(|(head, len)| {
            let bytes = driver.read((3 << 20) + u64::from(head) * 0x1000, len as usize);
            bytes[10..12] == [1, 0] && bytes[12..] == frame
        })
    });
    assert!(arrived);

    driver.write(BUFFERS, &[0; 12]);
    driver.write(BUFFERS + 12, &frame);
    driver.add(
        TRANSMIT_QUEUE,
        &[readable(BUFFERS, 12 + frame.len() as u32)],
    );
    net.process_queue(TRANSMIT_QUEUE).unwrap();
    assert!(wait_readable(host.as_raw_fd(), 10_000));
    let mut bytes = [0; 2000];
    let (_, len) = rustix::net::recv(&host, &mut bytes[..], RecvFlags::DONTWAIT).unwrap();
    assert_eq!(bytes[..len], frame);

    // Offloads that make no sense are the driver's fault.
    net.reset();
    let activation = Activation {
        memory: driver.memory.clone(),
        features: 1 << VIRTIO_NET_F_GUEST_TSO4,
        queues: Vec::new(),
        interrupt: driver.interrupt.clone(),
    };
    assert!(matches!(
        net.activate(activation),
        Err(DeviceError::Host { .. })
    ));
}

/// A tap with two queues.
fn carry_frames_in_two_queues() {
    drop(make_tap("tap1", true));
    let host = bring_up("tap1");
    assert!(matches!(
        Tap::open("tap1", false),
        Err(TapError::Attach {
            multi_queue: false,
            ..
        })
    ));
    let config = NetConfig {
        tap: Some("tap1".to_owned()),
        num_queues: 4,
        ..NetConfig::default()
    };
    let mut net = Net::new(&config).unwrap();
    let mut driver = Driver::new(true);
    let offered = net.features();
    driver.activate(&mut net, offered);
    for pair in 0..2 {
        let frame = frame(b'0' + pair as u8);
        driver.write(BUFFERS, &[0; 12]);
        driver.write(BUFFERS + 12, &frame);
        let chain = [readable(BUFFERS, 12 + frame.len() as u32)];
        driver.add(2 * pair + 1, &chain);
        net.process_queue(2 * pair + 1).unwrap();
        let mut bytes = [0; 2000];
        // The host's own stack may greet its neighbours meanwhile, but not with this type.
        assert!(wait_readable(host.as_raw_fd(), 10_000));
        let (_, len) = rustix::net::recv(&host, &mut bytes[..], RecvFlags::DONTWAIT).unwrap();
        assert_eq!(bytes[..len], frame);
    }
    assert_eq!(net.counters()["tx_frames"], 2);

    // The same tap through a descriptor that somebody else has opened.
    drop(net);
    let open = Tap::open("tap1", true).unwrap();
    let config = NetConfig {
        fds: Some(vec![open.as_raw_fd()]),
        ..NetConfig::default()
    };
    for _ in 0..2 {
        Net::new(&config).unwrap();
    }
}

fn frame(fill: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 12];
    frame.extend(ETHER_TYPE.to_be_bytes());
    frame.extend([fill; 100]);
    frame
}

/// Makes a tap that stays when it is closed.
fn make_tap(name: &str, multi_queue: bool) -> OwnedFd {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    attach(file.as_raw_fd(), request(name).unwrap(), multi_queue).unwrap();
    // SAFETY: the descriptor is open, and TUNSETPERSIST takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 1_u64) }).unwrap();
    file.into()
}

/// Brings the interface up and returns a socket for raw frames on it.
fn bring_up(name: &str) -> OwnedFd {
    let protocol = ETHER_TYPE.to_be();
    // SAFETY: the call takes no pointer, and the result is checked before it is owned.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, c_int::from(protocol));
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let mut request = request(name).unwrap();
    request.ifr_ifru.ifru_flags = libc::IFF_UP as c_short;
    // SAFETY: the descriptor is open, and SIOCSIFFLAGS reads an ifreq.
    check(unsafe {
        libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        )
    })
    .unwrap();
    // SAFETY: all zeros are a valid sockaddr_ll.
    let mut address: sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    // SAFETY: the name ends in a zero.
    address.sll_ifindex = unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) } as c_int;
    // SAFETY: the descriptor is open, and the address is as long as is said.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<sockaddr_ll>() as u32,
        )
    })
    .unwrap();
    socket
}
