//! Security scans, on a host that runs nothing.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

mod support;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use api::audit;
use api::domain::{Change, News, Posture, Principal, Subscription, VmmPosture};
use api::scan::{MAX_KEPT, Scan, ScanId, ScanKind, ScanSpec, ScanStatus, ScanStore, Scans};
use rusqlite::Connection;
use serde_json::{Value, json};
use support::kept::spec;
use support::{ADVISORIES, Api};

/// The API, and a user of it.
struct Bench {
    api: Api,
    bearer: String,
}

impl Bench {
    async fn new() -> Self {
        let api = Api::new(1 << 20, 1 << 20).await;
        *api.host.posture.lock().unwrap() = Posture {
            vmm: Some(VmmPosture {
                is_jailed: true,
                has_seccomp: true,
                has_no_new_privs: true,
                has_capabilities: false,
                has_own_user: true,
            }),
            exposed: Vec::new(),
        };
        let bearer = api.user("alice", "admin").await;
        let bench = Self { api, bearer };
        bench.file("/etc/passwd", "root:x:0:0::/root:/bin/sh\n");
        bench.file("/etc/group", "root:x:0:\n");
        bench.file("/etc/shadow", "root:*:19000::::::\n");
        bench.file("/etc/ssh/sshd_config", "PermitRootLogin no\n");
        bench.file("/proc/sys/kernel/randomize_va_space", "2\n");
        bench
    }

    fn file(&self, path: &str, content: &str) {
        let mut files = self.api.host.files.lock().unwrap();
        files.insert(path.to_owned(), content.as_bytes().to_vec());
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.call_as(&self.bearer, method, path, body).await
    }

    async fn call_as(&self, bearer: &str, method: &str, path: &str, body: Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let path = format!("/api/v1{path}");
        let headers = [("authorization", bearer)];
        let (status, answer) = self.api.call_as(method, &path, &body, &headers).await;
        (status.as_u16(), answer)
    }

    async fn vm(&self, name: &str, is_on: bool) {
        let (status, vm) = self.call("POST", "/vms", json!({"name": name})).await;
        assert_eq!(status, 201, "{vm}");
        if is_on {
            let path = format!("/vms/{name}/start");
            let (status, answer) = self.call("POST", &path, Value::Null).await;
            assert_eq!(status, 200, "{answer}");
        }
    }

    async fn start(&self, scan: Value) -> Value {
        let (status, started) = self.call("POST", "/security/scan", scan).await;
        assert_eq!(status, 202, "{started}");
        started
    }

    /// The record of a scan.
    async fn record(&self, scan: &Value) -> Scan {
        let id = scan["scan_id"].as_str().unwrap().parse().unwrap();
        self.api.store.scan(&id).await.unwrap().unwrap()
    }

    /// Adds the record of another scan than this one.
    async fn add(&self, scan: &Scan) {
        let mut scan = scan.clone();
        scan.id = ScanId::random();
        assert!(self.api.store.insert_scan(&scan).await.unwrap());
    }

    async fn get(&self, started: &Value) -> Value {
        let path = format!("/security/scans/{}", started["scan_id"].as_str().unwrap());
        let (status, scan) = self.call("GET", &path, Value::Null).await;
        assert_eq!(status, 200, "{scan}");
        scan
    }

    /// A scan that has ended.
    async fn scan(&self, scan: Value) -> Value {
        let mut events = self.api.manager.subscribe();
        let started = self.start(scan).await;
        ended(&mut events, &started["scan_id"]).await;
        self.get(&started).await
    }
}

/// Waits until it is told that this scan has ended, and with which status.
async fn ended(events: &mut Subscription, scan: &Value) -> &'static str {
    loop {
        if let News::Event(event) = events.next().await.unwrap()
            && let Change::ScanEnded { id, status, .. } = &event.change
            && scan == id
        {
            return status;
        }
    }
}

fn finding<'a>(scan: &'a Value, check: &str) -> Option<&'a Value> {
    let findings = scan["results"]["findings"].as_array().unwrap();
    findings.iter().find(|finding| finding["check"] == check)
}

