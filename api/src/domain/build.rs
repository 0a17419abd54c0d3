//! What a template is to be built from, and how it is going.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;

use super::template::Settings;

/// How much progress of one build is kept, in bytes; what comes later is dropped, but for the end.
const MAX_PROGRESS: usize = 1 << 20;
/// The longest line of progress, in bytes; a longer one is cut.
const MAX_LINE: usize = 4096;

/// A template to build.
#[derive(Debug)]
pub struct BuildSpec {
    /// Its name.
    pub name: String,
    /// What it is made from.
    pub from: BuildFrom,
    /// What sandboxes of it have.
    pub settings: Settings,
}

/// What a template is built from.
#[derive(Debug)]
pub enum BuildFrom {
    /// The disk of a sandbox that runs or is paused, by its id.
    Sandbox(String),
    /// Steps in a sandbox of another template.
    Recipe(Recipe),
    /// An OCI image.
    Oci {
        /// A tar file that holds it.
        archive: std::fs::File,
        /// Size of the disk, in MiB.
        disk_mb: i64,
    },
}

/// How to make a template of another.
#[derive(Debug)]
pub struct Recipe {
    /// The other.
    pub base: String,
    /// A tar file whose regular files are written to the paths that they have in it.
    pub files: Option<std::fs::File>,
    /// What is run after that, in this order.
    pub steps: Vec<Step>,
}

/// One command of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// A command for `/bin/sh -c`.
    pub run: String,
    /// Seconds that it may take.
    pub timeout_sec: i64,
}

/// The progress of a build, as lines; clones share it.
#[derive(Debug, Clone)]
pub struct Progress {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lines: Mutex<Lines>,
    /// How many lines there are, and whether no more will come.
    state: watch::Sender<(usize, bool)>,
}

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    bytes: usize,
}

impl Default for Progress {
    fn default() -> Self {
        let inner = Inner {
            lines: Mutex::default(),
            state: watch::Sender::new((0, false)),
        };
        Self {
            inner: Arc::new(inner),
        }
    }
}

impl Progress {
    /// Adds a line.
    pub fn say(&self, line: &str) {
        self.push(line, MAX_PROGRESS);
    }

    /// Adds the last line.
    pub fn end(&self, line: &str) {
        // There is always room for this one.
        self.push(line, usize::MAX);
        self.inner.state.send_modify(|(_, is_over)| *is_over = true);
    }

    fn push(&self, line: &str, most: usize) {
        let line = &line[..line.floor_char_boundary(MAX_LINE)];
        let mut kept = self.lock();
        if kept.bytes > most {
            return;
        }
        kept.bytes += line.len() + 1;
        kept.lines.push(line.to_owned());
        if kept.bytes > most {
            kept.lines
                .push("(what follows is not kept; the build goes on)".to_owned());
        }
        let count = kept.lines.len();
        drop(kept);
        self.inner.state.send_modify(|state| state.0 = count);
    }

    /// All lines, those that are still to come included.
    pub fn follow(&self) -> BoxStream<'static, String> {
        let state = (self.clone(), self.inner.state.subscribe(), 0);
        stream::unfold(state, async |(progress, mut changes, next)| {
            // The sender is in `progress`.
            let waited = changes.wait_for(|&(count, is_over)| count > next || is_over);
            drop(waited.await.ok()?);
            let line = progress.lock().lines.get(next)?.clone();
            Some((line, (progress, changes, next + 1)))
        })
        .boxed()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.inner
            .lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Output of a program, cut into lines of progress.
#[derive(Debug)]
pub struct OutputLines<'a> {
    progress: &'a Progress,
    rest: Vec<u8>,
}

impl<'a> OutputLines<'a> {
    /// Lines for `progress`.
    pub fn new(progress: &'a Progress) -> Self {
        Self {
            progress,
            rest: Vec::new(),
        }
    }

    /// Takes some output.
    pub fn push(&mut self, output: &Bytes) {
        for &byte in output {
            match byte {
                b'\n' | b'\r' => self.flush(),
                byte => {
                    self.rest.push(byte);
                    if self.rest.len() >= MAX_LINE {
                        self.flush();
                    }
                }
            }
        }
    }

    /// Tells what has no end of line yet.
    pub fn flush(&mut self) {
        if self.rest.is_empty() {
            return;
        }
        let line: String = String::from_utf8_lossy(&self.rest)
            .chars()
            // It is shown on terminals, and comes from strangers.
            .filter(|c| !c.is_control() || *c == '\t')
            .collect();
        self.progress.say(&line);
        self.rest.clear();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn whoever_follows_gets_all_lines_whenever_they_begin() {
        let progress = Progress::default();
        progress.say("one");
        let mut early = progress.follow();
        assert_eq!(early.next().await.as_deref(), Some("one"));
        assert!(early.next().now_or_never().is_none(), "it goes on");
        let late = progress.clone();
        let (lines, ()) = tokio::join!(early.collect::<Vec<_>>(), async move {
            late.say("two");
            tokio::task::yield_now().await;
            late.end("three");
        });
        assert_eq!(lines, ["two", "three"]);
        let all: Vec<_> = progress.follow().collect().await;
        assert_eq!(all, ["one", "two", "three"]);
    }

    #[tokio::test]
    async fn progress_is_bounded_and_its_end_is_told() {
        let progress = Progress::default();
        let line = "x".repeat(MAX_LINE + 100);
        for _ in 0..1000 {
            progress.say(&line);
        }
        progress.end("the end");
        let all: Vec<_> = progress.follow().collect().await;
        let bytes: usize = all.iter().map(String::len).sum();
        assert!(bytes < MAX_PROGRESS + 3 * MAX_LINE, "{bytes}");
        assert_eq!(all.last().map(String::as_str), Some("the end"));
        assert_eq!(all[0].len(), MAX_LINE);
    }

    #[tokio::test]
    async fn output_becomes_lines_without_control_characters() {
        let progress = Progress::default();
        let mut lines = OutputLines::new(&progress);
        for piece in [&b"a\nb"[..], b"c\r\n\x1b[31mred\xff", b""] {
            lines.push(&Bytes::from_static(piece));
        }
        lines.flush();
        lines.flush();
        progress.end("end");
        let all: Vec<_> = progress.follow().collect().await;
        assert_eq!(all, ["a", "bc", "[31mred\u{fffd}", "end"]);
    }
}
