//! The command line of a VMM.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use super::HostConfig;
use super::layers::LayerFiles;
use crate::domain::{Layers, PrepareRequest, Resources, Shape, withheld_mb};
use crate::images::Chain;

/// What every guest's kernel is told: console on the serial port and nearly silent, a reset one
/// second after a panic that the VMM did not see, entropy from the CPU, one CPU to boot with (the
/// agent brings up the others) in code that is right for more, grace periods of RCU that do not wait for
/// ticks, no look at the fragmentation of memory twice a second, which is most of what an idle guest
/// wakes up for, and for the agent the root disk that it mounts.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=1 random.trust_cpu=on \
                       maxcpus=1 noreplace-smp rcupdate.rcu_expedited=1 \
                       sysctl.vm.compaction_proactiveness=0 root=/dev/vda rootfstype=ext4 rw";

/// That time stamp counters agree, and no two vCPUs have to spin to compare theirs when one is brought up.
const COUNTERS_AGREE: &str = " tsc=reliable";

/// What this machine tells the time by.
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

/// How much less than this daemon a merge is preferred: as little as there is (nice(2)).
const LOWEST: i32 = 19;

/// The steps of the size of a region that memory is plugged into, in MiB: those of the VMM.
const REGION_STEP_MB: u32 = 128;

/// Where a VMM is jailed.
#[derive(Debug, Clone, Copy)]
pub struct Jail<'a> {
    /// Its user and group; its daemon's without root.
    pub user: Option<u32>,
    pub cgroup: Option<&'a Path>,
}

/// Whether a restored guest runs at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goes {
    /// It does.
    On,
    /// Only when it is told to.
    WhenTold,
}

/// The descriptors that a VMM inherits. They stay open here until it is spawned.
#[derive(Debug, Clone, Copy)]
pub struct Inherited {
    /// Where it writes its events.
    pub events: i32,
    /// Where it listens for requests to its API.
    pub api: i32,
    /// The tap of its network card.
    pub tap: Option<i32>,
}

/// The command that starts a sandbox's VMM. `prefetches` is whether it is to have the memory that it
/// touches first beforehand, if the configuration has that at all. `nic` is the value of the flag for its network card.
pub fn command(
    config: &HostConfig,
    (request, goes, prefetches): (&PrepareRequest, Goes, bool),
    chain: &Chain,
    jail: Option<Jail<'_>>,
    nic: Option<String>,
    inherited: Inherited,
) -> Command {
    let (id, shape, paths) = (&request.id, &request.shape, &config.paths);
    let Inherited { events, api, tap } = inherited;
    let mut command = Command::new(&config.vmm);
    match restore_options(
        LayerFiles(paths.layers()),
        &request.layers,
        goes,
        config.prefetch && prefetches,
    ) {
        Some(options) => {
            command.args(["--restore", &options]);
        }
        None => {
            command
                .arg("--kernel")
                .arg(&config.images.kernel)
                .arg("--initramfs")
                .arg(&config.images.initramfs)
                .args(["--cmdline", &guest_cmdline(config)]);
        }
    }
    command
        .args(size_options(shape, request.resources))
        .arg("--disk")
        .arg(disk_options(&paths.disk(id), chain))
        .args(chain.scratch.iter().flat_map(|scratch| {
            let options = disk_options(&paths.scratch(id), scratch);
            ["--disk".to_owned(), options]
        }))
        .args(["--vsock", &paths.vsock_arg(id)])
        .arg("--serial")
        .arg(format!("file={}", paths.console(id).display()))
        .args(["--console", "off", "--rng", "src=/dev/urandom"])
        .args(["--event-monitor", &format!("fd={events}")])
        .args(["--api-socket", &format!("fd={api}")])
        .args(nic.into_iter().flat_map(|nic| ["--net".to_owned(), nic]))
        .args(
            jail.into_iter()
                .flat_map(|jail| ["--jail".to_owned(), jail_options(jail)]),
        );
    isolate(
        &mut command,
        [Some(events), Some(api), tap].into_iter().flatten(),
    );
    command
}

/// The command that starts a VMM without a machine, which listens for requests at the socket `api`. That
/// stays open here until it is spawned.
pub fn without_machine(vmm: &Path, api: i32) -> Command {
    let mut command = Command::new(vmm);
    command.args(["--api-socket", &format!("fd={api}")]);
    isolate(&mut command, [api]);
    // SAFETY: between fork and exec only async-signal-safe functions may be called, and prctl(2) is one.
    unsafe {
        command.pre_exec(|| {
            // Nothing would end it after a daemon that was killed.
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        });
    }
    command
}

