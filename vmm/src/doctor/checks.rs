//! What can be told about KVM without running a guest.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Cap, Kvm};

use super::Finding;
use crate::config::MAX_VCPUS;
use crate::kvm::prefault;

/// The only version that KVM has had since Linux 2.6.22; the kernel's API document asks to
/// refuse any other (Documentation/virt/kvm/api.rst, KVM_GET_API_VERSION).
const API_VERSION: i32 = KVM_API_VERSION as i32;

/// What every machine needs: the capability, its name, and what for.
const REQUIRED: [(Cap, &str, &str); 15] = [
    (
        Cap::Irqchip,
        "IRQCHIP",
        "interrupt controllers in the kernel",
    ),
    (
        Cap::Ioeventfd,
        "IOEVENTFD",
        "queue notifications without an exit to the VMM",
    ),
    (Cap::Irqfd, "IRQFD", "interrupts from the device threads"),
    (Cap::UserMemory, "USER_MEMORY", "guest memory"),
    (
        Cap::SetTssAddr,
        "SET_TSS_ADDR",
        "real mode on Intel processors",
    ),
    (Cap::Pit2, "PIT2", "the interval timer"),
    (Cap::PitState2, "PIT_STATE2", "saving the interval timer"),
    (Cap::AdjustClock, "ADJUST_CLOCK", "saving the guest's clock"),
    (Cap::Debugregs, "DEBUGREGS", "saving debug registers"),
    (
        Cap::MpState,
        "MP_STATE",
        "starting and saving further vCPUs",
    ),
    (
        Cap::VcpuEvents,
        "VCPU_EVENTS",
        "saving pending exceptions and interrupts",
    ),
    (Cap::Xcrs, "XCRS", "saving extended control registers"),
    (
        Cap::Xsave,
        "XSAVE",
        "saving floating point and vector registers",
    ),
    (
        Cap::ExtCpuid,
        "EXT_CPUID",
        "choosing the processor features that a guest sees",
    ),
    (
        Cap::ImmediateExit,
        "IMMEDIATE_EXIT",
        "stopping a vCPU without a race",
    ),
];

const REAL_MACHINE: &str = "use a machine with a KVM of its own, or `scripts/kvm-host COMMAND`, \
                            which brings an emulated one.";

/// Opens the device node.
pub(super) fn open(device: &Path) -> Result<(Kvm, Finding), Finding> {
    let opened = CString::new(device.as_os_str().as_bytes())
        .map_err(io::Error::from)
        .and_then(|path| Ok(Kvm::new_with_path(path)?));
    match opened {
        Ok(kvm) => {
            let finding = Finding::ok("device", format!("{} opens.", device.display()));
            Ok((kvm, finding))
        }
        Err(error) => Err(not_open(
            device,
            &error,
            &Host::look(),
            owner(device).as_deref(),
        )),
    }
}

/// The checks that ask the kernel what it can do.
pub(super) fn kernel(kvm: &Kvm) -> Vec<Finding> {
    let mut findings = vec![api_version(kvm.get_api_version())];
    if findings[0].advice.is_none() {
        let missing = REQUIRED
            .iter()
            .filter(|(capability, ..)| !kvm.check_extension(*capability))
            .map(|(_, name, purpose)| (*name, *purpose))
            .collect::<Vec<_>>();
        findings.push(capabilities(&missing));
        findings.extend(vcpus(kvm.get_max_vcpus()));
        findings.push(prefaulting(prefault::is_supported(kvm)));
    }
    findings
}

/// What explains a missing device node.
#[derive(Debug, Clone, Copy, Default)]
struct Host {
    /// The processor shows VT-x.
    vmx: bool,
    /// The processor shows AMD-V.
    svm: bool,
    /// This machine is itself a guest.
    guest: bool,
    /// The vendor's module of KVM is loaded or built in.
    module: bool,
}

