//! Sandboxes that are paused, resumed, forked and started warm: what is in them goes on.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::process::children_of;
use e2e_tests::report;
use e2e_tests::work::{Work, soak};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How far a guest's clock may be off, in nanoseconds.
const CLOCK_TOLERANCE_NS: i128 = 50_000_000;

fn small() -> Value {
    json!({"memory_mb": 192})
}

fn now_ns() -> i128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i128::try_from(since.as_nanos()).unwrap()
}

/// The guest's clock is right, as far as can be told through commands: each tells that it is ahead by
/// no less than one number and no more than another.
fn assert_clock(sandbox: &Sandbox<'_>) {
    let (mut least, mut most) = (i128::MIN, i128::MAX);
    for _ in 0..5 {
        let before = now_ns();
        let guest: i128 = sandbox.must("date +%s%N").parse().unwrap();
        least = least.max(guest - now_ns());
        most = most.min(guest - before);
    }
    report(&format!(
        "the guest's clock is ahead by {} to {} ms",
        least / 1_000_000,
        most / 1_000_000
    ));
    assert!(
        least <= CLOCK_TOLERANCE_NS && most >= -CLOCK_TOLERANCE_NS,
        "{least} to {most} ns"
    );
}

/// What tells one machine from another. What comes first stays the same over pauses.
fn identity(sandbox: &Sandbox<'_>) -> [String; 6] {
    [
        sandbox.must("cat /proc/sys/kernel/hostname"),
        sandbox.must("cat /etc/machine-id"),
        sandbox.must("cat /proc/sys/kernel/random/boot_id"),
        sandbox.must("head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'"),
        sandbox.must(GETRANDOM),
        sandbox.must("cat /proc/sys/kernel/random/uuid"),
    ]
}

/// getrandom(2), whose number is 318.
const GETRANDOM: &str =
    r#"perl -e '$b = "\0" x 32; syscall(318, $b, 32, 0) == 32 or die; print unpack("H*", $b)'"#;

/// Processes that are there before a snapshot is taken, each with a result in a file once it has
/// been copied: one has the random generator open, and draws from it when told; one has a connection
/// to the host and waits for its end; one sleeps; one reads the monotonic clock (clock_gettime, 228)
/// over and over.
const BEFORE: &str = r#"
cat >/root/draw.pl <<'END'
open(my $random, '<:raw', '/dev/urandom') or die; open(my $up, '>', '/root/draws'); close($up);
select(undef, undef, undef, 0.05) until -e '/root/draw';
sysread($random, my $bytes, 32) == 32 or die;
open(my $drawn, '>', '/root/drawn.new'); print $drawn unpack('H*', $bytes); close($drawn);
rename('/root/drawn.new', '/root/drawn');
END
cat >/root/connect.pl <<'END'
socket(my $s, 40, 1, 0) or die "$!"; connect($s, pack('SSLLx4', 40, 0, 5000, 2)) or die "$!";
open(my $up, '>', '/root/connected'); close($up);
my $read = sysread($s, my $byte, 1);
open(my $closed, '>', '/root/closed'); print $closed defined $read ? $read : "$!"; close($closed);
END
cat >/root/clock.pl <<'END'
my ($last, $steps) = (0, 0);
while (1) {
    my $time = pack('qq', 0, 0); syscall(228, 1, $time) == 0 or die;
    my ($s, $ns) = unpack('qq', $time); my $now = $s * 1e9 + $ns;
    if ($now < $last) { open(my $back, '>', '/root/backwards'); close($back) }
    $last = $now; select(undef, undef, undef, 0.01);
    if (++$steps % 20 == 0) { open(my $up, '>', '/root/clock'); print $up $steps; close($up) }
}
END
for script in draw connect clock; do setsid perl "/root/$script.pl" </dev/null >/dev/null 2>"/root/$script.err" & done
setsid sh -c 'until [ -e /root/snooze ]; do sleep 0.1; done; sleep 5; touch /root/fired' </dev/null >/dev/null 2>&1 &
for second in $(seq 60); do
    ! [ -e /root/draws ] || ! [ -e /root/connected ] || ! [ -e /root/clock ] || break
    sleep 1
