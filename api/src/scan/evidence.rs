//! What is collected from a guest: files, by the agent, and nothing else, so that a guest without any
//! program can be looked into. The guest is hostile: all of it is bounded, and means nothing yet.

use std::collections::BTreeMap;

use super::files::{Files, MAX_PATH, Walk, ids};
use super::sysctl;
use crate::domain::{HostError, InUse, Manager};

/// The most that is kept of one guest at a time, in bytes of text: the ten files that are read of each
/// and are as large as can be, and some more.
pub const MAX_EVIDENCE: usize = 16 << 20;
/// The largest file of settings that is read, in bytes.
const MAX_FILE: usize = 1 << 20;
/// The longest value of a setting of the kernel, in bytes.
const MAX_VALUE: usize = 4096;
/// The most files of a directory of settings.
const MAX_PARTS: usize = 200;
/// The most files that such a directory may have, settings or not.
const MAX_LISTED_PARTS: usize = 2000;
/// What there is to say of a guest.
#[derive(Debug, Clone, Default)]
pub struct Evidence {
    /// `/etc/passwd`.
    pub passwd: Option<String>,
    /// `/etc/shadow`.
    pub shadow: Option<String>,
    /// `/etc/ssh/sshd_config`.
    pub sshd: Option<String>,
    /// Those of `/etc/ssh/sshd_config.d`, in the order of their names.
    pub sshd_parts: Vec<(String, String)>,
    /// `/etc/sudoers` and those of `/etc/sudoers.d`.
    pub sudoers: Vec<(String, String)>,
    /// Values of [`sysctl::WANTED`] by their names.
    pub sysctls: BTreeMap<&'static str, String>,
    /// Files of `/proc/net`, by their names.
    pub sockets: Vec<(&'static str, String)>,
    /// Files and directories.
    pub files: Files,
    /// Files that were not read to their ends, and directories of which files are missing here.
    pub cut: Vec<String>,
    /// Whether the guest had more to say than [`MAX_EVIDENCE`].
    pub is_over_budget: bool,
}

/// How much may still be kept of what a guest says.
pub(super) struct Budget {
    /// In bytes of text.
    left: usize,
    /// Whether that was too little once.
    pub is_exceeded: bool,
}

impl Budget {
    /// Of so many bytes of text.
    pub fn new(left: usize) -> Self {
        Self {
            left,
            is_exceeded: false,
        }
    }

    /// Takes so many bytes, if as many are left.
    pub fn take(&mut self, bytes: usize) -> bool {
        match self.left.checked_sub(bytes) {
            Some(left) => self.left = left,
            None => {
                self.is_exceeded = true;
                return false;
            }
        }
        true
    }

    /// Gives back what was taken for something that is no longer kept.
    pub fn give_back(&mut self, bytes: usize) {
        self.left += bytes;
    }
}

/// Reads from one guest, [`MAX_EVIDENCE`] at most.
pub struct Reader<'a> {
    manager: &'a Manager,
    in_use: &'a InUse,
    budget: Budget,
}

impl<'a> Reader<'a> {
    /// Of this one.
    pub fn new(manager: &'a Manager, in_use: &'a InUse) -> Self {
        Self {
            manager,
            in_use,
            budget: Budget::new(MAX_EVIDENCE),
        }
    }

    /// The first `most` bytes of a file as text, and whether that is all of it.
    pub async fn text(
        &mut self,
        path: &str,
        most: usize,
    ) -> Result<Option<(String, bool)>, HostError> {
        let room = most.min(self.budget.left);
        let read = self.manager.inspect_file(self.in_use, path, room).await;
        let file = match read {
            Ok(Some(file)) => file,
            // What cannot be read is not there, as a file of /proc that has no content.
            Ok(None) | Err(HostError::Agent { .. } | HostError::Conflict { .. }) => {
                return Ok(None);
            }
            Err(source) => return Err(source),
        };
        let (text, is_text_whole) = text_of(&file.content, room);
        let is_whole = file.is_whole && is_text_whole;
        self.budget.is_exceeded |= !is_whole && room < most;
        self.budget.take(text.len());
        Ok(Some((text, is_whole)))
    }

    /// Everything. What is read of each guest comes first, and then what it has as much of as it likes.
    pub async fn collect(&mut self) -> Result<Evidence, HostError> {
        let mut evidence = Evidence::default();
        let cut = &mut evidence.cut;
        for wanted in &sysctl::WANTED {
            if let Some(value) = self.value(&wanted.path(), cut).await? {
                evidence.sysctls.insert(wanted.name, value);
            }
        }
        evidence.passwd = self.settings("/etc/passwd", cut).await?;
        evidence.shadow = self.settings("/etc/shadow", cut).await?;
        evidence.sshd = self.settings("/etc/ssh/sshd_config", cut).await?;
        let sudoers = self.settings("/etc/sudoers", cut).await?;
        for name in ["tcp", "tcp6", "udp", "udp6"] {
            let table = self.settings(&format!("/proc/net/{name}"), cut).await?;
            evidence.sockets.extend(table.map(|table| (name, table)));
        }
        self.walk(&mut evidence).await?;
        let cut = &mut evidence.cut;
        let is_ssh = |path: &str| path.ends_with(".conf");
        evidence.sshd_parts = self.parts("/etc/ssh/sshd_config.d", is_ssh, cut).await?;
        evidence.sudoers = self.parts("/etc/sudoers.d", |_| true, cut).await?;
        let sudoers = sudoers.map(|text| ("/etc/sudoers".to_owned(), text));
        evidence.sudoers.extend(sudoers);
        evidence.is_over_budget = self.budget.is_exceeded;
        Ok(evidence)
    }

