//! What the host side asks a VMM for to save, restore and fork machines, and what it leaves when that
//! goes wrong. A stand-in for the VMM takes the requests; the real guest agent is behind it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/vmm.rs"]
mod vmm;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use api::domain::{
    Booted, ClaimRequest, CreateRequest, Created, End, ExecEvent, ExecRequest, Host, HostError,
    HostEvent, Identity, LayerId, Layers, MergeRequest, Model, PowerOffRequest, PrepareRequest,
    Resources, SandboxId, SaveRequest, Saved, Shape, Start,
};
use api::hypervisor::{HostConfig, LocalHost, Paths};
use api::images::Images;
use futures_util::StreamExt;

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

fn shape() -> Shape {
    Shape {
        template: "minimal".into(),
        vcpus: 1,
        memory_mb: 128,
    }
}

fn identity(id: &SandboxId) -> Identity {
    Identity {
        hostname: id.to_string(),
        machine_id: "1".repeat(32),
    }
}

struct Bench {
    dir: tempfile::TempDir,
    host: Arc<LocalHost>,
    id: SandboxId,
}

impl Bench {
    async fn new() -> Self {
        Self::with_timeout(Duration::from_secs(60)).await
    }

    async fn with_timeout(boot_timeout: Duration) -> Self {
        Self::configured(boot_timeout, false).await
    }

    async fn configured(boot_timeout: Duration, prefetch: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let template = path.join("minimal.ext4");
        fs::File::create(&template)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let host = LocalHost::start(HostConfig {
            vmm: vmm::install(path, "as_a_vmm", agent::binary()),
            images: Images {
                kernel: "/the/kernel".into(),
                initramfs: "/the/initramfs".into(),
                templates: BTreeMap::from([("minimal".to_owned(), template)]),
            },
            paths: Paths::new(&path.join("run"), &path.join("data")).unwrap(),
            boot_timeout,
            cmdline_extra: String::new(),
            prefetch,
            jail: None,
            networks: None,
        });
        let host = Arc::new(host.await.unwrap());
        Self {
            dir,
            host,
            id: SandboxId::random(),
        }
    }

    async fn start(&self, id: &SandboxId, layers: &Layers) -> Result<(), HostError> {
        self.start_as(Start::Cold, id, layers).await
    }

    async fn start_as(
        &self,
        start: Start,
        id: &SandboxId,
        layers: &Layers,
    ) -> Result<(), HostError> {
        let request = CreateRequest {
            id: id.clone(),
            shape: shape(),
            identity: identity(id),
            layers: layers.clone(),
            start,
            nic: None,
            scratch_mb: None,
            disk_mb: None,
            resources: Resources::default(),
        };
        self.host.create(request).await.map(drop)
    }

    async fn prepare(&self, id: &SandboxId, layers: &Layers) -> Result<(), HostError> {
        let request = PrepareRequest {
            scratch_mb: None,
            disk_mb: None,
            nic: None,
            id: id.clone(),
            shape: shape(),
            layers: layers.clone(),
            resources: Resources::default(),
        };
        self.host.prepare(request).await
    }

    async fn claim(&self, id: &SandboxId) -> Result<Created, HostError> {
        let request = ClaimRequest {
            nic: None,
            id: id.clone(),
            identity: identity(id),
        };
        self.host.claim(request).await
    }

    /// A sandbox that was booted and saved to the layers that are returned.
    async fn paused(&self) -> Layers {
        let none = Layers::default();
        self.start(&self.id, &none).await.unwrap();
        let (layers, saved) = self.pause(&none).await;
        saved.unwrap();
        layers
    }

    fn request(&self, base: &Layers) -> SaveRequest {
        SaveRequest {
            id: self.id.clone(),
            keep: base.kept_memory(),
            layers: base.saved(LayerId::random(), LayerId::random()),
            include_memory: true,
        }
    }

    async fn pause(&self, base: &Layers) -> (Layers, Result<Saved, HostError>) {
        let request = self.request(base);
        (request.layers.clone(), self.host.pause(request).await)
    }

    async fn snapshot(&self, base: &Layers) -> (Layers, Result<Saved, HostError>) {
        let request = self.request(base);
        (request.layers.clone(), self.host.snapshot(request).await)
    }

