//! Processes in the background, terminals and servers in sandboxes, with real guests.

use std::time::Instant;

use e2e_tests::PATIENCE;
use e2e_tests::daemon::{Daemon, Sandbox};
use e2e_tests::http::Request;
use e2e_tests::report;
use e2e_tests::socket::Socket;
use serde_json::{Value, json};

fn background(daemon: &Daemon, sandbox: &Sandbox<'_>, tag: &str, script: &str) -> Value {
    let body = json!({"cmd": "sh", "args": ["-c", script], "background": true, "tag": tag});
    let (status, started) = daemon.call("POST", &sandbox.path("/exec"), &body.to_string());
    assert_eq!(status, 202, "{started}");
    started
}

#[test]
fn what_runs_in_the_background_goes_on_after_a_pause_and_ends_when_told() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&json!({"memory_mb": 192}));
    let script = "echo begun; n=0; while :; do n=$((n+1)); echo $n >/run/n; sleep 0.05; done";
    let started = background(&daemon, &sandbox, "counter", script);
    let list = || {
        let (status, list) = daemon.call("GET", &sandbox.path("/processes"), "");
        assert_eq!(status, 200, "{list}");
        list["processes"].clone()
    };
    let pid = &started["pid"];
    assert_eq!(
        (&list()[0]["pid"], &list()[0]["tag"]),
        (pid, &json!("counter"))
    );
    sandbox.pause();
    sandbox.resume();
    let processes = list();
    assert_eq!(
        (&processes[0]["pid"], processes.as_array().unwrap().len()),
        (pid, 1)
    );
    let count = || sandbox.must("cat /run/n").parse::<u64>().unwrap_or(0);
    let before = count();
    let deadline = Instant::now() + PATIENCE;
    while count() <= before {
        assert!(Instant::now() < deadline, "it stands still");
    }
    // What it wrote before the pause is there, and its end comes.
    let mut follower = Socket::open(&daemon, &sandbox.path("/processes/counter/stream"));
    follower.wait_for(b"begun\n");
    let (status, _) = daemon.call("DELETE", &sandbox.path("/processes/counter"), "");
    assert_eq!(status, 204);
    assert_eq!(
        follower.receive().unwrap(),
        json!({"type": "exit", "exit_code": 137})
    );
    assert_eq!(list(), json!([]));
    // A session of its own does not save what it has started.
    background(&daemon, &sandbox, "daemon", "setsid sleep 12345 & wait");
    let sleeps = "pgrep -f 'sleep 1234[5]' || true";
    let deadline = Instant::now() + PATIENCE;
    while sandbox.must(sleeps).is_empty() {
        assert!(Instant::now() < deadline, "it does not start");
    }
    daemon.call("DELETE", &sandbox.path("/processes/daemon"), "");
    while !sandbox.must(sleeps).is_empty() {
        assert!(Instant::now() < deadline, "it is left");
    }
    sandbox.delete();
}

