//! Addresses, egress policies and port forwards, as the API has them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use api::domain::{Egress, NetworkInfo};
use axum::http::StatusCode;
use serde_json::{Value, json};
use support::Api;

async fn bench(subnet: &str) -> Api {
    let bench = Api::new(1 << 20, 1 << 20).await;
    *bench.host.networks.lock().unwrap() = vec![NetworkInfo {
        name: "chbr0".into(),
        subnet: subnet.parse().unwrap(),
        default_egress: Egress::None,
    }];
    bench
}

async fn create(bench: &Api, network: Value) -> (StatusCode, Value) {
    let body = json!({ "network": network }).to_string();
    bench.call("POST", "/v1/sandboxes", &body).await
}

async fn created(bench: &Api, network: Value) -> (String, String) {
    let (status, body) = create(bench, network).await;
    assert_eq!(status, 201, "{body}");
    let text = |field: &str| body[field].as_str().unwrap().to_owned();
    (text("id"), text("guest_ip"))
}

#[tokio::test]
async fn each_sandbox_has_an_address_of_its_own_until_it_is_gone() {
    let bench = bench("192.168.200.0/29").await;
    let (first, address) = created(&bench, json!({})).await;
    assert_eq!(address, "192.168.200.2");
    let (_, asked) = created(&bench, json!({"address": "192.168.200.4"})).await;
    assert_eq!(asked, "192.168.200.4");
    let (status, body) = create(&bench, json!({"address": "192.168.200.4"})).await;
    assert_eq!(status, 409, "{body}");
    assert_eq!(body["error"]["code"], "conflict");
    for bad in ["192.168.200.1", "192.168.200.7", "10.0.0.1"] {
        let (status, body) = create(&bench, json!({ "address": bad })).await;
        assert_eq!(status, 400, "{body}");
    }
    // After the last that was given, and around the end.
    for next in ["192.168.200.5", "192.168.200.6", "192.168.200.3"] {
        assert_eq!(created(&bench, json!({})).await.1, next);
    }
    let (status, body) = create(&bench, json!({})).await;
    assert_eq!(status, 409, "{body}");
    let words = body["error"]["message"].as_str().unwrap();
    assert!(words.contains("all 5 addresses"), "{words}");

    // A paused one keeps its address, a deleted one does not.
    let path = format!("/v1/sandboxes/{first}");
    let (status, body) = bench.call("POST", &format!("{path}/pause"), "").await;
    assert_eq!(
        (status, &body["guest_ip"]),
        (StatusCode::OK, &json!("192.168.200.2"))
    );
    assert_eq!(create(&bench, json!({})).await.0, 409);
    bench.call("DELETE", &path, "").await;
    assert_eq!(created(&bench, json!({})).await.1, "192.168.200.2");
}

#[tokio::test]
async fn a_clone_has_its_own_address_and_the_policy_of_its_parent() {
    let bench = bench("192.168.200.0/24").await;
    let allow = json!({"policy": "allow", "allow": [{"domain": "example.com", "ports": [443]}]});
    let network = json!({"egress": allow, "rate_limits": {"bytes_per_sec": 1_000_000}});
    let (id, _) = created(&bench, network).await;
    let path = format!("/v1/sandboxes/{id}/fork");
    let (status, body) = bench.call("POST", &path, r#"{"count": 2}"#).await;
    assert_eq!(status, 201, "{body}");
    let forks = body["sandboxes"].as_array().unwrap();
    let addresses: Vec<_> = forks.iter().map(|fork| &fork["guest_ip"]).collect();
    assert_eq!(addresses, ["192.168.200.3", "192.168.200.4"]);
    let starts = bench.host.starts.lock().unwrap().clone();
    let cards: Vec<_> = starts
        .iter()
        .map(|start| start.nic.clone().unwrap())
        .collect();
    assert!(
        cards
            .iter()
            .all(|card| card.connection == cards[0].connection)
    );
    assert!(matches!(cards[0].connection.egress, Egress::Allow(_)));
    let limits = cards[2].connection.rate_limits;
    assert_eq!(limits.bytes_per_sec, Some(1_000_000));
}

#[tokio::test]
async fn a_host_without_network_has_sandboxes_without_card() {
    let bench = Api::new(1 << 20, 1 << 20).await;
    let id = bench.create().await;
    let starts = bench.host.starts.lock().unwrap().clone();
    assert_eq!(starts[0].nic, None);
    let path = format!("/v1/sandboxes/{id}/network");
    let (status, body) = bench.call("GET", &path, "").await;
    assert_eq!(status, 200);
    assert_eq!(
        body,
        json!({"connected": false, "forwards": [], "denied": []})
    );
    // What needs a network is refused; to want none is not.
    for network in [
        json!({"address": "192.168.200.2"}),
        json!({"egress": {"policy": "all"}}),
        json!({"rate_limits": {"packets_per_sec": 5}}),
    ] {
        let (status, body) = create(&bench, network).await;
        assert_eq!(status, 400, "{body}");
    }
    let (status, _) = create(&bench, json!({"egress": {"policy": "none"}})).await;
    assert_eq!(status, 201);
    let egress = r#"{"policy": "all"}"#;
    let (status, body) = bench.call("PUT", &format!("{path}/egress"), egress).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (StatusCode::CONFLICT, &json!("conflict"))
    );
    let forward = r#"{"guest_port": 80}"#;
    let (status, _) = bench
        .call("POST", &format!("{path}/forwards"), forward)
        .await;
    assert_eq!(status, 409);
}

