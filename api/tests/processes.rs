//! Processes in the background and terminals, as a client of the API sees them, with the real agent.

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

use std::path::Path;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use served::{Served, Socket};

/// What the script of [`vmm::install`] starts; does nothing in a run of the tests.
#[test]
fn as_a_vmm() {
    vmm::run();
}

fn sh(script: &str) -> Value {
    json!({"cmd": "/bin/sh", "args": ["-c", script], "background": true})
}

impl Served {
    async fn background(&self, sandbox: &str, body: &Value) -> Value {
        let (status, started) = self.call("POST", &format!("{sandbox}/exec"), body).await;
        assert_eq!(status, 202, "{started}");
        started
    }

    async fn running(&self, sandbox: &str) -> Vec<Value> {
        let (status, list) = self
            .call("GET", &format!("{sandbox}/processes"), &Value::Null)
            .await;
        assert_eq!(status, 200, "{list}");
        list["processes"].as_array().unwrap().clone()
    }

    async fn kill(&self, sandbox: &str, process: &str) -> (u16, Value) {
        let path = format!("{sandbox}/processes/{process}");
        self.call("DELETE", &path, &Value::Null).await
    }

    async fn follow(&self, sandbox: &str, process: &str) -> Socket {
        self.socket(&format!("{sandbox}/processes/{process}/stream"))
            .await
    }
}

/// What the messages of one type have as data, joined.
fn data_of(messages: &[Value], kind: &str) -> String {
    let of_kind = messages.iter().filter(|message| message["type"] == kind);
    of_kind
        .map(|message| message["data"].as_str().unwrap())
        .collect()
}

/// Waits until the process is gone.
async fn gone(pid: u64) {
    while Path::new(&format!("/proc/{pid}")).exists() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_background_command_is_listed_followed_and_ended() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let mut body = sh("echo begun; echo oh >&2; sleep 1000 & wait");
    body["tag"] = json!("dev server");
    let started = served.background(&sandbox, &body).await;
    let pid = started["pid"].as_u64().unwrap();
    let id = sandbox.rsplit('/').next().unwrap();
    assert_eq!(
        started,
        json!({"sandbox_id": id, "cmd": "/bin/sh", "pid": pid, "tag": "dev server"})
    );
    let named = served.background(&sandbox, &sh("sleep 1000")).await;
    assert!(
        named["tag"].as_str().unwrap().starts_with("proc-"),
        "{named}"
    );
    let listed = served.running(&sandbox).await;
    assert_eq!(listed.len(), 2);
    assert_eq!(
        (
            &listed[0]["pid"],
            &listed[0]["tag"],
            &listed[0]["cmd"],
            &listed[0]["args"][0]
        ),
        (
            &json!(pid),
            &json!("dev server"),
            &json!("/bin/sh"),
            &json!("-c")
        )
    );

    // Who follows it and goes away does nothing to it.
    let mut first = served.follow(&sandbox, &pid.to_string()).await;
    assert_eq!(
        first.next().await.unwrap(),
        json!({"type": "start", "pid": pid, "tag": "dev server"})
    );
    drop(first);
    let other = sandbox.replace("sandboxes", "capsules");
    let mut second = served.follow(&other, "dev%20server").await;
    let mut told = Vec::new();
    while data_of(&told, "stdout") != "begun\n" || data_of(&told, "stderr") != "oh\n" {
        told.push(second.next().await.unwrap());
    }
    assert_eq!(served.kill(&sandbox, "dev%20server").await.0, 204);
    assert_eq!(
        second.rest().await,
        [json!({"type": "exit", "exit_code": 137})]
    );
    gone(pid).await;
    assert_eq!(served.running(&sandbox).await.len(), 1);
    // One that has ended is remembered.
    let told = served.follow(&sandbox, &pid.to_string()).await.rest().await;
    assert_eq!(data_of(&told, "stdout"), "begun\n");
    assert_eq!(told.last().unwrap()["exit_code"], 137);

    let tag = named["tag"].as_str().unwrap();
    assert_eq!(
        served.kill(&sandbox, &format!("{tag}?signal=TERM")).await.0,
        204
    );
    let told = served.follow(&sandbox, tag).await.rest().await;
    assert_eq!(told.last().unwrap()["exit_code"], 143);
}

