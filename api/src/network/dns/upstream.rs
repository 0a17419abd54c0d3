//! The resolvers that questions are passed to.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use hickory_proto::op::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::{PORT, framed};

/// The host's resolvers.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How many of them are asked, as by resolv.conf(5).
const MAX_RESOLVERS: usize = 3;
/// How long a resolver may take.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The largest message.
const MAX_MESSAGE: usize = 65_535;

/// The resolvers of a host.
#[derive(Debug)]
pub enum Upstreams {
    /// Those that `/etc/resolv.conf` names at the time.
    OfHost,
    /// These.
    Fixed(Vec<Upstream>),
}

/// A resolver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upstream(SocketAddr);

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl Upstreams {
    /// These resolvers.
    pub fn fixed(addresses: Vec<SocketAddr>) -> Self {
        Self::Fixed(addresses.into_iter().map(Upstream).collect())
    }

    /// The resolvers, in the order in which they are asked.
    pub fn list(&self) -> Vec<Upstream> {
        match self {
            Self::Fixed(list) => list.clone(),
            Self::OfHost => parse(&fs::read_to_string(RESOLV_CONF).unwrap_or_default()),
        }
    }
}

/// The resolvers that a resolv.conf(5) names; that of the host itself, if it names none.
fn parse(text: &str) -> Vec<Upstream> {
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        words.next()?.parse::<IpAddr>().ok()
    });
    let mut list: Vec<_> = addresses
        .take(MAX_RESOLVERS)
        .map(|address| Upstream(SocketAddr::new(address, PORT)))
        .collect();
    if list.is_empty() {
        list.push(Upstream((Ipv4Addr::LOCALHOST, PORT).into()));
    }
    list
}

impl Upstream {
    /// Sends a question, and waits for what `is_answer` to it.
    ///
    /// # Errors
    /// There is no answer in time.
    pub async fn ask_by_udp(
        &self,
        question: &[u8],
        is_answer: impl Fn(&[u8]) -> Option<Message>,
    ) -> io::Result<(Vec<u8>, Message)> {
        let any: IpAddr = match self.0 {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let exchange = async {
            let socket = UdpSocket::bind((any, 0)).await?;
            socket.connect(self.0).await?;
            socket.send(question).await?;
            let mut buffer = vec![0; MAX_MESSAGE];
            loop {
                let length = socket.recv(&mut buffer).await?;
                if let Some(message) = is_answer(&buffer[..length]) {
                    buffer.truncate(length);
                    return Ok((buffer, message));
                }
            }
        };
        let exchanged = tokio::time::timeout(TIMEOUT, exchange).await;
        exchanged.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// The same by TCP.
    ///
    /// # Errors
    /// There is no answer in time, or it is none to the question.
    pub async fn ask_by_tcp(
        &self,
        question: &[u8],
        is_answer: impl Fn(&[u8]) -> Option<Message>,
    ) -> io::Result<(Vec<u8>, Message)> {
        let exchange = async {
            let mut stream = TcpStream::connect(self.0).await?;
            stream.write_all(&framed(question)?).await?;
            let length = stream.read_u16().await?;
            let mut reply = vec![0; usize::from(length)];
            stream.read_exact(&mut reply).await?;
            match is_answer(&reply) {
                Some(message) => Ok((reply, message)),
                None => Err(io::ErrorKind::InvalidData.into()),
            }
        };
        let exchanged = tokio::time::timeout(TIMEOUT, exchange).await;
        exchanged.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_those_of_the_file() {
        let list = |text: &str| {
            let list = parse(text);
            list.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            list("# c\nsearch a b\nnameserver 192.0.2.1\n nameserver\t::1 # x\nnameserver x\n"),
            ["192.0.2.1:53", "[::1]:53"]
        );
        assert_eq!(list("options ndots:1"), ["127.0.0.1:53"]);
        assert_eq!(list(&"nameserver 192.0.2.1\n".repeat(9)).len(), 3);
    }
}
