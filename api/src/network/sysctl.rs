//! Settings of the kernel's network. They are those of the namespace of the thread that reads and
//! writes them.

use std::fs;
use std::io;

const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// Whether the host forwards packets.
pub fn is_forwarding() -> io::Result<bool> {
    Ok(fs::read_to_string(FORWARDING)?.trim() != "0")
}

/// Makes the host forward packets, or no longer.
pub fn set_forwarding(forwards: bool) -> io::Result<()> {
    fs::write(FORWARDING, if forwards { "1" } else { "0" })
}

/// Makes an interface have nothing to do with IPv6. A kernel without IPv6 is fine.
pub fn disable_ipv6(interface: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(path, "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Makes the host take packets from an interface only if it would answer through it, and answer
/// questions for no address but the interface's own (kernel's `ip-sysctl.rst`).
pub fn be_strict(interface: &str) -> io::Result<()> {
    let directory = format!("/proc/sys/net/ipv4/conf/{interface}");
    for (name, value) in [
        ("rp_filter", "1"),
        ("arp_ignore", "1"),
        ("accept_redirects", "0"),
        ("send_redirects", "0"),
    ] {
        fs::write(format!("{directory}/{name}"), value)?;
    }
    Ok(())
}