#[tokio::test]
async fn a_policy_is_kept_over_pauses_and_told_to_the_host() {
    let bench = bench("192.168.200.0/24").await;
    let (id, address) = created(&bench, json!({})).await;
    let path = format!("/v1/sandboxes/{id}");
    let network = format!("{path}/network");
    let (_, body) = bench.call("GET", &network, "").await;
    assert_eq!(body["egress"], json!({"policy": "none"}));
    assert_eq!(body["mac"], "52:54:00:a8:c8:02");
    assert_eq!(
        (&body["address"], &body["gateway"]),
        (&json!(address), &json!("192.168.200.1"))
    );
    assert_eq!(
        body["traffic"]["denied"],
        json!({"packets": 3, "bytes": 180})
    );
    assert_eq!(
        body["denied"],
        json!([
            {"at": "2026-01-02T03:04:05Z", "protocol": "tcp", "address": "203.0.113.9", "port": 443},
            {"at": "2026-01-02T03:04:05Z", "name": "example.org"},
        ])
    );

    let policy = json!({"policy": "allow", "allow": [
        {"cidr": "203.0.113.0/24", "protocol": "tcp", "ports": ["80", "8000-8100"]},
        {"domain": "*.example.com"},
    ]});
    let egress = format!("{network}/egress");
    let (status, body) = bench.call("PUT", &egress, &policy.to_string()).await;
    assert_eq!((status, body), (StatusCode::OK, policy.clone()));
    assert_eq!(bench.host.egress.lock().unwrap().len(), 1);

    bench.call("POST", &format!("{path}/pause"), "").await;
    let all = json!({"policy": "all"});
    let (status, _) = bench.call("PUT", &egress, &all.to_string()).await;
    assert_eq!(status, 200);
    assert_eq!(
        bench.host.egress.lock().unwrap().len(),
        1,
        "a paused one needs no host"
    );
    bench.call("POST", &format!("{path}/resume"), "").await;
    let resumed = bench
        .host
        .starts
        .lock()
        .unwrap()
        .last()
        .unwrap()
        .nic
        .clone()
        .unwrap();
    assert_eq!(resumed.connection.egress, Egress::All);
    assert_eq!(resumed.address.unwrap().to_string(), address);

    for (bad, word) in [
        (json!({"policy": "some"}), "unknown variant"),
        (json!({"policy": "allow"}), "egress.allow"),
        (json!({"policy": "all", "allow": []}), "egress.allow"),
        (
            json!({"policy": "allow", "allow": [{"cidr": "1.2.3.4/24"}]}),
            "1.2.3.4/24",
        ),
        (
            json!({"policy": "allow", "allow": [{"domain": "a b"}]}),
            "a b",
        ),
        (
            json!({"policy": "allow", "allow": [{"domain": "a", "cidr": "1.2.3.4"}]}),
            "both",
        ),
        (
            json!({"policy": "allow", "allow": [{"ports": [0]}]}),
            "port",
        ),
        (json!({"policy": "allow", "allow": [{"host": "a"}]}), "host"),
    ] {
        let (status, body) = bench.call("PUT", &egress, &bad.to_string()).await;
        assert_eq!(status, 400, "{bad}: {body}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(word), "{bad}: {message}");
    }
    let (_, body) = bench.call("GET", &network, "").await;
    assert_eq!(body["egress"], all);
}

#[tokio::test]
async fn forwards_are_there_until_their_sandbox_ends_and_over_restarts() {
    let bench = bench("192.168.200.0/24").await;
    let (id, _) = created(&bench, json!({})).await;
    let (other, _) = created(&bench, json!({})).await;
    let path = |id: &str| format!("/v1/sandboxes/{id}/network/forwards");
    let forward = json!({"host_port": 8080, "guest_port": 80}).to_string();
    let (status, body) = bench.call("POST", &path(&id), &forward).await;
    let expected = json!({
        "protocol": "tcp", "host_address": "127.0.0.1", "host_port": 8080, "guest_port": 80,
    });
    assert_eq!((status, body), (StatusCode::CREATED, expected.clone()));
    let udp = json!({"protocol": "udp", "host_address": "::1", "guest_port": 53}).to_string();
    let (status, body) = bench.call("POST", &path(&other), &udp).await;
    assert_eq!(
        (status, &body["host_port"]),
        (StatusCode::CREATED, &json!(10_000))
    );

    // Conflicts, with another sandbox's and with other programs.
    for (address, port) in [("127.0.0.1", 8080), ("0.0.0.0", 8080), ("127.0.0.1", 9)] {
        bench.host.taken_ports.lock().unwrap().push(9);
        let body = json!({"host_address": address, "host_port": port, "guest_port": 1});
        let (status, body) = bench.call("POST", &path(&other), &body.to_string()).await;
        assert_eq!(status, 409, "{body}");
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains(&port.to_string()), "{message}");
    }
    for bad in [
        json!({"guest_port": 0}),
        json!({"guest_port": 1, "host_port": 0}),
        json!({"guest_port": 65_536}),
        json!({"guest_port": 1, "host_address": "localhost"}),
        json!({"guest_port": 1, "protocol": "sctp"}),
        json!({}),
    ] {
        let (status, body) = bench.call("POST", &path(&id), &bad.to_string()).await;
        assert_eq!(status, 400, "{bad}: {body}");
    }

    // Over a pause and a restart of the daemon.
    bench
        .call("POST", &format!("/v1/sandboxes/{id}/pause"), "")
        .await;
    assert_eq!(bench.host.forwards.lock().unwrap().len(), 2);
    bench.host.forwards.lock().unwrap().clear();
    let bench = bench.restart().await;
    let open = |bench: &Api| bench.host.forwards.lock().unwrap().clone();
    assert_eq!(open(&bench).len(), 2);
    bench
        .host
        .forwards
        .lock()
        .unwrap()
        .retain(|(of, _)| of.as_str() == id);
    assert_eq!(open(&bench).len(), 1);
    let (_, body) = bench
        .call("GET", &format!("/v1/sandboxes/{id}/network"), "")
        .await;
    assert_eq!(body["forwards"], json!([expected]));

    let one = format!("{}/tcp/127.0.0.1:8080", path(&id));
    for (path, status) in [
        (format!("{}/tcp/127.0.0.1:8081", path(&id)), 404),
        (format!("{}/udp/127.0.0.1:8080", path(&id)), 404),
        (format!("{}/tcp/nonsense", path(&id)), 400),
        (one.clone(), 204),
        (one, 404),
    ] {
        assert_eq!(bench.call("DELETE", &path, "").await.0, status, "{path}");
    }
    assert_eq!(open(&bench), []);

    let (status, _) = bench.call("POST", &path(&id), &forward).await;
    assert_eq!(status, 201);
    bench
        .call("DELETE", &format!("/v1/sandboxes/{id}"), "")
        .await;
    assert_eq!(open(&bench), []);
    let (_, body) = bench
        .call("GET", &format!("/v1/sandboxes/{id}/network"), "")
        .await;
    assert_eq!(body["forwards"], json!([]));
}

