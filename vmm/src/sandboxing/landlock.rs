//! Landlock, the kernel's own sandbox for programs: once more what the namespaces and the filter
//! of system calls say already, by other code of the kernel.

use std::fmt;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetError, RulesetStatus, Scope,
};

/// What is denied is chosen from this version of the interface (Linux 6.12): later ones also deny
/// what guest programs do to reach the host, which is to connect to a socket by its path.
const VERSION: ABI = ABI::V6;

/// How much of the restrictions the kernel enforces.
#[derive(Debug)]
pub(super) struct Reached(Result<(RulesetStatus, LandlockStatus), RulesetError>);

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok((RulesetStatus::FullyEnforced, _)) => write!(f, "all of {VERSION:?}"),
            Ok((_, LandlockStatus::Available { effective_abi, .. })) => {
                write!(f, "{effective_abi:?} of {VERSION:?}")
            }
            Ok((_, LandlockStatus::NotEnabled)) => f.write_str("not enabled on this host"),
            Ok((_, LandlockStatus::NotImplemented)) => f.write_str("not in this kernel"),
            Err(error) => write!(f, "not in force: {error}"),
        }
    }
}

/// Denies the process to open, make, change or execute any file, to bind or connect any TCP port,
/// and to reach abstract sockets and processes outside; the last not if it `passes_signals_on`, which
/// its filter of system calls then limits to one process. As far as the kernel can: it is one layer of
/// several.
pub(super) fn restrict(passes_signals_on: bool) -> Reached {
    let mut scope = Scope::from_all(VERSION);
    if passes_signals_on {
        scope.remove(Scope::Signal);
    }
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(VERSION))
        .and_then(|ruleset| ruleset.handle_access(AccessNet::from_all(VERSION)))
        .and_then(|ruleset| ruleset.scope(scope))
        .and_then(Ruleset::create)
        .and_then(landlock::RulesetCreated::restrict_self);
    Reached(restricted.map(|status| (status.ruleset, status.landlock)))
}
