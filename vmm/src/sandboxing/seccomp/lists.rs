//! Which thread may make which system calls. Unusual entries have their reason beside them.

use libc::{c_long, c_ulong};

/// A call that is allowed with these arguments.
pub(super) struct Call(pub(super) c_long, pub(super) Arguments);

/// What arguments a call may have.
pub(super) enum Arguments {
    /// Any.
    Any,
    /// The argument with this index is one of these values.
    OneOf(u8, &'static [u64]),
    /// The argument with this index has none of these bits.
    Without(u8, u64),
    /// The second argument is the request with one of these numbers of KVM (`KVMIO`, 0xae, in
    /// linux/kvm.h). Direction and size, which follow from the number, are the kernel's to check.
    Kvm(&'static [u64]),
}

use Arguments::{Any, Kvm, OneOf, Without};

/// No memory is executable that was not when the program was loaded.
const NO_EXEC: Arguments = Without(2, libc::PROT_EXEC as u64);

/// What the C library passes to `clone` for a thread, and only for that.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// `PR_SET_VMA`: the allocator names its memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

const fn request(request: c_ulong) -> u64 {
    request
}

/// Calls with a path. There is nothing to find, and no file may be made.
pub(super) const NO_PATH: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_getcwd,
];

/// What the Rust runtime and the C library do in every thread.
pub(super) const COMMON: &[Call] = &[
    Call(libc::SYS_read, Any),
    Call(libc::SYS_readv, Any),
    Call(libc::SYS_write, Any),
    Call(libc::SYS_writev, Any),
    Call(libc::SYS_close, Any),
    Call(libc::SYS_futex, Any),
    Call(libc::SYS_brk, Any),
    Call(libc::SYS_mmap, NO_EXEC),
    Call(libc::SYS_mprotect, NO_EXEC),
    Call(libc::SYS_munmap, Any),
    Call(libc::SYS_mremap, Any),
    Call(libc::SYS_madvise, Any),
    Call(libc::SYS_sched_yield, Any),
    // The allocator and Rust ask how many CPUs there are.
    Call(libc::SYS_sched_getaffinity, Any),
    Call(libc::SYS_clock_gettime, Any),
    Call(libc::SYS_clock_nanosleep, Any),
    Call(libc::SYS_nanosleep, Any),
    Call(libc::SYS_restart_syscall, Any),
    Call(libc::SYS_getrandom, Any),
    Call(libc::SYS_rt_sigprocmask, Any),
    Call(libc::SYS_rt_sigaction, Any),
    Call(libc::SYS_rt_sigreturn, Any),
    Call(libc::SYS_sigaltstack, Any),
    Call(libc::SYS_rseq, Any),
    Call(libc::SYS_set_robust_list, Any),
    Call(libc::SYS_getpid, Any),
    Call(libc::SYS_gettid, Any),
    // Kicks vCPUs out of the guest, and aborts. In its PID namespace, the process has no other
    // process to send a signal to.
    Call(libc::SYS_tgkill, Any),
    Call(libc::SYS_exit, Any),
    Call(libc::SYS_exit_group, Any),
    // Narrows the thread's filter, which never widens it.
    Call(
        libc::SYS_seccomp,
        OneOf(0, &[libc::SECCOMP_SET_MODE_FILTER as u64]),
    ),
    Call(
        libc::SYS_prctl,
        OneOf(
            0,
            &[
                libc::PR_SET_NAME as u64,
                libc::PR_SET_NO_NEW_PRIVS as u64,
                PR_SET_VMA,
            ],
        ),
    ),
    // Queries of what is open already.
    Call(libc::SYS_fstat, Any),
    Call(libc::SYS_newfstatat, Any),
    Call(libc::SYS_statx, Any),
    Call(libc::SYS_fstatfs, Any),
    Call(libc::SYS_lseek, Any),
    Call(libc::SYS_fcntl, Any),
    // The log of the serial port starts over; the port's registers are written by vCPUs.
    Call(libc::SYS_ftruncate, Any),
];

/// A vCPU, its registers, and those of devices.
pub(super) const VCPU: &[Call] = &[Call(libc::SYS_ioctl, Kvm(VCPU_REQUESTS))];

const VCPU_REQUESTS: &[u64] = &[
    0x80, // KVM_RUN
    0x81, 0x82, // KVM_GET_REGS, KVM_SET_REGS
    0x83, 0x84, // KVM_GET_SREGS, KVM_SET_SREGS
    0x88, 0x89, // KVM_GET_MSRS, KVM_SET_MSRS
    0x8c, 0x8d, // KVM_GET_FPU, KVM_SET_FPU
    0x8e, 0x8f, // KVM_GET_LAPIC, KVM_SET_LAPIC
    0x90, 0x91, // KVM_SET_CPUID2, KVM_GET_CPUID2
    0x98, 0x99, // KVM_GET_MP_STATE, KVM_SET_MP_STATE
    0x9a, // KVM_NMI
    0x9b, // KVM_SET_GUEST_DEBUG
    0x9f, 0xa0, // KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS
    0xa1, // KVM_GET_DEBUGREGS
    0xa2, 0xa3, // KVM_SET_TSC_KHZ or KVM_SET_DEBUGREGS, KVM_GET_TSC_KHZ
    0xa4, 0xa5, // KVM_GET_XSAVE, KVM_SET_XSAVE
    0xa6, 0xa7, // KVM_GET_XCRS, KVM_SET_XCRS
    0xad, // KVM_KVMCLOCK_CTRL
    0xcf, // KVM_GET_XSAVE2
    0xd5, // KVM_PRE_FAULT_MEMORY
];

/// Requests to a virtual machine that runs: its memory, clock and interrupts.
const VM_REQUESTS: &[u64] = &[
    0x03, // KVM_CHECK_EXTENSION
    0x42, // KVM_GET_DIRTY_LOG
    0x46, // KVM_SET_USER_MEMORY_REGION
    0x61, // KVM_IRQ_LINE
    0x62, 0x63, // KVM_GET_IRQCHIP, KVM_SET_IRQCHIP
    0x76, // KVM_IRQFD
    0x79, // KVM_IOEVENTFD
    0x7b, 0x7c, // KVM_SET_CLOCK, KVM_GET_CLOCK
    0x9f, 0xa0, // KVM_GET_PIT2, KVM_SET_PIT2
    0xa5, // KVM_SIGNAL_MSI
];

/// The owner of the machine, which pauses, queries and takes it down.
pub(super) const CONTROL: &[Call] = &[
    Call(libc::SYS_poll, Any),
    Call(libc::SYS_ppoll, Any),
    Call(
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                // The terminal gets its mode back at the end.
                request(libc::TCGETS),
                request(libc::TCGETS2),
                request(libc::TCSETS),
                request(libc::TCSETS2),
                request(libc::TCSETSW),
                request(libc::TCSETSF),
            ],
        ),
    ),
    Call(libc::SYS_ioctl, Kvm(VM_REQUESTS)),
    Call(libc::SYS_ioctl, Kvm(VCPU_REQUESTS)),
    // A vCPU that is plugged in: KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, and its thread.
    Call(libc::SYS_ioctl, Kvm(&[0x04, 0x41])),
    Call(libc::SYS_clone, OneOf(0, &[THREAD])),
    // Taking the machine down writes what is in memory to its disks.
    Call(libc::SYS_pwrite64, Any),
    Call(libc::SYS_pwritev, Any),
    Call(libc::SYS_pread64, Any),
    Call(libc::SYS_preadv, Any),
    Call(libc::SYS_fsync, Any),
    Call(libc::SYS_fdatasync, Any),
    Call(libc::SYS_fallocate, Any),
    Call(libc::SYS_epoll_ctl, Any),
    Call(libc::SYS_timerfd_settime, Any),
    Call(libc::SYS_shutdown, Any),
];

