//! The programs and images under test.
//!
//! | What | Variable | Default, below cargo's target directory |
//! |---|---|---|
//! | VMM | `MVS_VMM` | `release/vmm` |
//! | daemon | `MVS_SANDBOXD` | `release/sandboxd` |
//! | guest kernel, initramfs and template | `MVS_IMAGES` | `images/` |
//! | stock kernel and its initramfs | `MVS_STOCK_IMAGES` | `images/stock/` |
//! | template `linux-default` | `MVS_PYTHON_TEMPLATE` | `images/linux-default.ext4` |
//! | hostile guest | `MVS_HOSTILE_GUEST` | as `tests/hostile-guest/build` makes it |

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Where the programs and images are.
#[derive(Debug)]
pub struct Setup {
    /// The VMM.
    pub vmm: PathBuf,
    /// The daemon.
    pub sandboxd: PathBuf,
    /// Directory with `vmlinux`, `initramfs.cpio` and `minimal.ext4`.
    pub images: PathBuf,
    /// Directory with `vmlinuz` of a distribution and an `initramfs.cpio` with its modules.
    pub stock_images: PathBuf,
    /// The root disk of a template with Python, which no guest may write.
    pub python_template: PathBuf,
    /// The guest that attacks its machine's devices.
    pub hostile_guest: PathBuf,
}

impl Setup {
    /// Our kernel.
    pub fn kernel(&self) -> PathBuf {
        self.images.join("vmlinux")
    }

    /// The initramfs with the agent.
    pub fn initramfs(&self) -> PathBuf {
        self.images.join("initramfs.cpio")
    }

    /// The root disk of template `minimal`, which no guest may write.
    pub fn template(&self) -> PathBuf {
        self.images.join("minimal.ext4")
    }
}

/// The programs and images under test.
///
/// # Panics
/// One of them is not there.
pub fn setup() -> &'static Setup {
    static SETUP: OnceLock<Setup> = OnceLock::new();
    SETUP.get_or_init(|| {
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => PathBuf::from(directory),
            None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
        };
        let find = |variable: &str, default: &str| {
            let path =
                std::env::var_os(variable).map_or_else(|| target.join(default), PathBuf::from);
            path.canonicalize().unwrap_or_else(|error| {
                panic!(
                    "{}: {error}. Build it with `make images` and `tests/run`, or name another \
                     in {variable}",
                    path.display()
                )
            })
        };
        let setup = Setup {
            vmm: find("MVS_VMM", "release/vmm"),
            sandboxd: find("MVS_SANDBOXD", "release/sandboxd"),
            images: find("MVS_IMAGES", "images"),
            stock_images: find("MVS_STOCK_IMAGES", "images/stock"),
            python_template: find("MVS_PYTHON_TEMPLATE", "images/linux-default.ext4"),
            hostile_guest: find(
                "MVS_HOSTILE_GUEST",
                "hostile-guest/x86_64-unknown-linux-gnu/release/hostile-guest",
            ),
        };
        for needed in [
            setup.kernel(),
            setup.initramfs(),
            setup.template(),
            setup.stock_images.join("vmlinuz"),
            setup.stock_images.join("initramfs.cpio"),
            PathBuf::from("/dev/kvm"),
        ] {
            assert!(
                needed.exists(),
                "{} is missing. `make images` and `tests/run` make the images; guests need a \
                 machine with KVM, or scripts/kvm-host",
                needed.display()
            );
        }
        setup
    })
}

/// A new directory for sockets, disks and logs, best in memory. Its path is short enough for
/// sockets.
///
/// # Panics
/// It cannot be made.
pub fn scratch() -> tempfile::TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("mvs-test-");
    builder
        .tempdir_in("/run")
        .or_else(|_| builder.tempdir())
        .expect("a temporary directory")
}
