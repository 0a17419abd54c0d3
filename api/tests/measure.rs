//! What sandboxes and their host take: every endpoint that tells it, on a host that runs nothing, and on
//! one that runs the real agent.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/served.rs"]
mod served;
mod support;
#[path = "support/vmm.rs"]
mod vmm;

use std::fs::File;
use std::sync::Arc;

use api::http::Access;
use axum::http::StatusCode;
use serde_json::{Value, json};
use served::Served;
use support::Api;
use support::meter::{GIB, MIB};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

async fn get(api: &Api, token: &str, path: &str) -> (u16, Value) {
    let headers = [("authorization", token)];
    let (status, body) = api.call_as("GET", path, "", &headers).await;
    (status.as_u16(), body)
}

#[tokio::test]
async fn a_machine_is_measured_as_the_host_tells() {
    let api = Api::new(1, 1).await;
    let token = api.user("alice", "user").await;
    let body =
        json!({"name": "vm", "vcpus": 2, "storage_config": {"disk_size_gb": 10}}).to_string();
    let headers = [("authorization", token.as_str())];
    let made = api.call_as("POST", "/api/v1/vms", &body, &headers).await;
    assert_eq!(made.0, StatusCode::CREATED, "{}", made.1);
    let metrics = "/api/v1/vms/vm/metrics";
    let (status, refused) = get(&api, &token, metrics).await;
    assert_eq!(status, 409, "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("must be running"), "{message}");
    let (_, off) = get(&api, &token, "/api/v1/vms/vm").await;
    assert!(off.get("resource_usage").is_none(), "{off}");

    let started = api
        .call_as("POST", "/api/v1/vms/vm/start", "", &headers)
        .await;
    assert_eq!(started.0, StatusCode::OK, "{}", started.1);
    let (status, measured) = get(&api, &token, metrics).await;
    assert_eq!(status, 200, "{measured}");
    assert!(
        measured["timestamp"]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .is_ok()
    );
    assert_eq!(measured["vm_name"], "vm");
    // 3 s of 10, of two vCPUs.
    let cpu = json!({"usage_percent": 15.0, "vcpus": 2, "cpu_time_seconds": 3.0});
    assert_eq!(measured["cpu"], cpu);
    let memory = json!({"allocated_mb": 512, "used_mb": 120, "usage_percent": 25.0,
        "available_mb": 360});
    assert_eq!(measured["memory"], memory);
    let disk = json!({"allocated_gb": 12.0, "used_gb": 2.5, "usage_percent": 25.0,
        "available_gb": 7.5});
    assert_eq!(measured["disk"], disk);
    let network = json!({"bytes_in": 1000, "bytes_out": 2000, "packets_in": 10,
        "packets_out": 20});
    assert_eq!(measured["network"], network);
    let (_, on) = get(&api, &token, "/api/v1/vms/vm").await;
    let usage = json!({"cpu_usage_percent": 15.0, "memory_used_mb": 120, "disk_usage_gb": 2.5});
    assert_eq!(on["resource_usage"], usage);
    assert!(on["uptime_seconds"].is_u64());

    *api.host.meter.card.lock().unwrap() = None;
    let (_, measured) = get(&api, &token, metrics).await;
    assert_eq!(measured["network"], Value::Null, "it has no card");
    *api.host.meter.is_silent.lock().unwrap() = true;
    let (status, silent) = get(&api, &token, metrics).await;
    assert_eq!((status, &silent["error"]), (502, &json!("agent_error")));
    let (status, silent) = get(&api, &token, "/api/v1/vms/vm").await;
    assert_eq!(status, 200, "what is known is told: {silent}");
    assert!(silent.get("resource_usage").is_none());
    assert_eq!(get(&api, &token, "/api/v1/vms/other/metrics").await.0, 404);
    let (_, known) = get(&api, &token, "/api/v1/vms/vm").await;
    let by_id = format!("/api/v1/vms/{}", known["id"].as_str().unwrap());
    let deleted = api.call_as("DELETE", &by_id, "", &headers).await;
    assert_eq!(deleted.0, StatusCode::NO_CONTENT, "{}", deleted.1);
    let (status, gone) = get(&api, &token, &format!("{by_id}/metrics")).await;
    assert_eq!(
        (status, &gone["error"]),
        (404, &json!("not_found")),
        "{gone}"
    );
    let anonymous = api.call("GET", metrics, "").await;
    assert_eq!(anonymous.0, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn the_host_is_measured_and_machines_are_counted_for_whoever_sees_them() {
    let api = Api::new(1, 1).await;
    let alice = api.user("alice", "user").await;
    let bob = api.user("bob", "user").await;
    let body = json!({"vcpus": 3, "memory_mb": 1024}).to_string();
    let headers = [("authorization", alice.as_str())];
    let made = api.call_as("POST", "/v1/sandboxes", &body, &headers).await;
    assert_eq!(made.0, StatusCode::CREATED, "{}", made.1);
    let off = json!({"name": "off"}).to_string();
    let made = api.call_as("POST", "/api/v1/vms", &off, &headers).await;
    assert_eq!(made.0, StatusCode::CREATED, "{}", made.1);
    let system = "/api/v1/system/metrics";
    let (status, measured) = get(&api, &alice, system).await;
    assert_eq!(status, 200, "{measured}");
    let host = json!({"cpu_usage_percent": 25.0, "cpu_cores": 8, "memory_total_gb": 32.0,
        "memory_used_gb": 16.0, "memory_usage_percent": 50.0, "disk_total_gb": 500.0,
        "disk_used_gb": 200.0, "disk_usage_percent": 50.0});
    assert_eq!(measured["host"], host);
    let vms = json!({"total_count": 2, "running_count": 1, "total_vcpus_allocated": 3,
        "total_memory_allocated_gb": 1.0});
    assert_eq!(measured["vms"], vms);
    let (_, others) = get(&api, &bob, system).await;
    let none = json!({"total_count": 0, "running_count": 0, "total_vcpus_allocated": 0,
        "total_memory_allocated_gb": 0.0});
    assert_eq!(others["vms"], none);
    assert_eq!(
        api.call("GET", system, "").await.0,
        StatusCode::UNAUTHORIZED
    );
}

#[tokio::test]
async fn what_a_sandbox_took_is_kept_and_is_not_anothers_to_see() {
    let api = Api::open(Access::Local).await;
    let id = api.create().await;
    let path = |base: &str, range: &str| format!("/v1/{base}/{id}/metrics{range}");
    api.manager.measure_all().await.unwrap();
    api.host.meter.vmm.lock().unwrap().memory_bytes = 200 * MIB;
    let (status, told) = api.call("GET", &path("sandboxes", ""), "").await;
    assert_eq!(status, StatusCode::OK, "{told}");
    assert_eq!(
        (&told["sandbox_id"], &told["range"]),
        (&json!(id), &json!("10m"))
    );
    let points = told["points"].as_array().unwrap();
    assert_eq!(points.len(), 2, "{points:?}");
    let memory: Vec<_> = points.iter().map(|point| &point["mem_bytes"]).collect();
    assert_eq!(memory, [&json!(100 * MIB), &json!(200 * MIB)]);
    // 3 s of 10, of one vCPU.
    assert_eq!(points[1]["cpu_pct"], 30.0);
    assert_eq!(points[1]["disk_bytes"], 3 * MIB);
    let now = jiff::Timestamp::now().as_second();
    assert!((now - points[1]["timestamp_unix"].as_i64().unwrap()).abs() < 600);
    for range in ["5m", "1h", "2h", "6h", "12h", "24h"] {
        let (status, told) = api
            .call("GET", &path("capsules", &format!("?range={range}")), "")
            .await;
        assert_eq!((status, &told["range"]), (StatusCode::OK, &json!(range)));
        assert!(
            !told["points"].as_array().unwrap().is_empty(),
            "that of now"
        );
    }
    let (status, refused) = api.call("GET", &path("sandboxes", "?range=1w"), "").await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("24h")
    );

    let before = api.call("GET", &format!("/v1/sandboxes/{id}"), "").await.1;
    api.call("GET", &path("sandboxes", ""), "").await;
    let after = api.call("GET", &format!("/v1/sandboxes/{id}"), "").await.1;
    assert_eq!(
        before["last_active_at"], after["last_active_at"],
        "to look is not to use"
    );

    let paused = format!("/v1/sandboxes/{id}/pause");
    assert_eq!(api.call("POST", &paused, "").await.0, StatusCode::OK);
    api.manager.measure_all().await.unwrap();
    let (status, told) = api.call("GET", &path("sandboxes", ""), "").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        told["points"].as_array().unwrap().len(),
        1,
        "as before it was paused"
    );
    let one = format!("/v1/sandboxes/{id}");
    assert_eq!(api.call("DELETE", &one, "").await.0, StatusCode::NO_CONTENT);
    let (status, gone) = api.call("GET", &path("sandboxes", ""), "").await;
    assert_eq!(status, StatusCode::CONFLICT);
    assert_eq!(gone["error"]["code"], "invalid_state");
    let (status, _) = api
        .call("GET", "/v1/sandboxes/sb-00000000/metrics", "")
        .await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_process_and_its_agent_are_measured() {
    let served = Served::new().await;
    let path = served.create().await;
    let id = path.rsplit('/').next().unwrap();
    let measured = served.manager.measure(id).await.unwrap();
    let usage = measured.usage;
    // The stand-in for a VMM, and the agent, which is a child of it as the second process of a jail is.
    assert!(usage.vmm.memory_bytes > MIB, "{usage:?}");
    assert!((1..600_000_000).contains(&usage.vmm.age_us), "{usage:?}");
    assert!(usage.vmm.disk_bytes > 0 && usage.vmm.disk_bytes < GIB);
    assert!(usage.guest.memory_available < usage.guest.memory_total);
    assert!(usage.guest.disk_used < usage.guest.disk_total);
    assert_eq!(usage.card, None);
    assert_eq!(usage.disk_size.div_ceil(MIB), 1);
    std::fs::write(served.dir.path().join("card"), "").unwrap();
    let card = served
        .manager
        .measure(id)
        .await
        .unwrap()
        .usage
        .card
        .unwrap();
    let told = (
        card.received_bytes,
        card.received_frames,
        card.sent_bytes,
        card.sent_frames,
    );
    assert_eq!(told, (1000, 10, 2000, 20));

    served.manager.measure_all().await.unwrap();
    let write = json!({"cmd": "/bin/sh", "args": ["-c", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"]});
    let (status, _) = served.call("POST", &format!("{path}/exec"), &write).await;
    assert_eq!(status, 200);
    let later = served.manager.measure(id).await.unwrap().usage.vmm;
    assert!(later.age_us >= usage.vmm.age_us && later.cpu_us >= usage.vmm.cpu_us);
    let (status, host) = served.call("GET", "/v1/sandboxes", &Value::Null).await;
    assert_eq!((status, host.as_array().unwrap().len()), (200, 1));
    let host = served.manager.measure_host().await.unwrap();
    let totals = (host.totals.all, host.totals.running, host.totals.vcpus);
    assert_eq!(totals, (1, 1, 1));
    assert!(host.usage.cpus > 0 && (0.0..=100.0).contains(&host.cpu_percent));

    let (status, _) = served.call("DELETE", &path, &Value::Null).await;
    assert_eq!(status, 204);
    assert!(served.manager.measure(id).await.is_err());
    use api::domain::MeterHost;
    assert!(served.host.vmm_usages().await.unwrap().is_empty());
}

#[tokio::test]
async fn each_part_is_asked_how_it_is() {
    let api = Api::new(1, 1).await;
    let (status, health) = api.call("GET", "/api/v1/health", "").await;
    assert_eq!(status, StatusCode::OK, "{health}");
    assert_eq!(
        (&health["status"], &health["version"]),
        (&json!("healthy"), &json!("0.1.0"))
    );
    assert!(health["uptime_seconds"].is_u64());
    let parts = [
        "api",
        "database",
        "cloud_hypervisor",
        "network",
        "disk",
        "images",
        "audit_log",
    ];
    for part in parts {
        assert_eq!(health["components"][part], "healthy", "{part}");
    }
    assert_eq!(health["components"].as_object().unwrap().len(), parts.len());

    let administrator = api.user("alice", "admin").await;
    let user = api.user("bob", "user").await;
    let break_part = |part: &str| {
        let mut health = api.host.meter.health.lock().unwrap();
        let reason = || format!("/srv/{part} is broken");
        match part {
            "cloud_hypervisor" => health.vmm = Err(reason()),
            "network" => health.network = Some(Err(reason())),
            "disk" => health.disk = Err(reason()),
            _ => health.images = Err(reason()),
        }
    };
    for part in ["cloud_hypervisor", "network", "disk", "images"] {
        break_part(part);
        let (status, health) = api.call("GET", "/api/v1/health", "").await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(health["status"], "unhealthy");
        assert_eq!(health["components"][part], "unhealthy");
        assert_eq!(health["error"], "service_unavailable");
        let message = health["message"].as_str().unwrap();
        assert!(
            !message.is_empty() && !message.contains("/srv"),
            "{message}"
        );
        let (_, to_user) = get(&api, &user, "/api/v1/health").await;
        assert_eq!(to_user["message"], *message);
        let (_, told) = get(&api, &administrator, "/api/v1/health").await;
        let message = told["message"].as_str().unwrap();
        assert!(
            message.contains(&format!("/srv/{part} is broken")),
            "{message}"
        );
        assert_eq!(
            api.call("GET", "/health", "").await.0,
            StatusCode::OK,
            "it serves"
        );
    }
    api.host.meter.health.lock().unwrap().network = None;
    let (_, health) = api.call("GET", "/api/v1/health", "").await;
    assert_eq!(health["components"]["network"], "disabled");
}

#[tokio::test]
async fn the_log_tells_once_that_a_part_is_unhealthy_and_that_it_is_healthy_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let log = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Arc::new(File::create(&path).unwrap()))
        .finish();
    let _logging = tracing::subscriber::set_default(log);
    let api = Api::new(1, 1).await;
    let ask = async |disk: Result<(), String>| {
        api.host.meter.health.lock().unwrap().disk = disk;
        api.call("GET", "/api/v1/health", "").await;
    };
    for left in [9, 8, 7] {
        ask(Err(format!("{left} MiB are free"))).await;
    }
    ask(Ok(())).await;
    ask(Ok(())).await;
    ask(Err("6 MiB are free".to_owned())).await;
    let log = std::fs::read_to_string(path).unwrap();
    let told = |text: &str| log.matches(text).count();
    assert_eq!(
        (told("9 MiB"), told("6 MiB"), told("MiB")),
        (1, 1, 2),
        "{log}"
    );
    assert_eq!(told("healthy again"), 1, "{log}");
}

#[tokio::test]
async fn the_status_is_counted_for_whoever_asks() {
    let api = Api::new(1, 1).await;
    let alice = api.user("alice", "admin").await;
    let bob = api.user("bob", "user").await;
    let id = api.create().await;
    let body = json!({"sandbox_id": id}).to_string();
    assert_eq!(
        api.call("POST", "/v1/snapshots", &body).await.0,
        StatusCode::CREATED
    );
    let (status, told) = get(&api, &alice, "/api/v1/status").await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(told["api_version"], env!("CARGO_PKG_VERSION"));
    let system = &told["system"];
    assert_eq!(system["cloud_hypervisor_version"], "54.0");
    assert_eq!(system["vmm_version"], "vmm 0.1.0");
    assert_eq!(system["python_version"], Value::Null);
    assert!(system.as_object().unwrap().contains_key("python_version"));
    let rust = system["rust_version"].as_str().unwrap();
    assert!(rust.split('.').count() >= 3, "{rust}");
    assert!(!system["host_os"].as_str().unwrap().is_empty());
    let counted = &told["statistics"];
    let vms = [
        &counted["total_vms"],
        &counted["running_vms"],
        &counted["total_snapshots"],
    ];
    assert_eq!(vms, [1, 1, 1]);
    let before = counted["api_requests_today"].as_u64().unwrap();
    assert!(before >= 6, "{before}");
    assert!(counted["average_response_time_ms"].as_f64().unwrap() > 0.0);
    let (_, told) = get(&api, &alice, "/api/v1/status").await;
    assert_eq!(told["statistics"]["api_requests_today"], before + 1);

    let (_, told) = get(&api, &bob, "/api/v1/status").await;
    let none = json!({"total_vms": 0, "running_vms": 0, "total_snapshots": 0,
        "api_requests_today": 0, "average_response_time_ms": 0.0});
    assert_eq!(told["statistics"], none);
    let (_, told) = get(&api, &bob, "/api/v1/status").await;
    assert_eq!(told["statistics"]["api_requests_today"], 1);
    assert_eq!(
        api.call("GET", "/api/v1/status", "").await.0,
        StatusCode::UNAUTHORIZED
    );
    api.host.meter.health.lock().unwrap().vmm = Err("gone".into());
    let (_, told) = get(&api, &bob, "/api/v1/status").await;
    assert_eq!(told["system"]["cloud_hypervisor_version"], Value::Null);
}

async fn scrape(api: &Api, headers: &[(&str, &str)]) -> (StatusCode, String) {
    let mut request = axum::http::Request::get("/metrics").header("host", "localhost:8000");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(axum::body::Body::empty()).unwrap();
    let response = tower::ServiceExt::oneshot(api.router.clone(), request)
        .await
        .unwrap();
    let status = response.status();
    let body = http_body_util::BodyExt::collect(response.into_body())
        .await
        .unwrap();
    (status, String::from_utf8(body.to_bytes().to_vec()).unwrap())
}

/// The value of a line of metrics.
#[track_caller]
fn value(text: &str, line: &str) -> f64 {
    let mut lines = text.lines().filter_map(|found| found.rsplit_once(' '));
    match lines.find(|(name, _)| *name == line) {
        Some((_, value)) => value.parse().unwrap(),
        None => panic!("no {line} in {text}"),
    }
}

#[tokio::test]
async fn prometheus_is_told_what_is_counted() {
    let api = Api::open(Access::Local).await;
    let first = api.create().await;
    api.create().await;
    api.call("POST", &format!("/v1/sandboxes/{first}/pause"), "")
        .await;
    api.call("GET", "/no/such/path", "").await;
    let (status, text) = scrape(&api, &[]).await;
    assert_eq!(status, StatusCode::OK, "{text}");
    assert!(text.ends_with("# EOF\n"));
    for (line, expected) in [
        ("sandboxd_sandboxes{state=\"running\"}", 1.0),
        ("sandboxd_sandboxes{state=\"paused\"}", 1.0),
        ("sandboxd_sandboxes{state=\"off\"}", 0.0),
        ("sandboxd_running_vcpus", 1.0),
        ("sandboxd_running_memory_bytes", (512 * MIB) as f64),
        (
            "sandboxd_sandbox_transitions_total{from=\"pending\",to=\"running\"}",
            2.0,
        ),
        (
            "sandboxd_sandbox_transitions_total{from=\"running\",to=\"pausing\"}",
            1.0,
        ),
        (
            "sandboxd_sandbox_start_seconds_count{kind=\"cold\",phase=\"total\"}",
            2.0,
        ),
        (
            "sandboxd_http_requests_total{method=\"POST\",route=\"/v1/sandboxes\",status=\"201\"}",
            2.0,
        ),
        (
            "sandboxd_http_requests_total{method=\"POST\",route=\"/v1/sandboxes/{id}/pause\",\
             status=\"200\"}",
            1.0,
        ),
        (
            "sandboxd_http_requests_total{method=\"GET\",route=\"none\",status=\"404\"}",
            1.0,
        ),
        (
            "sandboxd_http_request_seconds_count{method=\"POST\",route=\"/v1/sandboxes\"}",
            2.0,
        ),
        (
            "sandboxd_reconciler_healed_total{divergence=\"no_process\"}",
            0.0,
        ),
        ("sandboxd_host_cpus", 8.0),
        ("sandboxd_host_cpu_busy_seconds_total", 20.0),
        ("sandboxd_host_memory_bytes", (32 * GIB) as f64),
        ("sandboxd_host_memory_available_bytes", (16 * GIB) as f64),
        ("sandboxd_host_disk_bytes", (500 * GIB) as f64),
        ("sandboxd_host_disk_available_bytes", (200 * GIB) as f64),
    ] {
        assert_eq!(value(&text, line), expected, "{line}");
    }
    assert!(
        text.contains("sandboxd_build_info{version=\"0.1.0\",rust_version=\"1."),
        "{text}"
    );
    assert!(!text.contains(&first), "it names no sandbox");
}

#[tokio::test]
async fn only_administrators_and_the_machine_itself_see_what_is_counted() {
    let api = Api::open(Access::Credentials).await;
    let root = api.user("root", "admin").await;
    let alice = api.user("alice", "user").await;
    assert_eq!(scrape(&api, &[]).await.0, StatusCode::UNAUTHORIZED);
    let by = async |token: &str| scrape(&api, &[("authorization", token)]).await;
    assert_eq!(by(&alice).await.0, StatusCode::FORBIDDEN);
    let (status, text) = by(&root).await;
    assert_eq!(status, StatusCode::OK);
    assert!(!text.contains("alice") && !text.contains("root"), "{text}");
    let key = json!({"name": "prometheus"}).to_string();
    let headers = [("authorization", root.as_str())];
    let (_, key) = api.call_as("POST", "/v1/api-keys", &key, &headers).await;
    let key = key["key"].as_str().unwrap();
    assert_eq!(scrape(&api, &[("x-api-key", key)]).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_vmm_says_who_it_is_once_and_again_when_it_is_another() {
    use api::domain::MeterHost;
    let served = Served::new().await;
    let health = served.host.health().await;
    let vmm = health.vmm.unwrap();
    assert_eq!((vmm.build.as_str(), vmm.api.as_str()), ("vmm 9.9", "54.0"));
    assert_eq!((health.network, health.disk), (None, Ok(())));
    // There is no kernel at the place that was given.
    assert!(health.images.unwrap_err().contains("guest kernel"));
    assert_eq!(served.host.health().await.vmm.unwrap().api, "54.0");
    let path = served.dir.path().join("vmm");
    let asked = || {
        std::fs::read_to_string(served.dir.path().join("pid"))
            .unwrap()
            .lines()
            .count()
    };
    assert_eq!(asked(), 1, "it is asked once");
    std::fs::remove_file(&path).unwrap();
    assert!(
        served
            .host
            .health()
            .await
            .vmm
            .unwrap_err()
            .contains("cannot be used")
    );
    // One that does not answer is started once, however many ask meanwhile.
    let script = "#!/bin/sh\necho asked >>\"${0%/*}/pid\"\nexit 3\n";
    vmm::executable::write(&path, script);
    let all = futures_util::future::join_all((0..20).map(|_| served.host.health()));
    for health in all.await {
        let why = health.vmm.unwrap_err();
        assert!(why.contains("ended without an answer"), "{why}");
    }
    assert_eq!(asked(), 2);

    // Nor is it for those who hang up.
    std::fs::remove_file(&path).unwrap();
    let waits = served.dir.path().join("waits");
    let made = std::process::Command::new("mkfifo").arg(&waits).status();
    assert!(made.unwrap().success());
    let script = "#!/bin/sh\necho asked >>\"${0%/*}/pid\"\nread -r _ <\"${0%/*}/waits\"\nexit 3\n";
    vmm::executable::write(&path, script);
    for _ in 0..3 {
        let health = served.host.health();
        let started = async {
            while asked() < 3 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            health = health => panic!("{:?}", health.vmm),
            () = started => {}
        }
    }
    let go_on = tokio::task::spawn_blocking(move || std::fs::write(waits, "now\n"));
    let why = served.host.health().await.vmm.unwrap_err();
    assert!(why.contains("ended without an answer"), "{why}");
    go_on.await.unwrap().unwrap();
    assert_eq!(asked(), 3);
}
