//! The guest's network card, set up by the requests of netdevice(7): what is to be set is one card,
//! one address and one route, and these requests replace what is there.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use agent_protocol::GuestNetwork;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Ethernet, of `linux/if_arp.h`.
const ARPHRD_ETHER: libc::sa_family_t = 1;

/// A network card, as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    name: String,
    /// The kernel counts them upwards, and gives no number to a second one.
    index: u64,
}

/// Gives the first network card its address and brings it up, and leads everything else to the
/// gateway. Returns the address that it has had before, if that is another. `known` is the card that
/// it was the last time: nothing comes before it as long as it is there, and to look through all of them
/// takes a restored guest through much code that it has to get from the disk first.
pub fn set_up(network: &GuestNetwork, known: &mut Option<Card>) -> io::Result<Option<Ipv4Addr>> {
    let control = Control::open()?;
    let card = match known.take() {
        Some(card)
            if control
                .index(&card.name)
                .is_ok_and(|index| index == card.index) =>
        {
            card
        }
        _ => first_card(Path::new("/sys/class/net"))?,
    };
    let name = &known.insert(card).name;
    let (mac, mtu) = (control.mac(name)?, control.mtu(name)?);
    let flags = control.flags(name)?;
    if mac != network.mac {
        // Not every card can change it while it is up.
        control.set_flags(name, flags & !libc::IFF_UP)?;
        control.set_mac(name, network.mac)?;
    }
    if mtu != i32::from(network.mtu) {
        control.set_mtu(name, network.mtu)?;
    }
    control.set_flags(name, flags | libc::IFF_UP)?;
    let mask = Ipv4Addr::from_bits(u32::MAX << (32 - u32::from(network.prefix.clamp(1, 31))));
    let before = control.address(name)?;
    control.set_address(name, libc::SIOCSIFADDR, network.address)?;
    control.set_address(name, libc::SIOCSIFNETMASK, mask)?;
    control.add_default_route(network.gateway)?;
    if !network.resolvers.is_empty() {
        write_resolvers(Path::new("/etc"), &network.resolvers)?;
    }
    Ok(before.filter(|before| *before != network.address))
}

/// The network card that comes first by its number, in a directory as `/sys/class/net`.
fn first_card(directory: &Path) -> io::Result<Card> {
    let mut cards = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        // What is made up in the kernel, such as a bridge, is no device.
        if !path.join("device").exists() || number(&path.join("type"))? != 1 {
            continue;
        }
        let index = number(&path.join("ifindex"))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        cards.push(Card { name, index });
    }
    let first = cards.into_iter().min_by_key(|card| card.index);
    first.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "there is no network card"))
}

fn number(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim()
        .parse()
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// A socket for requests.
struct Control(OwnedFd);

impl Control {
    fn open() -> io::Result<Self> {
        let socket = socket_with(
            AddressFamily::INET,
            SocketType::DGRAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok(Self(socket))
    }

    /// What is set of the card is asked for by `operation`.
    fn ask(&self, name: &str, operation: libc::c_ulong) -> io::Result<libc::ifreq> {
        let mut request = request(name);
        self.send(operation, &raw mut request)?;
        Ok(request)
    }

    fn index(&self, name: &str) -> io::Result<u64> {
        let answer = self.ask(name, libc::SIOCGIFINDEX)?;
        // SAFETY: the kernel has filled in a number, and any bytes are one.
        let index = unsafe { answer.ifr_ifru.ifru_ifindex };
        Ok(u64::from(index.unsigned_abs()))
    }

    fn mac(&self, name: &str) -> io::Result<[u8; 6]> {
        let answer = self.ask(name, libc::SIOCGIFHWADDR)?;
        // SAFETY: the kernel has filled in an address, and any bytes are one.
        let [a, b, c, d, e, f, ..] = unsafe { answer.ifr_ifru.ifru_hwaddr }.sa_data;
        Ok([a, b, c, d, e, f].map(|byte| byte.cast_unsigned()))
    }

    fn mtu(&self, name: &str) -> io::Result<i32> {
        let answer = self.ask(name, libc::SIOCGIFMTU)?;
        // SAFETY: the kernel has filled in a number, and any bytes are one.
        Ok(unsafe { answer.ifr_ifru.ifru_mtu })
    }

    fn flags(&self, name: &str) -> io::Result<i32> {
        let answer = self.ask(name, libc::SIOCGIFFLAGS)?;
        // SAFETY: the kernel has filled in flags, and any bytes are some.
        let flags = unsafe { answer.ifr_ifru.ifru_flags };
        // Those that can be set are in these 16 bits.
        Ok(i32::from(flags.cast_unsigned()))
    }

    fn set_flags(&self, name: &str, flags: i32) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        self.send(libc::SIOCSIFFLAGS, &raw mut request)
    }

    fn set_mac(&self, name: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = request(name);
        // SAFETY: sockaddr is plain numbers, for which zero is valid.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.send(libc::SIOCSIFHWADDR, &raw mut request)
    }

    fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_mtu = mtu.into();
        self.send(libc::SIOCSIFMTU, &raw mut request)
    }

    /// The card's address, if it has one.
    fn address(&self, name: &str) -> io::Result<Option<Ipv4Addr>> {
        let answer = match self.ask(name, libc::SIOCGIFADDR) {
            Ok(answer) => answer,
            Err(error) if error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        // SAFETY: the kernel has filled in an address, and any bytes are one.
        let data = unsafe { answer.ifr_ifru.ifru_addr }.sa_data;
        // After the port, as in sockaddr_in.
        let [_, _, a, b, c, d, ..] = data.map(|byte| byte.cast_unsigned());
        Ok(Some(Ipv4Addr::new(a, b, c, d)))
    }

    fn set_address(
        &self,
        name: &str,
        operation: libc::c_ulong,
        address: Ipv4Addr,
    ) -> io::Result<()> {
        let mut request = request(name);
        request.ifr_ifru.ifru_addr = socket_address(address);
        self.send(operation, &raw mut request)
    }

    /// Leads packets for other networks to this gateway, if they are not led there already.
    fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        // SAFETY: rtentry is plain numbers and a pointer to a name, for which zero is valid.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = socket_address(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        match self.send(libc::SIOCADDRT, &raw mut route) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            result => result,
        }
    }

    fn send<T>(&self, operation: libc::c_ulong, request: *mut T) -> io::Result<()> {
        // SAFETY: the descriptor is open, each operation used here takes a request of the type that
        // it is called with, and the request lives until the call returns.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), operation as libc::Ioctl, request) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// A request for the interface of this name.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: ifreq is plain numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request
}

fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    let internet = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from_ne_bytes(address.octets()),
        },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain numbers and of one size.
    unsafe { std::mem::transmute(internet) }
}

/// Writes `resolv.conf` in the directory `etc`, if it has other resolvers. Whoever reads it finds the
/// old one or the new one. A link is replaced: what it leads to is kept by a program that does not
/// run in a guest of ours.
fn write_resolvers(etc: &Path, resolvers: &[Ipv4Addr]) -> io::Result<()> {
    let path = etc.join("resolv.conf");
    let text: String = resolvers
        .iter()
        .map(|resolver| format!("nameserver {resolver}\n"))
        .collect();
    let is_file = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_file());
    if is_file && fs::read(&path)? == text.as_bytes() {
        return Ok(());
    }
    let temporary = etc.join(".resolv.conf.new");
    // Left by a guest that ended in the midst of this.
    let _ = fs::remove_file(&temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(&temporary)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_card_is_the_one_with_the_lowest_number() {
        let dir = tempfile::tempdir().unwrap();
        let add = |name: &str, kind: &str, index: &str, is_device: bool| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            if is_device {
                fs::create_dir(path.join("device")).unwrap();
            }
            fs::write(path.join("type"), kind).unwrap();
            fs::write(path.join("ifindex"), index).unwrap();
        };
        assert!(first_card(dir.path()).is_err());
        add("lo", "772\n", "1\n", false);
        add("br0", "1\n", "2\n", false);
        add("eth0", "1\n", "10\n", true);
        add("eth1", "1\n", "9\n", true);
        let first = Card {
            name: "eth1".to_owned(),
            index: 9,
        };
        assert_eq!(first_card(dir.path()).unwrap(), first);
    }

    #[test]
    fn a_card_tells_what_is_set_of_it() {
        let control = Control::open().unwrap();
        let read = |name: &str| {
            let text = fs::read_to_string(Path::new("/sys/class/net/lo").join(name)).unwrap();
            text.trim().to_owned()
        };
        assert_eq!(control.index("lo").unwrap().to_string(), read("ifindex"));
        assert_eq!(control.mtu("lo").unwrap().to_string(), read("mtu"));
        assert_eq!(control.mac("lo").unwrap(), [0; 6]);
        let flags = control.flags("lo").unwrap();
        let shown = i32::from_str_radix(read("flags").trim_start_matches("0x"), 16).unwrap();
        let (loopback, up) = (libc::IFF_LOOPBACK, libc::IFF_UP);
        assert_eq!(flags & (loopback | up), shown & (loopback | up));
        assert_ne!(flags & loopback, 0);
        let none = control.index("no-such-card").unwrap_err();
        assert_eq!(none.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn resolvers_are_written_and_links_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, path) = (dir.path(), dir.path().join("resolv.conf"));
        let target = dir.path().join("target");
        fs::write(&target, "x").unwrap();
        std::os::unix::fs::symlink(&target, &path).unwrap();
        fs::write(etc.join(".resolv.conf.new"), "left").unwrap();
        let gateway = Ipv4Addr::new(10, 0, 0, 1);
        for _ in 0..2 {
            write_resolvers(etc, &[gateway]).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), "nameserver 10.0.0.1\n");
        }
        assert_eq!(fs::read_to_string(&target).unwrap(), "x");
        assert_eq!(fs::read_dir(etc).unwrap().count(), 2);
    }
}
