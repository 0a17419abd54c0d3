//! Files, health and refused requests against a real agent.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt},
    path::Path,
};

use crate::common::{Agent, Pattern, error_of};
use agent_protocol::{
    Entry, EntryKind, ErrorCode, FileQuery, Health, MAX_JSON_BODY, PATH_RESUMED, Resumed,
    ResumedRequest, percent_encode,
};
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{Method, Request};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn target(operation: &str, path: &Path) -> String {
    let query = FileQuery::new(path.as_os_str().as_bytes());
    format!("{operation}?{}", query.encode())
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

async fn bytes(agent: &Agent, target: &str) -> Bytes {
    let response = agent.call(Method::GET, target, b"").await;
    assert_eq!(response.status(), 200, "{target}");
    response.into_body().collect().await.unwrap().to_bytes()
}

#[tokio::test]
async fn directories_are_made_and_removed_and_links_are_not_followed() {
    let agent = Agent::start();
    let root = agent.directory();
    let call = async |method: Method, operation: &str, path: &Path| {
        agent.call(method, &target(operation, path), b"").await
    };
    let deep = root.join("a/b/c");
    for status in [201, 200] {
        let response = call(Method::PUT, "/v1/dir", &deep).await;
        assert_eq!(response.status(), status);
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let entry: Entry = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (entry.kind, entry.name.as_str()),
            (EntryKind::Directory, "c")
        );
    }
    fs::write(deep.join("file"), "x").unwrap();
    let kept = root.join("kept");
    fs::write(&kept, "y").unwrap();
    std::os::unix::fs::symlink(root, deep.join("link")).unwrap();
    std::os::unix::fs::symlink(&kept, root.join("link")).unwrap();
    for (path, code) in [
        (kept.as_path(), ErrorCode::NotADirectory),
        (&kept.join("below"), ErrorCode::NotADirectory),
        (Path::new("/proc/none"), ErrorCode::NotFound),
    ] {
        let response = call(Method::PUT, "/v1/dir", path).await;
        assert_eq!(error_of(response).await.1.code, code, "{path:?}");
    }
    for gone in [root.join("a"), root.join("link")] {
        assert_eq!(call(Method::DELETE, "/v1/files", &gone).await.status(), 204);
        let again = call(Method::DELETE, "/v1/files", &gone).await;
        assert_eq!(error_of(again).await.1.code, ErrorCode::NotFound);
    }
    assert_eq!(names(root), ["agent.sock", "kept"]);
    assert_eq!(call(Method::DELETE, "/v1/files", &kept).await.status(), 204);
    let busy = call(Method::DELETE, "/v1/files", Path::new("/proc/self/stat")).await;
    assert_eq!(error_of(busy).await.1.code, ErrorCode::PermissionDenied);
}

#[tokio::test]
async fn a_large_file_goes_in_and_comes_out() {
    const LEN: u64 = 200 << 20;
    let agent = Agent::start();
    let before = agent.peak_kib();
    let path = agent.directory().join("new/dir/large");
    // A prime length, so that no boundary repeats.
    let chunk: Vec<u8> = (0..65_521u32).map(|n| (n * 31 % 251) as u8).collect();
    let body = Pattern {
        left: LEN,
        chunk: chunk.clone().into(),
        broken: false,
    };
    let request = Request::put(target("/v1/files", &path)).body(body).unwrap();
    let response = agent.request(request).await;
    assert_eq!(response.status(), 201);
    let entry: Entry =
        serde_json::from_slice(&response.into_body().collect().await.unwrap().to_bytes()).unwrap();
    assert_eq!(
        (entry.size, entry.mode, entry.name.as_str()),
        (LEN, 0o644, "large")
    );
    assert_eq!(names(path.parent().unwrap()), ["large"]);

    let response = agent
        .call(Method::GET, &target("/v1/files", &path), b"")
        .await;
    assert_eq!(response.headers()["content-length"], LEN.to_string());
    assert_eq!(response.headers()["x-file-mode"], "0644");
    assert_eq!(response.headers()["x-file-size"], LEN.to_string());
    let mut body = response.into_body();
    let mut position = 0;
    while let Some(frame) = body.frame().await {
        let mut data = &frame.unwrap().into_data().unwrap()[..];
        while !data.is_empty() {
            let at = position % chunk.len();
            let len = data.len().min(chunk.len() - at);
            assert!(
                data[..len] == chunk[at..at + len],
                "differs near byte {position}"
            );
            position += len;
            data = &data[len..];
        }
    }
    assert_eq!(position as u64, LEN);
    let grown = agent.peak_kib() - before;
    println!("peak resident size: {before} KiB before, {grown} KiB more after");
    assert!(grown < 2048, "{grown} KiB");
}

