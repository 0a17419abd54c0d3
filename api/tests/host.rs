//! The host side without a hypervisor: a script stands in for the VMM, and the real guest agent
//! runs on this machine, behind the socket that a VMM would serve.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/executable.rs"]
mod executable;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use agent_protocol::Ready;
use api::domain::{
    CreateRequest, Created, End, ExecEvent, ExecRequest, ExitInfo, Host, HostError, HostEvent,
    Identity, Layers, ReadFileRequest, Resources, SandboxId, Shape, Start, WalkCut, WalkSpec,
    WalkStep, WriteFileRequest,
};
use api::hypervisor::{HostConfig, LocalHost, Paths};
use api::images::Images;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// A host whose VMM is a script. The script tells of its first guest instruction, lets the test
/// know that it is up, and then does as the test says.
struct Bench {
    dir: tempfile::TempDir,
    paths: Paths,
    host: Arc<LocalHost>,
}

/// Boot this sandbox.
fn request(id: &SandboxId) -> CreateRequest {
    CreateRequest {
        id: id.clone(),
        shape: Shape {
            template: "minimal".into(),
            vcpus: 2,
            memory_mb: 256,
        },
        identity: Identity {
            hostname: id.to_string(),
            machine_id: "1".repeat(32),
        },
        layers: Layers::default(),
        start: Start::Cold,
        nic: None,
        scratch_mb: None,
        disk_mb: None,
        resources: Resources::default(),
    }
}

/// Waits for a word from the test, then ends with this status.
const UNTIL_TOLD: &str = "read word < $DIR/go; exit $word";

impl Bench {
    async fn new(body: &str, boot_timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        for fifo in ["up", "go"] {
            let status = Command::new("mkfifo")
                .arg(path.join(fifo))
                .status()
                .unwrap();
            assert!(status.success());
        }
        let script = format!(
            "#!/bin/sh\nDIR={}\nPATH=/usr/bin:/bin\nprintf '%s\\n' \"$@\" > $DIR/args\n\
             echo $$ > $DIR/pid\nwhile [ $# -gt 0 ]; do case $1 in\n\
             --event-monitor) events=/proc/self/fd/${{2#fd=}};;\n\
             --serial) console=${{2#file=}};; esac; shift; done\n\
             echo '{{\"timestamp_us\":1500,\"event\":\"booting\"}}' > $events\n\
             echo 'hello from the guest' > $console\n{body}\n",
            path.display()
        );
        let vmm = executable::write(&path.join("vmm"), &script);
        let disk = path.join("minimal.ext4");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let paths = Paths::new(&path.join("run"), &path.join("data")).unwrap();
        let host = LocalHost::start(HostConfig {
            vmm,
            images: Images {
                kernel: "/the/kernel".into(),
                initramfs: "/the/initramfs".into(),
                templates: BTreeMap::from([("minimal".to_owned(), disk)]),
            },
            paths: paths.clone(),
            boot_timeout,
            cmdline_extra: "extra=1".to_owned(),
            prefetch: false,
            jail: None,
            networks: None,
        });
        let host = Arc::new(host.await.unwrap());
        Self { dir, paths, host }
    }

    /// Starts a sandbox, and waits until its VMM is up.
    async fn create(&self, id: &SandboxId) -> JoinHandle<Result<Created, HostError>> {
        let request = request(id);
        let host = Arc::clone(&self.host);
        let created = tokio::spawn(async move { host.create(request).await });
        let up = tokio::fs::read_to_string(self.dir.path().join("up"))
            .await
            .unwrap();
        assert_eq!(up, "up\n");
        created
    }

    /// Starts a sandbox with the real agent in it.
    async fn create_with_agent(&self, id: &SandboxId) -> Agent {
        let created = self.create(id).await;
        let agent = Agent::start(self.dir.path(), &self.paths.vsock(id)).await;
        self.say_ready(id).await;
        let timings = created.await.unwrap().unwrap().timings;
        assert_eq!(timings.vmm_us, 1500);
        assert!(timings.boot_us > 0 && timings.total_us >= timings.boot_us + timings.vmm_us);
        agent
    }

