# Shared by the scripts that build images into the cache; sourced, after `set -euo pipefail`.
#
# The caller sets ME, the name its messages start with.  Messages go to stderr: stdout is
# the caller's result.

say() { printf '%s: %s\n' "$ME" "$*" >&2; }
die() { say "$@"; exit 1; }

# Directory of everything that can be built again.
cache_root() { printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/microvm-sandbox"; }

# as_root COMMAND...: runs it as root, through sudo if need be.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif command -v sudo >/dev/null; then sudo -- "$@"
    else die "root is needed for: $* (become root or install sudo)"
    fi
}

# apt_refresh: brings the system's package lists up to date, once a run.
APT_REFRESHED=
apt_refresh() {
    [ -z "$APT_REFRESHED" ] || return 0
    say "updating the package lists (apt-get update)"
    as_root apt-get -qq update >&2 || say "apt-get update failed; going on with the lists there are"
    APT_REFRESHED=1
}

# need_packages PACKAGE...: installs those that are missing.  Builds run side by side, and
# apt's own locks fail instead of waiting, so one lock per machine orders them.
need_packages() {
    local package missing=()
    for package in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]} (apt-get install)"
    local lock; lock=$(cache_root)/apt.lock
    mkdir -p "${lock%/*}"
    (
        flock 8
        local install=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300
            install -y --no-install-recommends "${missing[@]}")
        as_root "${install[@]}" >/dev/null 2>&1 8>&- && exit
        apt_refresh 8>&-
        as_root "${install[@]}" >&2 8>&-
    ) 8>"$lock" || die "could not install ${missing[*]}: see the messages above"
}

# lock_cache FILE: holds FILE's lock until this process ends, or says whom it waits for.
lock_cache() {
    mkdir -p "${1%/*}"
    exec 9>"$1"
    flock -n 9 || { say "waiting for another build to finish ($1)"; flock 9; }
}

# hash_of WORD...: 16 hexadecimal digits of what it reads on stdin and the words.
hash_of() { { cat; printf '%s\n' "$@"; } | sha256sum | cut -c1-16; }

# holds GREP-ARGUMENT...: whether a line of stdin matches. Reads all of it: a pipe closed early
# ends its writer with SIGPIPE, which `pipefail` takes for a failure.
holds() { [ -n "$(grep "$@")" ]; }
