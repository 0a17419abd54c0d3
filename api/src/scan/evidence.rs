//! What is collected from a guest: files, by the agent, and nothing else, so that a guest without any
//! program can be looked into. The guest is hostile: all of it is bounded, and means nothing yet.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;

use futures_util::StreamExt;
use futures_util::stream;

use super::sysctl;
use crate::domain::{
    FileInfo, FileKind, HostError, InUse, Manager, WalkCut, WalkSpec, WalkStep, WalkSteps,
};

/// The largest file of settings that is read, in bytes.
const MAX_FILE: usize = 1 << 20;
/// The most files of a directory of settings.
const MAX_PARTS: usize = 200;
/// The most files and directories that are looked at.
const MAX_ENTRIES: usize = 400_000;
/// How many directories deep is looked.
const MAX_DEPTH: u32 = 256;
/// The most that a guest may send of what files it has, in bytes: room for names of usual lengths.
const MAX_BYTES: u64 = MAX_ENTRIES as u64 * 512;
/// The most of one kind that are remembered.
const MAX_REMEMBERED: usize = 1000;
/// How many directories are read at a time, if the agent is too old to walk them.
const AT_A_TIME: usize = 4;
/// Directories that are not on the disk.
const NOT_ON_DISK: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

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
    /// Files that were too large to be read whole.
    pub cut: Vec<String>,
}

/// What stands out of the files of a guest.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// Files that anybody may write, and directories that anybody may write and remove from.
    pub world_writable: Vec<String>,
    /// Programs that run as their owner or group.
    pub set_id: Vec<String>,
    /// What belongs to a user or group that there is not.
    pub unowned: Vec<String>,
    /// `/etc/shadow` and the like, if others than root may read them.
    pub exposed: Vec<String>,
    /// Why not all was looked at, if it was not.
    pub incomplete: Option<String>,
}

/// Reads from one guest.
pub struct Reader<'a> {
    manager: &'a Manager,
    in_use: &'a InUse,
}

impl<'a> Reader<'a> {
    /// Of this one.
    pub fn new(manager: &'a Manager, in_use: &'a InUse) -> Self {
        Self { manager, in_use }
    }

    /// A file as text, and whether that is all of it.
    pub async fn text(&self, path: &str, most: usize) -> Result<Option<(String, bool)>, HostError> {
        let read = self.manager.inspect_file(self.in_use, path, most).await;
        match read {
            Ok(file) => Ok(file.map(|file| {
                let text = String::from_utf8_lossy(&file.content).into_owned();
                (text, file.is_whole)
            })),
            // What cannot be read is not there, as a file of /proc that has no content.
            Err(HostError::Agent { .. } | HostError::Conflict { .. }) => Ok(None),
            Err(source) => Err(source),
        }
    }

    /// Everything.
    pub async fn collect(&self) -> Result<Evidence, HostError> {
        let mut evidence = Evidence::default();
        evidence.passwd = self.settings("/etc/passwd", &mut evidence.cut).await?;
        evidence.shadow = self.settings("/etc/shadow", &mut evidence.cut).await?;
        evidence.sshd = self
            .settings("/etc/ssh/sshd_config", &mut evidence.cut)
            .await?;
        evidence.sshd_parts = self
            .parts("/etc/ssh/sshd_config.d", &mut evidence.cut)
            .await?;
        evidence
            .sshd_parts
            .retain(|(path, _)| path.ends_with(".conf"));
        let sudoers = self.settings("/etc/sudoers", &mut evidence.cut).await?;
        evidence.sudoers = self.parts("/etc/sudoers.d", &mut evidence.cut).await?;
        let sudoers = sudoers.map(|text| ("/etc/sudoers".to_owned(), text));
        evidence.sudoers.extend(sudoers);
        for wanted in &sysctl::WANTED {
            let path = format!("/proc/sys/{}", wanted.name.replace('.', "/"));
            if let Some((value, _)) = self.text(&path, 4096).await? {
                evidence
                    .sysctls
                    .insert(wanted.name, value.trim().to_owned());
            }
        }
        for name in ["tcp", "tcp6", "udp", "udp6"] {
            let path = format!("/proc/net/{name}");
            if let Some((table, is_whole)) = self.text(&path, MAX_FILE).await? {
                evidence.sockets.push((name, table));
                if !is_whole {
                    evidence.cut.push(path);
                }
            }
        }
        evidence.files = self.walk(&evidence).await?;
        Ok(evidence)
    }

