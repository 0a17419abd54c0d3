//! What a guest takes of what it has.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_protocol::{PATH_USAGE, Usage};
use hyper::client::conn::http1::SendRequest;
use hyper::{Response, StatusCode, body::Incoming};

use super::{AgentClient, Body, failure, host_error, request, unreachable};
use crate::domain::{GuestUsage, HostError};

/// How long an agent may take. A healthy one takes milliseconds; one whose guest stands still to be saved
/// may take as long as that, which nobody who looks at figures waits for.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a connection is kept for the next question: who looks at figures regularly does so every minute
/// at least.
const KEPT_FOR: Duration = Duration::from_secs(90);

/// The connection of the last question, if the agent has kept it open.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Option<(SendRequest<Body>, Instant)>>);

impl Kept {
    fn replace(
        &self,
        connection: Option<(SendRequest<Body>, Instant)>,
    ) -> Option<(SendRequest<Body>, Instant)> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut kept, connection)
    }

    /// Closes it if nobody has asked for a while.
    fn expire(&self, now: Instant) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_old = |(_, at): &mut (_, Instant)| now.saturating_duration_since(*at) >= KEPT_FOR;
        kept.take_if(is_old);
    }
}

impl AgentClient {
    /// What the guest takes of its memory and its root file system.
    ///
    /// # Errors
    /// It does not tell soon.
    pub async fn usage(&self) -> Result<GuestUsage, HostError> {
        tokio::time::timeout(PATIENCE, self.ask_usage())
            .await
            .map_err(|_| HostError::AgentUnreachable {
                reason: format!("it did not answer within {} s", PATIENCE.as_secs()),
            })?
    }

    /// Closes the connection that is kept for [`AgentClient::usage`] if that was not asked for lately.
    pub fn close_unused(&self, now: Instant) {
        self.kept.expire(now);
    }

    async fn ask_usage(&self) -> Result<GuestUsage, HostError> {
        let (sender, response) = self.send_usage().await?;
        if response.status() != StatusCode::OK {
            return Err(host_error(failure(response).await, "/"));
        }
        let usage: Usage = request::read_json(response).await?;
        self.kept.replace(Some((sender, Instant::now())));
        Ok(GuestUsage {
            cpus: usage.cpus,
            memory_total: usage.memory_total,
            memory_available: usage.memory_available,
            disk_total: usage.disk_total,
            disk_used: usage.disk_used,
            disk_available: usage.disk_available,
        })
    }

    /// On the connection that was kept, or on a new one: the guest may have been saved and gone on since, or
    /// its agent may be one that keeps none open.
    async fn send_usage(&self) -> Result<(SendRequest<Body>, Response<Incoming>), HostError> {
        if let Some((mut sender, _)) = self.kept.replace(None)
            && sender.ready().await.is_ok()
            && let Ok(response) = sender.send_request(request::get(PATH_USAGE)?).await
        {
            return Ok((sender, response));
        }
        let mut sender = self.connect().await?;
        let response = sender
            .send_request(request::get(PATH_USAGE)?)
            .await
            .map_err(|error| unreachable("it did not tell what is used", &error))?;
        Ok((sender, response))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    const ANSWER: &str = r#"{"cpus":1,"memory_total":4,"memory_available":3,"disk_total":9,"disk_used":5,"disk_available":2}"#;

    /// An agent that answers so many questions on a connection. It closes it with the last one, and says so
    /// beforehand or does not.
    async fn serve(stream: UnixStream, answers: usize, says_so: bool) {
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line).await.unwrap();
        assert!(line.starts_with("CONNECT "), "{line}");
        lines.write_all(b"OK 5\n").await.unwrap();
        for left in (0..answers).rev() {
            line.clear();
            while line != "\r\n" {
                line.clear();
                if lines.read_line(&mut line).await.unwrap() == 0 {
                    return;
                }
            }
            let close = match left == 0 && says_so {
                true => "connection: close\r\n",
                false => "",
            };
            let length = ANSWER.len();
            let answer =
                format!("HTTP/1.1 200 OK\r\n{close}content-length: {length}\r\n\r\n{ANSWER}");
            lines.write_all(answer.as_bytes()).await.unwrap();
        }
    }

    /// How many connections it takes to ask so often.
    async fn connections(questions: usize, answers: usize, says_so: bool, expire: bool) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let client = AgentClient::new(path.clone());
        let asked = async {
            for _ in 0..questions {
                assert_eq!(client.usage().await.unwrap().disk_used, 5);
                if expire {
                    client.close_unused(Instant::now() + KEPT_FOR / 2);
                    assert!(client.kept.0.lock().unwrap().is_some());
                    client.close_unused(Instant::now() + KEPT_FOR);
                }
            }
        };
        tokio::pin!(asked);
        let mut count = 0;
        let mut agents = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                () = &mut asked => return count,
                accepted = listener.accept() => {
                    count += 1;
                    agents.spawn(serve(accepted.unwrap().0, answers, says_so));
                }
            }
        }
    }

    #[tokio::test]
    async fn a_connection_is_kept_for_the_next_question_as_long_as_the_agent_does() {
        assert_eq!(connections(5, 100, true, false).await, 1);
        // As agents did that take one request on each.
        assert_eq!(connections(5, 1, true, false).await, 5);
        assert_eq!(connections(6, 2, false, false).await, 3);
        assert_eq!(connections(3, 100, true, true).await, 3);
    }
}
