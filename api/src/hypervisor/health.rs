//! Whether this host can start sandboxes.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, Ping};
use super::{Inner, command};
use crate::chain;
use crate::domain::{HostHealth, PartHealth, VmmVersion};

/// How long a VMM may take from its start to its answer.
const PING_TIMEOUT: Duration = Duration::from_secs(10);
/// With less room than this for disks, in bytes, a host is not well: sandboxes write there, and so do the
/// daemon's records.
const LEAST_ROOM: u64 = 128 << 20;

/// Tells one version of a file from all others.
type Version = (u64, u64, i64, i64);

/// How long a VMM that has not answered is not asked again. Anybody may ask for the host's health.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// What the VMM that was asked last has said. One is asked at a time.
#[derive(Debug, Default)]
pub(super) struct Probed(Arc<tokio::sync::Mutex<Option<Answer>>>);

#[derive(Debug)]
struct Answer {
    of: Version,
    at: Instant,
    said: Result<VmmVersion, String>,
}

impl Answer {
    /// Whether it says what this one would say now.
    fn is_of(&self, version: Version) -> bool {
        self.of == version && (self.said.is_ok() || self.at.elapsed() < ASK_AGAIN)
    }
}

impl Inner {
    pub(super) async fn health(self: &Arc<Self>) -> HostHealth {
        let network = async {
            match &self.config.networks {
                Some(networks) => Some(networks.check().await),
                None => None,
            }
        };
        let (vmm, network) = tokio::join!(self.check_vmm(), network);
        HostHealth {
            vmm,
            network,
            disk: room(self.config.paths.parents()[1]),
            images: self
                .config
                .images
                .check(Path::new(""))
                .map_err(|error| chain(&error)),
        }
    }

    /// Whether KVM can be opened and the VMM answers. One that has answered is not asked again, and one that
    /// has not only after a while.
    async fn check_vmm(self: &Arc<Self>) -> Result<VmmVersion, String> {
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        kvm.map_err(|error| {
            format!("/dev/kvm cannot be opened ({error}); `vmm doctor` tells what to do")
        })?;
        let vmm = &self.config.vmm;
        let cannot = |error: String| format!("{} cannot be used: {error}", vmm.display());
        let file = std::fs::metadata(vmm).map_err(|error| cannot(error.to_string()))?;
        let version = (file.dev(), file.ino(), file.mtime(), file.mtime_nsec());
        let mut probed = Arc::clone(&self.probed.0).lock_owned().await;
        if let Some(answer) = probed.as_ref().filter(|answer| answer.is_of(version)) {
            return answer.said.clone().map_err(cannot);
        }
        // It is asked to the end, so that who hangs up does not have it started for the next question.
        let inner = Arc::clone(self);
        let asked = tokio::spawn(async move {
            let said = inner.ask_vmm().await;
            *probed = Some(Answer {
                of: version,
                at: Instant::now(),
                said: said.clone(),
            });
            said
        });
        let said = asked.await.map_err(|error| error.to_string());
        said.flatten().map_err(cannot)
    }

    /// Starts a VMM without a machine and asks who it is. The error is a sentence.
    async fn ask_vmm(&self) -> Result<VmmVersion, String> {
        let text = |error: std::io::Error| error.to_string();
        let dir = tempfile::Builder::new()
            .prefix("probe-")
            .tempdir_in(self.config.paths.parents()[0])
            .map_err(text)?;
        let socket = dir.path().join("api.sock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).map_err(text)?;
        let mut command = command::without_machine(&self.config.vmm, listener.as_raw_fd());
        let mut vmm = command.stderr(Stdio::null()).spawn().map_err(text)?;
        drop(listener);
        let control = Control::new(socket);
        let answer = tokio::time::timeout(PING_TIMEOUT, control.ping()).await;
        vmm.start_kill().map_err(text)?;
        let status = vmm.wait().await.map_err(text)?;
        if let (Err(_) | Ok(Err(_)), Some(_)) = (&answer, status.code()) {
            // It was not killed.
            return Err(format!("it has ended without an answer: {status}"));
        }
        let Ping {
            build_version,
            version,
        } = answer
            .map_err(|_| format!("it did not answer within {} s", PING_TIMEOUT.as_secs()))?
            .map_err(|error| chain(&error))?;
        Ok(VmmVersion {
            build: build_version,
            api: version,
        })
    }
}

/// Whether there is room in this directory.
fn room(data: &Path) -> PartHealth {
    let disk = rustix::fs::statvfs(data)
        .map_err(|error| format!("the file system of data_dir does not tell its size: {error}"))?;
    let left = disk.f_bavail.saturating_mul(disk.f_frsize);
    if left < LEAST_ROOM {
        return Err(format!(
            "{} MiB are free in the file system of data_dir, which is less than {}; delete snapshots or \
             sandboxes, or give it more room",
            left >> 20,
            LEAST_ROOM >> 20
        ));
    }
    if disk.f_files > 0 && disk.f_favail == 0 {
        return Err("the file system of data_dir has no inodes left".to_owned());
    }
    Ok(())
}