done
[ -e /root/draws ] && [ -e /root/connected ] && [ -e /root/clock ] || { ls /root; cat /root/*.err; exit 1; }
touch /root/snooze
"#;

/// What was under way when a clone's snapshot was taken has come to a good end. Returns what the
/// process drew that had opened the generator before.
fn after(clone: &Sandbox<'_>) -> String {
    clone.must("until [ -s /root/closed ]; do sleep 0.1; done; cat /root/closed");
    clone.must("until [ -e /root/fired ]; do sleep 0.1; done");
    clone.must("rm /root/clock; until [ -e /root/clock ]; do sleep 0.1; done");
    clone.must("! [ -e /root/backwards ]");
    clone.must("touch /root/draw; until [ -e /root/drawn ]; do sleep 0.1; done; cat /root/drawn")
}

/// How many mounts show another boot id than the kernel's.
fn boot_id_mounts(sandbox: &Sandbox<'_>) -> String {
    sandbox.must("grep -c /proc/sys/kernel/random/boot_id /proc/self/mountinfo || true")
}

#[test]
fn what_runs_goes_on_after_every_pause() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    let [hostname, machine_id, boot_id, ..] = identity(&sandbox);
    assert_eq!(hostname, sandbox.id);
    let mut work = Work::begin(&sandbox);
    for generation in 1..=soak("MVS_SOAK_CYCLES", 3) {
        work.assert_goes_on(&sandbox);
        let monotonic = sandbox.must("cut -d. -f1 /proc/uptime");
        sandbox.pause();
        assert!(children_of(daemon.process.pid()).is_empty());
        assert!(!daemon.runtime_directory(&sandbox.id).exists());
        let (status, answer) = sandbox.try_exec(&["true"], 10);
        assert_eq!(
            (status, &answer["error"]["code"]),
            (409, &json!("invalid_state"))
        );
        // Long enough for a clock that stood still meanwhile to be seen.
        thread::sleep(Duration::from_secs(2));
        let record = sandbox.resume();
        report(&format!(
            "generation {generation}: {}",
            record["timings_ms"]
        ));
        assert_eq!(record["timings_ms"]["start"], "resume");
        assert_clock(&sandbox);
        let before: u64 = monotonic.parse().unwrap();
        let after: u64 = sandbox.must("cut -d. -f1 /proc/uptime").parse().unwrap();
        assert!(after >= before, "monotonic time went backwards");
        work.assert_goes_on(&sandbox);
        assert_eq!(
            identity(&sandbox)[..3],
            [hostname.clone(), machine_id.clone(), boot_id.clone()]
        );
    }
    sandbox.delete();
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

#[test]
fn clones_of_a_snapshot_are_machines_of_their_own() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    sandbox.must("echo before >/root/file; sync");
    let socket = daemon
        .runtime_directory(&sandbox.id)
        .join("vsock.sock_5000");
    let host = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    sandbox.must(BEFORE);
    let (connection, _) = host.accept().unwrap();
    let body = json!({"sandbox_id": sandbox.id, "name": "base"}).to_string();
    let (status, snapshot) = daemon.call("POST", "/v1/snapshots", &body);
    assert_eq!(status, 201, "{snapshot}");
    assert!(
        snapshot["size_bytes"].as_u64().unwrap() > 1 << 20,
        "{snapshot}"
    );
    assert_eq!(snapshot["checksum"].as_str().unwrap().len(), 64);
    sandbox.must("echo after >/root/file");

    let (status, forked) = daemon.call("POST", "/v1/snapshots/base/fork", r#"{"count": 2}"#);
    assert_eq!(status, 201, "{forked}");
    assert_eq!(forked["failed"], json!([]));
    let ids = forked["sandboxes"].as_array().unwrap().iter();
    let clones: Vec<_> = ids
        .map(|clone| daemon.sandbox(clone["id"].as_str().unwrap()))
        .collect();
    let identities: Vec<_> = clones.iter().chain([&sandbox]).map(identity).collect();
    for what in 0..6 {
        let all: BTreeSet<_> = identities.iter().map(|identity| &identity[what]).collect();
        assert_eq!(all.len(), 3, "{identities:?}");
    }
    let drawn: BTreeSet<_> = clones.iter().map(after).collect();
    assert_eq!(drawn.len(), 2, "{drawn:?}");
    // The one that the snapshot was taken of has gone on, connection and all.
    sandbox.must("! [ -e /root/closed ] && ! [ -e /root/backwards ]");
    drop(connection);
    assert!(!drawn.contains(&after(&sandbox)));
    assert_eq!(sandbox.must("cat /root/closed"), "0");
    // A clone of a clone has one mount, and an id of its own.
    assert_eq!(boot_id_mounts(&clones[0]), "1");
    let (status, forked) = daemon.call("POST", &clones[0].path("/fork"), "{}");
    assert_eq!(status, 201, "{forked}");
    let third = daemon.sandbox(forked["sandboxes"][0]["id"].as_str().unwrap());
    assert_eq!(boot_id_mounts(&third), "1");
    assert!(
        identities
            .iter()
            .all(|other| other[2] != identity(&third)[2])
    );
    third.must("! (echo x >/proc/sys/kernel/random/boot_id) 2>/dev/null");
    third.delete();
    for clone in &clones {
        assert_eq!(identity(clone)[0], clone.id);
        assert_eq!(clone.must("cat /root/file"), "before");
        assert_clock(clone);
        clone.must(&format!("echo {} >/root/file", clone.id));
    }
    for clone in &clones {
        assert_eq!(clone.must("cat /root/file"), clone.id);
        clone.delete();
    }
    assert_eq!(sandbox.must("cat /root/file"), "after");
    let (status, _) = daemon.call("GET", "/v1/snapshots/base", "");
    assert_eq!(status, 200);
    sandbox.delete();
    assert_eq!(daemon.layers().len(), 2, "the snapshot's");
    let request = e2e_tests::http::Request::new("DELETE", "/v1/snapshots/base");
    assert_eq!(daemon.send(request, std::io::empty(), 0).status, 204);
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

#[test]
fn a_running_parent_is_forked_and_goes_on() {
    let daemon = Daemon::start();
    let parent = daemon.create(&small());
    let mut work = Work::begin(&parent);
    work.assert_goes_on(&parent);
    let mut grown = Vec::new();
    for generation in 1..=2 {
        let (status, forked) = daemon.call("POST", &parent.path("/fork"), r#"{"count": 1}"#);
        assert_eq!(status, 201, "{forked}");
        report(&format!(
            "fork {generation}: the parent stood still for {} ms; {}",
            forked["stall_ms"], forked["sandboxes"][0]["timings_ms"]
        ));
        let child = daemon.sandbox(forked["sandboxes"][0]["id"].as_str().unwrap());
        let mut childs = work.clone();
        work.assert_goes_on(&parent);
        childs.assert_goes_on(&child);
        parent.must(&format!("echo {generation} >/root/of-the-parent"));
        child.must(&format!("echo {generation} >/root/of-the-child"));
        // What the parent has written since is not the child's.
        child.must(&format!("! grep -qx {generation} /root/of-the-parent"));
        parent.must("! [ -e /root/of-the-child ]");
        assert_clock(&child);
        grown.push((child, childs));
    }
    // A fork may be paused like any other, and so may its parent.
    for (sandbox, mut work) in grown
        .into_iter()
        .chain([(daemon.sandbox(&parent.id), work)])
    {
        sandbox.pause();
        sandbox.resume();
        work.assert_goes_on(&sandbox);
        sandbox.delete();
    }
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

#[test]
fn a_snapshot_without_memory_is_a_disk_to_boot_from() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    let mut work = Work::begin(&sandbox);
    // In the guest's memory alone, but for the freeze.
    sandbox.must("sync; echo unsynced >/root/file; head -c 3000000 /dev/urandom >/root/data");
    let sum = sandbox.must("sha256sum </root/data");
    let body = json!({"sandbox_id": sandbox.id, "name": "disk", "include_memory": false});
    let (status, snapshot) = daemon.call("POST", "/v1/snapshots", &body.to_string());
    assert_eq!(status, 201, "{snapshot}");
    assert_eq!(snapshot["include_memory"], false);
    assert_eq!(snapshot["checksum"].as_str().unwrap().len(), 64);
    assert_eq!(daemon.layers().len(), 1, "a disk and no memory");
    // Neither frozen any more, nor lost.
    sandbox.must("echo later >/root/file");
    work.assert_goes_on(&sandbox);
    // With a pause the file system is not frozen: as after a crash, its journal is replayed.
    sandbox.pause();
    let body = json!({"sandbox_id": sandbox.id, "name": "crash", "include_memory": false});
    let (status, snapshot) = daemon.call("POST", "/v1/snapshots", &body.to_string());
    assert_eq!(status, 201, "{snapshot}");
    sandbox.delete();

    for (name, has_recovered, content) in [("disk", false, "unsynced"), ("crash", true, "")] {
        let path = format!("/v1/snapshots/{name}/fork");
        let (status, forked) = daemon.call("POST", &path, "{}");
        assert_eq!(status, 201, "{forked}");
        assert_eq!(forked["sandboxes"][0]["timings_ms"]["start"], "cold");
        let booted = daemon.sandbox(forked["sandboxes"][0]["id"].as_str().unwrap());
        assert_eq!(booted.must("cat /proc/sys/kernel/hostname"), booted.id);
        let recovery = booted.must("dmesg | grep -c 'EXT4-fs.*recovery complete' || true");
        assert_eq!(recovery != "0", has_recovered, "{name}");
        booted.must("! grep -q '[c]ount.pl' /proc/[0-9]*/cmdline 2>/dev/null");
        assert_eq!(booted.must("sha256sum </root/data"), sum);
        if !content.is_empty() {
            assert_eq!(booted.must("cat /root/file"), content);
            assert!(work.has_its_files(&booted));
        }
        booted.delete();
    }
    for name in ["disk", "crash"] {
        let request = e2e_tests::http::Request::new("DELETE", &format!("/v1/snapshots/{name}"));
        assert_eq!(daemon.send(request, std::io::empty(), 0).status, 204);
    }
    assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
}

