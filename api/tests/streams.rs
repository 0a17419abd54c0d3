//! Output that is long, readers that do not read, and many clients at once, with the real agent.
//!
//! `STREAM_MIB` is how long the long one is (64).

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on may panic"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/served.rs"]
mod served;
#[path = "support/vmm.rs"]
mod vmm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use served::Served;

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

/// A size of a process in KiB, as /proc tells it.
fn kib(pid: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The agents of this test's sandboxes: children of the stand-ins, which are children of this process.
fn agents() -> Vec<u32> {
    children(std::process::id())
        .into_iter()
        .flat_map(children)
        .filter(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name == "guest-agent\n")
        })
        .collect()
}

fn children(of: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{of}/task")) else {
        return Vec::new();
    };
    let lists = tasks.flatten().map(|task| task.path().join("children"));
    let lists: Vec<String> = lists.flat_map(std::fs::read_to_string).collect();
    let pids = lists.iter().flat_map(|list| list.split_whitespace());
    pids.map(|pid| pid.parse().unwrap()).collect()
}

/// Forgets how large a process has been.
fn reset_peak(pid: u32) {
    // proc_pid_clear_refs(5): 5 resets the peak.
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5").unwrap();
}

async fn gone(pid: u64) {
    while Path::new(&format!("/proc/{pid}")).exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Waits until what is in the file stays the same for so long.
async fn settles(path: &PathBuf, rest: Duration) -> u64 {
    let read = || {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    let mut last = (read(), tokio::time::Instant::now());
    loop {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = read();
        if now != last.0 || now == 0 {
            last = (now, tokio::time::Instant::now());
        } else if last.1.elapsed() > rest {
            return now;
        }
    }
}

#[test]
fn a_long_stream_passes_in_bounded_memory() {
    alone("a_long_stream_passes_in_bounded_memory", async || {
        let mib = std::env::var("STREAM_MIB").map_or(64, |mib| mib.parse().unwrap());
        let served = Served::new().await;
        let sandbox = served.create().await;
        let own = std::process::id();
        let agent = agents()[0];
        let (before, agent_before) = (kib(own, "VmRSS:"), kib(agent, "VmRSS:"));
        reset_peak(own);
        reset_peak(agent);
        let mut socket = served.socket(&format!("{sandbox}/exec/stream")).await;
        let script = format!("yes 0123456789abcde | head -c {}", mib << 20);
        socket
            .say(&json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script]}))
            .await;
        let mut length = 0;
        let last = loop {
            let told = socket.next().await.unwrap();
            match told["data"].as_str() {
                Some(data) if told["type"] == "stdout" => length += data.len(),
                _ if told["type"] == "start" => {}
                _ => break told,
            }
        };
        assert_eq!(last, json!({"type": "exit", "exit_code": 0}));
        assert_eq!(length, mib << 20);
        let grown = kib(own, "VmHWM:") - before;
        let agent_grown = kib(agent, "VmHWM:") - agent_before;
        println!(
            "{mib} MiB: the daemon and its client grew by {grown} KiB, the agent by {agent_grown} KiB"
        );
        // The client of this test is part of the process.
        assert!(grown < 16 * 1024, "{grown} KiB");
        assert!(agent_grown < 1024, "{agent_grown} KiB");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_stops_reading_stops_a_foreground_command_and_one_that_goes_ends_it() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let count = served.dir.path().join("count");
    let script = format!(
        "n=0; line=$(head -c 65535 /dev/zero | tr '\\0' x); \
         while :; do echo $line; n=$((n+1)); echo $n >{0}.new; mv {0}.new {0}; done",
        count.display()
    );
    let mut socket = served.socket(&format!("{sandbox}/exec/stream")).await;
    socket
        .say(&json!({"type": "start", "cmd": "/bin/sh", "args": ["-c", script]}))
        .await;
    let pid = socket.next().await.unwrap()["pid"].as_u64().unwrap();
    let written = settles(&count, Duration::from_millis(700)).await;
    println!("a client that does not read lets {written} pieces of 64 KiB be written");
    // What the sockets and pipes on the way hold, the largest of them TCP's with 6 MiB.
    assert!(written < 512, "{written}");
    // It goes on with the client.
    let mut read = 0;
    while read < (written as usize + 64) * 65536 {
        read += socket.next().await.unwrap()["data"].as_str().unwrap().len();
    }
    // In the background, nobody is waited for, and nobody's end matters.
    let body = json!({"cmd": "/bin/sh", "args": ["-c", "sleep 1000 & wait"], "background": true});
    let (_, job) = served.call("POST", &format!("{sandbox}/exec"), &body).await;
    let job = job["pid"].as_u64().unwrap();
    let follower = served
        .socket(&format!("{sandbox}/processes/{job}/stream"))
        .await;
    drop(follower);
    drop(socket);
    gone(pid).await;
    let (_, list) = served
        .call("GET", &format!("{sandbox}/processes"), &Value::Null)
        .await;
    assert_eq!(list["processes"][0]["pid"], json!(job));
    assert!(Path::new(&format!("/proc/{job}")).exists());
}

#[test]
fn a_thousand_idle_sockets_and_fifty_commands_at_once() {
    const SANDBOXES: usize = 10;
    const SOCKETS: usize = 1000;
    const COMMANDS: usize = 50;
    alone(
        "a_thousand_idle_sockets_and_fifty_commands_at_once",
        async || {
            let served = std::sync::Arc::new(Served::new().await);
            let mut sandboxes = Vec::new();
            for _ in 0..SANDBOXES {
                let sandbox = served.create().await;
                let body =
                    json!({"cmd": "sleep", "args": ["1000"], "tag": "job", "background": true});
                let (status, _) = served.call("POST", &format!("{sandbox}/exec"), &body).await;
                assert_eq!(status, 202);
                sandboxes.push(sandbox);
            }
            let own = std::process::id();
            let before = kib(own, "VmRSS:");
            let mut sockets = Vec::new();
            for index in 0..SOCKETS {
                let sandbox = &sandboxes[index % SANDBOXES];
                let mut socket = served
                    .socket(&format!("{sandbox}/processes/job/stream"))
                    .await;
                assert_eq!(socket.next().await.unwrap()["type"], "start");
                sockets.push(socket);
            }
            let with_sockets = kib(own, "VmRSS:");
            let commands = (0..COMMANDS).map(|index| {
                let served = served.clone();
                let path = format!("{}/exec", sandboxes[index % SANDBOXES]);
                tokio::spawn(async move {
                    let word = format!("word {index}");
                    let body = json!({"cmd": "/bin/sh", "timeout_sec": 300,
                                      "args": ["-c", "sleep 0.2; echo $0", word]});
                    let (status, said) = served.call("POST", &path, &body).await;
                    assert_eq!(status, 200, "{said}");
                    assert_eq!(said["stdout"], json!(format!("{word}\n")));
                })
            });
            for command in commands.collect::<Vec<_>>() {
                command.await.unwrap();
            }
            let agents = agents();
            assert_eq!(agents.len(), SANDBOXES);
            let largest = agents.iter().map(|pid| kib(*pid, "VmHWM:")).max().unwrap();
            println!(
                "{SOCKETS} sockets cost daemon and clients {} KiB, and {COMMANDS} commands {} KiB more; \
             an agent has had {largest} KiB at most",
                with_sockets - before,
                kib(own, "VmHWM:") - with_sockets,
            );
            // Daemon and client, in a build that is not optimized.
            assert!(kib(own, "VmHWM:") - before < 96 * 1024);
            assert!(largest < 24 * 1024, "{largest} KiB");
            // All are still served.
            for sandbox in &sandboxes {
                let (status, _) = served
                    .call("DELETE", &format!("{sandbox}/processes/job"), &Value::Null)
                    .await;
                assert_eq!(status, 204);
            }
            for mut socket in sockets {
                assert_eq!(
                    socket.next().await.unwrap(),
                    json!({"type": "exit", "exit_code": 137})
                );
            }
        },
    );
}

/// Runs a test in a process of its own, whose memory is its own.
fn alone(test: &str, work: impl AsyncFnOnce()) {
    const ALONE: &str = "STREAMS_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let limit = rustix::process::Rlimit {
            current: limit.maximum,
            ..limit
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(work());
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    let problem = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{problem}");
}
