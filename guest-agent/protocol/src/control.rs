//! Health, readiness and shutdown.

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
