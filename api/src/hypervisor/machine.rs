//! One `vmm` process, from its first file to its end.

use std::fmt::Write as _;
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use agent_protocol::{GuestNetwork, Ready};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use tokio::fs::File;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncSeekExt, BufReader};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use super::HostConfig;
use super::command::{self, Goes, Inherited, Jail};
use super::control::{Control, ControlError};
use super::end::{describe_end, exit};
use super::monitor::{self, Seen};
use super::nic::Nic;
use super::note::Note;
use super::paths::{self, Paths};
use super::process::{Process, ProcessId};
use crate::agent::AgentClient;
use crate::domain::{Created, End, HostError, Identity, PrepareRequest, SandboxId, Start, Timings};
use crate::images::{Chain, OverlayError};

/// How long the last words of a process that has ended may take to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The longest `Ready` line that is read, in bytes.
const MAX_READY: u64 = 4096;
/// How much of the end of a console goes into an error message, in bytes.
const CONSOLE_TAIL: u64 = 1024;

/// What to start.
pub struct Launch<'a> {
    pub config: &'a HostConfig,
    pub request: &'a PrepareRequest,
    pub goes: Goes,
    /// Whether it is to have the memory that it touches first beforehand.
    pub prefetches: bool,
    pub chain: &'a Chain,
    pub jail: Option<Jail<'a>>,
}

/// Whom a machine is started for, and how.
#[derive(Debug)]
pub struct Greeting {
    /// Who its guest is.
    pub identity: Identity,
    /// For the timings.
    pub start: Start,
}