#[tokio::test]
async fn an_interrupted_upload_leaves_nothing() {
    let agent = Agent::start();
    let directory = agent.directory().join("d");
    fs::create_dir(&directory).unwrap();
    let path = directory.join("f");
    fs::write(&path, "old").unwrap();

    let mut stream = agent.connect().await;
    let head = format!(
        "PUT {} HTTP/1.1\r\nhost: agent\r\ncontent-length: 1000\r\n\r\nonly this",
        target("/v1/files", &path)
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    // The connection is closed once the request's work is undone.
    assert_eq!(names(&directory), ["f"]);
    assert_eq!(fs::read(&path).unwrap(), b"old");
}

#[tokio::test]
async fn mode_and_owner_are_set() {
    let agent = Agent::start();
    let path = agent.directory().join("a b/+c%");
    let (uid, gid) = (
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let (uid, gid) = if uid == 0 { (4242, 4343) } else { (uid, gid) };
    let query = FileQuery {
        path: path.as_os_str().as_bytes().to_vec(),
        mode: Some(0o4750),
        user: Some(format!("{uid}:{gid}")),
    };
    let put = format!("/v1/files?{}", query.encode());
    let response = agent.call(Method::PUT, &put, b"one").await;
    assert_eq!(response.status(), 201);
    let stat: Entry =
        serde_json::from_slice(&bytes(&agent, &target("/v1/stat", &path)).await).unwrap();
    assert_eq!(
        (stat.mode, stat.uid, stat.gid, stat.size),
        (0o4750, uid, gid, 3)
    );
    assert_eq!(stat.kind, EntryKind::File);
    let parent = target("/v1/stat", path.parent().unwrap());
    let parent: Entry = serde_json::from_slice(&bytes(&agent, &parent).await).unwrap();
    assert_eq!(
        (parent.mode, parent.uid, parent.kind),
        (0o755, uid, EntryKind::Directory)
    );

    // Replaced without mode and owner, it keeps both.
    let response = agent
        .call(Method::PUT, &target("/v1/files", &path), b"")
        .await;
    assert_eq!(response.status(), 200);
    let stat: Entry =
        serde_json::from_slice(&bytes(&agent, &target("/v1/stat", &path)).await).unwrap();
    assert_eq!(
        (stat.mode, stat.uid, stat.gid, stat.size),
        (0o4750, uid, gid, 0)
    );
    assert_eq!(
        bytes(&agent, &target("/v1/files", &path)).await,
        Bytes::new()
    );
}

#[tokio::test]
async fn a_directory_lists_every_kind() {
    let agent = Agent::start();
    let directory = agent.directory().join("d");
    fs::create_dir(&directory).unwrap();
    fs::create_dir(directory.join("sub")).unwrap();
    fs::write(directory.join("file"), "12345").unwrap();
    fs::set_permissions(directory.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("nowhere", directory.join("link")).unwrap();
    let raw = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    fs::write(directory.join(raw), "").unwrap();
    let text = bytes(&agent, &target("/v1/dir", &directory)).await;
    let mut entries: Vec<Entry> = text
        .split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    let kinds: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.kind)).collect();
    assert_eq!(
        kinds,
        [
            ("file", EntryKind::File),
            ("link", EntryKind::Symlink),
            ("sub", EntryKind::Directory),
            ("\u{fffd}\u{fffd}", EntryKind::File),
        ]
    );
    assert_eq!((entries[0].size, entries[0].mode), (5, 0o600));
    assert!(entries[0].mtime_us > 1_500_000_000_000_000);
    assert_eq!(entries[1].target.as_deref(), Some("nowhere"));
    let raw_name = entries[3].raw_name.clone().unwrap();
    assert_eq!(raw_name, "%FF%FE");
    let direct = format!(
        "/v1/stat?path={}/{raw_name}",
        percent_encode(directory.as_os_str().as_bytes())
    );
    assert_eq!(
        serde_json::from_slice::<Entry>(&bytes(&agent, &direct).await).unwrap(),
        entries[3]
    );
}

#[tokio::test]
async fn a_large_directory_is_listed_in_little_memory() {
    let agent = Agent::start();
    let directory = agent.directory().join("d");
    fs::create_dir(&directory).unwrap();
    for n in 0..5000 {
        fs::write(directory.join(format!("{n:0200}")), "").unwrap();
    }
    let before = agent.peak_kib();
    let text = bytes(&agent, &target("/v1/dir", &directory)).await;
    assert_eq!(text.iter().filter(|&&b| b == b'\n').count(), 5000);
    let grown = agent.peak_kib() - before;
    println!("peak resident size: {before} KiB before, {grown} KiB more after");
    assert!(grown < 1024, "{grown} KiB");
}

#[tokio::test]
async fn files_that_the_kernel_makes_up_are_read_whole() {
    let agent = Agent::start();
    let version = bytes(&agent, "/v1/files?path=/proc/version").await;
    assert_eq!(version, fs::read("/proc/version").unwrap());
}

#[tokio::test]
async fn refusals_of_the_file_operations() {
    let agent = Agent::start();
    let here = agent.directory().to_str().unwrap();
    fs::write(agent.directory().join("f"), "").unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        agent.directory().join("fifo"),
        0o600.into(),
    )
    .unwrap();
    let long = "x".repeat(5000);
    for (method, target, code) in [
        (
            Method::GET,
            format!("/v1/files?path={here}/none"),
            ErrorCode::NotFound,
        ),
        (
            Method::GET,
            format!("/v1/files?path={here}"),
            ErrorCode::IsADirectory,
        ),
        (
            Method::GET,
            format!("/v1/files?path={here}/fifo"),
            ErrorCode::NotARegularFile,
        ),
        (
            Method::GET,
            "/v1/files?path=/dev/zero".into(),
            ErrorCode::NotARegularFile,
        ),
        (
            Method::GET,
            format!("/v1/files?path={here}/agent.sock"),
            ErrorCode::NotARegularFile,
        ),
        (Method::GET, "/v1/files".into(), ErrorCode::BadRequest),
        (
            Method::GET,
            "/v1/files?path=etc".into(),
            ErrorCode::BadRequest,
        ),
        (
            Method::GET,
            "/v1/files?path=/a%00b".into(),
            ErrorCode::BadRequest,
        ),
        (
            Method::GET,
            "/v1/files?path=/a&b=c".into(),
            ErrorCode::BadRequest,
        ),
        (
            Method::GET,
            format!("/v1/files?path=/{long}"),
            ErrorCode::BadPath,
        ),
        (
            Method::GET,
            format!("/v1/dir?path={here}/f"),
            ErrorCode::NotADirectory,
        ),
        (
            Method::GET,
            format!("/v1/dir?path={here}/none"),
            ErrorCode::NotFound,
        ),
        (
            Method::GET,
            format!("/v1/stat?path={here}/none"),
            ErrorCode::NotFound,
        ),
        (
            Method::PUT,
            format!("/v1/files?path={here}"),
            ErrorCode::IsADirectory,
        ),
        (
            Method::PUT,
            format!("/v1/files?path={here}/f/g"),
            ErrorCode::NotADirectory,
        ),
        (
            Method::PUT,
            format!("/v1/files?path={here}/g&mode=9"),
            ErrorCode::BadRequest,
        ),
        (
            Method::PUT,
            format!("/v1/files?path={here}/g&user=nobody-here"),
            ErrorCode::UnknownUser,
        ),
        (
            Method::PUT,
            format!("/v1/files?path={here}/fifo"),
            ErrorCode::NotARegularFile,
        ),
        (
            Method::PUT,
            "/v1/files?path=/proc/none/g".into(),
            ErrorCode::NotFound,
        ),
        (
            Method::PATCH,
            format!("/v1/files?path={here}/f"),
            ErrorCode::MethodNotAllowed,
        ),
        (Method::GET, "/v2/files".into(), ErrorCode::UnknownOperation),
    ] {
        let (_, error) = agent.refused(method, &target, b"x").await;
        assert_eq!(error.code, code, "{target}: {error}");
        assert!(!error.message.is_empty());
    }
    assert_eq!(names(agent.directory()), ["agent.sock", "f", "fifo"]);
}

