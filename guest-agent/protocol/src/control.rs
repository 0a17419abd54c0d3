//! Health, readiness, identity and shutdown.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// The answer to `GET /v1/health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Version of the agent.
    pub version: String,
    /// Release of the guest's kernel, as in `uname -r`.
    pub kernel: String,
    /// Microseconds since the guest booted (`CLOCK_BOOTTIME`).
    pub uptime_us: u64,
    /// Whether the agent is the guest's init process, and so can shut it down.
    pub init: bool,
    /// How many execs run now.
    pub execs: usize,
}

/// What the agent writes to [`READY_PORT`](crate::READY_PORT) once it serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// Version of the agent.
    pub version: String,
    /// Release of the guest's kernel, as in `uname -r`.
    pub kernel: String,
    /// When the agent's first instruction ran, in microseconds since boot (`CLOCK_BOOTTIME`).
    pub entered_us: u64,
    /// When the agent began to accept connections, in microseconds since boot.
    pub serving_us: u64,
}

/// The body of `POST /v1/resumed`: who this guest is from now on, and what time it is.
///
/// A guest that was restored from a snapshot has the clock, the names and the random pool of the
/// machine that the snapshot was taken of, as do all others that were restored from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumedRequest {
    /// Nanoseconds since the Unix epoch, for `CLOCK_REALTIME`.
    pub realtime_ns: u64,
    /// The host name, 1 to [`MAX_HOSTNAME`] bytes.
    pub hostname: String,
    /// For `/etc/machine-id`: 32 hexadecimal digits in lower case, not all of them 0
    /// (machine-id(5)).
    pub machine_id: String,
    /// Random bytes for the kernel's pool, 16 to [`MAX_SEED`], each credited with 8 bits.
    pub seed: Vec<u8>,
    /// How it is connected; `None` leaves its network as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<GuestNetwork>,
}

/// How a guest is connected by its first network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestNetwork {
    /// The card's address.
    pub mac: [u8; 6],
    /// The guest's address.
    pub address: Ipv4Addr,
    /// How many bits of it are the network's, 1 to 30.
    pub prefix: u8,
    /// Where packets for other networks go.
    pub gateway: Ipv4Addr,
    /// For `/etc/resolv.conf`, which is left alone if there are none; at most 3.
    pub resolvers: Vec<Ipv4Addr>,
    /// The largest packet in bytes, at least 576 (RFC 791).
    pub mtu: u16,
}

/// The longest host name in bytes: `HOST_NAME_MAX` of Linux.
pub const MAX_HOSTNAME: usize = 64;
/// The longest seed in bytes. The kernel's pool holds 32.
pub const MAX_SEED: usize = 256;

/// The answer to `POST /v1/resumed`: what was done. What was not is told by `problems`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The guest's `CLOCK_REALTIME` as the answer was made, in nanoseconds since the Unix epoch.
    pub realtime_ns: u64,
    /// The kernel's random pool has the seed, and its generator starts from it.
    pub seeded: bool,
    /// `CLOCK_REALTIME` is set.
    pub clock: bool,
    /// How far that may be off at most, in nanoseconds, if it was set by what KVM tells; otherwise it was set
    /// to what the request says, and is late by the time that the request took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_error_ns: Option<u64>,
    /// The host name is set.
    pub hostname: bool,
    /// `/etc/machine-id` has the id. `false` without a problem: the guest has no such file.
    pub machine_id: bool,
    /// The network card is set up. `false` without a problem: nothing was to be done.
    #[serde(default)]
    pub network: bool,
    /// `/proc/sys/kernel/random/boot_id` shows an id that no other machine has: the kernel's own, or
    /// a new one since the guest was first told another `machine_id`. `false` without a problem: the
    /// guest has no such file. Agents of before this was known do not say.
    #[serde(default)]
    pub boot_id: bool,
    /// A sentence for each thing that was tried in vain.
    pub problems: Vec<String>,
}

impl ResumedRequest {
    /// What is wrong with the request, as a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), &'static str> {
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if !(1..=MAX_HOSTNAME).contains(&self.hostname.len()) || !self.hostname.bytes().all(is_name)
        {
            Err("hostname must be 1 to 64 letters, digits, `.`, `_` or `-`")
        } else if self.machine_id.len() != 32
            || !self.machine_id.bytes().all(is_digit)
            || self.machine_id.bytes().all(|byte| byte == b'0')
        {
            Err("machine_id must be 32 hexadecimal digits in lower case, not all 0")
        } else if !(16..=MAX_SEED).contains(&self.seed.len()) {
            Err("seed must be 16 to 256 bytes")
        } else if let Some(network) = &self.network {
            network.check()
        } else {
            Ok(())
        }
    }
}

