//! What stands out of the files of a guest: who may write, run and read them, and whose they are.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Bound;

use futures_util::StreamExt;
use futures_util::stream;

use super::evidence::Budget;
use crate::domain::{
    FileInfo, FileKind, HostError, InUse, Manager, WalkCut, WalkSpec, WalkStep, WalkSteps,
};

/// The most files and directories that are looked at.
const MAX_ENTRIES: usize = 400_000;
/// How many directories deep is looked.
const MAX_DEPTH: u32 = 256;
/// The most that a guest may send of what files it has, in bytes: room for names of usual lengths.
const MAX_BYTES: u64 = MAX_ENTRIES as u64 * 512;
/// The most of one kind that are remembered.
const MAX_REMEMBERED: usize = 1000;
/// The longest path, in bytes: PATH_MAX of the guest's kernel.
pub const MAX_PATH: usize = 4096;
/// How many directories are read at a time, if the agent is too old to walk them.
const AT_A_TIME: usize = 4;
/// The most files of one directory that are then looked at.
const MAX_LISTED: usize = 20_000;
/// Directories that are not on the disk.
const NOT_ON_DISK: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

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

/// A walk through the files of a guest.
pub struct Walk<'a> {
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

impl<'a> Walk<'a> {
    /// One of a guest with users and groups of these ids, if they are known, and these mounts, as
    /// `/proc/mounts` has them.
    pub fn new(
        (uids, gids): (Option<BTreeSet<u32>>, Option<BTreeSet<u32>>),
        mounts: &str,
        budget: &'a mut Budget,
    ) -> Self {
        Self {
            uids,
            gids,
            mounts: Mounts::of(mounts),
            waiting: VecDeque::from(["/".to_owned()]),
            room: MAX_ENTRIES,
            budget,
            files: Files::default(),
        }
    }

    /// Looks at all files of the root file system.
    ///
    /// # Errors
    /// The guest does not answer as it should.
    pub async fn run(mut self, manager: &Manager, in_use: &InUse) -> Result<Files, HostError> {
        let spec = WalkSpec {
            path: "/".to_owned(),
            max_entries: MAX_ENTRIES as u64 + 1,
            max_depth: MAX_DEPTH,
            max_bytes: MAX_BYTES,
            skip: NOT_ON_DISK.map(str::to_owned).into(),
        };
        match manager.inspect_tree(in_use, &spec).await {
            Ok(Some(steps)) => self.follow(steps).await?,
            Ok(None) => self.each(manager, in_use).await?,
            Err(
                HostError::Agent { .. }
                | HostError::Invalid { .. }
                | HostError::FileNotFound { .. }
                | HostError::Conflict { .. },
            ) => self.leave_out("/"),
            Err(source) => return Err(source),
        }
        Ok(self.files)
    }

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

/// The third field of each line, as of `/etc/passwd` and `/etc/group`.
pub fn ids(text: &str) -> BTreeSet<u32> {
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
    use super::super::evidence::MAX_EVIDENCE;
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
            waiting: VecDeque::new(),
            room: 20,
            ..Walk::new((None, None), mounts, budget)
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
}