/// The event loop: sockets of host programs, taps, timers.
pub(super) const EVENT_LOOP: &[Call] = &[
    Call(libc::SYS_epoll_wait, Any),
    Call(libc::SYS_epoll_pwait, Any),
    Call(libc::SYS_epoll_ctl, Any),
    Call(libc::SYS_ppoll, Any),
    Call(libc::SYS_poll, Any),
    Call(libc::SYS_eventfd2, Any),
    Call(libc::SYS_timerfd_create, Any),
    Call(libc::SYS_timerfd_settime, Any),
    Call(libc::SYS_timerfd_gettime, Any),
    Call(libc::SYS_accept4, Any),
    // A guest program connects to a host program.
    Call(libc::SYS_socket, OneOf(0, &[libc::AF_UNIX as u64])),
    Call(libc::SYS_connect, Any),
    Call(libc::SYS_recvfrom, Any),
    Call(libc::SYS_recvmsg, Any),
    Call(libc::SYS_sendto, Any),
    Call(libc::SYS_sendmsg, Any),
    Call(libc::SYS_shutdown, Any),
    Call(libc::SYS_getsockopt, Any),
    Call(
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                // What work a tap's receiver does itself changes when a driver starts.
                request(libc::TUNSETOFFLOAD as c_ulong),
                request(libc::FIONBIO),
                BLKDISCARD,
                BLKZEROOUT,
            ],
        ),
    ),
    Call(libc::SYS_ioctl, Kvm(VM_REQUESTS)),
    // Guest memory that is unplugged or reported free goes back to the host.
    Call(libc::SYS_fallocate, Any),
    // Threads for disks, when a driver starts.
    Call(libc::SYS_clone, OneOf(0, &[THREAD])),
];

