//! How long clients may take to send their requests.

use std::ops::RangeInclusive;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::http::Patience;

/// What each of them may be, in seconds.
const SECONDS: RangeInclusive<u64> = 1..=3600;

/// How long clients may take to send their requests, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RequestsConfig {
    /// From the opening of a connection, or from the answer before, to the last header of the next request.
    pub head_sec: u64,
    /// From there to the end of a body that is no upload.
    pub body_sec: u64,
    /// From one piece of an upload to the next.
    pub upload_idle_sec: u64,
}

impl Default for RequestsConfig {
    fn default() -> Self {
        Self {
            head_sec: 60,
            body_sec: 30,
            upload_idle_sec: 60,
        }
    }
}

/// The same on the command line.
#[derive(Debug, Default, Args)]
pub struct RequestsFlags {
    /// Seconds from the opening of a connection, or from the answer before, within which the headers of a
    /// request must have come [default: 60]
    #[arg(long, env = "SANDBOXD_REQUEST_HEAD_SEC", value_name = "SECONDS")]
    request_head_sec: Option<u64>,
    /// Seconds that the body of a request that is no upload may take to come [default: 30]
    #[arg(long, env = "SANDBOXD_REQUEST_BODY_SEC", value_name = "SECONDS")]
    request_body_sec: Option<u64>,
    /// Seconds for which nothing of an upload may come [default: 60]
    #[arg(long, env = "SANDBOXD_UPLOAD_IDLE_SEC", value_name = "SECONDS")]
    upload_idle_sec: Option<u64>,
}

impl RequestsConfig {
    /// The same with what these flags say.
    pub(super) fn with(self, flags: &RequestsFlags) -> Self {
        Self {
            head_sec: flags.request_head_sec.unwrap_or(self.head_sec),
            body_sec: flags.request_body_sec.unwrap_or(self.body_sec),
            upload_idle_sec: flags.upload_idle_sec.unwrap_or(self.upload_idle_sec),
        }
    }

    /// Whether all of them make sense.
    ///
    /// # Errors
    /// What is wrong with one that does not.
    pub(super) fn check(&self) -> Result<(), String> {
        for (name, seconds) in [
            ("head_sec", self.head_sec),
            ("body_sec", self.body_sec),
            ("upload_idle_sec", self.upload_idle_sec),
        ] {
            if !SECONDS.contains(&seconds) {
                return Err(format!("requests.{name} must be 1 to 3600, not {seconds}"));
            }
        }
        Ok(())
    }

    /// The same as the HTTP side takes it.
    pub fn for_http(&self) -> Patience {
        Patience {
            head: Duration::from_secs(self.head_sec),
            body: Duration::from_secs(self.body_sec),
            upload: Duration::from_secs(self.upload_idle_sec),
        }
    }
}