/// A small file system over a directory, until it is dropped.
struct Full<'a>(&'a std::path::Path);

impl<'a> Full<'a> {
    fn over(directory: &'a std::path::Path) -> Self {
        let flags = MountFlags::empty();
        rustix::mount::mount("none", directory, "tmpfs", flags, c"size=2m").unwrap();
        Self(directory)
    }
}

impl Drop for Full<'_> {
    fn drop(&mut self) {
        let unmounted = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
        assert!(unmounted.is_ok() || thread::panicking());
    }
}

#[test]
fn on_a_full_disk_a_sandbox_is_not_paused_and_runs_on() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&small());
    let mut work = Work::begin(&sandbox);
    let layers = daemon.layers_directory();
    {
        let _full = Full::over(&layers);
        for operation in ["/pause", "/fork"] {
            daemon.refused(
                ("POST", &sandbox.path(operation), "{}"),
                (502, "agent_error"),
                &["runs on", "No space left on device"],
            );
            assert_eq!(sandbox.get()["status"], "running");
            assert!(daemon.layers().is_empty(), "{:?}", daemon.layers());
            work.assert_goes_on(&sandbox);
        }
    }
    sandbox.pause();
    sandbox.resume();
    work.assert_goes_on(&sandbox);
    sandbox.delete();
}