impl Host {
    fn look() -> Self {
        // Without /proc or /sys the explanation is poorer, and nothing else.
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            module: ["kvm_intel", "kvm_amd"]
                .iter()
                .any(|module| Path::new("/sys/module").join(module).exists()),
            ..Self::from_cpuinfo(&cpuinfo)
        }
    }

    fn from_cpuinfo(cpuinfo: &str) -> Self {
        let flags = cpuinfo
            .lines()
            .find(|line| line.starts_with("flags"))
            .unwrap_or_default();
        let has = |name| flags.split_ascii_whitespace().any(|flag| flag == name);
        Self {
            vmx: has("vmx"),
            svm: has("svm"),
            guest: has("hypervisor"),
            module: false,
        }
    }
}

/// The name of the group that the file belongs to.
fn owner(file: &Path) -> Option<String> {
    let id = fs::metadata(file).ok()?.gid();
    group_name(&fs::read_to_string("/etc/group").ok()?, id)
}

fn group_name(groups: &str, id: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    })
}

fn not_open(device: &Path, error: &io::Error, host: &Host, group: Option<&str>) -> Finding {
    let device = device.display();
    let (detail, advice) = match error.kind() {
        io::ErrorKind::NotFound => missing(&device.to_string(), host),
        io::ErrorKind::PermissionDenied => (
            format!("{device} exists, but this user may not open it."),
            match group {
                Some(group) if group != "root" => format!(
                    "add the user to the group {group} (`sudo usermod -aG {group} \"$USER\"`) \
                     and log in again."
                ),
                _ => format!(
                    "run as root, or let a group open it (`sudo chgrp kvm {device}; sudo chmod \
                     660 {device}; sudo usermod -aG kvm \"$USER\"`) and log in again; in a \
                     container, allow the device."
                ),
            },
        ),
        _ => (
            format!("{device} does not open: {error}."),
            "see what the kernel says about KVM (`sudo dmesg | grep -i kvm`).".to_owned(),
        ),
    };
    Finding::fail("device", detail, advice)
}

fn missing(device: &str, host: &Host) -> (String, String) {
    let module = if host.svm { "kvm_amd" } else { "kvm_intel" };
    if host.module {
        (
            format!("There is no {device}, although the kernel has KVM."),
            "in a container, pass the device in (such as `--device /dev/kvm`).".to_owned(),
        )
    } else if host.vmx || host.svm {
        (
            format!("There is no {device}: the kernel's KVM module is not loaded."),
            format!(
                "load it (`sudo modprobe {module}`); if that fails, `sudo dmesg` tells why, \
                 most often that virtualization is switched off in the firmware."
            ),
        )
    } else if host.guest {
        (
            format!(
                "There is no {device}: this machine is virtual, and its processor shows no \
                 virtualization."
            ),
            format!("enable nested virtualization for it on its host, or {REAL_MACHINE}"),
        )
    } else {
        (
            format!("There is no {device}: the processor shows no virtualization."),
            format!(
                "switch on VT-x or AMD-V (also called SVM) in the firmware set-up; if the \
                 processor has neither, {REAL_MACHINE}"
            ),
        )
    }
}

fn api_version(version: i32) -> Finding {
    const CHECK: &str = "api";
    match version {
        API_VERSION => Finding::ok(CHECK, format!("The API has version {API_VERSION}.")),
        ..0 => Finding::fail(
            CHECK,
            "The device does not answer as KVM does.",
            "see what provides the device node; it is not Linux's KVM.",
        ),
        other => Finding::fail(
            CHECK,
            format!("The API has version {other}; this VMM needs {API_VERSION}."),
            "boot a stock kernel: every Linux since 2.6.22 has version 12.",
        ),
    }
}

fn capabilities(missing: &[(&str, &str)]) -> Finding {
    const CHECK: &str = "capabilities";
    if missing.is_empty() {
        return Finding::ok(
            CHECK,
            format!("All {} that a machine needs are there.", REQUIRED.len()),
        );
    }
    let list = missing
        .iter()
        .map(|(name, purpose)| format!("KVM_CAP_{name} ({purpose})"))
        .collect::<Vec<_>>()
        .join(", ");
    Finding::fail(
        CHECK,
        format!("KVM lacks {list}."),
        format!(
            "boot Linux 4.12 or newer with KVM's defaults; if this is such a kernel, {REAL_MACHINE}"
        ),
    )
}

