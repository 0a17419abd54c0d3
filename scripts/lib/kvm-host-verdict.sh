# shellcheck shell=bash
# Whether this machine's KVM runs Linux guests. Sourced by kvm-host.

# Succeeds if it does. Only a guest that runs can tell, so `vmm doctor` decides; without a
# built vmm the answer is no, which is slower but never wrong.
kvm_runs_linux() {
    case ${MVS_KVM_HOST:-} in
    direct) return 0 ;;
    emulated) return 1 ;;
    '') ;;
    *) die "MVS_KVM_HOST=$MVS_KVM_HOST: expected direct or emulated" ;;
    esac
    # What the administrator can change within the hour is looked at every time.
    if [[ ! -c /dev/kvm ]]; then
        note "no /dev/kvm here"
        return 1
    fi
    if [[ ! -r /dev/kvm || ! -w /dev/kvm ]]; then
        say "no permission to use /dev/kvm (often: add yourself to the group kvm); emulating"
        return 1
    fi
    local vmm='' candidate
    for candidate in "${CARGO_TARGET_DIR:-$checkout/target}"/{release,debug}/vmm; do
        [[ ! -x $candidate ]] || [[ -n $vmm ]] || vmm=$candidate
    done
    if [[ -z $vmm ]]; then
        note "no vmm built yet that could try this machine's KVM"
        return 1
    fi
    local key verdict
    key=$({
        uname -srv
        sed '/^$/q' /proc/cpuinfo | grep -E '^(vendor_id|cpu family|model|stepping|microcode|flags)'
    } | sha256sum | cut -c1-16)
    verdict=$cache/verdict-$key
    if [[ ! -s $verdict ]]; then
        local status=0
        "$vmm" doctor --json </dev/null >/dev/null 2>&1 || status=$?
        case $status in
        0) echo direct >"$verdict.$$" ;;
        1) echo emulated >"$verdict.$$" ;;
        *)
            note "$vmm doctor gave no verdict (exit status $status)"
            return 1
            ;;
        esac
        mv "$verdict.$$" "$verdict"
    fi
    [[ $(<"$verdict") == direct ]]
}
