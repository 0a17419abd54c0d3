//! What guests take, and how what they have grows and shrinks: `/api/v1`, its health, and what Prometheus is
//! told.

use std::thread;
use std::time::{Duration, Instant};

use e2e_tests::admin::Admin;
use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::report;
use serde_json::{Value, json};

/// A field of the guest's /proc/meminfo, in MiB.
fn mem_total(sandbox: &Sandbox<'_>) -> u64 {
    let kib = sandbox.must("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
    kib.parse::<u64>().unwrap() / 1024
}

fn cpus(sandbox: &Sandbox<'_>) -> u64 {
    sandbox.must("nproc").parse().unwrap()
}

const BURN: &str = "i=0; while :; do i=$((i+1)); done";

/// Share of its one vCPU that a guest has had after it has worked for some seconds, by the daemon's measure of
/// the last ones.
fn busy(daemon: &Daemon, admin: &Admin, sandbox: &Sandbox<'_>) -> f64 {
    thread::scope(|scope| {
        let work = scope.spawn(|| sandbox.must(&format!("timeout 14 sh -c '{BURN}' || true")));
        thread::sleep(Duration::from_secs(12));
        let metrics = admin.must(daemon, "GET", "/vms/vm/metrics", &Value::Null);
        work.join().unwrap();
        metrics["cpu"]["usage_percent"].as_f64().unwrap()
    })
}

#[test]
fn what_a_machine_takes_is_measured_and_what_it_has_changes_while_it_runs() {
    let mut daemon = Daemon::start();
    let admin = Admin::register(&daemon);
    let vm = json!({"name": "vm", "vcpus": 1, "memory_mb": 256,
        "storage_config": {"disk_size_gb": 3}});
    let id = admin.must(&daemon, "POST", "/vms", &vm)["id"]
        .as_str()
        .unwrap()
        .to_owned();
    admin.must(&daemon, "POST", "/vms/vm/start", &Value::Null);

    // The file system fills the disk.
    let sandbox = daemon.sandbox(&id);
    let size: u64 = sandbox
        .must("df -m --output=size / | tail -n 1")
        .parse()
        .unwrap();
    assert!((2850..3072).contains(&size), "{size} MiB of 3072");
    sandbox.must("fallocate -l 2500M /large && rm /large");

    // What is written, allocated and computed shows.
    let metrics = || admin.must(&daemon, "GET", "/vms/vm/metrics", &Value::Null);
    let before = metrics();
    sandbox.must("head -c 50M /dev/zero >/written && sync && mkdir -p /fill");
    sandbox.must("mount -t tmpfs -o size=100% fill /fill && head -c 60M /dev/zero >/fill/zeroes");
    let after = metrics();
    let grown = |part: &str, field: &str| {
        after[part][field].as_f64().unwrap() - before[part][field].as_f64().unwrap()
    };
    assert!(
        (0.045..0.1).contains(&grown("disk", "used_gb")),
        "{before} {after}"
    );
    assert!(grown("memory", "used_mb") > 50.0, "{before} {after}");
    assert!(grown("memory", "available_mb") < -50.0, "{before} {after}");
    assert!(grown("cpu", "cpu_time_seconds") > 0.0, "{before} {after}");
    assert_eq!(after["memory"]["allocated_mb"], 256);
    assert_eq!(after["disk"]["allocated_gb"], 3.0);
    assert!(
        after["network"].is_null() || after["network"]["bytes_in"].is_u64(),
        "{after}"
    );
    sandbox.must("umount /fill");
    let share = busy(&daemon, &admin, &sandbox);
    assert!(share > 50.0, "{share} % of one vCPU that works");
    let usage = admin.must(&daemon, "GET", "/vms/vm", &Value::Null);
    assert!(
        usage["resource_usage"]["memory_used_mb"].as_u64().unwrap() > 10,
        "{usage}"
    );
    let points = daemon.call("GET", &sandbox.path("/metrics?range=5m"), "").1;
    let points = points["points"].as_array().unwrap().clone();
    assert!(points.len() > 2, "{points:?}");
    assert!(
        points
            .iter()
            .any(|point| point["cpu_pct"].as_f64().unwrap() > 50.0),
        "{points:?}"
    );

    // It grows while it runs, and shrinks again.
    let small = mem_total(&sandbox);
    let set = |body: &Value| {
        let start = Instant::now();
        admin.must(&daemon, "PUT", "/vms/vm/resources", body);
        report(&format!("{body}: {} ms", start.elapsed().as_millis()));
    };
    set(&json!({"vcpus": 2, "memory_mb": 512}));
    assert_eq!(cpus(&sandbox), 2);
    let large = mem_total(&sandbox);
    assert!(large > small + 150, "{small} MiB, then {large}");
    let (status, refused) = admin.call(&daemon, "PUT", "/vms/vm/resources", &json!({"vcpus": 3}));
    assert_eq!(status, 409, "{refused}");

    // So it is after a pause, and under another daemon.
    sandbox.must("echo kept >/run/kept");
    sandbox.pause();
    sandbox.resume();
    assert_eq!(
        (cpus(&sandbox), sandbox.must("cat /run/kept")),
        (2, "kept".to_owned())
    );
    assert!(mem_total(&sandbox) > small + 150);
    // The connection that the agent is asked on was open when its guest was saved.
    assert_eq!(metrics()["memory"]["allocated_mb"], 512);
    assert_eq!(metrics()["cpu"]["vcpus"], 2);
    daemon = daemon.crash();
    let sandbox = daemon.sandbox(&id);
    let adopted = admin.must(&daemon, "GET", "/vms/vm/metrics", &Value::Null);
    assert_eq!(adopted["memory"]["allocated_mb"], 512);
    assert_eq!(
        (cpus(&sandbox), sandbox.must("cat /run/kept")),
        (2, "kept".to_owned())
    );
    let set = |body: &Value| admin.must(&daemon, "PUT", "/vms/vm/resources", body);
    set(&json!({"vcpus": 1, "memory_mb": 256}));
    set(&json!({"memory_limit_percent": 75}));
    assert_eq!(cpus(&sandbox), 1);
    let limited = mem_total(&sandbox);
    assert!(limited + 30 < small, "{small} MiB, then {limited}");

    // A limit of its processor time is kept by the host.
    set(&json!({"cpu_limit_percent": 30}));
    let share = busy(&daemon, &admin, &sandbox);
    assert!(
        (10.0..45.0).contains(&share),
        "{share} % with a limit of 30"
    );

    // What does not fit while it runs holds from the next start on.
    admin.must(&daemon, "POST", "/vms/vm/stop", &json!({"force": true}));
    set(
        &json!({"vcpus": 3, "memory_mb": 320, "memory_limit_percent": 100,
        "cpu_limit_percent": 100}),
    );
    admin.must(&daemon, "POST", "/vms/vm/start", &Value::Null);
    assert_eq!(cpus(&sandbox), 3);
    assert!(mem_total(&sandbox) > small + 50);

    let (status, health) = daemon.call("GET", "/api/v1/health", "");
    assert_eq!(
        (status, &health["status"]),
        (200, &json!("healthy")),
        "{health}"
    );
    let system = admin.must(&daemon, "GET", "/status", &Value::Null)["system"].clone();
    assert!(
        system["vmm_version"].as_str().unwrap().starts_with("vmm "),
        "{system}"
    );
    let version = system["cloud_hypervisor_version"].as_str().unwrap();
    let (major, _) = version.split_once('.').unwrap();
    assert!(major.parse::<u32>().unwrap() > 50, "{system}");
    let host = admin.must(&daemon, "GET", "/system/metrics", &Value::Null);
    assert_eq!(host["vms"]["total_vcpus_allocated"], 3, "{host}");
    sandbox.delete();
}

#[test]
fn a_machine_starts_warm_grows_and_boots_from_its_own_disk_after() {
    let daemon = Daemon::start_with(&["--warm-disk-bytes", "1073741824", "--pool-size", "0"]);
    let admin = Admin::register(&daemon);
    let make = |name: &str| {
        let vm = json!({"name": name, "vcpus": 1, "memory_mb": 256});
        let made = admin.must(&daemon, "POST", "/vms", &vm);
        daemon.sandbox(made["id"].as_str().unwrap())
    };
    let start =
        |name: &str| admin.must(&daemon, "POST", &format!("/vms/{name}/start"), &Value::Null);
    let first = make("first");
    start("first");
    assert_eq!(first.get()["timings_ms"]["start"], "cold");
    // The background boots and saves a machine of its own.
    daemon.process.stderr.wait_for("warm snapshot made");
    first.delete();

    let sandbox = make("vm");
    let begun = Instant::now();
    start("vm");
    report(&format!("warm start: {} ms", begun.elapsed().as_millis()));
    assert_eq!(sandbox.get()["timings_ms"]["start"], "warm");
    assert_eq!(sandbox.must("cat /proc/sys/kernel/hostname"), sandbox.id);
    let small = mem_total(&sandbox);
    let more = json!({"vcpus": 2, "memory_mb": 512});
    admin.must(&daemon, "PUT", "/vms/vm/resources", &more);
    assert_eq!(cpus(&sandbox), 2);
    assert!(mem_total(&sandbox) > small + 150);
    sandbox.must("echo kept >/root/kept && echo there >/run/there");

    // Nobody looks at its memory while it has nothing to do.
    let looks = "sed -n 's/^voluntary.*:\\s*//p' \
                 $(grep -l '^kcompactd0$' /proc/[0-9]*/comm 2>/dev/null | sed 's/comm$/status/')";
    let looks = || sandbox.must(looks).parse::<u64>().unwrap();
    let (before, ()) = (looks(), thread::sleep(Duration::from_secs(3)));
    let after = looks();
    assert!(after <= before + 1, "{before} times, then {after}");

    // A snapshot is of what it has become, on top of what it has started from.
    let taken = json!({"name": "grown", "include_memory": true});
    admin.must(&daemon, "POST", "/vms/vm/snapshots", &taken);
    sandbox.must("echo later >/root/kept && rm /run/there && sync");
    admin.must(&daemon, "POST", "/vms/vm/stop", &json!({"force": true}));
    let restore = "/vms/vm/snapshots/grown/restore";
    admin.must(&daemon, "POST", restore, &Value::Null);
    let content = sandbox.must("cat /root/kept /run/there");
    assert_eq!((content.as_str(), cpus(&sandbox)), ("kept\nthere", 2));

    // What it is now, it is after its next start, which boots it.
    admin.must(&daemon, "POST", "/vms/vm/stop", &Value::Null);
    start("vm");
    assert_eq!(sandbox.get()["timings_ms"]["start"], "cold");
    assert_eq!(sandbox.must("cat /root/kept"), "kept");
    assert_eq!(cpus(&sandbox), 2);
    assert!(mem_total(&sandbox) > small + 150);
    sandbox.delete();
}