#[tokio::test]
async fn a_weak_setting_is_found_and_a_good_one_is_not() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    let configuration = json!({"scan_type": "configuration", "target": "test-vm"});
    let good = bench.scan(configuration.clone()).await;
    assert_eq!(good["status"], "completed", "{good}");
    assert_eq!(finding(&good, "ssh.root_login"), None);
    let count = |scan: &Value, field: &str| scan["results"][field].as_u64().unwrap();
    let sum = ["passed", "failed", "warnings"].map(|field| count(&good, field));
    assert_eq!(count(&good, "total_checks"), sum.iter().sum::<u64>());
    assert!(sum[0] >= 10, "{good}");

    bench.file("/etc/ssh/sshd_config", "PermitRootLogin yes\n");
    bench.file("/etc/shadow", "root::19000::::::\n");
    bench.file("/proc/sys/kernel/randomize_va_space", "0\n");
    bench.api.host.posture.lock().unwrap().vmm = Some(VmmPosture::default());
    let started = bench.start(configuration.clone()).await;
    let time = |value: &Value| value.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    assert!(time(&started["estimated_completion"]) >= time(&started["started_at"]));
    assert_eq!(started["status"], "started");
    let weak = bench.scan(configuration).await;
    let found = finding(&weak, "ssh.root_login").unwrap();
    for (field, expected) in [
        ("severity", "medium"),
        ("category", "configuration"),
        ("description", "SSH root login enabled"),
        ("affected_resource", "test-vm"),
        ("outcome", "failed"),
    ] {
        assert_eq!(found[field], expected);
    }
    let line = "/etc/ssh/sshd_config: PermitRootLogin yes";
    assert_eq!(found["details"], json!([line]));
    for check in [
        "account.empty_password",
        "kernel.randomize_va_space",
        "host.jail",
    ] {
        assert_eq!(finding(&good, check), None, "{check}");
        assert!(finding(&weak, check).is_some(), "{check} {weak}");
    }
    assert_eq!(
        finding(&weak, "account.empty_password").unwrap()["details"],
        json!(["root"])
    );
    let added = count(&weak, "failed") - count(&good, "failed");
    assert_eq!(
        added, 7,
        "jail, seccomp, privileges, user, SSH, password, randomization"
    );
    let risk = count(&weak, "risk_score") - count(&good, "risk_score");
    assert_eq!(risk, 25 + 10 + 10 + 5 + 5 + 10 + 5);
    assert!(time(&weak["completed_at"]) >= time(&weak["started_at"]));
}

#[tokio::test]
async fn an_agent_that_walks_and_one_that_does_not_come_to_the_same() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    bench.file("/srv/deep/down/file", "x");
    bench.file("/mnt/file", "x");
    bench.file(
        "/proc/mounts",
        "/dev/vda / ext4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n",
    );
    let configuration = json!({"scan_type": "configuration", "target": "test-vm"});
    let mut results = Vec::new();
    for walks in [false, true] {
        bench.api.host.walks.store(walks, Ordering::Relaxed);
        let scan = bench.scan(configuration.clone()).await;
        assert_eq!(scan["status"], "completed", "{scan}");
        let unowned = &finding(&scan, "file.unowned").unwrap()["details"];
        let unowned: BTreeSet<_> = unowned
            .as_array()
            .unwrap()
            .iter()
            .map(Value::to_string)
            .collect();
        assert!(unowned.contains("\"/srv/deep/down/file\""), "{unowned:?}");
        assert!(
            !unowned.iter().any(|path| path.contains("/mnt/")),
            "{unowned:?}"
        );
        results.push(unowned);
    }
    assert_eq!(results[0], results[1]);
}

#[tokio::test]
async fn a_guest_that_has_too_much_to_say_has_not_passed() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    bench.file("/etc/sudoers", "root ALL=(ALL) ALL\n");
    let configuration = json!({"scan_type": "configuration", "target": "test-vm"});
    let outcome = |scan: &Value, check: &str| match finding(scan, check) {
        None => "passed".to_owned(),
        Some(found) => found["outcome"].as_str().unwrap().to_owned(),
    };
    let little = bench.scan(configuration.clone()).await;
    for check in ["sudo.no_password", "ssh.root_login", "guest.unreadable"] {
        assert_eq!(outcome(&little, check), "passed", "{little}");
    }
    // Files that are no parts of the settings are not counted as such.
    let full = "#\n".repeat(1 << 19);
    for index in 0..300 {
        bench.file(&format!("/etc/ssh/sshd_config.d/{index}.off"), "x");
    }
    for index in 0..20 {
        bench.file(&format!("/etc/sudoers.d/{index}"), &full);
    }
    let config = "PermitRootLogin no\nInclude /etc/ssh/sshd_config.d/*.conf\n";
    bench.file("/etc/ssh/sshd_config", config);
    bench.file(
        "/etc/ssh/sshd_config.d/last.conf",
        "PermitEmptyPasswords yes\n",
    );
    let much = bench.scan(configuration.clone()).await;
    assert_eq!(outcome(&much, "sudo.no_password"), "warning", "{much}");
    assert_eq!(outcome(&much, "ssh.root_login"), "passed");
    assert_eq!(outcome(&much, "ssh.empty_passwords"), "failed");
    let details = &finding(&much, "guest.unreadable").unwrap()["details"];
    assert_eq!(details[0], "what there is to read is more than 16 MiB");
    bench.file("/etc/sudoers.d/0", "bob ALL=(ALL) NOPASSWD: ALL\n");
    let found = bench.scan(configuration).await;
    assert_eq!(outcome(&found, "sudo.no_password"), "failed", "{found}");
}