    /// A setting of the kernel.
    async fn value(
        &mut self,
        path: &str,
        cut: &mut Vec<String>,
    ) -> Result<Option<String>, HostError> {
        Ok(match self.text(path, MAX_VALUE).await? {
            Some((value, true)) => Some(value.trim().to_owned()),
            Some((_, false)) => {
                cut.push(path.to_owned());
                None
            }
            None => None,
        })
    }

    async fn settings(
        &mut self,
        path: &str,
        cut: &mut Vec<String>,
    ) -> Result<Option<String>, HostError> {
        Ok(self.text(path, MAX_FILE).await?.map(|(text, is_whole)| {
            if !is_whole {
                cut.push(path.to_owned());
            }
            text
        }))
    }

    /// The files of a directory whose paths are those of settings, in the order of their names.
    async fn parts(
        &mut self,
        directory: &str,
        is_part: impl Fn(&str) -> bool,
        cut: &mut Vec<String>,
    ) -> Result<Vec<(String, String)>, HostError> {
        let listed = self
            .manager
            .inspect_dir(self.in_use, directory, MAX_LISTED_PARTS)
            .await;
        let entries = match listed {
            Ok(entries) => entries.unwrap_or_default(),
            Err(HostError::Agent { .. } | HostError::Conflict { .. }) => Vec::new(),
            Err(HostError::Invalid { .. }) => {
                cut.push(directory.to_owned());
                Vec::new()
            }
            Err(source) => return Err(source),
        };
        let paths = entries.into_iter().map(|entry| entry.path);
        let mut paths: Vec<_> = paths.filter(|path| is_part(path)).collect();
        paths.sort();
        let mut parts = Vec::new();
        for (index, path) in paths.into_iter().enumerate() {
            let is_one_too_many = index == MAX_PARTS;
            if is_one_too_many || path.len() > MAX_PATH || !self.budget.take(path.len()) {
                cut.push(directory.to_owned());
                break;
            }
            if let Some(text) = self.settings(&path, cut).await? {
                parts.push((path, text));
            }
        }
        Ok(parts)
    }

    /// Looks at all files of the root file system.
    async fn walk(&mut self, evidence: &mut Evidence) -> Result<(), HostError> {
        let cut = &mut evidence.cut;
        let group = self.settings("/etc/group", cut).await?;
        let mounts = self.settings("/proc/mounts", cut).await?;
        // Who is not in a part of a list may be in the rest of it.
        let ids_of = |path: &str, text: Option<&str>| {
            let is_whole = !cut.iter().any(|cut| cut == path);
            text.filter(|_| is_whole).map(ids)
        };
        let ids = (
            ids_of("/etc/passwd", evidence.passwd.as_deref()),
            ids_of("/etc/group", group.as_deref()),
        );
        let mounts = mounts.as_deref().unwrap_or_default();
        let walk = Walk::new(ids, mounts, &mut self.budget);
        evidence.files = walk.run(self.manager, self.in_use).await?;
        Ok(())
    }
}

/// The first `most` bytes of a file as text, and whether that is all of it. What is not UTF-8 takes three
/// times as many as before.
fn text_of(content: &[u8], most: usize) -> (String, bool) {
    let mut text = String::new();
    for chunk in content.utf8_chunks() {
        let replaced = match chunk.invalid() {
            [] => "",
            _ => "\u{fffd}",
        };
        for piece in [chunk.valid(), replaced] {
            let end = piece.floor_char_boundary(most - text.len());
            text.push_str(&piece[..end]);
            if end < piece.len() {
                return (text, false);
            }
        }
    }
    (text, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_bounded_as_text() {
        let euro = "\u{20ac}".as_bytes();
        for (content, most, text, is_whole) in [
            (&b"abc"[..], 3, "abc", true),
            (b"abc", 2, "ab", false),
            (b"", 0, "", true),
            (b"a", 0, "", false),
            (euro, 3, "\u{20ac}", true),
            (euro, 2, "", false),
            (b"\xff\xffa", 7, "\u{fffd}\u{fffd}a", true),
            (b"\xff\xffa", 6, "\u{fffd}\u{fffd}", false),
            (b"\xff\xffa", 5, "\u{fffd}", false),
        ] {
            assert_eq!(
                text_of(content, most),
                (text.to_owned(), is_whole),
                "{content:?} {most}"
            );
        }
    }
}
