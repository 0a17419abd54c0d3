//! The network of sandboxes, with a host outside that each scenario makes for itself.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::outside::{FAR, METADATA, NEAR, Outside, PRIVATE, filter, ip};
use e2e_tests::pattern::{Pattern, assert_pattern};
use e2e_tests::{PATIENCE, report};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const GATEWAY: &str = "192.168.200.1";
/// How soon a change must take effect.
const SOON: Duration = Duration::from_secs(1);

fn daemon(arguments: &[&str]) -> Daemon {
    let resolver = format!("{}:53", FAR[0]);
    let network = ["--network", "on", "--network-resolvers", &resolver];
    Daemon::start_with(&[&network, arguments].concat())
}

fn small(network: Value) -> Value {
    json!({"memory_mb": 192, "network": network})
}

fn address_of(sandbox: &Sandbox<'_>) -> String {
    sandbox.get()["guest_ip"].as_str().unwrap().to_owned()
}

/// A server of the host outside that says who has called.
fn who_calls(outside: &Outside, address: &'static str, port: u16) {
    let listener = outside.run(move || TcpListener::bind((address, port)).unwrap());
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let caller = stream.peer_addr().unwrap().ip();
            let _ = writeln!(&stream, "{caller}");
        }
    });
}

/// Whether the sandbox gets an answer of [`who_calls`]; it does not wait for one for ever.
fn calls(sandbox: &Sandbox<'_>, address: &str, port: u16) -> bool {
    let script = format!("nc -n -d -w 5 {address} {port}");
    let result = sandbox.exec(&["sh", "-c", &script]);
    !result["stdout"].as_str().unwrap().is_empty()
}

/// Runs a server in the sandbox, and waits until `ss` with this option shows its port.
fn serve(sandbox: &Sandbox<'_>, script: &str, option: &str, port: u16) {
    sandbox.must(&format!(
        "setsid sh -c '{script}' </dev/null >/dev/null 2>&1 & \
         while ! ss {option} | grep -q :{port}; do sleep 0.1; done"
    ));
}

/// A resolver of the host outside, which knows of `good.example` and everything below it.
fn resolver(outside: &Outside) {
    let socket = outside.run(|| UdpSocket::bind((FAR[0], 53)).unwrap());
    thread::spawn(move || {
        let mut buffer = [0; 512];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            let question = &buffer[..length];
            let is_a = question.windows(4).any(|bytes| bytes == [0, 1, 0, 1]);
            let is_known = question
                .windows(12)
                .any(|bytes| bytes == b"good\x07example");
            // Number, an answer without error, one question, and one record or none.
            let mut reply = question[..2].to_vec();
            let records = u8::from(is_a && is_known);
            reply.extend([0x81, 0x80, 0, 1, 0, records, 0, 0, 0, 0]);
            let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
            reply.extend(&question[12..end]);
            if records == 1 {
                // The name of the question, an address, two seconds.
                reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 2, 0, 4]);
                reply.extend(FAR[1].parse::<std::net::Ipv4Addr>().unwrap().octets());
            }
            socket.send_to(&reply, from).unwrap();
        }
    });
}

