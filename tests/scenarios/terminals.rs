//! Programs that take the whole screen, on terminals in sandboxes: what a person would see.

use e2e_tests::daemon::Daemon;
use e2e_tests::screen::Screen;
use e2e_tests::setup::setup;
use serde_json::json;

/// What the shell shows when it can be typed to.
const PROMPT: &str = "ready>";

fn at_prompt(screen: &Screen) -> bool {
    screen.line() == PROMPT && !screen.is_alternate()
}

#[test]
fn programs_that_take_the_screen_behave() {
    let daemon = Daemon::start();
    let sandbox = daemon.create(&json!({"memory_mb": 192}));
    let envs = json!({"PS1": format!("{PROMPT} "), "LC_ALL": "C.UTF-8"});
    let argv = ["/bin/bash", "--norc"];
    let mut screen = Screen::open(&daemon, &sandbox, (24, 80), &argv, &envs);
    screen.until("a prompt", at_prompt);

    screen.type_in(b"top\r");
    screen.until("a list of processes", |screen| {
        let text = screen.text();
        text.contains("Tasks:") && text.contains("PID USER") && text.contains("top")
    });
    screen.type_in(b"q");
    screen.until("a prompt after top", at_prompt);

    screen.type_in(b"vi /root/text\r");
    screen.until("an empty file", |screen| {
        screen.row(1) == "~" && screen.row(22) == "~" && screen.row(23).contains("text\" [New")
    });
    screen.resize(30, 100);
    screen.until("a longer screen", |screen| screen.row(28) == "~");
    // The bytes of a character come apart.
    screen.type_in(b"iwritten \xc3");
    screen.type_in(b"\xbc \xf0\x9f\xa6");
    screen.type_in(b"\x80");
    screen.until("what was typed", |screen| {
        screen.row(0) == "written \u{fc} \u{1f980}"
    });
    screen.type_in(b"\x1b");
    screen.type_in(b":wq\r");
    screen.until("a prompt after vi", at_prompt);
    assert_eq!(sandbox.must("cat /root/text"), "written \u{fc} \u{1f980}");
    sandbox.delete();
}

#[test]
fn a_session_of_python_behaves() {
    let template = format!("python={}", setup().python_template.display());
    let daemon = Daemon::start_with(&["--template", &template]);
    let sandbox = daemon.create(&json!({"template": "python", "memory_mb": 256}));
    let mut screen = Screen::open(&daemon, &sandbox, (24, 80), &["python3"], &json!({}));
    let at_prompt = |screen: &Screen| screen.line() == ">>>";
    let shows = |screen: &Screen, line: &str| screen.text().lines().any(|shown| shown == line);
    screen.until("a prompt", at_prompt);

    screen.type_in(b"6 * 7\r");
    screen.until("a product", |screen| {
        shows(screen, "42") && at_prompt(screen)
    });
    // The bytes of a character come apart.
    screen.type_in(b"'gr\xc3");
    screen.type_in(b"\xbcn'.upper()\r");
    screen.until("a word", |screen| {
        shows(screen, "'GR\u{dc}N'") && at_prompt(screen)
    });
    screen.resize(30, 100);
    screen.type_in(b"import os; os.get_terminal_size()\r");
    screen.until("another size", |screen| {
        shows(screen, "os.terminal_size(columns=100, lines=30)") && at_prompt(screen)
    });

    screen.type_in(b"import time; print('asleep'); time.sleep(100000)\r");
    screen.until("that it sleeps", |screen| shows(screen, "asleep"));
    screen.type_in(b"\x03");
    screen.until("that it was woken", |screen| {
        shows(screen, "KeyboardInterrupt") && at_prompt(screen)
    });
    // The last line shows when it was done.
    screen.type_in(b"import atexit; atexit.register(os._exit, 5) and None; 'registered'\r");
    screen.until("that its end has a code", |screen| {
        shows(screen, "'registered'") && at_prompt(screen)
    });
    screen.type_in(b"\x04");
    assert_eq!(screen.exit_code(), 5);
    sandbox.delete();
}
