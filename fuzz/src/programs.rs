//! Programs of the host that talk to the guest through its socket device.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use libfuzzer_sys::arbitrary::{Result, Unstructured};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// The ports at which programs serve the guest.
pub const PORTS: [u32; 2] = [5, 6];

/// The most streams at a time.
const MAX_STREAMS: usize = 32;

/// The programs. None of them ever waits.
pub struct Programs {
    /// The socket of the device.
    socket: PathBuf,
    services: [UnixListener; PORTS.len()],
    streams: Vec<UnixStream>,
}

impl Programs {
    /// Programs that serve the guest whose device has its socket at this path.
    ///
    /// # Panics
    /// The host has no descriptors left.
    pub fn new(socket: PathBuf) -> Self {
        let services = PORTS.map(|port| {
            let service = UnixListener::bind(format!("{}_{port}", socket.display())).unwrap();
            service.set_nonblocking(true).unwrap();
            service
        });
        Self {
            socket,
            services,
            streams: Vec::new(),
        }
    }

    /// Does one thing with one of the streams.
    ///
    /// # Errors
    /// The input ends in the middle of it.
    pub fn act(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let action = input.arbitrary::<u8>()? % 8;
        let number: u8 = input.arbitrary()?;
        let index = usize::from(number) % self.streams.len().max(1);
        match (action, self.streams.get_mut(index)) {
            (0, _) => self.connect(format!("CONNECT {}\n", number % 8).as_bytes()),
            (1, _) => {
                let greeting = input.bytes(usize::from(number) % 24)?;
                self.connect(greeting);
            }
            (2, _) => self.accept(),
            // Whatever a full or closed socket says to these.
            (3 | 4, Some(stream)) => {
                let length = usize::from(input.arbitrary::<u16>()?);
                let _ = stream.write(&vec![0x33; length]);
            }
            (5, Some(stream)) => {
                let length = usize::from(input.arbitrary::<u16>()?);
                let _ = stream.read(&mut vec![0; length]);
            }
            (6, Some(stream)) => {
                let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both];
                let _ = stream.shutdown(*input.choose(&how)?);
            }
            (7, Some(_)) => {
                self.streams.swap_remove(index);
            }
            _ => {}
        }
        Ok(())
    }

    fn connect(&mut self, greeting: &[u8]) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        let address = SocketAddrUnix::new(&self.socket).unwrap();
        // The device's backlog may be full.
        if self.streams.len() < MAX_STREAMS && connect(&stream, &address).is_ok() {
            let mut stream = UnixStream::from(stream);
            let _ = stream.write(greeting);
            self.streams.push(stream);
        }
    }

    fn accept(&mut self) {
        for service in &self.services {
            while self.streams.len() < MAX_STREAMS
                && let Ok((stream, _)) = service.accept()
            {
                stream.set_nonblocking(true).unwrap();
                self.streams.push(stream);
            }
        }
    }
}
