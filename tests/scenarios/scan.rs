//! Security scans of real guests, and of what holds them.

use std::collections::BTreeSet;

use e2e_tests::admin::Admin;
use e2e_tests::daemon::Daemon;
use e2e_tests::report;
use e2e_tests::socket::Socket;
use serde_json::{Value, json};
use tungstenite::http::header::AUTHORIZATION;

/// What a scan of all machines came to.
fn scan(daemon: &Daemon, admin: &Admin, kind: &str) -> Value {
    let headers = [(AUTHORIZATION, admin.bearer.as_str())];
    let mut events = Socket::open_with(daemon, "/api/v1/system/events", &headers);
    let body = json!({"scan_type": kind, "target": "all"});
    let (status, started) = admin.call(daemon, "POST", "/security/scan", &body);
    assert_eq!(status, 202, "{started}");
    let path = format!("/security/scans/{}", started["scan_id"].as_str().unwrap());
    loop {
        let told = events.receive().unwrap();
        if told["event_type"] == "scan_ended" {
            assert_eq!(told["data"]["scan_id"], started["scan_id"]);
            break;
        }
    }
    let (_, mut scan) = admin.call(daemon, "GET", &path, &Value::Null);
    assert_eq!(scan["status"], "completed", "{scan}");
    scan["results"].take()
}

/// Names of the checks with a finding at this machine.
fn checks(results: &Value, vm: &str, outcome: &str) -> BTreeSet<String> {
    let findings = results["findings"].as_array().unwrap().iter();
    let of_it = findings
        .filter(|finding| finding["affected_resource"] == vm && finding["outcome"] == outcome);
    of_it
        .map(|finding| finding["check"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn what_is_weak_in_a_guest_is_found_and_a_guest_that_is_off_is_not_looked_into() {
    let directory = tempfile::tempdir().unwrap();
    let advisories = directory.path().join("advisories.json");
    let config = directory.path().join("sandboxd.toml");
    let setting = format!("[scan]\nadvisories = {:?}\n", advisories.to_str().unwrap());
    std::fs::write(&config, setting).unwrap();
    let daemon = Daemon::start_with(&["--config", config.to_str().unwrap()]);
    let admin = Admin::register(&daemon);
    let small = json!({"memory_mb": 192});
    let (weak, clean) = (daemon.create(&small), daemon.create(&small));
    let (status, off) = admin.call(&daemon, "POST", "/vms", &json!({"name": "off"}));
    assert_eq!(status, 201, "{off}");
    let codename = weak.must(". /etc/os-release && echo $VERSION_CODENAME");
    let version = weak.must("dpkg-query -W -f '${source:Version}' bash");
    weak.must(
        "mkdir -p /etc/ssh && echo 'PermitRootLogin yes' >/etc/ssh/sshd_config && \
         echo x >/srv/open && chmod 666 /srv/open && \
         cp /bin/true /srv/as-root && chmod 4755 /srv/as-root && \
         echo x >/srv/lost && chown 54321 /srv/lost && \
         echo 'eve::0:0::/:/bin/sh' >>/etc/passwd && \
         echo 0 >/proc/sys/kernel/randomize_va_space",
    );
    let start = std::time::Instant::now();
    let results = scan(&daemon, &admin, "configuration");
    report(&format!(
        "a scan of two guests and one that is off: {:.1} s, {} checks",
        start.elapsed().as_secs_f64(),
        results["total_checks"]
    ));
    let planted = [
        "ssh.root_login",
        "file.world_writable",
        "file.set_id",
        "file.unowned",
        "account.empty_password",
        "account.other_root",
        "kernel.randomize_va_space",
    ];
    let planted: BTreeSet<_> = planted.map(str::to_owned).into();
    let found = checks(&results, &weak.id, "failed");
    assert!(planted.is_subset(&found), "{found:?}");
    let details = |check: &str| {
        let findings = results["findings"].as_array().unwrap();
        let mut findings = findings.iter().filter(|finding| finding["check"] == check);
        let of_it = findings.find(|finding| finding["affected_resource"] == weak.id.as_str());
        of_it.unwrap()["details"].clone()
    };
    assert_eq!(details("file.world_writable"), json!(["/srv/open"]));
    assert_eq!(details("file.set_id"), json!(["/srv/as-root"]));
    assert_eq!(details("file.unowned"), json!(["/srv/lost"]));
    assert_eq!(details("account.empty_password"), json!(["eve"]));
    let unplanted = checks(&results, &clean.id, "failed");
    assert!(unplanted.is_disjoint(&planted), "{unplanted:?}");
    for vm in [weak.id.as_str(), &clean.id, "off"] {
        let of_host = checks(&results, vm, "failed");
        assert!(
            of_host.iter().all(|check| !check.starts_with("host.")),
            "{of_host:?}"
        );
    }
    assert_eq!(checks(&results, "off", "failed"), BTreeSet::new());
    assert!(checks(&results, "off", "warning").contains("guest.not_inspected"));
    assert!(!checks(&results, &clean.id, "warning").contains("guest.not_inspected"));

    let holes = json!({"bash": {
        "CVE-2000-0001": {"releases": {&codename: {"status": "open", "urgency": "low"}}},
        "CVE-2000-0002": {"releases": {&codename: {"status": "resolved", "fixed_version": version}}},
    }});
    std::fs::write(&advisories, holes.to_string()).unwrap();
    let results = scan(&daemon, &admin, "vulnerability");
    assert_eq!(results["failed"], 2, "bash of both guests: {results}");
    let details = results["findings"][0]["details"].to_string();
    assert!(
        details.contains("CVE-2000-0001") && !details.contains("CVE-2000-0002"),
        "{details}"
    );
    assert!(
        results["passed"].as_u64().unwrap() > 100,
        "{}",
        results["passed"]
    );
}
