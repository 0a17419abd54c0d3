//! How much of its machine a sandbox may use, and how that can be changed.

use serde::{Deserialize, Serialize};

use super::error::{LookupError, StartRefused};
use super::host::HostError;
use super::id::SandboxId;
use super::quota::QuotaExceeded;
use super::request::Problem;
use super::sandbox::Standing;
use super::store::StoreError;

/// The most vCPUs of one sandbox: what the VMM can build.
const MAX_VCPUS: u8 = 32;
/// How many times what a machine is booted with it can have while it runs.
const ROOM: u32 = 2;
/// The steps in which memory comes and goes, in MiB: those of virtio-mem with the VMM.
pub const MEMORY_STEP_MB: u32 = 2;
/// The least memory that a limit leaves, in MiB: a kernel and an agent need as much.
const MIN_USABLE_MB: u32 = 64;

/// What there is to a sandbox's resources beside vCPUs and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Share of the time of its vCPUs that it has at most, 1 to 100; `None` for all of it.
    pub cpu_limit_percent: Option<u8>,
    /// Share of its memory that its guest has at most, 1 to 100; `None` for all of it.
    pub memory_limit_percent: Option<u8>,
    /// What its machine was booted with, if that can change while it runs.
    pub booted: Option<Booted>,
}

/// A machine that can change while it runs, as it was booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Booted {
    /// vCPUs that it was booted with.
    pub vcpus: u8,
    /// vCPUs that it can have.
    pub max_vcpus: u8,
    /// Memory that it was booted with, in MiB.
    pub memory_mb: u32,
    /// Memory that it can have, in MiB.
    pub max_memory_mb: u32,
}

impl Booted {
    /// A machine that is booted with this, on a host with so much memory, in MiB.
    pub fn with_room(vcpus: u8, memory_mb: u32, host_mb: u64) -> Self {
        let host_mb = u32::try_from(host_mb).unwrap_or(u32::MAX);
        let most = memory_mb.saturating_mul(ROOM).min(host_mb);
        let room = most.saturating_sub(memory_mb) / MEMORY_STEP_MB * MEMORY_STEP_MB;
        Self {
            vcpus,
            max_vcpus: vcpus.saturating_mul(2).min(MAX_VCPUS).max(vcpus),
            memory_mb,
            max_memory_mb: memory_mb + room,
        }
    }

    /// Whether its memory can change.
    pub fn has_memory(self) -> bool {
        self.max_memory_mb > self.memory_mb
    }

    /// What keeps the machine from having this while it runs, as a sentence.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(&self, vcpus: u8, memory_mb: u32) -> Result<(), String> {
        let Self {
            max_vcpus,
            memory_mb: least,
            max_memory_mb: most,
            ..
        } = *self;
        if vcpus > max_vcpus {
            Err(format!(
                "it can have up to {max_vcpus} vCPUs while it runs, and not {vcpus}"
            ))
        } else if memory_mb < least || memory_mb > most {
            Err(format!(
                "it can have {least} to {most} MiB of memory while it runs, and not {memory_mb}"
            ))
        } else if !(memory_mb - least).is_multiple_of(MEMORY_STEP_MB) {
            Err(format!(
                "its memory changes in steps of {MEMORY_STEP_MB} MiB while it runs"
            ))
        } else {
            Ok(())
        }
    }
}

/// MiB of this memory that a limit in percent takes from the guest.
pub fn withheld_mb(memory_mb: u32, limit_percent: Option<u8>) -> u32 {
    let limit = u64::from(limit_percent.unwrap_or(100).min(100));
    let kept = u64::from(memory_mb) * limit / 100;
    memory_mb - u32::try_from(kept).unwrap_or(memory_mb)
}

/// Whether a limit leaves a guest enough memory to live on.
///
/// # Errors
/// It does not; a sentence.
pub fn check_limits(
    memory_mb: u32,
    cpu_limit_percent: Option<u8>,
    memory_limit_percent: Option<u8>,
) -> Result<(), Problem> {
    let is_share = |percent: Option<u8>| percent.is_none_or(|percent| (1..=100).contains(&percent));
    let wrong = |field, sentence: String| Err(Problem { field, sentence });
    if !is_share(cpu_limit_percent) {
        return wrong("cpu_limit_percent", "must be between 1 and 100".to_owned());
    }
    if !is_share(memory_limit_percent) {
        return wrong(
            "memory_limit_percent",
            "must be between 1 and 100".to_owned(),
        );
    }
    let left = memory_mb - withheld_mb(memory_mb, memory_limit_percent);
    if left < MIN_USABLE_MB {
        return wrong(
            "memory_limit_percent",
            format!("leaves {left} MiB of {memory_mb}; at least {MIN_USABLE_MB} are needed"),
        );
    }
    Ok(())
}

