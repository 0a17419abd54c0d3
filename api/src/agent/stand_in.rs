//! An agent that gives one answer, for tests.

use std::path::PathBuf;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

/// An agent behind a VMM's socket. Its end is the body of the request.
pub struct StandIn {
    /// Where it listens.
    pub socket: PathBuf,
    /// What it was asked with, once it has answered.
    pub asked: JoinHandle<Vec<u8>>,
    _dir: TempDir,
}

/// One that answers with this status and body.
pub fn answering(status: &str, body: &str) -> StandIn {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    let answer = format!("HTTP/1.1 {status}\r\nConnection: close\r\n\r\n{body}");
    let asked = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        stream.write_all(b"OK 1\n").await.unwrap();
        let mut length = 0;
        while line.trim_end() != "" {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
            if let Some(text) = line.to_lowercase().strip_prefix("content-length: ") {
                length = text.trim_end().parse().unwrap();
            }
        }
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        // Whoever asked may have heard enough before all is sent.
        let _ = stream.write_all(answer.as_bytes()).await;
        body
    });
    StandIn {
        socket,
        asked,
        _dir: dir,
    }
}
