//! The command line of a VMM.

use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use super::HostConfig;
use super::layers::LayerFiles;
use crate::domain::{CreateRequest, Layers};
use crate::images::Chain;

/// What every guest's kernel is told: console on the serial port and nearly silent, a reset one
/// second after a panic that the VMM did not see, entropy from the CPU, and for the agent the
/// root disk that it mounts.
const CMDLINE: &str = "console=ttyS0 quiet loglevel=4 panic=1 random.trust_cpu=on \
                       root=/dev/vda rootfstype=ext4 rw";

/// Where a VMM is jailed.
#[derive(Debug, Clone, Copy)]
pub struct Jail<'a> {
    /// Its user and group; its daemon's without root.
    pub user: Option<u32>,
    pub cgroup: Option<&'a Path>,
}

/// The descriptors that a VMM inherits. They stay open here until it is spawned.
#[derive(Debug, Clone, Copy)]
pub struct Inherited {
    /// Where it writes its events.
    pub events: i32,
    /// Where it listens for requests to its API.
    pub api: i32,
}

/// The command that starts a sandbox's VMM.
pub fn command(
    config: &HostConfig,
    request: &CreateRequest,
    chain: &Chain,
    jail: Option<Jail<'_>>,
    inherited: Inherited,
) -> Command {
    let (id, shape, paths) = (&request.id, &request.shape, &config.paths);
    let Inherited { events, api } = inherited;
    let mut command = Command::new(&config.vmm);
    match restore_options(LayerFiles(paths.layers()), &request.layers) {
        Some(options) => {
            command.args(["--restore", &options]);
        }
        None => {
            let mut cmdline = CMDLINE.to_owned();
            if !config.cmdline_extra.is_empty() {
                cmdline.push(' ');
                cmdline.push_str(&config.cmdline_extra);
            }
            command
                .arg("--kernel")
                .arg(&config.images.kernel)
                .arg("--initramfs")
                .arg(&config.images.initramfs)
                .args(["--cmdline", &cmdline]);
        }
    }
    command
        .args(["--cpus", &format!("boot={}", shape.vcpus)])
        .args(["--memory", &format!("size={}M", shape.memory_mb)])
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
        .args(
            jail.into_iter()
                .flat_map(|jail| ["--jail".to_owned(), jail_options(jail)]),
        )
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
            for inherited in [events, api] {
                let inherited = BorrowedFd::borrow_raw(inherited);
                // In the child alone, so that no other child can inherit it.
                rustix::io::fcntl_setfd(inherited, rustix::io::FdFlags::empty())?;
            }
            Ok(())
        });
    }
    command
}

/// The value of the flag that restores a machine; `None` if it is to be booted.
fn restore_options(files: LayerFiles<'_>, layers: &Layers) -> Option<String> {
    let url = |id| format!("file://{}", files.path(id).display());
    let (top, below) = layers.memory.split_last()?;
    let mut options = format!("source_url={}", url(top));
    if !below.is_empty() {
        let below: Vec<_> = below.iter().rev().map(url).collect();
        options.push_str(&format!(",base_url=[{}]", below.join(",")));
    }
    options.push_str(",config=flags");
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
    use crate::domain::LayerId;
    use crate::images::Base;

    #[test]
    fn disk_layers_are_named_from_the_top() {
        let base = Base {
            path: "/images/minimal.ext4".into(),
            size: 1 << 20,
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
        assert_eq!(restore_options(files, &layers), None);
        for expected in [
            "source_url=file:///data/layers/0,config=flags",
            "source_url=file:///data/layers/1,base_url=[file:///data/layers/0],config=flags",
            "source_url=file:///data/layers/2,\
             base_url=[file:///data/layers/1,file:///data/layers/0],config=flags",
        ] {
            layers = layers.saved(LayerId::random(), LayerId::random());
            let mut options = restore_options(files, &layers).unwrap();
            for (index, id) in layers.memory.iter().enumerate() {
                options = options.replace(id.as_str(), &index.to_string());
            }
            assert_eq!(options, expected);
        }
    }
}