#[test]
fn a_sandbox_reaches_out_and_nothing_else_and_is_itself_alone() {
    let outside = Outside::beside_new_network();
    let before = (ip("-o link"), filter());
    for address in [FAR[0], PRIVATE, METADATA] {
        who_calls(&outside, address, 80);
    }
    let near = TcpListener::bind((NEAR, 80)).unwrap();
    let mut daemon = daemon(&[]);
    let service = TcpListener::bind((GATEWAY, 80)).unwrap();
    let one = daemon.create(&small(json!({})));
    let other = daemon.create(&small(json!({"address": "192.168.200.77"})));
    let (own, theirs) = (address_of(&one), address_of(&other));
    assert_eq!(
        (own.as_str(), theirs.as_str()),
        ("192.168.200.2", "192.168.200.77")
    );

    // It has what the record says, and is seen as this host.
    let found = one.must("ip -o -4 address show dev eth0; cat /sys/class/net/eth0/address /etc/resolv.conf; ip route");
    for word in [
        &*own,
        "52:54:00:a8:c8:02",
        "nameserver 192.168.200.1",
        "default via 192.168.200.1",
    ] {
        assert!(found.contains(word), "no {word} in {found}");
    }
    assert_eq!(one.must(&format!("nc -n -d -w 20 {} 80", FAR[0])), NEAR);
    one.must(&format!("ping -c 2 -i 0.2 -W 20 {GATEWAY}"));

    // A program that asks by DHCP is told the same.
    let discover = [
        r"\1\1\6\0seed",
        &r"\0".repeat(20),
        r"\122\124\0\250\310\2",
        &r"\0".repeat(202),
        r"\143\202\123\143\65\1\1\377",
    ]
    .concat();
    let script = format!("printf '{discover}' | nc -u -n -w 5 -p 68 {GATEWAY} 67 | od -An -v -tu1");
    let offer = one.must(&script);
    let bytes: Vec<&str> = offer.split_ascii_whitespace().collect();
    assert_eq!(
        bytes.get(16..20),
        Some(&["192", "168", "200", "2"][..]),
        "{offer}"
    );
    assert_eq!(bytes.get(240..243), Some(&["53", "1", "2"][..]), "{offer}");

    // No other sandbox, no service of this host, nothing private.
    serve(&other, "nc -l -k -n 80", "-ltn", 80);
    for address in [&*theirs, GATEWAY, NEAR, PRIVATE, METADATA] {
        assert!(!calls(&one, address, 80), "{address} was reached");
    }
    one.must(&format!("! ping -c 1 -W 2 {theirs}"));
    service.set_nonblocking(true).unwrap();
    near.set_nonblocking(true).unwrap();
    for listener in [&service, &near] {
        assert_eq!(
            listener.accept().unwrap_err().kind(),
            io::ErrorKind::WouldBlock
        );
    }
    // Nor is it reached from outside but by forwards.
    let target: SocketAddr = format!("{theirs}:80").parse().unwrap();
    outside.run(|| ip(&format!("route add 192.168.200.0/24 via {NEAR}")));
    let patience = Duration::from_secs(3);
    assert!(
        outside
            .run(move || TcpStream::connect_timeout(&target, patience))
            .is_err()
    );

    // With the address of another, or another card, nothing passes.
    let dropped = || {
        let text = filter();
        let counter = text.split("counter spoofed {").nth(1).unwrap();
        let words: Vec<_> = counter.split_ascii_whitespace().take(2).collect();
        words[1].parse::<u64>().unwrap()
    };
    let before_spoof = dropped();
    let spoof = format!(
        "ip address add 192.168.200.99/32 dev eth0; ping -c 2 -i 0.2 -W 1 -I 192.168.200.99 {GATEWAY}; \
         ip address del 192.168.200.99/32 dev eth0; \
         ip link set eth0 down; ip link set eth0 address 52:54:00:a8:c8:4d; ip link set eth0 up; \
         ip route replace default via {GATEWAY}; ping -c 2 -i 0.2 -W 1 {GATEWAY}"
    );
    let result = one.exec(&["sh", "-c", &spoof]);
    assert_ne!(result["exit_code"], 0, "{result}");
    assert!(
        !result["stdout"].as_str().unwrap().contains("bytes from"),
        "{result}"
    );
    assert!(dropped() > before_spoof);
    assert!(calls(&other, FAR[0], 80), "the other one is as before");

    // Whoever is deleted leaves nothing, nor does the daemon.
    one.delete();
    other.delete();
    let rules = filter();
    assert!(!rules.contains(&own) && !rules.contains(&theirs), "{rules}");
    daemon.stop();
    assert_eq!((ip("-o link"), filter()), before);
}

