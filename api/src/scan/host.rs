//! What holds a machine on the host.

use super::control::Area;
use super::report::{Check, Details, Report, Severity, Verdict};
use crate::domain::{Egress, Posture, Sandbox, VmmPosture};

static JAIL: Check = Check {
    id: "host.jail",
    failure: "The VMM is not jailed: a guest that takes it over has the daemon's rights",
    recommendation: "Set jail.enabled = true, and restart the machine",
    severity: Severity::Critical,
    area: Area::Isolation,
};
static SECCOMP: Check = Check {
    id: "host.seccomp",
    failure: "A thread of the VMM may make any system call",
    recommendation: "Set jail.enabled = true, and restart the machine",
    severity: Severity::High,
    area: Area::Isolation,
};
static PRIVILEGES: Check = Check {
    id: "host.privileges",
    failure: "The VMM has capabilities, or can gain them",
    recommendation: "Set jail.enabled = true, and restart the machine",
    severity: Severity::High,
    area: Area::Isolation,
};
static USER: Check = Check {
    id: "host.user",
    failure: "The VMM is the daemon's own user, and so is every other",
    recommendation: "Run sandboxd as root with jail.enabled = true, which gives each a user of its own",
    severity: Severity::Medium,
    area: Area::Isolation,
};
static EGRESS: Check = Check {
    id: "host.egress",
    failure: "The machine may reach every public address",
    recommendation: "Give it a list: PUT /v1/sandboxes/{id}/network/egress",
    severity: Severity::Low,
    area: Area::Network,
};
static FORWARDS: Check = Check {
    id: "host.forwards",
    failure: "Ports of the machine are open to other machines than this host",
    recommendation: "Forward them from 127.0.0.1, if nobody else is to reach them",
    severity: Severity::Low,
    area: Area::Network,
};
static SAVED: Check = Check {
    id: "host.saved_files",
    failure: "Disks or memory of the machine or its snapshots can be read by everybody on the host",
    recommendation: "chmod 0700 the data directory",
    severity: Severity::High,
    area: Area::StoredData,
};

/// Adds what all checks of the host's side of a machine come to.
pub fn judge(sandbox: &Sandbox, posture: &Posture, vm: &str, report: &mut Report) {
    let of_vmm = |is_good: fn(&VmmPosture) -> bool| match &posture.vmm {
        None => Verdict::NotApplicable,
        Some(vmm) if is_good(vmm) => Verdict::Passed,
        Some(_) => Verdict::Failed(Details::default()),
    };
    report.add(&JAIL, vm, of_vmm(|vmm| vmm.is_jailed));
    report.add(&SECCOMP, vm, of_vmm(|vmm| vmm.has_seccomp));
    let is_plain = |vmm: &VmmPosture| vmm.has_no_new_privs && !vmm.has_capabilities;
    report.add(&PRIVILEGES, vm, of_vmm(is_plain));
    report.add(&USER, vm, of_vmm(|vmm| vmm.has_own_user));
    let egress = match &sandbox.spec.network {
        None => Verdict::NotApplicable,
        Some(network) if network.egress == Egress::All => Verdict::Warning(Details::default()),
        Some(_) => Verdict::Passed,
    };
    report.add(&EGRESS, vm, egress);
    let forwards = sandbox.forwards.iter();
    let open = forwards.map(|kept| kept.forward.host);
    let open = open.filter(|host| !host.ip().is_loopback());
    let open: Details = open.collect();
    let verdict = match (sandbox.address.is_some(), open.is_empty()) {
        (false, _) => Verdict::NotApplicable,
        (true, true) => Verdict::Passed,
        (true, false) => Verdict::Warning(open),
    };
    report.add(&FORWARDS, vm, verdict);
    report.add(&SAVED, vm, Verdict::unless(&posture.exposed));
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::report::Results;
    use super::*;
    use crate::domain::{
        Connection, Forward, KeptForward, Layers, RateLimits, Resources, SandboxId, Spec, Transport,
    };

    fn results(egress: Egress, host: [u8; 4], posture: &Posture) -> Results {
        let spec = Spec {
            template: "minimal".into(),
            vcpus: 1,
            memory_mb: 512,
            timeout_sec: 0,
            network: Some(Connection {
                network: None,
                egress,
                rate_limits: RateLimits::default(),
            }),
            disk_mb: None,
            resources: Resources::default(),
        };
        let id = SandboxId::random();
        let mut sandbox = Sandbox::new(id, spec, Layers::default(), Timestamp::now());
        sandbox.address = Some([192, 168, 200, 5].into());
        sandbox.forwards = vec![KeptForward {
            forward: Forward {
                transport: Transport::Tcp,
                host: (host, 80).into(),
                guest_port: 80,
            },
            description: None,
        }];
        let mut report = Report::new(&[]);
        judge(&sandbox, posture, "vm", &mut report);
        report.finish()
    }

    #[test]
    fn what_holds_it_is_judged() {
        let good = Posture {
            vmm: Some(VmmPosture {
                is_jailed: true,
                has_seccomp: true,
                has_no_new_privs: true,
                has_capabilities: false,
                has_own_user: true,
            }),
            exposed: Vec::new(),
        };
        let held = results(Egress::None, [127, 0, 0, 1], &good);
        assert_eq!((held.total_checks, held.passed, held.risk_score), (7, 7, 0));
        let bad = Posture {
            vmm: Some(VmmPosture {
                has_capabilities: true,
                ..VmmPosture::default()
            }),
            exposed: vec!["/f".into()],
        };
        let open = results(Egress::All, [0, 0, 0, 0], &bad);
        assert_eq!((open.failed, open.warnings), (5, 2));
        assert_eq!(open.findings[0].check, "host.jail");
        let off = results(Egress::None, [127, 0, 0, 1], &Posture::default());
        assert_eq!((off.passed, off.not_applicable), (3, 4));
    }
}