#[test]
fn the_second_of_a_shape_starts_warm() {
    let daemon = Daemon::start_with(&["--warm-disk-bytes", "1073741824", "--pool-size", "0"]);
    let first = daemon.create(&small());
    let timings = first.get()["timings_ms"].clone();
    assert_eq!(timings["start"], "cold");
    report(&format!("cold: {timings}"));
    first.delete();
    daemon.process.stderr.wait_for("warm snapshot made");
    let second = daemon.create(&small());
    let third = daemon.create(&small());
    for sandbox in [&second, &third] {
        let timings = sandbox.get()["timings_ms"].clone();
        assert_eq!(timings["start"], "warm");
        report(&format!("warm: {timings}"));
        assert_clock(sandbox);
    }
    let (one, other) = (identity(&second), identity(&third));
    for what in 0..6 {
        assert_ne!(one[what], other[what]);
    }
    assert_eq!((&one[0], &other[0]), (&second.id, &third.id));
    second.must("echo mine >/root/file");
    third.must("! [ -e /root/file ]");
    // Saved again, only what changed since the template's snapshot is written.
    let before = daemon.layers();
    second.pause();
    let new: u64 = daemon
        .layers()
        .difference(&before)
        .map(|layer| size(&daemon.layers_directory().join(layer)))
        .sum();
    report(&format!(
        "a pause of a warm sandbox writes {} KiB",
        new / 1024
    ));
    assert!(new < 40 << 20, "{new} bytes");
    second.resume();
    assert_eq!(second.must("cat /root/file"), "mine");
}

