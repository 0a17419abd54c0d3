//! The VMM's API, as far as the daemon uses it: HTTP/1.1 over a UNIX socket, one connection a
//! request, with file descriptors attached to its first bytes (SCM_RIGHTS of unix(7)).
//!
//! A VMM may have been taken over by its guest, so what it answers is bounded and only told.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;

/// How long a VMM may take to stop or start its guest.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VMM may take to tell of its machine, once it is done with what it is at: such as writing
/// a guest's memory for a daemon that has ended since.
const INFO_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VMM may take to write a guest's memory: a tebibyte at 1 GiB/s, and some more.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// How long a VMM may take to tell what it has counted. It does so after what it is at, which may be
/// writing a guest's memory; nobody who looks at figures waits for that.
const COUNTERS_TIMEOUT: Duration = Duration::from_secs(3);
/// The longest head, and the longest body, of an answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;
/// The most descriptors in one message: `SCM_MAX_FD` of Linux.
const MAX_FDS: usize = 253;

/// Why a VMM did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// It cannot be asked.
    #[error("the vmm cannot be asked for {what}")]
    Io {
        /// For what.
        what: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// It does not answer.
    #[error("the vmm did not answer to {what} within {} s", timeout.as_secs())]
    Timeout {
        /// To what.
        what: &'static str,
        /// For how long.
        timeout: Duration,
    },
    /// It says no.
    #[error("the vmm refused {what}: {reason}")]
    Refused {
        /// What.
        what: &'static str,
        /// Its sentences, from the outermost to the cause.
        reason: String,
    },
}

/// What a running machine is to have; what is `None` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Desired {
    /// vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_vcpus: Option<u8>,
    /// Memory, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_ram: Option<u64>,
    /// Of that, what its balloon keeps from it, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_balloon: Option<u64>,
}

impl Desired {
    /// Whether all of it stays.
    pub fn is_nothing(&self) -> bool {
        self.desired_vcpus.is_none() && self.desired_ram.is_none() && self.desired_balloon.is_none()
    }
}

/// Which VMM it is, in its own words.
#[derive(Debug, serde::Deserialize)]
pub struct Ping {
    /// The version of the program.
    pub build_version: String,
    /// The version of Cloud Hypervisor whose API it has.
    pub version: String,
}