impl GuestNetwork {
    fn check(&self) -> Result<(), &'static str> {
        // The second bit of the first byte is that of groups, which are no card's.
        if self.mac == [0; 6] || self.mac[0] & 1 != 0 {
            Err("network.mac must be the address of one card")
        } else if !(1..=30).contains(&self.prefix) {
            Err("network.prefix must be 1 to 30")
        } else if self.resolvers.len() > 3 {
            Err("network.resolvers must be at most 3")
        } else if self.mtu < 576 {
            Err("network.mtu must be at least 576")
        } else {
            Ok(())
        }
    }
}

/// The body of `POST /v1/freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FreezeRequest {
    /// After how long the root file system is thawed in any case, in milliseconds: 1 to
    /// [`MAX_FREEZE_MS`].
    pub timeout_ms: u64,
}

/// The longest that the root file system is frozen, in milliseconds.
pub const MAX_FREEZE_MS: u64 = 60_000;

impl FreezeRequest {
    /// What is wrong with the request, as a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self) -> Result<(), &'static str> {
        match self.timeout_ms {
            1..=MAX_FREEZE_MS => Ok(()),
            _ => Err("timeout_ms must be 1 to 60000"),
        }
    }
}

/// The body of `POST /v1/shutdown`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// What follows once everything is stopped and written to the disks.
    pub action: ShutdownAction,
    /// How long processes have between SIGTERM and SIGKILL, in milliseconds. The agent goes on
    /// as soon as the last one has ended.
    #[serde(default = "default_grace_ms")]
    pub grace_ms: u64,
}

/// How a shutdown ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShutdownAction {
    /// The machine turns off.
    Poweroff,
    /// The machine resets.
    Reboot,
}

fn default_grace_ms() -> u64 {
    2_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_checked() {
        let good = ResumedRequest {
            realtime_ns: 1,
            hostname: "sb-0a1b2c3d".into(),
            machine_id: "0123456789abcdef0123456789abcdef".into(),
            seed: vec![0; 32],
            network: Some(GuestNetwork {
                mac: [0x52, 0x54, 0, 1, 2, 3],
                address: [10, 0, 0, 2].into(),
                prefix: 24,
                gateway: [10, 0, 0, 1].into(),
                resolvers: Vec::new(),
                mtu: 1500,
            }),
        };
        assert_eq!(good.check(), Ok(()));
        type Spoil = fn(&mut ResumedRequest);
        fn network(request: &mut ResumedRequest) -> &mut GuestNetwork {
            request.network.as_mut().unwrap()
        }
        let cases: [(&str, Spoil); 15] = [
            ("hostname", |r| r.hostname = String::new()),
            ("hostname", |r| r.hostname = "a b".into()),
            ("hostname", |r| r.hostname = "x".repeat(65)),
            ("machine_id", |r| r.machine_id = "0".repeat(32)),
            ("machine_id", |r| r.machine_id = "1".repeat(31)),
            ("machine_id", |r| r.machine_id = "A".repeat(32)),
            ("machine_id", |r| r.machine_id = "\n".repeat(32)),
            ("seed", |r| r.seed.truncate(15)),
            ("seed", |r| r.seed.resize(257, 0)),
            ("network.mac", |r| network(r).mac = [0; 6]),
            ("network.mac", |r| network(r).mac[0] = 0x53),
            ("network.prefix", |r| network(r).prefix = 0),
            ("network.prefix", |r| network(r).prefix = 31),
            ("network.resolvers", |r| {
                network(r).resolvers = vec![Ipv4Addr::LOCALHOST; 4];
            }),
            ("network.mtu", |r| network(r).mtu = 575),
        ];
        for (what, spoil) in cases {
            let mut bad = good.clone();
            spoil(&mut bad);
            assert!(bad.check().unwrap_err().starts_with(what), "{bad:?}");
        }
    }

    #[test]
    fn shutdown_takes_a_default_grace_and_no_unknown_field() {
        let request: ShutdownRequest = serde_json::from_str(r#"{"action":"poweroff"}"#).unwrap();
        assert_eq!(
            request,
            ShutdownRequest {
                action: ShutdownAction::Poweroff,
                grace_ms: 2_000
            }
        );
        assert!(
            serde_json::from_str::<ShutdownRequest>(r#"{"action":"reboot","delay":1}"#).is_err()
        );
    }
}