#[tokio::test]
async fn what_cannot_be_done_is_told_with_a_status_and_a_sentence() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let mut job = sh("sleep 1000");
    job["tag"] = json!("job");
    served.background(&sandbox, &job).await;
    let exec = format!("{sandbox}/exec");
    let with = |name: &str, value: Value| {
        let mut body = sh("true");
        body[name] = value;
        body
    };
    for (method, path, body, status, code, sentence) in [
        ("POST", exec.as_str(), job.clone(), 409, "conflict", "tag"),
        (
            "POST",
            &exec,
            with("tag", json!("12")),
            400,
            "invalid_request",
            "tag",
        ),
        (
            "POST",
            &exec,
            with("cwd", json!("x")),
            400,
            "invalid_request",
            "cwd",
        ),
        (
            "POST",
            &exec,
            with("cmd", json!("")),
            400,
            "invalid_request",
            "cmd",
        ),
        (
            "DELETE",
            &format!("{sandbox}/processes/none"),
            Value::Null,
            404,
            "not_found",
            "none",
        ),
        (
            "DELETE",
            &format!("{sandbox}/processes/1"),
            Value::Null,
            404,
            "not_found",
            "1",
        ),
        (
            "DELETE",
            &format!("{sandbox}/processes/job?signal=x"),
            Value::Null,
            400,
            "invalid_request",
            "signal",
        ),
        (
            "GET",
            &format!("{sandbox}/processes/job/stream"),
            Value::Null,
            400,
            "invalid_request",
            "WebSocket",
        ),
        (
            "GET",
            "/v1/sandboxes/sb-00000000/processes",
            Value::Null,
            404,
            "not_found",
            "sandbox",
        ),
    ] {
        let (got, answer) = served.call(method, path, &body).await;
        assert_eq!(
            (got, &answer["error"]["code"]),
            (status, &json!(code)),
            "{path}"
        );
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(sentence), "{path}: {message}");
    }
    let told = served.follow(&sandbox, "none").await.rest().await;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["type"], "error");
    assert!(data_of(&told, "error").contains("none"));
    let missing = json!({"cmd": "no-such-program", "background": true});
    let (status, answer) = served.call("POST", &exec, &missing).await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (400, &json!("invalid_request"))
    );
    // A pause ends who follows, and the process goes with the machine.
    let mut follower = served.follow(&sandbox, "job").await;
    follower.next().await.unwrap();
    let (status, _) = served
        .call("POST", &format!("{sandbox}/pause"), &Value::Null)
        .await;
    assert_eq!(status, 200);
    let told = follower.rest().await;
    assert!(data_of(&told, "error").contains("paused"), "{told:?}");
    let (status, _) = served
        .call("GET", &format!("{sandbox}/processes"), &Value::Null)
        .await;
    assert_eq!(status, 409);
}

impl Socket {
    async fn type_in(&mut self, bytes: &[u8]) {
        self.say(&json!({"type": "input", "data": STANDARD.encode(bytes)}))
            .await;
    }

    /// Reads on until the output holds `text`.
    async fn wait_for(&mut self, text: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        while !out.windows(text.len()).any(|window| window == text) {
            let message = self.past_pings().await;
            assert_eq!(message["type"], "output", "{message}");
            out.extend(STANDARD.decode(message["data"].as_str().unwrap()).unwrap());
        }
        out
    }

    /// The next message that tells more than that the connection is alive.
    async fn past_pings(&mut self) -> Value {
        loop {
            let message = self.next().await.unwrap();
            if message["type"] != "ping" {
                return message;
            }
        }
    }
}