#[tokio::test]
async fn of_a_machine_that_is_off_only_the_host_is_looked_at() {
    let bench = Bench::new().await;
    bench.vm("off", false).await;
    bench.vm("on", true).await;
    bench.file("/etc/ssh/sshd_config", "PermitRootLogin yes\n");
    let scan = bench
        .scan(json!({"scan_type": "configuration", "target": "all"}))
        .await;
    assert_eq!(scan["target"], "all");
    assert_eq!(
        finding(&scan, "ssh.root_login").unwrap()["affected_resource"],
        "on"
    );
    let unseen = finding(&scan, "guest.not_inspected").unwrap();
    assert_eq!(unseen["affected_resource"], "off");
    assert_eq!(unseen["outcome"], "warning");
    bench.api.host.posture.lock().unwrap().exposed = vec!["/d/disk.qcow2".into()];
    let scan = bench
        .scan(json!({"scan_type": "configuration", "target": "off"}))
        .await;
    let exposed = finding(&scan, "host.saved_files").unwrap();
    assert_eq!(exposed["details"], json!(["/d/disk.qcow2"]));
    assert_eq!(finding(&scan, "ssh.root_login"), None);
}

#[tokio::test]
async fn a_scan_of_more_machines_than_it_looks_at_says_how_many_are_left_out() {
    let bench = Bench::new().await;
    for number in 0..1003 {
        let spec = spec(&format!("vm-{number}"));
        bench.api.manager.create_off(spec).await.unwrap();
    }
    for kind in ["configuration", "compliance", "vulnerability"] {
        let all = json!({"scan_type": kind, "target": "all"});
        let scan = bench.scan(all).await;
        let left_out = finding(&scan, "machines.left_out").unwrap();
        assert_eq!(
            (&left_out["outcome"], &left_out["affected_resource"]),
            (&json!("warning"), &json!("daemon"))
        );
        let details = left_out["details"].to_string();
        assert!(details.contains("3 machines are older"), "{details}");
        let one = json!({"scan_type": kind, "target": "vm-1"});
        let scan = bench.scan(one).await;
        assert_eq!(finding(&scan, "machines.left_out"), None);
    }
}

#[tokio::test]
async fn frameworks_select_checks_and_name_their_controls() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    bench.file("/etc/ssh/sshd_config", "PermitRootLogin yes\n");
    bench.file("/proc/sys/kernel/randomize_va_space", "0\n");
    let of = |frameworks: Value| json!({"scan_type": "compliance", "target": "test-vm", "frameworks": frameworks});
    let all = bench.scan(of(json!(["SOC2", "HIPAA", "PCI_DSS"]))).await;
    let controls = &finding(&all, "ssh.root_login").unwrap()["controls"];
    assert_eq!(controls["PCI_DSS"], json!(["2.2.2", "8.3.1", "8.3.6"]));
    assert_eq!(controls["GDPR"], Value::Null);
    assert!(finding(&all, "kernel.randomize_va_space").is_some());
    assert_eq!(finding(&all, "daemon.audit_log"), None);
    let hipaa = bench.scan(of(json!(["HIPAA"]))).await;
    assert_eq!(finding(&hipaa, "kernel.randomize_va_space"), None);
    let total = |scan: &Value| scan["results"]["total_checks"].as_u64().unwrap();
    assert!(total(&hipaa) < total(&all));

    let path = bench.api.dir.path().join(audit::FILE);
    let sql = "DROP TRIGGER no_update; UPDATE records SET user_id = 'x' WHERE seq = 1;";
    Connection::open(path).unwrap().execute_batch(sql).unwrap();
    let tampered = bench.scan(of(json!(["HIPAA"]))).await;
    let found = finding(&tampered, "daemon.audit_log").unwrap();
    assert_eq!(
        (&found["severity"], &found["affected_resource"]),
        (&json!("critical"), &json!("daemon"))
    );
    assert_eq!(found["controls"], json!({"HIPAA": ["164.312(b)"]}));
}