#[tokio::test]
async fn a_full_disk_is_told_and_leaves_no_file() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can mount the small file system that this fills");
        return;
    }
    let agent = Agent::start();
    let small = agent.directory().join("small");
    fs::create_dir(&small).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &small, "tmpfs", flags, c"size=1m").unwrap();
    let body = Pattern {
        left: 8 << 20,
        chunk: vec![7; 65536].into(),
        broken: false,
    };
    let request = Request::put(target("/v1/files", &small.join("f")))
        .body(body)
        .unwrap();
    let io = hyper_util::rt::TokioIo::new(agent.connect().await);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let answer = sender.send_request(request).await;
    let left = names(&small);
    rustix::mount::unmount(&small, rustix::mount::UnmountFlags::DETACH).unwrap();
    let (status, error) = error_of(answer.unwrap()).await;
    assert_eq!((status, error.code), (507, ErrorCode::NoSpace));
    assert!(left.is_empty(), "{left:?}");
    drop(sender);
    let _ = connection.await;
}

#[tokio::test]
async fn a_host_that_sends_on_hears_why_its_file_is_not_taken() {
    const LEN: usize = 8 << 20;
    let agent = Agent::start();
    let mut stream = agent.connect().await;
    let head = format!(
        "PUT {} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {LEN}\r\n\r\n",
        target("/v1/files", agent.directory())
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // All of it can be sent, though nobody wants it, by one who looks for no answer before.
    stream.write_all(&vec![7; LEN]).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 409 "), "{answer}");
    assert!(answer.contains("is_a_directory"), "{answer}");
}

#[tokio::test]
async fn malformed_requests_get_a_4xx() {
    let agent = Agent::start();
    for (head, status) in [
        ("GARBAGE\r\n\r\n", "400"),
        ("GET /v1/health HTTP/9.9\r\n\r\n", "400"),
        (
            "POST /v1/shutdown HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{]",
            "400",
        ),
        (
            "POST /v1/shutdown HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
            "400",
        ),
        (
            "POST /v1/exec HTTP/1.1\r\nhost: a\r\ncontent-length: 17\r\n\r\n{\"argv\":[\"true\"]}",
            "400",
        ),
        (
            "POST /v1/exec HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: exec-frames/1\r\n\
             content-length: 1\r\n\r\n[",
            "400",
        ),
        (
            "PUT /v1/exec HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
            "405",
        ),
    ] {
        let mut stream = agent.connect().await;
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{head}: {answer}"
        );
    }
    let large = vec![b' '; MAX_JSON_BODY + 1];
    let (status, _) = agent.refused(Method::POST, "/v1/shutdown", &large).await;
    assert_eq!(status, 413);
}

