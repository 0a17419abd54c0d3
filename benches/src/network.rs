//! A guest's network card: TCP each way between a program in the guest and one on the host, and the
//! way of a small packet there and back.
//!
//! The card is on a tap of its own, which this makes and removes. Both ends have addresses of
//! TEST-NET-1 (RFC 5737), which nobody else has.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use crate::{
    agent,
    channel::Channel,
    running::{BUSYBOX, percentile},
};

const HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);
/// The length of their network's prefix, and its mask.
const PREFIX: (u8, Ipv4Addr) = (30, Ipv4Addr::new(255, 255, 255, 252));
/// Where the guest serves a file.
const HTTP: u16 = 80;
/// How many bytes the host reads or writes at a time.
const PIECE: usize = 64 * 1024;
const MIB: f64 = (1 << 20) as f64;

/// A tap of the host, which is removed when dropped.
#[derive(Debug)]
pub struct Tap(String);

/// What was seen of a card.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Seen {
    /// From a program of the host to one of the guest, in MiB/s.
    #[serde(rename = "net_to_guest")]
    pub to_guest: f64,
    /// From a program of the guest to one of the host, in MiB/s.
    #[serde(rename = "net_from_guest")]
    pub from_guest: f64,
    /// From the guest to the host and back, in µs: the median.
    #[serde(rename = "net_round_trip_us")]
    pub round_trip_us: f64,
}

impl Tap {
    /// Makes one with the host's address.
    ///
    /// # Errors
    /// This needs the program `ip` and the right to administer the network.
    pub fn new() -> io::Result<Self> {
        let name = format!("mvsb{}", std::process::id());
        ip(&["tuntap", "add", "dev", &name, "mode", "tap"])?;
        let tap = Self(name);
        let address = format!("{HOST}/{}", PREFIX.0);
        ip(&["address", "add", &address, "dev", &tap.0])?;
        ip(&["link", "set", &tap.0, "up"])?;
        Ok(tap)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = ip(&["link", "delete", &self.0]);
    }
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(io::Error::other(format!(
        "ip {}: {said}",
        arguments.join(" ")
    )))
}

/// Uses the card of a guest that has busybox: `mib` MiB each way, and `packets` there and back. Each
/// may take `limit`.
///
/// # Errors
/// The card does not work, or not in time.
pub fn measure(channel: &Channel, mib: u64, packets: u64, limit: Duration) -> io::Result<Seen> {
    let run = |script: &str| agent::run(channel, &[BUSYBOX, "sh", "-c", script], 0, limit);
    run(&format!(
        "{BUSYBOX} ifconfig eth0 {GUEST} netmask {} up",
        PREFIX.1
    ))?;
    let bytes = mib << 20;

    let listener = TcpListener::bind((HOST, 0))?;
    let port = listener.local_addr()?.port();
    let (took, ran) = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut stream = accept(&listener, limit)?;
            let begun = Instant::now();
            send(&mut stream, bytes)?;
            // It closes when it has read everything.
            stream.read_to_end(&mut Vec::new())?;
            Ok(begun.elapsed())
        });
        let ran = run(&format!(
            "{BUSYBOX} nc {HOST} {port} </dev/null | {BUSYBOX} wc -c"
        ));
        (joined(sending), ran)
    });
    let (took, ran) = (took?, ran?);
    expect_count(String::from_utf8_lossy(&ran.said).trim(), bytes)?;
    let to_guest = bytes as f64 / MIB / took.as_secs_f64();

    // With large writes, unlike those of busybox's nc.
    run(&format!(
        "{BUSYBOX} mkdir /served && {BUSYBOX} head -c {bytes} /dev/zero >/served/zeros && \
         {BUSYBOX} httpd -p {HTTP} -h /served"
    ))?;
    let mut stream = TcpStream::connect_timeout(&(GUEST, HTTP).into(), limit)?;
    stream.set_read_timeout(Some(limit))?;
    let begun = Instant::now();
    stream.write_all(b"GET /zeros HTTP/1.0\r\n\r\n")?;
    let count = receive(&mut stream)?;
    let took = begun.elapsed();
    expect_count(&count.to_string(), bytes)?;
    let from_guest = bytes as f64 / MIB / took.as_secs_f64();

    let ran = run(&format!("{BUSYBOX} ping -A -c {packets} {HOST}"))?;
    let times = round_trips_us(&String::from_utf8_lossy(&ran.said));
    let round_trip_us =
        percentile(&times, 0.5).ok_or_else(|| invalid("no packet has come back".to_owned()))?;
    Ok(Seen {
        to_guest,
        from_guest,
        round_trip_us,
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, io::Result<T>>) -> io::Result<T> {
    let failed = |_| Err(io::Error::other("the thread of the host's end failed"));
    thread.join().unwrap_or_else(failed)
}

fn accept(listener: &TcpListener, limit: Duration) -> io::Result<TcpStream> {
    let timeout = Timespec {
        tv_sec: limit.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    let mut polled = [PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN)];
    if poll(&mut polled, Some(&timeout))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

fn send(stream: &mut TcpStream, mut bytes: u64) -> io::Result<()> {
    let piece = [0; PIECE];
    while bytes > 0 {
        let length = bytes.min(PIECE as u64);
        stream.write_all(&piece[..length as usize])?;
        bytes -= length;
    }
    stream.shutdown(std::net::Shutdown::Write)
}

/// The length of what follows the header of an answer.
fn receive(stream: &mut TcpStream) -> io::Result<u64> {
    let mut header = Vec::new();
    while !header.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        header.push(byte[0]);
        if header.len() > PIECE {
            return Err(invalid("the header of the answer has no end".to_owned()));
        }
    }
    let mut piece = [0; PIECE];
    let mut count = 0;
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(count),
            length => count += length as u64,
        }
    }
}

fn expect_count(count: &str, bytes: u64) -> io::Result<()> {
    if count == bytes.to_string() {
        return Ok(());
    }
    Err(invalid(format!("{count} of {bytes} bytes have arrived")))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The times in what `ping` prints, in µs.
fn round_trips_us(said: &str) -> Vec<f64> {
    let after = said.lines().filter_map(|line| line.split_once("time="));
    after
        .filter_map(|(_, rest)| rest.split_whitespace().next()?.parse::<f64>().ok())
        .map(|millis| millis * 1000.0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_taken_from_the_lines_of_ping() {
        let said = "PING 192.0.2.1 (192.0.2.1): 56 data bytes\n\
            64 bytes from 192.0.2.1: seq=0 ttl=64 time=1.250 ms\n\
            64 bytes from 192.0.2.1: seq=1 ttl=64 time=0.5 ms\n\n\
            2 packets transmitted, 2 packets received, 0% packet loss\n\
            round-trip min/avg/max = 0.5/0.8/1.250 ms\n";
        assert_eq!(round_trips_us(said), [1250.0, 500.0]);
        assert_eq!(round_trips_us("100% packet loss"), Vec::<f64>::new());
    }

    #[test]
    fn what_is_sent_is_what_arrives() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let bytes = 3 * PIECE as u64 + 17;
        let sending = thread::spawn(move || -> io::Result<()> {
            sender.write_all(b"HTTP/1.0 200 OK\r\n\r\n")?;
            send(&mut sender, bytes)
        });
        let mut stream = accept(&listener, Duration::from_secs(60)).unwrap();
        assert_eq!(receive(&mut stream).unwrap(), bytes);
        sending.join().unwrap().unwrap();
        assert!(expect_count("12", 13).is_err());
    }
}
