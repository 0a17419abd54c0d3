//! What is written down of what was done, and how many requests there may be.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::time::Duration;

use api::audit::{self, AuditError, Broken};
use api::domain::{Egress, NetworkInfo};
use api::http::Rates;
use axum::body::Body;
use axum::http::{Request, StatusCode};
use rusqlite::Connection;
use serde_json::{Value, json};
use support::{Api, PASSWORD};
use tower::ServiceExt;

async fn logs(api: &Api, token: &str, query: &str) -> (StatusCode, Value) {
    let path = format!("/api/v1/security/audit-logs{query}");
    api.call_as("GET", &path, "", &[("authorization", token)])
        .await
}

/// Actions of the records of this filter, first one first.
async fn actions(api: &Api, token: &str, query: &str) -> Vec<String> {
    let (status, answer) = logs(api, token, query).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let logs = answer["logs"].as_array().unwrap().iter().rev();
    logs.map(|log| log["action_type"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test]
async fn what_changes_something_is_on_record_and_holds_no_secret() {
    let api = Api::new(1 << 20, 1 << 20).await;
    let root = api.user("root", "admin").await;
    let wrong = json!({"username": "root", "password": "Wrong-horse-7"}).to_string();
    api.call("POST", "/api/v1/auth/login", &wrong).await;
    let headers = [("authorization", root.as_str())];
    let create = r#"{"vcpus": 2, "memory_mb": 256}"#;
    let (_, sandbox) = api.call_as("POST", "/v1/sandboxes", create, &headers).await;
    let id = sandbox["id"].as_str().unwrap();
    let of_it = |what: &str| format!("/v1/sandboxes/{id}{what}");
    let exec = r#"{"cmd": "true", "args": ["SECRET-1"], "envs": {"A": "SECRET-2"}}"#;
    api.call("POST", &of_it("/exec"), exec).await;
    api.call("GET", &of_it(""), "").await;
    api.call("POST", &of_it("/resume"), "").await;
    let forged = [("x-api-key", "SECRET-3")];
    api.call_as("DELETE", &of_it(""), "", &forged).await;
    let (_, key) = api
        .call_as("POST", "/v1/api-keys", r#"{"name": "k"}"#, &headers)
        .await;
    api.call_as("DELETE", &of_it(""), "", &headers).await;

    let all = actions(&api, &root, "").await;
    assert_eq!(
        all,
        [
            "user_register",
            "user_login",
            "user_login",
            "vm_create",
            "vm_exec",
            "vm_resume",
            "vm_delete",
            "api_key_create",
            "vm_delete",
        ]
    );
    let (_, answer) = logs(&api, &root, "").await;
    assert_eq!(
        (&answer["total"], &answer["limit"]),
        (&json!(9), &json!(100))
    );
    let mut records = answer["logs"].as_array().unwrap().clone();
    records.reverse();
    let root_id = records[0]["resource_id"].clone();
    assert_eq!(records[0]["user_id"], "anonymous");
    assert_eq!(records[0]["details"]["username"], "root");
    let fields: Vec<_> = records[3].as_object().unwrap().keys().cloned().collect();
    for field in [
        "timestamp",
        "action_type",
        "resource_type",
        "resource_id",
        "user_id",
        "source_ip",
        "details",
        "compliance_frameworks",
    ] {
        assert!(fields.iter().any(|known| known == field), "{field}");
    }
    let outcome = |at: usize| records[at]["outcome"].as_str().unwrap();
    assert_eq!((outcome(1), outcome(2)), ("success", "denied"));
    assert_eq!(records[1]["user_id"], root_id);
    assert_eq!(records[2]["user_id"], "anonymous");
    assert_eq!(records[3]["user_id"], root_id);
    assert_eq!(records[3]["resource_id"], id);
    assert_eq!(records[3]["details"]["vm_config"]["vcpus"], 2);
    assert_eq!(records[4]["user_id"], "local");
    assert_eq!((outcome(5), outcome(6)), ("failure", "denied"));
    assert_eq!(
        records[3]["compliance_frameworks"],
        json!(["SOC2", "ISO27001"])
    );
    let written = answer.to_string();
    let secrets = [
        "SECRET",
        PASSWORD,
        "Wrong-horse",
        key["key"].as_str().unwrap(),
        &root[7..],
    ];
    for secret in secrets {
        assert!(!written.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn what_is_behind_the_name_of_a_machine_is_on_record() {
    let api = Api::new(1 << 20, 1 << 20).await;
    api.host.networks.lock().unwrap().push(NetworkInfo {
        name: "chbr0".into(),
        subnet: "192.168.200.0/24".parse().unwrap(),
        default_egress: Egress::All,
    });
    let root = api.user("root", "admin").await;
    let headers = [("authorization", root.as_str())];
    let act = async |method: &str, path: &str, body: Value| {
        let body = match body {
            Value::Null => String::new(),
            body => body.to_string(),
        };
        let path = format!("/api/v1/vms{path}");
        let (status, answer) = api.call_as(method, &path, &body, &headers).await;
        assert!(status.is_success(), "{method} {path}: {answer}");
    };
    act("POST", "", json!({"name": "vm"})).await;
    act("POST", "/vm/start", Value::Null).await;
    act("POST", "/vm/snapshots", json!({"name": "s1"})).await;
    act("POST", "/vm/snapshots/s1/restore", Value::Null).await;
    act("DELETE", "/vm/snapshots/s1", Value::Null).await;
    let forward = json!({"host_port": 8080, "guest_port": 80});
    act("POST", "/vm/network/port-forward", forward).await;
    act("DELETE", "/vm/network/port-forward/8080", Value::Null).await;
    let of = async |action: &str| {
        let (_, found) = logs(&api, &root, &format!("?action_type={action}")).await;
        let [record] = &found["logs"].as_array().unwrap()[..] else {
            panic!("{action}: {found}");
        };
        assert_eq!(record["resource_id"], "vm");
        record["details"].clone()
    };
    assert_eq!(of("vm_snapshots").await["name"], "s1");
    assert_eq!(of("vm_snapshots_restore").await["snapshot_name"], "s1");
    assert_eq!(of("vm_snapshots_delete").await["snapshot_name"], "s1");
    let opened = of("vm_network_port_forward").await;
    assert_eq!(
        (
            &opened["host_port"],
            &opened["guest_port"],
            &opened["protocol"]
        ),
        (&json!(8080), &json!(80), &json!("tcp"))
    );
    assert_eq!(
        of("vm_network_port_forward_delete").await["host_port"],
        "8080"
    );
}

#[tokio::test]
async fn filters_and_who_may_read() {
    let api = Api::new(1, 1).await;
    let root = api.user("root", "admin").await;
    let bob = api.user("bob", "user").await;
    api.create().await;
    assert_eq!(logs(&api, &bob, "").await.0, StatusCode::FORBIDDEN);
    let none = api.call("GET", "/api/v1/security/audit-logs", "").await;
    assert_eq!(none.0, StatusCode::UNAUTHORIZED);
    assert_eq!(
        actions(&api, &root, "?resource_type=vm").await,
        ["vm_create"]
    );
    assert_eq!(
        actions(&api, &root, "?action_type=user_login").await.len(),
        2
    );
    assert_eq!(actions(&api, &root, "?user_id=local").await, ["vm_create"]);
    assert_eq!(
        actions(&api, &root, "?start_time=2100-01-01T00:00:00Z")
            .await
            .len(),
        0
    );
    assert_eq!(
        actions(&api, &root, "?end_time=2100-01-01T00:00:00Z")
            .await
            .len(),
        7
    );
    assert_eq!(
        actions(&api, &root, "?resource_type=security").await,
        ["security_audit_logs_read"; 2],
        "who may not read is on record"
    );
    let (_, two) = logs(&api, &root, "?limit=2").await;
    assert_eq!(two["logs"].as_array().unwrap().len(), 2);
    assert_eq!((&two["total"], &two["offset"]), (&json!(7), &json!(0)));
    // Pages come to the whole, and a time as it is told has all of its second.
    let (_, all) = logs(&api, &root, "").await;
    let all = all["logs"].as_array().unwrap();
    let mut paged = Vec::new();
    for offset in [0, 3, 6, 9] {
        let (_, page) = logs(&api, &root, &format!("?limit=3&offset={offset}")).await;
        assert_eq!(
            (&page["total"], &page["offset"]),
            (&json!(7), &json!(offset))
        );
        paged.extend_from_slice(page["logs"].as_array().unwrap());
    }
    assert_eq!(&paged, all);
    let latest = all[0]["timestamp"].as_str().unwrap();
    let (_, until) = logs(&api, &root, &format!("?end_time={latest}")).await;
    assert_eq!(until["logs"].as_array().unwrap(), all);
    for bad in [
        "?limit=0",
        "?limit=x",
        "?limit=1001",
        "?offset=-1",
        "?offset=x",
        "?start_time=yesterday",
    ] {
        let (status, error) = logs(&api, &root, bad).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{bad}");
        assert_eq!(error["error"], "bad_request");
    }
}

#[tokio::test]
async fn a_changed_record_shows_and_what_was_answered_is_there_after_a_crash() {
    let api = Api::new(1, 1).await;
    let all = (0..20).map(|_| api.call("POST", "/v1/sandboxes", "{}"));
    futures_util::future::join_all(all).await;
    let path = api.dir.path().join(audit::FILE);
    let intact = audit::verify(&path).unwrap();
    assert_eq!(intact.records, 20);
    let api = api.restart().await;
    api.create().await;
    let longer = audit::verify(&path).unwrap();
    assert_eq!(longer.records, 21);
    assert_ne!(longer.last, intact.last);
    let tamper = |sql: &str| {
        let copy = api.dir.path().join("copy.db");
        Connection::open(&path)
            .unwrap()
            .execute("VACUUM INTO ?1", [copy.to_str().unwrap()])
            .unwrap();
        let connection = Connection::open(&copy).unwrap();
        assert!(connection.execute_batch(sql).is_err(), "triggers refuse it");
        connection
            .execute_batch("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
            .unwrap();
        connection.execute_batch(sql).unwrap();
        std::fs::copy(path.with_extension("head"), copy.with_extension("head")).unwrap();
        let result = audit::verify(&copy);
        std::fs::remove_file(&copy).unwrap();
        match result {
            Err(AuditError::Broken(Broken::Record { seq })) => seq,
            other => panic!("{sql}: {other:?}"),
        }
    };
    assert_eq!(
        tamper("UPDATE records SET user_id = 'bob' WHERE seq = 7"),
        7
    );
    assert_eq!(
        tamper("UPDATE records SET time = time + 1 WHERE seq = 1"),
        1
    );
    assert_eq!(tamper("UPDATE records SET details = 'x' WHERE seq = 9"), 9);
    assert_eq!(
        tamper("UPDATE records SET source_ip = '' WHERE seq = 21"),
        21
    );
    assert_eq!(tamper("DELETE FROM records WHERE seq = 5"), 5);
    assert_eq!(tamper("DELETE FROM records WHERE seq = 1"), 1);
}

#[tokio::test]
async fn a_log_that_is_cut_off_shows_and_stays_so() {
    let api = Api::new(1, 1).await;
    for _ in 0..5 {
        api.create().await;
    }
    let path = api.dir.path().join(audit::FILE);
    let broken = || match audit::verify(&path) {
        Err(AuditError::Broken(broken)) => Some(broken),
        Ok(_) => None,
        Err(other) => panic!("{other}"),
    };
    let cut = "DROP TRIGGER no_delete; DELETE FROM records WHERE seq > 3;";
    Connection::open(&path).unwrap().execute_batch(cut).unwrap();
    let (records, last) = (3, 5);
    assert_eq!(broken(), Some(Broken::CutOff { records, last }));
    let api = api.restart().await;
    api.create().await;
    assert_eq!(broken(), Some(Broken::WasCutOff { records }));
    let root = api.user("root", "admin").await;
    let (_, answer) = logs(&api, &root, "?action_type=audit_log_cut_off").await;
    assert_eq!(answer["total"], 1);
    assert_eq!(
        answer["logs"][0]["details"],
        json!({"records": 3, "went_to": 5})
    );

    let head = path.with_extension("head");
    std::fs::write(&head, "0").unwrap();
    assert_eq!(broken(), Some(Broken::Head));
    std::fs::remove_file(head).unwrap();
    assert_eq!(broken(), Some(Broken::Head));
}

#[tokio::test]
async fn a_log_that_is_gone_shows() {
    let api = Api::new(1, 1).await;
    api.create().await;
    let path = api.dir.path().join(audit::FILE);
    for name in ["audit.db", "audit.db-wal", "audit.db-shm"] {
        let _ = std::fs::remove_file(path.with_file_name(name));
    }
    let api = api.restart().await;
    api.create().await;
    let result = audit::verify(&path);
    assert!(
        matches!(
            result,
            Err(AuditError::Broken(Broken::WasCutOff { records: 0 }))
        ),
        "{result:?}"
    );
}

#[tokio::test]
async fn too_many_requests_are_refused_and_every_answer_tells_what_is_left() {
    let rates = Rates {
        per_minute: 3,
        per_hour: 100,
    };
    let api = Api::with_rates(rates).await;
    let send = async || {
        let request = Request::get("/api/v1/health")
            .header("host", "localhost")
            .body(Body::empty())
            .unwrap();
        api.router.clone().oneshot(request).await.unwrap()
    };
    for left in [2, 1, 0] {
        let answer = send().await;
        assert_eq!(answer.status(), StatusCode::OK);
        assert_eq!(answer.headers()["x-ratelimit-limit"], "3");
        assert_eq!(answer.headers()["x-ratelimit-remaining"], left.to_string());
        let reset: i64 = answer.headers()["x-ratelimit-reset"]
            .to_str()
            .unwrap()
            .parse()
            .unwrap();
        let seconds = reset - jiff::Timestamp::now().as_second();
        assert!((1..=61).contains(&seconds), "{seconds}");
    }
    let refused = send().await;
    assert_eq!(refused.headers()["x-ratelimit-remaining"], "0");
    let (status, error) = support::read_json(refused).await;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(error["error"], "rate_limit_exceeded");
    assert!((1..=60).contains(&error["retry_after_seconds"].as_u64().unwrap()));
    // The other dialect is not limited.
    assert_eq!(api.call("GET", "/v1/sandboxes", "").await.0, StatusCode::OK);
}

#[tokio::test(start_paused = true)]
async fn who_knocks_without_end_does_not_fill_the_log() {
    let api = Api::new(1, 1).await;
    let path = api.dir.path().join(audit::FILE);
    let knock = async |path: &str| {
        let forged = [("x-api-key", "mvs_no")];
        let (status, _) = api.call_as("DELETE", path, "", &forged).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
    };
    for number in 0..200 {
        knock(&format!("/v1/sandboxes/sb-{number:08x}")).await;
        knock("/v1/snapshots/x").await;
    }
    assert_eq!(
        audit::verify(&path).unwrap().records,
        2,
        "the first of each kind"
    );
    tokio::time::sleep(Duration::from_secs(61)).await;
    api.audit.flush().await;
    assert_eq!(
        audit::verify(&path).unwrap().records,
        4,
        "and the number of the others"
    );
    let root = api.user("root", "admin").await;
    let (_, answer) = logs(&api, &root, "?action_type=vm_delete").await;
    let records = answer["logs"].as_array().unwrap();
    assert_eq!(records[0]["details"]["repeated"], 199);
    assert_eq!(records[0]["outcome"], "denied");
    assert_eq!(records[0]["resource_id"], Value::Null);
    assert_eq!(records[1]["details"]["repeated"], Value::Null);
    // The next minute begins anew, and an orderly end writes down what was counted.
    for _ in 0..3 {
        knock("/v1/snapshots/x").await;
    }
    api.audit.flush().await;
    let (_, answer) = logs(&api, &root, "?action_type=snapshot_delete").await;
    assert_eq!(answer["total"], 4);
    assert_eq!(answer["logs"][0]["details"]["repeated"], 2);
}

const HANGS: &str = r#"{"cmd": "/bin/sh", "args": ["-c", "hang"], "timeout_sec": 3600}"#;

/// What the records of a filter say of their ends: outcome, status, and why there was no answer.
async fn ends(api: &Api, token: &str, query: &str) -> Vec<[Value; 3]> {
    let (_, answer) = logs(api, token, query).await;
    let records = answer["logs"].as_array().unwrap().iter().rev();
    let end = |record: &Value| {
        let details = &record["details"];
        let (status, why) = (&details["status"], &details["unanswered"]);
        [record["outcome"].clone(), status.clone(), why.clone()]
    };
    records.map(end).collect()
}

#[tokio::test(start_paused = true)]
async fn what_is_not_answered_is_on_record() {
    let api = Api::new(1, 1 << 20).await;
    let root = api.user("root", "admin").await;
    let id = api.create().await;
    let path = format!("/v1/sandboxes/{id}/exec");
    let of_exec = "?action_type=vm_exec";
    let unanswered = |why: &str| [json!("unanswered"), Value::Null, json!(why)];

    let call = api.call("POST", &path, HANGS);
    tokio::select! {
        biased;
        answer = call => panic!("it does not hang: {answer:?}"),
        () = has_run(&api, 1) => {}
    }
    api.audit.flush().await;
    let gone = unanswered("the connection ended");
    assert_eq!(
        ends(&api, &root, of_exec).await,
        std::slice::from_ref(&gone)
    );

    let call = api.call("POST", &path, HANGS);
    let long = tokio::time::timeout(Duration::from_secs(30), call).await;
    assert!(long.is_err(), "it does not hang: {long:?}");
    api.audit.flush().await;
    let under_way = unanswered("under way");
    assert_eq!(
        ends(&api, &root, of_exec).await,
        [gone.clone(), under_way, gone]
    );

    let run = r#"{"cmd": "echo"}"#;
    assert_eq!(api.call("POST", &path, run).await.0, StatusCode::OK);
    let all = ends(&api, &root, of_exec).await;
    assert_eq!(all.len(), 4, "what is answered at once has one record");
    assert_eq!(all[3], [json!("success"), json!(200), Value::Null]);
}

/// Waits until this many commands have begun.
async fn has_run(api: &Api, count: usize) {
    while api.host.commands.lock().unwrap().len() < count {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn who_guesses_and_hangs_up_is_on_record_with_the_name() {
    let api = Api::new(1, 1).await;
    let root = api.user("root", "admin").await;
    let wrong = json!({"username": "root", "password": "Wrong-horse-7"}).to_string();
    let mut login = Box::pin(api.call("POST", "/api/v1/auth/login", &wrong));
    assert!(futures_util::poll!(&mut login).is_pending());
    drop(login);
    let record = loop {
        let (_, answer) = logs(&api, &root, "?action_type=user_login").await;
        match answer["total"].as_u64() {
            Some(1) => tokio::task::yield_now().await,
            _ => break answer["logs"][0].clone(),
        }
    };
    assert_eq!(record["outcome"], "denied");
    assert_eq!(record["details"]["username"], "root");
}

#[tokio::test]
async fn refusals_are_on_record_and_made_up_paths_are_one_kind() {
    let api = Api::new(1, 1).await;
    let root = api.user("root", "admin").await;
    let forged = [("x-api-key", "mvs_no")];
    for number in 0..50 {
        for base in ["", "/v1", "/v1/auth", "/auth", "/api/v1/auth", "/api/v1"] {
            let path = format!("{base}/made-up-{number}");
            let (status, _) = api.call_as("POST", &path, "", &forged).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED);
        }
        let (status, _) = api.call_as("GET", "/api/v1/vms", "", &forged).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        let at_port = [
            forged[0],
            ("x-sandbox-id", "sb-1"),
            ("x-sandbox-port", "80"),
        ];
        let (status, _) = api.call_as("POST", "/made-up", "", &at_port).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        let path = format!("/v1/made-up-{number}");
        let (status, _) = api.call("POST", &path, "").await;
        assert_eq!(status, StatusCode::NOT_FOUND);
    }
    assert_eq!(
        actions(&api, &root, "").await,
        [
            "user_register",
            "user_login",
            "not_served",
            "vm_read",
            "vm_ports"
        ]
    );
    api.audit.flush().await;
    let (_, answer) = logs(&api, &root, "").await;
    let mut repeated: Vec<_> = answer["logs"].as_array().unwrap()[..3]
        .iter()
        .map(|record| record["details"]["repeated"].as_u64().unwrap())
        .collect();
    repeated.sort_unstable();
    assert_eq!(repeated, [49, 49, 299]);
    assert!(!answer.to_string().contains("made-up"), "{answer}");
}
