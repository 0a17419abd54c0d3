//! `sandboxd template`, as a process, with an API on a host that runs nothing.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::fs;
use std::process::{Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::Api;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;

struct Served {
    api: Api,
    server: String,
}

async fn serve() -> Served {
    let api = Api::new(1 << 20, 1 << 20).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap().to_string();
    let router = api.router.clone();
    tokio::spawn(async move { axum::serve(listener, router).await });
    Served { api, server }
}

fn command(server: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sandboxd"));
    command
        .arg("template")
        .args(arguments)
        .env("MVS_HOST", server)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    command
}

/// What a client has said, but for what it tells of something that takes long, as on a busy machine
/// anything may.
fn but_for_progress(err: &str) -> String {
    let lines = err.split_inclusive('\n');
    lines.filter(|line| !line.contains(" …")).collect()
}

impl Served {
    async fn run(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = command(&self.server, arguments).output().await.unwrap();
        let Output {
            status,
            stdout,
            stderr,
        } = output;
        (
            status.code(),
            String::from_utf8(stdout).unwrap(),
            but_for_progress(&String::from_utf8(stderr).unwrap()),
        )
    }
}

#[tokio::test]
async fn templates_are_built_listed_inspected_and_deleted() {
    let served = serve().await;
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    fs::write(dir.path().join("a"), "content").unwrap();
    let text = "[[files]]\nfrom = 'a'\nto = '/srv/a'\n[[steps]]\nrun = 'one'\n";
    fs::write(&recipe, text).unwrap();
    let recipe = recipe.to_str().unwrap();
    let (status, out, err) = served
        .run(&[
            "build",
            "t",
            "--recipe",
            recipe,
            "--vcpus",
            "2",
            "--env",
            "A=b",
            "--readiness",
            "x",
        ])
        .await;
    assert_eq!(status, Some(0), "{err}");
    assert!(
        err.contains("adding /srv/a\n") && err.contains("\nran one\n"),
        "{err}"
    );
    assert!(
        out.contains("readiness   /bin/sh -c x (within 30 s)\nenv         A=b\n"),
        "{out}"
    );
    assert_eq!(served.api.host.files.lock().unwrap()["/srv/a"], b"content");
    let (status, out, _) = served.run(&["list"]).await;
    assert_eq!(status, Some(0));
    let names: Vec<_> = out
        .lines()
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(names, ["NAME", "broken", "minimal", "t"]);
    let (_, out, _) = served.run(&["inspect", "t", "--json"]).await;
    let template: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(template["vcpus"], 2);
    let (_, out, _) = served.run(&["list", "--json"]).await;
    let list: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(list[2], template);
    assert_eq!(served.run(&["delete", "t"]).await.0, Some(0));
    let (status, out, err) = served.run(&["inspect", "t"]).await;
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert_eq!(err, "sandboxd: template not found\n");
}

#[tokio::test]
async fn what_fails_says_why_and_is_status_1() {
    let served = serve().await;
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    fs::write(&recipe, "[[steps]]\nrun = 'fail'\n").unwrap();
    let recipe = recipe.to_str().unwrap();
    let (status, _, err) = served.run(&["build", "t", "--recipe", recipe]).await;
    assert_eq!(status, Some(1));
    assert!(
        err.ends_with("template t was not built: step 1 ended with status 3\n"),
        "{err}"
    );
    let (status, _, err) = served
        .run(&["build", "t", "--sandbox", "sb-00000000"])
        .await;
    assert_eq!(
        (status, err.as_str()),
        (Some(1), "sandboxd: sandbox not found\n")
    );
    let (status, _, err) = served.run(&["build", "t", "--oci", recipe]).await;
    assert_eq!(status, Some(1));
    assert!(err.contains("damaged, or no tar file"), "{err}");
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let output = command(&address, &["list"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.contains("start one with `sandboxd serve`"), "{err}");
    // From nothing, or from two things.
    assert_eq!(served.run(&["build", "t"]).await.0, Some(2));
    let both = ["build", "t", "--recipe", recipe, "--sandbox", "x"];
    assert_eq!(served.run(&both).await.0, Some(2));
}

#[tokio::test]
async fn ctrl_c_cancels_the_build() {
    let served = serve().await;
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    fs::write(&recipe, "[[steps]]\nrun = 'hang'\n").unwrap();
    let recipe = recipe.to_str().unwrap();
    let mut build = command(&served.server, &["build", "t", "--recipe", recipe])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(build.stderr.take().unwrap()).lines();
    while lines.next_line().await.unwrap().unwrap() != "step 1 of 1: hang" {}
    let pid = Pid::from_raw(build.id().unwrap().cast_signed()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    while lines.next_line().await.unwrap().unwrap() != "cancelling the build of template t" {}
    assert_eq!(build.wait().await.unwrap().code(), Some(130));
    let (_, list) = served.api.call("GET", "/v1/templates", "").await;
    assert_eq!(list.as_array().unwrap().len(), 2, "{list}");
    assert!(served.api.host.sandboxes.lock().unwrap().is_empty());
    assert!(served.api.host.layers.lock().unwrap().is_empty());
}
