//! What holds a VMM, by the kernel's word, and who may read what a sandbox has on the disk.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::note::Note;
use super::paths::Paths;
use crate::domain::{Posture, SandboxId, VmmPosture};

/// The most files that are named.
const MAX_NAMED: usize = 16;
/// The most files and directories that are looked at.
const MAX_FILES: usize = 4096;

/// What there is to say of a sandbox that has these files and directories of layers, besides its own
/// disk.
pub fn look(paths: &Paths, id: &SandboxId, layers: Vec<PathBuf>) -> io::Result<Posture> {
    let vmm = match Note::read(paths, id)? {
        Some(note) => vmm(&note)?,
        None => None,
    };
    let mut exposed = Vec::new();
    let mut left: Vec<_> = layers.into_iter().chain([paths.disk(id)]).collect();
    let mut looked = 0;
    while let Some(path) = left.pop() {
        looked += 1;
        if looked > MAX_FILES || exposed.len() >= MAX_NAMED {
            break;
        }
        look_at(&path, &mut exposed, &mut left)?;
    }
    Ok(Posture { vmm, exposed })
}

/// What is in a directory that others cannot enter is not in their reach.
fn look_at(path: &Path, exposed: &mut Vec<String>, left: &mut Vec<PathBuf>) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if metadata.mode() & 0o007 == 0 || is_closed_above(path)? {
        return Ok(());
    }
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            left.push(entry?.path());
        }
    } else if metadata.is_file() {
        exposed.push(path.display().to_string());
    }
    Ok(())
}

/// Whether one of the directories that lead here is closed to others.
fn is_closed_above(path: &Path) -> io::Result<bool> {
    for directory in path.ancestors().skip(1) {
        if directory.as_os_str().is_empty() {
            break;
        }
        if fs::metadata(directory)?.mode() & 0o001 == 0 {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The VMM that a note tells of; `None` if it has ended.
fn vmm(note: &Note) -> io::Result<Option<VmmPosture>> {
    if note.process.open()?.is_none() {
        return Ok(None);
    }
    let mut pid = note.process.pid();
    if note.is_jailed {
        // What was started waits for it.
        match child_of(pid)? {
            Some(child) => pid = child,
            None => return Ok(None),
        }
    }
    let Some(first) = status(Path::new(&format!("/proc/{pid}/status")))? else {
        return Ok(None);
    };
    let mut posture = VmmPosture {
        is_jailed: note.is_jailed,
        has_seccomp: true,
        has_no_new_privs: true,
        has_capabilities: false,
        has_own_user: first.uid != Some(rustix::process::getuid().as_raw()),
    };
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // One that has ended meanwhile has nothing any more.
        if let Some(thread) = status(&task?.path().join("status"))? {
            posture.has_seccomp &= thread.seccomp == Some(2);
            posture.has_no_new_privs &= thread.no_new_privs == Some(1);
            posture.has_capabilities |= thread.capabilities != Some(0);
        }
    }
    Ok(Some(posture))
}

fn child_of(pid: i32) -> io::Result<Option<i32>> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    match children {
        Ok(children) => Ok(children
            .split_whitespace()
            .next()
            .and_then(|pid| pid.parse().ok())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What proc_pid_status(5) says of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    uid: Option<u32>,
    seccomp: Option<u32>,
    no_new_privs: Option<u32>,
    /// All sets together.
    capabilities: Option<u64>,
}

/// `None` if it has ended.
fn status(path: &Path) -> io::Result<Option<Status>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(parse(&text))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(text: &str) -> Status {
    let field = |name: &str| {
        let mut lines = text.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.and_then(|value| value.split_whitespace().next())
    };
    let set = |name: &str| u64::from_str_radix(field(name)?, 16).ok();
    let sets = ["CapInh", "CapPrm", "CapEff", "CapAmb"].map(set);
    Status {
        uid: field("Uid").and_then(|uid| uid.parse().ok()),
        seccomp: field("Seccomp").and_then(|mode| mode.parse().ok()),
        no_new_privs: field("NoNewPrivs").and_then(|value| value.parse().ok()),
        capabilities: sets.into_iter().try_fold(0, |all, set| Some(all | set?)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_kernels_words_are_understood() {
        let text = "Name:\tvmm\nUid:\t70000\t70000\t70000\t70000\nCapInh:\t0000000000000000\n\
                    CapPrm:\t0000000000000000\nCapEff:\t0000000000000400\nCapBnd:\t1ff\n\
                    CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t2\n";
        let expected = Status {
            uid: Some(70_000),
            seccomp: Some(2),
            no_new_privs: Some(1),
            capabilities: Some(0x400),
        };
        assert_eq!(parse(text), expected);
        assert_eq!(parse("").capabilities, None);
        let own = status(Path::new("/proc/self/status")).unwrap().unwrap();
        assert_eq!(own.uid, Some(rustix::process::getuid().as_raw()));
        assert!(own.capabilities.is_some() && own.seccomp.is_some());
    }

    #[test]
    fn a_file_is_exposed_if_others_can_come_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        fs::create_dir(&layer).unwrap();
        for (name, mode) in [("open", 0o644), ("closed", 0o640)] {
            fs::write(layer.join(name), "x").unwrap();
            fs::set_permissions(layer.join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let look = |mode: u32, above: u32| {
            let set = |path: &Path, mode| {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            };
            set(&layer, mode);
            set(dir.path(), above);
            let (mut exposed, mut left) = (Vec::new(), vec![layer.clone()]);
            while let Some(path) = left.pop() {
                look_at(&path, &mut exposed, &mut left).unwrap();
            }
            exposed
        };
        assert_eq!(
            look(0o755, 0o755),
            [layer.join("open").display().to_string()]
        );
        assert_eq!(look(0o750, 0o755), [""; 0]);
        assert_eq!(look(0o755, 0o700), [""; 0]);
    }
}
