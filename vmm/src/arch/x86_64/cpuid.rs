//! The processor that a vCPU reports: what KVM supports on this host, with the topology of the
//! guest in place of the host's.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

// Leaves, and bits in them: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
const LEAF_FEATURES: u32 = 0x1;
const LEAF_CACHE: u32 = 0x4;
const LEAF_THERMAL: u32 = 0x6;
const LEAF_PERFORMANCE: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURES_ECX_PDCM: u32 = 1 << 15;
const FEATURES_ECX_X2APIC: u32 = 1 << 21;
const FEATURES_ECX_TSC_DEADLINE: u32 = 1 << 24;
const FEATURES_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURES_EDX_HTT: u32 = 1 << 28;
/// CLFLUSH line size in units of 8 bytes: 64.
const CLFLUSH_SIZE: u32 = 8;
/// Turbo boost, which a guest can neither see nor influence.
const THERMAL_EAX_TURBO: u32 = 1 << 1;

// Types of levels in the leaves of the topology.
const LEVEL_TYPE_SMT: u32 = 1;
const LEVEL_TYPE_CORE: u32 = 2;

/// Makes the CPUID of one vCPU from what KVM reports as supported.
///
/// The guest has `vcpus` cores of one thread each in one package, with consecutive APIC ids.
/// KVM's own leaves (0x4000_0000 and up, kvm-clock among them) stay as they are.
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8) -> CpuId {
    let mut cpuid = supported.clone();
    let apic_id = u32::from(index);
    let count = u32::from(vcpus);
    // Bits of an APIC id that number the cores of the package.
    let core_bits = count.next_power_of_two().trailing_zeros();

    let has_topology = |leaf| {
        supported
            .as_slice()
            .iter()
            .any(|entry| entry.function == leaf)
    };
    for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2] {
        if has_topology(leaf) {
            cpuid.retain(|entry| entry.function != leaf);
            for entry in topology(leaf, apic_id, count, core_bits) {
                // The list has room: KVM reports at most as many entries as it holds, and the
                // leaf's own entries were just taken out. A guest without them would fall back
                // to leaf 1, so a failure is not fatal.
                let _ = cpuid.push(entry);
            }
        }
    }

    for entry in cpuid.as_mut_slice() {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx =
                    (entry.ebx & 0xff) | (apic_id << 24) | (count << 16) | (CLFLUSH_SIZE << 8);
                entry.ecx &= !FEATURES_ECX_PDCM;
                // The in-kernel APIC implements both whatever the host's processor has. Without
                // the deadline timer Linux spends about 100 ms on calibrating the APIC timer.
                entry.ecx |=
                    FEATURES_ECX_X2APIC | FEATURES_ECX_TSC_DEADLINE | FEATURES_ECX_HYPERVISOR;
                if vcpus > 1 {
                    entry.edx |= FEATURES_EDX_HTT;
                } else {
                    entry.edx &= !FEATURES_EDX_HTT;
                }
            }
            LEAF_CACHE if entry.eax & 0x1f != 0 => {
                // Level 3 belongs to the package, the others to one core (Intel SDM volume 2,
                // CPUID leaf 4: bits 31..26 cores in the package, 25..14 sharing the cache).
                let level = (entry.eax >> 5) & 0x7;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | ((count - 1) << 26) | (sharing << 14);
            }
            LEAF_THERMAL => entry.eax &= !THERMAL_EAX_TURBO,
            // No performance monitoring unit: its counters show what the host does.
            LEAF_PERFORMANCE => {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            LEAF_AMD_SIZES => entry.ecx = (core_bits << 12) | (count - 1),
            LEAF_AMD_TOPOLOGY => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

/// A feature that a guest may be using is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("CPUID leaf {leaf:#x}.{index}: {register} lacks the bits {bits:#x}")]
pub struct MissingFeature {
    leaf: u32,
    index: u32,
    register: &'static str,
    bits: u32,
}

/// Leaves whose registers are sets of features, each a bit (Intel SDM volume 2 and AMD APM volume
/// 3, CPUID; Documentation/virt/kvm/x86/cpuid.rst): the leaf, its index, and for EAX to EDX the bits
/// that count.
const FEATURE_LEAVES: [(u32, u32, [u32; 4]); 9] = [
    // Whether the OS has enabled XSAVE (bit 27) is no feature.
    (LEAF_FEATURES, 0, [0, 0, !(1 << 27), !0]),
    // Whether the OS has enabled protection keys (bit 4) is none either.
    (0x7, 0, [0, !0, !(1 << 4), !0]),
    (0x7, 1, [!0, !0, !0, !0]),
    // The components of the extended state, and how it is saved.
    (0xd, 0, [!0, 0, 0, !0]),
    (0xd, 1, [!0, 0, 0, 0]),
    (0x4000_0001, 0, [!0, 0, 0, 0]),
    (0x8000_0001, 0, [0, 0, !0, !0]),
    (0x8000_0007, 0, [0, 0, 0, !0]),
    (LEAF_AMD_SIZES, 0, [0, !0, 0, 0]),
];

/// Checks that a vCPU with this CPUID can run on a host that supports `supported`.
///
/// # Errors
/// The first feature that is missing.
pub fn check_supported(
    saved: &[kvm_cpuid_entry2],
    supported: &CpuId,
) -> Result<(), MissingFeature> {
    // With what is set whatever the host's processor has.
    let supported = for_vcpu(supported, 0, 2);
    let registers = |entry: &kvm_cpuid_entry2| [entry.eax, entry.ebx, entry.ecx, entry.edx];
    for (leaf, index, counts) in FEATURE_LEAVES {
        let is_it = |entry: &&kvm_cpuid_entry2| entry.function == leaf && entry.index == index;
        let Some(needed) = saved.iter().find(is_it).map(registers) else {
            continue;
        };
        let found = supported.as_slice().iter().find(is_it);
        let found = found.map_or([0; 4], registers);
        for (position, register) in ["EAX", "EBX", "ECX", "EDX"].into_iter().enumerate() {
            let bits = needed[position] & counts[position] & !found[position];
            if bits != 0 {
                return Err(MissingFeature {
                    leaf,
                    index,
                    register,
                    bits,
                });
            }
        }
    }
    Ok(())
}

/// Extended topology enumeration (Intel SDM volume 2, CPUID leaves 0xb and 0x1f): a level of
/// one thread a core, a level of cores, and the level that ends the list.
fn topology(leaf: u32, apic_id: u32, count: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, logical: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: logical,
        ecx: (kind << 8) | index,
        edx: apic_id,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_TYPE_SMT),
        level(1, core_bits, count, LEVEL_TYPE_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: 0x1c12_0122,
            ebx: 0xffff_ffff,
            ecx: FEATURES_ECX_PDCM,
            edx: 0,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(LEAF_FEATURES, 0),
            leaf(LEAF_CACHE, 0),
            leaf(LEAF_PERFORMANCE, 0),
            leaf(LEAF_TOPOLOGY, 0),
            leaf(LEAF_TOPOLOGY, 1),
            leaf(0x4000_0000, 0),
            leaf(LEAF_AMD_SIZES, 0),
            leaf(LEAF_AMD_TOPOLOGY, 0),
        ])
        .unwrap()
    }

    fn entry(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid
            .as_slice()
            .iter()
            .find(|entry| entry.function == function && entry.index == index)
            .unwrap()
    }

    #[test]
    fn every_vcpu_reports_its_own_apic_id_and_the_same_package() {
        for index in 0..3 {
            let cpuid = for_vcpu(&supported(), index, 3);
            let features = entry(&cpuid, LEAF_FEATURES, 0);
            assert_eq!(features.ebx >> 24, u32::from(index));
            assert_eq!((features.ebx >> 16) & 0xff, 3);
            assert_eq!(features.ecx & FEATURES_ECX_PDCM, 0);
            assert_ne!(features.ecx & FEATURES_ECX_TSC_DEADLINE, 0);
            assert_ne!(features.edx & FEATURES_EDX_HTT, 0);

            let cores = entry(&cpuid, LEAF_TOPOLOGY, 1);
            assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 3, u32::from(index)));
            assert_eq!(entry(&cpuid, LEAF_TOPOLOGY, 2).ebx, 0);
            assert_eq!(entry(&cpuid, LEAF_AMD_TOPOLOGY, 0).eax, u32::from(index));
            assert_eq!(entry(&cpuid, LEAF_AMD_SIZES, 0).ecx, (2 << 12) | 2);
        }
    }

    #[test]
    fn a_processor_that_lacks_a_feature_is_refused() {
        let saved = for_vcpu(&supported(), 1, 3);
        assert_eq!(check_supported(saved.as_slice(), &supported()), Ok(()));
        let mut more = saved.clone();
        for entry in more.as_mut_slice() {
            if entry.function == LEAF_FEATURES {
                entry.ecx |= 1 << 12 | 1 << 27;
            }
        }
        let error = check_supported(more.as_slice(), &supported()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CPUID leaf 0x1.0: ECX lacks the bits 0x1000"
        );
        let mut leaf = supported().as_slice()[0];
        (leaf.function, leaf.ebx) = (0x7, 1 << 16);
        assert!(check_supported(&[leaf], &supported()).is_err());
    }

    #[test]
    fn performance_counters_are_hidden_and_kvm_leaves_are_kept() {
        let cpuid = for_vcpu(&supported(), 0, 1);
        let counters = entry(&cpuid, LEAF_PERFORMANCE, 0);
        assert_eq!(
            (counters.eax, counters.ebx, counters.ecx, counters.edx),
            (0, 0, 0, 0)
        );
        assert_eq!(
            entry(&cpuid, 0x4000_0000, 0),
            entry(&supported(), 0x4000_0000, 0)
        );
        assert_eq!(entry(&cpuid, LEAF_FEATURES, 0).edx & FEATURES_EDX_HTT, 0);
    }
}
