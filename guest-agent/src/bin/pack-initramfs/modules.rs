//! Kernel modules and what they depend on (modules.dep(5), modules.builtin in kbuild).

use std::{
    collections::{HashMap, HashSet},
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A module to load.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Its file name, without a suffix of compression.
    pub file: String,
    /// The uncompressed ELF object.
    pub content: Vec<u8>,
}

/// Why the modules cannot be collected.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file cannot be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] io::Error),
    /// The kernel has no such module, and has it not built in.
    #[error("the kernel of {directory} has no module {name}")]
    Unknown {
        /// The module.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The program that decompresses a module fails.
    #[error("cannot decompress {path} with {program}; is it installed?")]
    Decompress {
        /// The module's file.
        path: PathBuf,
        /// The program.
        program: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What to do with a name that the kernel has no module for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absent {
    /// It is an error.
    Refuse,
    /// It is left out.
    PassOver,
}

/// Reads the modules `names` and all they depend on, in the order to load them in.
///
/// # Errors
/// [`ModulesError`]
pub fn collect(
    directory: &Path,
    names: &[String],
    absent: Absent,
) -> Result<Vec<Module>, ModulesError> {
    let read = |name: &str| {
        let path = directory.join(name);
        fs::read_to_string(&path).map_err(|e| ModulesError::Read(path, e))
    };
    let dependencies = read("modules.dep")?;
    let builtin = read("modules.builtin")?;
    let order =
        order(&dependencies, &builtin, names, absent).map_err(|name| ModulesError::Unknown {
            name,
            directory: directory.to_owned(),
        })?;
    order
        .into_iter()
        .map(|file| load(&directory.join(file)))
        .collect()
}

/// The files to load, dependencies first; fails with the name that is unknown.
fn order(
    dependencies: &str,
    builtin: &str,
    names: &[String],
    absent: Absent,
) -> Result<Vec<String>, String> {
    let builtin: HashSet<String> = builtin.lines().map(module_name).collect();
    let lines: HashMap<String, (&str, Vec<&str>)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(file, needs)| {
            (
                module_name(file),
                (file, needs.split_whitespace().collect()),
            )
        })
        .collect();
    let mut order = Vec::new();
    for name in names {
        let name = module_name(name);
        if builtin.contains(&name) {
            continue;
        }
        let Some((file, needs)) = lines.get(&name) else {
            if absent == Absent::PassOver {
                continue;
            }
            return Err(name);
        };
        // A line has all that a module needs, the nearest first.
        for file in needs.iter().rev().chain([file]) {
            if !order.iter().any(|known| known == file) {
                order.push((*file).to_owned());
            }
        }
    }
    Ok(order)
}

/// The name of a module's file, with `_` for `-` as the kernel does.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let name = name.split_once(".ko").map_or(name, |(name, _)| name);
    name.trim().replace('-', "_")
}

fn load(path: &Path) -> Result<Module, ModulesError> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    for (suffix, program) in [(".xz", "xz"), (".zst", "zstd"), (".gz", "gzip")] {
        if let Some(file) = name.strip_suffix(suffix) {
            return Ok(Module {
                file: file.to_owned(),
                content: decompress(path, program)?,
            });
        }
    }
    let content = fs::read(path).map_err(|e| ModulesError::Read(path.to_owned(), e))?;
    Ok(Module {
        file: name,
        content,
    })
}

fn decompress(path: &Path, program: &'static str) -> Result<Vec<u8>, ModulesError> {
    let fail = |source| ModulesError::Decompress {
        path: path.to_owned(),
        program,
        source,
    };
    let file = File::open(path).map_err(|e| ModulesError::Read(path.to_owned(), e))?;
    let output = Command::new(program)
        .arg("-dc")
        .stdin(file)
        .stderr(Stdio::inherit())
        .output()
        .map_err(fail)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(fail(io::Error::other(output.status.to_string())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "\
kernel/fs/jbd2/jbd2.ko.xz:
kernel/lib/crc16.ko.xz:
kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc16.ko.xz
kernel/net/vsock.ko.xz:
kernel/net/vmw_vsock_virtio_transport_common.ko.xz: kernel/net/vsock.ko.xz
kernel/net/vmw_vsock_virtio_transport.ko.xz: kernel/net/vmw_vsock_virtio_transport_common.ko.xz kernel/net/vsock.ko.xz
kernel/drivers/misc/pvpanic/pvpanic-mmio.ko.xz: kernel/lib/crc16.ko.xz
";
    const BUILTIN: &str = "kernel/drivers/virtio/virtio_mmio.ko\n";

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let wanted = names(&[
            "vmw_vsock_virtio_transport",
            "ext4",
            "virtio_mmio",
            "pvpanic_mmio",
        ]);
        let order: Vec<_> = order(DEP, BUILTIN, &wanted, Absent::Refuse)
            .unwrap()
            .iter()
            .map(|file| module_name(file))
            .collect();
        assert_eq!(
            order,
            [
                "vsock",
                "vmw_vsock_virtio_transport_common",
                "vmw_vsock_virtio_transport",
                "crc16",
                "jbd2",
                "ext4",
                "pvpanic_mmio",
            ]
        );
    }

    #[test]
    fn an_unknown_module_is_named_or_passed_over() {
        let wanted = names(&["zfs", "crc16"]);
        let refused = order(DEP, BUILTIN, &wanted, Absent::Refuse);
        assert_eq!(refused, Err("zfs".to_owned()));
        let lenient = order(DEP, BUILTIN, &wanted, Absent::PassOver);
        assert_eq!(lenient, Ok(names(&["kernel/lib/crc16.ko.xz"])));
    }

    #[test]
    fn plain_and_compressed_modules_are_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("modules.dep"),
            "k/a.ko: k/b.ko.gz\nk/b.ko.gz:\n",
        )
        .unwrap();
        fs::write(dir.path().join("modules.builtin"), "").unwrap();
        fs::create_dir(dir.path().join("k")).unwrap();
        fs::write(dir.path().join("k/a.ko"), "a").unwrap();
        fs::write(dir.path().join("k/b.ko"), "b").unwrap();
        let gzip = Command::new("gzip").arg(dir.path().join("k/b.ko")).status();
        assert!(gzip.unwrap().success());
        let module = |file: &str, content: &[u8]| Module {
            file: file.to_owned(),
            content: content.to_vec(),
        };
        assert_eq!(
            collect(dir.path(), &names(&["a"]), Absent::Refuse).unwrap(),
            [module("b.ko", b"b"), module("a.ko", b"a")]
        );
        fs::write(dir.path().join("k/b.ko.gz"), "no archive").unwrap();
        assert!(matches!(
            collect(dir.path(), &names(&["a"]), Absent::Refuse),
            Err(ModulesError::Decompress { .. })
        ));
    }
}
