//! The VMMs that are measured, each set up to do the same with as little as it can.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Serialize;

use crate::{
    api::Api,
    channel::Channel,
    stage::{Stage, StageError},
};

/// The guest that every peer boots.
#[derive(Debug, Clone, Serialize)]
pub struct Guest {
    /// Kernel, an ELF file.
    pub kernel: PathBuf,
    /// Initial RAM file system with the agent.
    pub initramfs: PathBuf,
    /// Root file system, a raw image that is only read; without it the guest stays in the
    /// initramfs.
    pub rootfs: Option<PathBuf>,
    /// A raw image that the guest may write.
    pub data: Option<PathBuf>,
    /// Name of the host's tap that its network card is on.
    pub tap: Option<String>,
    /// Whether the VMM serves its API.
    pub api: bool,
    /// Kernel command line.
    pub cmdline: String,
    /// Memory, in MiB.
    pub memory_mib: u64,
}

/// Why a peer cannot take part.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// Not found.
    #[error("{0} is not installed")]
    NotFound(&'static str),
    /// It does not even tell its version.
    #[error("{program} does not run: {reason}", program = program.display())]
    NotRunning {
        /// The program.
        program: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// It needs a device of the host that is not there.
    #[error("cannot open {path} (modprobe vhost_vsock)", path = path.display())]
    Device {
        /// The device.
        path: PathBuf,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// No copy could be made.
    #[error("cannot prepare it")]
    Stage(#[from] StageError),
}

/// A VMM that can be measured.
#[derive(Debug, Clone)]
pub struct Peer {
    kind: Kind,
    program: PathBuf,
    /// Directories to find shared libraries in, before the system's.
    libraries: Vec<PathBuf>,
    /// Directories to find firmware in, instead of QEMU's own.
    firmware: Vec<PathBuf>,
    version: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Vmm,
    QemuMicrovm,
}

/// Name of this project's VMM in results.
pub const VMM: &str = "vmm";
/// Name of QEMU with its machine type `microvm` in results.
pub const QEMU_MICROVM: &str = "qemu-microvm";
const QEMU: &str = "qemu-system-x86_64";
const VHOST_VSOCK: &str = "/dev/vhost-vsock";
const VHOST_NET: &str = "/dev/vhost-net";
/// Where libraries and firmware lie below the directory that a QEMU was unpacked to.
const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const FIRMWARE: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];

impl Peer {
    /// This project's VMM, `program`.
    ///
    /// # Errors
    /// It does not run.
    pub fn vmm(program: &Path, stage: &Stage) -> Result<Self, PeerError> {
        Self {
            kind: Kind::Vmm,
            program: stage.copy(program, "vmm")?,
            libraries: Vec::new(),
            firmware: Vec::new(),
            version: String::new(),
        }
        .with_version()
    }

    /// QEMU: `program` if given, else the newest that the directory `unpacked` holds, else the
    /// system's.
    ///
    /// # Errors
    /// There is none, it does not run, or the host has no vhost-vsock.
    pub fn qemu_microvm(
        program: Option<&Path>,
        unpacked: Option<&Path>,
        stage: &Stage,
    ) -> Result<Self, PeerError> {
        if let Err(source) = fs::File::open(VHOST_VSOCK) {
            let path = VHOST_VSOCK.into();
            return Err(PeerError::Device { path, source });
        }
        let mut peer = Self {
            kind: Kind::QemuMicrovm,
            program: PathBuf::new(),
            libraries: Vec::new(),
            firmware: Vec::new(),
            version: String::new(),
        };
        if let Some(program) = program {
            peer.program = program.to_owned();
        } else if let Some(from) = unpacked.and_then(newest_qemu_in) {
            let copy = |part: &str| {
                let from = from.join(part);
                let to = format!("qemu-{}", part.replace('/', "-"));
                from.exists().then(|| stage.copy(&from, &to)).transpose()
            };
            peer.program = stage.copy(&from.join("usr/bin").join(QEMU), QEMU)?;
            for part in LIBRARIES {
                peer.libraries.extend(copy(part)?);
            }
            for part in FIRMWARE {
                peer.firmware.extend(copy(part)?);
            }
        } else {
            peer.program = in_path(QEMU).ok_or(PeerError::NotFound(QEMU))?;
        }
        peer.with_version()
    }

    fn with_version(mut self) -> Result<Self, PeerError> {
        let failed = |reason: String| PeerError::NotRunning {
            program: self.program.clone(),
            reason,
        };
        let output = self
            .command()
            .arg("--version")
            .output()
            .map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(failed(words));
        }
        let version = String::from_utf8_lossy(&output.stdout);
        self.version = version.lines().next().unwrap_or_default().to_owned();
        Ok(self)
    }

    /// Its name in results.
    pub fn name(&self) -> &'static str {
        match self.kind {
            Kind::Vmm => VMM,
            Kind::QemuMicrovm => QEMU_MICROVM,
        }
    }

    /// What it says of its version.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Whether it reports events on its standard output.
    pub fn reports_events(&self) -> bool {
        self.kind == Kind::Vmm
    }

    /// Where the host's side of its guest's vsock device will be, for a guest that is started
    /// with files in `directory` and the context id `cid`.
    pub fn channel(&self, directory: &Path, cid: u32) -> Channel {
        match self.kind {
            Kind::Vmm => Channel::Unix(directory.join("vsock")),
            Kind::QemuMicrovm => Channel::Vsock(cid),
        }
    }

    /// Where it serves its API, for a guest that is started with files in `directory`.
    pub fn api(&self, directory: &Path) -> Api {
        match self.kind {
            Kind::Vmm => Api::Http(api_socket(directory)),
            Kind::QemuMicrovm => Api::Qmp(api_socket(directory)),
        }
    }

    /// The command that boots `guest`: one vCPU, no console, a vsock device, a source of
    /// entropy, and the disks that the guest has.
    pub fn boot(&self, guest: &Guest, directory: &Path, cid: u32) -> Command {
        let mut command = self.command();
        command.args(match self.kind {
            Kind::Vmm => vmm_arguments(guest, directory, cid),
            Kind::QemuMicrovm => self.qemu_arguments(guest, directory, cid),
        });
        command
    }

    /// The command that starts our VMM with nothing but its API.
    pub fn without_machine(&self, directory: &Path) -> Command {
        let mut command = self.command();
        command
            .arg("--api-socket")
            .arg(prefixed("path=", &api_socket(directory)));
        command
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if !self.libraries.is_empty() {
            command.env("LD_LIBRARY_PATH", joined(&self.libraries, ":"));
        }
        command
    }

    fn qemu_arguments(&self, guest: &Guest, directory: &Path, cid: u32) -> Vec<OsString> {
        let mut arguments = Arguments::default();
        for directory in &self.firmware {
            arguments.option("-L", directory);
        }
        arguments
            // All that the machine has by default and this guest does not use is off. Our kernel
            // takes its virtio devices from ACPI, so that stays; and qboot starts a kernel by
            // itself, where SeaBIOS, the default with ACPI, needs an option ROM for it.
            .option("-bios", "qboot.rom")
            .option(
                "-machine",
                "microvm,acpi=on,pic=off,pit=off,rtc=off,isa-serial=off,usb=off,\
                 x-option-roms=off,auto-kernel-cmdline=off",
            )
            .option("-accel", "kvm")
            .option("-cpu", "host")
            .option("-smp", "1")
            .option("-m", format!("{}M", guest.memory_mib))
            .flag("-nodefaults")
            .flag("-no-user-config")
            .flag("-no-reboot")
            .option("-display", "none")
            .option("-serial", "none")
            .option("-monitor", "none")
            .option("-kernel", &guest.kernel)
            .option("-initrd", &guest.initramfs)
            .option("-append", &guest.cmdline)
            .option("-global", "virtio-mmio.force-legacy=false")
            .option("-device", format!("vhost-vsock-device,guest-cid={cid}"))
            .option("-device", "virtio-rng-device");
        if let Some(rootfs) = &guest.rootfs {
            let drive = prefixed("id=root,if=none,format=raw,readonly=on,file=", rootfs);
            arguments
                .option("-drive", drive)
                .option("-device", "virtio-blk-device,drive=root");
        }
        if let Some(data) = &guest.data {
            let drive = prefixed("id=data,if=none,format=raw,file=", data);
            arguments
                .option("-drive", drive)
                .option("-device", "virtio-blk-device,drive=data");
        }
        if let Some(tap) = &guest.tap {
            // In the host's kernel, as its vsock device is, if there is one.
            let vhost = if fs::File::open(VHOST_NET).is_ok() {
                "on"
            } else {
                "off"
            };
            arguments
                .option(
                    "-netdev",
                    format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}"),
                )
                .option("-device", "virtio-net-device,netdev=net");
        }
        if guest.api {
            let mut socket = prefixed("unix:", &api_socket(directory));
            socket.push(",server=on,wait=off");
            arguments.option("-qmp", socket);
        }
        arguments.0
    }
}

