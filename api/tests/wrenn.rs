//! `/v1/sandboxes` on a host that runs nothing: statuses, shapes, order of checks.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use api::domain::End;
use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use futures_util::stream;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use support::{Api, form};
use tower::ServiceExt;

const MIB: u64 = 1 << 20;

async fn api() -> Api {
    Api::new(MIB, MIB).await
}

fn error(code: &str, message: &str) -> Value {
    json!({"error": {"code": code, "message": message}})
}

fn message(body: &Value) -> &str {
    body["error"]["message"].as_str().unwrap_or("")
}

#[tokio::test]
async fn a_sandbox_from_create_to_delete() {
    let api = api().await;
    let (status, sandbox) = api.call("POST", "/v1/sandboxes", "{}").await;
    assert_eq!(status, StatusCode::CREATED);
    let id = sandbox["id"].as_str().unwrap();
    assert_eq!(sandbox["status"], "running");
    assert_eq!(sandbox["template"], "minimal");
    assert_eq!(sandbox["vcpus"], 1);
    assert_eq!(sandbox["memory_mb"], 512);
    assert_eq!(sandbox["timeout_sec"], 300);
    assert_eq!(
        sandbox["timings_ms"],
        json!({"start": "cold", "prepare": 0.001, "vmm": 0.02, "boot": 3.0, "identity": 0.4,
               "total": 3.421})
    );
    for field in ["created_at", "started_at", "last_active_at", "last_updated"] {
        let time = sandbox[field].as_str().unwrap();
        assert!(
            time.parse::<jiff::Timestamp>().is_ok() && time.len() == 20,
            "{field} {time}"
        );
    }

    let path = format!("/v1/sandboxes/{id}");
    assert_eq!(
        api.call("GET", &path, "").await,
        (StatusCode::OK, sandbox.clone())
    );
    assert_eq!(
        api.call("GET", "/v1/sandboxes", "").await.1,
        json!([sandbox])
    );
    for _ in 0..2 {
        assert_eq!(
            api.call("DELETE", &path, "").await,
            (StatusCode::NO_CONTENT, Value::Null)
        );
    }
    assert!(api.host.sandboxes.lock().unwrap().is_empty());
    assert_eq!(api.call("GET", "/v1/sandboxes", "").await.1, json!([]));
    let (status, gone) = api.call("GET", &path, "").await;
    assert_eq!(
        (status, &gone["status"]),
        (StatusCode::OK, &json!("stopped"))
    );
}

#[tokio::test]
async fn sandboxes_have_two_names() {
    let api = api().await;
    let (status, capsule) = api.call("POST", "/v1/capsules", "{}").await;
    assert_eq!(status, StatusCode::CREATED);
    let id = capsule["id"].as_str().unwrap();
    for name in ["sandboxes", "capsules"] {
        let path = format!("/v1/{name}/{id}");
        let (status, found) = api.call("GET", &path, "").await;
        // What was done by its other name is use of it.
        let without_use = |sandbox: &Value| {
            let mut fields = sandbox.as_object().unwrap().clone();
            fields.retain(|name, _| !["last_active_at", "last_updated"].contains(&name.as_str()));
            fields
        };
        assert_eq!(status, StatusCode::OK);
        assert_eq!(without_use(&found), without_use(&capsule));
        let exec = format!("{path}/exec");
        let (status, said) = api.call("POST", &exec, r#"{"cmd": "false"}"#).await;
        assert_eq!((status, &said["exit_code"]), (StatusCode::OK, &json!(1)));
        let (status, _) = api.call("POST", &format!("{path}/ping"), "").await;
        assert_eq!(status, StatusCode::NO_CONTENT);
    }
    let path = format!("/v1/capsules/{id}");
    let (status, _) = api.call("DELETE", &path, "").await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    let (status, _) = api.call("POST", &format!("{path}/ping"), "").await;
    assert_eq!(status, StatusCode::CONFLICT);
    let (_, document) = api.call("GET", "/openapi.json", "").await;
    let mut ids = std::collections::BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for operation in item.as_object().unwrap().values() {
            let id = operation["operationId"].as_str().unwrap_or(path);
            assert!(ids.insert(id.to_owned()), "{id} is there twice");
        }
        if let Some(rest) = path.strip_prefix("/v1/sandboxes") {
            let alias = &document["paths"][format!("/v1/capsules{rest}")];
            assert!(alias.is_object(), "{path}");
        }
    }
}