fn vcpus(max: usize) -> Option<Finding> {
    (max < usize::from(MAX_VCPUS)).then(|| {
        Finding::warn(
            "vcpus",
            format!("KVM gives a machine at most {max} vCPUs; this VMM offers up to {MAX_VCPUS}."),
            format!("ask for no more than {max} vCPUs."),
        )
    })
}

fn prefaulting(is_supported: bool) -> Finding {
    let detail = match is_supported {
        true => "KVM can map what a restored guest touches first before it runs.",
        false => {
            "KVM cannot map what a restored guest touches first before it runs, as Linux 6.12 can: \
             restored guests begin somewhat slower."
        }
    };
    Finding::ok("prefault", detail)
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::kvm::vm::REQUIRED_CAPABILITIES;

    const NOT_FOUND: io::ErrorKind = io::ErrorKind::NotFound;

    fn closed(kind: io::ErrorKind, host: Host, group: Option<&str>) -> String {
        let finding = not_open(Path::new("/dev/kvm"), &kind.into(), &host, group);
        assert_eq!(finding.status, Status::Fail);
        format!("{} {}", finding.detail, finding.advice.unwrap())
    }

    #[test]
    fn a_missing_node_is_explained_by_what_the_host_has() {
        let intel = Host {
            vmx: true,
            ..Host::default()
        };
        assert!(closed(NOT_FOUND, intel, None).contains("modprobe kvm_intel"));
        let amd = Host {
            svm: true,
            ..Host::default()
        };
        assert!(closed(NOT_FOUND, amd, None).contains("modprobe kvm_amd"));
        let loaded = Host {
            module: true,
            ..amd
        };
        assert!(closed(NOT_FOUND, loaded, None).contains("container"));
        let guest = Host {
            guest: true,
            ..Host::default()
        };
        assert!(closed(NOT_FOUND, guest, None).contains("nested virtualization"));
        assert!(closed(NOT_FOUND, Host::default(), None).contains("firmware set-up"));
    }

    #[test]
    fn a_closed_node_names_the_group_that_opens_it() {
        let denied = io::ErrorKind::PermissionDenied;
        assert!(closed(denied, Host::default(), Some("kvm")).contains("usermod -aG kvm"));
        let root = closed(denied, Host::default(), Some("root"));
        assert!(root.contains("chgrp kvm /dev/kvm"), "{root}");
    }

    #[test]
    fn other_errors_are_told() {
        let text = closed(io::ErrorKind::ResourceBusy, Host::default(), None);
        assert!(text.contains("busy"), "{text}");
    }

    #[test]
    fn flags_are_whole_words() {
        let host = Host::from_cpuinfo("model name: x\nflags\t\t: fpu svm_lock hypervisor vmx\n");
        assert!(host.vmx && host.guest && !host.svm);
        assert!(!Host::from_cpuinfo("").guest);
    }

    #[test]
    fn groups_are_found_by_number() {
        let groups = "root:x:0:\nbroken\nkvm:x:104:a,b\n";
        assert_eq!(group_name(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 5), None);
    }

    #[test]
    fn only_version_12_is_accepted() {
        assert_eq!(api_version(12).status, Status::Ok);
        assert!(api_version(11).detail.contains("version 11"));
        assert_eq!(api_version(13).status, Status::Fail);
        assert!(api_version(-1).detail.contains("does not answer"));
    }

    #[test]
    fn what_is_checked_is_what_machines_ask_for() {
        assert_eq!(
            REQUIRED.map(|(capability, ..)| capability as u32),
            REQUIRED_CAPABILITIES.map(|capability| capability as u32)
        );
    }

    #[test]
    fn missing_capabilities_are_named_with_their_use() {
        assert_eq!(capabilities(&[]).status, Status::Ok);
        let finding = capabilities(&[("IRQFD", "interrupts"), ("XCRS", "registers")]);
        assert_eq!(finding.status, Status::Fail);
        assert_eq!(
            finding.detail,
            "KVM lacks KVM_CAP_IRQFD (interrupts), KVM_CAP_XCRS (registers)."
        );
    }

    #[test]
    fn few_vcpus_are_a_warning() {
        assert_eq!(vcpus(32), None);
        assert_eq!(vcpus(8).unwrap().status, Status::Warn);
    }
}
