//! Exec: from the request to a running program.
//!
//! [`start`] checks the request and starts the program, so that whatever is wrong can still be
//! answered as an HTTP error. [`session::run`] then carries its streams over the connection.

mod group;
mod session;
mod spawn;

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::Path,
    rc::Rc,
    time::{Duration, Instant},
};

use agent_protocol::{ErrorCode, ExecRequest, TerminalSize};
use rustix::{
    fs::{Gid, Uid},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitStatus},
};
use tokio::{
    net::unix::pipe::{Receiver, Sender},
    sync::oneshot,
};

pub use group::{Cgroups, ProcessGroup};
pub use session::{drop_output, read, run, send, supervise};
use spawn::{Plan, Step};

use crate::{
    process::Terminal,
    reaper::Reaper,
    users::{self, Account, UserError},
};

/// What programs take their terminal for, if they ask although they have none.
const DEFAULT_TERM: &str = "xterm";
/// What programs take their terminal for that have one.
const TERMINAL_TYPE: &str = "xterm-256color";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a program was not started.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The request cannot be carried out as it stands.
    #[error("{0}")]
    Request(&'static str),
    /// The user is not there.
    #[error("cannot run as this user")]
    User(#[from] UserError),
    /// The agent may not take on the user.
    #[error("the agent may not run programs as user {name:?}")]
    Credentials {
        /// The user.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The working directory cannot be entered.
    #[error("cannot enter the working directory {path:?}")]
    Cwd {
        /// The directory.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program is not there.
    #[error("{program:?}: command not found{hint}")]
    NotFound {
        /// The program as it was asked for.
        program: String,
        /// Where it was looked for.
        hint: &'static str,
    },
    /// The program is there and does not run.
    #[error("{program:?} cannot be executed")]
    NotExecutable {
        /// The program as it was asked for.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The system refused to make a process.
    #[error("cannot make a process for {program:?}")]
    System {
        /// The program as it was asked for.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ExecError {
    /// The code that the host gets.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Request(_) | Self::User(UserError::Malformed(_)) => ErrorCode::BadRequest,
            Self::User(UserError::Database { .. }) => ErrorCode::Internal,
            Self::User(_) => ErrorCode::UnknownUser,
            Self::Credentials { .. } => ErrorCode::PermissionDenied,
            Self::Cwd { .. } => ErrorCode::BadCwd,
            Self::NotFound { .. } => ErrorCode::CommandNotFound,
            Self::NotExecutable { source, .. } | Self::System { source, .. } => {
                match source.raw_os_error() {
                    Some(libc::E2BIG) => ErrorCode::BadRequest,
                    Some(libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE) => {
                        ErrorCode::OutOfResources
                    }
                    _ if matches!(self, Self::NotExecutable { .. }) => {
                        ErrorCode::CommandNotExecutable
                    }
                    _ => ErrorCode::Internal,
                }
            }
        }
    }
}

/// A program that runs. Dropping it kills the program.
#[derive(Debug)]
pub struct Running {
    /// Its first process.
    pub leader: Leader,
    stdin: Option<Sender>,
    /// What it writes to its standard output.
    pub stdout: Receiver,
    /// What it writes to its standard error.
    pub stderr: Receiver,
}

/// The first process of a program, and with it all others. Dropping it kills them.
#[derive(Debug)]
pub struct Leader {
    /// Its id.
    pub pid: Pid,
    /// It and all that it starts.
    pub group: ProcessGroup,
    /// How it ends.
    pub exit: oneshot::Receiver<WaitStatus>,
    /// When it was started.
    pub started: Instant,
    /// How long it may run.
    pub timeout: Option<Duration>,
}

/// Starts the program that `request` describes.
///
/// # Errors
/// [`ExecError`]; no process is left then.
pub async fn start(
    request: ExecRequest,
    reaper: &Rc<Reaper>,
    cgroups: Option<&Rc<Cgroups>>,
) -> Result<Running, ExecError> {
    check(&request)?;
    let account = users::resolve(request.user.as_deref(), Path::new("/etc"))?;
    let streams =
        Streams::open(request.stdin, &account).map_err(|source| system(&request, source))?;
    let leader = launch(&request, &account, streams.theirs, None, reaper, cgroups).await?;
    Ok(Running {
        leader,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
    })
}

/// Starts the program that `request` describes on a terminal of its own.
///
/// # Errors
/// [`ExecError`]; no process is left then.
pub async fn start_on_terminal(
    request: ExecRequest,
    size: TerminalSize,
    reaper: &Rc<Reaper>,
    cgroups: Option<&Rc<Cgroups>>,
) -> Result<(Leader, Terminal), ExecError> {
    check(&request)?;
    if size.cols == 0 || size.rows == 0 {
        return Err(ExecError::Request(
            "a terminal has at least one column and one row",
        ));
    }
    let account = users::resolve(request.user.as_deref(), Path::new("/etc"))?;
    let opened = Terminal::open(size, account.uid, account.gid).and_then(|(ours, theirs)| {
        let stdio = [theirs.try_clone()?, theirs.try_clone()?, theirs];
        Ok((ours, stdio))
    });
    let (terminal, stdio) = opened.map_err(|source| system(&request, source))?;
    let term = Some(TERMINAL_TYPE);
    let leader = launch(&request, &account, stdio, term, reaper, cgroups).await?;
    Ok((leader, terminal))
}

fn system(request: &ExecRequest, source: io::Error) -> ExecError {
    ExecError::System {
        program: request.argv.first().cloned().unwrap_or_default(),
        source,
    }
}

/// Starts a program on these streams, which are a terminal of type `terminal`, if that is given.
async fn launch(
    request: &ExecRequest,
    account: &Account,
    stdio: [OwnedFd; 3],
    terminal: Option<&str>,
    reaper: &Rc<Reaper>,
    cgroups: Option<&Rc<Cgroups>>,
) -> Result<Leader, ExecError> {
    let env = environment(request, account, terminal.unwrap_or(DEFAULT_TERM));
    let program = request.argv[0].clone();
    let system = |source: io::Error| system(request, source);
    let credentials = credentials(account)?;
    let (cgroup, procs) = match cgroups {
        Some(cgroups) => {
            let (cgroup, procs) = cgroups.create().map_err(system)?;
            (Some(cgroup), Some(procs))
        }
        None => (None, None),
    };
    let plan = Plan {
        programs: candidates(&program, env.get("PATH").map_or("", String::as_str)),
        argv: request.argv.iter().map(|arg| c_string(arg)).collect(),
        env: env
            .iter()
            .map(|(name, value)| c_string(&format!("{name}={value}")))
            .collect(),
        cwd: match &request.cwd {
            Some(cwd) => vec![c_string(cwd)],
            None => vec![c_string(&account.home), c"/".to_owned()],
        },
        credentials,
        stdio,
        terminal: terminal.is_some(),
        cgroup: procs,
    };

    let started = Instant::now();
    let launch = spawn::fork(plan).map_err(|failure| system(failure.error))?;
    // From here on an early return kills and reaps the child.
    let exit = reaper.exit_of(launch.pid);
    let group = ProcessGroup::new(launch.pid, reaper.clone(), cgroup);
    if let Err(failure) = launch.started().await {
        return Err(explain(failure, request, account));
    }
    Ok(Leader {
        pid: launch.pid,
        group,
        exit,
        started,
        timeout: request.timeout_ms.map(Duration::from_millis),
    })
}

fn check(request: &ExecRequest) -> Result<(), ExecError> {
    let refuse = |what| Err(ExecError::Request(what));
    if request.argv.first().is_none_or(String::is_empty) {
        return refuse("argv is empty; expected a program and its arguments");
    }
    if request.argv.iter().any(|arg| arg.contains('\0')) {
        return refuse("an argument holds a NUL character, which no program can receive");
    }
    for (name, value) in &request.env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return refuse("the name of a variable is empty or holds = or NUL");
        }
        if value.contains('\0') {
            return refuse("the value of a variable holds a NUL character");
        }
    }
    if let Some(cwd) = &request.cwd
        && (!cwd.starts_with('/') || cwd.contains('\0'))
    {
        return refuse("cwd is not an absolute path");
    }
    if request.timeout_ms == Some(0) {
        return refuse("timeout_ms is 0; expected at least 1, or none");
    }
    Ok(())
}

/// Cut at a NUL, which [`check`] has refused in requests, and which has no place in `/etc/passwd`.
fn c_string(text: &str) -> CString {
    let end = text.find('\0').unwrap_or(text.len());
    CString::new(&text[..end]).unwrap_or_default()
}

fn environment(request: &ExecRequest, account: &Account, term: &str) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    if !request.env_clear {
        for (name, value) in [
            ("PATH", DEFAULT_PATH),
            ("HOME", &account.home),
            ("USER", &account.name),
            ("LOGNAME", &account.name),
            ("SHELL", &account.shell),
            ("LANG", "C.UTF-8"),
            ("TERM", term),
        ] {
            env.insert(name.to_owned(), value.to_owned());
        }
    }
    env.extend(request.env.clone());
    env
}

