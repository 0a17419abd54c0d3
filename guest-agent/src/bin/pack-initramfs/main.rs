//! Packs the guest agent, and kernel modules where a kernel needs them, into an initramfs.
//!
//! The archive holds the agent as `/init`, the two device nodes that must exist before devtmpfs
//! is mounted, and in `/modules` the modules with the order to load them in.

mod cpio;
mod modules;

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use cpio::Archive;
use modules::Absent;

const USAGE: &str = "\
usage: pack-initramfs --agent FILE --output FILE [--kernel-modules DIRECTORY [--module NAME]...]

  --agent FILE                the static agent
  --output FILE               the archive to write, uncompressed newc cpio
  --kernel-modules DIRECTORY  /lib/modules/VERSION of the kernel that is to be booted
  --module NAME               a module to load, with all that it depends on; what is built into
                              the kernel is passed over. By default what virtual machines use,
                              as far as the kernel has it
";

/// What a guest of ours finds in its machine, and the file systems it uses. ext4 asks for the
/// checksum by a name that only modprobe could resolve; kernels since 6.15 have it built in.
const DEFAULT_MODULES: &[&str] = &[
    "crc32c_generic",
    "virtio_mmio",
    "virtio_blk",
    "ext4",
    "vmw_vsock_virtio_transport",
    "virtio_net",
    "virtio_rng",
    "overlay",
    "pvpanic-mmio",
];

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}\n\n{USAGE}")]
    Usage(String),
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("cannot write {0}")]
    Write(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Modules(#[from] modules::ModulesError),
}

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("pack-initramfs: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> Result<(), Error> {
    let (mut agent, mut output, mut kernel, mut names) = (None, None, None, Vec::new());
    while let Some(argument) = arguments.next() {
        if argument == "--help" {
            print!("{USAGE}");
            return Ok(());
        }
        let value = arguments
            .next()
            .ok_or_else(|| Error::Usage(format!("{argument} needs a value")))?;
        match argument.as_str() {
            "--agent" => agent = Some(PathBuf::from(value)),
            "--output" => output = Some(PathBuf::from(value)),
            "--kernel-modules" => kernel = Some(PathBuf::from(value)),
            "--module" => names.push(value),
            _ => return Err(Error::Usage(format!("unknown argument {argument}"))),
        }
    }
    let (Some(agent), Some(output)) = (agent, output) else {
        return Err(Error::Usage("--agent and --output are needed".to_owned()));
    };
    let init = fs::read(&agent).map_err(|e| Error::Read(agent, e))?;
    let modules = match kernel {
        Some(kernel) if names.is_empty() => {
            let defaults: Vec<_> = DEFAULT_MODULES.iter().map(|&n| n.to_owned()).collect();
            modules::collect(&kernel, &defaults, Absent::PassOver)?
        }
        Some(kernel) => modules::collect(&kernel, &names, Absent::Refuse)?,
        None => Vec::new(),
    };
    // Beside the output and renamed, so that a reader never sees half an archive.
    let partial = output.with_extension(format!("partial-{}", std::process::id()));
    write(&partial, &init, &modules)
        .and_then(|()| fs::rename(&partial, &output))
        .map_err(|e| {
            let _ = fs::remove_file(&partial);
            Error::Write(output, e)
        })
}

fn write(path: &Path, init: &[u8], modules: &[modules::Module]) -> io::Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(path)?));
    archive.directory("dev", 0o755)?;
    // The kernel opens the console for its first process, and that process' runtime opens null
    // where there is no console, before anything is mounted.
    archive.char_device("dev/console", 0o600, (5, 1))?;
    archive.char_device("dev/null", 0o666, (1, 3))?;
    archive.file("init", 0o755, init)?;
    if !modules.is_empty() {
        archive.directory("modules", 0o755)?;
        let mut order = String::new();
        for module in modules {
            archive.file(&format!("modules/{}", module.file), 0o644, &module.content)?;
            order.push_str(&module.file);
            order.push('\n');
        }
        archive.file("modules/order", 0o644, order.as_bytes())?;
    }
    archive.finish()?.flush()
}