/// Reads and writes of disks.
pub(super) const IO: &[Call] = &[
    Call(libc::SYS_pread64, Any),
    Call(libc::SYS_pwrite64, Any),
    Call(libc::SYS_preadv, Any),
    Call(libc::SYS_pwritev, Any),
    Call(libc::SYS_preadv2, Any),
    Call(libc::SYS_pwritev2, Any),
    Call(libc::SYS_fsync, Any),
    Call(libc::SYS_fdatasync, Any),
    Call(libc::SYS_sync_file_range, Any),
    Call(libc::SYS_fallocate, Any),
    Call(libc::SYS_ioctl, OneOf(1, &[BLKDISCARD, BLKZEROOUT])),
    Call(libc::SYS_epoll_wait, Any),
    Call(libc::SYS_epoll_ctl, Any),
    Call(libc::SYS_ppoll, Any),
    Call(libc::SYS_timerfd_settime, Any),
];

/// The control socket: one client after the other, and what it asks of the machine.
pub(super) const API: &[Call] = &[
    Call(libc::SYS_epoll_wait, Any),
    Call(libc::SYS_epoll_pwait, Any),
    Call(libc::SYS_epoll_create1, Any),
    Call(libc::SYS_epoll_ctl, Any),
    Call(libc::SYS_ppoll, Any),
    Call(libc::SYS_poll, Any),
    Call(libc::SYS_eventfd2, Any),
    Call(libc::SYS_timerfd_settime, Any),
    Call(libc::SYS_accept4, Any),
    Call(libc::SYS_recvfrom, Any),
    // Descriptors come with the head of a request.
    Call(libc::SYS_recvmsg, Any),
    Call(libc::SYS_sendto, Any),
    Call(libc::SYS_sendmsg, Any),
    Call(libc::SYS_shutdown, Any),
    Call(libc::SYS_getsockname, Any),
    Call(libc::SYS_getpeername, Any),
    Call(libc::SYS_getsockopt, Any),
    Call(libc::SYS_setsockopt, Any),
    // The runtime wakes itself by one of these.
    Call(libc::SYS_socketpair, OneOf(0, &[libc::AF_UNIX as u64])),
    Call(libc::SYS_pipe2, Any),
    Call(libc::SYS_ioctl, OneOf(1, &[request(libc::FIONBIO)])),
    Call(libc::SYS_ioctl, Kvm(VM_REQUESTS)),
    Call(libc::SYS_ioctl, Kvm(VCPU_REQUESTS)),
    Call(libc::SYS_clone, OneOf(0, &[THREAD])),
    // A snapshot or core goes to a descriptor that the client gave.
    Call(libc::SYS_pwrite64, Any),
    Call(libc::SYS_fsync, Any),
    Call(libc::SYS_fallocate, Any),
];

/// What only building a machine takes.
pub(super) const SETUP: &[Call] = &[
    Call(
        libc::SYS_ioctl,
        Kvm(&[
            0x00, // KVM_GET_API_VERSION
            0x01, // KVM_CREATE_VM
            0x02, // KVM_GET_MSR_INDEX_LIST
            0x04, // KVM_GET_VCPU_MMAP_SIZE
            0x05, // KVM_GET_SUPPORTED_CPUID
            0x41, // KVM_CREATE_VCPU
            0x47, // KVM_SET_TSS_ADDR
            0x48, // KVM_SET_IDENTITY_MAP_ADDR
            0x60, // KVM_CREATE_IRQCHIP
            0x6a, // KVM_SET_GSI_ROUTING
            0x77, // KVM_CREATE_PIT2
            0xa3, // KVM_ENABLE_CAP
        ]),
    ),
    // The size of a disk that is a block device.
    Call(
        libc::SYS_ioctl,
        OneOf(
            1,
            &[
                BLKGETSIZE64,
                request(libc::BLKSSZGET as c_ulong),
                request(libc::BLKPBSZGET as c_ulong),
            ],
        ),
    ),
    // Guests may use AMX (`ARCH_REQ_XCOMP_GUEST_PERM`).
    Call(libc::SYS_arch_prctl, OneOf(0, &[0x1025])),
    Call(libc::SYS_epoll_create1, Any),
    Call(libc::SYS_signalfd4, Any),
    Call(libc::SYS_pipe2, Any),
];

// Requests to block devices, of linux/fs.h.

/// `_IOR(0x12, 114, size_t)`.
const BLKGETSIZE64: u64 = 0x8008_1272;
/// `_IO(0x12, 119)`.
const BLKDISCARD: u64 = 0x1277;
/// `_IO(0x12, 127)`.
const BLKZEROOUT: u64 = 0x127f;

/// All that the waiter needs, but for `kill`.
pub(super) const WAITER: &[Call] = &[
    Call(libc::SYS_wait4, Any),
    Call(libc::SYS_rt_sigtimedwait, Any),
    Call(libc::SYS_rt_sigaction, Any),
    Call(libc::SYS_rt_sigprocmask, Any),
    Call(libc::SYS_rt_sigreturn, Any),
    Call(libc::SYS_getpid, Any),
    Call(libc::SYS_restart_syscall, Any),
    // The one sentence on a VMM that broke the rules.
    Call(libc::SYS_write, OneOf(0, &[libc::STDERR_FILENO as u64])),
    Call(libc::SYS_exit_group, Any),
];
