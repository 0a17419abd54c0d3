//! What is collected from a guest: files, by the agent, and nothing else, so that a guest without any
//! program can be looked into. The guest is hostile: all of it is bounded, and means nothing yet.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use futures_util::StreamExt;
use futures_util::stream;

use super::sysctl;
use crate::domain::{
    FileInfo, FileKind, HostError, InUse, Manager, WalkCut, WalkSpec, WalkStep, WalkSteps,
};

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
/// The most files and directories that are looked at.
const MAX_ENTRIES: usize = 400_000;
/// How many directories deep is looked.
const MAX_DEPTH: u32 = 256;
/// The most that a guest may send of what files it has, in bytes: room for names of usual lengths.
const MAX_BYTES: u64 = MAX_ENTRIES as u64 * 512;
/// The most of one kind that are remembered.
const MAX_REMEMBERED: usize = 1000;
/// The longest path, in bytes: PATH_MAX of the guest's kernel.
const MAX_PATH: usize = 4096;
/// How many directories are read at a time, if the agent is too old to walk them.
const AT_A_TIME: usize = 4;
/// The most files of one directory that are then looked at.
const MAX_LISTED: usize = 20_000;
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
    /// Files that were not read to their ends, and directories of which files are missing here.
    pub cut: Vec<String>,
    /// Whether the guest had more to say than [`MAX_EVIDENCE`].
    pub is_over_budget: bool,
}

/// What stands out of the files of a guest.
#[derive(Debug, Clone, Default)]
pub struct Files {
    /// Files that anybody may write, and directories that anybody may write and remove from.
    pub world_writable: Paths,
    /// Programs that run as their owner or group.
    pub set_id: Paths,
    /// What belongs to a user or group that there is not.
    pub unowned: Paths,
    /// `/etc/shadow` and the like, if others than root may read them.
    pub exposed: Paths,
    /// Why not all was looked at, if it was not.
    pub incomplete: Option<String>,
}

/// Some paths of a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// The first of them.
    pub kept: Vec<String>,
    /// How many more there are.
    pub left_off: usize,
}

impl Paths {
    fn add(&mut self, path: &str, budget: &mut Budget) {
        match self.kept.len() < MAX_REMEMBERED && budget.take(path.len()) {
            true => self.kept.push(path.to_owned()),
            false => self.left_off += 1,
        }
    }
}

/// How much may still be kept of what a guest says.
struct Budget {
    /// In bytes of text.
    left: usize,
    /// Whether that was too little once.
    is_exceeded: bool,
}

impl Budget {
    fn new(left: usize) -> Self {
        Self {
            left,
            is_exceeded: false,
        }
    }