/// Where to look for `program`, in the order of execvp(3).
fn candidates(program: &str, path: &str) -> Vec<CString> {
    if program.contains('/') {
        return vec![c_string(program)];
    }
    let path = if path.is_empty() { DEFAULT_PATH } else { path };
    path.split(':')
        .map(|directory| match directory {
            // An empty entry stands for the working directory.
            "" => c_string(&format!("./{program}")),
            _ => c_string(&format!("{directory}/{program}")),
        })
        .collect()
}

/// The user to take on; none if the agent has no right to and already is that user.
fn credentials(account: &Account) -> Result<Option<(u32, u32, Vec<u32>)>, ExecError> {
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return Ok(Some((account.uid, account.gid, account.groups.clone())));
    }
    if account.uid == uid.as_raw() {
        return Ok(None);
    }
    Err(ExecError::Credentials {
        name: account.name.clone(),
        source: io::Error::from_raw_os_error(libc::EPERM),
    })
}

/// The pipes between the agent and the program.
struct Streams {
    stdin: Option<Sender>,
    stdout: Receiver,
    stderr: Receiver,
    theirs: [OwnedFd; 3],
}

impl Streams {
    fn open(stdin: bool, account: &Account) -> io::Result<Self> {
        let (their_stdin, our_stdin) = if stdin {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&write, true)?;
            (read, Some(Sender::from_owned_fd(write)?))
        } else {
            (File::open("/dev/null")?.into(), None)
        };
        let (stdout, their_stdout) = output(account)?;
        let (stderr, their_stderr) = output(account)?;
        Ok(Self {
            stdin: our_stdin,
            stdout,
            stderr,
            theirs: [their_stdin, their_stdout, their_stderr],
        })
    }
}

