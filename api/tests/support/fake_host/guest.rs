//! What the guests of a [`FakeHost`] do: commands, whose names say what, and files.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use api::domain::{
    ExecEvent, ExecRequest, ExitInfo, FileContent, FileInfo, FileKind, GuestHost, HostError,
    PortStream, Process, ProcessEvents, ProcessRef, ReadFileRequest, SandboxId, StartProcess,
    TerminalInputs, WalkSpec, WalkStep, WalkSteps, WriteFileRequest,
};
use async_trait::async_trait;
use axum::body::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::Notify;

use super::FakeHost;

/// Pieces of long output and files.
pub const PIECE: usize = 64 * 1024;

impl FakeHost {
    /// Runs a command: what it does is in its name.
    pub(super) fn run(
        &self,
        id: &SandboxId,
        request: ExecRequest,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, HostError> {
        if !self.sandboxes.lock().unwrap().contains(id) {
            return Err(HostError::NotRunning { id: id.clone() });
        }
        self.commands
            .lock()
            .unwrap()
            .push((request.clone(), Vec::new()));
        let argument = request.argv.get(1).cloned().unwrap_or_default();
        let events = match request.argv[0].as_str() {
            "echo" => vec![
                out(request.argv[1..].join(" ")),
                err("warning\n"),
                exited(0, false),
            ],
            "env" => vec![
                out(format!("{:?} {:?}", request.env, request.cwd)),
                exited(0, false),
            ],
            "false" => vec![exited(1, false)],
            "mkdir" => vec![exited(0, false)],
            // A shell tells of its script; one that is to fail says so, and one that is to hang.
            "/bin/sh" => match request.argv[2].as_str() {
                "fail" => vec![err("it fails\n"), exited(3, false)],
                "hang" => return Ok(stream::pending().boxed()),
                "late" => vec![out("so far"), exited(137, true)],
                script => vec![out(format!("ran {script}\n")), exited(0, false)],
            },
            // Succeeds the second time.
            "second" => {
                let commands = self.commands.lock().unwrap();
                let count = commands
                    .iter()
                    .filter(|(command, _)| command.argv[0] == "second")
                    .count();
                vec![out("not yet"), exited(i32::from(count < 2), false)]
            }
            "binary" => vec![out(&b"\xff\xfe"[..]), err("text"), exited(0, false)],
            "talk" => {
                // Says each argument when the one before was taken; ends when it is dropped.
                let said = Said(self.dropped.clone());
                let words = request.argv[1..].to_vec();
                let start = stream::iter([Ok(ExecEvent::Started { pid: 7 })]);
                let talk = stream::iter(words).map(move |word| {
                    let _ = &said;
                    match word.strip_prefix("hex:") {
                        Some(digits) => out(vec![u8::from_str_radix(digits, 16).unwrap()]),
                        None => out(word),
                    }
                });
                let end: BoxStream<'_, _> = match argument.as_str() {
                    "forever" => stream::pending().boxed(),
                    _ => stream::iter([exited(3, false)]).boxed(),
                };
                return Ok(start.chain(talk.chain(end)).boxed());
            }
            "work" => {
                let seconds = argument.parse().unwrap();
                let work = async move {
                    tokio::time::sleep(Duration::from_secs(seconds)).await;
                    exited(0, false)
                };
                return Ok(stream::once(work).boxed());
            }
            "sleep" => vec![out("so far"), exited(137, true)],
            "lost" => vec![
                out("so far"),
                Err(HostError::AgentUnreachable { reason: "x".into() }),
            ],
            "flood" => {
                let pieces = argument.parse::<usize>().unwrap() / PIECE;
                let piece = Bytes::from("y\n".repeat(PIECE / 2));
                let flood = stream::iter((0..pieces).map(move |_| out(piece.clone())));
                return Ok(flood.chain(stream::iter([exited(0, false)])).boxed());
            }
            other => {
                return Err(HostError::Agent {
                    reason: format!("no {other}"),
                });
            }
        };
        Ok(stream::iter(events).boxed())
    }

    /// Takes a file; some paths are refused, or swallow what is written.
    pub(super) async fn take_file(
        &self,
        request: WriteFileRequest,
        mut content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), HostError> {
        if request.path == "/directory" {
            return Err(HostError::Invalid {
                reason: "it is a directory".into(),
            });
        }
        let mut file = Vec::new();
        let mut len = 0;
        while let Some(piece) = content.next().await {
            let piece = piece.map_err(|error| HostError::Upload {
                reason: error.to_string(),
            })?;
            len += piece.len() as u64;
            if request.path != "/dev/null" {
                file.extend_from_slice(&piece);
            }
        }
        *self.last_upload.lock().unwrap() = Some(len);
        *self.last_mode.lock().unwrap() = request.mode;
        self.files.lock().unwrap().insert(request.path, file);
        Ok(())
    }

