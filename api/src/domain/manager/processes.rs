//! Processes that run in a sandbox without anybody who waits for them.
//!
//! They do not keep a sandbox from being idle; who follows one does.

use futures_util::StreamExt;

use super::super::error::{ExecError, LookupError};
use super::super::events::Change;
use super::super::host::HostError;
use super::super::process::{
    Process, ProcessEvents, ProcessRef, StartProcess, TerminalInputs, TerminalSize, random_tag,
};
use super::super::request::{self, Command};
use super::{InUse, Manager};

/// A process as it is asked for, unchecked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessSpec {
    /// What to run. It may take as long as it likes.
    pub command: Command,
    /// Who runs it.
    pub user: Option<String>,
    /// Names it; one is made up if there is none.
    pub tag: Option<String>,
    /// Columns and rows of its terminal, if it has one.
    pub terminal: Option<(i64, i64)>,
}

impl Manager {
    /// Starts a process in a sandbox.
    ///
    /// # Errors
    /// It was not started.
    pub async fn start_process(
        &self,
        in_use: &InUse,
        spec: ProcessSpec,
    ) -> Result<Process, ExecError> {
        let id = &in_use.sandbox.id;
        let settings = self.settings_of(id).await.map_err(LookupError::from)?;
        let terminal = spec.terminal.map(check_size).transpose();
        let terminal = terminal.map_err(ExecError::Invalid)?;
        let prefix = if terminal.is_some() { "pty-" } else { "proc-" };
        if let Some(tag) = &spec.tag {
            request::check_tag(tag).map_err(ExecError::Invalid)?;
        }
        let request = StartProcess {
            command: request::check_command(spec.command, &settings).map_err(ExecError::Invalid)?,
            user: spec.user,
            tag: spec.tag.unwrap_or_else(|| random_tag(prefix)),
            terminal,
        };
        let started = self.inner.host.start_process(id, request).await;
        self.used(id).await;
        let process = started.map_err(ExecError::Host)?;
        let change = Change::ProcessStarted {
            pid: process.pid,
            tag: process.tag.clone(),
        };
        self.tell(&in_use.sandbox, change);
        Ok(process)
    }

    /// The processes of a sandbox that run in the background, in the order in which they were started.
    ///
    /// # Errors
    /// They are not known.
    pub async fn processes(&self, in_use: &InUse) -> Result<Vec<Process>, ExecError> {
        let listed = self.inner.host.processes(&in_use.sandbox.id).await;
        let mut processes = listed.map_err(ExecError::Host)?;
        processes.retain(|process| process.exit.is_none());
        Ok(processes)
    }

    /// Sends a signal, 1 to 31, to a process.
    ///
    /// # Errors
    /// There is none, or it was not sent.
    pub async fn signal_process(
        &self,
        in_use: &InUse,
        process: &ProcessRef,
        signal: i32,
    ) -> Result<(), ExecError> {
        let id = &in_use.sandbox.id;
        let sent = self.inner.host.signal_process(id, process, signal).await;
        self.used(id).await;
        sent.map_err(ExecError::Host)
    }

    /// Follows a process.
    ///
    /// # Errors
    /// There is none, or it cannot be followed; later errors are in the stream.
    pub async fn attach_process(
        &self,
        in_use: &InUse,
        process: &ProcessRef,
        input: TerminalInputs,
    ) -> Result<ProcessEvents, ExecError> {
        let id = &in_use.sandbox.id;
        let attached = self.inner.host.attach_process(id, process, input).await;
        self.used(id).await;
        let ended = HostError::AgentUnreachable {
            reason: "the process's output ended without its exit status".to_owned(),
        };
        let events = attached.map_err(ExecError::Host)?;
        Ok(events
            .chain(futures_util::stream::iter([Err(ended)]))
            .boxed())
    }
}

/// The size of a terminal that is asked for.
///
/// # Errors
/// What is wrong with it, as a sentence.
pub fn check_size((cols, rows): (i64, i64)) -> Result<TerminalSize, String> {
    Ok(TerminalSize {
        cols: request::in_range("cols", cols, 1, i64::from(u16::MAX), "")?,
        rows: request::in_range("rows", rows, 1, i64::from(u16::MAX), "")?,
    })
}