#[tokio::test]
async fn a_sandbox_is_in_the_network_that_it_asks_for() {
    let bench = bench("192.168.200.0/29").await;
    bench.host.networks.lock().unwrap().push(NetworkInfo {
        name: "chbr1".into(),
        subnet: "10.0.0.0/29".parse().unwrap(),
        default_egress: Egress::All,
    });
    let (first, address) = created(&bench, json!({})).await;
    assert_eq!(address, "192.168.200.2");
    let (second, address) = created(&bench, json!({"name": "chbr1"})).await;
    assert_eq!(address, "10.0.0.2");
    // Each goes on where it was.
    let (_, address) = created(&bench, json!({"name": "chbr0"})).await;
    assert_eq!(address, "192.168.200.3");
    let (_, address) = created(&bench, json!({"name": "chbr1"})).await;
    assert_eq!(address, "10.0.0.3");
    for (id, name, subnet, policy) in [
        (&first, "chbr0", "192.168.200.0/29", "none"),
        (&second, "chbr1", "10.0.0.0/29", "all"),
    ] {
        let path = format!("/v1/sandboxes/{id}/network");
        let (status, body) = bench.call("GET", &path, "").await;
        assert_eq!(status, 200);
        assert_eq!(
            (&body["name"], &body["subnet"], &body["egress"]["policy"]),
            (&json!(name), &json!(subnet), &json!(policy))
        );
    }
    // A clone is in its parent's.
    let path = format!("/v1/sandboxes/{second}/fork");
    let (status, body) = bench.call("POST", &path, "{}").await;
    assert_eq!(status, 201, "{body}");
    assert_eq!(body["sandboxes"][0]["guest_ip"], "10.0.0.4");

    let (status, body) = create(&bench, json!({"name": "chbr2"})).await;
    assert_eq!(status, 400, "{body}");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(message.ends_with("there are chbr0, chbr1"), "{message}");
    let (status, body) = create(&bench, json!({"name": "chbr1", "address": "192.168.200.5"})).await;
    assert_eq!(status, 400, "{body}");
}
