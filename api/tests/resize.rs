//! Changing what machines have, on a host that runs nothing, and by a VMM that does as it is asked.

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

use std::sync::atomic::Ordering;

use api::domain::{Booted, HostError, Quota, Quotas, ResourceChange, StopSpec};
use serde_json::{Value, json};
use served::Served;
use support::{Api, PASSWORD};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// An API and one of its users.
struct Bench {
    api: Api,
    token: String,
}

impl Bench {
    async fn new() -> Self {
        Self::of(Api::new(1, 1).await).await
    }

    async fn of(api: Api) -> Self {
        let token = api.user("alice", "user").await;
        Self { api, token }
    }

    async fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let headers = [("authorization", self.token.as_str())];
        let answer = self.api.call_as(method, path, &body, &headers).await;
        (answer.0.as_u16(), answer.1)
    }

    async fn must(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, body).await;
        assert!(
            (200..300).contains(&status),
            "{method} {path}: {status} {answer}"
        );
        answer
    }

    /// A machine of 2 vCPUs and 512 MiB, called `vm`.
    async fn create(&self) {
        let vm = json!({"name": "vm", "vcpus": 2, "memory_mb": 512});
        self.must("POST", "/api/v1/vms", vm).await;
    }

    async fn start(&self) {
        self.must("POST", "/api/v1/vms/vm/start", Value::Null).await;
    }

    async fn set(&self, body: Value) -> (u16, Value) {
        self.call("PUT", "/api/v1/vms/vm/resources", body).await
    }

    /// vCPUs and memory by the record.
    async fn has(&self) -> (u64, u64) {
        let vm = self.must("GET", "/api/v1/vms/vm", Value::Null).await;
        let number = |field: &str| vm[field].as_u64().unwrap();
        (number("vcpus"), number("memory_mb"))
    }
}