    async fn say_ready(&self, id: &SandboxId) {
        let ready = Ready {
            version: "1".into(),
            kernel: "6".into(),
            entered_us: 1,
            serving_us: 2,
        };
        let mut line = serde_json::to_vec(&ready).unwrap();
        line.push(b'\n');
        let mut stream = UnixStream::connect(self.paths.ready(id)).await.unwrap();
        stream.write_all(&line).await.unwrap();
    }

    fn pid(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("pid"))
            .unwrap()
            .trim()
            .to_owned()
    }

    fn assert_nothing_is_left(&self) {
        let pid = self.pid();
        assert!(
            !Path::new("/proc").join(&pid).exists(),
            "process {pid} is left"
        );
        for parent in ["run/sandboxes", "data/sandboxes"] {
            let mut entries = std::fs::read_dir(self.dir.path().join(parent)).unwrap();
            assert!(entries.next().is_none(), "something is left in {parent}");
        }
    }
}

/// The real agent on this machine, behind a socket that speaks as a VMM's does.
struct Agent {
    _process: tokio::process::Child,
    proxy: JoinHandle<()>,
}

impl Agent {
    async fn start(dir: &Path, vsock: &Path) -> Self {
        let socket = dir.join("agent.sock");
        let mut process = tokio::process::Command::new(agent::binary())
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        stdout.read_line(&mut line).await.unwrap();
        assert!(line.contains("serving_us"), "{line}");

        let listener = UnixListener::bind(vsock).unwrap();
        let proxy = tokio::spawn(async move {
            loop {
                let (mut host, _) = listener.accept().await.unwrap();
                let socket = socket.clone();
                tokio::spawn(async move {
                    let mut line = [0; b"CONNECT 1024\n".len()];
                    host.read_exact(&mut line).await.unwrap();
                    assert_eq!(&line, b"CONNECT 1024\n");
                    host.write_all(b"OK 1073741824\n").await.unwrap();
                    let mut guest = UnixStream::connect(socket).await.unwrap();
                    // Either side may end it at any time.
                    let _ = tokio::io::copy_bidirectional(&mut host, &mut guest).await;
                });
            }
        });
        Self {
            _process: process,
            proxy,
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.proxy.abort();
    }
}

async fn run(host: &LocalHost, id: &SandboxId, argv: &[&str], timeout_sec: u32) -> Output {
    let argv = argv.iter().map(|&arg| arg.to_owned()).collect();
    let mut events = host
        .exec(
            id,
            ExecRequest {
                argv,
                timeout_sec,
                ..ExecRequest::default()
            },
        )
        .await
        .unwrap();
    let mut output = Output {
        stdout: Vec::new(),
        stderr: Vec::new(),
        exit: None,
    };
    while let Some(event) = events.next().await {
        match event.unwrap() {
            ExecEvent::Started { .. } => {}
            ExecEvent::Stdout(bytes) => output.stdout.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => output.stderr.extend_from_slice(&bytes),
            ExecEvent::Exited(exit) => output.exit = Some(exit),
        }
    }
    output
}

#[derive(Debug)]
struct Output {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<ExitInfo>,
}

fn exit(code: i32) -> Option<ExitInfo> {
    Some(ExitInfo {
        code,
        timed_out: false,
    })
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn commands_run_in_the_agent() {
    let bench = Bench::new(&format!("echo up > $DIR/up; {UNTIL_TOLD}"), LONG).await;
    let id = SandboxId::random();
    let _agent = bench.create_with_agent(&id).await;
    let host = &bench.host;

    let output = run(
        host,
        &id,
        &["sh", "-c", "echo out; echo err >&2; exit 3"],
        30,
    )
    .await;
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(output.exit, exit(3));
    let output = run(host, &id, &["sh", "-c", "kill -9 $$"], 30).await;
    assert_eq!(output.exit, exit(137));
    let output = run(host, &id, &["no-such-program"], 30).await;
    assert_eq!(output.exit, exit(127));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("no-such-program")
    );
    let output = run(host, &id, &["/etc/passwd"], 30).await;
    assert_eq!(output.exit, exit(126));
    let output = run(host, &id, &["sh", "-c", "echo so far; exec sleep 1000"], 1).await;
    assert_eq!(output.stdout, b"so far\n");
    assert_eq!(
        output.exit,
        Some(ExitInfo {
            code: 137,
            timed_out: true
        })
    );
    let output = run(host, &id, &["head", "-c", "10000000", "/dev/zero"], 30).await;
    assert_eq!(output.stdout.len(), 10_000_000);

    host.destroy(&id).await.unwrap();
    bench.assert_nothing_is_left();
    let request = ExecRequest {
        argv: vec!["true".into()],
        timeout_sec: 1,
        ..ExecRequest::default()
    };
    let gone = host.exec(&id, request).await.err();
    assert_eq!(gone, Some(HostError::NotRunning { id }));
}

#[tokio::test]
async fn a_command_whose_caller_goes_away_is_killed() {
    let bench = Bench::new(&format!("echo up > $DIR/up; {UNTIL_TOLD}"), LONG).await;
    let id = SandboxId::random();
    let _agent = bench.create_with_agent(&id).await;
    let fifo = bench.dir.path().join("held");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let script = format!("exec 3> {}; echo open; exec sleep 1000", fifo.display());
    let argv = vec!["sh".to_owned(), "-c".to_owned(), script];
    // The reading end ends when the last writer does: when the command is dead.
    let held = tokio::spawn(tokio::fs::read(fifo));
    let mut events = bench
        .host
        .exec(
            &id,
            ExecRequest {
                argv,
                timeout_sec: 3600,
                ..ExecRequest::default()
            },
        )
        .await
        .unwrap();
    let started = events.next().await.unwrap().unwrap();
    assert!(matches!(started, ExecEvent::Started { pid } if pid > 0));
    let first = events.next().await.unwrap().unwrap();
    assert_eq!(first, ExecEvent::Stdout(Bytes::from_static(b"open\n")));
    drop(events);
    assert_eq!(held.await.unwrap().unwrap(), b"");
}

#[tokio::test]
async fn files_go_in_and_come_out_of_the_agent() {
    let bench = Bench::new(&format!("echo up > $DIR/up; {UNTIL_TOLD}"), LONG).await;
    let id = SandboxId::random();
    let _agent = bench.create_with_agent(&id).await;
    let file = bench.dir.path().join("new/directory/and a \"file\"");
    let path = file.to_str().unwrap().to_owned();
    let write = async |content: BoxStream<'static, std::io::Result<Bytes>>| {
        let request = WriteFileRequest {
            path: path.clone(),
            mode: None,
        };
        bench.host.write_file(&id, request, content).await
    };