#[tokio::test]
async fn packages_are_compared_with_known_holes_and_without_any_it_says_so() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    bench.file(
        "/etc/os-release",
        "ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm\n",
    );
    let scan = json!({"scan_type": "vulnerability", "target": "test-vm"});
    let missing = bench.scan(scan.clone()).await;
    assert!(
        finding(&missing, "package.not_compared").is_some(),
        "no file: {missing}"
    );
    let holes = json!({
        "bash": {"CVE-2024-1": {"releases": {"bookworm": {
            "status": "resolved", "fixed_version": "5.2.15-3", "urgency": "high"}}}},
        "tar": {"CVE-2024-2": {"releases": {"bookworm": {
            "status": "resolved", "fixed_version": "1.34+dfsg-1", "urgency": "high"}}}},
    });
    let path = bench.api.dir.path().join(ADVISORIES);
    std::fs::write(path, holes.to_string()).unwrap();
    let without = bench.scan(scan.clone()).await;
    let why = &finding(&without, "package.not_compared").unwrap()["details"][0];
    assert!(
        why.as_str().unwrap().contains("no packages of dpkg"),
        "{why}"
    );
    bench.file(
        "/var/lib/dpkg/status",
        "Package: bash\nStatus: install ok installed\nVersion: 5.2.15-2+b7\n\n\
         Package: tar\nStatus: install ok installed\nVersion: 1.34+dfsg-1.2\n",
    );
    let compared = bench.scan(scan).await;
    let results = &compared["results"];
    assert_eq!(
        (&results["total_checks"], &results["failed"]),
        (&json!(2), &json!(1))
    );
    let hole = finding(&compared, "package.hole").unwrap();
    assert_eq!(
        hole["details"],
        json!(["bash 5.2.15-2+b7: CVE-2024-1, mended in 5.2.15-3"])
    );
    assert_eq!(
        (&hole["severity"], &hole["category"]),
        (&json!("high"), &json!("vulnerability"))
    );
    assert_eq!(results["risk_score"], 10);

    // Without a file in the settings.
    let log = audit::AuditLog::open(&bench.api.dir.path().join(audit::FILE)).unwrap();
    let scans = Scans::open(bench.api.store.clone(), log, None)
        .await
        .unwrap();
    let spec = ScanSpec {
        kind: ScanKind::Vulnerability,
        target: None,
        frameworks: Vec::new(),
    };
    let local = Principal::Local;
    let mut events = bench.api.manager.subscribe();
    let scan = scans.start(&bench.api.manager, &local, spec).await.unwrap();
    ended(&mut events, &json!(scan.id.as_str())).await;
    let scan = scans.get(&local, scan.id.as_str()).await.unwrap();
    let results = scan.results.unwrap();
    assert!(results.findings[0].details[0].contains("set scan.advisories"));
}

#[tokio::test]
async fn what_is_asked_for_wrongly_is_told_at_once_and_scans_are_their_owners() {
    let bench = Bench::new().await;
    let bob = bench.api.user("bob", "user").await;
    bench.vm("hers", true).await;
    let wrong = json!({"scan_type": "x", "frameworks": ["SOC2", "SOX"]});
    let (status, error) = bench.call("POST", "/security/scan", wrong).await;
    assert_eq!(status, 422);
    let fields: Vec<_> = error["details"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| &it["field"])
        .collect();
    assert_eq!(fields, ["scan_type", "target", "frameworks"]);
    let of = |target: &str| json!({"scan_type": "configuration", "target": target});
    for target in ["hers", "nobodys"] {
        let (status, error) = bench
            .call_as(&bob, "POST", "/security/scan", of(target))
            .await;
        assert_eq!(status, 404);
        assert_eq!(error["message"], format!("VM '{target}' not found"));
    }
    let started = bench.start(of("all")).await;
    let path = format!("/security/scans/{}", started["scan_id"].as_str().unwrap());
    for (path, who) in [
        (path.as_str(), &bob),
        ("/security/scans/sc-00000000", &bench.bearer),
    ] {
        let (status, error) = bench.call_as(who, "GET", path, Value::Null).await;
        assert_eq!(status, 404, "{error}");
    }
    let mut events = bench.api.manager.subscribe();
    let (_, his) = bench
        .call_as(&bob, "POST", "/security/scan", of("all"))
        .await;
    assert_eq!(ended(&mut events, &his["scan_id"]).await, "completed");
    let path = format!("/security/scans/{}", his["scan_id"].as_str().unwrap());
    let (_, scan) = bench.call_as(&bob, "GET", &path, Value::Null).await;
    assert_eq!(
        scan["results"]["total_checks"], 0,
        "he has no machines: {scan}"
    );
    let logs = bench
        .call(
            "GET",
            "/security/audit-logs?action_type=security_scan",
            Value::Null,
        )
        .await
        .1;
    assert_eq!(logs["logs"][0]["resource_id"], his["scan_id"]);
}

