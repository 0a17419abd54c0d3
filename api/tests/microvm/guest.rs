//! Commands and files.

use axum::body::Body;
use axum::http::{Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tower::ServiceExt;

use super::{MIB, api, get, is_like, post, running, send};
use crate::support::{form, read_json};

#[tokio::test]
async fn commands_run_by_a_shell() {
    let api = api().await;
    running(&api).await;
    let request = json!({
        "command": "echo hello", "timeout_seconds": 30, "working_directory": "/path/to/dir",
        "environment": {"VAR1": "value1", "VAR2": "value2"}
    });
    let (status, done) = post(&api, "/vms/test-vm/execute", request).await;
    assert_eq!(status, 200, "{done}");
    let example = json!({
        "exit_code": 0, "stdout": "command output", "stderr": "error output",
        "execution_time_seconds": 1.5, "command": "string", "executed_at": "2025-10-01T12:20:00Z"
    });
    is_like(&done, &example);
    assert_eq!(
        (&done["stdout"], &done["exit_code"]),
        (&json!("ran echo hello\n"), &json!(0))
    );
    let (command, _) = api.host.commands.lock().unwrap().last().unwrap().clone();
    assert_eq!(command.argv, ["/bin/sh", "-c", "echo hello"]);
    assert_eq!(
        (command.cwd.as_deref(), command.timeout_sec),
        (Some("/path/to/dir"), 30)
    );
    assert_eq!(command.env["VAR2"], "value2");

    let fail = json!({"command": "fail"});
    assert_eq!(
        post(&api, "/vms/test-vm/execute", fail).await.1["exit_code"],
        3
    );
    let late = json!({"command": "late", "timeout_seconds": 1});
    let (status, late) = post(&api, "/vms/test-vm/execute", late).await;
    assert_eq!((status, &late["error"]), (504, &json!("timeout")));
    assert_eq!(
        (&late["stdout"], &late["exit_code"]),
        (&json!("so far"), &json!(137))
    );
    for (body, field) in [
        (json!({}), "command"),
        (
            json!({"command": "x", "timeout_seconds": 0}),
            "timeout_seconds",
        ),
        (
            json!({"command": "x", "timeout_seconds": 3601}),
            "timeout_seconds",
        ),
        (
            json!({"command": "x", "environment": {"A": 1}}),
            "environment.A",
        ),
    ] {
        let (status, refused) = post(&api, "/vms/test-vm/execute", body).await;
        assert_eq!(
            (status, &refused["details"][0]["field"]),
            (422, &json!(field))
        );
    }
    let nobody = post(&api, "/vms/nope/execute", json!({"command": "x"})).await;
    let message = "VM 'nope' not found";
    assert_eq!(
        nobody,
        (404, json!({"error": "not_found", "message": message}))
    );
}

#[tokio::test]
async fn files_go_in_and_out() {
    let api = api().await;
    running(&api).await;
    let multipart = "multipart/form-data; boundary=X";
    let upload = async |fields: &[(&str, &[u8])]| {
        let path = "/vms/test-vm/files/upload";
        let (status, body) =
            read_json(send(&api, "POST", path, multipart, form(fields).into()).await).await;
        (status.as_u16(), body)
    };
    // In each order.
    let (file, path, mode): (&[u8], &[u8], &[u8]) = (b"0123456789", b"/srv/ab.txt", b"600");
    for fields in [
        [("file", file), ("path", path), ("permissions", mode)],
        [("path", path), ("permissions", mode), ("file", file)],
    ] {
        let (status, done) = upload(&fields).await;
        assert_eq!(status, 200, "{done}");
        let example = json!({
            "message": "File uploaded successfully", "vm_name": "string",
            "remote_path": "/path/to/file", "size_bytes": 1024,
            "uploaded_at": "2025-10-01T12:25:00Z"
        });
        is_like(&done, &example);
        assert_eq!(done["message"], "File uploaded successfully");
        assert_eq!(
            (&done["remote_path"], &done["size_bytes"]),
            (&json!("/srv/ab.txt"), &json!(10))
        );
        let files = api.host.files.lock().unwrap();
        assert_eq!(files["/srv/ab.txt"], b"0123456789");
        assert_eq!(*api.host.last_mode.lock().unwrap(), Some(0o600));
    }
    let big = vec![0; usize::try_from(MIB).unwrap() + 1];
    assert_eq!(upload(&[("path", b"/big"), ("file", &big)]).await.0, 413);
    assert_eq!(upload(&[("path", b"/x")]).await.0, 422);
    assert_eq!(
        upload(&[("path", b"/x"), ("permissions", b"rwx"), ("file", b"")])
            .await
            .0,
        422
    );

    let download = async |path: &str, range: &str| {
        let request = Request::get(format!("/api/v1/vms/test-vm/files/download?path={path}"))
            .header("host", "localhost")
            .header("range", range)
            .header("authorization", &api.bearer)
            .body(Body::empty())
            .unwrap();
        let response = api.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.status.as_u16(), parts.headers, body)
    };
    let (status, headers, body) = download("/srv/ab.txt", "none").await;
    assert_eq!((status, &body[..]), (200, &b"0123456789"[..]));
    assert_eq!(headers["content-type"], "application/octet-stream");
    assert_eq!(headers["content-length"], "10");
    assert_eq!(
        headers["content-disposition"],
        "attachment; filename=\"ab.txt\""
    );
    assert_eq!(headers["accept-ranges"], "bytes");
    let (status, headers, body) = download("/srv/ab.txt", "bytes=2-4").await;
    assert_eq!((status, &body[..]), (206, &b"234"[..]));
    assert_eq!(headers["content-range"], "bytes 2-4/10");
    assert_eq!(headers["content-length"], "3");
    let (status, headers, _) = download("/srv/ab.txt", "bytes=10-").await;
    assert_eq!(
        (status, &headers["content-range"]),
        (416, &"bytes */10".parse().unwrap())
    );
    assert_eq!(download("/srv/none", "none").await.0, 404);

    upload(&[("file", b"x"), ("path", b"/srv/sub/deep")]).await;
    let (status, list) = get(&api, "/vms/test-vm/files?path=/srv").await;
    assert_eq!(status, 200, "{list}");
    let example = json!({
        "files": [{
            "name": "filename.txt", "path": "/path/to/filename.txt", "size_bytes": 1024,
            "is_directory": false, "permissions": "644", "modified_at": "2025-10-01T12:00:00Z"
        }],
        "directory": "/path/to/dir"
    });
    is_like(&list, &example);
    let paths = |list: &Value| -> Vec<String> {
        let files = list["files"].as_array().unwrap().iter();
        files
            .map(|file| file["path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(list["directory"], "/srv");
    assert_eq!(paths(&list), ["/srv/ab.txt", "/srv/sub"]);
    assert_eq!(
        (&list["files"][0]["name"], &list["files"][0]["permissions"]),
        (&json!("ab.txt"), &json!("750"))
    );
    assert_eq!(list["files"][1]["is_directory"], true);
    let (_, all) = get(&api, "/vms/test-vm/files?path=/srv&recursive=true").await;
    assert_eq!(paths(&all), ["/srv/ab.txt", "/srv/sub", "/srv/sub/deep"]);
    for word in ["True", "TRUE", "1"] {
        let path = format!("/vms/test-vm/files?path=/srv&recursive={word}");
        assert_eq!(get(&api, &path).await.1, all);
    }
    assert_eq!(get(&api, "/vms/test-vm/files?recursive=maybe").await.0, 400);

    let long = "d".repeat(2 << 20);
    let deep = (0..20).map(|number| (format!("/deep/{long}/{number}"), Vec::new()));
    api.host.files.lock().unwrap().extend(deep);
    let (status, _) = get(&api, "/vms/test-vm/files?path=/deep").await;
    assert_eq!(status, 200);
    let (status, error) = get(&api, "/vms/test-vm/files?path=/deep&recursive=true").await;
    assert_eq!(status, 400, "a guest decides how long paths are");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("list a part of them"), "{message}");
}

#[tokio::test]
async fn other_names_for_commands_and_files() {
    let api = api().await;
    running(&api).await;
    let command = json!({"command": "echo hi", "timeout": 5});
    let (status, done) = post(&api, "/vms/test-vm/guest/command", command).await;
    assert_eq!(status, 200, "{done}");
    let example = json!({
        "success": true, "exit_code": 0, "stdout": "", "stderr": "", "execution_time_ms": 1
    });
    is_like(&done, &example);
    assert_eq!(
        (&done["success"], &done["stdout"]),
        (&json!(true), &json!("ran echo hi\n"))
    );

    // A form that says that it is JSON.
    let path = "/vms/test-vm/guest/upload";
    let body = form(&[("file", b"abc"), ("remote_path", b"/srv/f")]);
    let response = send(&api, "POST", path, "application/json", body.into()).await;
    let (status, done) = read_json(response).await;
    assert_eq!(status, StatusCode::OK, "{done}");
    let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let expected = json!({
        "success": true, "remote_path": "/srv/f", "size_bytes": 3, "checksum": digest
    });
    assert_eq!(done, expected);
    for bad in [&b"no form"[..], b"--", b"--\r\n", &[b'-'; 200]] {
        let response = send(&api, "POST", path, "application/json", bad.to_vec().into()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    }
    let download = async |max: u64| {
        let body = json!({"remote_path": "/srv/f", "max_size": max}).to_string();
        let path = "/vms/test-vm/guest/download";
        let response = send(&api, "POST", path, "application/json", body.into()).await;
        let status = response.status().as_u16();
        (
            status,
            response.into_body().collect().await.unwrap().to_bytes(),
        )
    };
    assert_eq!(download(3).await, (200, "abc".into()));
    assert_eq!(download(2).await.0, 413);
}