    let piece = Bytes::from((0..=255).cycle().take(100_000).collect::<Vec<u8>>());
    let pieces = vec![piece.clone(); 50];
    let whole = pieces.concat();
    write(stream::iter(pieces.clone().into_iter().map(Ok)).boxed())
        .await
        .unwrap();
    let request = ReadFileRequest { path: path.clone() };
    let mut read = bench.host.read_file(&id, request).await.unwrap();
    assert_eq!(read.size, Some(5_000_000));
    let mut content = Vec::new();
    while let Some(piece) = read.content.next().await {
        content.extend_from_slice(&piece.unwrap());
    }
    assert!(content == whole);

    let broken = [
        Ok(piece),
        Err(std::io::Error::other("the sender went away")),
    ];
    let error = write(stream::iter(broken).boxed()).await.unwrap_err();
    assert_eq!(
        error,
        HostError::Upload {
            reason: "the sender went away".into()
        }
    );
    assert!(
        std::fs::read(&file).unwrap() == whole,
        "the old content stays"
    );

    let request = ReadFileRequest {
        path: "/no/such/file".into(),
    };
    let error = bench.host.read_file(&id, request).await.err();
    assert_eq!(
        error,
        Some(HostError::FileNotFound {
            path: "/no/such/file".into()
        })
    );
    let request = ReadFileRequest {
        path: "/etc".into(),
    };
    let error = bench.host.read_file(&id, request).await.err();
    assert!(
        matches!(error, Some(HostError::Invalid { .. })),
        "{error:?}"
    );
    let request = WriteFileRequest {
        path: "/etc".into(),
        mode: None,
    };
    let error = bench
        .host
        .write_file(&id, request, stream::empty().boxed())
        .await;
    assert!(matches!(error, Err(HostError::Invalid { .. })), "{error:?}");
}

