//! Processes that belong to no connection: started, listed, signalled, and followed by whoever is
//! attached.
//!
//! One task for each reads its output into its [`Backlog`] until it ends. Who is attached
//! ([`attach`]) has a place in that and no buffer of its own, so that neither a reader that does not
//! read nor a process that does not stop writing costs more than the bounds that the protocol tells.

mod attach;
mod backlog;
mod terminal;

use std::{
    cell::{Cell, RefCell},
    io,
    pin::pin,
    rc::Rc,
    time::Instant,
};

use agent_protocol::{
    BACKGROUND_GRACE, ErrorCode, Exit, MAX_ATTACHED, MAX_ENDED, MAX_PROCESSES, MAX_TOLD_ARGV,
    Process, ProcessList, ProcessRef, StartProcess, check_tag,
};
use rustix::process::Signal;
use tokio::{
    net::unix::pipe::Receiver,
    sync::{Notify, oneshot},
};

pub use attach::attach;
use backlog::{Backlog, PIECE, Source};
pub use terminal::Terminal;

use crate::{
    exec::{self, Cgroups, ExecError, Leader, ProcessGroup, Running},
    log::warning,
    reaper::Reaper,
};

/// Why nothing was done to a process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The request makes no sense.
    #[error("{0}")]
    Request(&'static str),
    /// Another process has the tag.
    #[error("process {pid} runs with the tag {tag:?}; choose another, or end that one first")]
    TagInUse {
        /// The tag.
        tag: String,
        /// Whose it is; 0 if that is just being started.
        pid: u32,
    },
    /// There are too many.
    #[error("{MAX_PROCESSES} processes run in the background, and no more can; end one first")]
    TooMany,
    /// Too many are attached.
    #[error("{MAX_ATTACHED} clients follow processes, and no more can")]
    TooManyAttached,
    /// There is none of that name.
    #[error("no process {0} runs in the background, or has done so lately")]
    Unknown(ProcessRef),
    /// It does not run any more.
    #[error("process {0} has ended")]
    Ended(ProcessRef),
    /// It was not started.
    #[error("the program was not started")]
    Exec(#[from] ExecError),
    /// The signal was not sent.
    #[error("the signal was not sent")]
    Signal(#[source] io::Error),
}

impl ProcessError {
    /// The code that the host gets.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Request(_) => ErrorCode::BadRequest,
            Self::TagInUse { .. } => ErrorCode::TagInUse,
            Self::TooMany | Self::TooManyAttached => ErrorCode::OutOfResources,
            Self::Unknown(_) | Self::Ended(_) => ErrorCode::NoSuchProcess,
            Self::Exec(error) => error.code(),
            Self::Signal(_) => ErrorCode::Internal,
        }
    }
}

/// All processes that are kept.
#[derive(Debug, Default)]
pub struct Processes {
    /// In the order in which they were started.
    kept: RefCell<Vec<Rc<Kept>>>,
    /// Tags of those that are being started.
    starting: RefCell<Vec<String>>,
    attached: Cell<usize>,
}

/// A process that is kept. It runs as long as its task has it.
#[derive(Debug)]
pub struct Kept {
    pid: u32,
    tag: String,
    argv: Vec<String>,
    group: ProcessGroup,
    has_terminal: bool,
    /// Until the process has ended.
    terminal: RefCell<Option<Rc<Terminal>>>,
    backlog: RefCell<Backlog>,
    exit: RefCell<Option<Exit>>,
    /// There is more output, or the end.
    changed: Notify,
}

/// Counts one who is attached, until it is dropped.
#[derive(Debug)]
pub struct Attachment {
    owner: Rc<Processes>,
    /// To what.
    pub kept: Rc<Kept>,
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.owner.attached.set(self.owner.attached.get() - 1);
    }
}

/// Takes a tag back that is no longer being started.
struct Starting<'a> {
    owner: &'a Processes,
    tag: String,
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        let mut starting = self.owner.starting.borrow_mut();
        if let Some(at) = starting.iter().position(|tag| *tag == self.tag) {
            starting.remove(at);
        }
    }
}

/// What a process writes to.
enum Output {
    Pipes([Option<Receiver>; 2]),
    Terminal(Rc<Terminal>),
}

