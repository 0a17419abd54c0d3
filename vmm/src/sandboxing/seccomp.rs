//! The filters of system calls. What is not on the list of a thread ends the whole process.
//!
//! The jailed process gets a first filter before it looks at anything ([`begin`]): the union of all
//! lists, and what building a machine takes. Every thread inherits it, so that none is without.
//! Each thread then narrows it down to its own list ([`apply`]), before the guest's first
//! instruction. A filter can be added to and never removed.
//!
//! Two groups of calls fail instead, so that the C library and Rust's take their other way: calls
//! that take a path, for which there is nothing to find, and `clone3`, whose flags a filter cannot
//! see.

mod lists;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use lists::{Arguments, Call};

/// What a thread does, and so which system calls it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, and registers of devices.
    Vcpu,
    /// Owns the machine: signals, the terminal, and what is asked through the control socket.
    Control,
    /// The event loop of the devices.
    EventLoop,
    /// Serves the control socket.
    Api,
    /// Reads and writes disks for the event loop.
    Io,
    /// Waits for the VMM to end.
    Waiter {
        /// The VMM, which the waiter may send signals to.
        child: libc::pid_t,
    },
}

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The list makes no filter.
    #[error("the list of system calls cannot be compiled")]
    Compile(#[source] BackendError),
    /// The kernel refused it.
    #[error("the kernel refused the filter (it must have CONFIG_SECCOMP_FILTER)")]
    Install(#[source] seccompiler::Error),
}

/// Whether this process is jailed.
static JAILED: AtomicBool = AtomicBool::new(false);

/// Gives the process the filter that all of its threads will have in common.
pub(super) fn begin() -> Result<(), SeccompError> {
    let everything = lists::SETUP
        .iter()
        .chain(lists::COMMON)
        .chain(lists::CONTROL)
        .chain(lists::VCPU)
        .chain(lists::EVENT_LOOP)
        .chain(lists::API)
        .chain(lists::IO);
    let failing = |calls: &[libc::c_long], error: libc::c_int| {
        let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
        compile(
            rules,
            SeccompAction::Allow,
            SeccompAction::Errno(error.unsigned_abs()),
        )
    };
    install(&failing(lists::NO_PATH, libc::EACCES)?)?;
    install(&failing(&[libc::SYS_clone3], libc::ENOSYS)?)?;
    install(&allow_list(everything)?)?;
    JAILED.store(true, Ordering::Release);
    Ok(())
}

/// Narrows the calling thread down to what its kind needs. Does nothing in a process that is not
/// jailed. To be called by every thread at its start; by the owner of the machine, once it has
/// started the other threads, which inherit its filter.
///
/// # Errors
/// The kernel refuses.
pub fn apply(kind: ThreadKind) -> Result<(), SeccompError> {
    if JAILED.load(Ordering::Acquire) {
        apply_now(kind)
    } else {
        Ok(())
    }
}

pub(super) fn apply_now(kind: ThreadKind) -> Result<(), SeccompError> {
    let common = lists::COMMON.iter();
    let program = match kind {
        ThreadKind::Vcpu => allow_list(common.chain(lists::VCPU)),
        ThreadKind::Control => allow_list(common.chain(lists::CONTROL)),
        // It starts the threads that read and write disks, which inherit its filter.
        ThreadKind::EventLoop => allow_list(common.chain(lists::EVENT_LOOP).chain(lists::IO)),
        ThreadKind::Api => allow_list(common.chain(lists::API)),
        ThreadKind::Io => allow_list(common.chain(lists::IO)),
        ThreadKind::Waiter { child } => {
            // SAFETY: takes nothing and cannot fail.
            let own = unsafe { libc::getpid() };
            let to = |pid: libc::pid_t| {
                rule(0, SeccompCmpOp::Eq, u64::from(pid.unsigned_abs()))
                    .map_err(SeccompError::Compile)
            };
            let mut rules = collect(lists::WAITER.iter())?;
            rules.insert(libc::SYS_kill, vec![to(child)?, to(own)?]);
            compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
        }
    }?;
    install(&program)
}

fn install(program: &BpfProgram) -> Result<(), SeccompError> {
    seccompiler::apply_filter(program).map_err(SeccompError::Install)
}

fn allow_list<'a>(calls: impl Iterator<Item = &'a Call>) -> Result<BpfProgram, SeccompError> {
    let mut rules = collect(calls)?;
    for call in lists::NO_PATH.iter().chain(&[libc::SYS_clone3]) {
        // Decided by a filter of their own.
        rules.insert(*call, Vec::new());
    }
    compile(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

/// The rules for `calls`. A call that comes more than once is allowed if one of them allows it.
fn collect<'a>(
    calls: impl Iterator<Item = &'a Call>,
) -> Result<BTreeMap<i64, Vec<SeccompRule>>, SeccompError> {
    let mut unconditional = Vec::new();
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call(number, arguments) in calls {
        let conditions = conditions(arguments).map_err(SeccompError::Compile)?;
        if conditions.is_empty() {
            unconditional.push(*number);
        }
        let known = rules.entry(*number).or_default();
        for condition in conditions {
            if !known.contains(&condition) {
                known.push(condition);
            }
        }
    }
    for number in unconditional {
        rules.insert(number, Vec::new());
    }
    Ok(rules)
}

/// One rule for each way in which the arguments may look; none if they may be anything.
fn conditions(arguments: &Arguments) -> Result<Vec<SeccompRule>, BackendError> {
    match arguments {
        Arguments::Any => Ok(Vec::new()),
        Arguments::OneOf(index, values) => values
            .iter()
            .map(|value| rule(*index, SeccompCmpOp::Eq, *value))
            .collect(),
        Arguments::Without(index, bits) => {
            Ok(vec![rule(*index, SeccompCmpOp::MaskedEq(*bits), 0)?])
        }
        Arguments::Kvm(numbers) => numbers
            .iter()
            .map(|number| rule(1, SeccompCmpOp::MaskedEq(0xffff), 0xae00 | number))
            .collect(),
    }
}

fn rule(index: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    // The kernel looks at the lower half of all arguments that are filtered here.
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    on_match: SeccompAction,
) -> Result<BpfProgram, SeccompError> {
    SeccompFilter::new(rules, otherwise, on_match, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(SeccompError::Compile)
}