/// The API of one VMM.
#[derive(Debug, Clone)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// The API behind `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Whether the guest is stopped, or runs.
    pub async fn is_paused(&self) -> Result<bool, ControlError> {
        #[derive(serde::Deserialize)]
        struct Info {
            state: String,
        }
        let what = "vm.info";
        let info: Info = self.get(what, INFO_TIMEOUT).await?;
        match info.state.as_str() {
            "Running" => Ok(false),
            "Paused" => Ok(true),
            _ => Err(ControlError::Refused {
                what,
                reason: "it has no machine that was started".to_owned(),
            }),
        }
    }

    /// Which VMM it is.
    pub async fn ping(&self) -> Result<Ping, ControlError> {
        self.get("vmm.ping", INFO_TIMEOUT).await
    }

    /// What its devices have counted, by their ids.
    pub async fn counters(&self) -> Result<BTreeMap<String, BTreeMap<String, u64>>, ControlError> {
        self.get("vm.counters", COUNTERS_TIMEOUT).await
    }

    /// Asks the guest to have this from now on, which it takes its time for.
    pub async fn resize(&self, desired: &Desired) -> Result<(), ControlError> {
        let body = serde_json::to_string(desired).map_err(|error| ControlError::Io {
            what: "vm.resize",
            source: error.into(),
        })?;
        self.put("vm.resize", &body, &[], PAUSE_TIMEOUT).await
    }

    /// Stops the guest.
    pub async fn pause(&self) -> Result<(), ControlError> {
        self.put("vm.pause", "", &[], PAUSE_TIMEOUT).await
    }

    /// Lets the guest go on.
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.put("vm.resume", "", &[], PAUSE_TIMEOUT).await
    }

    /// Writes the stopped guest's state to `files`: manifest, state and memory, the latter without
    /// what is in the `keep` lowest of the layers that it is based on. With the memory once more,
    /// to read only, the machine is based on that from then on.
    pub async fn snapshot(
        &self,
        keep: usize,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), ControlError> {
        let body = serde_json::json!({ "keep_base_layers": keep }).to_string();
        self.put("vm.snapshot", &body, files, SNAPSHOT_TIMEOUT)
            .await
    }

    /// Writes to `file` which pages the restored guest has touched so far.
    pub async fn working_set(&self, file: BorrowedFd<'_>) -> Result<(), ControlError> {
        self.put("vm.working-set", "{}", &[file], PAUSE_TIMEOUT)
            .await
    }

    /// Gives the stopped guest's first disk another image: `files` are its layers, the one that is
    /// written first, and the raw one of the template last.
    pub async fn replace_disk(&self, files: &[BorrowedFd<'_>]) -> Result<(), ControlError> {
        let mut types = vec!["Qcow2"; files.len().saturating_sub(1)];
        types.push("Raw");
        let body = serde_json::json!({ "id": "_disk0", "image_types": types }).to_string();
        self.put("vm.replace-disk", &body, files, PAUSE_TIMEOUT)
            .await
    }

    async fn get<T: serde::de::DeserializeOwned>(
        &self,
        what: &'static str,
        timeout: Duration,
    ) -> Result<T, ControlError> {
        let body = self.ask("GET", what, "", &[], timeout).await?;
        serde_json::from_slice(&body).map_err(|error| ControlError::Io {
            what,
            source: error.into(),
        })
    }

    async fn put(
        &self,
        what: &'static str,
        body: &str,
        files: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<(), ControlError> {
        self.ask("PUT", what, body, files, timeout).await.map(drop)
    }

    /// The body of the answer to a request.
    async fn ask(
        &self,
        method: &str,
        what: &'static str,
        body: &str,
        files: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<Vec<u8>, ControlError> {
        let failed = |source| ControlError::Io { what, source };
        let exchange = async {
            let mut stream = UnixStream::connect(&self.socket).await?;
            send(&mut stream, &request(method, what, body), files).await?;
            read_answer(BufReader::new(stream.take(2 * MAX_ANSWER))).await
        };
        let (status, body) = tokio::time::timeout(timeout, exchange)
            .await
            .map_err(|_| ControlError::Timeout { what, timeout })?
            .map_err(failed)?;
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let reason = match serde_json::from_slice::<Vec<String>>(&body) {
            Ok(sentences) if !sentences.is_empty() => sentences.join(": "),
            _ => format!("it answered {status}"),
        };
        Err(ControlError::Refused { what, reason })
    }
}

fn request(method: &str, what: &str, body: &str) -> String {
    let mut text = format!("{method} /api/v1/{what} HTTP/1.1\r\nHost: localhost\r\n");
    if !body.is_empty() {
        text.push_str("Content-Type: application/json\r\n");
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    text.push_str(body);
    text
}

async fn send(stream: &mut UnixStream, text: &str, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    if files.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut sent = 0;
    if !files.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        sent = stream
            .async_io(Interest::WRITABLE, || {
                let mut control = SendAncillaryBuffer::new(&mut space);
                control.push(SendAncillaryMessage::ScmRights(files));
                let bytes = [IoSlice::new(text.as_bytes())];
                Ok(sendmsg(
                    &*stream,
                    &bytes,
                    &mut control,
                    SendFlags::NOSIGNAL,
                )?)
            })
            .await?;
    }
    stream.write_all(&text.as_bytes()[sent..]).await
}

/// The status and the body of an answer.
async fn read_answer(
    mut reader: impl tokio::io::AsyncBufRead + Unpin,
) -> io::Result<(u16, Vec<u8>)> {
    let bad = |text: &str| io::Error::new(io::ErrorKind::InvalidData, text.to_owned());
    let (mut status, mut length, mut head) = (None, 0, 0);
    loop {
        let mut line = String::new();
        head += (&mut reader).take(MAX_ANSWER).read_line(&mut line).await? as u64;
        let line = match line.strip_suffix("\r\n") {
            Some(line) if head <= MAX_ANSWER => line,
            _ => return Err(bad("its answer is no HTTP")),
        };
        match (status, line.split_once(':')) {
            (None, _) => {
                let code = line
                    .strip_prefix("HTTP/1.1 ")
                    .and_then(|rest| rest.get(..3));
                let code = code.and_then(|code| code.parse::<u16>().ok());
                status = Some(code.ok_or_else(|| bad("its answer has no status"))?);
            }
            (Some(_), Some((name, value))) if name.eq_ignore_ascii_case("content-length") => {
                length = value
                    .trim()
                    .parse()
                    .map_err(|_| bad("its answer has no length"))?;
            }
            (Some(status), None) if line.is_empty() => {
                if length > MAX_ANSWER {
                    return Err(bad("its answer is too long"));
                }
                let mut body = Vec::new();
                reader.take(length).read_to_end(&mut body).await?;
                return Ok((status, body));
            }
            (Some(_), _) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_are_read_and_nonsense_is_refused() {
        let read = async |text: &str| read_answer(text.as_bytes()).await;
        let answer = read("HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n").await;
        assert_eq!(answer.unwrap(), (204, Vec::new()));
        let answer = read("HTTP/1.1 500 \r\ncontent-length: 5\r\n\r\n[\"a\"]more").await;
        assert_eq!(answer.unwrap(), (500, b"[\"a\"]".to_vec()));
        for bad in [
            "",
            "HTTP/1.1",
            "HTTP/1.1 2\r\n\r\n",
            "HTTP/1.1 204 x\r\nServer: x\r\n",
            "HTTP/1.1 204 x\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 204 x\r\nContent-Length: 65537\r\n\r\n",
            &format!("HTTP/1.1 204 {}\r\n\r\n", "x".repeat(70_000)),
        ] {
            assert!(read(bad).await.is_err(), "{bad:.40}");
        }
    }
}