    async fn settings(
        &self,
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

    async fn parts(
        &self,
        directory: &str,
        cut: &mut Vec<String>,
    ) -> Result<Vec<(String, String)>, HostError> {
        let entries = match self
            .manager
            .inspect_dir(self.in_use, directory, MAX_ENTRIES)
            .await
        {
            Ok(entries) => entries.unwrap_or_default(),
            Err(HostError::Agent { .. } | HostError::Conflict { .. }) => Vec::new(),
            Err(source) => return Err(source),
        };
        let mut paths: Vec<_> = entries.into_iter().map(|entry| entry.path).collect();
        paths.sort();
        if paths.len() > MAX_PARTS {
            cut.push(directory.to_owned());
        }
        let mut parts = Vec::new();
        for path in paths.into_iter().take(MAX_PARTS) {
            if let Some(text) = self.settings(&path, cut).await? {
                parts.push((path, text));
            }
        }
        Ok(parts)
    }

    /// Looks at all files of the root file system.
    async fn walk(&self, evidence: &Evidence) -> Result<Files, HostError> {
        let group = self.settings("/etc/group", &mut Vec::new()).await?;
        let mounts = self.settings("/proc/mounts", &mut Vec::new()).await?;
        let mut walk = Walk {
            uids: evidence.passwd.as_deref().map(ids),
            gids: group.as_deref().map(ids),
            mounts: mount_points(mounts.as_deref().unwrap_or_default()),
            waiting: VecDeque::from(["/".to_owned()]),
            room: MAX_ENTRIES,
            files: Files::default(),
        };
        let spec = WalkSpec {
            path: "/".to_owned(),
            max_entries: MAX_ENTRIES as u64 + 1,
            max_depth: MAX_DEPTH,
            max_bytes: MAX_BYTES,
            skip: NOT_ON_DISK.map(str::to_owned).into(),
        };
        match self.manager.inspect_tree(self.in_use, &spec).await {
            Ok(Some(steps)) => walk.follow(steps).await?,
            Ok(None) => self.walk_each(&mut walk).await?,
            Err(
                HostError::Agent { .. }
                | HostError::Invalid { .. }
                | HostError::FileNotFound { .. }
                | HostError::Conflict { .. },
            ) => walk.leave_out("/"),
            Err(source) => return Err(source),
        }
        Ok(walk.files)
    }

    /// The same, with a request for each directory.
    async fn walk_each(&self, walk: &mut Walk) -> Result<(), HostError> {
        while !walk.waiting.is_empty() {
            let together: Vec<_> = (0..AT_A_TIME)
                .map_while(|_| walk.waiting.pop_front())
                .collect();
            let room = walk.room;
            let read = |path: String| async move {
                let entries = self.manager.inspect_dir(self.in_use, &path, room).await;
                (path, entries)
            };
            let mut read = stream::iter(together.into_iter().map(read)).buffered(AT_A_TIME);
            while let Some((path, entries)) = read.next().await {
                match entries {
                    Ok(entries) => walk.look_at(entries.unwrap_or_default()),
                    Err(
                        HostError::Agent { .. }
                        | HostError::Invalid { .. }
                        | HostError::Conflict { .. },
                    ) => walk.leave_out(&path),
                    Err(source) => return Err(source),
                }
            }
        }
        Ok(())
    }
}

struct Walk {
    uids: Option<BTreeSet<u32>>,
    gids: Option<BTreeSet<u32>>,
    mounts: BTreeSet<String>,
    waiting: VecDeque<String>,
    room: usize,
    files: Files,
}

impl Walk {
    fn leave_out(&mut self, path: &str) {
        let why = || format!("{path} could not be listed, or has too many files");
        self.files.incomplete.get_or_insert_with(why);
    }

    /// Looks at what a walk comes to.
    async fn follow(&mut self, mut steps: WalkSteps) -> Result<(), HostError> {
        while let Some(step) = steps.next().await {
            match step? {
                WalkStep::Entry(entry) if self.is_below_a_mount(&entry.path) => {}
                WalkStep::Entry(entry) => {
                    if !self.has_room() {
                        return Ok(());
                    }
                    self.look_at_one(&entry);
                }
                WalkStep::Unreadable(path) => self.leave_out(&path),
                WalkStep::Cut(cut) => {
                    let why = || match cut {
                        WalkCut::Entries => format!("there are more than {MAX_ENTRIES} files"),
                        WalkCut::Depth => format!("some lie deeper than {MAX_DEPTH} directories"),
                        WalkCut::Size => "their names are too long together".to_owned(),
                    };
                    self.files.incomplete.get_or_insert_with(why);
                }
            }
        }
        Ok(())
    }

    /// Whether another mount than the root's hides what is at this path on the disk.
    fn is_below_a_mount(&self, path: &str) -> bool {
        let above = Path::new(path).ancestors().skip(1);
        let mut above = above.filter_map(Path::to_str);
        above.any(|directory| self.mounts.contains(directory))
    }