#[tokio::test]
async fn outside_of_a_guest_an_identity_changes_nothing() {
    let agent = Agent::start();
    let read = || fs::read("/etc/machine-id").ok();
    let before = read();
    let mut request = ResumedRequest {
        realtime_ns: 1,
        hostname: "sb-00000000".into(),
        machine_id: "1".repeat(32),
        seed: vec![7; 32],
        network: None,
    };
    let body = serde_json::to_vec(&request).unwrap();
    let response = agent.call(Method::POST, PATH_RESUMED, &body).await;
    assert_eq!(response.status(), 200);
    let body = response.into_body().collect().await.unwrap().to_bytes();
    let done: Resumed = serde_json::from_slice(&body).unwrap();
    assert!(!done.seeded && !done.clock && !done.hostname && !done.machine_id);
    assert!(done.realtime_ns > 1_000_000_000 && done.problems.len() == 1);
    assert_eq!(read(), before);

    request.machine_id.push('1');
    let body = serde_json::to_vec(&request).unwrap();
    let (status, error) = agent.refused(Method::POST, PATH_RESUMED, &body).await;
    assert_eq!((status, error.code), (400, ErrorCode::BadRequest));
    assert!(error.message.starts_with("machine_id"), "{error}");
    let (status, _) = agent.refused(Method::GET, PATH_RESUMED, b"").await;
    assert_eq!(status, 405);
}

#[tokio::test]
async fn health_and_shutdown_outside_of_a_guest() {
    let agent = Agent::start();
    let health: Health = serde_json::from_slice(&bytes(&agent, "/v1/health").await).unwrap();
    assert_eq!((health.init, health.execs), (false, 0));
    assert!(health.uptime_us > 0 && !health.kernel.is_empty());
    let order = br#"{"action":"poweroff"}"#;
    let (status, error) = agent.refused(Method::POST, "/v1/shutdown", order).await;
    assert_eq!((status, error.code), (409, ErrorCode::NotInit));
}
