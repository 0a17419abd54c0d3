//! What helps whoever debugs a guest: the boot timer, the log file, the state on request, and a
//! debugger.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use agent_protocol::{FileQuery, ShutdownAction};
use e2e_tests::agent::sh;
use e2e_tests::images::{faulting_kernel, program};
use e2e_tests::process::Process;
use e2e_tests::setup::setup;
use e2e_tests::vmm::{Machine, Vmm};
use rustix::fs::FileType;
use rustix::process::Signal;
use serde_json::Value;

/// The times of a boot, as its one line says.
fn timeline(file: &Path) -> Value {
    let text = fs::read_to_string(file).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// The names of the phases, whose times never go back.
fn phases(timeline: &Value) -> Vec<&str> {
    let phases = timeline["phases"].as_array().unwrap();
    let times = phases.iter().map(|phase| phase["at_us"].as_u64().unwrap());
    assert!(times.is_sorted(), "{timeline}");
    phases
        .iter()
        .map(|phase| phase["phase"].as_str().unwrap())
        .collect()
}

#[test]
fn the_boot_timer_tells_of_every_phase_up_to_the_guests_marker() {
    let timed = |machine: Machine| {
        let file = machine.directory().join("timer");
        let target = format!("path={}", file.display());
        let mut vmm = machine.arguments(&["--boot-timer", &target]).start();
        let ready = vmm.ready();
        // The marker comes before the agent's first word.
        let timeline = timeline(&file);
        assert_eq!(timeline["complete"], true, "{timeline}");
        let last = timeline["phases"].as_array().unwrap().last().unwrap();
        let at_us = last["at_us"].as_u64().unwrap();
        // Of its own clock, which starts when the kernel does.
        assert!(at_us > ready.entered_us, "{timeline}, {ready:?}");
        (vmm, timeline)
    };
    let (vmm, line) = timed(Machine::new());
    assert_eq!(
        phases(&line),
        [
            "process_start",
            "arguments_parsed",
            "host_opened",
            "machine_created",
            "devices_built",
            "kernel_loaded",
            "first_entry",
            "guest_marker",
        ]
    );
    assert!(line["start_monotonic_us"].as_u64().unwrap() > 0);
    let log = vmm.agent().must("dmesg");
    assert!(!log.contains("ACPI Error"), "{log}");
    drop(vmm);

    let (_vmm, line) = timed(Machine::new().jailed());
    assert_eq!(
        phases(&line)[2..5],
        ["host_opened", "jailed", "machine_created"]
    );

    let stock = &setup().stock_images;
    let initramfs = stock.join("initramfs.cpio");
    let (_vmm, line) = timed(
        Machine::new()
            .kernel(stock.join("vmlinuz"))
            .initramfs(Some(initramfs)),
    );
    assert_eq!(phases(&line).len(), 8);
}

#[test]
fn a_boot_without_a_marker_is_timed_as_far_as_it_went() {
    let machine = Machine::without_disk().initramfs(None);
    let file = machine.directory().join("timer");
    let target = format!("path={}", file.display());
    let mut vmm = machine.arguments(&["--boot-timer", &target]).start();
    vmm.expect_end(11, "panic");
    let line = timeline(&file);
    assert_eq!(line["complete"], false, "{line}");
    assert_eq!(phases(&line).last(), Some(&"first_entry"));
}

#[test]
fn the_log_goes_to_its_file_and_the_last_sentence_to_standard_error() {
    let machine = Machine::without_disk();
    let kernel = machine.directory().join("kernel");
    fs::write(&kernel, faulting_kernel()).unwrap();
    let log = machine.directory().join("log");
    fs::write(&log, "what was there\n").unwrap();
    let mut vmm = machine
        .kernel(kernel)
        .initramfs(None)
        .arguments(&["-v", "--log-file", log.to_str().unwrap()])
        .start();
    vmm.expect_end(12, "triple_fault");
    assert_eq!(
        vmm.process.stderr.whole_text(),
        "vmm: the guest caused a triple fault\n"
    );
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.starts_with("what was there\n"), "{text}");
    assert!(text.contains("created the machine"), "{text}");

    // A file that it makes is for its owner's eyes, and what happens in the jail gets there too.
    let machine = Machine::without_disk().jailed();
    let log = machine.directory().join("log");
    let mut vmm = machine
        .arguments(&["-v", "--log-file", log.to_str().unwrap()])
        .boot();
    vmm.process.signal(Signal::TERM);
    vmm.expect_end(0, "shutdown");
    let mode = fs::metadata(&log).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let text = fs::read_to_string(&log).unwrap();
    for line in ["jailed", "created the machine", "Ended"] {
        assert!(text.contains(line), "{line} in {text}");
    }
    assert_eq!(vmm.process.stderr.whole_text(), "");

    let mut vmm = Machine::without_disk()
        .arguments(&["--log-file", "/nowhere/log"])
        .start();
    assert_eq!(vmm.process.exit_code(), 2);
    vmm.process.stderr.wait_for("--log-file: ");
}