#[tokio::test]
async fn directories_are_listed_to_a_depth_and_files_removed() {
    let api = api().await;
    let path = format!("/v1/capsules/{}/files", api.create().await);
    for file in ["/d/a", "/d/e/b", "/d/e/f/c"] {
        let mut files = api.host.files.lock().unwrap();
        files.insert(file.to_owned(), Vec::new());
    }
    let list = async |body: Value| {
        api.call("POST", &format!("{path}/list"), &body.to_string())
            .await
    };
    let (status, listed) = list(json!({"path": "/d"})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(
        listed["entries"][1],
        json!({"name": "e", "path": "/d/e", "type": "directory", "size": 5, "mode": 0o750,
               "permissions": "drwxr-x---", "owner": "0", "group": "7", "modified_at": 2})
    );
    for (depth, expected) in [
        (0, &["/d/a", "/d/e"][..]),
        (1, &["/d/a", "/d/e"]),
        (2, &["/d/a", "/d/e", "/d/e/b", "/d/e/f"]),
        (64, &["/d/a", "/d/e", "/d/e/b", "/d/e/f", "/d/e/f/c"]),
    ] {
        let (_, listed) = list(json!({"path": "/d", "depth": depth})).await;
        let entries = listed["entries"].as_array().unwrap();
        let paths: Vec<_> = entries
            .iter()
            .map(|entry| entry["path"].as_str().unwrap())
            .collect();
        assert_eq!(paths, expected, "{depth}");
    }
    let call = async |operation: &str, body: &str| {
        let path = format!("{path}/{operation}");
        let (status, answer) = api.call("POST", &path, body).await;
        (status.as_u16(), answer)
    };
    let (status, made) = call("mkdir", r#"{"path": "/new/dir/"}"#).await;
    assert_eq!((status, &made["entry"]["name"]), (200, &json!("dir")));
    assert_eq!(call("remove", r#"{"path": "/d/a"}"#).await.0, 204);
    assert_eq!(call("remove", r#"{"path": "/d/a"}"#).await.0, 404);
    assert_eq!(call("list", r#"{"path": "/none"}"#).await.0, 404);
    for (operation, body, expected) in [
        ("list", r#"{"path": "d"}"#, "path must be absolute"),
        ("list", "{}", "path is required"),
        (
            "list",
            r#"{"path": "/", "depth": 65}"#,
            "depth must be 1 to 64, not 65",
        ),
        ("list", r#"{"path": "/", "depth": -1}"#, "invalid JSON body"),
        ("mkdir", r#"{"path": ""}"#, "path is required"),
        (
            "remove",
            r#"{"path": "//"}"#,
            "the root directory cannot be removed",
        ),
    ] {
        let (status, answer) = call(operation, body).await;
        assert_eq!(status, 400, "{operation} {body}");
        assert!(
            message(&answer).starts_with(expected),
            "{operation} {body}: {answer}"
        );
    }
}

#[tokio::test]
async fn a_command_has_the_variables_and_the_directory_that_it_is_given() {
    let api = api().await;
    let path = format!("/v1/sandboxes/{}/exec", api.create().await);
    let body = r#"{"cmd": "env", "envs": {"A": "1", "B": ""}, "cwd": "/srv"}"#;
    let (status, said) = api.call("POST", &path, body).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(said["stdout"], r#"{"A": "1", "B": ""} Some("/srv")"#);
    for (fields, expected) in [
        (r#""envs": {"": "x"}"#, "the name of a variable"),
        (r#""envs": {"A=B": "x"}"#, "the name of a variable"),
        (r#""envs": {"A": "\u0000"}"#, "the variable A must not"),
        (r#""envs": ["A"]"#, "invalid JSON body"),
        (r#""cwd": "srv""#, "cwd must be absolute"),
        (r#""cwd": """#, "cwd is required"),
    ] {
        let body = format!(r#"{{"cmd": "env", {fields}}}"#);
        let (status, answer) = api.call("POST", &path, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert!(message(&answer).starts_with(expected), "{body}: {answer}");
    }
}

#[tokio::test]
async fn the_newest_sandbox_is_listed_first() {
    let api = api().await;
    let (first, second) = (api.create().await, api.create().await);
    let (_, list) = api.call("GET", "/v1/sandboxes", "").await;
    assert_eq!(list[0]["id"], second);
    assert_eq!(list[1]["id"], first);
}

#[tokio::test]
async fn unknown_ids_are_404_everywhere() {
    let api = api().await;
    for id in ["sb-00000000", "nonsense", "%2e%2e", "sb-0000000%00"] {
        for (method, operation) in [
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/exec"),
            ("POST", "/pause"),
            ("POST", "/resume"),
            ("POST", "/files/read"),
            ("POST", "/files/write"),
        ] {
            let path = format!("/v1/sandboxes/{id}{operation}");
            let expected = (
                StatusCode::NOT_FOUND,
                error("not_found", "sandbox not found"),
            );
            assert_eq!(
                api.call(method, &path, "not JSON").await,
                expected,
                "{method} {path}"
            );
        }
    }
}

#[tokio::test]
async fn bad_creates_are_refused_with_a_sentence_and_leave_nothing() {
    let api = api().await;
    for (body, expected) in [
        ("", "invalid JSON body"),
        ("{", "invalid JSON body"),
        ("[]x", "invalid JSON body"),
        ("[]", "invalid JSON body: expected an object"),
        (
            r#" ["minimal", 2]"#,
            "invalid JSON body: expected an object",
        ),
        ("null", "invalid JSON body"),
        (r#"{"vcpus": "1"}"#, "invalid JSON body"),
        (r#"{"vcpus": 1.5}"#, "invalid JSON body"),
        (r#"{"vcpus": 0}"#, "vcpus must be 1 to 32, not 0"),
        (r#"{"vcpus": 33}"#, "vcpus must be 1 to 32, not 33"),
        (
            r#"{"vcpus": -9223372036854775808}"#,
            "vcpus must be 1 to 32",
        ),
        (
            r#"{"memory_mb": 1}"#,
            "memory_mb must be 128 to 4096 (MiB), not 1",
        ),
        (r#"{"memory_mb": 4097}"#, "memory_mb must be 128 to 4096"),
        (r#"{"timeout_sec": -1}"#, "timeout_sec must be 0 to 2592000"),
        (
            r#"{"template": "nope"}"#,
            "unknown template \"nope\"; known are: broken, minimal",
        ),
        (
            r#"{"template": "../etc"}"#,
            "template must be 1 to 64 letters",
        ),
        (r#"{"template": ""}"#, "template must be 1 to 64 letters"),
    ] {
        let (status, answer) = api.call("POST", "/v1/sandboxes", body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer["error"]["code"], "invalid_request", "{body}");
        assert!(message(&answer).starts_with(expected), "{body}: {answer}");
    }
    assert_eq!(api.call("GET", "/v1/sandboxes", "").await.1, json!([]));
}

#[tokio::test]
async fn fields_that_are_null_or_unknown_do_not_matter() {
    let api = api().await;
    let body = r#"{"template": null, "vcpus": null, "surprise": [1]}"#;
    let (status, sandbox) = api.call("POST", "/v1/sandboxes", body).await;
    assert_eq!(
        (status, &sandbox["vcpus"]),
        (StatusCode::CREATED, &json!(1))
    );
}

#[tokio::test]
async fn a_failed_start_is_told_and_recorded() {
    let api = api().await;
    let (status, answer) = api
        .call("POST", "/v1/sandboxes", r#"{"template": "broken"}"#)
        .await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer["error"]["code"], "agent_error");
    let text = message(&answer);
    assert!(
        text.ends_with("was not created: the sandbox did not start: it is broken"),
        "{text}"
    );
    let id = text.split(' ').nth(1).unwrap();
    let (_, row) = api.call("GET", &format!("/v1/sandboxes/{id}"), "").await;
    assert_eq!(
        (&row["status"], &row["status_reason"]),
        (&json!("error"), &json!("it is broken"))
    );
    assert_eq!(api.call("GET", "/v1/sandboxes", "").await.1, json!([]));
}

#[tokio::test]
async fn a_sandbox_that_ends_by_itself_says_why() {
    let api = api().await;
    let ends = [
        (
            End::Failed {
                reason: "killed".into(),
            },
            "error",
            "killed",
        ),
        (
            End::Orderly {
                reason: "powered off".into(),
            },
            "stopped",
            "powered off",
        ),
    ];
    for (end, status, reason) in ends {
        let id = api.create().await;
        api.host.end(&id, end);
        // The event is recorded by another task, which has its turn before this returns.
        let row = loop {
            let (_, row) = api.call("GET", &format!("/v1/sandboxes/{id}"), "").await;
            if row["status"] != "running" {
                break row;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(
            (&row["status"], &row["status_reason"]),
            (&json!(status), &json!(reason))
        );
        let (code, answer) = api
            .call("POST", &format!("/v1/sandboxes/{id}/exec"), "not JSON")
            .await;
        let text = format!("sandbox is not running (status: {status})");
        assert_eq!(
            (code, answer),
            (StatusCode::CONFLICT, error("invalid_state", &text))
        );
    }
}

#[tokio::test]
async fn commands_and_their_results() {
    let api = api().await;
    let id = api.create().await;
    let path = format!("/v1/sandboxes/{id}/exec");
    let (status, mut answer) = api
        .call(
            "POST",
            &path,
            r#"{"cmd": "echo", "args": ["a \"b\"", "\u0001ü"]}"#,
        )
        .await;
    assert_eq!(status, StatusCode::OK);
    assert!(answer["duration_ms"].take().is_u64());
    assert_eq!(
        answer,
        json!({
            "sandbox_id": id, "cmd": "echo", "stdout": "a \"b\" \u{1}ü", "stderr": "warning\n",
            "exit_code": 0, "duration_ms": null, "encoding": "utf-8",
        })
    );
    let (status, answer) = api.call("POST", &path, r#"{"cmd": "false"}"#).await;
    assert_eq!((status, &answer["exit_code"]), (StatusCode::OK, &json!(1)));
    let (_, answer) = api.call("POST", &path, r#"{"cmd": "binary"}"#).await;
    assert_eq!(answer["encoding"], "base64");
    assert_eq!(
        (&answer["stdout"], &answer["stderr"]),
        (&json!("//4="), &json!("dGV4dA=="))
    );
}

#[tokio::test]
async fn commands_that_do_not_end_well_are_told_with_their_output() {
    let api = api().await;
    let id = api.create().await;
    let path = format!("/v1/sandboxes/{id}/exec");
    let (status, answer) = api
        .call("POST", &path, r#"{"cmd": "sleep", "timeout_sec": 2}"#)
        .await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert_eq!(answer["error"]["code"], "agent_error");
    assert!(message(&answer).contains("did not end within 2 s"));
    assert_eq!(
        (&answer["stdout"], &answer["exit_code"]),
        (&json!("so far"), &json!(137))
    );

    let (status, answer) = api
        .call("POST", &path, r#"{"cmd": "flood", "args": ["4194304"]}"#)
        .await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    assert!(
        message(&answer).contains("wrote more than 1048576 bytes"),
        "{}",
        message(&answer)
    );
    assert!(answer["stdout"].as_str().unwrap().len() as u64 > MIB);

    for cmd in ["lost", "unknown"] {
        let (status, answer) = api
            .call("POST", &path, &format!(r#"{{"cmd": "{cmd}"}}"#))
            .await;
        assert_eq!(status, StatusCode::BAD_GATEWAY);
        assert_eq!(answer["error"]["code"], "agent_error");
    }
}

#[tokio::test]
async fn bad_commands_are_refused() {
    let api = api().await;
    let id = api.create().await;
    let path = format!("/v1/sandboxes/{id}/exec");
    for (body, expected) in [
        ("{", "invalid JSON body"),
        ("{}", "cmd is required"),
        (r#"{"cmd": ""}"#, "cmd is required"),
        (
            r#"{"cmd": "a\u0000"}"#,
            "cmd and args must not contain a zero byte",
        ),
        (r#"{"cmd": "a", "args": "b"}"#, "invalid JSON body"),
        (
            r#"{"cmd": "a", "timeout_sec": 0}"#,
            "timeout_sec must be 1 to 86400 (seconds), not 0",
        ),
    ] {
        let (status, answer) = api.call("POST", &path, body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert!(message(&answer).starts_with(expected), "{body}: {answer}");
    }
    let large = format!(r#"{{"cmd": "{}"}}"#, "x".repeat(2 << 20));
    let (status, _) = api.call("POST", &path, &large).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
}

#[tokio::test]
async fn files_come_out_as_they_went_in() {
    let api = api().await;
    let id = api.create().await;
    let content: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let forms: [&[(&str, &[u8])]; 3] = [
        &[("path", b"/a"), ("file", &content)],
        &[("file", &content), ("path", b"/a")],
        &[
            ("other", b"x"),
            ("path", b"/a"),
            ("other", b"y"),
            ("file", &content),
        ],
    ];
    for fields in forms {
        api.host.files.lock().unwrap().clear();
        assert_eq!(
            api.upload(&id, form(fields)).await,
            (StatusCode::NO_CONTENT, Value::Null)
        );
        let path = format!("/v1/sandboxes/{id}/files/read");
        let response = api.send("POST", &path, r#"{"path": "/a"}"#).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(
            response.headers()["content-type"],
            "application/octet-stream"
        );
        assert_eq!(response.headers()["content-length"], "300000");
        assert_eq!(
            response.into_body().collect().await.unwrap().to_bytes(),
            content
        );
    }
}

#[tokio::test]
async fn bad_reads_are_refused() {
    let api = api().await;
    let id = api.create().await;
    let path = format!("/v1/sandboxes/{id}/files/read");
    let answer = api.call("POST", &path, r#"{"path": "/none"}"#).await;
    assert_eq!(
        answer,
        (
            StatusCode::NOT_FOUND,
            error("not_found", "file not found: /none")
        )
    );
    for (body, expected) in [
        ("{}", "path is required"),
        (r#"{"path": "etc"}"#, "path must be absolute"),
        (
            r#"{"path": "/a\u0000"}"#,
            "path must not contain a zero byte",
        ),
    ] {
        let answer = api.call("POST", &path, body).await;
        assert_eq!(
            answer,
            (StatusCode::BAD_REQUEST, error("invalid_request", expected))
        );
    }
    let long = format!(r#"{{"path": "/{}"}}"#, "x".repeat(4095));
    assert_eq!(
        api.call("POST", &path, &long).await.0,
        StatusCode::BAD_REQUEST
    );
}

#[tokio::test]
async fn bad_uploads_are_refused_and_write_nothing() {
    let api = api().await;
    let id = api.create().await;
    let large = vec![b'x'; MIB as usize + 1];
    let cut_off = form(&[("path", b"/a"), ("file", &large[..999])]);
    for (form, status, expected) in [
        (
            form(&[("path", b"/a"), ("file", &large)]),
            413,
            "file exceeds 1 MB limit",
        ),
        (
            form(&[("file", &large), ("path", b"/a")]),
            413,
            "file exceeds 1 MB limit",
        ),
        (form(&[("path", b"/a")]), 400, "file is required"),
        (form(&[("file", b"x")]), 400, "path is required"),
        (
            form(&[("path", b""), ("file", b"x")]),
            400,
            "path is required",
        ),
        (
            form(&[("path", b"a"), ("file", b"x")]),
            400,
            "path must be absolute",
        ),
        (
            form(&[("path", b"/\xff"), ("file", b"x")]),
            400,
            "path is not UTF-8",
        ),
        (
            form(&[("path", &large), ("file", b"x")]),
            400,
            "path is longer than 4095 bytes",
        ),
        (
            form(&[("path", b"/a"), ("path", b"/b")]),
            400,
            "the form has more than one path",
        ),
        (
            form(&[("path", b"/directory"), ("file", &large[..99])]),
            400,
            "it is a directory",
        ),
        (
            cut_off[..cut_off.len() - 100].to_vec(),
            400,
            "the form cannot be read",
        ),
        (b"nonsense".to_vec(), 400, "the form cannot be read"),
        (Vec::new(), 400, "the form cannot be read"),
    ] {
        let (got, answer) = api.upload(&id, form).await;
        assert_eq!(got.as_u16(), status, "{expected}: {answer}");
        assert!(
            message(&answer).starts_with(expected),
            "{expected}: {answer}"
        );
    }
    let (status, answer) = api
        .call(
            "POST",
            &format!("/v1/sandboxes/{id}/files/write"),
            r#"{"path": "/a"}"#,
        )
        .await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(
        message(&answer).starts_with("expected multipart/form-data"),
        "{answer}"
    );
    assert!(api.host.files.lock().unwrap().is_empty());
}

#[tokio::test]
async fn an_upload_whose_sender_goes_away_writes_nothing() {
    let api = api().await;
    let id = api.create().await;
    let start = form(&[("path", b"/a"), ("file", &[b'x'; 9999])]);
    let start = Bytes::from(start[..5000].to_vec());
    // A body that never goes on after its first part, as of a client that is unplugged.
    let (reached, reaches) = tokio::sync::oneshot::channel();
    let mut reached = Some(reached);
    let body = Body::from_stream(stream::poll_fn(move |_| match reached.take() {
        Some(reached) => {
            reached.send(()).unwrap();
            std::task::Poll::Ready(Some(Ok::<_, std::io::Error>(start.clone())))
        }
        None => std::task::Poll::Pending,
    }));
    tokio::select! {
        answer = api.upload(&id, body) => unreachable!("{answer:?}"),
        _ = async { reaches.await.unwrap(); tokio::task::yield_now().await } => {}
    }
    assert!(api.host.files.lock().unwrap().is_empty());
}

#[tokio::test]
async fn after_a_shutdown_nothing_runs_and_nothing_starts() {
    let api = api().await;
    let id = api.create().await;
    api.manager.shutdown(false).await;
    let (_, row) = api.call("GET", &format!("/v1/sandboxes/{id}"), "").await;
    assert_eq!(row["status"], "stopped");
    assert_eq!(row["status_reason"], "daemon shut down");
    let (status, answer) = api.call("POST", "/v1/sandboxes", "{}").await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer["error"]["code"], "host_unavailable");
}

#[tokio::test]
async fn a_daemon_that_crashed_leaves_no_row_running_without_a_machine() {
    let api = api().await;
    let id = api.create().await;
    api.host.sandboxes.lock().unwrap().clear();
    api.manager.recover().await.unwrap();
    let (_, row) = api.call("GET", &format!("/v1/sandboxes/{id}"), "").await;
    assert_eq!(row["status"], "error");
    assert!(
        row["status_reason"]
            .as_str()
            .unwrap()
            .contains("while the sandbox was running")
    );
}

#[tokio::test]
async fn what_is_not_served_is_told_in_the_same_shape() {
    let api = api().await;
    let (status, answer) = api.call("GET", "/v2", "").await;
    assert_eq!(
        (status, &answer["error"]["code"]),
        (StatusCode::NOT_FOUND, &json!("not_found"))
    );
    let response = api.send("PUT", "/v1/sandboxes", "").await;
    assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED);
    assert!(response.headers().contains_key("allow"));
    let health = json!({"status": "healthy", "service": "microvm-sandbox", "version": "0.1.0"});
    assert_eq!(
        api.call("GET", "/health", "").await,
        (StatusCode::OK, health)
    );
}

#[tokio::test]
async fn web_pages_are_refused_and_requests_have_names() {
    let api = api().await;
    let ask = async |headers: &[(&str, &str)]| {
        let mut request = Request::get("/health");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        api.router.clone().oneshot(request).await.unwrap()
    };
    let answer = ask(&[("host", "rebound.example:8000")]).await;
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    assert_eq!(answer.headers()["x-request-id"].len(), 16);
    let answer = ask(&[("host", "localhost"), ("origin", "https://evil.example")]).await;
    assert_eq!(answer.status(), StatusCode::FORBIDDEN);
    let answer = ask(&[("host", "localhost"), ("x-request-id", "mine-1")]).await;
    assert_eq!(answer.headers()["x-request-id"], "mine-1");
    let answer = ask(&[("host", "localhost"), ("x-request-id", "a b\tc")]).await;
    assert_eq!(answer.headers()["x-request-id"].len(), 16);
}

/// The contract: operations with their statuses, and the fields of each schema.
#[tokio::test]
async fn the_description_holds_the_contract() {
    let operations = [
        (
            "/v1/sandboxes",
            "post",
            "createSandbox",
            &["201", "502"][..],
        ),
        ("/v1/sandboxes", "get", "listSandboxes", &["200"]),
        ("/v1/sandboxes/{id}", "get", "getSandbox", &["200", "404"]),
        ("/v1/sandboxes/{id}", "delete", "destroySandbox", &["204"]),
        (
            "/v1/sandboxes/{id}/exec",
            "post",
            "execCommand",
            &["200", "404", "409"],
        ),
        (
            "/v1/sandboxes/{id}/pause",
            "post",
            "pauseSandbox",
            &["200", "409"],
        ),
        (
            "/v1/sandboxes/{id}/resume",
            "post",
            "resumeSandbox",
            &["200", "409"],
        ),
        (
            "/v1/sandboxes/{id}/fork",
            "post",
            "forkSandbox",
            &["201", "400", "404", "409"],
        ),
        (
            "/v1/snapshots",
            "post",
            "createSnapshot",
            &["201", "400", "404", "409"],
        ),
        ("/v1/snapshots", "get", "listSnapshots", &["200"]),
        ("/v1/snapshots/{id}", "get", "getSnapshot", &["200", "404"]),
        (
            "/v1/snapshots/{id}",
            "delete",
            "deleteSnapshot",
            &["204", "404"],
        ),
        (
            "/v1/snapshots/{id}/fork",
            "post",
            "forkSnapshot",
            &["201", "404"],
        ),
        (
            "/v1/sandboxes/{id}/files/write",
            "post",
            "uploadFile",
            &["204", "409", "413"],
        ),
        (
            "/v1/sandboxes/{id}/files/read",
            "post",
            "downloadFile",
            &["200", "404"],
        ),
    ];
    let schemas = [
        (
            "CreateSandboxRequest",
            &["template", "vcpus", "memory_mb", "timeout_sec"][..],
        ),
        (
            "Sandbox",
            &[
                "id",
                "status",
                "template",
                "vcpus",
                "memory_mb",
                "timeout_sec",
                "created_at",
                "started_at",
                "last_active_at",
                "last_updated",
            ],
        ),
        ("ExecRequest", &["cmd", "args", "timeout_sec"]),
        (
            "ExecResponse",
            &[
                "sandbox_id",
                "cmd",
                "stdout",
                "stderr",
                "exit_code",
                "duration_ms",
                "encoding",
            ],
        ),
        ("ReadFileRequest", &["path"]),
        (
            "CreateSnapshotRequest",
            &["sandbox_id", "name", "description"],
        ),
        (
            "Snapshot",
            &["id", "name", "sandbox_id", "size_bytes", "checksum"],
        ),
        ("ForkRequest", &["count"]),
        ("ForkBody", &["sandboxes", "failed", "stall_ms"]),
        ("Error", &["error"]),
    ];
    let api = api().await;
    let (_, document) = api.call("GET", "/openapi.json", "").await;
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    for (path, method, id, statuses) in operations {
        let operation = &document["paths"][path][method];
        assert_eq!(operation["operationId"], id);
        for status in statuses {
            assert!(operation["responses"][status].is_object(), "{id} {status}");
        }
    }
    for (schema, fields) in schemas {
        for field in fields {
            let described = &document["components"]["schemas"][schema]["properties"][field];
            assert!(described.is_object(), "{schema}.{field}");
        }
    }
    let response = api.send("GET", "/openapi.yaml", "").await;
    assert_eq!(response.headers()["content-type"], "application/yaml");
    let yaml = response.into_body().collect().await.unwrap().to_bytes();
    assert!(yaml.starts_with(b"openapi: 3.1"));
}