#[tokio::test]
async fn the_agent_walks_directories() {
    let bench = Bench::new(&format!("echo up > $DIR/up; {UNTIL_TOLD}"), LONG).await;
    let id = SandboxId::random();
    let _agent = bench.create_with_agent(&id).await;
    let root = bench.dir.path().join("tree");
    let mut expected = BTreeSet::new();
    for directory in 0..30 {
        let directory = root.join(directory.to_string());
        std::fs::create_dir_all(&directory).unwrap();
        std::os::unix::fs::symlink(&root, directory.join("loop")).unwrap();
        for file in 0..50 {
            std::fs::write(directory.join(file.to_string()), "x").unwrap();
            expected.insert(directory.join(file.to_string()));
        }
        expected.extend([directory.join("loop"), directory]);
    }
    let spec = WalkSpec {
        path: root.to_str().unwrap().to_owned(),
        max_entries: 2000,
        max_depth: 5,
        max_bytes: 1 << 20,
        skip: Vec::new(),
    };
    let walk = async |spec: &WalkSpec| {
        let steps = bench.host.walk(&id, spec).await.unwrap().unwrap();
        let steps: Vec<_> = steps.map(Result::unwrap).collect().await;
        let paths = steps.iter().filter_map(|step| match step {
            WalkStep::Entry(entry) => Some(entry.path.clone().into()),
            _ => None,
        });
        (paths.collect::<BTreeSet<_>>(), steps.last().cloned())
    };
    let (paths, last) = walk(&spec).await;
    assert_eq!(paths, expected);
    assert!(matches!(last, Some(WalkStep::Entry(_))), "{last:?}");
    let few = WalkSpec {
        max_entries: 100,
        ..spec.clone()
    };
    let (paths, last) = walk(&few).await;
    assert_eq!(paths.len(), 100);
    assert_eq!(last, Some(WalkStep::Cut(WalkCut::Entries)));
    let none = WalkSpec {
        path: "/no/such/directory".to_owned(),
        ..spec
    };
    let error = bench.host.walk(&id, &none).await.err();
    assert!(
        matches!(error, Some(HostError::FileNotFound { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn the_vmm_is_started_as_agreed() {
    let bench = Bench::new(&format!("echo up > $DIR/up; {UNTIL_TOLD}"), LONG).await;
    let id = SandboxId::random();
    let _agent = bench.create_with_agent(&id).await;
    let arguments = std::fs::read_to_string(bench.dir.path().join("args")).unwrap();
    let arguments: Vec<_> = arguments.lines().collect();
    let disk = format!(
        "path={},image_type=qcow2,backing=[raw:{}]",
        bench.paths.disk(&id).display(),
        bench
            .dir
            .path()
            .join("minimal.ext4")
            .canonicalize()
            .unwrap()
            .display()
    );
    let vsock = format!("cid=3,socket={}", bench.paths.vsock(&id).display());
    let serial = format!("file={}", bench.paths.console(&id).display());
    let clock = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let counters = match std::fs::read_to_string(clock) {
        Ok(clock) if clock == "tsc\n" => " tsc=reliable",
        _ => "",
    };
    let cmdline = format!(
        "console=ttyS0 quiet loglevel=4 panic=1 random.trust_cpu=on \
         maxcpus=1 noreplace-smp rcupdate.rcu_expedited=1 \
         sysctl.vm.compaction_proactiveness=0 root=/dev/vda rootfstype=ext4 rw{counters} extra=1"
    );
    for (flag, value) in [
        ("--kernel", "/the/kernel"),
        ("--initramfs", "/the/initramfs"),
        ("--cmdline", &cmdline),
        ("--cpus", "boot=2"),
        ("--memory", "size=256M"),
        ("--disk", &disk),
        ("--vsock", &vsock),
        ("--serial", &serial),
        ("--console", "off"),
    ] {
        assert!(
            arguments.windows(2).any(|pair| pair == [flag, value]),
            "{flag} {arguments:?}"
        );
    }
    bench.host.shutdown(&BTreeSet::new()).await;
    bench.assert_nothing_is_left();
}

#[tokio::test]
async fn a_vmm_that_fails_at_once_says_why_and_leaves_nothing() {
    let body = "echo 'cannot open /the/kernel' >&2; echo up > $DIR/up; exit 2";
    let bench = Bench::new(body, LONG).await;
    let error = bench
        .create(&SandboxId::random())
        .await
        .await
        .unwrap()
        .unwrap_err();
    let reason = error.to_string();
    assert!(
        reason.contains("the vmm refused its configuration"),
        "{reason}"
    );
    assert!(reason.contains("cannot open /the/kernel"), "{reason}");
    assert!(reason.contains("hello from the guest"), "{reason}");
    bench.assert_nothing_is_left();
}

#[tokio::test]
async fn an_agent_that_does_not_answer_is_given_up() {
    let bench = Bench::new("echo up > $DIR/up; exec sleep 1000", Duration::from_secs(3)).await;
    let error = bench
        .create(&SandboxId::random())
        .await
        .await
        .unwrap()
        .unwrap_err();
    assert!(
        error.to_string().contains("did not answer within"),
        "{error}"
    );
    bench.assert_nothing_is_left();
}

#[tokio::test]
async fn a_vmm_that_cannot_be_executed_leaves_nothing() {
    let bench = Bench::new("", LONG).await;
    std::fs::remove_file(bench.dir.path().join("vmm")).unwrap();
    let request = request(&SandboxId::random());
    let error = bench.host.create(request).await.unwrap_err();
    assert!(error.to_string().contains("cannot be executed"), "{error}");
    std::fs::write(bench.dir.path().join("pid"), "none").unwrap();
    bench.assert_nothing_is_left();
}

#[tokio::test]
async fn a_sandbox_can_be_destroyed_while_it_starts() {
    let bench = Bench::new("echo up > $DIR/up; exec sleep 1000", LONG).await;
    let id = SandboxId::random();
    let created = bench.create(&id).await;
    bench.host.destroy(&id).await.unwrap();
    bench.assert_nothing_is_left();
    assert_eq!(created.await.unwrap(), Err(HostError::Destroyed));
    bench
        .host
        .destroy(&id)
        .await
        .expect("it is gone, which is what was asked for");
}

#[tokio::test]
async fn the_end_of_a_vmm_is_an_event_with_its_reason() {
    let panic =
        "echo '{\"timestamp_us\":9,\"event\":\"panic\",\"reason\":\"it panicked\"}' > $events";
    for (word, expected, orderly) in [
        ("0", "the guest powered off", true),
        ("10", "the guest asked for a reboot", true),
        ("11", "it panicked", false),
        ("KILL", "the vmm was killed by signal 9", false),
    ] {
        let body = format!(
            "echo up > $DIR/up; read word < $DIR/go; case $word in 11) {panic};; \
             KILL) kill -9 $$;; esac; exit $word"
        );
        let bench = Bench::new(&body, LONG).await;
        let mut events = bench.host.events().await;
        let id = SandboxId::random();
        let _agent = bench.create_with_agent(&id).await;
        tokio::fs::write(bench.dir.path().join("go"), format!("{word}\n"))
            .await
            .unwrap();
        let event = events.next().await.unwrap();
        let HostEvent::Ended { id: ended, end } = event else {
            unreachable!("{event:?}");
        };
        assert_eq!(ended, id);
        let (was_orderly, reason) = match end {
            End::Orderly { reason } => (true, reason),
            End::Failed { reason } => (false, reason),
        };
        assert!(
            was_orderly == orderly && reason.starts_with(expected),
            "{reason}"
        );
        bench.assert_nothing_is_left();
    }
}