/// Asks for the state and returns it, at whatever verbosity the VMM logs.
fn state(vmm: &Vmm, from: usize, last: &str) -> String {
    vmm.process.signal(Signal::USR1);
    let stderr = &vmm.process.stderr;
    stderr.wait_for_text(
        &format!("the text after {from} bytes with {last:?}"),
        |text| {
            let new = text.get(from..)?;
            new.contains(last).then(|| new.to_owned())
        },
    )
}

fn assert_described(state: &str, vcpus: u32, devices: &[(&str, usize)]) {
    for vcpu in 0..vcpus {
        for register in ["rip=0x", "rax=0x", "r15=0x", "cr3=0x", "idt=0x"] {
            let name = format!("vcpu{vcpu}: ");
            let is_it = |line: &str| line.contains(&name) && line.contains(register);
            assert!(state.lines().any(is_it), "{name}{register} in {state}");
        }
    }
    for (device, queues) in devices {
        let status = format!("{device}: virtio device type ");
        let line = state.lines().find(|line| line.contains(&status));
        let line = line.unwrap_or_else(|| panic!("{status} in {state}"));
        assert!(
            line.contains("DRIVER_OK") && line.contains("accepted=0x"),
            "{line}"
        );
        for queue in 0..*queues {
            let name = format!("{device}: queue {queue}: ready size=");
            let line = state.lines().find(|line| line.contains(&name));
            let line = line.unwrap_or_else(|| panic!("{name} in {state}"));
            assert!(
                line.contains(" available=") && line.contains(" used="),
                "{line}"
            );
        }
    }
    assert!(state.contains("serial port interrupt_enable="), "{state}");
}

#[test]
fn a_signal_has_the_state_of_a_running_guest_logged_also_in_the_jail() {
    let devices = [("_disk0", 1), ("_vsock1", 3), ("__rng", 1)];
    for machine in [Machine::new(), Machine::new().jailed()] {
        let vmm = machine.cpus("boot=2").boot();
        let agent = vmm.agent();
        // Both vCPUs are in the guest, and one is at work.
        let before = agent.must("nproc; (while :; do :; done) >/dev/null 2>&1 & cat /proc/uptime");
        assert!(before.starts_with('2'), "{before}");
        let mut seen = 0;
        for _ in 0..3 {
            let state = state(&vmm, seen, "__rng: queue 0");
            assert!(state.contains("the virtual machine is running"), "{state}");
            assert_described(&state, 2, &devices);
            assert!(
                state.contains("_disk0: ") && state.contains("read_bytes="),
                "{state}"
            );
            assert!(state.len() < 16 * 1024, "{} bytes", state.len());
            seen = vmm.process.stderr.text().len();
        }
        assert_eq!(
            agent.must("dd if=/dev/vda of=/dev/null bs=1M count=4 2>/dev/null; echo $?"),
            "0"
        );
        let log = agent.must("dmesg");
        for complaint in ["BUG:", "stall", "clocksource: Marking"] {
            assert!(!log.contains(complaint), "{complaint} in {log}");
        }
    }
}