impl Processes {
    /// Starts a process.
    ///
    /// # Errors
    /// [`ProcessError`]; no process is left then.
    pub async fn start(
        self: &Rc<Self>,
        request: StartProcess,
        reaper: &Rc<Reaper>,
        cgroups: Option<&Rc<Cgroups>>,
    ) -> Result<Process, ProcessError> {
        check_tag(&request.tag).map_err(ProcessError::Request)?;
        if request.exec.stdin {
            let problem = "a process in the background has no stdin but its terminal";
            return Err(ProcessError::Request(problem));
        }
        let _starting = self.reserve(&request.tag)?;
        let argv = told(&request.exec.argv);
        let (leader, output) = match request.terminal {
            Some(size) => {
                let started = exec::start_on_terminal(request.exec, size, reaper, cgroups);
                let (leader, terminal) = started.await?;
                (leader, Output::Terminal(Rc::new(terminal)))
            }
            None => {
                let running = exec::start(request.exec, reaper, cgroups).await?;
                let Running {
                    leader,
                    stdout,
                    stderr,
                    ..
                } = running;
                (leader, Output::Pipes([Some(stdout), Some(stderr)]))
            }
        };
        let Leader {
            pid,
            group,
            exit,
            started,
            timeout,
        } = leader;
        let kept = Rc::new(Kept {
            pid: u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0),
            tag: request.tag,
            argv,
            group,
            has_terminal: matches!(output, Output::Terminal(_)),
            terminal: RefCell::new(match &output {
                Output::Terminal(terminal) => Some(terminal.clone()),
                Output::Pipes(_) => None,
            }),
            backlog: RefCell::default(),
            exit: RefCell::default(),
            changed: Notify::new(),
        });
        self.kept.borrow_mut().push(kept.clone());
        let process = kept.told();
        let owner = self.clone();
        tokio::task::spawn_local(async move {
            kept.follow(exit, timeout, started, output).await;
            owner.forget();
        });
        Ok(process)
    }

    fn reserve(&self, tag: &str) -> Result<Starting<'_>, ProcessError> {
        let in_use = |pid| {
            Err(ProcessError::TagInUse {
                tag: tag.to_owned(),
                pid,
            })
        };
        let mut starting = self.starting.borrow_mut();
        if starting.iter().any(|other| other == tag) {
            return in_use(0);
        }
        let kept = self.kept.borrow();
        let mut running = kept.iter().filter(|kept| !kept.has_ended());
        if let Some(other) = running.clone().find(|kept| kept.tag == tag) {
            return in_use(other.pid);
        }
        if running.by_ref().count() + starting.len() >= MAX_PROCESSES {
            return Err(ProcessError::TooMany);
        }
        starting.push(tag.to_owned());
        Ok(Starting {
            owner: self,
            tag: tag.to_owned(),
        })
    }

    /// Forgets the oldest of those that have ended.
    fn forget(&self) {
        let mut kept = self.kept.borrow_mut();
        let ended = kept.iter().filter(|kept| kept.has_ended()).count();
        let mut too_many = ended.saturating_sub(MAX_ENDED);
        kept.retain(|kept| {
            let goes = too_many > 0 && kept.has_ended();
            too_many -= usize::from(goes);
            !goes
        });
    }

    /// All of them.
    pub fn list(&self) -> ProcessList {
        ProcessList {
            processes: self.kept.borrow().iter().map(|kept| kept.told()).collect(),
        }
    }

    fn find(&self, process: &ProcessRef) -> Result<Rc<Kept>, ProcessError> {
        let kept = self.kept.borrow();
        let mut named = kept.iter().rev().filter(|kept| match process {
            ProcessRef::Pid(pid) => kept.pid == *pid,
            ProcessRef::Tag(tag) => kept.tag == *tag,
        });
        let running = named.clone().find(|kept| !kept.has_ended());
        let found = running.or_else(|| named.next()).cloned();
        found.ok_or_else(|| ProcessError::Unknown(process.clone()))
    }

    /// Sends a signal to a process that runs, with 9 to all that it has started.
    ///
    /// # Errors
    /// There is none, or the signal cannot be sent.
    pub fn signal(&self, process: &ProcessRef, signal: i32) -> Result<(), ProcessError> {
        let valid = (1..=31).contains(&signal);
        let signal = valid.then(|| Signal::from_named_raw(signal)).flatten();
        let signal = signal.ok_or(ProcessError::Request("signal must be 1 to 31"))?;
        let kept = self.find(process)?;
        if kept.has_ended() {
            return Err(ProcessError::Ended(process.clone()));
        }
        if signal == Signal::KILL {
            kept.group.kill();
            return Ok(());
        }
        kept.group.signal(signal).map_err(ProcessError::Signal)
    }

    /// Begins to follow a process.
    ///
    /// # Errors
    /// There is none, or too many do.
    pub fn attach(self: &Rc<Self>, process: &ProcessRef) -> Result<Attachment, ProcessError> {
        let kept = self.find(process)?;
        if self.attached.get() >= MAX_ATTACHED {
            return Err(ProcessError::TooManyAttached);
        }
        self.attached.set(self.attached.get() + 1);
        Ok(Attachment {
            owner: self.clone(),
            kept,
        })
    }
}

impl Kept {
    fn has_ended(&self) -> bool {
        self.exit.borrow().is_some()
    }

    fn told(&self) -> Process {
        Process {
            pid: self.pid,
            tag: self.tag.clone(),
            argv: self.argv.clone(),
            terminal: self.has_terminal,
            exit: self.exit.borrow().clone(),
        }
    }

