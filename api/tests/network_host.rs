//! The network on this host's side, without guests: bridge, taps, addresses and rules, in a network
//! namespace of its own, where no privilege of this host is needed.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use api::domain::{AllowRule, Destination, Egress, SandboxId};
use api::network::{Counters, LinkError, Network, NetworkConfig, NetworkError};
use futures_util::future::try_join_all;

/// Set for this program when it runs in the namespace.
const INSIDE: &str = "NETWORK_TEST_INSIDE";

/// Runs one test of this program in a new network namespace, as its root.
fn inside(test: &str, work: impl AsyncFnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(work());
        return;
    }
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let status = command
        .arg("--net")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success(), "{test} has failed in its namespace");
}

fn output(program: &str, words: &str) -> String {
    let words = words.split_ascii_whitespace();
    let output = Command::new(program).args(words).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn config(owner: &str) -> NetworkConfig {
    NetworkConfig {
        bridge: "chbr0".into(),
        subnet: "192.168.200.0/24".parse().unwrap(),
        mtu: 1400,
        namespace: None,
        resolvers: Vec::new(),
        owner: owner.into(),
        siblings: Vec::new(),
    }
}

fn forwards_packets() -> bool {
    let setting = std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward");
    setting.unwrap().trim() == "1"
}

fn policies(count: u8) -> Vec<Egress> {
    let rule = |to| AllowRule {
        to,
        transport: None,
        ports: vec!["443".parse().unwrap(), "80-90".parse().unwrap()],
    };
    let list = Egress::Allow(vec![
        rule(Destination::Domain("*.example.com".parse().unwrap())),
        rule(Destination::Cidr("10.0.0.0/8".parse().unwrap())),
        rule(Destination::Cidr("0.0.0.0/0".parse().unwrap())),
        rule(Destination::Anywhere),
    ]);
    let three = [Egress::None, Egress::All, list];
    (0..count)
        .map(|index| three[usize::from(index % 3)].clone())
        .collect()
}

#[test]
fn what_a_hundred_sandboxes_need_is_made_and_removed_with_nothing_left() {
    inside(
        "what_a_hundred_sandboxes_need_is_made_and_removed_with_nothing_left",
        async || {
            // What is not ours stays.
            output("nft", "add table inet somebody_elses");
            output("ip", "link add other0 type bridge");
            let before = (output("ip", "-o link"), output("nft", "list ruleset"));
            let network = Network::start(config("/data")).await.unwrap();
            assert!(forwards_packets());
            let bridge = output("ip", "-d link show chbr0");
            assert!(
                bridge.contains("mtu 1400") && bridge.contains("sandboxd /data"),
                "{bridge}"
            );
            let empty = output("nft", "list ruleset");

            let mut taps = Vec::new();
            for last in 2..102 {
                let address = Ipv4Addr::new(192, 168, 200, last);
                taps.push((SandboxId::random(), address, network.tap().await.unwrap()));
            }
            let attached = taps
                .iter()
                .zip(policies(100))
                .map(|((id, address, tap), policy)| {
                    let port = (tap.name.as_str(), tap.index);
                    network.attach(id, port, *address, policy, Counters::default())
                });
            // One by one, and many at once, as forks are.
            let mut attached: Vec<_> = attached.collect();
            let at_once = attached.split_off(50);
            for one in attached {
                one.await.unwrap();
            }
            try_join_all(at_once).await.unwrap();
            let full = output("nft", "list ruleset");
            let neighbours = output("ip", "neighbour show dev chbr0");
            let entries = output("bridge", "fdb show br chbr0");
            let links = output("ip", "-d link show master chbr0");
            for (id, address, tap) in &taps {
                let [_, b, c, d] = address.octets();
                let mac = format!("52:54:00:{b:02x}:{c:02x}:{d:02x}");
                assert!(full.contains(&format!("{}\" . {mac} . {address}", tap.name)));
                assert!(full.contains(&format!("log prefix \"{id}\"")));
                assert!(neighbours.contains(&format!("{address} lladdr {mac} PERMANENT")));
                assert!(entries.contains(&format!("{mac} dev {} master chbr0 static", tap.name)));
                assert!(links.contains(&format!("{}:", tap.name)));
            }
            assert!(links.matches("isolated on").count() >= 100, "{links}");
            assert_eq!(links.matches("isolated off").count(), 0);

            // Every policy can follow every other.
            for (index, (id, ..)) in taps.iter().enumerate() {
                let next = policies(100)[(index + 1 + index / 3) % 100].clone();
                network.set_egress(id, next).await.unwrap();
            }
            let activity = network.activity(&taps[0].0).await.unwrap();
            assert_eq!(activity.traffic.denied.packets, 0);
            let ids: Vec<_> = taps.iter().map(|(id, ..)| id.clone()).collect();
            drop(taps);
            try_join_all(ids.iter().map(|id| network.detach(id)))
                .await
                .unwrap();
            assert_eq!(output("nft", "list ruleset"), empty);
            network.stop().await;
            assert!(!forwards_packets(), "as it was before");
            assert_eq!(
                (output("ip", "-o link"), output("nft", "list ruleset")),
                before
            );
        },
    );
}

#[test]
fn what_a_killed_daemon_leaves_is_found_by_the_next_and_by_no_other() {
    inside(
        "what_a_killed_daemon_leaves_is_found_by_the_next_and_by_no_other",
        async || {
            let before = (output("ip", "-o link"), output("nft", "list ruleset"));
            let first = Network::start(config("/data")).await.unwrap();
            let id = SandboxId::random();
            let tap = first.tap().await.unwrap();
            let address = Ipv4Addr::new(192, 168, 200, 9);
            let port = (tap.name.as_str(), tap.index);
            let counters = Counters::default();
            let attached = first.attach(&id, port, address, Egress::All, counters);
            attached.await.unwrap();
            let left = output("ip", "link show chbr0");

            // Another daemon, with other directories, leaves it alone and says whose it is.
            let other = Network::start(config("/other")).await;
            let Err(NetworkError::Links(error @ LinkError::NotOurs { .. })) = other else {
                panic!("the bridge of another daemon was taken");
            };
            assert!(error.to_string().contains("/data"), "{error}");
            assert_eq!(output("ip", "link show chbr0"), left);

            // As if killed: its sockets are closed, what is in the kernel stays.
            let first = first.abandon().await;
            assert!(output("nft", "list ruleset").contains("192.168.200.9"));
            let second = Network::start(config("/data")).await.unwrap();
            assert!(!output("nft", "list ruleset").contains("192.168.200.9"));
            second.stop().await;
            assert!(!forwards_packets(), "as it was before the first one");
            drop((first, tap));
            assert_eq!(
                (output("ip", "-o link"), output("nft", "list ruleset")),
                before
            );

            // A bridge that nobody has marked is somebody else's.
            output("ip", "link add chbr0 type bridge");
            let taken = Network::start(config("/data")).await;
            assert!(matches!(
                taken,
                Err(NetworkError::Links(LinkError::NotOurs { owner: None, .. }))
            ));
            output("ip", "link delete chbr0");
            output("ip", "link add other0 type bridge");
            output("ip", "address add 192.168.200.200/28 dev other0");
            let overlaps = Network::start(config("/data")).await;
            assert!(matches!(
                overlaps,
                Err(NetworkError::Links(LinkError::Overlap { .. }))
            ));
            assert!(!output("ip", "-o link").contains("chbr0"));
        },
    );
}

#[test]
fn what_others_take_away_is_made_again() {
    inside("what_others_take_away_is_made_again", async || {
        let network = Network::start(config("/data")).await.unwrap();
        let mut all = Vec::new();
        for (last, policy) in (2..).zip(policies(3)) {
            let (id, tap) = (SandboxId::random(), network.tap().await.unwrap());
            let address = Ipv4Addr::new(192, 168, 200, last);
            let port = (tap.name.as_str(), tap.index);
            let attached = network.attach(&id, port, address, policy, Counters::default());
            attached.await.unwrap();
            all.push((id, tap));
        }
        // In no order.
        let rules = || {
            let text = output("nft", "list ruleset");
            let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
            lines.sort();
            lines
        };
        let port = |tap: &str| output("bridge", &format!("-d link show dev {tap}"));
        let ports = || {
            all.iter()
                .map(|(_, tap)| port(&tap.name))
                .collect::<String>()
        };
        let (rules_before, ports_before) = (rules(), ports());
        assert!(rules_before.len() > 100, "{rules_before:?}");
        assert!(network.repair().await.unwrap().is_empty());

        // What most firewalls do when they load their rules.
        output("nft", "flush ruleset");
        let words = network.check().await.unwrap_err();
        assert!(
            words.contains("rules of the packet filter are gone"),
            "{words}"
        );
        let mut repaired = network.repair().await.unwrap();
        repaired.sort();
        let mut ids: Vec<_> = all.iter().map(|(id, _)| id.clone()).collect();
        ids.sort();
        assert_eq!(repaired, ids);
        assert_eq!(rules(), rules_before);
        output("nft", "delete table bridge sandboxd_chbr0");
        assert_eq!(network.repair().await.unwrap().len(), 3);
        assert_eq!(rules(), rules_before);
        network.check().await.unwrap();
        network.set_egress(&ids[0], Egress::All).await.unwrap();

        // What managers of networks do.
        output("ip", &format!("link set {} nomaster", all[0].1.name));
        output("ip", &format!("link set {} down", all[1].1.name));
        let repaired = network.repair().await.unwrap();
        assert_eq!(repaired.len(), 2);
        assert!(repaired.contains(&all[0].0) && repaired.contains(&all[1].0));
        assert_eq!(ports(), ports_before);
        assert!(network.repair().await.unwrap().is_empty());
        // Also with taps that nobody has yet.
        let taken: Vec<_> = all.iter().map(|(_, tap)| tap.name.as_str()).collect();
        let every_port = output("bridge", "link show");
        for line in every_port.lines().filter(|line| line.contains("chbr0-")) {
            let name = line
                .split([' ', ':', '@'])
                .find(|word| word.starts_with("chbr0-"));
            let name = name.unwrap();
            if !taken.contains(&name) {
                output("ip", &format!("link set {name} nomaster"));
            }
        }
        assert!(network.repair().await.unwrap().is_empty());
        let tap = network.tap().await.unwrap();
        let link = output("ip", &format!("link show {}", tap.name));
        assert!(link.contains("master chbr0"), "{link}");

        // A sandbox that has ended is no longer looked for.
        network.detach(&all[2].0).await.unwrap();
        output("nft", "flush ruleset");
        assert_eq!(network.repair().await.unwrap().len(), 2);

        output("ip", "link delete chbr0");
        for words in [
            network.check().await.unwrap_err(),
            network.repair().await.unwrap_err().to_string(),
        ] {
            assert!(words.contains("restart sandboxd"), "{words}");
        }
    });
}

#[test]
fn another_namespace_has_all_of_it() {
    inside("another_namespace_has_all_of_it", async || {
        let mut other = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo up; read word"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut up = [0; 3];
        std::io::Read::read_exact(other.stdout.as_mut().unwrap(), &mut up).unwrap();
        let before = (output("ip", "-o link"), output("nft", "list ruleset"));
        let namespace = format!("/proc/{}/ns/net", other.id());
        let there = format!("--net={namespace}");
        let network = Network::start(NetworkConfig {
            namespace: Some(namespace),
            ..config("/data")
        });
        let network = network.await.unwrap();
        let tap = network.tap().await.unwrap();
        assert_eq!(
            (output("ip", "-o link"), output("nft", "list ruleset")),
            before
        );
        assert!(!forwards_packets());
        let links = output("nsenter", &format!("{there} ip -o link"));
        assert!(
            links.contains("chbr0:") && links.contains(&format!("{}:", tap.name)),
            "{links}"
        );
        let rules = output("nsenter", &format!("{there} nft list tables"));
        assert!(rules.contains("table inet sandboxd_chbr0"), "{rules}");
        drop(tap);
        network.stop().await;
        let links = output("nsenter", &format!("{there} ip -o link"));
        assert!(!links.contains("chbr0"), "{links}");
        other.kill().unwrap();
        other.wait().unwrap();
    });
}

#[test]
fn two_networks_are_side_by_side() {
    inside("two_networks_are_side_by_side", async || {
        let before = (output("ip", "-o link"), output("nft", "list ruleset"));
        let first = NetworkConfig {
            siblings: vec!["chbr1".into()],
            ..config("/data")
        };
        let second = NetworkConfig {
            bridge: "chbr1".into(),
            subnet: "192.168.201.0/24".parse().unwrap(),
            siblings: vec!["chbr0".into()],
            ..config("/data")
        };
        for _ in 0..2 {
            let one = Network::start(first.clone()).await.unwrap();
            let other = Network::start(second.clone()).await.unwrap();
            // The first passes nobody's packets on but theirs; each passes those of its own.
            let rules = output("nft", "list chain inet sandboxd_chbr0 forward");
            let place = |text: &str| {
                rules
                    .find(text)
                    .unwrap_or_else(|| panic!("{text}: {rules}"))
            };
            let theirs = place("oifname \"chbr1\" accept").max(place("iifname \"chbr1\" accept"));
            assert!(rules.rfind("drop").unwrap() > theirs, "{rules}");
            let rules = output("nft", "list chain inet sandboxd_chbr1 forward");
            assert!(
                rules.contains("iifname \"chbr1\" goto from_sandbox"),
                "{rules}"
            );

            let id = SandboxId::random();
            let tap = other.tap().await.unwrap();
            assert!(tap.name.starts_with("chbr1-"));
            let address = Ipv4Addr::new(192, 168, 201, 2);
            let port = (tap.name.as_str(), tap.index);
            let attached = other.attach(&id, port, address, Egress::All, Counters::default());
            attached.await.unwrap();
            assert!(other.has(&id) && !one.has(&id));
            other.detach(&id).await.unwrap();
            drop(tap);
            other.stop().await;
            assert!(forwards_packets(), "the first needs it still");
            one.stop().await;
            assert!(!forwards_packets());
            assert_eq!(
                (output("ip", "-o link"), output("nft", "list ruleset")),
                before
            );
        }
    });
}
