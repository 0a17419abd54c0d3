//! Who the guest is, and what time it is: `POST /v1/resumed`.
//!
//! A guest that was restored has everything that its snapshot had, as have its clones. The kernel
//! is told by the VM generation id that it runs anew, and reseeds itself; what it cannot know comes
//! from the host by this operation.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use agent_protocol::{Resumed, ResumedRequest};
use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::boot_id::BootId;
use crate::host_clock::HostClock;
use crate::log::{info, warning};
use crate::{connections, network};

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of `linux/random.h`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
const NANOS: u64 = 1_000_000_000;

/// What the guest knows of itself from one request to the next.
#[derive(Debug, Default)]
pub struct Itself {
    boot_id: BootId,
    /// Open from the start: what is to be done first after a restore shall touch little.
    clock: Option<HostClock>,
    /// What it was connected by the last time.
    card: Option<network::Card>,
}

impl Itself {
    /// When the guest has booted.
    pub fn of_guest() -> Self {
        Self {
            boot_id: BootId::default(),
            clock: HostClock::open(),
            card: None,
        }
    }

    /// Sets the clock by KVM, if that tells what time it is, and returns how far it may be off then, in
    /// nanoseconds; otherwise to this time, and nobody in here knows how far that is off.
    fn set_clock(&self, realtime_ns: u64) -> io::Result<Option<u64>> {
        if let Some(clock) = &self.clock {
            match clock.set_realtime() {
                Ok(error_ns) => return Ok(Some(error_ns)),
                Err(error) => warning!("KVM does not tell the time: {error}"),
            }
        }
        clock_settime(ClockId::Realtime, timespec(realtime_ns)?)?;
        Ok(None)
    }
}

/// Does what the request asks for, as far as it can be done.
pub fn assume(request: &ResumedRequest, itself: &mut Itself) -> Resumed {
    let mut problems = Vec::new();
    let mut try_to = |what: &str, result: io::Result<bool>| match result {
        Ok(done) => done,
        Err(error) => {
            warning!("{what}: {error}");
            problems.push(format!("{what}: {error}"));
            false
        }
    };
    // Before anything can draw random bytes on behalf of the host.
    let seeded = try_to(
        "the random pool cannot be seeded",
        seed(&request.seed).map(|()| true),
    );
    let mut clock_error_ns = None;
    let clock = try_to(
        "the clock cannot be set",
        itself.set_clock(request.realtime_ns).map(|error_ns| {
            clock_error_ns = error_ns;
            true
        }),
    );
    let hostname = try_to(
        "the host name cannot be set",
        sethostname(request.hostname.as_bytes())
            .map(|()| true)
            .map_err(io::Error::from),
    );
    let machine_id = try_to(
        "/etc/machine-id cannot be written",
        write_machine_id(Path::new("/etc"), &request.machine_id),
    );
    // After the seed, so that it is drawn from that.
    let boot_id = try_to(
        "another boot id cannot be shown",
        itself.boot_id.belongs_to(&request.machine_id),
    );
    let mut before = None;
    let network = match &request.network {
        Some(network) => try_to(
            "the network card cannot be set up",
            network::set_up(network, &mut itself.card).map(|address| {
                before = address;
                true
            }),
        ),
        None => false,
    };
    if let Some(before) = before {
        try_to(
            "connections of the address from before cannot be ended",
            connections::end_those_of(before).map(|_| true),
        );
    }
    info!("this is {}", request.hostname);
    Resumed {
        realtime_ns: realtime_ns(),
        seeded,
        clock,
        clock_error_ns,
        hostname,
        machine_id,
        boot_id,
        network,
        problems,
    }
}

/// `CLOCK_REALTIME` in nanoseconds since the Unix epoch; 0 before it.
pub fn realtime_ns() -> u64 {
    nanos(clock_gettime(ClockId::Realtime))
}

/// A time in nanoseconds; 0 if it is before that.
pub fn nanos(time: Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(NANOS).saturating_add(nanos)
}