    /// Takes the room of one entry, if there is any left.
    fn has_room(&mut self) -> bool {
        match self.room.checked_sub(1) {
            Some(room) => {
                self.room = room;
                true
            }
            None => {
                let why = || format!("there are more than {MAX_ENTRIES} files");
                self.files.incomplete.get_or_insert_with(why);
                false
            }
        }
    }

    fn look_at(&mut self, entries: Vec<FileInfo>) {
        for entry in entries {
            if !self.has_room() {
                self.waiting.clear();
                return;
            }
            if self.look_at_one(&entry) {
                self.waiting.push_back(entry.path);
            }
        }
    }

    /// Whether it is a directory of the root file system.
    fn look_at_one(&mut self, entry: &FileInfo) -> bool {
        let remember = |list: &mut Vec<String>| {
            if list.len() < MAX_REMEMBERED {
                list.push(entry.path.clone());
            }
        };
        let files = &mut self.files;
        let is_directory = entry.kind == FileKind::Directory;
        if is_directory && self.mounts.contains(&entry.path) {
            return false;
        }
        let is_file = entry.kind == FileKind::File;
        let is_sticky = entry.mode & 0o1000 != 0;
        if entry.mode & 0o002 != 0 && (is_file || is_directory && !is_sticky) {
            remember(&mut files.world_writable);
        }
        if is_file && entry.mode & 0o6000 != 0 && entry.mode & 0o111 != 0 {
            remember(&mut files.set_id);
        }
        let is_nobodys =
            |ids: &Option<BTreeSet<u32>>, id| ids.as_ref().is_some_and(|ids| !ids.contains(&id));
        if is_nobodys(&self.uids, entry.uid) || is_nobodys(&self.gids, entry.gid) {
            remember(&mut files.unowned);
        }
        let is_secret = matches!(
            entry.path.as_str(),
            "/etc/shadow" | "/etc/gshadow" | "/etc/shadow-" | "/etc/gshadow-" | "/etc/sudoers"
        ) || (entry.path.starts_with("/etc/ssh/ssh_host_")
            && entry.path.ends_with("_key"));
        if is_file && is_secret && entry.mode & 0o007 != 0 {
            remember(&mut files.exposed);
        }
        is_directory
    }
}

/// The third field of each line.
fn ids(text: &str) -> BTreeSet<u32> {
    let fields = text.lines().filter_map(|line| line.split(':').nth(2));
    fields.filter_map(|id| id.parse().ok()).collect()
}

/// Where other file systems are than the root's. The guest says so, and may lie: it then hides its own
/// files from its own user.
fn mount_points(mounts: &str) -> BTreeSet<String> {
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let points = points.chain(NOT_ON_DISK).filter(|point| *point != "/");
    points.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: FileKind, mode: u32, uid: u32) -> FileInfo {
        FileInfo {
            path: path.into(),
            kind,
            mode,
            uid,
            gid: 0,
            size: 1,
            mtime_us: 0,
            target: None,
        }
    }

    #[test]
    fn what_stands_out_is_remembered() {
        use FileKind::{Directory, File, Symlink};
        let mut walk = Walk {
            uids: Some(ids(
                "root:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/:\nbad line\n",
            )),
            gids: Some(ids("root:x:0:\n")),
            mounts: mount_points("/dev/vda / ext4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n"),
            waiting: VecDeque::new(),
            room: 20,
            files: Files::default(),
        };
        walk.look_at(vec![
            entry("/etc", Directory, 0o755, 0),
            entry("/tmp", Directory, 0o1777, 0),
            entry("/open", Directory, 0o777, 0),
            entry("/proc", Directory, 0o777, 0),
            entry("/mnt", Directory, 0o777, 0),
            entry("/link", Symlink, 0o777, 0),
            entry("/open/file", File, 0o666, 1000),
            entry("/su", File, 0o4755, 0),
            entry("/not", File, 0o4644, 0),
            entry("/lost", File, 0o644, 7),
            entry("/etc/shadow", File, 0o644, 0),
            entry("/etc/passwd", File, 0o644, 0),
        ]);
        assert_eq!(walk.files.world_writable, ["/open", "/open/file"]);
        assert_eq!(walk.files.set_id, ["/su"]);
        assert_eq!(walk.files.unowned, ["/lost"]);
        assert_eq!(walk.files.exposed, ["/etc/shadow"]);
        assert_eq!(walk.waiting, ["/etc", "/tmp", "/open"]);
        assert_eq!(walk.files.incomplete, None);
        walk.look_at(vec![entry("/x", File, 0o644, 0); 30]);
        assert!(walk.files.incomplete.unwrap().contains("more than"));
        assert!(walk.waiting.is_empty());
    }
}