#[test]
fn the_state_of_a_machine_that_is_absent_created_or_paused_is_logged() {
    let machine = Machine::new();
    let config = machine.config();
    let mut vmm = machine.arguments(&["--no-shutdown"]).serve();
    let api = vmm.api();
    api.get("vmm.ping");
    state(&vmm, 0, "the virtual machine is absent");
    api.put("vm.create", Some(&config));
    state(&vmm, 0, "the virtual machine is created");
    api.put("vm.boot", None);
    vmm.ready();
    api.put("vm.pause", None);
    let text = state(&vmm, 0, "__rng: queue 0");
    assert!(text.contains("the virtual machine is paused"), "{text}");
    assert_described(&text, 1, &[("_disk0", 1), ("_vsock1", 3), ("__rng", 1)]);
    api.put("vm.resume", None);
    assert_eq!(vmm.agent().must("echo alive"), "alive");
    // The guest has ended its machine.
    vmm.agent().shut_down(ShutdownAction::Poweroff);
    let seen = vmm.process.stderr.text().len();
    vmm.events().wait_for("\"shutdown\"");
    state(&vmm, seen, "the virtual machine is created");
}

/// A gdb that follows `script`, says what it does on its log, and can be interrupted.
fn gdb(directory: &Path, name: &str, script: &str) -> Process {
    let file = directory.join(name);
    let socket = directory.join("gdb.sock");
    let script = format!(
        "set confirm off\nset pagination off\nset remotetimeout 300\n\
         target remote {}\n{script}",
        socket.display()
    );
    fs::write(&file, script).unwrap();
    let mut command = Command::new("sh");
    let file = file.to_str().unwrap();
    command
        .args(["-c", "exec gdb -nx -batch -x \"$0\" >&2", file])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    Process::spawn("gdb", command, &[])
}

/// A machine that waits for a debugger.
fn debugged(machine: Machine) -> Vmm {
    let socket = machine.directory().join("gdb.sock");
    let vmm = machine
        .arguments(&["--gdb", socket.to_str().unwrap(), "-v"])
        .start();
    // The socket is there before the guest.
    vmm.process.stderr.wait_for("created the machine");
    vmm
}

/// The value that the first line which contains `name` has behind it.
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.split_once(name));
    let (_, rest) = line.unwrap_or_else(|| panic!("{name} in {text}"));
    rest.split_whitespace().next().unwrap_or_default()
}

/// The NOP of a program that counts in RAX for ever: INC RAX, NOP, JMP to the start. It is there
/// whenever it runs. Not the first instruction: a breakpoint there comes before its page does.
const COUNTING: [u8; 6] = [0x48, 0xff, 0xc0, 0x90, 0xeb, 0xfa];
const NOP: &str = "0x10007b";

/// Puts a program of the guest's there and returns its path.
fn put_program(vmm: &Vmm, name: &str, code: &[u8]) -> String {
    let path = format!("/root/{name}");
    let program = program(code);
    let length = program.len() as u64;
    let file = FileQuery::new(path.as_str());
    vmm.agent().write(&file, &program[..], length).unwrap();
    vmm.agent().must(&format!("chmod +x {path}"));
    path
}

