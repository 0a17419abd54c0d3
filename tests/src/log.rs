//! What a process says, followed as it says it.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crate::PATIENCE;

/// Everything that was read from a pipe or terminal so far. Clones are the same log.
#[derive(Clone)]
pub struct Log {
    name: Arc<str>,
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Log {
    /// Reads `source` to its end on a thread of its own.
    pub fn follow(name: &str, mut source: impl Read + Send + 'static) -> Self {
        let log = Self {
            name: name.into(),
            shared: Arc::default(),
        };
        let writer = log.clone();
        thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            loop {
                // A terminal whose other side is gone gives EIO, which is its end.
                let count = source.read(&mut buffer).unwrap_or(0);
                let mut state = writer.lock();
                state.bytes.extend_from_slice(&buffer[..count]);
                state.ended |= count == 0;
                writer.shared.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        log
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// All of it, once it has ended.
    ///
    /// # Panics
    /// It does not end.
    pub fn whole_text(&self) -> String {
        self.wait(|_, ended| ended.then_some(()), "its end");
        self.text()
    }

    /// Waits for a line for which `find` gives something, and returns that.
    ///
    /// # Panics
    /// No such line comes.
    pub fn wait_for_line<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        self.wait(|text, _| text.lines().find_map(&find), what)
    }

    /// Waits for something that `find` finds in all of it.
    ///
    /// # Panics
    /// It does not come.
    pub fn wait_for_text<T>(&self, what: &str, find: impl Fn(&str) -> Option<T>) -> T {
        self.wait(|text, _| find(text), what)
    }

    /// Waits until `text` has been said.
    ///
    /// # Panics
    /// It is not.
    pub fn wait_for(&self, text: &str) {
        self.wait(|all, _| all.contains(text).then_some(()), text);
    }

    fn wait<T>(&self, find: impl Fn(&str, bool) -> Option<T>, what: &str) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            let text = String::from_utf8_lossy(&state.bytes);
            if let Some(found) = find(&text, state.ended) {
                return found;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let why = if state.ended { "ended" } else { "went on" };
                let text = text.into_owned();
                drop(state);
                panic!("{} {why} without {what:?}:\n{}", self.name, tail(&text));
            }
            state = self
                .shared
                .1
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Prints its last lines.
    pub fn print_tail(&self) {
        print_tail(&self.name, &self.text());
    }
}

/// Prints the last lines of something, for whoever looks into a failure.
pub fn print_tail(name: &str, text: &str) {
    eprintln!("--- last lines of {name}:\n{}", tail(text));
}

fn tail(text: &str) -> String {
    const LINES: usize = 40;
    const LINE: usize = 400;
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    let short = last
        .iter()
        .map(|line| &line[..line.floor_char_boundary(LINE)]);
    short.collect::<Vec<_>>().join("\n")
}