#[test]
fn a_policy_holds_for_what_is_under_way_and_names_lead_where_they_may() {
    let outside = Outside::beside_new_network();
    resolver(&outside);
    who_calls(&outside, FAR[0], 80);
    who_calls(&outside, FAR[1], 80);
    who_calls(&outside, FAR[1], 81);
    let stream_server = outside.run(|| TcpListener::bind((FAR[0], 9000)).unwrap());
    let daemon = daemon(&[]);
    let sandbox = daemon.create(&small(json!({"egress": {"policy": "none"}})));
    let egress = |policy: Value| {
        let path = sandbox.path("/network/egress");
        let (status, body) = daemon.call("PUT", &path, &policy.to_string());
        assert_eq!(status, 200, "{body}");
    };
    let network = || daemon.call("GET", &sandbox.path("/network"), "").1;

    // Nothing, names included; all of it is counted and told.
    assert!(!calls(&sandbox, FAR[0], 80));
    let lookup = "getent ahostsv4 good.example";
    sandbox.must(&format!("! {lookup}"));
    let traffic = network()["traffic"].clone();
    assert!(
        traffic["denied"]["packets"].as_u64().unwrap() > 0,
        "{traffic}"
    );
    assert!(traffic["denied_names"].as_u64().unwrap() > 0, "{traffic}");
    e2e_tests::until("what was denied is told", || {
        let denied = network()["denied"].as_array().unwrap().clone();
        let has = |field: &str, value: Value| denied.iter().any(|entry| entry[field] == value);
        has("name", json!("good.example"))
            && has("address", json!(FAR[0]))
            && has("port", json!(80))
    });

    // Everything; and a connection that sends without end ends when that is over.
    egress(json!({"policy": "all"}));
    assert!(calls(&sandbox, FAR[0], 80));
    sandbox.must(&format!(
        "setsid sh -c 'yes | nc -n -N {} 9000; touch /tmp/ended' </dev/null >/dev/null 2>&1 &",
        FAR[0]
    ));
    let (mut stream, _) = stream_server.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 65536];
    for _ in 0..20 {
        assert_ne!(stream.read(&mut buffer).unwrap(), 0);
    }
    egress(
        json!({"policy": "allow", "allow": [{"cidr": FAR[1], "protocol": "tcp", "ports": [81]}]}),
    );
    // What had come before.
    let mut before = rustix::io::ioctl_fionread(&stream).unwrap();
    while before > 0 {
        let most = buffer.len().min(usize::try_from(before).unwrap());
        before -= stream.read(&mut buffer[..most]).unwrap() as u64;
    }
    let changed = Instant::now();
    // What was under way within the host still arrives; then nothing does.
    stream.set_read_timeout(Some(SOON)).unwrap();
    while matches!(stream.read(&mut buffer), Ok(length) if length > 0) {
        assert!(changed.elapsed() < SOON, "the connection goes on");
    }
    sandbox.must("for n in $(seq 100); do [ -e /tmp/ended ] && exit; sleep 0.1; done; false");

    // A list of addresses and ports.
    assert!(calls(&sandbox, FAR[1], 81));
    assert!(!calls(&sandbox, FAR[1], 80) && !calls(&sandbox, FAR[0], 80));

    // A list of names: what they lead to, for as long as DNS says.
    egress(json!({"policy": "allow", "allow": [{"domain": "*.good.example", "ports": ["80"]}]}));
    assert!(
        !calls(&sandbox, FAR[1], 80),
        "an address that no name has led to"
    );
    sandbox.must(&format!("! {lookup}"));
    let fetch = "nc -d -w 20 www.good.example 80";
    assert_eq!(sandbox.must(fetch), NEAR);
    assert!(
        !calls(&sandbox, FAR[1], 81),
        "a port that the rule does not have"
    );
    // Its two seconds, and the five more that a program may take.
    thread::sleep(Duration::from_secs(8));
    assert!(
        !calls(&sandbox, FAR[1], 80),
        "the address has outlived the answer"
    );
    assert_eq!(sandbox.must(fetch), NEAR);
}