    /// Gives a file; of some paths it is made up, and some contents are never given.
    pub(super) async fn give_file(
        &self,
        request: ReadFileRequest,
    ) -> Result<FileContent, HostError> {
        if let Some(size) = request.path.strip_prefix("/zeros/") {
            let size: usize = size.parse().unwrap();
            let piece = Bytes::from(vec![0; PIECE]);
            let content = stream::iter((0..size / PIECE).map(move |_| Ok(piece.clone()))).boxed();
            return Ok(FileContent {
                size: Some(size as u64),
                content,
            });
        }
        let file = self.files.lock().unwrap().get(&request.path).cloned();
        let file = file.ok_or(HostError::FileNotFound { path: request.path })?;
        if file == b"hang" {
            std::future::pending::<()>().await;
        }
        let size = Some(file.len() as u64);
        Ok(FileContent {
            size,
            content: stream::iter([Ok(file.into())]).boxed(),
        })
    }

    /// What of the files is below a directory.
    pub(super) fn list(&self, path: &str, limit: usize) -> Result<Vec<FileInfo>, HostError> {
        let (path, files) = (path.trim_end_matches('/'), self.files.lock().unwrap());
        let mut found = BTreeSet::new();
        for name in files.keys() {
            let below = name
                .strip_prefix(path)
                .and_then(|rest| rest.strip_prefix('/'));
            if let Some((directory, _)) = below.and_then(|below| below.split_once('/')) {
                found.insert((format!("{path}/{directory}"), true));
            } else if below.is_some() {
                found.insert((name.clone(), false));
            }
        }
        if found.is_empty() {
            let path = path.to_owned();
            return Err(HostError::FileNotFound { path });
        }
        assert!(found.len() <= limit);
        Ok(found
            .into_iter()
            .map(|(path, is_dir)| file_info(path, is_dir))
            .collect())
    }

    /// All files, and the directories that they are in.
    pub(super) fn walk_files(&self, spec: &WalkSpec) -> WalkSteps {
        let mut found = BTreeSet::new();
        for file in self.files.lock().unwrap().keys() {
            for (end, _) in file.match_indices('/').skip(1) {
                found.insert((file[..end].to_owned(), true));
            }
            found.insert((file.clone(), false));
        }
        let is_skipped = |path: &str| {
            let mut skip = spec.skip.iter();
            skip.any(|skip| path.starts_with(&format!("{skip}/")))
        };
        found.retain(|(path, _)| !is_skipped(path));
        let entries = found.into_iter();
        let entries = entries.map(|(path, is_dir)| Ok(WalkStep::Entry(file_info(path, is_dir))));
        stream::iter(entries.collect::<Vec<_>>()).boxed()
    }
}

/// Tells when it is dropped.
struct Said(Arc<Notify>);

impl Drop for Said {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

fn out(bytes: impl Into<Bytes>) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Stdout(bytes.into()))
}

fn err(bytes: impl Into<Bytes>) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Stderr(bytes.into()))
}

fn exited(code: i32, timed_out: bool) -> Result<ExecEvent, HostError> {
    Ok(ExecEvent::Exited(ExitInfo { code, timed_out }))
}

/// A file or directory of this path.
pub(super) fn file_info(path: String, is_dir: bool) -> FileInfo {
    FileInfo {
        path,
        kind: if is_dir {
            FileKind::Directory
        } else {
            FileKind::File
        },
        mode: 0o750,
        uid: 0,
        gid: 7,
        size: 5,
        mtime_us: 2_999_999,
        target: None,
    }
}

#[async_trait]
impl GuestHost for FakeHost {
    async fn start_process(
        &self,
        id: &SandboxId,
        _request: StartProcess,
    ) -> Result<Process, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn processes(&self, id: &SandboxId) -> Result<Vec<Process>, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn signal_process(
        &self,
        id: &SandboxId,
        _process: &ProcessRef,
        _signal: i32,
    ) -> Result<(), HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn attach_process(
        &self,
        id: &SandboxId,
        _process: &ProcessRef,
        _input: TerminalInputs,
    ) -> Result<ProcessEvents, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }

    async fn connect(&self, id: &SandboxId, _port: u16) -> Result<PortStream, HostError> {
        Err(HostError::NotRunning { id: id.clone() })
    }
}
