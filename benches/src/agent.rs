//! Requests to a guest's agent, over a channel of either kind.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    time::Duration,
};

use agent_protocol::{
    AGENT_PORT, AgentFrame, EXEC_UPGRADE, ExecRequest, FileQuery, FrameKind, PATH_EXEC, PATH_FILES,
    encode,
};
use bytes::BytesMut;

use crate::{
    channel::Channel,
    clock::{self, Moment},
};

/// The longest answer to a request, and the longest output of a program that is kept, in bytes.
const MAX_MESSAGE: usize = 64 * 1024;

/// The body of the answer to a request of HTTP/1.1. The agent closes after each answer.
///
/// # Errors
/// The connection broke off, or the answer is no 200.
pub fn get(stream: &mut UnixStream, path: &str) -> io::Result<Vec<u8>> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let answer = whole_answer(stream)?;
    let head = head_of(&answer, b"200")?;
    Ok(answer[head..].to_vec())
}

/// Writes a program into the guest.
///
/// # Errors
/// The connection broke off, or the agent refuses.
pub fn install(channel: &Channel, path: &str, program: &[u8], limit: Duration) -> io::Result<()> {
    let mut stream = channel.connect(AGENT_PORT, limit)?;
    let query = FileQuery {
        mode: Some(0o755),
        ..FileQuery::new(path)
    };
    let head = format!(
        "PUT {PATH_FILES}?{} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        query.encode(),
        program.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(program)?;
    head_of(&whole_answer(&mut stream)?, b"201").map(drop)
}

fn whole_answer(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut answer = Vec::new();
    stream.take(MAX_MESSAGE as u64).read_to_end(&mut answer)?;
    Ok(answer)
}

/// How long the head of an answer with this status is.
fn head_of(answer: &[u8], status: &[u8]) -> io::Result<usize> {
    let invalid = |what: &str| {
        let answer = String::from_utf8_lossy(&answer[..answer.len().min(200)]).into_owned();
        invalid(format!("{what}: {answer:?}"))
    };
    if answer
        .strip_prefix(b"HTTP/1.1 ")
        .and_then(|rest| rest.get(..3))
        != Some(status)
    {
        let status = String::from_utf8_lossy(status);
        return Err(invalid(&format!("the answer is no {status}")));
    }
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n");
    end.map(|end| end + 4)
        .ok_or_else(|| invalid("the answer has no end of its header"))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// What a program did.
#[derive(Debug, Default)]
pub struct Ran {
    /// How many bytes it wrote to standard output.
    pub written: u64,
    /// The first of them, and of standard error.
    pub said: Vec<u8>,
    /// From the moment at which it ran to that at which its end was known, by the host's clock.
    pub took: Duration,
    /// From its start to its exit, by the guest's clock.
    pub took_in_guest: Duration,
}

/// Runs a program to its end, and gives it `input` bytes of zeros as standard input, if that is
/// not 0.
///
/// # Errors
/// The connection broke off, the agent refuses, or the program fails.
pub fn run(channel: &Channel, argv: &[&str], input: u64, limit: Duration) -> io::Result<Ran> {
    let request = ExecRequest {
        argv: argv.iter().map(|&word| word.to_owned()).collect(),
        stdin: input > 0,
        ..ExecRequest::default()
    };
    let body = serde_json::to_vec(&request)?;
    let mut stream = channel.connect(AGENT_PORT, limit)?;
    let head = format!(
        "POST {PATH_EXEC} HTTP/1.1\r\nHost: agent\r\nConnection: Upgrade\r\nUpgrade: {EXEC_UPGRADE}\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)?;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") && answer.len() < MAX_MESSAGE {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        answer.extend(byte);
    }
    head_of(&answer, b"101")?;
    std::thread::scope(|scope| {
        let mut writer = stream.try_clone()?;
        let feeder = scope.spawn(move || feed(&mut writer, input));
        let ran = follow(&mut stream);
        match feeder.join() {
            Ok(fed) => fed.and(ran),
            Err(_) => Err(io::Error::other("the thread that feeds it failed")),
        }
    })
}

/// Sends that many zeros.
fn feed(stream: &mut UnixStream, mut left: u64) -> io::Result<()> {
    if left == 0 {
        return Ok(());
    }
    let zeros = [0; 32 * 1024];
    let mut frame = BytesMut::new();
    while left > 0 {
        let count = left.min(zeros.len() as u64) as usize;
        frame.clear();
        encode(FrameKind::Stdin, &zeros[..count], &mut frame).map_err(io::Error::other)?;
        stream.write_all(&frame)?;
        left -= count as u64;
    }
    frame.clear();
    encode(FrameKind::StdinEnd, &[], &mut frame).map_err(io::Error::other)?;
    stream.write_all(&frame)
}

/// Reads to the end of a program.
fn follow(stream: &mut UnixStream) -> io::Result<Ran> {
    let (mut buffer, mut piece) = (BytesMut::new(), vec![0; 64 * 1024]);
    let mut start: Option<Moment> = None;
    let mut ran = Ran::default();
    loop {
        let frame = AgentFrame::decode(&mut buffer).map_err(|error| invalid(error.to_string()))?;
        let Some(frame) = frame else {
            let count = stream.read(&mut piece)?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer.extend_from_slice(&piece[..count]);
            continue;
        };
        match frame {
            AgentFrame::Started(_) => start = Some(clock::now()),
            AgentFrame::Stdout(bytes) => {
                ran.written += bytes.len() as u64;
                ran.keep(&bytes);
            }
            AgentFrame::Stderr(bytes) => ran.keep(&bytes),
            AgentFrame::Exit(exit) if exit.code == 0 => {
                let now = clock::now();
                ran.took = now.saturating_sub(start.unwrap_or(now));
                ran.took_in_guest = Duration::from_micros(exit.duration_us);
                return Ok(ran);
            }
            AgentFrame::Exit(exit) => {
                let said = String::from_utf8_lossy(&ran.said).into_owned();
                return Err(invalid(format!("exit status {}: {said}", exit.code)));
            }
            AgentFrame::Error(error) => return Err(invalid(error.to_string())),
        }
    }
}

impl Ran {
    fn keep(&mut self, bytes: &[u8]) {
        let room = MAX_MESSAGE.saturating_sub(self.said.len());
        self.said.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use agent_protocol::PATH_HEALTH;

    use super::*;

    fn answer_to_get(answer: &'static [u8]) -> io::Result<Vec<u8>> {
        let (mut ours, mut agent) = UnixStream::pair().unwrap();
        let agent = thread::spawn(move || {
            let mut request = vec![0; 64];
            let len = agent.read(&mut request).unwrap();
            assert!(request[..len].starts_with(b"GET /v1/health HTTP/1.1\r\n"));
            agent.write_all(answer).unwrap();
        });
        let body = get(&mut ours, PATH_HEALTH);
        agent.join().unwrap();
        body
    }

    #[test]
    fn an_answer_is_its_body_or_an_error_that_shows_it() {
        let body = answer_to_get(b"HTTP/1.1 200 OK\r\nx: y\r\n\r\n{}").unwrap();
        assert_eq!(body, b"{}");
        for answer in [
            b"HTTP/1.1 500 Oh\r\n\r\n".as_slice(),
            b"HTTP/1.1 200 OK\r\n",
            b"",
        ] {
            let error = answer_to_get(answer).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    /// An agent that answers with these frames, and reads to the end of its input.
    fn run_against(input: u64, frames: &[(FrameKind, &[u8])]) -> io::Result<Ran> {
        let mut wire = BytesMut::new();
        for (kind, payload) in frames {
            encode(*kind, payload, &mut wire).unwrap();
        }
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vsock");
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let agent = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            crate::channel::read_line(&mut stream, 32).unwrap();
            stream.write_all(b"OK 1\nHTTP/1.1 101 x\r\n\r\n").unwrap();
            stream.write_all(&wire).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        });
        let ran = run(
            &Channel::Unix(socket),
            &["program"],
            input,
            Duration::from_secs(60),
        );
        let sent = agent.join().unwrap();
        let zeros = sent.iter().filter(|byte| **byte == 0).count() as u64;
        assert!(zeros >= input, "{zeros} zeros of {input}");
        ran
    }

    const EXIT: &[u8] = br#"{"code":0,"duration_us":1}"#;

    #[test]
    fn a_program_is_fed_and_followed_to_its_end() {
        let started = (FrameKind::Started, &br#"{"pid":5}"#[..]);
        let output = (FrameKind::Stdout, &b"abc"[..]);
        let ran = run_against(100_000, &[started, output, output, (FrameKind::Exit, EXIT)]);
        let ran = ran.unwrap();
        assert_eq!((ran.written, &ran.said[..]), (6, &b"abcabc"[..]));
        assert_eq!(ran.took_in_guest, Duration::from_micros(1));
        let error = run_against(0, &[started, output]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let failed = (FrameKind::Exit, &br#"{"code":1,"duration_us":1}"#[..]);
        let error = run_against(0, &[started, output, failed]).unwrap_err();
        assert!(error.to_string().contains("exit status 1: abc"), "{error}");
    }
}
