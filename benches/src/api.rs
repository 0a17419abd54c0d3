//! The API by which a VMM is driven, asked again and again for the least that it answers.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use crate::clock;

/// The longest line or body of an answer, in bytes.
const MAX_ANSWER: u64 = 64 * 1024;

/// Where a VMM serves its API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Api {
    /// Ours: HTTP; asked for `vmm.ping`.
    Http(PathBuf),
    /// QEMU's: QMP; asked for `query-status`.
    Qmp(PathBuf),
}

/// An open connection.
pub struct Client {
    stream: BufReader<UnixStream>,
    request: &'static str,
    answer: Answer,
}

/// How the end of an answer is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// By its length.
    Http,
    /// By its line, which is none of an event.
    Qmp,
}

const PING: &str = "GET /api/v1/vmm.ping HTTP/1.1\r\nHost: localhost\r\n\r\n";
const QUERY_STATUS: &str = "{\"execute\": \"query-status\"}\n";
const CAPABILITIES: &str = "{\"execute\": \"qmp_capabilities\"}\n";

impl Api {
    /// Connects. Reading gives up after `limit`.
    ///
    /// # Errors
    /// Nobody listens there yet, or the VMM is gone.
    pub fn connect(&self, limit: Duration) -> io::Result<Client> {
        let (Self::Http(path) | Self::Qmp(path)) = self;
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(limit))?;
        let mut client = Client {
            stream: BufReader::new(stream),
            request: PING,
            answer: Answer::Http,
        };
        if let Self::Qmp(_) = self {
            client.answer = Answer::Qmp;
            client.request = CAPABILITIES;
            client.read_line()?;
            client.ask()?;
            client.request = QUERY_STATUS;
        }
        Ok(client)
    }
}

impl Client {
    /// Asks, and returns how long the answer took.
    ///
    /// # Errors
    /// The VMM is gone, or answers otherwise than it should.
    pub fn ask(&mut self) -> io::Result<Duration> {
        let start = clock::now();
        self.stream.get_mut().write_all(self.request.as_bytes())?;
        match self.answer {
            Answer::Http => self.read_response()?,
            Answer::Qmp => while !self.read_line()?.contains("\"return\"") {},
        }
        Ok(clock::now().saturating_sub(start))
    }

    fn read_response(&mut self) -> io::Result<()> {
        let status = self.read_line()?;
        if !status.starts_with("HTTP/1.1 200 ") {
            let what = format!("the answer is no 200: {status:?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        let mut length = 0;
        loop {
            let line = self.read_line()?.to_ascii_lowercase();
            match line.split_once(':') {
                Some(("content-length", value)) => {
                    length = value.trim().parse().map_err(io::Error::other)?;
                }
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; usize::try_from(MAX_ANSWER.min(length)).map_err(io::Error::other)?];
        self.stream.read_exact(&mut body)
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        (&mut self.stream).take(MAX_ANSWER).read_line(&mut line)?;
        if line.ends_with('\n') {
            Ok(line)
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixListener, thread};

    use super::*;

    /// A VMM that says `greeting`, and answers the lines that end a request in turn.
    fn serve(api: &Api, greeting: &'static str, end: &'static str, answers: Vec<&'static str>) {
        let (Api::Http(path) | Api::Qmp(path)) = api;
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
            let mut requests = BufReader::new(stream.try_clone().unwrap());
            for answer in answers {
                let mut line = String::new();
                while !line.ends_with(end) {
                    assert!(requests.read_line(&mut line).unwrap() > 0);
                }
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
    }

    #[test]
    fn answers_are_read_whole_on_one_connection() {
        let directory = tempfile::tempdir().unwrap();
        let limit = Duration::from_secs(60);
        let ours = Api::Http(directory.path().join("http"));
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        let bad = "HTTP/1.1 404 Not Found\r\n\r\n";
        serve(&ours, "", "\r\n\r\n", vec![answer, answer, bad]);
        let mut client = ours.connect(limit).unwrap();
        client.ask().unwrap();
        client.ask().unwrap();
        assert!(client.ask().is_err());

        let theirs = Api::Qmp(directory.path().join("qmp"));
        let event = "{\"event\": \"RESUME\"}\n{\"return\": {}}\n";
        serve(
            &theirs,
            "{\"QMP\": {}}\n",
            "\n",
            vec!["{\"return\": {}}\n", event],
        );
        let mut client = theirs.connect(limit).unwrap();
        client.ask().unwrap();
        assert!(client.ask().is_err(), "an answer of a VMM that is gone");
    }
}
