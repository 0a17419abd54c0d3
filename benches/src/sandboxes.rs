//! The operations of the daemon, from outside: what a user waits for, by HTTP.
//!
//! Each daemon is one of its own, with its data in a temporary directory. A time ends when the
//! first command in the sandbox has answered, since nobody is helped by a sandbox before that.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use ureq::Agent;

use crate::stage::{Stage, StageError};
use crate::stream::{self, Latencies, StreamError};

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(300);

/// How much of the end of a daemon's log is kept, in lines.
const LAST_LINES: usize = 60;

/// Where the API is served that has users.
const API: &str = "/api/v1";

/// A bench asks more often than users may.
const UNLIMITED: &str = "[auth]\nrequests_per_minute = 0\nrequests_per_hour = 0\n";

/// The phases of a start that a daemon tells of.
const PHASES: [&str; 5] = ["prepare", "vmm", "boot", "identity", "total"];

/// What a daemon is started with, as options of a program.
#[derive(Debug, Clone, clap::Args)]
pub struct Programs {
    /// The daemon.
    #[arg(long, value_name = "PATH", default_value = "target/release/sandboxd")]
    pub sandboxd: PathBuf,
    /// The VMM.
    #[arg(long, value_name = "PATH", default_value = "target/release/vmm")]
    pub vmm: PathBuf,
    /// Directory with kernel, initramfs and template.
    #[arg(long, value_name = "DIR", default_value = "target/images")]
    pub images: PathBuf,
}

impl Programs {
    /// Copies of them in `stage`: a checkout that is shared with an emulated host is read anew for each
    /// process, as no disk is.
    ///
    /// # Errors
    /// One of them cannot be copied.
    pub fn copied_to(&self, stage: &Stage) -> Result<Self, StageError> {
        let images = stage.directory().join("images");
        std::fs::create_dir(&images).map_err(StageError::Directory)?;
        for image in ["vmlinux", "initramfs.cpio", "minimal.ext4"] {
            stage.copy(&self.images.join(image), &format!("images/{image}"))?;
        }
        Ok(Self {
            sandboxd: stage.copy(&self.sandboxd, "sandboxd")?,
            vmm: stage.copy(&self.vmm, "vmm")?,
            images,
        })
    }
}

