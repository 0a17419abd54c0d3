# shellcheck shell=bash disable=SC2034,SC2154 # variables are shared with kvm-host
# The parts of the emulated machine: QEMU, a stock kernel, an initramfs. Sourced by kvm-host.
#
# Packages are unpacked into the cache, never installed: nothing of this system changes, and
# no privilege is needed. Each part has a directory that is named by a hash of what it was
# made from, and appears there whole or not at all.

# Modules for the way to the shared root, and those that a VMM's host needs from the start
# because nothing loads them on demand.
boot_modules=(virtio_pci virtio_console 9pnet_virtio 9p overlay virtio_net kvm_amd tun vhost_vsock loop)

# Sets qemu (an array: the program and where its data lies), kernel (a directory with vmlinux,
# version, lib/modules) and initramfs (a file).
prepare_parts() {
    local tool
    for tool in apt-get dpkg-deb flock sha256sum perl setsid; do
        command -v "$tool" >/dev/null || unsupported "$tool is missing"
    done
    exec 9>"$cache/lock"
    flock 9
    # What a run that was cut short has left, and parts that nothing has used for a month.
    rm -rf "$cache"/*.new
    find "$cache" -mindepth 1 -maxdepth 1 -type d -name '*-*' -mtime +30 -exec rm -rf {} +
    prepare_qemu
    prepare_kernel
    prepare_initramfs
    exec 9>&-
}

unsupported() {
    die "this machine's KVM does not run Linux guests, and it cannot be emulated here: $*." \
        "Use a machine whose KVM does (\`vmm doctor\` tells), Debian 12 or newer, or any Linux" \
        "with Debian's package tools and QEMU 10 or newer (MVS_KVM_HOST_QEMU)"
}

# Runs an APT tool on package lists of our own: the system's sources and, for Debian, backports.
private_apt() {
    local tool=$1 state=$cache/apt
    shift
    "$tool" -qq -o Dir::Etc::sourceparts="$state/sources" -o Dir::State::lists="$state/lists" \
        -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root "$@"
}

refresh_lists() {
    [[ -z ${lists_are_fresh:-} ]] || return 0
    local state=$cache/apt release source uri
    release=$(os_release VERSION_CODENAME)
    rm -rf "$state/sources"
    mkdir -p "$state/sources" "$state/lists/partial" "$state/cache/archives/partial"
    for source in /etc/apt/sources.list.d/*.{list,sources}; do
        [[ ! -e $source ]] || ln -s "$source" "$state/sources/"
    done
    if [[ $(os_release ID) == debian ]]; then
        # shellcheck disable=SC2016 # the format is APT's
        uri=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $release" | sed -n 1p)
        echo "deb ${uri:-http://deb.debian.org/debian} $release-backports main" >"$state/sources/backports.list"
    fi
    private_apt apt-get update >"$state/log" 2>&1 || {
        cat "$state/log" >&2
        say "not all package lists could be fetched; going on with what there is"
    }
    lists_are_fresh=1
}

os_release() { sed -n "s/^$1=\"\\{0,1\\}\\([^\"]*\\)\"\\{0,1\\}\$/\\1/p" /etc/os-release; }

# unpack DIRECTORY PACKAGE[=VERSION]...
unpack() {
    local into=$1 debs
    shift
    debs=$(mktemp -d "$cache/debs.XXXXXX")
    (cd "$debs" && private_apt apt-get download "$@" >&2) || {
        rm -rf "$debs"
        die "could not download $*"
    }
    local deb
    for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$into"; done
    rm -rf "$debs"
}

# part NAME KEY...: sets part_dir; fails if it must be made (in $part_dir.new, then finish_part).
part() {
    local name=$1
    shift
    part_dir=$cache/$name-$(printf '%s\n' "$@" | sha256sum | cut -c1-16)
    if [[ -d $part_dir ]]; then
        touch "$part_dir"
        return 0
    fi
    rm -rf "$part_dir.new"
    mkdir -p "$part_dir.new"
    return 1
}
finish_part() {
    # Packages bring their own times.
    touch "$part_dir.new"
    mv "$part_dir.new" "$part_dir"
}

qemu_major() { "$@" --version 2>/dev/null | sed -n 's/.*version \([0-9]*\).*/\1/p'; }

# Before QEMU 10 the emulated SVM loses the XSETBV intercept: a nested guest's XCR0, and with
# it the guest, is broken.
prepare_qemu() {
    local system=${MVS_KVM_HOST_QEMU:-qemu-system-x86_64} major
    major=$(qemu_major "$system") || true
    if ((${major:-0} >= 10)); then
        qemu=("$system")
        return
    fi
    [[ -z ${MVS_KVM_HOST_QEMU:-} ]] ||
        die "MVS_KVM_HOST_QEMU=$MVS_KVM_HOST_QEMU is ${major:+version }${major:-no QEMU}; 10 or newer is needed"
    if part qemu "$(cat /etc/os-release)" && use_unpacked_qemu "$part_dir"; then
        return
    fi
    rm -rf "$part_dir" "$part_dir.new"
    mkdir -p "$part_dir.new"
    say "fetching QEMU 10"
    refresh_lists
    # What installing it would add to this system is what it needs beyond it.
    local wanted=(qemu-system-x86 qemu-system-common qemu-system-data seabios) packages backports
    backports=$(os_release VERSION_CODENAME)-backports
    if private_apt apt-cache madison qemu-system-x86 | grep "$backports" >/dev/null; then
        wanted=("${wanted[@]/%//$backports}")
    fi
    mapfile -t packages < <(LC_ALL=C private_apt apt-get --simulate --no-install-recommends install "${wanted[@]}" |
        sed -n 's/^Inst \([^ ]*\) .*(\([^ ]*\) .*/\1=\2/p')
    ((${#packages[@]})) || unsupported "no QEMU package to be had"
    unpack "$part_dir.new" "${packages[@]}"
    use_unpacked_qemu "$part_dir.new" ||
        unsupported "$(os_release PRETTY_NAME) has QEMU ${major:-of no usable version}, and 10 or newer is needed"
    finish_part
    use_unpacked_qemu "$part_dir"
}

# Sets qemu to the one unpacked below the given directory, if it runs and is new enough.
use_unpacked_qemu() {
    qemu=(env "LD_LIBRARY_PATH=$1/usr/lib/x86_64-linux-gnu:$1/lib/x86_64-linux-gnu"
        "$1/usr/bin/qemu-system-x86_64" -L "$1/usr/share/qemu" -L "$1/usr/share/seabios")
    major=$(qemu_major "${qemu[@]}") || true
    ((${major:-0} >= 10))
}

# kernel_package PACKAGE[/RELEASE]: the kernel that this package of none in particular depends on.
kernel_package() {
    private_apt apt-cache depends "$1" | awk '$1 == "Depends:" { if (!found++) print $2 }'
}

prepare_kernel() {
    local version
    # The cached kernel stays until the release changes: a newer one is no better a KVM host.
    if ! part kernel "$(os_release ID) $(os_release VERSION_ID)" "$(declare -f kernel_package prepare_kernel)"; then
        say "fetching a stock kernel"
        refresh_lists
        local package backports
        package=$(kernel_package linux-image-amd64) || true
        backports=linux-image-amd64/$(os_release VERSION_CODENAME)-backports
        # From 6.12 on KVM maps guest memory beforehand (KVM_PRE_FAULT_MEMORY), as present hosts do.
        if printf '%s\n' "$package" linux-image-6.12 | sort --check=quiet --version-sort &&
            private_apt apt-cache madison "${backports%/*}" | grep -- "${backports#*/}" >/dev/null; then
            package=$(kernel_package "$backports") || true
        fi
        [[ -n $package ]] || unsupported "no package linux-image-amd64 to be had"
        unpack "$part_dir.new" "$package" busybox-static
        version=${package#linux-image-}
        cp "$(find "$part_dir.new" -path '*bin/busybox' -type f -print -quit)" "$part_dir.new/busybox"
        [[ -d $part_dir.new/lib/modules ]] || ln -s usr/lib "$part_dir.new/lib"
        # Drivers of hardware that the machine does not have are most of it.
        rm -rf "$part_dir.new/lib/modules/$version/kernel"/{sound,drivers/{gpu,media,usb,iio,staging,infiniband,net/ethernet,net/wireless}}
        "$part_dir.new/busybox" depmod -b "$part_dir.new" "$version"
        unpack_vmlinux "$part_dir.new/boot/vmlinuz-$version" "$part_dir.new/vmlinux"
        echo "$version" >"$part_dir.new/version"
        finish_part
    fi
    kernel=$part_dir
}

# unpack_vmlinux BZIMAGE OUT: the ELF kernel within, so that no emulated CPU has to decompress it.
# The setup header (Documentation/arch/x86/boot.rst) tells where: setup_sects at 0x1f1,
# payload_offset at 0x248 from the start of the protected-mode code, payload_length at 0x24c.
unpack_vmlinux() {
    local sectors offset length decompress
    sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$1")
    offset=$(od -An -tu4 -j $((0x248)) -N4 "$1")
    length=$(od -An -tu4 -j $((0x24c)) -N4 "$1")
    offset=$(((sectors + 1) * 512 + offset))
    case $(od -An -tx1 -j "$offset" -N4 "$1" | tr -d ' ') in
    fd377a58) decompress='xz -dc --single-stream' ;;
    28b52ffd) decompress='zstd -dc' ;;
    1f8b*) decompress='gzip -dc' ;;
    *) die "$1: unknown compression" ;;
    esac
    command -v "${decompress%% *}" >/dev/null || die "${decompress%% *} is needed to unpack the kernel: install it"
    # The last four bytes of the payload are the unpacked size, which is no part of the stream.
    tail -c +$((offset + 1)) "$1" | head -c $((length - 4)) | $decompress >"$2" || true
    [[ $(head -c 4 "$2" | od -An -tx1 | tr -d ' ') == 7f454c46 ]] || die "$1: holds no ELF kernel"
}

prepare_initramfs() {
    local version
    version=$(<"$kernel/version")
    if ! part initramfs "$kernel" "${boot_modules[*]}" "$(cat "$here/lib/kvm-host-init")"; then
        local root=$part_dir.new/root from=$kernel/lib/modules/$version file
        local to=$root/lib/modules/$version
        mkdir -p "$root"/{bin,dev,proc,run,root,sys} "$to"
        cp "$kernel/busybox" "$root/bin/"
        cp "$from"/modules.{order,builtin,dep,alias,symbols} "$to/"
        while read -r file; do
            mkdir -p "$to/$(dirname "$file")"
            cp "$from/$file" "$to/$file"
        done < <(module_files "$from/modules.dep" "${boot_modules[@]}")
        install -m 755 "$here/lib/kvm-host-init" "$root/init"
        echo "${boot_modules[*]}" >"$root/modules"
        (cd "$root" && find . | "$kernel/busybox" cpio -o -H newc 2>/dev/null) >"$part_dir.new/initramfs"
        rm -rf "$root"
        finish_part
    fi
    initramfs=$part_dir/initramfs
}

# module_files MODULES.DEP NAME...: the files of these modules and of all that they need.
module_files() {
    local dep=$1
    shift
    awk -v names="$*" '
        BEGIN { count = split(names, list, " "); for (i = 1; i <= count; i++) wanted[list[i]] = 1 }
        {
            sub(":", "", $1)
            name = $1; sub(".*/", "", name); sub("[.]ko.*", "", name); gsub("-", "_", name)
            if (name in wanted) for (i = 1; i <= NF; i++) print $i
        }' "$dep" | sort -u
}