#[tokio::test]
async fn a_terminal_is_opened_left_and_connected_to_again() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    let path = format!("{sandbox}/pty");
    let mut terminal = served.socket(&path).await;
    let start = json!({"type": "start", "cmd": "/bin/sh", "cols": 100, "rows": 30,
                       "envs": {"PS1": "", "WORD": "hello"}, "cwd": "/tmp"});
    terminal.say(&start).await;
    let started = terminal.next().await.unwrap();
    let tag = started["tag"].as_str().unwrap().to_owned();
    assert_eq!(started["type"], "started");
    assert!(
        tag.starts_with("pty-") && started["pid"].as_u64().unwrap() > 1,
        "{started}"
    );
    terminal
        .type_in(b"stty -echo; stty size; pwd; echo $WORD; echo do''ne\n")
        .await;
    let out = terminal.wait_for(b"done\r\n").await;
    let out = String::from_utf8(out).unwrap();
    for expected in ["30 100\r\n", "/tmp\r\n", "hello\r\n"] {
        assert!(out.contains(expected), "{out}");
    }
    terminal
        .say(&json!({"type": "resize", "cols": 81, "rows": 25}))
        .await;
    terminal.type_in(b"stty size\n").await;
    terminal.wait_for(b"25 81\r\n").await;
    // Bytes are as they are, wherever they are cut.
    terminal
        .type_in(b"cat >/dev/null; printf '\\303\\274\\377'; echo\n")
        .await;
    terminal.type_in(b"\xf0\x9f").await;
    terminal.type_in(b"\xa6\x80\n\x04").await;
    terminal.wait_for(b"\xc3\xbc\xff\r\n").await;
    let script =
        b"sh -c 'trap \"exit 5\" INT; echo ready; while :; do sleep 0.01; done'; echo =$?\n";
    terminal.type_in(script).await;
    terminal.wait_for(b"ready\r\n").await;
    terminal.type_in(b"\x03").await;
    terminal.wait_for(b"=5\r\n").await;
    drop(terminal);

    let listed = served.running(&sandbox).await;
    assert_eq!(
        (&listed[0]["tag"], &listed[0]["pty"]),
        (&json!(tag), &json!(true))
    );
    let mut again = served.socket(&path).await;
    again.say(&json!({"type": "connect", "tag": tag})).await;
    assert_eq!(again.next().await.unwrap(), started);
    again.wait_for(b"25 81\r\n").await;
    for (message, problem) in [
        (json!({"type": "input", "data": "%"}), "base64"),
        (json!({"type": "resize", "cols": 0, "rows": 1}), "cols"),
        (json!({"type": "resize", "cols": 1, "rows": 65536}), "rows"),
        (json!({"type": "start"}), "already"),
        (json!({"type": "jump"}), "invalid message"),
    ] {
        again.say(&message).await;
        let mut told = again.past_pings().await;
        while told["type"] == "output" {
            told = again.past_pings().await;
        }
        assert_eq!(
            (&told["type"], &told["fatal"]),
            (&json!("error"), &json!(false))
        );
        assert!(told["data"].as_str().unwrap().contains(problem), "{told}");
    }
    again.say(&json!({"type": "kill"})).await;
    let told = again.rest().await;
    assert_eq!(
        told.last().unwrap(),
        &json!({"type": "exit", "exit_code": 137})
    );
}

#[tokio::test]
async fn what_cannot_be_opened_is_fatal() {
    let served = Served::new().await;
    let sandbox = served.create().await;
    served
        .background(
            &sandbox,
            &json!({"cmd": "sleep", "args": ["1000"], "tag": "job", "background": true}),
        )
        .await;
    for (first, problem) in [
        (
            json!({"type": "start", "cmd": "no-such-program"}),
            "not found",
        ),
        (json!({"type": "start", "cols": 0}), "cols"),
        (
            json!({"type": "start", "user": "nobody-here"}),
            "nobody-here",
        ),
        (json!({"type": "connect"}), "tag"),
        (json!({"type": "connect", "tag": "none"}), "none"),
        (json!({"type": "connect", "tag": "job"}), "no terminal"),
        (json!({"type": "kill"}), "start"),
        (json!([]), "invalid message"),
    ] {
        let mut terminal = served.socket(&format!("{sandbox}/pty")).await;
        terminal.say(&first).await;
        let told = terminal.rest().await;
        assert_eq!(told.len(), 1, "{first}: {told:?}");
        assert_eq!(
            (&told[0]["type"], &told[0]["fatal"]),
            (&json!("error"), &json!(true))
        );
        assert!(
            data_of(&told, "error").contains(problem),
            "{first}: {told:?}"
        );
    }
    let mut terminal = served.socket(&format!("{sandbox}/pty")).await;
    terminal
        .say(&json!({"type": "start", "cmd": "/bin/echo", "args": ["immediate"]}))
        .await;
    let told = terminal.rest().await;
    let kinds: Vec<_> = told
        .iter()
        .map(|message| message["type"].as_str().unwrap())
        .collect();
    assert_eq!((kinds[0], kinds[kinds.len() - 1]), ("started", "exit"));
    assert_eq!(
        STANDARD.decode(data_of(&told, "output")).unwrap(),
        b"immediate\r\n"
    );
}