    async fn exec(&self, script: &str) -> Result<i32, HostError> {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        let request = ExecRequest {
            argv,
            timeout_sec: 60,
            ..ExecRequest::default()
        };
        let mut events = self.host.exec(&self.id, request).await?;
        while let Some(event) = events.next().await {
            if let ExecEvent::Exited(exit) = event? {
                return Ok(exit.code);
            }
        }
        Ok(-1)
    }

    /// Lets the VMM do this wrong from now on.
    fn spoil(&self, what: &str) {
        fs::write(self.dir.path().join(what), "").unwrap();
    }

    fn mend(&self, what: &str) {
        fs::remove_file(self.dir.path().join(what)).unwrap();
    }

    /// What VMMs were asked for since this was asked last.
    fn log(&self) -> Vec<String> {
        let path = self.dir.path().join("log");
        let log = fs::read_to_string(&path).unwrap_or_default();
        let _ = fs::remove_file(path);
        log.lines().map(str::to_owned).collect()
    }

    fn names(&self, dir: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.dir.path().join(dir)).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// Nothing is there but these layers.
    fn assert_only(&self, layers: &Layers) {
        for dir in ["run/sandboxes", "data/sandboxes"] {
            assert!(self.names(dir).is_empty(), "something is left in {dir}");
        }
        self.assert_layers(layers);
    }

    fn assert_layers(&self, layers: &Layers) {
        let expected = layers.all().map(ToString::to_string).collect();
        assert_eq!(self.names("data/layers"), expected);
    }
}