fn output(account: &Account) -> io::Result<(Receiver, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&read, true)?;
    // A program may open /dev/stdout again, for which the pipe has to belong to its user.
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    if rustix::process::geteuid().is_root() {
        rustix::fs::fchown(&write, Some(uid), Some(gid))?;
    }
    Ok((Receiver::from_owned_fd(read)?, write))
}

fn explain(failure: spawn::Failure, request: &ExecRequest, account: &Account) -> ExecError {
    let program = request.argv[0].clone();
    let source = failure.error;
    match (failure.step, source.raw_os_error()) {
        (Some(Step::Exec), Some(libc::ENOENT | libc::ENOTDIR)) => ExecError::NotFound {
            hint: if program.contains('/') {
                " (there is no such file, or the interpreter that it names is missing)"
            } else {
                " in PATH"
            },
            program,
        },
        (Some(Step::Exec), _) => ExecError::NotExecutable { program, source },
        (Some(Step::Cwd), _) => ExecError::Cwd {
            path: request.cwd.clone().unwrap_or_else(|| "/".to_owned()),
            source,
        },
        (Some(Step::Credentials), _) => ExecError::Credentials {
            name: account.name.clone(),
            source,
        },
        (Some(Step::Cgroup | Step::Setup) | None, _) => ExecError::System { program, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(json: &str) -> ExecRequest {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn requests_that_no_program_can_receive_are_refused() {
        for json in [
            r#"{"argv":[]}"#,
            r#"{"argv":[""]}"#,
            r#"{"argv":["a\u0000"]}"#,
            r#"{"argv":["a"],"env":{"":"x"}}"#,
            r#"{"argv":["a"],"env":{"A=B":"x"}}"#,
            r#"{"argv":["a"],"env":{"A":"\u0000"}}"#,
            r#"{"argv":["a"],"cwd":"tmp"}"#,
            r#"{"argv":["a"],"timeout_ms":0}"#,
        ] {
            let error = check(&request(json)).unwrap_err();
            assert_eq!(error.code(), ErrorCode::BadRequest, "{json}");
        }
        assert!(check(&request(r#"{"argv":["a",""],"env":{"A":""}}"#)).is_ok());
    }

    #[test]
    fn programs_are_looked_up_as_a_shell_does() {
        let list = |program, path| {
            candidates(program, path)
                .into_iter()
                .map(|c| c.into_string().unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(list("ls", "/bin::/opt/x"), ["/bin/ls", "./ls", "/opt/x/ls"]);
        assert_eq!(list("./ls", "/bin"), ["./ls"]);
        assert_eq!(list("ls", "").len(), DEFAULT_PATH.split(':').count());
    }

    #[test]
    fn given_variables_win_over_defaults() {
        let account = users::resolve(Some("0"), Path::new("/nowhere")).unwrap();
        let env = environment(
            &request(r#"{"argv":["a"],"env":{"PATH":"/x","A":"b"}}"#),
            &account,
            DEFAULT_TERM,
        );
        assert_eq!(env["PATH"], "/x");
        assert_eq!((env["A"].as_str(), env["LANG"].as_str()), ("b", "C.UTF-8"));
        let clear = environment(
            &request(r#"{"argv":["a"],"env_clear":true}"#),
            &account,
            DEFAULT_TERM,
        );
        assert!(clear.is_empty());
    }
}
