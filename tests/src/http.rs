//! A blocking HTTP/1.1 client: one request a connection, bodies of any length, upgrades.
//!
//! The scenarios send what a well-behaved client would not, such as a foreign `Host`, and want
//! the bytes of the connection after an upgrade; both are plain here.

use std::io::{self, BufRead, BufReader, Read, Write};

use serde_json::Value;

/// The longest response head that is read, in bytes.
const MAX_HEAD: u64 = 64 * 1024;

/// A request without its body.
#[derive(Debug, Clone)]
pub struct Request {
    head: String,
    has_host: bool,
}

impl Request {
    /// A request.
    pub fn new(method: &str, target: &str) -> Self {
        Self {
            head: format!("{method} {target} HTTP/1.1\r\n"),
            has_host: false,
        }
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.has_host |= name.eq_ignore_ascii_case("host");
        self.head.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    /// Sends it with a body of `length` bytes, and reads the head of the answer.
    ///
    /// # Errors
    /// The connection broke off before the answer.
    ///
    /// # Panics
    /// The answer is no HTTP.
    pub fn send<S: Read + Write>(
        mut self,
        mut stream: S,
        body: impl Read,
        length: u64,
    ) -> io::Result<Response<S>> {
        if !self.has_host {
            self = self.header("Host", "localhost");
        }
        if !self.head.to_ascii_lowercase().contains("\r\nconnection:") {
            self = self.header("Connection", "close");
        }
        self = self.header("Content-Length", &length.to_string());
        self.head.push_str("\r\n");
        let sent = stream
            .write_all(self.head.as_bytes())
            .and_then(|()| io::copy(&mut body.take(length), &mut stream));
        match sent {
            Ok(count) => assert_eq!(count, length, "length of the body to send"),
            // A server that refuses a body may close before it has read it all; what it
            // answered is there to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
        Response::read(stream)
    }
}

/// An answer, whose body is read from the connection as it is asked for.
pub struct Response<S> {
    /// The status.
    pub status: u16,
    headers: Vec<(String, String)>,
    stream: BufReader<S>,
    body: Framing,
}

/// How the end of a body is found (RFC 9112, section 6).
#[derive(Debug, Clone, Copy)]
enum Framing {
    Length(u64),
    /// Bytes left of the current chunk.
    Chunked(u64),
    UntilClose,
    Ended,
}

impl<S: Read> Response<S> {
    fn read(stream: S) -> io::Result<Self> {
        let mut stream = BufReader::with_capacity(64 * 1024, stream);
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if (&mut stream).take(MAX_HEAD).read_until(b'\n', &mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut parsed = httparse::Response::new(&mut headers);
        parsed
            .parse(&head)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&head)));
        let status = parsed.code.unwrap();
        let headers: Vec<(String, String)> = parsed
            .headers
            .iter()
            .map(|header| {
                let value = String::from_utf8_lossy(header.value).into_owned();
                (header.name.to_ascii_lowercase(), value)
            })
            .collect();
        let mut response = Self {
            status,
            headers,
            stream,
            body: Framing::UntilClose,
        };
        response.body = if matches!(status, 101 | 204) {
            Framing::Ended
        } else if response.header("transfer-encoding") == Some("chunked") {
            Framing::Chunked(0)
        } else if let Some(length) = response.header("content-length") {
            Framing::Length(length.parse().expect("a Content-Length"))
        } else {
            Framing::UntilClose
        };
        Ok(response)
    }

    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(other, _)| other == name);
        header.map(|(_, value)| value.as_str())
    }

    /// All of the body.
    ///
    /// # Panics
    /// The connection breaks off.
    pub fn bytes(mut self) -> Vec<u8> {
        let mut body = Vec::new();
        self.read_to_end(&mut body).expect("the rest of the body");
        body
    }

    /// All of the body as text.
    ///
    /// # Panics
    /// It is not UTF-8, or the connection breaks off.
    pub fn text(self) -> String {
        String::from_utf8(self.bytes()).expect("UTF-8")
    }

    /// All of the body as JSON; null if there is none.
    ///
    /// # Panics
    /// It is not JSON, or the connection breaks off.
    pub fn json(self) -> Value {
        let body = self.bytes();
        if body.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&body)))
    }

    /// The connection after the head, and what of it has been read already.
    pub fn into_stream(self) -> (S, Vec<u8>) {
        let read = self.stream.buffer().to_vec();
        (self.stream.into_inner(), read)
    }

    /// The size of the next chunk.
    fn next_chunk(&mut self) -> io::Result<u64> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let size = line.trim_end().split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(size, 16)
            .map_err(|_| io::Error::other(format!("no chunk begins with {line:?}")))?;
        if size == 0 {
            // Trailers, and the empty line that ends them.
            while line != "\r\n" {
                line.clear();
                if self.stream.read_line(&mut line)? == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
        Ok(size)
    }
}

impl<S: Read> Read for Response<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if let Framing::Chunked(0) = self.body {
            self.body = match self.next_chunk()? {
                0 => Framing::Ended,
                size => Framing::Chunked(size),
            };
        }
        let limit = match self.body {
            Framing::Ended | Framing::Length(0) => return Ok(0),
            Framing::UntilClose => u64::MAX,
            Framing::Length(left) | Framing::Chunked(left) => left,
        };
        let count = (&mut self.stream).take(limit).read(buffer)?;
        let left = limit - count as u64;
        match &mut self.body {
            Framing::UntilClose if count == 0 => self.body = Framing::Ended,
            Framing::UntilClose | Framing::Ended => {}
            _ if count == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Framing::Length(length) => *length = left,
            Framing::Chunked(chunk) => {
                *chunk = left;
                if left == 0 {
                    self.stream.read_exact(&mut [0; 2])?;
                }
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(answer: &str) -> io::Result<(u16, String)> {
        let mut response = Response::read(answer.as_bytes())?;
        let mut text = String::new();
        response.read_to_string(&mut text)?;
        Ok((response.status, text))
    }

    #[test]
    fn the_end_of_a_body_is_found() {
        for (answer, status, text) in [
            ("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nabc", 200, "ab"),
            (
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\n\r\nd",
                200,
                "abc",
            ),
            ("HTTP/1.1 204 No Content\r\n\r\nabc", 204, ""),
            ("HTTP/1.1 404 Not Found\r\n\r\nabc", 404, "abc"),
        ] {
            assert_eq!(body(answer).unwrap(), (status, text.to_owned()), "{answer}");
        }
    }

    #[test]
    fn a_body_that_breaks_off_is_an_error() {
        for answer in [
            "",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nab",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        ] {
            assert!(body(answer).is_err(), "{answer}");
        }
    }
}
