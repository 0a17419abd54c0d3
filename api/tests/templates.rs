//! `/v1/templates` on a host that runs nothing: how templates are built and what becomes of them, who
//! holds which layer, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use std::collections::BTreeSet;

use api::domain::{Start, Store};
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{Api, Fault};
use tower::ServiceExt;

async fn api() -> Api {
    Api::new(1 << 20, 1 << 20).await
}

fn path(name: &str) -> String {
    format!("/v1/templates/{name}")
}

/// The lines of a build's progress, and the last one, which is of another kind.
async fn follow(api: &Api, name: &str) -> (Vec<String>, Value) {
    let answer = api
        .send("GET", &format!("{}/progress", path(name)), "")
        .await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(body.to_vec()).unwrap();
    let mut lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let last = lines.pop().unwrap();
    let lines = lines
        .iter()
        .map(|line| line["progress"].as_str().unwrap().to_owned());
    (lines.collect(), last)
}

/// Builds a template to its end; the lines and the template.
async fn build(api: &Api, request: &Value) -> (Vec<String>, Value) {
    let (status, begun) = api
        .call("POST", "/v1/templates", &request.to_string())
        .await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    assert_eq!(begun["status"], "building");
    let (lines, last) = follow(api, request["name"].as_str().unwrap()).await;
    (lines, last["template"].clone())
}

async fn upload(api: &Api, request: &Value, archive: Option<&[u8]>) -> (StatusCode, Value) {
    let text = request.to_string();
    let mut fields = vec![("request", text.as_bytes())];
    fields.extend(archive.map(|archive| ("archive", archive)));
    let request = Request::post("/v1/templates")
        .header("host", "localhost")
        .header("content-type", "multipart/form-data; boundary=X")
        .body(axum::body::Body::from(support::form(&fields)))
        .unwrap();
    let answer = api.router.clone().oneshot(request).await.unwrap();
    let status = answer.status();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&body).unwrap())
}

async fn refused(api: &Api, (method, path, body): (&str, &str, &str), code: (u16, &str)) -> String {
    let (status, answer) = api.call(method, path, body).await;
    let got = (status.as_u16(), answer["error"]["code"].as_str().unwrap());
    assert_eq!(got, code, "{method} {path} {body}: {answer}");
    answer["error"]["message"].as_str().unwrap().to_owned()
}