#[test]
fn a_debugger_stops_steps_changes_and_continues_the_guest() {
    let mut vmm = debugged(Machine::new().cpus("boot=2"));
    // A command that fails ends a script: the last one reads what is not mapped.
    let script = r#"
info threads
printf "entry=%#lx\n", $rip
stepi
printf "stepped=%#lx\n", $rip
echo boots\n
continue
info threads
hbreak *NOP
echo armed\n
continue
printf "hit=%#lx\n", $rip
printf "code=%#x\n", *(unsigned int*)($rip - 3)
delete
set $before = $rax
stepi
printf "moved=%d\n", $rip - NOP
stepi
stepi
printf "counted=%d\n", $rax - $before
set $r15 = 0x1122334455667788
maintenance flush register-cache
printf "r15=%#lx\n", $r15
output *(char*)0x12340000000
"#
    .replace("NOP", NOP);
    let mut first = gdb(vmm.directory(), "first", &script);
    first.stderr.wait_for("boots");
    vmm.ready();
    assert_eq!(vmm.agent().must("nproc"), "2");
    let count = put_program(&vmm, "count", &COUNTING);
    let _counts = vmm.agent().exec(&sh(&format!("exec taskset -c 0 {count}")));
    first.signal(Signal::INT);
    first.exit_code();
    let text = first.stderr.whole_text();
    assert!(text.contains("SIGINT"), "{text}");
    assert_ne!(value(&text, "entry="), value(&text, "stepped="));
    assert_eq!(value(&text, "hit="), NOP, "{text}");
    assert_eq!(value(&text, "code="), "0x90c0ff48", "{text}");
    assert_eq!(value(&text, "moved="), "1", "{text}");
    assert_eq!(value(&text, "counted="), "1", "{text}");
    assert_eq!(value(&text, "r15="), "0x1122334455667788", "{text}");
    let unmapped = "Cannot access memory at address 0x12340000000";
    assert!(text.contains(unmapped), "{text}");
    assert!(text.matches("Thread 1.2").count() >= 2, "{text}");

    // It has left, so the guest goes on, and another may come.
    assert_eq!(vmm.agent().must("echo alive"), "alive");
    let seen = vmm.process.stderr.text().len();
    let go_on = vmm.directory().join("go-on");
    let mode = rustix::fs::Mode::from(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &go_on, FileType::Fifo, mode, 0).unwrap();
    let script = r#"
hbreak *NOP
continue
delete
eval "maintenance packet Z0,%lx,1", $rip
eval "maintenance packet m%lx,1", $rip
eval "maintenance packet z0,%lx,1", $rip
maintenance flush register-cache
printf "restored=%#x\n", *(unsigned int*)($rip - 3)
echo held\n
shell cat GO_ON
detach
"#
    .replace("NOP", NOP)
    .replace("GO_ON", go_on.to_str().unwrap());
    let mut second = gdb(vmm.directory(), "second", &script);
    second.stderr.wait_for("held");
    // Neither vCPU nor the owner is kept from answering by that.
    let state = state(&vmm, seen, "__rng: queue 0");
    assert_described(&state, 2, &[("_disk0", 1), ("_vsock1", 3), ("__rng", 1)]);
    fs::write(&go_on, "").unwrap();
    assert_eq!(second.exit_code(), 0);
    let text = second.stderr.whole_text();
    // INT3, as the guest would find it.
    assert!(text.contains("received: \"cc\""), "{text}");
    assert_eq!(value(&text, "restored="), "0x90c0ff48", "{text}");
    assert_eq!(vmm.agent().must("echo alive"), "alive");
    let log = vmm.agent().must("dmesg");
    for complaint in ["BUG:", "stall", "int3"] {
        assert!(!log.contains(complaint), "{complaint} in {log}");
    }

    // An exception that a program of the guest's causes is for the guest's kernel, also while KVM
    // tells the debugger of all exceptions of this kind: PUSHF, the trap flag set, POPF, NOP.
    let trap = [0x9c, 0x81, 0x0c, 0x24, 0x00, 0x01, 0x00, 0x00, 0x9d, 0x90];
    let trap = put_program(&vmm, "trap", &trap);
    let script = "hbreak *0xffffffff00000000\necho armed\\n\ncontinue\ndelete\nkill\n";
    let mut third = gdb(vmm.directory(), "third", script);
    third.stderr.wait_for("armed");
    assert_eq!(vmm.agent().must(&format!("{trap}; echo $?")), "133");
    third.signal(Signal::INT);
    third.exit_code();
    vmm.expect_end(0, "shutdown");
}

#[test]
fn a_guest_that_ends_ends_its_debuggers_session() {
    let mut vmm = debugged(Machine::without_disk().initramfs(None));
    let mut gdb = gdb(vmm.directory(), "script", "continue\n");
    vmm.expect_end(11, "panic");
    gdb.exit_code();
    let text = gdb.stderr.whole_text();
    assert!(text.contains("exited"), "{text}");
}

#[test]
fn a_guest_that_waits_for_a_debugger_can_be_ended() {
    let mut vmm = debugged(Machine::without_disk());
    vmm.process.stderr.wait_for("Booted");
    vmm.process.signal(Signal::TERM);
    vmm.expect_end(0, "shutdown");
    assert!(!vmm.directory().join("gdb.sock").exists());
    assert_eq!(vmm.console(), "", "the guest has run");
}