#[test]
fn ports_lead_into_sandboxes_over_pauses_and_clones_find_their_own_way() {
    let size = MIB * std::env::var("MVS_SOAK_FORWARD_MIB").map_or(64, |mib| mib.parse().unwrap());
    let outside = Outside::beside_new_network();
    who_calls(&outside, FAR[0], 80);
    let mut daemon = daemon(&[]);
    let sandbox = daemon.create(&small(json!({})));
    let forward = |body: Value| {
        let path = sandbox.path("/network/forwards");
        daemon.call("POST", &path, &body.to_string())
    };
    let (status, body) =
        forward(json!({"host_address": NEAR, "host_port": 8080, "guest_port": 7000}));
    assert_eq!(status, 201, "{body}");
    let (status, body) = forward(json!({"protocol": "udp", "guest_port": 7001}));
    assert_eq!(status, 201, "{body}");
    let udp_port = u16::try_from(body["host_port"].as_u64().unwrap()).unwrap();
    for (address, port) in [(NEAR, 8080), ("0.0.0.0", 8080)] {
        let (status, body) =
            forward(json!({"host_address": address, "host_port": port, "guest_port": 1}));
        assert_eq!(
            (status, &body["error"]["code"]),
            (409, &json!("conflict")),
            "{body}"
        );
    }

    // Much of it each way, one after the other: an end on one side leaves the other open.
    let script = format!("head -c {size} /dev/zero | nc -l -n -N 7000 >/tmp/got; touch /tmp/done");
    serve(&sandbox, &script, "-ltn", 7000);
    let mut stream = outside.run(|| TcpStream::connect((NEAR, 8080)).unwrap());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    // The guest's side says all that it has and closes its half before it is sent anything.
    let started = Instant::now();
    let received = io::copy(&mut (&stream).take(size + 1), &mut io::sink()).unwrap();
    report(&format!(
        "forward, guest to outside: {} MiB in {:.1} s",
        received / MIB,
        started.elapsed().as_secs_f64()
    ));
    assert_eq!(received, size);
    io::copy(&mut Pattern::new(3).take(16 * MIB), &mut stream).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    sandbox.must("while ! [ -e /tmp/done ]; do sleep 0.1; done");
    assert_pattern(sandbox.download("/tmp/got"), 3, 16 * MIB);

    // UDP, from two clients at once, and over a pause with the port kept.
    let script = "perl -MIO::Socket::INET -e \"\\$s = IO::Socket::INET->new(LocalPort => 7001, \
                  Proto => q(udp)) or die; while (\\$s->recv(\\$m, 2000)) { \\$s->send(uc \\$m) }\"";
    serve(&sandbox, script, "-lun", 7001);
    thread::scope(|scope| {
        let one = scope.spawn(|| ask(udp_port, "one"));
        assert_eq!(ask(udp_port, "two"), "TWO");
        assert_eq!(one.join().unwrap(), "ONE");
    });
    let before = address_of(&sandbox);
    sandbox.pause();
    assert!(
        UdpSocket::bind(("127.0.0.1", udp_port)).is_err(),
        "the port is kept"
    );
    let hung_up = outside.run(|| {
        // The end may come before this side knows of the beginning.
        match TcpStream::connect((NEAR, 8080)) {
            Ok(mut stream) => !matches!(stream.read(&mut [0]), Ok(1)),
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    });
    assert!(hung_up);

    // A restart keeps what is paused, with its address, ports and policy.
    let id = sandbox.id.clone();
    daemon = daemon.crash();
    let sandbox = daemon.sandbox(&id);
    sandbox.resume();
    assert_eq!(address_of(&sandbox), before);
    assert_eq!(ask(udp_port, "again"), "AGAIN");

    // One that runs outlives the daemon, with its processes, its address, its ports, its policy, what it
    // was allowed to reach, and what was counted of it.
    let counted = |daemon: &Daemon, sandbox: &Sandbox<'_>| {
        let traffic = daemon.call("GET", &sandbox.path("/network"), "").1["traffic"].clone();
        ["sent", "received"].map(|way| traffic[way]["packets"].as_u64().unwrap())
    };
    sandbox.must("setsid sh -c 'n=0; while :; do n=$((n + 1)); echo $n >>/root/count; sleep 0.1; done' </dev/null >/dev/null 2>&1 &");
    assert!(calls(&sandbox, FAR[0], 80));
    let (boot, pid) = (
        sandbox.must("cat /proc/sys/kernel/random/boot_id"),
        sandbox.outer_pid(),
    );
    let (packets, last) = (
        counted(&daemon, &sandbox),
        sandbox.must("tail -n 1 /root/count"),
    );
    daemon = daemon.crash();
    let sandbox = daemon.sandbox(&id);
    assert_eq!(sandbox.get()["status"], "running");
    assert_eq!(sandbox.outer_pid(), pid);
    assert_eq!(sandbox.must("cat /proc/sys/kernel/random/boot_id"), boot);
    let number = |text: String| text.parse::<u64>().unwrap();
    assert!(number(sandbox.must("sleep 1; tail -n 1 /root/count")) > number(last));
    sandbox.must("perl -ne 'exit 1 if $_ != $.' /root/count");
    assert_eq!(address_of(&sandbox), before);
    assert_eq!(ask(udp_port, "still"), "STILL");
    let after = counted(&daemon, &sandbox);
    assert!(
        after[0] >= packets[0] && after[1] >= packets[1],
        "{packets:?} and then {after:?}"
    );
    assert!(calls(&sandbox, FAR[0], 80));

    // One program waits for what it is sent, and keeps what came of it.
    let listener = outside.run(|| TcpListener::bind((FAR[0], 9001)).unwrap());
    let script = format!(
        "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(\"{}:9001\") or die; \
         open($up, \">\", \"/tmp/connected\"); close($up); \
         $n = sysread($s, $m, 9); $was = defined $n ? \"read $n\" : \"$!\"; \
         open($o, \">\", \"/tmp/came.new\"); print $o $was; close($o); \
         rename(\"/tmp/came.new\", \"/tmp/came\")'",
        FAR[0]
    );
    sandbox.must(&format!(
        "setsid {script} </dev/null >/dev/null 2>&1 & \
         until [ -e /tmp/connected ]; do sleep 0.1; done"
    ));
    let (mut connected, _) = listener.accept().unwrap();

    // A clone has an address of its own, and reaches out as soon as it is there.
    let (status, body) = daemon.call("POST", &sandbox.path("/fork"), r#"{"count": 1}"#);
    assert_eq!(status, 201, "{body}");
    let clone = daemon.sandbox(body["sandboxes"][0]["id"].as_str().unwrap());
    clone.must("true");
    let started = Instant::now();
    assert_eq!(clone.must(&format!("nc -n -d -w 20 {} 80", FAR[0])), NEAR);
    report(&format!(
        "a clone has reached out after {} ms",
        started.elapsed().as_millis()
    ));
    assert_ne!(address_of(&clone), before);
    let own = clone.must("ip -o -4 address show dev eth0");
    assert!(
        own.contains(&address_of(&clone)) && !own.contains(&format!("{before}/")),
        "{own}"
    );
    assert!(calls(&sandbox, FAR[0], 80), "its parent is as before");

    // The connection is the parent's. The clone's program is told so, and does not wait for ever.
    let came = "until [ -e /tmp/came ]; do sleep 0.1; done; cat /tmp/came";
    assert_eq!(clone.must(came), "Software caused connection abort");
    connected.write_all(b"still here").unwrap();
    assert_eq!(sandbox.must(came), "read 9");
}

/// The answer of the sandbox's server of words to one.
fn ask(port: u16, word: &str) -> String {
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(("127.0.0.1", port)).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(2)))
        .unwrap();
    let mut buffer = [0; 64];
    for _ in 0..20 {
        client.send(word.as_bytes()).unwrap();
        if let Ok(length) = client.recv(&mut buffer) {
            return String::from_utf8_lossy(&buffer[..length]).into_owned();
        }
    }
    "no answer".to_owned()
}

