//! Commands whose output is collected before it is told.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use super::host::{ExecEvent, HostError};
use super::id::UserId;
use super::spool::{SpoolSpace, Spooled};

/// How much output is collected, and where.
#[derive(Debug, Clone)]
pub struct ExecLimits {
    /// Bytes of both streams together, after which the command is killed.
    pub max_output: u64,
    /// Bytes of each stream that are kept in memory; more go to a file.
    pub memory_threshold: usize,
    /// Where these files are.
    pub spool: Arc<SpoolSpace>,
}

/// How a collected command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecEnd {
    /// By itself, with this exit status.
    Exited(i32),
    /// Killed, for it outran its timeout.
    TimedOut,
    /// Killed, for it wrote too much.
    TooMuchOutput,
    /// Killed, for there was no room for what it wrote beside other output and uploads of its owner.
    NoRoom,
}

/// What a command left behind.
#[derive(Debug)]
pub struct ExecOutput {
    /// Its standard output.
    pub stdout: Spooled,
    /// Its standard error.
    pub stderr: Spooled,
    /// How it ended.
    pub end: ExecEnd,
    /// From the request to its end.
    pub duration: Duration,
}

/// Why output could not be collected.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// The host failed in the midst of it.
    #[error("the command was lost")]
    Host(#[from] HostError),
    /// Nowhere to put the output.
    #[error("the command's output could not be spooled to disk")]
    Spool(#[from] io::Error),
}

/// Collects the output of a command of `owner` that was started at `start`. Returning early drops the
/// stream, which kills the command.
pub async fn collect(
    mut events: BoxStream<'static, Result<ExecEvent, HostError>>,
    limits: &ExecLimits,
    owner: Option<&UserId>,
    start: Instant,
) -> Result<ExecOutput, CollectError> {
    let mut stdout = limits.spool.spool(owner, limits.memory_threshold);
    let mut stderr = limits.spool.spool(owner, limits.memory_threshold);
    let end = loop {
        match events.next().await.transpose()? {
            Some(event @ (ExecEvent::Stdout(_) | ExecEvent::Stderr(_))) => {
                let (spool, bytes) = match event {
                    ExecEvent::Stdout(bytes) => (&mut stdout, bytes),
                    ExecEvent::Stderr(bytes) => (&mut stderr, bytes),
                    ExecEvent::Started { .. } | ExecEvent::Exited(_) => continue,
                };
                match spool.push(&bytes).await {
                    Err(full) if full.kind() == io::ErrorKind::QuotaExceeded => {
                        break ExecEnd::NoRoom;
                    }
                    pushed => pushed?,
                }
                if stdout.len() + stderr.len() > limits.max_output {
                    break ExecEnd::TooMuchOutput;
                }
            }
            Some(ExecEvent::Started { .. }) => {}
            Some(ExecEvent::Exited(exit)) if exit.timed_out => break ExecEnd::TimedOut,
            Some(ExecEvent::Exited(exit)) => break ExecEnd::Exited(exit.code),
            None => {
                return Err(HostError::AgentUnreachable {
                    reason: "the command's output ended without its exit status".to_owned(),
                }
                .into());
            }
        }
    };
    drop(events);
    Ok(ExecOutput {
        stdout: stdout.finish().await?,
        stderr: stderr.finish().await?,
        end,
        duration: start.elapsed(),
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::stream;

    use super::super::host::ExitInfo;
    use super::*;

    fn limits(max_output: u64) -> (tempfile::TempDir, ExecLimits) {
        let dir = tempfile::tempdir().unwrap();
        let limits = ExecLimits {
            max_output,
            memory_threshold: 4,
            spool: SpoolSpace::new(dir.path().to_owned(), 12),
        };
        (dir, limits)
    }

    async fn run(
        events: Vec<Result<ExecEvent, HostError>>,
        max_output: u64,
    ) -> Result<ExecOutput, CollectError> {
        let (_dir, limits) = limits(max_output);
        let events = stream::iter(events).boxed();
        collect(events, &limits, None, Instant::now()).await
    }

    fn exited(code: i32, timed_out: bool) -> Result<ExecEvent, HostError> {
        Ok(ExecEvent::Exited(ExitInfo { code, timed_out }))
    }

    #[tokio::test]
    async fn the_streams_stay_apart() {
        let events = vec![
            Ok(ExecEvent::Stdout(Bytes::from_static(b"out"))),
            Ok(ExecEvent::Stderr(Bytes::from_static(b"error"))),
            Ok(ExecEvent::Stdout(Bytes::from_static(b"put"))),
            exited(3, false),
        ];
        let mut output = run(events, 100).await.unwrap();
        assert_eq!(output.end, ExecEnd::Exited(3));
        assert_eq!(
            output.stdout.next_chunk(99).await.unwrap().unwrap(),
            "output"
        );
        assert_eq!(
            output.stderr.next_chunk(99).await.unwrap().unwrap(),
            "error"
        );
    }

    #[tokio::test]
    async fn timeouts_and_floods_are_told_with_what_was_written() {
        let some = || Ok(ExecEvent::Stdout(Bytes::from_static(b"12345")));
        let output = run(vec![some(), exited(137, true)], 100).await.unwrap();
        assert_eq!(output.end, ExecEnd::TimedOut);
        assert_eq!(output.stdout.len(), 5);
        let output = run(vec![some(), some(), exited(0, false)], 9)
            .await
            .unwrap();
        assert_eq!(output.end, ExecEnd::TooMuchOutput);
        // There is room for two of three.
        let output = run(vec![some(), some(), some(), exited(0, false)], 100);
        let output = output.await.unwrap();
        assert_eq!((output.end, output.stdout.len()), (ExecEnd::NoRoom, 10));
    }

    #[tokio::test]
    async fn an_end_without_an_exit_status_is_an_error() {
        let some = Ok(ExecEvent::Stdout(Bytes::from_static(b"12345")));
        assert!(matches!(
            run(vec![some], 100).await,
            Err(CollectError::Host(HostError::AgentUnreachable { .. }))
        ));
    }
}
