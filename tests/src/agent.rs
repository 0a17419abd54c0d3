//! The agent of a guest, reached through the VMM's vsock socket.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use agent_protocol::{
    AGENT_PORT, AgentFrame, EXEC_UPGRADE, Entry, ErrorBody, ErrorDetail, ExecRequest, Exit,
    FileQuery, Health, HostFrame, PATH_DIR, PATH_EXEC, PATH_FILES, PATH_HEALTH, PATH_SHUTDOWN,
    PATH_STAT, ShutdownAction, ShutdownRequest,
};
use bytes::BytesMut;
use serde_json::Value;

use crate::PATIENCE;
use crate::http::{Request, Response};

/// The agent of one guest.
#[derive(Debug, Clone)]
pub struct Agent {
    socket: PathBuf,
}

/// What a program gave.
#[derive(Debug)]
pub struct Output {
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// How it ended.
    pub exit: Exit,
}

impl Output {
    /// Its standard output as text, without white space around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

impl Agent {
    /// The agent behind the VMM's vsock socket `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Connects to a vsock port of the guest.
    ///
    /// # Errors
    /// Nobody listens there, or the VMM is gone.
    ///
    /// # Panics
    /// The VMM answers otherwise than it should.
    pub fn connect_to(&self, port: u32) -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        writeln!(stream, "CONNECT {port}")?;
        let mut line = Vec::new();
        // What follows the line belongs to the guest's program.
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            line.push(byte[0]);
        }
        let line = String::from_utf8_lossy(&line);
        assert!(
            line.starts_with("OK "),
            "answer to CONNECT {port}: {line:?}"
        );
        Ok(stream)
    }

    /// The answer to a request.
    ///
    /// # Panics
    /// There is none.
    pub fn request(&self, request: Request, body: impl Read, length: u64) -> Response<UnixStream> {
        let stream = self
            .connect_to(AGENT_PORT)
            .expect("a connection to the agent");
        request
            .send(stream, body, length)
            .expect("an answer of the agent")
    }

    fn get(&self, target: &str) -> Response<UnixStream> {
        self.request(Request::new("GET", target), io::empty(), 0)
    }

    /// The agent's health.
    ///
    /// # Panics
    /// It has none.
    pub fn health(&self) -> Health {
        serde_json::from_value(self.get(PATH_HEALTH).json()).unwrap()
    }

    /// Starts a program.
    ///
    /// # Errors
    /// The agent refuses.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn try_exec(&self, exec: &ExecRequest) -> Result<Exec, ErrorDetail> {
        let body = serde_json::to_vec(exec).unwrap();
        let request = Request::new("POST", PATH_EXEC)
            .header("Connection", "Upgrade")
            .header("Upgrade", EXEC_UPGRADE);
        let response = self.request(request, &body[..], body.len() as u64);
        if response.status != 101 {
            return Err(refusal(response));
        }
        let (stream, read) = response.into_stream();
        Ok(Exec {
            stream,
            buffer: BytesMut::from(&read[..]),
        })
    }

    /// Starts a program.
    ///
    /// # Panics
    /// The agent refuses.
    pub fn exec(&self, exec: &ExecRequest) -> Exec {
        self.try_exec(exec).expect("a program that starts")
    }

    /// Runs a shell script to its end.
    ///
    /// # Panics
    /// It cannot be run.
    pub fn sh(&self, script: &str) -> Output {
        self.exec(&sh(script)).finish()
    }

    /// What a shell script that must succeed writes, without white space around it.
    ///
    /// # Panics
    /// It does not succeed.
    pub fn must(&self, script: &str) -> String {
        let output = self.sh(script);
        assert_eq!(output.exit.code, 0, "{script}: {output:?}");
        output.text()
    }

    /// Writes a file; the status is 200 or 201.
    ///
    /// # Errors
    /// The agent refuses.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn write(
        &self,
        query: &FileQuery,
        content: impl Read,
        length: u64,
    ) -> Result<(u16, Entry), ErrorDetail> {
        let target = format!("{PATH_FILES}?{}", query.encode());
        let response = self.request(Request::new("PUT", &target), content, length);
        match response.status {
            status @ (200 | 201) => Ok((status, serde_json::from_value(response.json()).unwrap())),
            _ => Err(refusal(response)),
        }
    }

    /// Reads a file, as the answer's body.
    ///
    /// # Errors
    /// The agent refuses.
    pub fn read(&self, path: &str) -> Result<Response<UnixStream>, ErrorDetail> {
        let response = self.get(&format!("{PATH_FILES}?{}", FileQuery::new(path).encode()));
        match response.status {
            200 => Ok(response),
            _ => Err(refusal(response)),
        }
    }

    /// Describes a file.
    ///
    /// # Errors
    /// The agent refuses.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn stat(&self, path: &str) -> Result<Entry, ErrorDetail> {
        let response = self.get(&format!("{PATH_STAT}?{}", FileQuery::new(path).encode()));
        match response.status {
            200 => Ok(serde_json::from_value(response.json()).unwrap()),
            _ => Err(refusal(response)),
        }
    }

    /// Lists a directory, in the order of names.
    ///
    /// # Errors
    /// The agent refuses.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn list(&self, path: &str) -> Result<Vec<Value>, ErrorDetail> {
        let response = self.get(&format!("{PATH_DIR}?{}", FileQuery::new(path).encode()));
        if response.status != 200 {
            return Err(refusal(response));
        }
        let mut entries: Vec<Value> = response
            .text()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        entries.sort_by_key(|entry| entry["name"].to_string());
        Ok(entries)
    }

    /// Asks the guest to go down.
    ///
    /// # Panics
    /// The agent refuses.
    pub fn shut_down(&self, action: ShutdownAction) {
        let request = ShutdownRequest {
            action,
            grace_ms: 2000,
        };
        let body = serde_json::to_vec(&request).unwrap();
        let request = Request::new("POST", PATH_SHUTDOWN);
        let response = self.request(request, &body[..], body.len() as u64);
        assert_eq!(response.status, 202);
    }
}

