//! What goes on in guests beside commands that somebody waits for.

use async_trait::async_trait;

use super::LocalHost;
use crate::domain::{
    GuestHost, HostError, PortStream, Process, ProcessEvents, ProcessRef, SandboxId, StartProcess,
    TerminalInputs,
};

#[async_trait]
impl GuestHost for LocalHost {
    async fn start_process(
        &self,
        id: &SandboxId,
        request: StartProcess,
    ) -> Result<Process, HostError> {
        let entry = self.running(id)?;
        entry
            .unless_interrupted(entry.agent.start_process(request))
            .await
    }

    async fn processes(&self, id: &SandboxId) -> Result<Vec<Process>, HostError> {
        let entry = self.running(id)?;
        entry.unless_interrupted(entry.agent.processes()).await
    }

    async fn signal_process(
        &self,
        id: &SandboxId,
        process: &ProcessRef,
        signal: i32,
    ) -> Result<(), HostError> {
        let entry = self.running(id)?;
        let sent = entry.agent.signal_process(process, signal);
        entry.unless_interrupted(sent).await
    }

    async fn attach_process(
        &self,
        id: &SandboxId,
        process: &ProcessRef,
        input: TerminalInputs,
    ) -> Result<ProcessEvents, HostError> {
        let entry = self.running(id)?;
        let attached = entry.agent.attach_process(process, input);
        let events = entry.unless_interrupted(attached).await?;
        Ok(entry.until_interrupted(events, |error| error))
    }

    async fn connect(&self, id: &SandboxId, port: u16) -> Result<PortStream, HostError> {
        let entry = self.running(id)?;
        entry
            .unless_interrupted(entry.agent.connect_to_port(port))
            .await
    }
}
