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
    if [[ -c /dev/kvm && ! -w /dev/kvm ]]; then
        say "no permission to use /dev/kvm (often: add yourself to the group kvm); emulating"
        return 1
    fi
    local target=${CARGO_TARGET_DIR:-$checkout/target} vmm verdict
    for vmm in "$target"/{release,debug}/vmm; do
        # A fraction of a second, so the verdict is never an old one.
        verdict=$("$vmm" doctor --json 2>/dev/null </dev/null) || true
        case $verdict in
        *'"usable": true'*) return 0 ;;
        *'"usable": false'*)
            note "this machine's KVM does not run Linux guests ($vmm doctor tells why)"
            return 1
            ;;
        esac
    done
    note "no vmm built yet that could try this machine's KVM"
    return 1
}