#[tokio::test]
async fn a_machine_that_is_off_has_at_its_next_start_what_was_asked_for() {
    let bench = Bench::new().await;
    bench.create().await;
    let asked = json!({"vcpus": 4, "memory_mb": 1024, "cpu_limit_percent": 80,
        "memory_limit_percent": 90});
    let (status, answer) = bench.set(asked.clone()).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["message"], "Resources updated successfully");
    assert_eq!(answer["vm_name"], "vm");
    assert!(
        answer["updated_at"]
            .as_str()
            .unwrap()
            .parse::<jiff::Timestamp>()
            .is_ok()
    );
    assert_eq!(answer["new_resources"], asked);
    assert_eq!(bench.has().await, (4, 1024));
    bench.start().await;
    let started = bench
        .api
        .host
        .starts
        .lock()
        .unwrap()
        .last()
        .cloned()
        .unwrap();
    assert_eq!((started.shape.vcpus, started.shape.memory_mb), (4, 1024));
    let resources = started.resources;
    assert_eq!(
        (resources.cpu_limit_percent, resources.memory_limit_percent),
        (Some(80), Some(90))
    );
    // The host of these tests has 4096 MiB.
    assert_eq!(resources.booted, Some(Booted::with_room(4, 1024, 4096)));
    assert!(bench.api.host.meter.resizes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_running_machine_changes_as_far_as_it_has_room() {
    let bench = Bench::new().await;
    bench.create().await;
    bench.start().await;
    let (status, answer) = bench.set(json!({"vcpus": 4, "memory_mb": 1024})).await;
    assert_eq!(status, 200, "{answer}");
    let new = json!({"vcpus": 4, "memory_mb": 1024, "cpu_limit_percent": 100,
        "memory_limit_percent": 100});
    assert_eq!(answer["new_resources"], new);
    {
        let resizes = bench.api.host.meter.resizes.lock().unwrap();
        assert_eq!(
            (resizes[0].vcpus, resizes[0].memory_mb),
            ([2, 4], [512, 1024])
        );
    }
    for (asked, why) in [
        (json!({"vcpus": 5}), "up to 4 vCPUs"),
        (json!({"memory_mb": 1026}), "512 to 1024 MiB"),
        (json!({"memory_mb": 256}), "512 to 1024 MiB"),
        (json!({"memory_mb": 513}), "steps of 2 MiB"),
    ] {
        let (status, refused) = bench.set(asked.clone()).await;
        assert_eq!(status, 409, "{asked}: {refused}");
        let message = refused["message"].as_str().unwrap();
        assert!(
            message.contains(why) && message.contains("stop it"),
            "{message}"
        );
    }
    assert_eq!(bench.has().await, (4, 1024));
    // And what is said then works.
    let stop = json!({"force": true});
    bench.must("POST", "/api/v1/vms/vm/stop", stop).await;
    assert_eq!(
        bench.set(json!({"vcpus": 5, "memory_mb": 256})).await.0,
        200
    );
    bench.start().await;
    let started = bench
        .api
        .host
        .starts
        .lock()
        .unwrap()
        .last()
        .cloned()
        .unwrap();
    assert_eq!((started.shape.vcpus, started.shape.memory_mb), (5, 256));
    assert_eq!(
        started.resources.booted,
        Some(Booted::with_room(5, 256, 4096))
    );
    // A daemon that comes after this one has it so, too.
    let before = bench
        .api
        .manager
        .get(&started.id.to_string())
        .await
        .unwrap();
    assert_eq!(before.spec.resources, started.resources);
}

#[tokio::test]
async fn what_goes_wrong_leaves_a_machine_as_it_was() {
    let bench = Bench::new().await;
    bench.create().await;
    bench.start().await;
    let fail = |fault: HostError| *bench.api.host.meter.resize_fault.lock().unwrap() = Some(fault);
    let reason = || "the guest did not take the memory".to_owned();
    fail(HostError::Agent { reason: reason() });
    let (status, refused) = bench.set(json!({"memory_mb": 1024})).await;
    assert_eq!((status, &refused["error"]), (502, &json!("agent_error")));
    fail(HostError::Conflict { reason: reason() });
    assert_eq!(bench.set(json!({"memory_mb": 1024})).await.0, 409);
    assert_eq!(bench.has().await, (2, 512));
    for (asked, field) in [
        (json!({"vcpus": 33}), "vcpus"),
        (json!({"vcpus": "two"}), "vcpus"),
        (json!({"memory_mb": 100}), "memory_mb"),
        (json!({"cpu_limit_percent": 0}), "cpu_limit_percent"),
        (json!({"cpu_limit_percent": 101}), "cpu_limit_percent"),
        (json!({"memory_limit_percent": 5}), "memory_limit_percent"),
        (json!({}), "body"),
    ] {
        let (status, refused) = bench.set(asked.clone()).await;
        assert_eq!(status, 422, "{asked}: {refused}");
        assert_eq!(refused["details"][0]["field"], field, "{refused}");
    }
    assert_eq!(bench.set(json!([])).await.0, 400);
    bench
        .api
        .host
        .meter
        .limits_cpu
        .store(false, Ordering::Relaxed);
    let (status, refused) = bench.set(json!({"cpu_limit_percent": 50})).await;
    assert_eq!(status, 409);
    assert!(
        refused["message"].as_str().unwrap().contains("cgroups"),
        "{refused}"
    );
    let other = bench.call("PUT", "/api/v1/vms/other/resources", json!({"vcpus": 1}));
    assert_eq!(other.await.0, 404);
    assert!(bench.api.host.meter.resizes.lock().unwrap().is_empty());
    // All of it is no limit, which every host has.
    let (status, set) = bench.set(json!({"cpu_limit_percent": 100})).await;
    assert_eq!(status, 200, "{set}");
}

#[tokio::test]
async fn a_sandbox_without_room_takes_limits_of_its_time_only() {
    let api = Api::new(1, 1).await;
    let id = api.create().await;
    let set = async |change| api.manager.set_resources(&id, change).await;
    let refused = set(ResourceChange {
        vcpus: Some(2),
        ..ResourceChange::default()
    });
    let refused = refused.await.unwrap_err().to_string();
    assert!(refused.contains("stop it"), "{refused}");
    let limited = set(ResourceChange {
        cpu_limit_percent: Some(50),
        ..ResourceChange::default()
    });
    let limited = limited.await.unwrap();
    assert_eq!(limited.spec.resources.cpu_limit_percent, Some(50));
    let free = set(ResourceChange {
        cpu_limit_percent: Some(100),
        ..ResourceChange::default()
    });
    assert_eq!(free.await.unwrap().spec.resources.cpu_limit_percent, None);
    // Once it was stopped, it is started with room.
    let stop = StopSpec {
        force: true,
        timeout: std::time::Duration::ZERO,
    };
    api.manager.power_off(&id, stop).await.unwrap();
    api.manager.power_on(&id).await.unwrap();
    let grown = set(ResourceChange {
        vcpus: Some(2),
        ..ResourceChange::default()
    });
    assert_eq!(grown.await.unwrap().spec.vcpus, 2);
}

#[tokio::test]
async fn a_snapshot_of_memory_is_of_the_machine_as_it_was() {
    let bench = Bench::new().await;
    bench.create().await;
    bench.start().await;
    assert_eq!(
        bench.set(json!({"vcpus": 3, "memory_mb": 768})).await.0,
        200
    );
    let snapshots = "/api/v1/vms/vm/snapshots";
    bench.must("POST", snapshots, json!({"name": "s"})).await;
    let stop = json!({"force": true});
    bench.must("POST", "/api/v1/vms/vm/stop", stop).await;
    assert_eq!(
        bench.set(json!({"vcpus": 1, "memory_mb": 256})).await.0,
        200
    );
    bench.start().await;
    let restore = format!("{snapshots}/s/restore");
    bench.must("POST", &restore, Value::Null).await;
    assert_eq!(bench.has().await, (3, 768));
    let started = bench
        .api
        .host
        .starts
        .lock()
        .unwrap()
        .last()
        .cloned()
        .unwrap();
    assert!(!started.layers.memory.is_empty());
    assert_eq!((started.shape.vcpus, started.shape.memory_mb), (3, 768));
    assert_eq!(
        started.resources.booted,
        Some(Booted::with_room(2, 512, 4096))
    );
    assert_eq!(
        bench.set(json!({"vcpus": 4, "memory_mb": 1024})).await.0,
        200
    );
}

#[tokio::test]
async fn quotas_hold_for_machines_that_grow() {
    let user = Quota {
        vcpus: 5,
        memory_mb: 1024,
        ..Quota::default()
    };
    let quotas = Quotas {
        user,
        local: Quota::default(),
    };
    let bench = Bench::of(Api::with_quotas(quotas).await).await;
    bench.create().await;
    bench.start().await;
    let other = json!({"name": "other", "vcpus": 2, "memory_mb": 256});
    bench.must("POST", "/api/v1/vms", other).await;
    bench
        .must("POST", "/api/v1/vms/other/start", Value::Null)
        .await;
    for (asked, what) in [
        (json!({"vcpus": 4}), "vCPUs"),
        (json!({"memory_mb": 800}), "memory"),
    ] {
        let (status, refused) = bench.set(asked).await;
        assert_eq!(status, 429, "{refused}");
        assert!(
            refused["message"].as_str().unwrap().contains(what),
            "{refused}"
        );
    }
    assert_eq!(bench.has().await, (2, 512));
    // Of what it has itself it may keep all.
    assert_eq!(
        bench.set(json!({"vcpus": 3, "memory_mb": 768})).await.0,
        200
    );
}

#[tokio::test]
async fn a_vmm_is_told_what_its_machine_can_become_and_is_to_be() {
    let served = Served::new().await;
    let user = json!({"username": "root", "password": PASSWORD, "role": "admin"});
    assert_eq!(
        served.call("POST", "/api/v1/auth/register", &user).await.0,
        201
    );
    let path = served.create().await;
    let id = path.rsplit('/').next().unwrap();
    let stop = StopSpec {
        force: true,
        timeout: std::time::Duration::ZERO,
    };
    served.manager.power_off(id, stop).await.unwrap();
    let change = ResourceChange {
        memory_limit_percent: Some(75),
        ..ResourceChange::default()
    };
    served.manager.set_resources(id, change).await.unwrap();
    served.manager.power_on(id).await.unwrap();
    let log = || std::fs::read_to_string(served.dir.path().join("log")).unwrap();
    let change = ResourceChange {
        memory_mb: Some(1024),
        ..ResourceChange::default()
    };
    let grown = served.manager.set_resources(id, change).await.unwrap();
    assert_eq!(grown.spec.memory_mb, 1024);
    let asked = json!({"desired_ram": 1_u64 << 30, "desired_balloon": 256_u64 << 20});
    let resize = log()
        .lines()
        .rfind(|line| line.starts_with("vm.resize"))
        .map(str::to_owned);
    let resize = resize.unwrap();
    let body: Value = serde_json::from_str(resize.split(' ').nth(1).unwrap()).unwrap();
    assert_eq!(body, asked);
    std::fs::write(served.dir.path().join("no-resize"), "").unwrap();
    let change = ResourceChange {
        memory_mb: Some(512),
        ..ResourceChange::default()
    };
    let refused = served.manager.set_resources(id, change).await.unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("the machine has no memory to plug"),
        "{refused}"
    );
    let (_, now) = served.call("GET", &path, &Value::Null).await;
    assert_eq!(now["memory_mb"], 1024);
    let change = ResourceChange {
        cpu_limit_percent: Some(50),
        ..ResourceChange::default()
    };
    let refused = served.manager.set_resources(id, change).await.unwrap_err();
    assert!(refused.to_string().contains("cgroups"), "{refused}");
}