/// What of a sandbox's resources is to change; `None` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResourceChange {
    /// Virtual CPUs.
    pub vcpus: Option<i64>,
    /// Memory in MiB.
    pub memory_mb: Option<i64>,
    /// See [`Resources::cpu_limit_percent`].
    pub cpu_limit_percent: Option<u8>,
    /// See [`Resources::memory_limit_percent`].
    pub memory_limit_percent: Option<u8>,
}

/// Have this running sandbox have this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResizeRequest {
    /// Which.
    pub id: SandboxId,
    /// Virtual CPUs that it has, and is to have.
    pub vcpus: [u8; 2],
    /// Memory that it has, and is to have, in MiB.
    pub memory_mb: [u32; 2],
    /// What else it has, and is to have.
    pub resources: [Resources; 2],
}

/// Why a sandbox's resources are as they were.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// There is none of that id or name, or the store failed.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// What is asked for makes no sense.
    #[error("{}: {}", .0.field, .0.sentence)]
    Invalid(Problem),
    /// Its state does not allow it.
    #[error("the resources of a sandbox that is {0} cannot be changed: it must be running or off")]
    WrongState(Standing),
    /// It cannot be done while it runs.
    #[error("{0}; stop it, change its resources, and start it again")]
    NotWhileRunning(String),
    /// It goes on from a saved memory, which is of a machine as it was.
    #[error(
        "the sandbox goes on from the memory of a snapshot at its next start, and has then what it \
         had; start it, and change its resources then"
    )]
    HasMemory,
    /// It would be more than the quota.
    #[error(transparent)]
    Quota(QuotaExceeded),
    /// What the quota leaves cannot be told.
    #[error("what the quota leaves is not known")]
    Count(#[source] StartRefused),
    /// The host has not done it.
    #[error(transparent)]
    Host(HostError),
    /// The task that did it ended early.
    #[error("the task that changed the resources ended early")]
    Interrupted,
}

impl From<StoreError> for ResizeError {
    fn from(source: StoreError) -> Self {
        Self::Lookup(source.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_has_room_for_twice_as_much_as_far_as_the_host_has_it() {
        let booted = |vcpus, memory_mb, host_mb| Booted::with_room(vcpus, memory_mb, host_mb);
        let most = |booted: Booted| (booted.max_vcpus, booted.max_memory_mb);
        assert_eq!(most(booted(2, 512, 16_384)), (4, 1024));
        assert_eq!(most(booted(20, 512, 16_384)), (32, 1024));
        assert_eq!(most(booted(1, 513, 16_384)), (2, 1025));
        assert_eq!(most(booted(1, 512, 800)), (2, 800));
        assert_eq!(most(booted(1, 512, 1)), (2, 512));
        assert_eq!(most(booted(32, u32::MAX, u64::MAX)), (32, u32::MAX));
    }

    #[test]
    fn what_a_running_machine_cannot_have_is_said() {
        let machine = Booted::with_room(2, 512, 16_384);
        for (vcpus, memory_mb) in [(1, 512), (4, 1024), (2, 514)] {
            assert_eq!(machine.check(vcpus, memory_mb), Ok(()));
        }
        for (vcpus, memory_mb, why) in [
            (5, 512, "up to 4 vCPUs"),
            (2, 510, "512 to 1024 MiB"),
            (2, 1026, "512 to 1024 MiB"),
            (2, 513, "steps of 2 MiB"),
        ] {
            let said = machine.check(vcpus, memory_mb).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn a_limit_is_a_share_that_a_guest_can_live_on() {
        assert_eq!(withheld_mb(512, None), 0);
        assert_eq!(withheld_mb(512, Some(75)), 128);
        assert_eq!(withheld_mb(100, Some(33)), 67);
        assert_eq!(withheld_mb(u32::MAX, Some(0)), u32::MAX);
        assert!(check_limits(512, Some(1), Some(90)).is_ok());
        for (memory, cpu, limit, field) in [
            (512, Some(0), None, "cpu_limit_percent"),
            (512, Some(101), None, "cpu_limit_percent"),
            (512, None, Some(0), "memory_limit_percent"),
            (512, None, Some(101), "memory_limit_percent"),
            (128, None, Some(49), "memory_limit_percent"),
        ] {
            assert_eq!(check_limits(memory, cpu, limit).unwrap_err().field, field);
        }
    }
}
