//! The REST API of a `vmm` process.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

use crate::PATIENCE;
use crate::http::{Request, Response};

/// A connection on which the first bytes of what is written have been sent already.
struct Sent {
    stream: UnixStream,
    sent: usize,
}

impl Read for Sent {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Sent {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let skipped = self.sent.min(bytes.len());
        self.sent -= skipped;
        self.stream.write_all(&bytes[skipped..])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

/// A client, which makes a connection for each request.
pub struct VmmApi {
    socket: PathBuf,
}

impl VmmApi {
    /// A client of the API that is served there.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Sends a request, and returns the status and the body of the answer when the VMM has closed
    /// the connection.
    ///
    /// # Panics
    /// There is no answer.
    pub fn call(&self, method: &str, name: &str, body: Option<&Value>) -> (u16, Value) {
        let stream = UnixStream::connect(&self.socket)
            .unwrap_or_else(|error| panic!("{}: {error}", self.socket.display()));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut connection = stream.try_clone().unwrap();
        let body = body.map_or(String::new(), Value::to_string);
        let response = Request::new(method, &format!("/api/v1/{name}"))
            .send(stream, body.as_bytes(), body.len() as u64)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let status = response.status;
        let body = response.bytes();
        let rest = connection.read_to_end(&mut Vec::new());
        assert_eq!(rest.unwrap(), 0, "{name}: more than an answer");
        let body = if body.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&body).unwrap()
        };
        (status, body)
    }

    /// A connection whose first bytes take descriptors along.
    ///
    /// # Panics
    /// There is none.
    pub fn connect_passing(&self, first: &str, descriptors: &[BorrowedFd<'_>]) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        let bytes = [IoSlice::new(first.as_bytes())];
        let sent = sendmsg(&stream, &bytes, &mut ancillary, SendFlags::empty());
        assert_eq!(sent, Ok(first.len()));
        stream
    }

    /// A PUT whose first byte takes descriptors along, and the status and body of the answer.
    ///
    /// # Panics
    /// There is no answer.
    pub fn put_passing(
        &self,
        name: &str,
        body: &Value,
        descriptors: &[BorrowedFd<'_>],
    ) -> (u16, Value) {
        let stream = Sent {
            stream: self.connect_passing("P", descriptors),
            sent: 1,
        };
        let body = body.to_string();
        let response = Request::new("PUT", &format!("/api/v1/{name}"))
            .send(stream, body.as_bytes(), body.len() as u64)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let status = response.status;
        let body = response.bytes();
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// Returns when the VMM has nothing left of the connections before this one, which stays
    /// open until the answer is dropped.
    ///
    /// # Panics
    /// There is no answer.
    pub fn settle(&self) -> Response<UnixStream> {
        // The VMM has shut the others down when their clients saw their end. Its one thread has
        // then closed them too before it turns to this.
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = Request::new("GET", "/api/v1/vmm.ping").header("Connection", "keep-alive");
        let response = request.send(stream, &[][..], 0).unwrap();
        assert_eq!(response.status, 200);
        response
    }

    /// What a GET that must succeed answers.
    ///
    /// # Panics
    /// It does not succeed.
    pub fn get(&self, name: &str) -> Value {
        let (status, body) = self.call("GET", name, None);
        assert_eq!(status, 200, "{name}: {body}");
        body
    }

    /// A PUT that must succeed and has nothing to say.
    ///
    /// # Panics
    /// It does not succeed.
    pub fn put(&self, name: &str, body: Option<&Value>) {
        let (status, answer) = self.call("PUT", name, body);
        assert_eq!(status, 204, "{name}: {answer}");
    }

    /// The state of the virtual machine.
    ///
    /// # Panics
    /// There is none.
    pub fn state(&self) -> String {
        let info = self.get("vm.info");
        info["state"].as_str().expect("a state").to_owned()
    }
}