#[test]
fn programs_on_a_terminal_behave() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&json!({"memory_mb": 192}));
    let mut terminal = Socket::open(&daemon, &sandbox.path("/pty"));
    let start = json!({"type": "start", "cmd": "/bin/bash", "args": ["--norc"], "cols": 90,
                       "rows": 20, "envs": {"PS1": "", "LC_ALL": "C.UTF-8"}});
    terminal.say(&start);
    let started = terminal.receive().unwrap();
    assert_eq!(started["type"], "started");
    terminal.type_in(b"stty -echo; stty size; tty; echo do''ne\n");
    let out = String::from_utf8(terminal.wait_for(b"done\r\n")).unwrap();
    assert!(
        out.contains("20 90\r\n") && out.contains("/dev/pts/"),
        "{out}"
    );
    terminal.say(&json!({"type": "resize", "cols": 81, "rows": 25}));
    terminal.type_in(b"stty size\n");
    terminal.wait_for(b"25 81\r\n");
    // The bytes of a character come apart.
    terminal.type_in(b"read -r word; echo \"<$word>\"\n\xf0\x9f");
    terminal.type_in(b"\xa6\x80\n");
    terminal.wait_for("<\u{1f980}>\r\n".as_bytes());
    terminal.type_in(
        b"sh -c 'trap \"exit 5\" INT; echo ready; while :; do sleep 0.05; done'; echo =$?\n",
    );
    terminal.wait_for(b"ready\r\n");
    let typed = Instant::now();
    terminal.type_in(b"\x03");
    terminal.wait_for(b"=5\r\n");
    report(&format!(
        "from Ctrl-C to what the shell says of it: {:?}",
        typed.elapsed()
    ));
    // Who goes away finds it again.
    drop(terminal);
    let mut terminal = Socket::open(&daemon, &sandbox.path("/pty"));
    terminal.say(&json!({"type": "connect", "tag": started["tag"]}));
    assert_eq!(terminal.receive().unwrap(), started);
    terminal.wait_for(b"=5\r\n");
    terminal.type_in(b"exit 9\n");
    let mut last = Value::Null;
    while let Some(told) = terminal.receive() {
        last = told;
    }
    assert_eq!(last, json!({"type": "exit", "exit_code": 9}));
    sandbox.delete();
}

/// Answers each request with its first line and the headers that begin with `X-Forwarded`.
const SERVER: &str = r#"
use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 3000, Listen => 9) or die;
print "listening\n"; $| = 1; print "\n";
while (my $client = $server->accept) {
    my $said = "";
    while (my $line = <$client>) {
        last if $line =~ /^\r?\n$/;
        $said .= $line if $said eq "" or $line =~ /^X-Forwarded/i;
    }
    print $client "HTTP/1.1 200 OK\r\nContent-Length: " . length($said) . "\r\n\r\n$said";
}
"#;

#[test]
fn a_server_in_a_sandbox_without_a_network_is_reached() {
    let daemon = Daemon::start();
    let sandbox =
        daemon.create(&json!({"memory_mb": 192, "network": {"egress": {"policy": "none"}}}));
    let (status, _) = sandbox.upload("/root/server", SERVER.as_bytes(), SERVER.len() as u64);
    assert_eq!(status, 204);
    daemon.refused(
        ("GET", &sandbox.path("/ports/3000/x"), ""),
        (502, "agent_error"),
        &["3000", "listens"],
    );
    background(&daemon, &sandbox, "server", "exec perl /root/server");
    let mut follower = Socket::open(&daemon, &sandbox.path("/processes/server/stream"));
    follower.wait_for(b"listening\n");
    let begun = Instant::now();
    let get = |request: Request| {
        let response = daemon.send(request, std::io::empty(), 0);
        (
            response.status,
            String::from_utf8(response.bytes()).unwrap(),
        )
    };
    let (status, said) = get(Request::new("GET", &sandbox.path("/ports/3000/a%2Fb?c=d")));
    assert_eq!(status, 200);
    assert!(said.starts_with("GET /a%2Fb?c=d HTTP/1.1\r\n"), "{said}");
    let prefix = format!("x-forwarded-prefix: {}", sandbox.path("/ports/3000"));
    assert!(said.to_lowercase().contains(&prefix), "{said}");
    report(&format!(
        "a request to a server in a sandbox: {:?}",
        begun.elapsed()
    ));
    let host = format!("3000-{}.localhost", sandbox.id);
    let (status, said) = get(Request::new("GET", "/page").header("Host", &host));
    assert!(status == 200 && said.starts_with("GET /page "), "{said}");
    // It goes on after a pause.
    sandbox.pause();
    sandbox.resume();
    let request = Request::new("GET", "/again")
        .header("X-Sandbox-Id", &sandbox.id)
        .header("X-Sandbox-Port", "3000");
    let (status, said) = get(request);
    assert!(status == 200 && said.starts_with("GET /again "), "{said}");
    sandbox.delete();
}