fn refusal(response: Response<UnixStream>) -> ErrorDetail {
    let status = response.status;
    let body: ErrorBody = serde_json::from_value(response.json()).unwrap();
    assert_eq!(status, body.error.code.status(), "{}", body.error);
    body.error
}

/// A program and its arguments.
pub fn argv(argv: &[&str]) -> ExecRequest {
    ExecRequest {
        argv: argv.iter().map(|&arg| arg.to_owned()).collect(),
        ..ExecRequest::default()
    }
}

/// A shell script.
pub fn sh(script: &str) -> ExecRequest {
    argv(&["sh", "-c", script])
}

/// A running program. Dropping it kills the program.
pub struct Exec {
    stream: UnixStream,
    buffer: BytesMut,
}

impl Exec {
    /// Sends a frame.
    ///
    /// # Panics
    /// The connection broke off.
    pub fn send(&mut self, frame: &HostFrame) {
        let mut wire = BytesMut::new();
        frame.encode(&mut wire).unwrap();
        self.stream.write_all(&wire).expect("a frame to be taken");
    }

    /// Sends `content` as standard input on a thread of its own, so that output can be read
    /// meanwhile.
    pub fn feed(&self, mut content: impl Read + Send + 'static) {
        let mut stream = self.stream.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 32 * 1024];
            loop {
                let count = content.read(&mut buffer).unwrap();
                let frame = match count {
                    0 => HostFrame::StdinEnd,
                    _ => HostFrame::Stdin(bytes::Bytes::copy_from_slice(&buffer[..count])),
                };
                let mut wire = BytesMut::new();
                frame.encode(&mut wire).unwrap();
                // A program may end before it has read all; what it gave tells.
                if stream.write_all(&wire).is_err() || count == 0 {
                    return;
                }
            }
        });
    }

    /// The next frame; `None` at the end of the connection.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn next_frame(&mut self) -> Option<AgentFrame> {
        loop {
            if let Some(frame) = AgentFrame::decode(&mut self.buffer).unwrap() {
                return Some(frame);
            }
            let mut buffer = [0; 16 * 1024];
            let count = self.stream.read(&mut buffer).expect("a frame");
            if count == 0 {
                assert!(self.buffer.is_empty(), "the connection ends within a frame");
                return None;
            }
            self.buffer.extend_from_slice(&buffer[..count]);
        }
    }

    /// Reads the end of the connection, after the exit of the program.
    ///
    /// A reset is an end too: a Unix socket that is closed with input in it that nobody has read
    /// resets its peer, which reads what was sent before all the same.
    ///
    /// # Panics
    /// Anything else comes.
    fn expect_end(&mut self) {
        assert!(self.buffer.is_empty(), "bytes after the exit");
        match self.stream.read(&mut [0]) {
            Ok(0) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?} in place of the end after the exit"),
        }
    }

    /// Reads on until one of the output streams has had `text` since the start of this call.
    ///
    /// # Panics
    /// It ends before.
    pub fn wait_for(&mut self, text: &str) {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let has = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains(text);
        while !has(&stdout) && !has(&stderr) {
            match self.next_frame() {
                Some(AgentFrame::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                Some(AgentFrame::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(AgentFrame::Started(_)) => {}
                other => panic!("{other:?} came before {text:?}"),
            }
        }
    }

    /// Reads to the program's end. `stdout` takes its standard output.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn finish_into(mut self, mut stdout: impl Write) -> Output {
        let mut stderr = Vec::new();
        loop {
            match self.next_frame() {
                Some(AgentFrame::Started(started)) => assert!(started.pid > 1),
                Some(AgentFrame::Stdout(bytes)) => stdout.write_all(&bytes).unwrap(),
                Some(AgentFrame::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(AgentFrame::Exit(exit)) => {
                    self.expect_end();
                    return Output {
                        stdout: Vec::new(),
                        stderr,
                        exit,
                    };
                }
                other => panic!("{other:?} came before the exit"),
            }
        }
    }

    /// Reads to the program's end.
    ///
    /// # Panics
    /// The agent breaks the protocol.
    pub fn finish(self) -> Output {
        let mut stdout = Vec::new();
        let output = self.finish_into(&mut stdout);
        Output { stdout, ..output }
    }
}
