//! What a client sends to the API, with fake machines behind it: any bytes on a connection, or, if the
//! first of them is zero, proper requests with any bodies. Each request is then the number of a
//! route and a body, up to the next zero.
#![no_main]

use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;
use vmm::api::routes::{ROUTES, Route};
use vmm::api::{ApiServer, ApiTarget, BASE_PATH, Listener};
use vmm::control::Control;
use vmm::control::request::{Action, Mailbox};
use vmm::control::testing::{Ending, FakeLauncher, Journal};
use vmm::events::EventStream;
use vmm::signals::Signals;
use vmm_fuzz::ignore_sigpipe;

const PING: &[u8] = b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n";

/// The most requests on one connection that are waited for.
const MAX_REQUESTS: usize = 8;

thread_local! {
    static BENCH: RefCell<Option<Bench>> = const { RefCell::new(None) };
}

fuzz_target!(init: ignore_sigpipe(), |input: &[u8]| {
    let framed = match input {
        [0, requests @ ..] => Cow::Owned(requests.split(|byte| *byte == 0).flat_map(frame).collect()),
        _ => Cow::Borrowed(input),
    };
    BENCH.with_borrow_mut(|bench| {
        let alive = bench.get_or_insert_with(Bench::new).converse(&framed);
        if !alive && let Some(ended) = bench.take() {
            ended.owner.join().unwrap();
        }
    });
});

/// A request of the route that the first byte names, with the rest as its body.
fn frame(request: &[u8]) -> Vec<u8> {
    let Some((number, body)) = request.split_first() else {
        return Vec::new();
    };
    let Route { method, name, .. } = &ROUTES[usize::from(*number) % ROUTES.len()];
    let mut bytes = format!("{method} {BASE_PATH}{name} HTTP/1.1\r\n").into_bytes();
    if !body.is_empty() {
        bytes.extend(format!("Content-Length: {}\r\n", body.len()).into_bytes());
    }
    bytes.extend(b"\r\n");
    bytes.extend(body);
    bytes
}

/// A VMM without a machine, on threads as in the program.
struct Bench {
    directory: TempDir,
    mailbox: Mailbox,
    journal: Journal,
    endings: Receiver<Ending>,
    /// A client that is answered whatever the others say.
    pinging: BufReader<UnixStream>,
    owner: JoinHandle<()>,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let target = ApiTarget::Path(directory.path().join("api.sock"));
        let listener = Listener::open(&target).unwrap();
        let (started, ready) = channel();
        let owner = thread::spawn(move || {
            let (launcher, endings) = FakeLauncher::new();
            let journal = launcher.journal.clone();
            let events = EventStream::new(Instant::now(), None);
            let signals = Signals::new().unwrap();
            let control = Control::new(launcher, events, false).unwrap();
            let mailbox = control.mailbox();
            let _server = ApiServer::start(listener, mailbox.clone(), 1).unwrap();
            started.send((mailbox, journal, endings)).unwrap();
            control.run(&signals);
        });
        let (mailbox, journal, endings) = ready.recv().unwrap();
        let pinging = BufReader::new(connect(&directory));
        Self {
            directory,
            mailbox,
            journal,
            endings,
            pinging,
            owner,
        }
    }

    /// Says `input` on a connection and reads the answers. Returns whether the VMM goes on.
    fn converse(&mut self, input: &[u8]) -> bool {
        let mut client = connect(&self.directory);
        // A server that has answered already may not read all of it.
        let _ = client.write_all(input);
        // A client that goes away takes its unanswered requests with it, so each gets its time:
        // the server reads it, the owner of the machine answers, the server passes that on.
        let requests = input.windows(6).filter(|bytes| bytes == b"HTTP/1").count();
        let mut alive = true;
        for _ in 0..requests.min(MAX_REQUESTS) {
            alive = alive && self.ping() && self.ask(Action::Info).is_some() && self.ping();
        }
        let _ = client.shutdown(Shutdown::Write);
        let mut answers = Vec::new();
        // A server that does not like what it read may cut the connection off.
        let _ = client.read_to_end(&mut answers);
        assert!(answers.is_empty() || answers.starts_with(b"HTTP/1."));
        // The next input finds no machine.
        let alive = alive && self.ask(Action::Delete).is_some();
        self.journal.lock().unwrap().clear();
        while self.endings.try_recv().is_ok() {}
        alive
    }

    /// Whether the server lives. Waits until it has done what it was at.
    fn ping(&mut self) -> bool {
        if self.pinging.get_mut().write_all(PING).is_err() {
            return false;
        }
        let mut length = 0;
        loop {
            let mut line = String::new();
            if !matches!(self.pinging.read_line(&mut line), Ok(1..)) {
                return false;
            }
            if let Some(number) = line.strip_prefix("Content-Length: ") {
                length = number.trim_end().parse().unwrap();
            }
            if line == "\r\n" {
                let mut body = vec![0; length];
                return self.pinging.read_exact(&mut body).is_ok();
            }
        }
    }

    /// Asks the owner of the machine and waits for its answer. `None` if it has ended.
    fn ask(&self, action: Action) -> Option<()> {
        let (sender, answer) = channel();
        let reply = Box::new(move |_| sender.send(()).unwrap_or_default());
        self.mailbox.ask(action, reply);
        answer.recv().ok()
    }
}

fn connect(directory: &TempDir) -> UnixStream {
    UnixStream::connect(directory.path().join("api.sock")).unwrap()
}
