//! How long it takes from the moment that a program in a sandbox writes a byte until the client of
//! `/exec/stream` has it.
//!
//! Two clocks are compared, so it is told first how far they are apart. The client writes a line to the
//! program, and the program answers with its time. By its clock that was after the line was sent and before
//! the answer came, by the client's too: each such round bounds the difference of the clocks from both
//! sides, and that of the closest bounds of all rounds is in the middle between them, give or take half of
//! their distance. Then the program writes by itself, with pauses, its time each time.

use std::net::TcpStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

/// Rounds by which the clocks are compared.
const ROUNDS: usize = 20;
/// How often the program writes by itself.
const WRITES: usize = 10;
/// How long it may stay silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// What was measured, in milliseconds.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Latencies {
    /// From a write in the guest to the client.
    pub one_way: Vec<f64>,
    /// From the client to the program and back.
    pub round_trip: Vec<f64>,
    /// By how much each of `one_way` may be wrong.
    pub uncertainty: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No connection.
    #[error("no connection to the daemon")]
    Connect(#[from] std::io::Error),
    /// The WebSocket was refused or broke off.
    #[error("the stream")]
    Socket(#[source] Box<tungstenite::Error>),
    /// Something else was told than a time.
    #[error("the program told no time but {0}")]
    NoTime(String),
    /// The program's times contradict each other.
    #[error("the clock of the guest was set meanwhile")]
    ClockWasSet,
}

impl From<tungstenite::Error> for StreamError {
    fn from(source: tungstenite::Error) -> Self {
        Self::Socket(Box::new(source))
    }
}

/// A round by which the clocks are compared, in milliseconds, each by the clock of who was there.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Round {
    sent: f64,
    answered: f64,
    received: f64,
}

/// How much later it is by the guest's clock, and by how much that may be wrong; `None` if no difference
/// fits all rounds.
fn difference(rounds: &[Round]) -> Option<(f64, f64)> {
    let least = rounds.iter().map(|round| round.answered - round.received);
    let most = rounds.iter().map(|round| round.answered - round.sent);
    let least = least.fold(f64::NEG_INFINITY, f64::max);
    let most = most.fold(f64::INFINITY, f64::min);
    (least <= most).then_some(((least + most) / 2.0, (most - least) / 2.0))
}

fn now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs_f64() * 1000.0
}

/// Measures in this sandbox of the daemon at this address.
///
/// # Errors
/// Nothing was measured.
pub fn measure(address: &str, sandbox: &str) -> Result<Latencies, StreamError> {
    let script = format!(
        "for ((i = 0; i < {ROUNDS}; i++)); do read -r; echo $EPOCHREALTIME; done
         for ((i = 0; i < {WRITES}; i++)); do sleep 0.2; echo $EPOCHREALTIME; done"
    );
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let uri = format!("ws://{address}/v1/sandboxes/{sandbox}/exec/stream");
    let (mut socket, _) = tungstenite::client(uri, stream).map_err(|error| match error {
        tungstenite::HandshakeError::Failure(error) => error,
        tungstenite::HandshakeError::Interrupted(_) => tungstenite::Error::AlreadyClosed,
    })?;
    let start = json!({"type": "start", "cmd": "/bin/bash", "args": ["-c", script], "stdin": true});
    socket.send(Message::text(start.to_string()))?;
    let mut rounds = Vec::with_capacity(ROUNDS);
    let line = json!({"type": "stdin", "data": "\n"}).to_string();
    for _ in 0..ROUNDS {
        let sent = now();
        socket.send(Message::text(line.clone()))?;
        let answered = time(&mut socket)?;
        let received = now();
        rounds.push(Round {
            sent,
            answered,
            received,
        });
    }
    let (later, uncertainty) = difference(&rounds).ok_or(StreamError::ClockWasSet)?;
    let mut one_way = Vec::with_capacity(WRITES);
    for _ in 0..WRITES {
        let written = time(&mut socket)?;
        one_way.push(now() - (written - later));
    }
    Ok(Latencies {
        one_way,
        round_trip: rounds
            .iter()
            .map(|round| round.received - round.sent)
            .collect(),
        uncertainty,
    })
}

/// The next time that the program tells.
fn time(socket: &mut WebSocket<TcpStream>) -> Result<f64, StreamError> {
    loop {
        let Message::Text(text) = socket.read()? else {
            continue;
        };
        let told: Value = serde_json::from_str(&text).unwrap_or_default();
        if told["type"] == "start" {
            continue;
        }
        let data = told["data"].as_str().unwrap_or_default();
        let seconds: Option<f64> = data.trim().parse().ok();
        return match (told["type"].as_str(), seconds) {
            (Some("stdout"), Some(seconds)) => Ok(seconds * 1000.0),
            _ => Err(StreamError::NoTime(text.to_string())),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(sent: f64, answered: f64, received: f64) -> Round {
        Round {
            sent,
            answered,
            received,
        }
    }

    #[test]
    fn the_closest_bounds_tell_how_far_the_clocks_are_apart() {
        // The guest's clock is 1000 ahead; there takes 2, back 4; once there 20, once back 30.
        let rounds = [
            round(0.0, 1002.0, 6.0),
            round(10.0, 1030.0, 34.0),
            round(40.0, 1042.0, 72.0),
        ];
        let (later, uncertainty) = difference(&rounds).unwrap();
        assert!((later - 999.0).abs() < 1e-9 && (uncertainty - 3.0).abs() < 1e-9);
        assert!((later - 1000.0).abs() <= uncertainty);
        // A clock that was set in between fits no difference.
        let set = [round(0.0, 1002.0, 6.0), round(10.0, 2002.0, 16.0)];
        assert_eq!(difference(&set), None);
    }
}
