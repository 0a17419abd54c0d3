# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # variables are shared with kvm-host
# shellcheck disable=SC2094 # FIFOs are opened for both ways on purpose
# The emulated machine: its booted image, and a job run in it. Sourced by kvm-host.
#
# The machine's serial ports, each a FIFO in the work directory on this side:
#   1 control   lines both ways, see kvm-host-job
#   2 out       standard output, ended by the mark
#   3 err       standard error, ended by the mark
#   4 in        standard input
# Whoever opens a FIFO for reading sees its end when its last writer is gone. Control's writer
# is this script alone, so the machine ends itself when this script is gone; control's reader
# sees QEMU's death as the end, because QEMU holds a write end from its start.

# How long a machine may take to boot or resume before it is given up, on a busy host too.
start_limit=180

run_in_machine() {
    cpus=${cpus:-$(default_cpus)} mem=${mem:-$(default_memory)}
    remove_stale_jobs
    work=$(mktemp -d "$cache/job.$$.XXXXXX")
    machine='' status='' started='' expired='' interrupts=0
    trap clean_up EXIT
    describe_machine
    image=''
    [[ -n $cold ]] || prepare_image
    start_job "$@"
    attend_job
    [[ -z $expired ]] || die_expired
    ((interrupts < 2)) || exit 130
    [[ -n $status ]] || die_failed
    exit "$status"
}

# What runs that were killed have left: the directory's name holds the number of its process.
remove_stale_jobs() {
    local directory process
    for directory in "$cache"/job.*.*; do
        process=${directory##*/job.}
        kill -0 "${process%%.*}" 2>/dev/null || rm -rf "$directory"
    done
}

default_cpus() {
    local count
    count=$(nproc)
    echo $((count > 4 ? 4 : count))
}

default_memory() {
    local half
    half=$(awk '$1 == "MemTotal:" { print int($2 / 2048) }' /proc/meminfo)
    echo $((half > 6144 ? 6144 : half / 256 * 256))M
}

clean_up() {
    end_machine
    [[ -z ${feeder:-} ]] || kill "$feeder" 2>/dev/null || true
    [[ -z ${terminal_state:-} ]] || stty "$terminal_state" <&4
    [[ -z $verbose ]] || cat "$work/console" >&2 2>/dev/null || true
    rm -rf "$work"
}

# What an image is made from and resumed into, so all but the back ends.
describe_machine() {
    local options=(
        console=ttyS0 quiet panic=-1 reboot=t
        # The emulated CPU has no speculation to mitigate, and an exact time stamp counter.
        mitigations=off nokaslr no_timer_check tsc=reliable clocksource=tsc random.trust_cpu=on
        audit=0 apparmor=0 cryptomgr.notests=1
    )
    # The emulation takes REP STOSB and REP MOVSB byte by byte, and each store to a page that held code takes a slow
    # path: without the flags that say they are fast, kernels use whole words.
    local cpu=max,+svm,-erms,-fsrm
    description=(
        -nodefaults -no-user-config -display none -no-reboot
        -machine "q35,smbus=off,sata=off,i8042=off,hpet=off,usb=off,vmport=off"
        -accel "tcg,thread=multi,tb-size=512" -cpu "$cpu" -smp "$cpus" -m "$mem"
        -kernel "$kernel/vmlinux" -initrd "$initramfs" -append "${options[*]}"
        -device "virtio-serial,max_ports=8"
        -device "virtserialport,nr=1,chardev=control" -device "virtserialport,nr=2,chardev=out"
        -device "virtserialport,nr=3,chardev=err" -device "virtserialport,nr=4,chardev=in"
        -fsdev "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
        -device "virtio-9p-pci,fsdev=root,mount_tag=root"
        -fsdev "local,id=shared,path=/,security_model=none,multidevs=remap"
        -device "virtio-9p-pci,fsdev=shared,mount_tag=shared"
        -device "virtio-net-pci,netdev=net,romfile="
    )
}

# Sets image to that of a machine that waits for its job, making it if there is none.
prepare_image() {
    exec 9>"$cache/lock"
    flock 9
    if ! part image "${description[@]}" "${qemu[@]}" "$("${qemu[@]}" --version)"; then
        say "booting the emulated machine once, to resume it from now on"
        if make_image "$part_dir.new/image"; then
            finish_part
        else
            say "no booted image could be made; booting instead"
            tail -n 3 "$work"/image.{err,console} >&2
        fi
    fi
    exec 9>&-
    [[ ! -e $part_dir/image ]] || image=$part_dir/image
}

make_image() (
    trap - EXIT
    mkfifo "$work"/image.{control.in,control.out,monitor.in,monitor.out}
    exec 6<>"$work/image.control.out" 7<>"$work/image.monitor.out"
    exec 5<"$work/image.control.out" 8<"$work/image.monitor.out"
    exec 3<>"$work/image.control.in" 4<>"$work/image.monitor.in"
    "${qemu[@]}" "${description[@]}" -netdev user,id=net,restrict=on -serial "file:$work/image.console" \
        -chardev "file,id=control,path=$work/image.control.out,input-path=$work/image.control.in" \
        -chardev null,id=out -chardev null,id=err -chardev null,id=in \
        -chardev "pipe,id=monitor,path=$work/image.monitor" -mon chardev=monitor,mode=control \
        </dev/null >"$work/image.err" 2>&1 5<&- 8<&- 9>&- &
    machine=$!
    trap 'kill -KILL $machine 2>/dev/null' EXIT
    exec 6>&- 7>&-
    read -r -t $start_limit _ <&5 || return 1
    cat >&4 <<END
{"execute": "qmp_capabilities"}
{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "events", "state": true}, {"capability": "mapped-ram", "state": true}]}}
{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 10000000000}}
{"execute": "migrate", "arguments": {"uri": "file:$1"}}
END
    while read -r -t $start_limit event <&8; do
        case $event in
        *'"status": "completed"'*) return 0 ;;
        *'"status": "failed"'* | *'"error"'*)
            echo "$event" >>"$work/image.err"
            return 1
            ;;
        esac
    done
    return 1
)