/// Why a measure came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The daemon cannot be started.
    #[error("cannot start {program}", program = program.display())]
    Start {
        /// Its binary.
        program: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The daemon ended before it served.
    #[error("the daemon ended before it told its address; it said: {0}")]
    Silent(String),
    /// No answer.
    #[error("{request}")]
    Request {
        /// What was asked.
        request: String,
        /// Why there is no answer.
        #[source]
        source: Box<ureq::Error>,
    },
    /// Another answer than expected.
    #[error("{request}: {status} {body}")]
    Refused {
        /// What was asked.
        request: String,
        /// The status.
        status: u16,
        /// The answer.
        body: Value,
    },
    /// No warm snapshot came about.
    #[error("no sandbox started warm within {} s", PATIENCE.as_secs())]
    NotWarm,
    /// A stream was not measured.
    #[error("the output of a command")]
    Stream(#[from] StreamError),
    /// A directory or `/proc` failed.
    #[error("the system")]
    System(#[from] io::Error),
}

/// How a daemon starts sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Starts {
    /// It boots them.
    Cold,
    /// It restores them when they are asked for, and their memory comes as they touch it.
    Bare,
    /// It restores them when they are asked for.
    Warm,
    /// It has restored one before.
    Pool,
}

/// A sandbox that was created.
#[derive(Debug)]
pub struct Created {
    /// Its id.
    pub id: String,
    /// How it started.
    pub start: String,
    /// How long each phase took, in ms.
    pub phases: Vec<(&'static str, f64)>,
}

/// A running daemon, which is ended in order when dropped.
pub struct Daemon {
    process: Child,
    address: String,
    agent: Agent,
    /// `Authorization` of its requests to `/api/v1`.
    bearer: String,
    vmm: PathBuf,
    /// The last lines of its log.
    log: Arc<Mutex<VecDeque<String>>>,
    /// One for each machine that has become ready.
    ready: Mutex<Receiver<()>>,
    /// One for each warm snapshot that was made.
    warm: Mutex<Receiver<()>>,
    directory: tempfile::TempDir,
}

impl Daemon {
    /// Starts a daemon.
    ///
    /// # Errors
    /// It does not come to serve.
    pub fn start(programs: &Programs, starts: Starts) -> Result<Self, SandboxError> {
        let directory = tempfile::tempdir()?;
        let config = directory.path().join("config.toml");
        std::fs::write(&config, UNLIMITED)?;
        let mut process = Command::new(&programs.sandboxd)
            .args(["serve", "--listen", "127.0.0.1:0", "--log-format", "json"])
            .args(["--on-stop", "delete"])
            .arg("--config")
            .arg(&config)
            .arg("--data-dir")
            .arg(directory.path().join("data"))
            .arg("--runtime-dir")
            .arg(directory.path().join("run"))
            .arg("--vmm")
            .arg(&programs.vmm)
            .arg("--images-dir")
            .arg(&programs.images)
            .args([
                "--warm-disk-bytes",
                if starts == Starts::Cold {
                    "0"
                } else {
                    "4294967296"
                },
            ])
            .args([
                "--prefetch",
                if starts == Starts::Bare {
                    "false"
                } else {
                    "true"
                },
            ])
            .args([
                "--pool-size",
                if starts == Starts::Pool { "1" } else { "0" },
            ])
            // A machine that is busy with something else is slow, and not broken.
            .args(["--boot-timeout-sec", "300"])
            // Says when a machine is ready.
            .args(["--log", "info,api::domain=debug"])
            .env_remove("SANDBOXD_CONFIG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| SandboxError::Start {
                program: programs.sandboxd.clone(),
                source,
            })?;
        let log: Arc<Mutex<VecDeque<String>>> = Arc::default();
        let (is_ready, ready) = mpsc::channel();
        let (is_warm, warm) = mpsc::channel();
        let mut said = String::new();
        let mut address = None;
        if let Some(stderr) = process.stderr.take() {
            let mut lines = BufReader::new(stderr).lines();
            for line in lines.by_ref().map_while(Result::ok) {
                address = address.or_else(|| field(&line, "address"));
                if field(&line, "message").as_deref() == Some("sandboxd is ready") {
                    break;
                }
                said.push_str(&line);
                said.push('\n');
            }
            // Or it would wait for somebody to read on.
            let last = Arc::clone(&log);
            std::thread::spawn(move || {
                for line in lines.map_while(Result::ok) {
                    let tell = match field(&line, "message").as_deref() {
                        Some("a machine is ready") => Some(&is_ready),
                        Some("warm snapshot made") => Some(&is_warm),
                        _ => None,
                    };
                    // Nobody has to wait for it.
                    let _ = tell.map(|tell| tell.send(()));
                    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                    if last.len() == LAST_LINES {
                        last.pop_front();
                    }
                    last.push_back(line);
                }
            });
        }
        let config = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false);
        Ok(Self {
            process,
            address: address.ok_or(SandboxError::Silent(said))?,
            agent: config.build().into(),
            bearer: String::new(),
            vmm: programs.vmm.clone(),
            log,
            ready: Mutex::new(ready),
            warm: Mutex::new(warm),
            directory,
        })
    }

    /// What a request answers with this status.
    fn call(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        expected: u16,
    ) -> Result<Value, SandboxError> {
        let url = format!("http://{}{path}", self.address);
        let request = format!("{method} {path}");
        let failed = |source: ureq::Error| SandboxError::Request {
            request: request.clone(),
            source: Box::new(source),
        };
        let mut head = ureq::http::Request::builder().method(method).uri(&url);
        if body.is_some() {
            head = head.header("Content-Type", "application/json");
        }
        if path.starts_with(API) && !self.bearer.is_empty() {
            head = head.header("Authorization", &self.bearer);
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let answer = head.body(body).map_err(ureq::Error::from);
        let answer = answer.and_then(|request| self.agent.run(request));
        let mut answer = answer.map_err(failed)?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().map_err(failed)?;
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if status == expected {
            Ok(body)
        } else {
            Err(SandboxError::Refused {
                request,
                status,
                body,
            })
        }
    }

    /// Registers a user, who makes the requests to `/api/v1` from now on.
    ///
    /// # Errors
    /// The daemon refuses.
    pub fn log_in(&mut self) -> Result<(), SandboxError> {
        let user = json!({"username": "bench", "password": "Correct-Horse-9", "role": "admin"});
        self.api("POST", "/auth/register", Some(&user), 201)?;
        let token = self.api("POST", "/auth/login", Some(&user), 200)?;
        let token = token["access_token"].as_str().unwrap_or_default();
        self.bearer = format!("Bearer {token}");
        Ok(())
    }

    /// What a request to a path of `/api/v1` answers with this status.
    ///
    /// # Errors
    /// It has another one, or there is no answer.
    pub fn api(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
        expected: u16,
    ) -> Result<Value, SandboxError> {
        self.call(method, &format!("{API}{path}"), body, expected)
    }

    /// The end of the daemon's log, for whoever looks into a failure.
    pub fn last_words(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Creates a sandbox with one vCPU.
    ///
    /// # Errors
    /// It did not start.
    pub fn create(&self, memory_mb: u32) -> Result<Created, SandboxError> {
        self.create_with(1, memory_mb)
    }

    fn create_with(&self, vcpus: u32, memory_mb: u32) -> Result<Created, SandboxError> {
        let body = json!({"template": "minimal", "vcpus": vcpus, "memory_mb": memory_mb});
        let sandbox = self.call("POST", "/v1/sandboxes", Some(&body), 201)?;
        let timings = &sandbox["timings_ms"];
        let phases = PHASES.map(|phase| (phase, timings[phase].as_f64().unwrap_or_default()));
        Ok(Created {
            id: id_of(&sandbox),
            start: timings["start"].as_str().unwrap_or_default().to_owned(),
            phases: phases.to_vec(),
        })
    }

    /// Waits until one more machine is ready than when this was last asked.
    ///
    /// # Errors
    /// There is none in time.
    pub fn wait_until_ready(&self) -> Result<(), SandboxError> {
        let ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        ready
            .recv_timeout(PATIENCE)
            .map_err(|_| SandboxError::NotWarm)
    }

    /// Waits until one more warm snapshot is made than when this was last asked.
    ///
    /// # Errors
    /// There is none in time.
    pub fn wait_until_warm(&self) -> Result<(), SandboxError> {
        let warm = self.warm.lock().unwrap_or_else(PoisonError::into_inner);
        warm.recv_timeout(PATIENCE)
            .map_err(|_| SandboxError::NotWarm)
    }

    /// Runs a command, which has to succeed.
    ///
    /// # Errors
    /// It did not run.
    pub fn exec(&self, id: &str, script: &str) -> Result<(), SandboxError> {
        let path = format!("/v1/sandboxes/{id}/exec");
        let body = json!({"cmd": "sh", "args": ["-c", script], "timeout_sec": 120});
        let result = self.call("POST", &path, Some(&body), 200)?;
        if result["exit_code"] == 0 {
            return Ok(());
        }
        Err(SandboxError::Refused {
            request: script.to_owned(),
            status: 200,
            body: result,
        })
    }

    /// How long output of a command is on its way. The clock of a sandbox is its own.
    ///
    /// # Errors
    /// It was not measured.
    pub fn stream(&self, id: &str) -> Result<Latencies, SandboxError> {
        Ok(stream::measure(&self.address, id)?)
    }

    /// Removes a sandbox.
    ///
    /// # Errors
    /// Something of it is left.
    pub fn delete(&self, id: &str) -> Result<(), SandboxError> {
        let path = format!("/v1/sandboxes/{id}");
        self.call("DELETE", &path, None, 204).map(drop)
    }

    /// Pauses or resumes a sandbox.
    ///
    /// # Errors
    /// It did not work.
    pub fn change(&self, id: &str, what: &str) -> Result<(), SandboxError> {
        let path = format!("/v1/sandboxes/{id}/{what}");
        self.call("POST", &path, None, 200).map(drop)
    }

    /// Forks a sandbox. Returns the ids, and for how long the parent stood still, in ms.
    ///
    /// # Errors
    /// Not all of them started.
    pub fn fork(&self, id: &str, count: usize) -> Result<(Vec<String>, f64), SandboxError> {
        let path = format!("/v1/sandboxes/{id}/fork");
        let body = json!({"count": count});
        let forked = self.call("POST", &path, Some(&body), 201)?;
        let sandboxes = forked["sandboxes"].as_array();
        let ids: Vec<String> = sandboxes.into_iter().flatten().map(id_of).collect();
        if ids.len() < count {
            return Err(SandboxError::Refused {
                request: format!("fork of {count}"),
                status: 201,
                body: forked,
            });
        }
        Ok((ids, forked["stall_ms"].as_f64().unwrap_or_default()))
    }

    /// Waits until sandboxes of this shape start warm.
    ///
    /// # Errors
    /// They do not.
    pub fn warm_up(&self, vcpus: u32, memory_mb: u32) -> Result<(), SandboxError> {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let Created { id, start, .. } = self.create_with(vcpus, memory_mb)?;
            self.delete(&id)?;
            if start != "cold" {
                return Ok(());
            }
        }
        Err(SandboxError::NotWarm)
    }

    /// Bytes on disk that hold what was saved of sandboxes, those of warm starts included.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn saved_bytes(&self) -> io::Result<u64> {
        stored(&self.directory.path().join("data/layers"))
    }

    /// Proportional memory of each process of this daemon's VMMs, in KiB, by process id.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn vmm_pss(&self) -> io::Result<BTreeMap<u32, u64>> {
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir("/proc")? {
            let path = entry?.path();
            let Some(pid) = path
                .file_name()
                .and_then(|name| name.to_str()?.parse().ok())
            else {
                continue;
            };
            if std::fs::read_link(path.join("exe")).is_ok_and(|exe| exe == self.vmm)
                && let Ok(rollup) = std::fs::read_to_string(path.join("smaps_rollup"))
            {
                all.insert(pid, kib(&rollup, "Pss:"));
            }
        }
        Ok(all)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}