    /// Reads its output until it has ended.
    async fn follow(
        &self,
        exit: oneshot::Receiver<rustix::process::WaitStatus>,
        timeout: Option<std::time::Duration>,
        started: Instant,
        output: Output,
    ) {
        let (exited, exited_at) = oneshot::channel();
        let supervision = async {
            let exit = exec::supervise(exit, timeout, &self.group, started).await;
            let _ = exited.send(tokio::time::Instant::now());
            exit
        };
        let (exit, left) = tokio::join!(supervision, self.collect(output, exited_at));
        if let Err(error) = &left {
            warning!("the output of process {} is lost: {error}", self.pid);
        }
        for pipe in left.into_iter().flatten() {
            tokio::task::spawn_local(exec::drop_output(pipe));
        }
        self.terminal.replace(None);
        self.backlog.borrow_mut().shrink();
        self.exit.replace(Some(exit));
        self.changed.notify_waiters();
    }

    fn push(&self, source: Source, bytes: &[u8]) {
        self.backlog.borrow_mut().push(source, bytes);
        self.changed.notify_waiters();
    }

    /// Reads what the process writes until that ends, or a moment after the process has; returns the
    /// pipes that have not ended.
    async fn collect(
        &self,
        output: Output,
        exited_at: oneshot::Receiver<tokio::time::Instant>,
    ) -> io::Result<Vec<Receiver>> {
        let mut grace = pin!(async {
            match exited_at.await {
                Ok(at) => tokio::time::sleep_until(at + BACKGROUND_GRACE).await,
                Err(_) => std::future::pending().await,
            }
        });
        let mut buffer = vec![0; PIECE];
        let mut pipes = match output {
            Output::Pipes(pipes) => pipes,
            Output::Terminal(terminal) => {
                let mut last = None;
                while last != Some(0) {
                    let len = tokio::select! {
                        len = terminal.read(&mut buffer) => len?,
                        () = &mut grace, if last.is_none() => {
                            // As much as there is now, however fast others go on writing.
                            last = Some(terminal.waiting());
                            continue;
                        }
                    };
                    self.push(Source::Stdout, &buffer[..len]);
                    match &mut last {
                        _ if len == 0 => break,
                        Some(left) => *left = left.saturating_sub(len as u64),
                        None => {}
                    }
                }
                return Ok(Vec::new());
            }
        };
        let sources = [Source::Stdout, Source::Stderr];
        while pipes.iter().any(Option::is_some) {
            let [stdout, stderr] = &pipes;
            let index = tokio::select! {
                ready = readable(stdout) => { ready?; 0 }
                ready = readable(stderr) => { ready?; 1 }
                () = &mut grace => {
                    for (pipe, source) in pipes.iter_mut().zip(sources) {
                        self.read_remainder(pipe, source, &mut buffer)?;
                    }
                    break;
                }
            };
            self.read_some(&mut pipes[index], sources[index], &mut buffer)?;
        }
        Ok(pipes.into_iter().flatten().collect())
    }

    /// Reads what a pipe has; returns its length, and takes away a pipe that has ended.
    fn read_some(
        &self,
        pipe: &mut Option<Receiver>,
        source: Source,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        let Some(open) = pipe else { return Ok(0) };
        match open.try_read(buffer) {
            Ok(0) => {
                *pipe = None;
                Ok(0)
            }
            Ok(len) => {
                self.push(source, &buffer[..len]);
                Ok(len)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Reads as much as the pipe holds now.
    fn read_remainder(
        &self,
        pipe: &mut Option<Receiver>,
        source: Source,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let Some(open) = pipe else { return Ok(()) };
        let mut left = rustix::io::ioctl_fionread(&*open)?;
        while left > 0 {
            match self.read_some(pipe, source, buffer)? {
                0 => break,
                len => left = left.saturating_sub(len as u64),
            }
        }
        Ok(())
    }
}

async fn readable(pipe: &Option<Receiver>) -> io::Result<()> {
    match pipe {
        Some(pipe) => pipe.readable().await,
        None => std::future::pending().await,
    }
}

/// As much of the arguments as is told.
fn told(argv: &[String]) -> Vec<String> {
    let mut left = MAX_TOLD_ARGV;
    let mut told = Vec::new();
    for arg in argv {
        if left == 0 {
            break;
        }
        let end = arg.floor_char_boundary(left);
        told.push(arg[..end].to_owned());
        // Each has a place in the list, even if it is empty.
        left = left.saturating_sub(arg.len().max(16));
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_arguments_are_told_in_part() {
        let long = "\u{fc}".repeat(MAX_TOLD_ARGV);
        let few = told(&["sh".to_owned(), long.clone(), "x".to_owned()]);
        assert_eq!(few.len(), 2);
        assert!(few[1].len() > MAX_TOLD_ARGV - 20 && long.starts_with(&few[1]));
        assert_eq!(
            told(&vec![String::new(); 1 << 16]).len(),
            MAX_TOLD_ARGV / 16
        );
    }
}