start_job() {
    local network=user,id=net port resume=() mark seed
    [[ -n $net ]] || network+=,restrict=on
    for port in ${ports[@]+"${ports[@]}"}; do
        network+=,hostfwd=tcp:127.0.0.1:${port%:*}-127.0.0.1:${port#*:}
    done
    [[ -z $image ]] || resume=(-global migration.mapped-ram=on -incoming "file:$image")

    cp "$here/lib/kvm-host-job" "$work/start"
    describe_job "$@"
    mark=$(random_hex) seed=$(random_hex)

    mkfifo "$work"/{control.in,control.out,out,err,in}
    exec 3<>"$work/control.out" 6<"$work/control.out" 4<&0
    exec 8<>"$work/control.in" 7>"$work/control.in"
    printf '%s %s %s %s\n' "$(date +%s)" "$seed" "$mark" "$work" >&7
    note "starting QEMU${image:+ from $image}"
    # In a session of its own, out of reach of the terminal's signals.
    setsid "${qemu[@]}" "${description[@]}" -netdev "$network" ${resume[@]+"${resume[@]}"} \
        -serial "file:$work/console" \
        -chardev "file,id=control,path=$work/control.out,input-path=$work/control.in" \
        -chardev "file,id=out,path=$work/out" -chardev "file,id=err,path=$work/err" \
        -chardev "file,id=in,path=/dev/null,input-path=$work/in" \
        </dev/null >"$work/qemu.err" 2>&1 4<&- 6<&- 7>&- 8>&- &
    machine=$!
    exec 3>&-
    relay out 1 "$mark" 4<&- 6<&- 8>&- &
    relay_out=$!
    relay err 2 "$mark" >&2 4<&- 6<&- 8>&- &
    relay_err=$!
    if [[ -t 0 && -z $tty ]]; then exec 4</dev/null; fi
    cat <&4 >"$work/in" 6<&- 7>&- 8>&- &
    feeder=$!
}

# relay STREAM NUMBER MARK: passes an output stream of the job on, whatever signals the process
# group gets. If its reader here goes away, the job's end of it is closed too, unless the machine is gone.
relay() {
    trap '' INT TERM HUP
    "$here/lib/kvm-host-relay" "$3" <"$work/$1" 7>&- || printf 'closed %s\n' "$2" 2>/dev/null >&7
}

# What kvm-host-job reads: the settings, and the command in its environment and directory.
describe_job() {
    local terminal=''
    if [[ -n $tty ]]; then
        [[ -t 0 && -t 1 ]] || die "--tty: standard input and output are not a terminal"
        terminal=$(stty size | awk '{ print "rows " $1 " cols " $2 }')
        terminal_state=$(stty -g)
    fi
    {
        printf 'modules=%q terminal=%q\nshared=(' "$kernel/lib/modules/$(<"$kernel/version")" "$terminal"
        printf '%q ' "${shared[@]}"
        printf ')\n'
    } >"$work/spec"
    {
        MVS_KVM_HOST=direct
        export MVS_KVM_HOST
        export -p
        printf 'cd %q || exit\nexec' "$PWD"
        printf ' %q' "$@"
        echo
    } >"$work/command"
}

random_hex() { od -An -tx8 -N32 /dev/urandom | tr -d ' \n'; }

# Reads what the machine reports until the job is over, or the machine is.
attend_job() {
    local word rest limit=$((SECONDS + start_limit)) patience
    trap ':' PIPE
    trap 'forward INT' INT
    trap 'forward TERM' TERM
    trap 'forward HUP' HUP
    while ((SECONDS < limit)) || overdue; do
        # Now and then the emulated CPU misses its timer's interrupt and sleeps on, for minutes. A
        # line from outside, which nobody has to understand, wakes it.
        patience=$((limit - SECONDS < 2 ? limit - SECONDS : 2))
        if read -r -t "$patience" word rest <&6; then
            case $word in
            started)
                note "COMMAND runs after $SECONDS s"
                started=1
                # From here on QEMU alone reads control.
                exec 8>&-
                [[ -z ${terminal_state:-} ]] || stty raw -echo <&4
                limit=$((SECONDS + ${timeout:-31536000}))
                ;;
            exit)
                status=$rest
                break
                ;;
            failed)
                say "$rest"
                break
                ;;
            esac
        elif (($? <= 128)); then
            break
        elif [[ -n $started ]]; then
            echo awake >&7
        fi
    done
    if [[ -n $status ]]; then
        await "$relay_out"
        await "$relay_err"
    fi
    end_machine
    await "$relay_out"
    await "$relay_err"
}