#[tokio::test]
async fn a_machine_is_saved_as_what_has_changed_and_restored() {
    let bench = Bench::new().await;
    let mut layers = bench.paused().await;
    bench.assert_only(&layers);
    assert_eq!(
        bench.log(),
        [
            "boot",
            "vm.pause  0",
            r#"vm.snapshot {"keep_base_layers":0} 3"#
        ]
    );
    // Which generation each layer is, and how many it kept.
    let memories = [
        "0+0",
        "0+0 1+1",
        "0+0 1+1 2+2",
        "0+0 1+1 2+2 3+3",
        "0+0 4+1",
    ];
    for (index, memory) in memories.iter().enumerate() {
        bench.start(&bench.id, &layers).await.unwrap();
        assert_eq!(bench.exec("exit 3").await, Ok(3));
        let keep = layers.kept_memory();
        let (next, saved) = bench.pause(&layers).await;
        assert!(saved.unwrap().new_bytes > 0);
        assert_eq!(
            bench.log(),
            [
                format!("restore {memory}"),
                "vm.pause  0".to_owned(),
                format!(r#"vm.snapshot {{"keep_base_layers":{keep}}} 3"#),
            ],
            "{index}"
        );
        let released: Vec<_> = layers.memory.iter().skip(keep).cloned().collect();
        bench.host.discard(&released).await.unwrap();
        layers = next;
        bench.assert_only(&layers);
        let info = bench.host.inspect(&layers).await.unwrap().unwrap();
        assert!(info.size_bytes > 0 && info.checksum.len() == 64);
    }
}

#[tokio::test]
async fn a_machine_that_goes_on_writes_to_a_new_overlay() {
    let bench = Bench::new().await;
    let mut layers = Layers::default();
    bench.start(&bench.id, &layers).await.unwrap();
    let api = bench
        .dir
        .path()
        .join("run/sandboxes")
        .join(bench.id.as_str());
    let api = fs::metadata(api.join("api.sock")).unwrap();
    assert_eq!(api.permissions().mode() & 0o777, 0o600, "no other may ask");
    for generation in 1..=3 {
        bench.log();
        let keep = layers.kept_memory();
        let (next, saved) = bench.snapshot(&layers).await;
        assert!(saved.unwrap().timings.stall_us > 0);
        let images = vec!["\"Qcow2\""; generation + 1].join(",");
        assert_eq!(
            bench.log(),
            [
                "vm.pause  0".to_owned(),
                format!(r#"vm.snapshot {{"keep_base_layers":{keep}}} 4"#),
                format!(
                    r#"vm.replace-disk {{"id":"_disk0","image_types":[{images},"Raw"]}} {}"#,
                    generation + 2
                ),
                "vm.resume  0".to_owned(),
            ]
        );
        assert_eq!(bench.exec("exit 0").await, Ok(0));
        layers = next;
        bench.assert_layers(&layers);
    }
    // Clones of it, and itself, are based on the same.
    let clone = SandboxId::random();
    bench.start(&clone, &layers).await.unwrap();
    assert_eq!(bench.log().last().unwrap(), "restore 0+0 1+1 2+2");
    let (layers, saved) = bench.pause(&layers).await;
    saved.unwrap();
    bench.host.destroy(&clone).await.unwrap();
    bench.assert_only(&layers);
}

#[tokio::test]
async fn a_disk_is_saved_alone_and_booted_from() {
    let bench = Bench::new().await;
    let base = bench.paused().await;
    bench.start(&bench.id, &base).await.unwrap();
    bench.log();
    let request = |layers: &Layers| SaveRequest {
        id: bench.id.clone(),
        keep: layers.memory.len(),
        layers: layers.clone(),
        include_memory: false,
    };
    let next = base.saved_disk(LayerId::random());
    let saved = bench.host.snapshot(request(&next)).await.unwrap();
    assert!(saved.is_at_rest && saved.timings.stall_us > 0);
    assert_eq!(
        bench.log(),
        [
            "vm.pause  0",
            r#"vm.replace-disk {"id":"_disk0","image_types":["Qcow2","Qcow2","Qcow2","Raw"]} 4"#,
            "vm.resume  0",
        ]
    );
    bench.assert_layers(&next);
    bench.spoil("no-replace");
    let failed = bench
        .host
        .snapshot(request(&next.saved_disk(LayerId::random())))
        .await;
    assert!(
        matches!(failed, Err(HostError::NotSaved { .. })),
        "{failed:?}"
    );
    bench.mend("no-replace");
    bench.assert_layers(&next);
    assert_eq!(bench.exec("exit 3").await, Ok(3));
    bench.log();
    let clone = SandboxId::random();
    bench.start(&clone, &next.without_memory()).await.unwrap();
    assert_eq!(bench.log(), ["boot"]);
    bench.host.destroy(&clone).await.unwrap();
    let (layers, saved) = bench.pause(&next).await;
    saved.unwrap();
    bench.assert_only(&layers);
}

#[tokio::test]
async fn layers_of_a_disk_become_one() {
    let bench = Bench::new().await;
    let mut layers = Layers::default();
    bench.start(&bench.id, &layers).await.unwrap();
    for _ in 0..4 {
        let (next, saved) = bench.snapshot(&layers).await;
        saved.unwrap();
        layers = next;
    }
    bench.log();
    let merged = layers.to_merge(4).unwrap().to_vec();
    let request = || MergeRequest {
        layers: merged.clone(),
        into: LayerId::random(),
    };
    bench.spoil("no-merge");
    let error = bench.host.merge_disk(request()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("layer 0 from the top is damaged"), "{text}");
    bench.mend("no-merge");
    bench.assert_layers(&layers);
    let mut gone = request();
    gone.layers.push(LayerId::random());
    let error = bench.host.merge_disk(gone).await.unwrap_err();
    assert!(matches!(error, HostError::NotMerged { .. }), "{error}");
    bench.assert_layers(&layers);
    assert_eq!(bench.names("run/sandboxes").len(), 1, "the machine's own");

    bench.log();
    let request = request();
    bench.host.merge_disk(request.clone()).await.unwrap();
    assert_eq!(bench.log(), [format!("merge 3 {}", 1 << 20)]);
    let image = |id: &LayerId| {
        let path = bench.dir.path().join("data/layers").join(id.as_str());
        fs::read(path.join("disk.qcow2")).unwrap()
    };
    let expected: Vec<_> = merged.iter().rev().flat_map(image).collect();
    assert_eq!(image(&request.into), expected);

    // The machine runs on from files that are gone, and is given the new one when it is saved.
    layers = layers.merged(&merged, &request.into).unwrap();
    bench.host.discard(&merged).await.unwrap();
    bench.assert_layers(&layers);
    let (next, saved) = bench.snapshot(&layers).await;
    saved.unwrap();
    let released = &layers.memory[layers.kept_memory()..];
    bench.host.discard(released).await.unwrap();
    let replace = bench
        .log()
        .into_iter()
        .find(|line| line.contains("replace"));
    assert!(
        replace.unwrap().ends_with(" 5"),
        "three layers below its own, and the template"
    );
    let (layers, saved) = bench.pause(&next).await;
    saved.unwrap();
    bench.assert_only(&layers);
    bench.start(&bench.id, &layers).await.unwrap();
    bench.host.destroy(&bench.id).await.unwrap();
}

#[tokio::test]
async fn a_merge_ends_with_the_host() {
    let bench = Bench::new().await;
    let mut layers = Layers::default();
    bench.start(&bench.id, &layers).await.unwrap();
    for _ in 0..3 {
        let (next, saved) = bench.snapshot(&layers).await;
        saved.unwrap();
        layers = next;
    }
    bench.log();
    let fifo = bench.dir.path().join("no-merge");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let host = Arc::clone(&bench.host);
    let request = MergeRequest {
        layers: layers.disk[1..].to_vec(),
        into: LayerId::random(),
    };
    let merging = tokio::spawn(async move { host.merge_disk(request).await });
    while !bench.log().iter().any(|line| line.starts_with("merge")) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.host.shutdown(&BTreeSet::new()).await;
    let error = merging.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("shutting down"), "{error}");
    bench.assert_only(&layers);
}

#[tokio::test]
async fn an_agent_whose_connection_breaks_off_is_asked_once_more() {
    let bench = Bench::new().await;
    bench.spoil("break-off");
    let layers = bench.paused().await;
    assert!(!bench.dir.path().join("break-off").exists());
    bench.spoil("break-off");
    bench.start(&bench.id, &layers).await.unwrap();
    assert!(!bench.dir.path().join("break-off").exists());
    bench.host.destroy(&bench.id).await.unwrap();
}

#[tokio::test]
async fn a_machine_that_is_not_saved_goes_on_and_nothing_is_left() {
    let bench = Bench::new().await;
    let base = bench.paused().await;
    bench.start(&bench.id, &base).await.unwrap();
    bench.log();
    bench.spoil("no-pause");
    let (_, saved) = bench.pause(&base).await;
    let text = saved.unwrap_err().to_string();
    assert!(
        text.contains("runs on") && text.contains("a device does not stop"),
        "{text}"
    );
    bench.mend("no-pause");
    bench.spoil("no-space");
    for goes_on in [false, true] {
        let (_, saved) = match goes_on {
            false => bench.pause(&base).await,
            true => bench.snapshot(&base).await,
        };
        let error = saved.unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("runs on") && text.contains("No space left on device"),
            "{text}"
        );
        assert!(matches!(error, HostError::NotSaved { keep: 1, .. }));
        let last = bench.log().pop().unwrap();
        assert_eq!(last, "vm.resume  0");
        bench.assert_layers(&base);
        assert_eq!(bench.exec("exit 4").await, Ok(4));
    }
    bench.mend("no-space");

    bench.spoil("no-replace");
    let disk = bench
        .dir
        .path()
        .join("data/sandboxes")
        .join(bench.id.as_str());
    let (_, saved) = bench.snapshot(&base).await;
    assert!(matches!(saved, Err(HostError::NotSaved { keep: 1, .. })));
    bench.assert_layers(&base);
    let names: Vec<_> = fs::read_dir(&disk).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(bench.exec("exit 5").await, Ok(5));
    bench.mend("no-replace");
    let (layers, saved) = bench.pause(&base).await;
    saved.unwrap();
    bench.assert_only(&layers);
}

