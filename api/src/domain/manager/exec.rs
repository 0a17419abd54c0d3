//! Commands and files in a sandbox.

use std::io;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

use super::super::error::{ExecError, FileError, LookupError};
use super::super::events::Change;
use super::super::exec::{self, ExecOutput};
use super::super::host::{ExecEvent, FileContent, HostError, ReadFileRequest, WriteFileRequest};
use super::super::request::{self, Command};
use super::{InUse, Manager};

impl Manager {
    /// Keeps a sandbox from being idle.
    pub async fn keep_awake(&self, in_use: InUse) {
        self.used(&in_use.sandbox.id).await;
    }

    /// Runs a command in a sandbox and collects its output.
    ///
    /// # Errors
    /// There is no result.
    pub async fn exec(&self, in_use: &InUse, command: Command) -> Result<ExecOutput, ExecError> {
        let (id, start) = (&in_use.sandbox.id, Instant::now());
        let settings = self.settings_of(id).await.map_err(LookupError::from)?;
        let request = request::check_command(command, &settings).map_err(ExecError::Invalid)?;
        let events = self
            .inner
            .host
            .exec(id, request)
            .await
            .map_err(ExecError::Host)?;
        let events = self.telling(in_use, events);
        let output = exec::collect(
            events,
            &self.inner.limits.exec,
            self.principal.owner(),
            start,
        )
        .await;
        self.used(id).await;
        Ok(output?)
    }

    /// Runs a command in a sandbox, whose output comes as it is written, and which reads this, or
    /// nothing. Dropping the stream kills the command.
    ///
    /// # Errors
    /// It was not started; later errors are in the stream.
    pub async fn exec_events(
        &self,
        in_use: &InUse,
        command: Command,
        input: Option<BoxStream<'static, io::Result<Bytes>>>,
    ) -> Result<BoxStream<'static, Result<ExecEvent, HostError>>, ExecError> {
        let id = &in_use.sandbox.id;
        let settings = self.settings_of(id).await.map_err(LookupError::from)?;
        let request = request::check_command(command, &settings).map_err(ExecError::Invalid)?;
        let host = &self.inner.host;
        let events = match input {
            Some(input) => host.exec_with_input(id, request, input).await,
            None => host.exec(id, request).await,
        };
        self.used(id).await;
        let events = events.map_err(ExecError::Host)?;
        Ok(self.telling(in_use, events))
    }

    /// Writes a file in a sandbox, with these permission bits, or those of the file that is replaced,
    /// or 0644.
    ///
    /// # Errors
    /// The file is as it was.
    pub async fn write_file(
        &self,
        in_use: &InUse,
        path: String,
        mode: Option<u32>,
        content: BoxStream<'static, io::Result<Bytes>>,
    ) -> Result<(), FileError> {
        request::check_path(&path).map_err(FileError::Invalid)?;
        let id = &in_use.sandbox.id;
        let written = Change::FileWritten { path: path.clone() };
        let request = WriteFileRequest { path, mode };
        let result = self.inner.host.write_file(id, request, content).await;
        self.used(id).await;
        result.map_err(FileError::Host)?;
        self.tell(&in_use.sandbox, written);
        Ok(())
    }

    /// Reads a file in a sandbox, which is in use until its content was read.
    ///
    /// # Errors
    /// It cannot be read from its start; later errors are in the stream.
    pub async fn read_file(&self, in_use: InUse, path: String) -> Result<FileContent, FileError> {
        request::check_path(&path).map_err(FileError::Invalid)?;
        let InUse { sandbox, using } = in_use;
        let request = ReadFileRequest { path };
        let result = self.inner.host.read_file(&sandbox.id, request).await;
        self.used(&sandbox.id).await;
        let FileContent { size, content } = result.map_err(FileError::Host)?;
        let content = content.inspect(move |_| {
            let _ = &using;
        });
        Ok(FileContent {
            size,
            content: content.boxed(),
        })
    }
}