# The time is up: asks the job to end, and the second time ends the machine. Fails if there is
# nothing more to wait for.
overdue() {
    [[ -n $started && -z $expired ]] || return 1
    expired=1
    say "time limit of $timeout s reached"
    forward TERM
    limit=$((SECONDS + 10))
}

# forward SIGNAL: to the job; a second INT ends the machine.
forward() {
    if [[ $1 == INT ]] && ((++interrupts > 1)); then
        end_machine
    else
        printf 'signal %s\n' "$1" >&7 || true
    fi
}

end_machine() {
    [[ -n $machine ]] || return 0
    kill -KILL "$machine" 2>/dev/null || true
    await "$machine"
    machine=''
}

# await PROCESS: a child's end, whatever signals come in between.
await() {
    # Waited for once at least, without standard error: else bash tells of killed children there.
    wait "$1" 2>/dev/null || true
    while kill -0 "$1" 2>/dev/null; do wait "$1" 2>/dev/null || true; done
}

die_expired() { exit 124; }

die_failed() {
    if [[ -n $image && -z $started ]]; then
        # It may be damaged; the next run makes another.
        rm -rf "$(dirname "$image")"
    fi
    sed 's/^/kvm-host: qemu: /' "$work/qemu.err" >&2
    [[ ! -s $work/console ]] || tail -n 5 "$work/console" | sed 's/^/kvm-host: console: /' >&2
    if grep -q 'host forwarding rule' "$work/qemu.err"; then
        die "a port given by --port is in use on this machine; end what uses it or give another"
    fi
    die "the emulated machine ended without a result (--verbose shows its console)"
}