#[tokio::test]
async fn what_cannot_be_restored_leaves_the_layers_and_says_why() {
    let bench = Bench::with_timeout(Duration::from_secs(5)).await;
    let layers = bench.paused().await;
    for (what, words) in [
        ("refuse-restore", "the snapshot is of another processor"),
        ("mute", "the guest agent does not answer"),
    ] {
        bench.spoil(what);
        let error = bench.start(&bench.id, &layers).await.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        bench.assert_only(&layers);
        bench.mend(what);
    }
    let template = bench.dir.path().join("minimal.ext4");
    let content = fs::read(&template).unwrap();
    fs::write(&template, &content).unwrap();
    let error = bench.start(&bench.id, &layers).await.unwrap_err();
    assert!(error.to_string().contains("has changed since"), "{error}");
    bench.assert_only(&layers);
}

#[tokio::test]
async fn commands_under_way_end_with_a_pause_and_go_on_after_one_that_failed() {
    let bench = Bench::new().await;
    let none = Layers::default();
    bench.start(&bench.id, &none).await.unwrap();
    let fifo = bench.dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let script = format!("echo up; read word < {}; exit $word", fifo.display());
    let start = async || {
        let argv = ["sh", "-c", &script].map(str::to_owned).to_vec();
        let request = ExecRequest {
            argv,
            timeout_sec: 60,
            ..ExecRequest::default()
        };
        let mut events = bench.host.exec(&bench.id, request).await.unwrap();
        let started = events.next().await.unwrap().unwrap();
        assert!(matches!(started, ExecEvent::Started { .. }));
        let first = events.next().await.unwrap().unwrap();
        assert!(matches!(first, ExecEvent::Stdout(_)));
        events
    };
    bench.spoil("no-space");
    let mut events = start().await;
    bench.pause(&none).await.1.unwrap_err();
    tokio::fs::write(&fifo, "6\n").await.unwrap();
    match events.next().await.unwrap().unwrap() {
        ExecEvent::Exited(exit) => assert_eq!(exit.code, 6),
        other => unreachable!("{other:?}"),
    }
    bench.mend("no-space");
    let mut events = start().await;
    bench.pause(&none).await.1.unwrap();
    assert_eq!(events.next().await, Some(Err(HostError::Paused)));
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_vmm_that_dies_while_it_saves_is_an_end_and_leaves_nothing() {
    let bench = Bench::new().await;
    let none = Layers::default();
    bench.start(&bench.id, &none).await.unwrap();
    let mut events = bench.host.events().await;
    bench.spoil("die");
    let (_, saved) = bench.pause(&none).await;
    assert!(
        matches!(saved, Err(HostError::NotRunning { .. })),
        "{saved:?}"
    );
    let event = events.next().await.unwrap();
    let HostEvent::Ended { id, end } = event else {
        unreachable!("{event:?}");
    };
    assert_eq!(id, bench.id);
    assert!(matches!(end, End::Failed { .. }), "{end:?}");
    bench.assert_only(&none);
}

#[tokio::test]
async fn a_sandbox_can_be_destroyed_while_it_is_saved() {
    let bench = Bench::new().await;
    let none = Layers::default();
    bench.start(&bench.id, &none).await.unwrap();
    let fifo = bench.dir.path().join("hang");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let request = bench.request(&none);
    let host = Arc::clone(&bench.host);
    let pausing = tokio::spawn(async move { host.pause(request).await });
    // Opening it waits until the VMM is at it.
    let _open = tokio::fs::File::options()
        .write(true)
        .open(&fifo)
        .await
        .unwrap();
    bench.host.destroy(&bench.id).await.unwrap();
    assert_eq!(pausing.await.unwrap(), Err(HostError::Destroyed));
    bench.assert_only(&none);
}

#[tokio::test]
async fn the_next_daemon_finds_the_layers_and_removes_what_is_not_complete() {
    let bench = Bench::new().await;
    let layers = bench.paused().await;
    let dir = bench.dir.path().join("data/layers");
    fs::create_dir(dir.join("ly-0123456789abcdef")).unwrap();
    fs::create_dir(dir.join(format!("{}.new", LayerId::random()))).unwrap();
    let held = layers.all().cloned().collect();
    bench.host.retain(&held).await.unwrap();
    bench.assert_only(&layers);
    let other = Layers::default().saved(LayerId::random(), LayerId::random());
    assert_eq!(bench.host.inspect(&other).await, Ok(None));
    bench.start(&bench.id, &layers).await.unwrap();
    assert_eq!(bench.exec("exit 7").await, Ok(7));
}

#[tokio::test]
async fn a_key_changes_with_everything_that_a_machine_is_made_of() {
    let bench = Bench::new().await;
    for image in ["kernel", "initramfs"] {
        fs::write(bench.dir.path().join(image), "x").unwrap();
    }
    let template = bench.dir.path().join("minimal.ext4");
    let config = HostConfig {
        vmm: bench.dir.path().join("vmm"),
        images: Images {
            kernel: bench.dir.path().join("kernel"),
            initramfs: bench.dir.path().join("initramfs"),
            templates: BTreeMap::from([("minimal".to_owned(), template.clone())]),
        },
        paths: Paths::new(
            &bench.dir.path().join("run2"),
            &bench.dir.path().join("data2"),
        )
        .unwrap(),
        boot_timeout: Duration::from_secs(1),
        cmdline_extra: String::new(),
        prefetch: false,
        jail: None,
        networks: None,
    };
    let host = LocalHost::start(config.clone()).await.unwrap();
    let model = |vcpus, memory_mb| Model {
        shape: Shape {
            template: "minimal".into(),
            vcpus,
            memory_mb,
        },
        booted: None,
    };
    let mut roomy = model(1, 256);
    roomy.booted = Some(Booted::with_room(1, 256, 4096));
    let mut keys = vec![
        host.warm_key(&roomy, &[]).await.unwrap(),
        host.warm_key(&model(1, 256), &[]).await.unwrap(),
        host.warm_key(&model(2, 256), &[]).await.unwrap(),
        host.warm_key(&model(1, 512), &[]).await.unwrap(),
    ];
    assert_eq!(host.warm_key(&model(1, 256), &[]).await.unwrap(), keys[1]);
    let mut other = config.clone();
    other.cmdline_extra = "quiet".to_owned();
    let other = LocalHost::start(other).await.unwrap();
    keys.push(other.warm_key(&model(1, 256), &[]).await.unwrap());
    for file in ["kernel", "initramfs", "minimal.ext4", "vmm"] {
        let (path, new) = (bench.dir.path().join(file), bench.dir.path().join("new"));
        fs::copy(&path, &new).unwrap();
        fs::rename(new, path).unwrap();
        keys.push(host.warm_key(&model(1, 256), &[]).await.unwrap());
    }
    let different: BTreeSet<_> = keys.iter().collect();
    assert_eq!(different.len(), keys.len());
    fs::remove_file(template).unwrap();
    assert!(host.warm_key(&model(1, 256), &[]).await.is_err());
}

#[tokio::test]
async fn a_machine_that_is_ready_runs_when_it_is_claimed_and_not_before() {
    let bench = Bench::new().await;
    let layers = bench.paused().await;
    bench.log();
    bench.prepare(&bench.id, &layers).await.unwrap();
    assert_eq!(bench.log(), ["restore 0+0"]);
    let not_running = || HostError::NotRunning {
        id: bench.id.clone(),
    };
    assert_eq!(bench.exec("exit 3").await, Err(not_running()));
    assert_eq!(bench.pause(&layers).await.1, Err(not_running()));

    let created = bench.claim(&bench.id).await.unwrap();
    assert_eq!(created.timings.start, Start::Pool);
    assert_eq!(bench.log(), ["vm.resume  0"]);
    assert_eq!(bench.exec("exit 3").await, Ok(3));
    assert_eq!(bench.claim(&bench.id).await, Err(not_running()), "once");
    // It is a sandbox like any other.
    let (next, saved) = bench.pause(&layers).await;
    saved.unwrap();
    bench.assert_only(&next);
}

#[tokio::test]
async fn a_ready_machine_leaves_nothing_whatever_becomes_of_it() {
    // One whose agent says nothing is waited for as long.
    let bench = Bench::with_timeout(Duration::from_secs(15)).await;
    let layers = bench.paused().await;
    let none = Layers::default();
    let refused = bench.prepare(&bench.id, &none).await;
    assert!(
        matches!(refused, Err(HostError::Internal { .. })),
        "{refused:?}"
    );
    bench.spoil("refuse-restore");
    let refused = bench.prepare(&bench.id, &layers).await;
    assert!(
        matches!(refused, Err(HostError::Start { .. })),
        "{refused:?}"
    );
    bench.assert_only(&layers);
    bench.mend("refuse-restore");

    bench.prepare(&bench.id, &layers).await.unwrap();
    bench.host.destroy(&bench.id).await.unwrap();
    bench.assert_only(&layers);

    let mut events = bench.host.events().await;
    let _ = fs::remove_file(bench.dir.path().join("pid"));
    bench.prepare(&bench.id, &layers).await.unwrap();
    let pid = fs::read_to_string(bench.dir.path().join("pid")).unwrap();
    let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let lost = HostEvent::Lost {
        id: bench.id.clone(),
    };
    assert_eq!(events.next().await, Some(lost));
    bench.assert_only(&layers);
    let id = bench.id.clone();
    assert_eq!(bench.claim(&id).await, Err(HostError::NotRunning { id }));

    for fault in ["no-resume", "mute"] {
        bench.spoil(fault);
        bench.prepare(&bench.id, &layers).await.unwrap();
        let claimed = bench.claim(&bench.id).await;
        assert!(
            matches!(claimed, Err(HostError::Start { .. })),
            "{claimed:?}"
        );
        bench.assert_only(&layers);
        bench.mend(fault);
    }
    bench.prepare(&bench.id, &layers).await.unwrap();
    bench.host.shutdown(&BTreeSet::new()).await;
    bench.assert_only(&layers);
}

#[tokio::test]
async fn a_working_set_is_added_to_the_layer_whole_or_not_at_all() {
    let bench = Bench::new().await;
    let layers = bench.paused().await;
    let directory = format!("data/layers/{}", layers.memory[0]);
    let files = bench.names(&directory);
    bench.start(&bench.id, &layers).await.unwrap();
    bench.spoil("no-working-set");
    let refused = bench.host.note_working_set(&bench.id, &layers).await;
    assert!(
        matches!(refused, Err(HostError::Internal { .. })),
        "{refused:?}"
    );
    assert_eq!(bench.names(&directory), files);
    bench.mend("no-working-set");
    bench
        .host
        .note_working_set(&bench.id, &layers)
        .await
        .unwrap();
    let file = bench.dir.path().join(&directory).join("working-set.json");
    assert_eq!(fs::read_to_string(file).unwrap(), "pages");
    assert_eq!(bench.names(&directory).len(), files.len() + 1);
    // It goes with its layer.
    bench.host.destroy(&bench.id).await.unwrap();
    let all: Vec<_> = layers.all().cloned().collect();
    bench.host.discard(&all).await.unwrap();
    bench.assert_only(&Layers::default());
}

#[tokio::test]
async fn clones_have_beforehand_what_another_of_the_same_snapshot_has_touched() {
    let bench = Bench::configured(Duration::from_secs(60), true).await;
    let layers = bench.paused().await;
    let prefetches = async |start| {
        let id = SandboxId::random();
        bench.start_as(start, &id, &layers).await.unwrap();
        let options = fs::read_to_string(bench.dir.path().join("restore")).unwrap();
        (id, options.contains(",prefault=working-set"))
    };
    let (first, is_prefetched) = prefetches(Start::Fork).await;
    assert!(!is_prefetched);
    assert!(prefetches(Start::Resume).await.1, "that of a base will do");
    bench.host.note_working_set(&first, &layers).await.unwrap();
    assert!(prefetches(Start::Fork).await.1);
    bench.host.shutdown(&BTreeSet::new()).await;
}

#[tokio::test]
async fn a_disk_is_kept_however_its_machine_ends() {
    let bench = Bench::new().await;
    let (host, id) = (&bench.host, &bench.id);
    let none = Layers::default();
    let kept = none.saved_disk(LayerId::random());
    assert!(matches!(
        host.keep(id, &kept.disk[0]).await,
        Err(HostError::NotRunning { .. })
    ));
    bench.start(id, &none).await.unwrap();
    host.keep(id, &kept.disk[0]).await.unwrap();
    let mut events = host.events().await;
    // The agent on this machine takes nothing down, so that the power is cut.
    let request = PowerOffRequest {
        id: id.clone(),
        timeout_ms: 60_000,
        layer: Some(kept.disk[0].clone()),
    };
    assert!(!host.power_off(request.clone()).await.unwrap());
    assert!(matches!(
        host.power_off(request).await,
        Err(HostError::NotRunning { .. })
    ));
    assert!(host.holds(&kept).await.unwrap());

    // It starts from that disk, and a disk is kept on it although the VMM is lost.
    bench.start(id, &kept).await.unwrap();
    let next = kept.saved_disk(LayerId::random());
    host.keep(id, &next.disk[1]).await.unwrap();
    let pids = fs::read_to_string(bench.dir.path().join("pid")).unwrap();
    let status = Command::new("/bin/kill")
        .args(["-KILL", pids.lines().last().unwrap()])
        .status();
    assert!(status.unwrap().success());
    let told = events.next().await.unwrap();
    assert!(
        matches!(&told, HostEvent::Ended { id: ended, end: End::Failed { .. } } if ended == id),
        "the first end was not told, and the second is: {told:?}"
    );
    assert!(host.holds(&next).await.unwrap());
    bench.start(id, &next).await.unwrap();
    host.destroy(id).await.unwrap();
    assert!(host.holds(&next).await.unwrap());
}