#[test]
fn a_warm_start_is_connected_and_no_faster_than_it_may_be() {
    const LIMIT: u64 = 512 << 10;
    let outside = Outside::beside_new_network();
    who_calls(&outside, FAR[0], 80);
    let listener = outside.run(|| TcpListener::bind((FAR[0], 9000)).unwrap());
    let settings = tempfile::NamedTempFile::new().unwrap();
    let further = "[[network.further]]\nbridge = \"chbr1\"\nsubnet = \"192.168.201.0/24\"\n";
    fs::write(settings.path(), further).unwrap();
    let config = settings.path().to_str().unwrap();
    let daemon = daemon(&["--warm-disk-bytes", "1073741824", "--config", config]);
    let first = daemon.create(&small(json!({})));
    first.delete();
    daemon.process.stderr.wait_for("warm snapshot made");
    let limits = json!({"rate_limits": {"bytes_per_sec": LIMIT}});
    let sandbox = daemon.create(&small(limits));
    let record = sandbox.get();
    assert_eq!(record["timings_ms"]["start"], "warm");
    report(&format!("warm, with network: {}", record["timings_ms"]));
    assert!(calls(&sandbox, FAR[0], 80));

    // What it sends takes as long as the limit says, but for what may be sent at once.
    let sends = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let started = Instant::now();
        let count = io::copy(&mut stream, &mut io::sink()).unwrap();
        (count, started.elapsed())
    });
    let size = 4 * LIMIT;
    sandbox.must(&format!(
        "head -c {size} /dev/zero | nc -n -N {} 9000",
        FAR[0]
    ));
    let (count, took) = sends.join().unwrap();
    assert_eq!(count, size);
    assert!(
        took > Duration::from_millis(2500),
        "{took:?} for {size} bytes"
    );
}