    /// Takes so many bytes, if as many are left.
    fn take(&mut self, bytes: usize) -> bool {
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
    fn give_back(&mut self, bytes: usize) {
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
        let mut walk = Walk {
            uids: ids_of("/etc/passwd", evidence.passwd.as_deref()),
            gids: ids_of("/etc/group", group.as_deref()),
            mounts: Mounts::of(mounts.as_deref().unwrap_or_default()),
            waiting: VecDeque::from(["/".to_owned()]),
            room: MAX_ENTRIES,
            budget: &mut self.budget,
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
            Ok(None) => walk.each(self.manager, self.in_use).await?,
            Err(
                HostError::Agent { .. }
                | HostError::Invalid { .. }
                | HostError::FileNotFound { .. }
                | HostError::Conflict { .. },
            ) => walk.leave_out("/"),
            Err(source) => return Err(source),
        }
        evidence.files = walk.files;
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

struct Walk<'a> {
    uids: Option<BTreeSet<u32>>,
    gids: Option<BTreeSet<u32>>,
    mounts: Mounts,
    /// Directories that are still to be listed.
    waiting: VecDeque<String>,
    /// How many more files and directories are looked at.
    room: usize,
    budget: &'a mut Budget,
    files: Files,
}

impl Walk<'_> {
    fn leave_out(&mut self, path: &str) {
        let why = || format!("{path} could not be listed, or has too many files");
        self.files.incomplete.get_or_insert_with(why);
    }

    /// Looks at all directories, with a request for each.
    async fn each(&mut self, manager: &Manager, in_use: &InUse) -> Result<(), HostError> {
        while !self.waiting.is_empty() {
            let together: Vec<_> = (0..AT_A_TIME)
                .map_while(|_| self.waiting.pop_front())
                .collect();
            let most = self.room.min(MAX_LISTED);
            let read = |path: String| async move {
                let entries = manager.inspect_dir(in_use, &path, most).await;
                (path, entries)
            };
            let mut read = stream::iter(together.into_iter().map(read)).buffered(AT_A_TIME);
            while let Some((path, entries)) = read.next().await {
                self.budget.give_back(path.len());
                match entries {
                    Ok(entries) => self.look_at(entries.unwrap_or_default()),
                    Err(
                        HostError::Agent { .. }
                        | HostError::Invalid { .. }
                        | HostError::Conflict { .. },
                    ) => self.leave_out(&path),
                    Err(source) => return Err(source),
                }
            }
        }
        Ok(())
    }

    /// Looks at what a walk comes to.
    async fn follow(&mut self, mut steps: WalkSteps) -> Result<(), HostError> {
        while let Some(step) = steps.next().await {
            match step? {
                WalkStep::Entry(entry) if self.mounts.hide(&entry.path) => {}
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
            if !self.look_at_one(&entry) {
                continue;
            }
            match self.budget.take(entry.path.len()) {
                true => self.waiting.push_back(entry.path),
                false => self.leave_out(&entry.path),
            }
        }
    }

    /// Whether it is a directory of the root file system.
    fn look_at_one(&mut self, entry: &FileInfo) -> bool {
        let files = &mut self.files;
        if entry.path.len() > MAX_PATH {
            let why = || format!("some paths are longer than {MAX_PATH} bytes");
            files.incomplete.get_or_insert_with(why);
            return false;
        }
        let mut remember = |list: &mut Paths| list.add(&entry.path, self.budget);
        let is_directory = entry.kind == FileKind::Directory;
        if is_directory && self.mounts.contain(&entry.path) {
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
struct Mounts {
    /// The directories, each with a slash at its end, and none that is below another.
    outermost: BTreeSet<String>,
}

impl Mounts {
    /// Those of a file `/proc/mounts`.
    fn of(mounts: &str) -> Self {
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
        let points = points
            .chain(NOT_ON_DISK)
            .map(|point| point.trim_end_matches('/'));
        let points = points.filter(|point| point.starts_with('/'));
        let points: BTreeSet<_> = points.map(|point| format!("{point}/")).collect();
        let mut outermost = BTreeSet::new();
        for point in points {
            if !begins_with_one(&outermost, &point) {
                outermost.insert(point);
            }
        }
        Self { outermost }
    }

    /// Whether one of them hides what is at this path on the disk.
    fn hide(&self, path: &str) -> bool {
        begins_with_one(&self.outermost, path)
    }

    /// Whether a directory is one of them, or hidden by one.
    fn contain(&self, directory: &str) -> bool {
        begins_with_one(&self.outermost, &format!("{directory}/"))
    }
}

/// Whether a text begins with one of these, of which none begins with another: then it is the last of
/// those that are not after the text, since all between the two begin with it.
fn begins_with_one(beginnings: &BTreeSet<String>, text: &str) -> bool {
    let mut before = beginnings.range::<str, _>((Bound::Unbounded, Bound::Included(text)));
    before
        .next_back()
        .is_some_and(|last| text.starts_with(last.as_str()))
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

    fn walk<'a>(budget: &'a mut Budget, mounts: &str) -> Walk<'a> {
        Walk {
            uids: None,
            gids: None,
            mounts: Mounts::of(mounts),
            waiting: VecDeque::new(),
            room: 20,
            budget,
            files: Files::default(),
        }
    }

    #[test]
    fn what_stands_out_is_remembered() {
        use FileKind::{Directory, File, Symlink};
        let mut budget = Budget::new(1000);
        let mut walk = walk(
            &mut budget,
            "/dev/vda / ext4 rw 0 0\ntmpfs /mnt tmpfs rw 0 0\n",
        );
        walk.uids = Some(ids(
            "root:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/:\nbad line\n",
        ));
        walk.gids = Some(ids("root:x:0:\n"));
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
        assert_eq!(walk.files.world_writable.kept, ["/open", "/open/file"]);
        assert_eq!(walk.files.set_id.kept, ["/su"]);
        assert_eq!(walk.files.unowned.kept, ["/lost"]);
        assert_eq!(walk.files.exposed.kept, ["/etc/shadow"]);
        assert_eq!(walk.waiting, ["/etc", "/tmp", "/open"]);
        assert_eq!(walk.files.incomplete, None);
        walk.look_at(vec![entry("/x", File, 0o644, 0); 30]);
        assert!(walk.files.incomplete.unwrap().contains("more than"));
        assert!(walk.waiting.is_empty());
    }

    #[test]
    fn paths_are_kept_as_far_as_there_is_room_and_counted_beyond() {
        use FileKind::{Directory, File};
        let mut budget = Budget::new(10);
        let mut walk = walk(&mut budget, "");
        walk.look_at(vec![
            entry("/12345", File, 0o666, 0),
            entry("/67890", File, 0o666, 0),
            entry("/a", Directory, 0o755, 0),
            entry("/b", Directory, 0o755, 0),
            entry("/c", Directory, 0o755, 0),
        ]);
        let expected = Paths {
            kept: vec!["/12345".into()],
            left_off: 1,
        };
        assert_eq!(walk.files.world_writable, expected);
        assert_eq!(walk.waiting, ["/a", "/b"]);
        assert!(walk.files.incomplete.unwrap().starts_with("/c "));
        assert!(budget.is_exceeded);
        let mut budget = Budget::new(MAX_EVIDENCE);
        let mut paths = Paths::default();
        (0..MAX_REMEMBERED + 5).for_each(|_| paths.add("/x", &mut budget));
        assert_eq!((paths.kept.len(), paths.left_off), (MAX_REMEMBERED, 5));
    }

    #[test]
    fn a_path_that_is_longer_than_any_is_told_and_not_kept() {
        let mut budget = Budget::new(MAX_EVIDENCE);
        let mut walk = walk(&mut budget, "");
        let long = "/x".repeat(MAX_PATH);
        walk.look_at(vec![entry(&long, FileKind::Directory, 0o777, 0)]);
        assert_eq!(walk.files.world_writable, Paths::default());
        assert!(walk.waiting.is_empty());
        assert!(walk.files.incomplete.unwrap().contains("longer than"));
    }

    #[test]
    fn what_other_mounts_hide_is_known_by_the_outermost_of_them() {
        let mounts = Mounts::of(
            "a / x\na /mnt x\na /mnt/in x\na /mnt-2/x x\na mnt-3 x\na  x\na // x\na /a x\n",
        );
        let outermost: Vec<_> = mounts.outermost.iter().collect();
        let expected = [
            "/a/",
            "/dev/",
            "/mnt-2/x/",
            "/mnt/",
            "/proc/",
            "/run/",
            "/sys/",
        ];
        assert_eq!(outermost, expected);
        for (path, is_hidden, is_contained) in [
            ("/mnt", false, true),
            ("/mnt/in/deep", true, true),
            ("/mnt/", true, true),
            ("/mnt-2", false, false),
            ("/mnt-2/x/y", true, true),
            ("/mnt-3/x", false, false),
            ("/proc/1/root", true, true),
            ("/process", false, false),
            ("/", false, false),
            ("", false, false),
        ] {
            let found = (mounts.hide(path), mounts.contain(path));
            assert_eq!(found, (is_hidden, is_contained), "{path}");
        }
    }

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
