//! Walks of the files of a guest.

use agent_protocol::{ErrorCode, PATH_WALK, WalkCut as Cut, WalkLine, WalkRequest};
use bytes::BytesMut;
use futures_util::StreamExt;
use futures_util::stream;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::directories::{MAX_LINE, info_in, timely};
use super::{AgentClient, failure, host_error, request, unreachable};
use crate::domain::{HostError, WalkCut, WalkSpec, WalkStep, WalkSteps};

impl AgentClient {
    /// Walks a directory; see [`Host::walk`](crate::domain::Host::walk).
    ///
    /// # Errors
    /// There is no such directory.
    pub async fn walk(&self, spec: &WalkSpec) -> Result<Option<WalkSteps>, HostError> {
        let asked = WalkRequest {
            path: spec.path.clone(),
            max_entries: spec.max_entries,
            max_depth: spec.max_depth,
            max_bytes: spec.max_bytes,
            other_file_systems: false,
            skip: spec.skip.clone(),
        };
        let request = request::post(PATH_WALK, &asked)?;
        let mut sender = self.connect().await?;
        let response = timely(sender.send_request(request))
            .await?
            .map_err(|error| unreachable("it did not answer", &error))?;
        if !response.status().is_success() {
            let detail = failure(response).await;
            return match detail.code {
                ErrorCode::UnknownOperation => Ok(None),
                _ => Err(host_error(detail, &spec.path)),
            };
        }
        let answer = Answer {
            body: response.into_body(),
            waiting: BytesMut::new(),
            // The end is told whatever was asked for.
            left: spec.max_bytes.saturating_add(MAX_LINE as u64),
            directory: String::new(),
        };
        let steps = stream::unfold(Some(answer), |answer| async {
            let mut answer = answer?;
            match answer.next().await {
                Ok(Some(step @ WalkStep::Cut(_))) => Some((Ok(step), None)),
                Ok(Some(step)) => Some((Ok(step), Some(answer))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(Some(steps.boxed()))
    }
}

/// An answer as it comes.
struct Answer {
    body: Incoming,
    /// What has come and was not read.
    waiting: BytesMut,
    /// How many bytes may come.
    left: u64,
    /// The directory whose entries come.
    directory: String,
}

impl Answer {
    /// The next step; `None` at the end of a whole walk.
    async fn next(&mut self) -> Result<Option<WalkStep>, HostError> {
        loop {
            let line = self.line().await?;
            let line = serde_json::from_slice(&line)
                .map_err(|error| unreachable("its walk makes no sense", &error))?;
            return Ok(Some(match line {
                WalkLine::Directory(path) => {
                    self.directory = path;
                    continue;
                }
                WalkLine::Entry(entry) => WalkStep::Entry(info_in(&self.directory, entry)),
                WalkLine::Unreadable(path) => WalkStep::Unreadable(path),
                WalkLine::End { cut: None } => return Ok(None),
                WalkLine::End { cut: Some(cut) } => WalkStep::Cut(match cut {
                    Cut::Entries => WalkCut::Entries,
                    Cut::Depth => WalkCut::Depth,
                    Cut::Directories | Cut::Bytes | Cut::Other => WalkCut::Size,
                }),
            }));
        }
    }

    async fn line(&mut self) -> Result<BytesMut, HostError> {
        let broken = |reason: &str| HostError::AgentUnreachable {
            reason: reason.to_owned(),
        };
        let mut seen = 0;
        loop {
            let end = self.waiting[seen..].iter().position(|&byte| byte == b'\n');
            if let Some(end) = end {
                return Ok(self.waiting.split_to(seen + end + 1));
            }
            seen = self.waiting.len();
            if seen > MAX_LINE {
                return Err(broken("its walk has a line without an end"));
            }
            let frame = timely(self.body.frame()).await?;
            let frame = frame.ok_or_else(|| broken("its walk ended before it was over"))?;
            let frame = frame.map_err(|error| unreachable("the walk broke off", &error))?;
            if let Ok(bytes) = frame.into_data() {
                let left = self.left.checked_sub(bytes.len() as u64);
                self.left = left.ok_or_else(|| broken("its walk is longer than was asked for"))?;
                self.waiting.extend_from_slice(&bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::stand_in::answering;
    use super::*;

    const SPEC: u64 = 1000;

    /// What comes of a walk whose agent answers with this.
    async fn walk(status: &str, body: &str) -> Result<Option<Vec<WalkStep>>, HostError> {
        let agent = answering(status, body);
        let spec = WalkSpec {
            path: "/".to_owned(),
            max_entries: 10,
            max_depth: 2,
            max_bytes: SPEC,
            skip: vec!["/proc".to_owned()],
        };
        let steps = AgentClient::new(agent.socket).walk(&spec).await;
        let steps = match steps? {
            Some(steps) => Some(steps.collect::<Vec<_>>().await),
            None => None,
        };
        let order = agent.asked.await.unwrap();
        let order: WalkRequest = serde_json::from_slice(&order).unwrap();
        assert_eq!((order.path, order.max_entries), (spec.path, 10));
        assert_eq!((order.max_depth, order.skip), (2, spec.skip));
        steps.map(|steps| steps.into_iter().collect()).transpose()
    }

    fn file(directory: &str, name: &str) -> String {
        format!(
            "{{\"directory\":\"{directory}\"}}\n{{\"entry\":{{\"name\":\"{name}\",\"kind\":\"file\",\
             \"mode\":420,\"uid\":1,\"gid\":2,\"size\":3,\"mtime_us\":4}}}}\n"
        )
    }

    #[tokio::test]
    async fn steps_are_told_up_to_the_end() {
        let lines = format!(
            "{}{}{{\"unreadable\":\"/c\"}}\n{{\"end\":{{\"cut\":\"depth\"}}}}\n",
            file("/", "a"),
            file("/b", "a")
        );
        let steps = walk("200 OK", &lines).await.unwrap().unwrap();
        let paths: Vec<_> = steps
            .iter()
            .map(|step| match step {
                WalkStep::Entry(entry) => entry.path.as_str(),
                WalkStep::Unreadable(path) => path.as_str(),
                WalkStep::Cut(_) => "cut",
            })
            .collect();
        assert_eq!(paths, ["/a", "/b/a", "/c", "cut"]);
        assert_eq!(steps[3], WalkStep::Cut(WalkCut::Depth));
        let steps = walk("200 OK", "{\"end\":{}}\n").await;
        assert_eq!(steps, Ok(Some(Vec::new())));
    }

    #[tokio::test]
    async fn an_agent_that_is_too_old_is_no_error() {
        let unknown = r#"{"error":{"code":"unknown_operation","message":"m"}}"#;
        assert_eq!(walk("404 Not Found", unknown).await, Ok(None));
        let none = r#"{"error":{"code":"not_found","message":"m"}}"#;
        let path = "/".to_owned();
        let gone = Err(HostError::FileNotFound { path });
        assert_eq!(walk("404 Not Found", none).await, gone);
    }

    #[tokio::test]
    async fn an_agent_that_does_not_keep_to_the_rules_is_not_listened_to() {
        let long = "x".repeat(MAX_LINE + 1);
        let many = file("/", "a").repeat(MAX_LINE / 100 + 10);
        for (lines, problem) in [
            (file("/", "a"), "ended before"),
            ("{}\n".to_owned(), "no sense"),
            ("{\"end\":{}}".to_owned(), "ended before"),
            (long, "line without an end"),
            (many, "longer than was asked"),
        ] {
            let error = walk("200 OK", &lines).await.unwrap_err();
            let HostError::AgentUnreachable { reason } = error else {
                unreachable!("{error:?}");
            };
            assert!(reason.contains(problem), "{reason}");
        }
    }
}
