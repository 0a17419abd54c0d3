//! Networks and ports.

use serde_json::{Value, json};

use super::{api, call, get, post, running};

#[tokio::test]
async fn networks_and_forwards() {
    let api = api().await;
    running(&api).await;
    let (status, networks) = get(&api, "/networks").await;
    let expected = json!({"networks": [{
        "name": "chbr0", "type": "bridge", "subnet": "192.168.200.0/24",
        "gateway": "192.168.200.1", "dhcp_enabled": true, "vms_connected": 1
    }]});
    assert_eq!((status, networks), (200, expected));
    let web = json!({
        "host_port": 8080, "guest_port": 80, "protocol": "tcp", "description": "Web server"
    });
    let path = "/vms/test-vm/network/port-forward";
    let (status, opened) = post(&api, path, web.clone()).await;
    assert_eq!(status, 201, "{opened}");
    let expected = json!({
        "message": "Port forward configured", "vm_name": "test-vm", "host_port": 8080,
        "guest_port": 80, "protocol": "tcp", "host_address": "127.0.0.1",
        "description": "Web server"
    });
    assert_eq!(opened, expected);
    assert_eq!(post(&api, path, web).await.0, 409);
    api.host.taken_ports.lock().unwrap().push(9000);
    let taken = json!({"host_port": 9000, "guest_port": 80});
    assert_eq!(post(&api, path, taken).await.0, 409);
    for description in ["x".repeat(257), "x\n".to_owned()] {
        let wrong = json!({"guest_port": 81, "description": description});
        assert_eq!(post(&api, path, wrong).await.0, 422);
    }
    let wrong = json!({"host_port": 0, "guest_port": 65_536, "protocol": "icmp"});
    let (status, refused) = post(&api, path, wrong).await;
    assert_eq!(
        (status, refused["details"].as_array().unwrap().len()),
        (422, 3)
    );

    let (status, network) = get(&api, "/vms/test-vm/network").await;
    assert_eq!(status, 200, "{network}");
    let expected = json!({
        "vm_name": "test-vm", "ip_address": "192.168.200.100",
        "mac_address": "52:54:00:a8:c8:64", "bridge_name": "chbr0",
        "network_interface": "chbr0-0001", "connectivity_status": "connected",
        "port_forwards": [{
            "host_port": 8080, "guest_port": 80, "protocol": "tcp", "host_address": "127.0.0.1",
            "description": "Web server"
        }]
    });
    assert_eq!(network, expected);
    // Over a stop.
    post(&api, "/vms/test-vm/stop", Value::Null).await;
    let (_, network) = get(&api, "/vms/test-vm/network").await;
    assert_eq!(network["connectivity_status"], "disconnected");
    assert_eq!(network["port_forwards"][0]["description"], "Web server");
    let one = format!("{path}/8080");
    assert_eq!(
        call(&api, "DELETE", &format!("{one}?protocol=udp"), Value::Null)
            .await
            .0,
        404
    );
    assert_eq!(call(&api, "DELETE", &one, Value::Null).await.0, 204);
    assert_eq!(call(&api, "DELETE", &one, Value::Null).await.0, 404);
}

#[tokio::test]
async fn a_port_or_address_of_anothers_machine_is_told_as_any_that_is_taken() {
    let mut api = api().await;
    running(&api).await;
    let path = "/vms/test-vm/network/port-forward";
    let web = |port: u16| json!({"host_port": port, "guest_port": 80});
    assert_eq!(post(&api, path, web(8080)).await.0, 201);
    api.host.taken_ports.lock().unwrap().push(9090);

    api.bearer = api.user("bob", "user").await;
    let (status, created) = post(&api, "/vms", json!({"name": "test-vm"})).await;
    assert_eq!(status, 201, "{created}");
    let refused = async |port: u16| {
        let (status, refused) = post(&api, path, web(port)).await;
        assert_eq!(status, 409, "{refused}");
        refused.to_string().replace(&port.to_string(), "PORT")
    };
    assert_eq!(refused(8080).await, refused(9090).await);

    let at = |name: &str, ip: &str| json!({"name": name, "network_config": {"ip": ip}});
    let (own, hers) = ("192.168.200.50", "192.168.200.100");
    assert_eq!(post(&api, "/vms", at("own", own)).await.0, 201);
    let refused = async |ip: &str| {
        let (status, refused) = post(&api, "/vms", at("other", ip)).await;
        assert_eq!(status, 409, "{refused}");
        refused.to_string().replace(ip, "IP")
    };
    assert_eq!(refused(own).await, refused(hers).await);
}