/// A time that is given in nanoseconds.
///
/// # Errors
/// The kernel knows none that is so late.
pub fn timespec(time_ns: u64) -> io::Result<Timespec> {
    let out_of_range = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok(Timespec {
        tv_sec: i64::try_from(time_ns / NANOS).map_err(out_of_range)?,
        tv_nsec: i64::try_from(time_ns % NANOS).map_err(out_of_range)?,
    })
}

/// Mixes the seed into the kernel's pool, and makes the generator start from it at once rather
/// than at its next turn, a minute later.
fn seed(seed: &[u8]) -> io::Result<()> {
    let device = File::open("/dev/urandom")?;
    let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let len = i32::try_from(seed.len()).map_err(too_long)?;
    // `struct rand_pool_info`: entropy in bits, length of the buffer in bytes, the buffer as words.
    let mut info = vec![len.saturating_mul(8), len];
    for chunk in seed.chunks(4) {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        info.push(i32::from_ne_bytes(word));
    }
    // SAFETY: RNDADDENTROPY reads a rand_pool_info whose buffer is as long as it says.
    let added = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) };
    if added != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    match unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces what is in `machine-id` in the directory `etc`, if it is there and differs. Returns whether
/// it has the id now.
///
/// A file that holds an id already is written over: to make another in its place takes the disk, which
/// a guest that was just restored would wait for. What is not an id yet, such as nothing, is replaced, so
/// that whoever reads it finds that or the whole id.
fn write_machine_id(etc: &Path, id: &str) -> io::Result<bool> {
    let path = etc.join("machine-id");
    let line = format!("{id}\n");
    let mode = match fs::symlink_metadata(&path) {
        Ok(metadata) if metadata.is_file() => metadata.permissions().mode() & 0o7777,
        Ok(_) => {
            let text = "it is not a regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let before = fs::read(&path)?;
    if before == line.as_bytes() {
        return Ok(true);
    }
    if before.len() == line.len()
        && let Ok(file) = OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
    {
        file.write_all_at(line.as_bytes(), 0)?;
        return Ok(true);
    }
    let temporary = etc.join(".machine-id.new");
    // Left by a guest that ended in the midst of this.
    let _ = fs::remove_file(&temporary);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(line.as_bytes())?;
            file.set_permissions(fs::Permissions::from_mode(mode))
        })
        .and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_machine_id_is_replaced_where_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, path) = (dir.path(), dir.path().join("machine-id"));
        let (one, two) = ("1".repeat(32), "2".repeat(32));
        assert!(!write_machine_id(etc, &one).unwrap());
        assert!(!path.exists());

        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        fs::write(etc.join(".machine-id.new"), "left").unwrap();
        for id in [&one, &one, &two] {
            assert!(write_machine_id(etc, id).unwrap());
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{id}\n"));
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o444);
        }
        assert_eq!(fs::read_dir(etc).unwrap().count(), 1);
    }

    #[test]
    fn a_machine_id_is_written_over_another_and_replaces_all_else() {
        let dir = tempfile::tempdir().unwrap();
        let (etc, path) = (dir.path(), dir.path().join("machine-id"));
        let (one, two) = ("1".repeat(32), "2".repeat(32));
        for (before, is_written_over) in [
            (format!("{one}\n"), true),
            ("uninitialized\n".to_owned(), false),
            (format!("{one}{one}\n"), false),
        ] {
            fs::write(&path, before).unwrap();
            // Whoever has it open keeps its number from being given to the next one.
            let opened = File::open(&path).unwrap();
            assert!(write_machine_id(etc, &two).unwrap());
            assert_eq!(fs::read_to_string(&path).unwrap(), format!("{two}\n"));
            let number = |metadata: fs::Metadata| metadata.ino();
            let (old, new) = (opened.metadata().unwrap(), fs::metadata(&path).unwrap());
            assert_eq!(number(old) == number(new), is_written_over);
            assert_eq!(fs::read_dir(etc).unwrap().count(), 1);
        }
    }

    #[test]
    fn what_stands_in_for_a_machine_id_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        fs::write(&target, "x").unwrap();
        std::os::unix::fs::symlink(&target, dir.path().join("machine-id")).unwrap();
        assert!(write_machine_id(dir.path(), &"1".repeat(32)).is_err());
        assert_eq!(fs::read_to_string(target).unwrap(), "x");
    }
}