fn vmm_arguments(guest: &Guest, directory: &Path, cid: u32) -> Vec<OsString> {
    let mut arguments = Arguments::default();
    arguments
        .option("--kernel", &guest.kernel)
        .option("--initramfs", &guest.initramfs)
        .option("--cmdline", &guest.cmdline)
        .option("--cpus", "boot=1")
        .option("--memory", format!("size={}M", guest.memory_mib))
        .option(
            "--vsock",
            prefixed(&format!("cid={cid},socket="), &directory.join("vsock")),
        )
        .option("--serial", "off")
        .option("--console", "off")
        .option("--event-monitor", "path=/dev/stdout");
    if let Some(rootfs) = &guest.rootfs {
        let mut disk = prefixed("path=", rootfs);
        disk.push(",image_type=raw,readonly=on");
        arguments.option("--disk", disk);
    }
    if let Some(data) = &guest.data {
        let mut disk = prefixed("path=", data);
        disk.push(",image_type=raw");
        arguments.option("--disk", disk);
    }
    if let Some(tap) = &guest.tap {
        arguments.option("--net", format!("tap={tap}"));
    }
    if guest.api {
        arguments.option("--api-socket", prefixed("path=", &api_socket(directory)));
    }
    arguments.0
}

fn api_socket(directory: &Path) -> PathBuf {
    directory.join("api")
}

