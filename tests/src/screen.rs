//! What a person sees on a terminal in a sandbox.

use std::num::NonZero;
use std::time::Instant;

use serde_json::{Value, json};

use crate::PATIENCE;
use crate::daemon::{Daemon, Sandbox};
use crate::socket::Socket;

/// A terminal, drawn from what is written to it.
pub struct Screen {
    socket: Socket,
    parser: vt100::Parser,
}

impl Screen {
    /// Runs a program on a terminal of so many rows and columns.
    ///
    /// # Panics
    /// It is not started.
    pub fn open(
        daemon: &Daemon,
        sandbox: &Sandbox<'_>,
        (rows, cols): (u16, u16),
        argv: &[&str],
        envs: &Value,
    ) -> Self {
        let mut socket = Socket::open(daemon, &sandbox.path("/pty"));
        socket.say(
            &json!({"type": "start", "cmd": argv[0], "args": &argv[1..], "envs": envs,
                           "rows": rows, "cols": cols}),
        );
        let started = socket.receive().unwrap();
        assert_eq!(started["type"], "started", "{started}");
        Self {
            socket,
            parser: vt100::Parser::new(at_least_one(rows), at_least_one(cols), 0),
        }
    }

    /// Types.
    ///
    /// # Panics
    /// The socket is closed.
    pub fn type_in(&mut self, bytes: &[u8]) {
        self.socket.type_in(bytes);
    }

    /// Makes it larger or smaller.
    ///
    /// # Panics
    /// The socket is closed.
    pub fn resize(&mut self, rows: u16, cols: u16) {
        let screen = self.parser.screen_mut();
        screen.set_size(at_least_one(rows), at_least_one(cols));
        let message = json!({"type": "resize", "rows": rows, "cols": cols});
        self.socket.say(&message);
    }

    /// Text of a row, without the blanks at its end.
    pub fn row(&self, row: u16) -> String {
        let (_, cols) = self.parser.screen().size();
        let mut rows = self.parser.screen().rows(0, cols.get());
        let row = rows.nth(row.into()).unwrap_or_default();
        row.trim_end().to_owned()
    }

    /// Text of the row that the cursor is in.
    pub fn line(&self) -> String {
        self.row(self.parser.screen().cursor_position().0)
    }

    /// All of it.
    pub fn text(&self) -> String {
        self.parser.screen().contents()
    }

    /// Whether a program has taken the whole screen, and will give it back.
    pub fn is_alternate(&self) -> bool {
        self.parser.screen().alternate_screen()
    }

    /// Waits until its program ends; returns the exit code.
    ///
    /// # Panics
    /// It does not end within [`PATIENCE`], or nobody tells how; the message has what it shows then.
    pub fn exit_code(mut self) -> i64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let told = self.socket.receive();
            match &told {
                Some(told) if told["type"] == "exit" => return told["exit_code"].as_i64().unwrap(),
                Some(_) if Instant::now() < deadline => {}
                _ => panic!("no end but {told:?}; the screen:\n{}\n--", self.text()),
            }
        }
    }

    /// Waits until it shows what is expected.
    ///
    /// # Panics
    /// It does not within [`PATIENCE`]; the message has what it shows then.
    pub fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        // Not the time of a single message: pings come also from a terminal that shows nothing new.
        let deadline = Instant::now() + PATIENCE;
        while !holds(self) {
            let output = match deadline.checked_duration_since(Instant::now()) {
                Some(_) => self.socket.output(),
                None => Err(format!("not within {PATIENCE:?}")),
            };
            match output {
                Ok(bytes) => self.parser.process(&bytes),
                Err(problem) => panic!("{what}: {problem}; the screen:\n{}\n--", self.text()),
            }
        }
    }
}

fn at_least_one(count: u16) -> NonZero<u16> {
    NonZero::new(count).expect("rows and columns")
}