/// How much more memory these processes have than those of before, in KiB.
pub fn growth(before: &BTreeMap<u32, u64>, after: &BTreeMap<u32, u64>) -> f64 {
    let old: HashSet<u32> = before.keys().copied().collect();
    let new = after.iter().filter(|(pid, _)| !old.contains(pid));
    new.map(|(_, kib)| *kib as f64).sum()
}

fn id_of(sandbox: &Value) -> String {
    sandbox["id"].as_str().unwrap_or_default().to_owned()
}

/// A field of a line of the daemon's log.
fn field(line: &str, name: &str) -> Option<String> {
    let line: Value = serde_json::from_str(line).ok()?;
    let field = line.get(name).or_else(|| line["fields"].get(name));
    Some(field?.as_str()?.to_owned())
}

fn kib(rollup: &str, name: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.unwrap_or_default()
}

fn stored(directory: &Path) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut sum = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += match metadata.is_dir() {
            true => stored(&entry.path())?,
            false => metadata.blocks() * 512,
        };
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_that_of_new_processes() {
        let before = BTreeMap::from([(1, 100), (2, 200)]);
        let after = BTreeMap::from([(1, 900), (3, 30), (4, 12)]);
        assert!((growth(&before, &after) - 42.0).abs() < f64::EPSILON);
        assert_eq!(
            kib("Rss:   7 kB\nPss:    5 kB\nPss_Dirty: 3 kB\n", "Pss:"),
            5
        );
    }

    #[test]
    fn lines_of_the_log_are_searched_for_fields() {
        let line = r#"{"fields":{"message":"listening","address":"127.0.0.1:7"}}"#;
        assert_eq!(field(line, "address").as_deref(), Some("127.0.0.1:7"));
        assert_eq!(field("no json", "address"), None);
    }

    #[test]
    fn what_is_stored_is_counted_with_directories() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("in")).unwrap();
        std::fs::write(directory.path().join("in/file"), [7; 5000]).unwrap();
        assert!(stored(directory.path()).unwrap() >= 5000);
    }
}