/// Each layer on the host is held by a record, each that is held is on the host, and nothing runs but
/// what is listed.
async fn assert_settled(api: &Api) {
    let held = api.store.held_layers().await.unwrap();
    let there = api.host.layers.lock().unwrap().clone();
    assert_eq!(there, held);
    let mut named = BTreeSet::new();
    for template in api.store.list_templates().await.unwrap() {
        named.extend(template.layers.all().cloned());
    }
    let mut listed = BTreeSet::new();
    for sandbox in api.store.list_live().await.unwrap() {
        named.extend(sandbox.layers.all().cloned());
        listed.insert(sandbox.id);
    }
    for snapshot in api.store.list_snapshots().await.unwrap() {
        named.extend(snapshot.layers.all().cloned());
    }
    for (warm, _) in api.store.list_warm().await.unwrap() {
        named.extend(warm.layers.all().cloned());
    }
    assert_eq!(held, named);
    let running: BTreeSet<_> = api.host.sandboxes.lock().unwrap().iter().cloned().collect();
    assert!(running.is_subset(&listed), "{running:?} {listed:?}");
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        // Not by the library, which refuses names that strangers' archives may have.
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.set_cksum();
        tar.append(&header, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

#[tokio::test]
async fn images_on_the_host_are_templates() {
    let api = api().await;
    let (_, list) = api.call("GET", "/v1/templates", "").await;
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|template| template["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["broken", "minimal"]);
    let (status, template) = api.call("GET", &path("minimal"), "").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        template,
        json!({"name": "minimal", "status": "ready", "digest": "digest of minimal",
               "source": {"kind": "image"}, "vcpus": 1, "memory_mb": 512, "disk_mb": 2048,
               "size_bytes": 1000, "created_at": "1970-01-01T00:00:05Z"})
    );
    let text = refused(&api, ("DELETE", &path("minimal"), ""), (409, "conflict")).await;
    assert!(text.contains("image on this host"), "{text}");
    for method in ["GET", "DELETE"] {
        refused(&api, (method, &path("none"), ""), (404, "not_found")).await;
    }
    let progress = format!("{}/progress", path("none"));
    refused(&api, ("GET", &progress, ""), (404, "not_found")).await;
    let (lines, last) = follow(&api, "minimal").await;
    assert_eq!(
        (lines.len(), &last["template"]["name"]),
        (0, &json!("minimal"))
    );
}

#[tokio::test]
async fn a_recipe_is_run_in_a_sandbox_of_its_own_whose_disk_is_kept() {
    let api = api().await;
    let request = json!({
        "name": "mine", "vcpus": 2, "memory_mb": 256, "env": {"A": "b"}, "cwd": "/srv",
        "readiness": {"cmd": ["second", "x"], "timeout_sec": 9},
        "recipe": {"steps": [{"run": "one"}, {"run": "two", "timeout_sec": 5}]},
    });
    let tar = tar_of(&[("srv/a", b"file a"), ("/etc/b", b"file b")]);
    let (status, begun) = upload(&api, &request, Some(&tar)).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{begun}");
    let (lines, last) = follow(&api, "mine").await;
    let template = &last["template"];
    assert_eq!(
        lines,
        [
            "booting a sandbox of template minimal",
            "adding /srv/a",
            "adding /etc/b",
            "2 files added",
            "step 1 of 2: one",
            "ran one",
            "step 2 of 2: two",
            "ran two",
            "shutting it down, and keeping its disk",
            "template mine is ready",
        ]
    );
    assert_eq!(template["status"], "ready");
    assert_eq!(
        template["source"],
        json!({"kind": "recipe", "base": "minimal"})
    );
    assert_eq!(template["size_bytes"], 300);
    {
        let files = api.host.files.lock().unwrap();
        assert_eq!(files["/srv/a"], b"file a");
        assert_eq!(files["/etc/b"], b"file b");
        let commands = api.host.commands.lock().unwrap();
        let step = &commands[2].0;
        assert_eq!(step.argv, ["/bin/sh", "-c", "two"]);
        assert_eq!((step.timeout_sec, step.cwd.as_deref()), (5, Some("/srv")));
        assert_eq!(step.env["A"], "b");
    }
    let kept = api.host.kept.lock().unwrap()[0].clone();
    assert_eq!((kept.created.shape.vcpus, kept.scratch), (2, false));
    let expected = format!("digest of minimal\ndigest of {}\n", kept.layer);
    let digest: String = Sha256::digest(expected)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert_eq!(template["digest"], digest);
    assert_settled(&api).await;

    // Its sandboxes start from its disk, with what it says, and are usable when it says so.
    api.host.commands.lock().unwrap().clear();
    let (status, sandbox) = api
        .call("POST", "/v1/sandboxes", r#"{"template": "mine"}"#)
        .await;
    assert_eq!(status, StatusCode::CREATED, "{sandbox}");
    assert_eq!(
        (&sandbox["vcpus"], &sandbox["memory_mb"]),
        (&json!(2), &json!(256))
    );
    assert!(
        sandbox["timings_ms"]["readiness"].as_f64().unwrap() > 0.0,
        "{sandbox}"
    );
    let started = api.host.starts.lock().unwrap().last().unwrap().clone();
    assert_eq!(started.layers.disk, [kept.layer]);
    assert_eq!(
        (started.layers.memory.len(), started.start),
        (0, Start::Cold)
    );
    let exec = format!("/v1/sandboxes/{}/exec", sandbox["id"].as_str().unwrap());
    let (status, _) = api.call("POST", &exec, r#"{"cmd": "false"}"#).await;
    assert_eq!(status, StatusCode::OK);
    let commands = api.host.commands.lock().unwrap().clone();
    let argvs: Vec<_> = commands
        .iter()
        .map(|(command, _)| command.argv[0].as_str())
        .collect();
    assert_eq!(argvs, ["second", "second", "false"]);
    assert_eq!(commands[2].0.env["A"], "b");
    assert_eq!(commands[2].0.cwd.as_deref(), Some("/srv"));
}

#[tokio::test]
async fn a_template_of_a_sandbox_is_of_what_it_is_at_the_time() {
    let api = api().await;
    for is_paused in [false, true] {
        let id = api.create().await;
        if is_paused {
            let pause = format!("/v1/sandboxes/{id}/pause");
            assert_eq!(api.call("POST", &pause, "").await.0, StatusCode::OK);
        }
        let name = format!("paused-{is_paused}");
        let request = json!({"name": name, "sandbox_id": id, "memory_mb": 1024});
        let (lines, template) = build(&api, &request).await;
        assert_eq!(template["status"], "ready", "{lines:?}");
        let source = json!({"kind": "sandbox", "sandbox_id": id, "base": "minimal"});
        assert_eq!(template["source"], source);
        assert_eq!(
            (&template["vcpus"], &template["memory_mb"]),
            (&json!(1), &json!(1024))
        );
        let kept = api.host.kept.lock().unwrap().last().unwrap().clone();
        assert_eq!(kept.created.start, Start::Fork);
        assert_eq!(kept.created.layers.memory.len(), 1);
        assert_eq!(kept.others, kept.created.layers.disk);
        let record = api.store.find_template(&name).await.unwrap().unwrap();
        assert_eq!(record.layers.disk.len(), 2);
        assert!(record.layers.memory.is_empty(), "its memory is not needed");
        assert!(api.store.list_snapshots().await.unwrap().is_empty());
        assert_settled(&api).await;
        // A sandbox of it, and a template of that.
        let body = json!({"template": name}).to_string();
        let (status, sandbox) = api.call("POST", "/v1/sandboxes", &body).await;
        assert_eq!(status, StatusCode::CREATED, "{sandbox}");
        let name = format!("{name}-again");
        let request = json!({"name": name, "sandbox_id": sandbox["id"]});
        let (_, template) = build(&api, &request).await;
        assert_eq!(template["memory_mb"], 1024);
        let kept = api.host.kept.lock().unwrap().last().unwrap().clone();
        assert_eq!((kept.others.len(), kept.created.layers.disk.len()), (1, 3));
        assert_settled(&api).await;
    }
}

#[tokio::test]
async fn a_template_in_use_is_not_deleted_and_its_layers_live_as_long_as_needed() {
    let api = Api::warm(1 << 30).await;
    let recipe = json!({"name": "base", "recipe": {}});
    build(&api, &recipe).await;
    let derived = json!({"name": "derived", "recipe": {"base": "base"}});
    let (_, derived) = build(&api, &derived).await;
    let (_, sandbox) = api
        .call("POST", "/v1/sandboxes", r#"{"template": "derived"}"#)
        .await;
    let id = sandbox["id"].as_str().unwrap();
    let delete = ("DELETE", &*path("derived"), "");
    let text = refused(&api, delete, (409, "conflict")).await;
    assert!(text.contains(&format!("in use by sandbox {id}")), "{text}");
    let pause = format!("/v1/sandboxes/{id}/pause");
    assert_eq!(api.call("POST", &pause, "").await.0, StatusCode::OK);
    refused(&api, delete, (409, "conflict")).await;
    let body = json!({"sandbox_id": id, "name": "held"}).to_string();
    assert_eq!(
        api.call("POST", "/v1/snapshots", &body).await.0,
        StatusCode::CREATED
    );
    let sandbox = format!("/v1/sandboxes/{id}");
    assert_eq!(
        api.call("DELETE", &sandbox, "").await.0,
        StatusCode::NO_CONTENT
    );
    let text = refused(&api, delete, (409, "conflict")).await;
    assert!(text.contains("in use by snapshot sn-"), "{text}");
    // The base of another template is needed by that alone, which holds what it needs.
    assert_eq!(
        api.call("DELETE", &path("base"), "").await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        api.call("DELETE", "/v1/snapshots/held", "").await.0,
        StatusCode::NO_CONTENT
    );
    let warm = async || api.store.list_warm().await.unwrap();
    // It is made in the background.
    while warm().await.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_settled(&api).await;
    let first_key = warm().await[0].0.key.clone();
    assert_eq!(warm().await[0].0.size_bytes, 100, "its own two layers");
    assert!(!warm().await[0].1, "no sandbox needs it");
    let (_, second) = api
        .call("POST", "/v1/sandboxes", r#"{"template": "derived"}"#)
        .await;
    assert_eq!(second["timings_ms"]["start"], "warm");
    assert!(warm().await[0].1, "one does");
    let second = format!("/v1/sandboxes/{}", second["id"].as_str().unwrap());
    assert_eq!(
        api.call("DELETE", &second, "").await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        api.call("DELETE", &path("derived"), "").await.0,
        StatusCode::NO_CONTENT
    );
    assert!(warm().await.is_empty(), "its warm snapshot goes with it");
    assert!(api.host.layers.lock().unwrap().is_empty());
    let create = ("POST", "/v1/sandboxes", r#"{"template": "derived"}"#);
    let text = refused(&api, create, (400, "invalid_request")).await;
    assert!(text.contains("known are: broken, minimal"), "{text}");

    // Another content under the same name is another template.
    let again = json!({"name": "derived", "recipe": {}});
    let (_, again) = build(&api, &again).await;
    assert_ne!(again["digest"], derived["digest"]);
    let (_, third) = api
        .call("POST", "/v1/sandboxes", r#"{"template": "derived"}"#)
        .await;
    assert_eq!(third["timings_ms"]["start"], "cold");
    while warm().await.is_empty() {
        tokio::task::yield_now().await;
    }
    assert_ne!(warm().await[0].0.key, first_key);
    assert_settled(&api).await;
}

#[tokio::test]
async fn a_build_that_fails_leaves_its_reason_and_nothing_else() {
    let api = api().await;
    let fails = json!({"name": "t", "recipe": {"steps": [{"run": "one"}, {"run": "fail"}]}});
    let (lines, template) = build(&api, &fails).await;
    assert_eq!(template["status"], "failed");
    assert_eq!(template["status_reason"], "step 2 ended with status 3");
    assert_eq!(
        lines[4..],
        [
            "it fails",
            "template t was not built: step 2 ended with status 3"
        ]
    );
    assert_settled(&api).await;
    assert!(api.host.layers.lock().unwrap().is_empty());
    let create = ("POST", "/v1/sandboxes", r#"{"template": "t"}"#);
    let text = refused(&api, create, (409, "invalid_state")).await;
    assert_eq!(
        text,
        "template \"t\" is failed, and not ready; build it again"
    );

    // A full disk, at the end; the next build takes its place.
    *api.host.fault.lock().unwrap() = Some(Fault::NotSaved);
    let (_, template) = build(&api, &json!({"name": "t", "recipe": {}})).await;
    let reason = template["status_reason"].as_str().unwrap();
    assert!(reason.contains("no space left"), "{reason}");
    assert_settled(&api).await;
    // A base that does not start.
    let broken = json!({"name": "t", "recipe": {"base": "broken"}});
    let (_, template) = build(&api, &broken).await;
    let reason = template["status_reason"].as_str().unwrap();
    assert!(reason.contains("it is broken"), "{reason}");
    // A sandbox that is not saved, and a copy that does not start.
    let id = api.create().await;
    for fault in [Fault::NotSaved, Fault::NotRestored] {
        *api.host.fault.lock().unwrap() = Some(fault);
        let (_, template) = build(&api, &json!({"name": "t", "sandbox_id": id})).await;
        assert_eq!(template["status"], "failed", "{fault:?}");
        assert_settled(&api).await;
        assert!(api.store.list_snapshots().await.unwrap().is_empty());
    }
    // Files that make no sense.
    let request = json!({"name": "t", "recipe": {}});
    let (status, _) = upload(&api, &request, Some(&tar_of(&[("../x", b"")]))).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let (_, last) = follow(&api, "t").await;
    let reason = last["template"]["status_reason"].as_str().unwrap();
    assert!(reason.contains("has a part `..`"), "{reason}");
    let (_, template) = build(&api, &request).await;
    assert_eq!(template["status"], "ready");
    assert_settled(&api).await;
}

#[tokio::test]
async fn a_build_is_cancelled_by_deleting_its_template() {
    let api = api().await;
    let hangs = json!({"name": "t", "recipe": {"steps": [{"run": "hang"}]}}).to_string();
    let (status, _) = api.call("POST", "/v1/templates", &hangs).await;
    assert_eq!(status, StatusCode::ACCEPTED);
    let text = refused(&api, ("POST", "/v1/templates", &hangs), (409, "conflict")).await;
    assert!(text.contains("exists already"), "{text}");
    let create = ("POST", "/v1/sandboxes", r#"{"template": "t"}"#);
    let text = refused(&api, create, (409, "invalid_state")).await;
    assert!(text.contains("is building"), "{text}");
    let is_at_it = || {
        let commands = api.host.commands.lock().unwrap();
        commands
            .iter()
            .any(|(command, _)| command.argv[2] == "hang")
    };
    while !is_at_it() {
        tokio::task::yield_now().await;
    }
    let follower = api.router.clone();
    let follower = tokio::spawn(async move {
        let request = Request::get(format!("{}/progress", path("t")))
            .header("host", "localhost")
            .body(axum::body::Body::empty())
            .unwrap();
        let answer = follower.oneshot(request).await.unwrap();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    });
    tokio::task::yield_now().await;
    let (status, _) = api.call("DELETE", &path("t"), "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
    assert_settled(&api).await;
    refused(&api, ("GET", &path("t"), ""), (404, "not_found")).await;
    let lines = follower.await.unwrap();
    assert!(
        lines.contains("template t was not built: it was cancelled"),
        "{lines}"
    );
    assert_eq!(
        build(&api, &json!({"name": "t", "recipe": {}})).await.1["status"],
        "ready"
    );
}

#[tokio::test]
async fn a_daemon_that_ends_in_a_build_leaves_nothing_half() {
    for fault in [
        Fault::CrashBeforeStart,
        Fault::CrashAfterStart,
        Fault::CrashBeforeSave,
        Fault::CrashAfterSave,
    ] {
        for of_sandbox in [false, true] {
            let api = api().await;
            let ready = build(&api, &json!({"name": "ready", "recipe": {}})).await.1;
            let request = if of_sandbox {
                json!({"name": "t", "sandbox_id": api.create().await})
            } else {
                json!({"name": "t", "recipe": {"base": "ready"}})
            };
            *api.host.fault.lock().unwrap() = Some(fault);
            let (status, _) = api
                .call("POST", "/v1/templates", &request.to_string())
                .await;
            assert_eq!(status, StatusCode::ACCEPTED);
            while api.host.fault.lock().unwrap().is_some() {
                tokio::task::yield_now().await;
            }
            let api = api.restart().await;
            let (_, template) = api.call("GET", &path("t"), "").await;
            assert_eq!(template["status"], "failed", "{fault:?}");
            let reason = template["status_reason"].as_str().unwrap();
            assert!(reason.contains("daemon ended"), "{reason}");
            assert_eq!(api.call("GET", &path("ready"), "").await.1, ready);
            let held = api.store.held_layers().await.unwrap();
            let there = api.host.layers.lock().unwrap().clone();
            // A snapshot that was taken for the build may be left, as after a fork.
            assert_eq!(there, held);
            let template = json!({"name": "t", "recipe": {"base": "ready"}});
            assert_eq!(build(&api, &template).await.1["status"], "ready");
            let body = r#"{"template": "t"}"#;
            let (status, _) = api.call("POST", "/v1/sandboxes", body).await;
            assert_eq!(status, StatusCode::CREATED);
        }
    }
}

#[tokio::test]
async fn a_sandbox_that_does_not_become_ready_is_not_left() {
    let api = api().await;
    let request = json!({"name": "t", "recipe": {},
                         "readiness": {"cmd": ["false"], "timeout_sec": 1}});
    build(&api, &request).await;
    let create = ("POST", "/v1/sandboxes", r#"{"template": "t"}"#);
    let text = refused(&api, create, (502, "agent_error")).await;
    assert!(
        text.contains("did not succeed within 1 s; it last ended with status 1"),
        "{text}"
    );
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
    let (_, list) = api.call("GET", "/v1/sandboxes", "").await;
    assert_eq!(list, json!([]));
    assert_settled(&api).await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let api = api().await;
    let steps = |step: Value| json!({"name": "t", "recipe": {"steps": [step]}}).to_string();
    for (body, words) in [
        (
            "{}".to_owned(),
            "expected one of recipe, oci and sandbox_id",
        ),
        (r#"{"name": "t"}"#.to_owned(), "expected one of"),
        (
            r#"{"name": "", "recipe": {}}"#.to_owned(),
            "name must be 1 to 64",
        ),
        (
            r#"{"name": "../t", "recipe": {}}"#.to_owned(),
            "name must be",
        ),
        (
            r#"{"name": "t", "recipe": {}, "oci": {}}"#.to_owned(),
            "expected one of",
        ),
        (r#"{"name": "t", "oci": {}}"#.to_owned(), "field `archive`"),
        (
            r#"{"name": "t", "recipe": {"base": "none"}}"#.to_owned(),
            "unknown template",
        ),
        (
            r#"{"name": "t", "recipe": {"base": ".."}}"#.to_owned(),
            "recipe.base must be",
        ),
        (
            r#"{"name": "t", "recipe": {"bse": "x"}}"#.to_owned(),
            "unknown field",
        ),
        (
            r#"{"name": "t", "recipe": {}, "vcpus": 33}"#.to_owned(),
            "vcpus must be 1 to 32",
        ),
        (
            r#"{"name": "t", "recipe": {}, "memory_mb": 1}"#.to_owned(),
            "memory_mb must be",
        ),
        (
            r#"{"name": "t", "recipe": {}, "cwd": "x"}"#.to_owned(),
            "cwd: path must be absolute",
        ),
        (
            r#"{"name": "t", "recipe": {}, "env": {"A=": "x"}}"#.to_owned(),
            "without `=`",
        ),
        (
            r#"{"name": "t", "recipe": {}, "readiness": {"cmd": []}}"#.to_owned(),
            "readiness: cmd is required",
        ),
        (
            r#"{"name": "t", "recipe": {}, "readiness": {"cmd": ["x"], "timeout_sec": 0}}"#
                .to_owned(),
            "readiness.timeout_sec must be",
        ),
        (steps(json!({"run": " "})), "step 1 must be a command"),
        (
            steps(json!({"run": "x", "timeout_sec": 0})),
            "step 1: timeout_sec must be",
        ),
        (steps(json!({})), "missing field `run`"),
    ] {
        let request = ("POST", "/v1/templates", body.as_str());
        let text = refused(&api, request, (400, "invalid_request")).await;
        assert!(text.contains(words), "{body}: {text}");
    }
    let many = vec![json!({"run": "x"}); 1001];
    let many = json!({"name": "t", "recipe": {"steps": many}}).to_string();
    refused(
        &api,
        ("POST", "/v1/templates", &many),
        (400, "invalid_request"),
    )
    .await;
    let taken = (
        "POST",
        "/v1/templates",
        r#"{"name": "minimal", "recipe": {}}"#,
    );
    refused(&api, taken, (409, "conflict")).await;
    let unknown = r#"{"name": "t", "sandbox_id": "sb-00000000"}"#;
    refused(&api, ("POST", "/v1/templates", unknown), (404, "not_found")).await;
    let id = api.create().await;
    api.call("DELETE", &format!("/v1/sandboxes/{id}"), "").await;
    let gone = json!({"name": "t", "sandbox_id": id}).to_string();
    refused(
        &api,
        ("POST", "/v1/templates", &gone),
        (409, "invalid_state"),
    )
    .await;
    let big = format!(r#"{{"name": "t", "x": "{}"}}"#, "x".repeat(1 << 20));
    refused(&api, ("POST", "/v1/templates", &big), (413, "too_large")).await;

    let oci = json!({"name": "t", "oci": {}});
    for (archive, status, words) in [
        (vec![0; (1 << 20) + 1], 413, "exceeds the limit"),
        (b"nonsense".repeat(100), 400, "damaged, or no tar file"),
        (vec![0x1f, 0x8b, 8, 0, 0], 400, "gunzip"),
        (tar_of(&[("x", b"")]), 400, "holds no image"),
        (
            tar_of(&[("index.json", b"{")]),
            400,
            "index.json of the image makes no sense",
        ),
        (tar_of(&[("manifest.json", b"[]")]), 400, "holds no image"),
    ] {
        let (got, answer) = upload(&api, &oci, Some(&archive)).await;
        let text = answer["error"]["message"].as_str().unwrap();
        assert!(
            got.as_u16() == status && text.contains(words),
            "{got}: {text}"
        );
    }
    let (status, _) = upload(
        &api,
        &json!({"name": "t", "oci": {"disk_mb": 1}}),
        Some(b""),
    )
    .await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let of_sandbox = json!({"name": "t", "sandbox_id": api.create().await});
    let (status, _) = upload(&api, &of_sandbox, Some(b"")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(api.store.list_templates().await.unwrap().is_empty());
    assert_settled(&api).await;
}
