//! What all sandboxes have and had, on a host that runs nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use axum::http::StatusCode;
use serde_json::{Value, json};
use support::Api;

async fn call(api: &Api, token: &str, method: &str, path: &str, body: &Value) -> Value {
    let headers = [("authorization", token)];
    let (status, answer) = api.call_as(method, path, &body.to_string(), &headers).await;
    assert!(status.is_success(), "{method} {path}: {answer}");
    answer
}

async fn get(api: &Api, token: &str, path: &str) -> Value {
    call(api, token, "GET", path, &Value::Null).await
}

fn current(running: u64, vcpus: u64, memory_mb: u64) -> Value {
    json!({"running_count": running, "vcpus_reserved": vcpus, "memory_mb_reserved": memory_mb})
}

fn peaks(running: u64, vcpus: u64, memory_mb: u64) -> Value {
    json!({"running_count": running, "vcpus": vcpus, "memory_mb": memory_mb})
}

#[tokio::test]
async fn what_sandboxes_have_and_had_is_told_to_whose_they_are() {
    let api = Api::new(1, 1).await;
    let root = api.user("root", "admin").await;
    let alice = api.user("alice", "user").await;
    let bob = api.user("bob", "user").await;
    let mut ids = Vec::new();
    for (token, vcpus, memory_mb) in [(&alice, 2, 512), (&alice, 1, 256), (&bob, 4, 1024)] {
        let body = json!({"vcpus": vcpus, "memory_mb": memory_mb});
        let made = call(&api, token, "POST", "/v1/sandboxes", &body).await;
        ids.push(format!("/v1/sandboxes/{}", made["id"].as_str().unwrap()));
    }
    let stats = get(&api, &alice, "/v1/sandboxes/stats").await;
    assert_eq!(stats["range"], "1h");
    assert_eq!(stats["current"], current(2, 3, 768));
    assert_eq!(stats["peaks"], peaks(2, 3, 768));
    let series = &stats["series"];
    for (name, last) in [("running", 2), ("vcpus", 3), ("memory_mb", 768)] {
        let values = series[name].as_array().unwrap();
        assert_eq!((values.len(), &values[60]), (61, &json!(last)), "{name}");
        assert_eq!(values[0], 0, "an hour ago there was nothing");
    }
    let labels = series["labels"].as_array().unwrap();
    let times = labels
        .iter()
        .map(|label| label.as_str().unwrap().parse::<jiff::Timestamp>());
    let times: Vec<_> = times.map(Result::unwrap).collect();
    assert_eq!(
        (times.len(), times[60].as_second() - times[0].as_second()),
        (61, 3600)
    );

    // One that is paused has neither, and one that is deleted is not forgotten.
    call(
        &api,
        &alice,
        "POST",
        &format!("{}/pause", ids[0]),
        &Value::Null,
    )
    .await;
    call(&api, &alice, "DELETE", &ids[1], &Value::Null).await;
    let api = api.restart().await;
    for (token, now, most) in [
        (&alice, current(0, 0, 0), peaks(2, 3, 768)),
        (&bob, current(1, 4, 1024), peaks(1, 4, 1024)),
        (&root, current(1, 4, 1024), peaks(3, 7, 1792)),
    ] {
        let stats = get(&api, token, "/v1/capsules/stats?range=30d").await;
        assert_eq!(
            (&stats["current"], &stats["peaks"]),
            (&now, &most),
            "{stats}"
        );
    }

    let today = jiff::Timestamp::now()
        .to_zoned(jiff::tz::TimeZone::UTC)
        .date();
    let usage = get(&api, &bob, "/v1/capsules/usage").await;
    let points = usage["points"].as_array().unwrap();
    // At midnight a day may have begun meanwhile.
    let to: jiff::civil::Date = usage["to"].as_str().unwrap().parse().unwrap();
    assert!(today <= to && points.len() == 31, "{usage}");
    assert_eq!(points[30]["date"], usage["to"]);
    assert_eq!(
        (&points[0]["date"], &points[0]["cpu_minutes"]),
        (&usage["from"], &json!(0.0))
    );
    let sum = |usage: &Value, name: &str| -> f64 {
        let points = usage["points"].as_array().unwrap().iter();
        points.map(|point| point[name].as_f64().unwrap()).sum()
    };
    // What ran for less than a twentieth of a second may be rounded to nothing.
    let later = async || get(&api, &bob, "/v1/sandboxes/usage").await;
    let mut usage = later().await;
    while sum(&usage, "cpu_minutes") < 0.01 {
        usage = later().await;
    }
    let ratio = sum(&usage, "ram_mb_minutes") / sum(&usage, "cpu_minutes");
    assert!((ratio - 256.0).abs() < 3.0, "{ratio} MiB for each vCPU");
    // All that alice's did is over.
    let query = format!("/v1/sandboxes/usage?from={today}");
    let hers = get(&api, &alice, &query).await;
    assert_eq!(
        hers["points"][0],
        get(&api, &alice, &query).await["points"][0]
    );
    assert_eq!(hers["from"], today.to_string());

    for path in [
        "stats?range=1d",
        "usage?from=yesterday",
        "usage?from=2000-01-01",
        "usage?to=9999-01-01",
    ] {
        let (status, answer) = api.call("GET", &format!("/v1/sandboxes/{path}"), "").await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path}: {answer}");
    }
}