/// The names of the machines that have become ready so far, once they are so many.
fn wait_until_ready(daemon: &Daemon, count: usize) -> Vec<String> {
    let is_ready = |line: &str| {
        let line: Value = serde_json::from_str(line).ok()?;
        let fields = line.get("fields").unwrap_or(&line);
        (fields["message"] == "a machine is ready").then_some(())?;
        Some(fields["sandbox"].as_str()?.to_owned())
    };
    daemon
        .process
        .stderr
        .wait_for_text("ready machines", |text| {
            let ready: Vec<_> = text.lines().filter_map(is_ready).collect();
            (ready.len() >= count).then_some(ready)
        })
}

#[test]
fn a_sandbox_from_the_pool_is_one_of_its_own_whenever_it_is_taken() {
    let mut daemon = Daemon::start_with(&["--warm-disk-bytes", "1073741824", "--pool-size", "2"]);
    daemon.create(&small()).delete();
    let ready = wait_until_ready(&daemon, 2);
    let noted = daemon.layers().into_iter().find_map(|layer| {
        let directory = daemon.layers_directory().join(layer);
        fs::read(directory.join("working-set.json")).ok()
    });
    let noted: Value = serde_json::from_slice(&noted.expect("what machines touch first")).unwrap();
    for pages in ["read", "written"] {
        let runs: Vec<(u64, u64)> =
            serde_json::from_value(noted["content"]["pages"][pages].clone()).unwrap();
        let bytes: u64 = runs.iter().map(|(start, end)| end - start).sum();
        report(&format!(
            "{pages} first: {} KiB in {} runs",
            bytes >> 10,
            runs.len()
        ));
        assert!(bytes > 0 && bytes < 64 << 20);
    }

    // No time passes for them while they wait, however long that is, and their wall clocks are right.
    let uptime = |sandbox: &Sandbox<'_>| {
        let seconds: f64 = sandbox.must("cut -d' ' -f1 /proc/uptime").parse().unwrap();
        Duration::from_secs_f64(seconds)
    };
    let begun = Instant::now();
    let first = daemon.create(&small());
    let at_most = uptime(&first);
    thread::sleep(begun.elapsed() + Duration::from_secs(3));
    let begun = Instant::now();
    let second = daemon.create(&small());
    let now = uptime(&second);
    let own = begun.elapsed();
    assert!(now <= at_most + own, "{now:?}, {at_most:?} and {own:?}");
    assert!(uptime(&second) >= now);
    let sandboxes = [first, second];
    for sandbox in &sandboxes {
        assert!(ready.contains(&sandbox.id));
        let timings = sandbox.get()["timings_ms"].clone();
        assert_eq!(timings["start"], "pool");
        report(&format!("pool: {timings}"));
        assert_clock(sandbox);
    }
    let [one, other] = [identity(&sandboxes[0]), identity(&sandboxes[1])];
    for what in 0..4 {
        assert_ne!(one[what], other[what]);
    }
    assert_eq!((&one[0], &other[0]), (&sandboxes[0].id, &sandboxes[1].id));
    sandboxes[0].must("echo mine >/root/file");
    sandboxes[1].must("! [ -e /root/file ]");
    sandboxes[0].pause();
    sandboxes[0].resume();
    assert_eq!(sandboxes[0].must("cat /root/file"), "mine");
    for sandbox in sandboxes {
        sandbox.delete();
    }

    // One that is killed is replaced, and not handed out.
    let ready = wait_until_ready(&daemon, 4);
    let killed = daemon.sandbox(&ready[3]);
    let pid = Pid::from_raw(killed.outer_pid().cast_signed()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    let ready = wait_until_ready(&daemon, 5);
    let sandbox = daemon.create(&small());
    assert!(
        sandbox.id == ready[2] || sandbox.id == ready[4],
        "{}",
        sandbox.id
    );
    sandbox.must("true");

    // A crash leaves nothing of them, and neither does an orderly end.
    let running = sandbox.id.clone();
    let crashed: Vec<_> = ready
        .iter()
        .filter(|id| **id != running)
        .map(|id| daemon.runtime_directory(id))
        .collect();
    daemon = daemon.crash();
    for directory in crashed {
        assert!(!directory.exists(), "{}", directory.display());
    }
    // But the one that was claimed is somebody's, and runs on.
    daemon.sandbox(&running).must("true");
    daemon.create(&small()).delete();
    wait_until_ready(&daemon, 1);
    daemon.stop();
}

/// What the files in a directory occupy, in bytes.
fn size(directory: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let files = fs::read_dir(directory).unwrap();
    files
        .map(|file| file.unwrap().metadata().unwrap().blocks() * 512)
        .sum()
}