#[tokio::test]
async fn who_has_guests_that_do_not_answer_keeps_nobody_else_waiting() {
    let bench = Bench::new().await;
    let bob = bench.api.user("bob", "user").await;
    bench.vm("hers", true).await;
    for (path, body) in [
        ("/vms", json!({"name": "his"})),
        ("/vms/his/start", Value::Null),
    ] {
        let (status, answer) = bench.call_as(&bob, "POST", path, body).await;
        assert!(status < 300, "{answer}");
    }
    // Scans of packages do not read it.
    bench.file("/etc/passwd", "hang");
    let slow = json!({"scan_type": "configuration", "target": "hers"});
    let first = bench.start(slow.clone()).await;
    for _ in 1..8 {
        bench.start(slow.clone()).await;
    }
    let mut events = bench.api.manager.subscribe();
    let quick = json!({"scan_type": "vulnerability", "target": "his"});
    let (_, his) = bench.call_as(&bob, "POST", "/security/scan", quick).await;
    assert_eq!(ended(&mut events, &his["scan_id"]).await, "completed");
    assert_eq!(bench.get(&first).await["status"], "started");
}

#[tokio::test]
async fn scans_under_way_are_counted_however_many_others_have() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    bench.file("/etc/passwd", "hang");
    let of = json!({"scan_type": "configuration", "target": "test-vm"});
    let mut under_way = bench.record(&bench.start(of.clone()).await).await;
    for _ in 1..8 {
        bench.add(&under_way).await;
    }
    under_way.owner = None;
    for _ in 0..=MAX_KEPT {
        bench.add(&under_way).await;
    }
    let (status, error) = bench.call("POST", "/security/scan", of).await;
    assert_eq!(status, 429, "{error}");
}

#[tokio::test]
async fn the_estimate_is_of_the_work_of_own_scans() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    let of = json!({"scan_type": "configuration", "target": "test-vm"});
    let time = |value: &Value| value.as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    let estimate = |started: &Value| {
        let end = time(&started["estimated_completion"]);
        end.duration_since(time(&started["started_at"])).as_secs()
    };
    let mut events = bench.api.manager.subscribe();
    let started = bench.start(of.clone()).await;
    assert_eq!(estimate(&started), 10);
    ended(&mut events, &started["scan_id"]).await;
    let mut record = bench.record(&started).await;
    assert_eq!(record.status, ScanStatus::Completed);
    assert!(record.work_ms.is_some());
    // It waited for an hour.
    record.started_at -= jiff::SignedDuration::from_hours(1);
    record.work_ms = Some(7000);
    for _ in 0..10 {
        bench.add(&record).await;
    }
    record.owner = None;
    record.work_ms = Some(900_000);
    bench.add(&record).await;
    assert_eq!(estimate(&bench.start(of).await), 7);
}

#[tokio::test]
async fn an_end_of_the_daemon_cancels_scans_and_a_crash_fails_them() {
    let bench = Bench::new().await;
    bench.vm("test-vm", true).await;
    // The guest does not answer.
    bench.file("/etc/passwd", "hang");
    let of = json!({"scan_type": "configuration", "target": "test-vm"});
    let first = bench.start(of.clone()).await;
    for _ in 1..8 {
        bench.start(of.clone()).await;
    }
    let (status, error) = bench.call("POST", "/security/scan", of.clone()).await;
    assert_eq!(status, 429, "{error}");
    assert_eq!(bench.get(&first).await["status"], "started");
    let Bench { api, bearer } = bench;
    let bench = Bench {
        api: api.restart().await,
        bearer,
    };
    let failed = bench.get(&first).await;
    assert_eq!(failed["status"], "failed");
    assert_eq!(failed["status_reason"], "the daemon has ended while it ran");
    assert_eq!(failed["results"], Value::Null);
    let mut events = bench.api.manager.subscribe();
    let second = bench.start(of.clone()).await;
    bench.api.scans.shutdown().await;
    assert_eq!(ended(&mut events, &second["scan_id"]).await, "cancelled");
    let cancelled = bench.get(&second).await;
    assert_eq!(cancelled["status"], "cancelled");
    assert!(cancelled["completed_at"].is_string());
    let (status, _) = bench.call("POST", "/security/scan", of).await;
    assert_eq!(status, 503);
}
