//! The serial console on a terminal.

use std::fs::File;
use std::io::Write;

use e2e_tests::agent::sh;
use e2e_tests::log::Log;
use e2e_tests::terminal::terminal;
use e2e_tests::vmm::Machine;
use rustix::termios::{LocalModes, Termios, tcgetattr};

fn modes(terminal: &Termios) -> impl PartialEq + std::fmt::Debug {
    (
        terminal.input_modes,
        terminal.output_modes,
        terminal.control_modes,
        terminal.local_modes,
    )
}

#[test]
fn keys_go_to_the_guest_until_ctrl_a_x() {
    type_and_leave(Machine::new());
}

#[test]
fn keys_go_to_the_guest_of_a_jailed_vmm_too() {
    type_and_leave(Machine::new().jailed());
}

fn type_and_leave(machine: Machine) {
    let (user, programs) = terminal();
    let before = tcgetattr(&programs).unwrap();
    assert!(
        before
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO)
    );

    let mut vmm = machine.terminal(programs.try_clone().unwrap()).start();
    let screen = Log::follow("the terminal", File::from(user.try_clone().unwrap()));
    let mut keys = File::from(user);
    vmm.ready();
    // The kernel's own messages.
    screen.wait_for("Linux version");
    let during = tcgetattr(&programs).unwrap();
    assert!(
        !during
            .local_modes
            .intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG),
        "the terminal is not in raw mode: {during:?}"
    );

    // A line that is typed, with a Ctrl-C and a Ctrl-A that are meant for the guest.
    let script = "stty -F /dev/ttyS0 raw -echo; exec </dev/ttyS0 >/dev/ttyS0; \
                  printf 'now-type\\r\\n'; head -c 7 | od -An -tx1";
    let reader = vmm.agent().exec(&sh(script));
    screen.wait_for("now-type");
    keys.write_all(b"ab\x03\x01\x01cd\n").unwrap();
    assert_eq!(reader.finish().exit.code, 0);
    screen.wait_for("61 62 03 01 63 64 0a");

    keys.write_all(b"\x01x").unwrap();
    vmm.expect_end(0, "shutdown");
    let after = tcgetattr(&programs).unwrap();
    assert_eq!(modes(&after), modes(&before), "the terminal's mode");
}