/// How long a VMM may take to end when it is told to end at once.
const QUIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// Its directories cannot be made.
    #[error("the sandbox's directories cannot be made")]
    Directories(#[source] io::Error),
    /// It has no disk.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// A socket or pipe to it cannot be made.
    #[error("the {what} cannot be made")]
    Channel {
        /// What it is for.
        what: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// What a later daemon has to know of it cannot be written down.
    #[error("the machine cannot be written down")]
    Note(#[source] io::Error),
    /// It cannot be executed.
    #[error("{vmm} cannot be executed", vmm = vmm.display())]
    Execute {
        /// The VMM's binary.
        vmm: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
}

/// Why an agent has not answered.
#[derive(Debug)]
pub enum NotReady {
    /// It took too long.
    TimedOut(Duration),
    /// The process ended.
    Exited(io::Result<Option<ExitStatus>>),
    /// The socket that it should have answered on failed.
    Listener(io::Error),
    /// Its VMM could not be asked, or told to go on.
    Control(ControlError),
    /// It was there, and then did not take its identity.
    Identity(HostError),
    /// It was there, and could not be connected.
    Network(HostError),
    /// It was found, and its disk is not the one that it is to have. Why, as a sentence.
    Disk(String),
    /// It was found, and its agent does not answer.
    Silent(HostError),
    /// The sandbox is to be destroyed.
    Destroyed,
}

/// A `vmm` process.
pub struct Machine {
    id: SandboxId,
    process: Process,
    process_id: Option<ProcessId>,
    is_jailed: bool,
    /// Where the agent of a booted guest says that it is ready.
    listener: Option<UnixListener>,
    ready_path: PathBuf,
    console: PathBuf,
    control: Control,
    goes: Goes,
    seen: watch::Receiver<Seen>,
    events: JoinHandle<()>,
    stderr: JoinHandle<String>,
    created: Instant,
    spawned: Instant,
    status: Option<io::Result<Option<ExitStatus>>>,
}

impl Machine {
    /// Makes the sandbox's files and starts its process, which gets the tap of `nic`.
    pub async fn spawn(
        launch: Launch<'_>,
        mut nic: Option<&mut Nic<'_>>,
    ) -> Result<Self, SpawnError> {
        let created = Instant::now();
        let Launch {
            config,
            request,
            goes,
            prefetches,
            chain,
            jail,
        } = launch;
        let id = request.id.clone();
        let paths = &config.paths;
        let channel = |what| move |source| SpawnError::Channel { what, source };

        let user = jail.and_then(|jail| jail.user);
        paths.make(&id, user).map_err(SpawnError::Directories)?;
        chain.overlay(paths.disk(&id)).await?;
        if let Some(scratch) = &chain.scratch {
            scratch.overlay(paths.scratch(&id)).await?;
        }
        // Before the guest exists, so that its agent cannot come too early.
        let ready_path = paths.ready(&id);
        let listener = if request.layers.memory.is_empty() {
            let bound = UnixListener::bind(&ready_path);
            if let (Ok(_), Some(user)) = (&bound, user) {
                paths::share(&ready_path, user, 0o660).map_err(channel("agent's ready socket"))?;
            }
            Some(bound.map_err(channel("agent's ready socket"))?)
        } else {
            None
        };
        let (events, event_writer) =
            make_fifo(&paths.events(&id)).map_err(channel("event pipe"))?;
        let (stderr, stderr_writer) =
            make_fifo(&paths.stderr(&id)).map_err(channel("pipe for its standard error"))?;
        let api = paths.api(&id);
        let api_listener = private_listener(&api).map_err(channel("vmm's API socket"))?;

        let inherited = Inherited {
            events: event_writer.as_raw_fd(),
            api: api_listener.as_raw_fd(),
            tap: nic.as_deref().and_then(Nic::descriptor),
        };
        let card = nic.as_deref().and_then(Nic::options);
        let mut command = command::command(
            config,
            (request, goes, prefetches),
            chain,
            jail,
            card,
            inherited,
        );
        command.stderr(stderr_writer);
        let spawned = Instant::now();
        let child = command.spawn().map_err(|source| SpawnError::Execute {
            vmm: config.vmm.clone(),
            source,
        })?;
        // The process has its own; with ours gone, pipe and socket end when the process does.
        drop((command, event_writer, api_listener));
        if let Some(nic) = &mut nic {
            nic.handed_over();
        }
        info!(sandbox = %id, pid = child.id(), "vmm started");
        let note = Note::of(paths, request, &child, jail, nic.as_deref());
        let note = note.and_then(|note| note.write(paths, &id).map(|()| note));
        let note = note.map_err(SpawnError::Note)?;

        let process = Process::Child(child);
        let mut machine = Self::new(paths, &id, process, jail.is_some(), events, stderr);
        machine.process_id = Some(note.process);
        machine.goes = goes;
        machine.listener = listener;
        machine.created = created;
        machine.spawned = spawned;
        Ok(machine)
    }

    /// Takes over the process of a sandbox that an earlier daemon has started.
    pub fn take_over(
        paths: &Paths,
        id: &SandboxId,
        process: Process,
        is_jailed: bool,
    ) -> Result<Self, Box<(Process, io::Error)>> {
        let open = |path: PathBuf| pipe::OpenOptions::new().open_receiver(path);
        match (open(paths.events(id)), open(paths.stderr(id))) {
            (Ok(events), Ok(stderr)) => {
                Ok(Self::new(paths, id, process, is_jailed, events, stderr))
            }
            (Err(error), _) | (_, Err(error)) => Err(Box::new((process, error))),
        }
    }

    fn new(
        paths: &Paths,
        id: &SandboxId,
        process: Process,
        is_jailed: bool,
        events: pipe::Receiver,
        stderr: pipe::Receiver,
    ) -> Self {
        let (seen_sender, seen) = watch::channel(Seen::default());
        let now = Instant::now();
        Self {
            id: id.clone(),
            process,
            process_id: None,
            is_jailed,
            listener: None,
            ready_path: paths.ready(id),
            console: paths.console(id),
            control: Control::new(paths.api(id)),
            goes: Goes::On,
            seen,
            events: tokio::spawn(monitor::follow_events(id.clone(), events, seen_sender)),
            stderr: tokio::spawn(monitor::follow_stderr(id.clone(), stderr)),
            created: now,
            spawned: now,
            status: None,
        }
    }

    /// Waits until a machine that only goes on when told is restored; or for the process's end, or
    /// the timeout, whichever is first.
    pub async fn restored(&mut self, timeout: Duration) -> Result<(), NotReady> {
        let deadline = self.spawned + timeout;
        let mut seen = self.seen.clone();
        let restored = async {
            // If the events end, so does the process.
            if seen.wait_for(|seen| seen.restored).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            () = restored => Ok(()),
            status = self.process.wait() => Err(NotReady::Exited(status)),
            () = tokio::time::sleep_until(deadline.into()) => Err(NotReady::TimedOut(timeout)),
        }
    }

    /// Waits until the guest runs, its agent has answered and it knows who it is; or for the
    /// process's end, or the timeout, whichever is first. A machine that only goes on when told is
    /// told so, and its time counts from now.
    pub async fn ready(
        &mut self,
        agent: &AgentClient,
        greeting: &Greeting,
        network: Option<GuestNetwork>,
        timeout: Duration,
    ) -> Result<Created, NotReady> {
        let is_held = self.goes == Goes::WhenTold;
        if is_held {
            self.created = Instant::now();
            self.spawned = self.created;
        }
        let deadline = self.spawned + timeout;
        let control = is_held.then(|| self.control.clone());
        let mut seen = self.seen.clone();
        let listener = self.listener.take();
        let words = async {
            if let Some(control) = control {
                control.resume().await.map_err(NotReady::Control)?;
            }
            match &listener {
                Some(listener) => {
                    first_words(&self.id, listener)
                        .await
                        .map_err(NotReady::Listener)?;
                }
                None if is_held => {}
                // Its agent says nothing by itself. If the events end, so does the process.
                None => {
                    if seen
                        .wait_for(|seen| seen.resumed_us.is_some())
                        .await
                        .is_err()
                    {
                        std::future::pending::<()>().await;
                    }
                }
            }
            let spoke = Instant::now();
            agent
                .resumed(
                    &self.id,
                    &greeting.identity,
                    network.as_ref(),
                    deadline.into(),
                )
                .await
                .map_err(NotReady::Identity)?;
            Ok(spoke)
        };
        let spoke = tokio::select! {
            biased;
            spoke = words => spoke?,
            status = self.process.wait() => return Err(NotReady::Exited(status)),
            () = tokio::time::sleep_until(deadline.into()) => {
                return Err(NotReady::TimedOut(timeout));
            }
        };
        let now = Instant::now();
        if listener.is_some()
            && let Err(error) = std::fs::remove_file(&self.ready_path)
        {
            debug!(sandbox = %self.id, %error, "ready socket not removed");
        }
        let vmm_us = if is_held {
            micros(spoke - self.spawned)
        } else {
            let seen = self.seen.borrow();
            let runs_us = match listener {
                Some(_) => seen.booting_us,
                None => seen.resumed_us,
            };
            runs_us.unwrap_or(0)
        };
        let timings = Timings {
            start: greeting.start,
            prepare_us: micros(self.spawned - self.created),
            vmm_us,
            boot_us: micros(spoke - self.spawned).saturating_sub(vmm_us),
            identity_us: micros(now - spoke),
            readiness_us: 0,
            total_us: micros(now - self.created),
        };
        Ok(Created { timings })
    }

    /// The process, of one that was started here.
    pub fn process_id(&self) -> Option<&ProcessId> {
        self.process_id.as_ref()
    }

    /// The API of the VMM.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Waits for the end of the process.
    pub async fn exited(&mut self) {
        self.status = Some(self.process.wait().await);
    }

    /// Ends the process, whatever it does, and waits until it is gone.
    pub async fn kill(&mut self) {
        // A jailed VMM is two processes. Of this signal, the one that is known here ends the other,
        // and itself only when that is gone.
        if self.is_jailed {
            let _ = self.process.signal(Signal::QUIT);
            if tokio::time::timeout(QUIT_TIMEOUT, self.process.wait())
                .await
                .is_ok()
            {
                return;
            }
        }
        let killed = self.process.signal(Signal::KILL);
        if let Err(error) = killed {
            debug!(sandbox = %self.id, %error, "vmm not killed");
        }
        if let Err(error) = self.process.wait().await {
            debug!(sandbox = %self.id, %error, "vmm not waited for");
        }
    }

    /// Why a start failed, as sentences for the user. The process has ended.
    pub async fn explain_start(&mut self, why: NotReady) -> String {
        let mut text = match why {
            NotReady::TimedOut(timeout) => {
                format!(
                    "the guest's agent did not answer within {} s",
                    timeout.as_secs()
                )
            }
            NotReady::Exited(status) => match self.describe(&status).await {
                End::Orderly { reason } | End::Failed { reason } => {
                    format!("{reason} before its agent answered")
                }
            },
            NotReady::Listener(error) => format!("the agent's ready socket failed: {error}"),
            NotReady::Control(error) => crate::chain(&error),
            NotReady::Identity(error) | NotReady::Network(error) | NotReady::Silent(error) => {
                error.to_string()
            }
            NotReady::Disk(reason) => reason,
            NotReady::Destroyed => "the sandbox was destroyed in the meantime".to_owned(),
        };
        self.add_console(&mut text).await;
        text
    }

    /// How the process ended, after [`Machine::exited`].
    pub async fn explain_end(&mut self) -> End {
        let status = self.status.take();
        let status = status.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
        let mut end = self.describe(&status).await;
        let code = status.ok().flatten().and_then(|status| status.code());
        // What the guest did to end itself, its console may explain.
        if let (Some(exit::PANIC | exit::TRIPLE_FAULT), End::Failed { reason }) = (code, &mut end) {
            self.add_console(reason).await;
        }
        end
    }

    async fn describe(&mut self, status: &io::Result<Option<ExitStatus>>) -> End {
        // Both pipes end with the process, unless it has given them to another.
        let last_words = async {
            let stderr = (&mut self.stderr).await.unwrap_or_default();
            let _ = (&mut self.events).await;
            stderr
        };
        let stderr = match tokio::time::timeout(LAST_WORDS, last_words).await {
            Ok(stderr) => stderr,
            Err(_) => {
                warn!(sandbox = %self.id, "the vmm has ended, but its pipes have not");
                String::new()
            }
        };
        let told = self.seen.borrow().end.clone();
        describe_end(status, told, &stderr)
    }

    async fn add_console(&self, text: &mut String) {
        match console_end(&self.console, CONSOLE_TAIL).await {
            Ok(tail) if !tail.is_empty() => {
                let _ = write!(text, "; its console ends with:\n{tail}");
            }
            Ok(_) => {}
            Err(error) => debug!(sandbox = %self.id, %error, "no console log"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.events.abort();
        self.stderr.abort();
    }
}

/// Whole microseconds.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A socket that nobody but this user may connect to.
fn private_listener(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Makes a pipe with a name, and returns both of its ends.
///
/// Who holds the end that is written to can read it as well: so the pipe has a reader, and what is
/// written waits, while there is no daemon. What has no room is lost, rather than that anybody waits.
fn make_fifo(path: &Path) -> io::Result<(pipe::Receiver, OwnedFd)> {
    let owner = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, owner, 0)?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let writer = rustix::fs::open(path, flags, Mode::empty())?;
    let reader = pipe::OpenOptions::new().open_receiver(path)?;
    Ok((reader, writer))
}

/// Waits until someone in the guest says that the agent is ready. What else is said there is
/// skipped: a guest that talks nonsense keeps only itself from being started.
async fn first_words(id: &SandboxId, listener: &UnixListener) -> io::Result<Ready> {
    loop {
        let (stream, _) = listener.accept().await?;
        let mut line = Vec::new();
        let mut reader = BufReader::new(stream.take(MAX_READY));
        if let Err(error) = reader.read_until(b'\n', &mut line).await {
            debug!(sandbox = %id, %error, "ready connection broke off");
            continue;
        }
        match serde_json::from_slice::<Ready>(&line) {
            Ok(ready) => {
                info!(sandbox = %id, agent = ready.version, kernel = ready.kernel,
                    entered_us = ready.entered_us, serving_us = ready.serving_us,
                    "guest agent is ready");
                return Ok(ready);
            }
            Err(error) => warn!(sandbox = %id, %error, "ready message makes no sense"),
        }
    }
}

/// The end of a console's log, of at most `max` bytes, as text.
pub(super) async fn console_end(path: &Path, max: u64) -> io::Result<String> {
    let mut file = File::open(path).await?;
    let len = file.metadata().await?.len();
    file.seek(io::SeekFrom::Start(len.saturating_sub(max)))
        .await?;
    let mut tail = Vec::new();
    file.take(max).read_to_end(&mut tail).await?;
    Ok(monitor::readable(&tail))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nonsense_before_the_agents_words_is_skipped() {
        use tokio::io::AsyncWriteExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready");
        let listener = UnixListener::bind(&path).unwrap();
        let said = Ready {
            version: "1".into(),
            kernel: "6".into(),
            entered_us: 1,
            serving_us: 2,
        };
        let speak = async {
            for words in [
                b"what?\n".to_vec(),
                Vec::new(),
                serde_json::to_vec(&said).unwrap(),
            ] {
                let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
                stream.write_all(&words).await.unwrap();
            }
        };
        let id = SandboxId::random();
        let (ready, ()) = tokio::join!(first_words(&id, &listener), speak);
        assert_eq!(ready.unwrap(), said);
    }
}