/// The command that merges the images `layers`, bottom first, of a disk of `size` bytes into the empty
/// file `output`. All of them stay open here until it is spawned.
pub fn merge(
    vmm: &Path,
    layers: &[File],
    output: &File,
    size: u64,
    jail: Option<Jail<'_>>,
) -> Command {
    let mut command = Command::new(vmm);
    command
        .arg("merge-disk")
        .args(["--size", &size.to_string()])
        .args(["--output", &output.as_raw_fd().to_string()]);
    let mut inherited = vec![output.as_raw_fd()];
    for layer in layers.iter().rev() {
        command.args(["--layer", &layer.as_raw_fd().to_string()]);
        inherited.push(layer.as_raw_fd());
    }
    if let Some(jail) = jail {
        command.args(["--jail", &jail_options(jail)]);
    }
    isolate(&mut command, inherited);
    // SAFETY: between fork and exec only async-signal-safe functions may be called, and nice(2) is one.
    unsafe {
        command.pre_exec(|| {
            rustix::process::nice(LOWEST)?;
            Ok(())
        });
    }
    command
}

/// Has the process inherit these descriptors, and nothing else of the daemon's. They stay open here
/// until it is spawned.
fn isolate(command: &mut Command, inherited: impl IntoIterator<Item = i32>) {
    let inherited: Vec<_> = inherited.into_iter().collect();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .current_dir("/")
        // Nothing that the daemon was told, such as secrets, is the VMM's business.
        .env_clear()
        // A signal from the terminal is for the daemon, which then ends its VMMs in order.
        .process_group(0)
        .kill_on_drop(true);
    // SAFETY: between fork and exec only async-signal-safe functions may be called, and fcntl(2)
    // is one. The descriptors are open: the caller holds them until after the spawn.
    unsafe {
        command.pre_exec(move || {
            for &inherited in &inherited {
                let inherited = BorrowedFd::borrow_raw(inherited);
                // In the child alone, so that no other child can inherit it.
                rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
}

/// The flags that say how many vCPUs and how much memory a machine has. One that can change while it runs is
/// told what it was booted with: a snapshot of it has what it has become.
fn size_options(shape: &Shape, resources: Resources) -> Vec<String> {
    let Some(booted) = resources.booted else {
        return vec![
            "--cpus".to_owned(),
            format!("boot={}", shape.vcpus),
            "--memory".to_owned(),
            format!("size={}M", shape.memory_mb),
        ];
    };
    let mut memory = format!("size={}M", booted.memory_mb);
    let room = booted.max_memory_mb.saturating_sub(booted.memory_mb);
    if room > 0 {
        let room = room.next_multiple_of(REGION_STEP_MB);
        memory.push_str(&format!(",hotplug_method=virtio-mem,hotplug_size={room}M"));
    }
    let withheld = withheld_mb(booted.memory_mb, resources.memory_limit_percent);
    vec![
        "--cpus".to_owned(),
        format!("boot={},max={}", booted.vcpus, booted.max_vcpus),
        "--memory".to_owned(),
        memory,
        "--balloon".to_owned(),
        format!("size={withheld}M"),
    ]
}

/// What a guest's kernel is told that is booted now.
pub fn guest_cmdline(config: &HostConfig) -> String {
    let clock = fs::read_to_string(CLOCK).unwrap_or_default();
    cmdline(&clock, &config.cmdline_extra)
}

/// What a guest's kernel is told on a machine that tells the time by `clock`. One whose time stamp counters do
/// not agree, or that is itself a guest, tells it by another than those.
fn cmdline(clock: &str, extra: &str) -> String {
    let mut cmdline = CMDLINE.to_owned();
    if clock.trim() == "tsc" {
        cmdline.push_str(COUNTERS_AGREE);
    }
    if !extra.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(extra);
    }
    cmdline
}

/// The value of the flag that restores a machine; `None` if it is to be booted.
fn restore_options(
    files: LayerFiles<'_>,
    layers: &Layers,
    goes: Goes,
    prefetch: bool,
) -> Option<String> {
    let url = |id| format!("file://{}", files.path(id).display());
    let (top, below) = layers.memory.split_last()?;
    let mut options = format!("source_url={}", url(top));
    if !below.is_empty() {
        let below: Vec<_> = below.iter().rev().map(url).collect();
        options.push_str(&format!(",base_url=[{}]", below.join(",")));
    }
    options.push_str(",config=flags");
    if prefetch {
        options.push_str(",prefault=working-set");
    }
    if goes == Goes::WhenTold {
        options.push_str(",resume=off");
    }
    Some(options)
}

/// The value of the flag that gives a machine its disk: the overlay, and what it builds on.
fn disk_options(disk: &Path, chain: &Chain) -> String {
    let layers = chain.layers.iter().rev();
    let mut below: Vec<_> = layers
        .map(|layer| format!("qcow2:{}", layer.display()))
        .collect();
    below.push(format!("raw:{}", chain.base.path.display()));
    format!(
        "path={},image_type=qcow2,backing=[{}]",
        disk.display(),
        below.join(",")
    )
}

/// The value of the flag that jails a VMM.
fn jail_options(jail: Jail<'_>) -> String {
    let mut options = Vec::new();
    if let Some(user) = jail.user {
        options.push(format!("uid={user},gid={user}"));
    }
    if let Some(cgroup) = jail.cgroup {
        options.push(format!("cgroup={}", cgroup.display()));
    }
    options.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Booted, LayerId};
    use crate::images::Base;

    #[test]
    fn counters_agree_where_the_host_tells_the_time_by_them() {
        assert!(cmdline("tsc\n", "").ends_with(" rw tsc=reliable"));
        assert!(cmdline("tsc\n", "a=b").ends_with(" rw tsc=reliable a=b"));
        for clock in ["kvm-clock\n", "hpet\n", ""] {
            assert!(cmdline(clock, "a=b").ends_with(" rw a=b"), "{clock}");
        }
    }

    #[test]
    fn a_machine_with_room_is_told_what_it_was_booted_with() {
        let shape = Shape {
            template: "minimal".to_owned(),
            vcpus: 4,
            memory_mb: 1024,
        };
        let options = |resources| size_options(&shape, resources).join(" ");
        assert_eq!(
            options(Resources::default()),
            "--cpus boot=4 --memory size=1024M"
        );
        let resources = Resources {
            memory_limit_percent: Some(75),
            booted: Some(Booted::with_room(2, 512, 1 << 20)),
            ..Resources::default()
        };
        assert_eq!(
            options(resources),
            "--cpus boot=2,max=4 --memory size=512M,hotplug_method=virtio-mem,hotplug_size=512M \
             --balloon size=128M"
        );
        let small = Resources {
            booted: Some(Booted::with_room(1, 192, 4096)),
            ..Resources::default()
        };
        assert_eq!(
            options(small),
            "--cpus boot=1,max=2 --memory size=192M,hotplug_method=virtio-mem,hotplug_size=256M \
             --balloon size=0M"
        );
        let full = Resources {
            booted: Some(Booted::with_room(32, 512, 512)),
            ..Resources::default()
        };
        assert_eq!(
            options(full),
            "--cpus boot=32,max=32 --memory size=512M --balloon size=0M"
        );
    }

    #[test]
    fn disk_layers_are_named_from_the_top() {
        let base = Base {
            path: "/images/minimal.ext4".into(),
            size: 1 << 20,
            grown: None,
            modified_ns: 0,
        };
        let mut chain = Chain {
            base,
            layers: Vec::new(),
            scratch: None,
        };
        let disk = Path::new("/data/disk.qcow2");
        assert_eq!(
            disk_options(disk, &chain),
            "path=/data/disk.qcow2,image_type=qcow2,backing=[raw:/images/minimal.ext4]"
        );
        chain.layers = vec!["/data/0".into(), "/data/1".into()];
        assert_eq!(
            disk_options(disk, &chain),
            "path=/data/disk.qcow2,image_type=qcow2,\
             backing=[qcow2:/data/1,qcow2:/data/0,raw:/images/minimal.ext4]"
        );
    }

    #[test]
    fn memory_layers_are_named_from_the_top() {
        let files = LayerFiles(Path::new("/data/layers"));
        let mut layers = Layers::default();
        assert_eq!(restore_options(files, &layers, Goes::On, true), None);
        for expected in [
            "source_url=file:///data/layers/0,config=flags",
            "source_url=file:///data/layers/1,base_url=[file:///data/layers/0],config=flags",
            "source_url=file:///data/layers/2,\
             base_url=[file:///data/layers/1,file:///data/layers/0],config=flags",
        ] {
            layers = layers.saved(LayerId::random(), LayerId::random());
            let mut options = restore_options(files, &layers, Goes::On, false).unwrap();
            let held = restore_options(files, &layers, Goes::WhenTold, true).unwrap();
            assert_eq!(held, format!("{options},prefault=working-set,resume=off"));
            for (index, id) in layers.memory.iter().enumerate() {
                options = options.replace(id.as_str(), &index.to_string());
            }
            assert_eq!(options, expected);
        }
    }
}
