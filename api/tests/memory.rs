//! Output and files of any size in bounded memory. A binary of its own, with one test, so that
//! the memory it measures is that of nothing else.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod support;

use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use futures_util::stream::{self, StreamExt};
use support::{Api, PIECE, form};

const SIZE: usize = 96 << 20;
/// What the daemon may take more for any of it: pieces in flight and buffers, and no more.
const BOUND: usize = 16 << 20;

/// The most memory that this process has had, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<usize>()
        .unwrap()
        << 10
}

async fn count(body: Body) -> usize {
    let mut stream = body.into_data_stream();
    let mut total = 0;
    while let Some(piece) = stream.next().await {
        total += piece.unwrap().len();
    }
    total
}

fn upload(head_first: bool) -> Body {
    let whole = form(&[("path", b"/dev/null"), ("file", b"")]);
    let path_last = form(&[("file", b""), ("path", b"/dev/null")]);
    let whole = if head_first { whole } else { path_last };
    // The file's content goes between its empty line and the boundary after it.
    let file = whole
        .windows(8)
        .position(|window| window == b"filename")
        .unwrap();
    let cut = file
        + whole[file..]
            .windows(4)
            .position(|end| end == b"\r\n\r\n")
            .unwrap()
        + 4;
    stretched(&whole[..cut], &whole[cut..])
}

/// A body that has [`SIZE`] bytes between these.
fn stretched(head: &[u8], tail: &[u8]) -> Body {
    let (head, tail) = (head.to_vec(), tail.to_vec());
    let piece = Bytes::from(vec![b'z'; PIECE]);
    let pieces = stream::once(async { Bytes::from(head) })
        .chain(stream::iter((0..SIZE / PIECE).map(move |_| piece.clone())))
        .chain(stream::once(async { Bytes::from(tail) }));
    Body::from_stream(pieces.map(Ok::<_, std::io::Error>))
}

#[tokio::test]
async fn long_output_and_large_files_take_little_memory() {
    let api = Api::new(SIZE as u64, SIZE as u64).await;
    let id = api.create().await;
    let before = peak();
    let grown = |what: &str| {
        let grown = peak() - before;
        println!("{what}: {} KiB more", grown >> 10);
        assert!(
            grown < BOUND,
            "{what} of {SIZE} bytes took {grown} bytes of memory"
        );
    };

    let body = format!(r#"{{"cmd": "flood", "args": ["{SIZE}"]}}"#);
    let response = api
        .send("POST", &format!("/v1/sandboxes/{id}/exec"), body)
        .await;
    assert_eq!(response.status(), StatusCode::OK);
    // Every second byte is a newline, which is two in JSON.
    assert!(count(response.into_body()).await > SIZE / 2 * 3);
    grown("output");

    for head_first in [true, false] {
        let (status, answer) = api.upload(&id, upload(head_first)).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
        assert_eq!(*api.host.last_upload.lock().unwrap(), Some(SIZE as u64));
        grown("upload");
    }

    // A field that nobody asked for is skipped.
    let whole = form(&[("path", b"/dev/null"), ("file", b"")]);
    let other = stretched(
        b"--X\r\nContent-Disposition: form-data; name=\"other\"\r\n\r\n",
        &[b"\r\n", &whole[..]].concat(),
    );
    let (status, answer) = api.upload(&id, other).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
    grown("a field that is skipped");
    // What is no field: before the first, and as a header of one.
    for head in ["", "--X\r\nContent-Disposition: "] {
        let (status, answer) = api.upload(&id, stretched(head.as_bytes(), b"")).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains("no field's content"), "{message}");
        grown("a form without fields");
    }

    let body = format!(r#"{{"path": "/zeros/{SIZE}"}}"#);
    let response = api
        .send("POST", &format!("/v1/sandboxes/{id}/files/read"), body)
        .await;
    assert_eq!(count(response.into_body()).await, SIZE);
    grown("download");
}