#[derive(Default)]
struct Arguments(Vec<OsString>);

impl Arguments {
    fn flag(&mut self, name: &str) -> &mut Self {
        self.0.push(name.into());
        self
    }

    fn option(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.extend([name.into(), value.as_ref().to_owned()]);
        self
    }
}

fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut value = OsString::from(prefix);
    value.push(path);
    value
}

fn joined(paths: &[PathBuf], separator: &str) -> OsString {
    let mut joined = OsString::new();
    for path in paths {
        if !joined.is_empty() {
            joined.push(separator);
        }
        joined.push(path);
    }
    joined
}

/// The directory `qemu-…` in `directory` that was made last and holds a QEMU.
fn newest_qemu_in(directory: &Path) -> Option<PathBuf> {
    fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"qemu-"))
        .map(|entry| entry.path())
        .filter_map(|path| {
            let program = fs::metadata(path.join("usr/bin").join(QEMU)).ok()?;
            Some((program.modified().ok()?, path))
        })
        .max()
        .map(|(_, path)| path)
}

fn in_path(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(rootfs: Option<&str>) -> Guest {
        Guest {
            kernel: "/k/vmlinux".into(),
            initramfs: "/k/initramfs".into(),
            rootfs: rootfs.map(PathBuf::from),
            data: Some("/d/disk".into()),
            tap: Some("tap7".to_owned()),
            api: true,
            cmdline: "quiet panic=1".to_owned(),
            memory_mib: 256,
        }
    }

    fn peer(kind: Kind) -> Peer {
        Peer {
            kind,
            program: "/bin/true".into(),
            libraries: Vec::new(),
            firmware: Vec::new(),
            version: String::new(),
        }
    }

    fn value_of(command: &Command, option: &str) -> Vec<String> {
        let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
        arguments
            .windows(2)
            .filter(|pair| pair[0] == option)
            .map(|pair| pair[1].to_string())
            .collect()
    }

    #[test]
    fn both_get_the_same_guest() {
        let guest = guest(Some("/k/root"));
        let ours = peer(Kind::Vmm).boot(&guest, Path::new("/d"), 7);
        let theirs = peer(Kind::QemuMicrovm).boot(&guest, Path::new("/d"), 7);
        assert_eq!(value_of(&ours, "--kernel"), value_of(&theirs, "-kernel"));
        assert_eq!(value_of(&ours, "--initramfs"), value_of(&theirs, "-initrd"));
        assert_eq!(value_of(&ours, "--cmdline"), value_of(&theirs, "-append"));
        assert_eq!(value_of(&ours, "--memory"), ["size=256M"]);
        assert_eq!(value_of(&theirs, "-m"), ["256M"]);
        assert_eq!(value_of(&ours, "--vsock"), ["cid=7,socket=/d/vsock"]);
        assert!(value_of(&ours, "--disk")[0].starts_with("path=/k/root,"));
        assert!(value_of(&theirs, "-drive")[0].ends_with("file=/k/root"));
        assert_eq!(value_of(&ours, "--disk")[1], "path=/d/disk,image_type=raw");
        assert!(value_of(&theirs, "-drive")[1].ends_with("file=/d/disk"));
        assert_eq!(value_of(&ours, "--api-socket"), ["path=/d/api"]);
        assert_eq!(value_of(&ours, "--net"), ["tap=tap7"]);
        assert!(value_of(&theirs, "-netdev")[0].starts_with("tap,id=net,ifname=tap7,"));
        assert!(value_of(&theirs, "-qmp")[0].starts_with("unix:/d/api,"));
    }

    #[test]
    fn our_command_line_is_one_that_our_vmm_takes() {
        use clap::Parser;
        for rootfs in [None, Some("/k/root")] {
            let command = peer(Kind::Vmm).boot(&guest(rootfs), Path::new("/d"), 7);
            let words = std::iter::once(command.get_program()).chain(command.get_args());
            let cli = vmm::cli::Cli::try_parse_from(words).unwrap();
            let vmm::cli::Start::Boot(config) = cli.boot.start().unwrap() else {
                panic!("no machine to boot");
            };
            assert_eq!(config.memory.size, 256 << 20);
            assert_eq!(config.disks.len(), 1 + usize::from(rootfs.is_some()));
            assert_eq!(config.net.len(), 1);
            assert!(cli.boot.api_socket.is_some());
            assert!(config.vsock.is_some() && cli.boot.event_monitor.is_some());
        }
    }

    #[test]
    fn the_newest_unpacked_qemu_is_found() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(newest_qemu_in(directory.path()), None);
        fs::create_dir(directory.path().join("qemu-empty")).unwrap();
        assert_eq!(newest_qemu_in(directory.path()), None);
        let program = directory.path().join("qemu-1/usr/bin");
        fs::create_dir_all(&program).unwrap();
        fs::write(program.join(QEMU), "").unwrap();
        assert_eq!(
            newest_qemu_in(directory.path()),
            Some(directory.path().join("qemu-1"))
        );
    }

    #[test]
    fn a_program_that_fails_is_no_peer() {
        let stage = Stage::new().unwrap();
        let error = Peer::vmm(Path::new("/bin/false"), &stage).unwrap_err();
        assert!(matches!(error, PeerError::NotRunning { .. }), "{error}");
    }
}
