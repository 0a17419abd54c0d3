//! Walks of a tree of directories, one after the other, so that only one is open at a time.

use std::{
    collections::HashSet,
    fs::{self, ReadDir},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use agent_protocol::{WalkCut, WalkLine, WalkRequest};
use bytes::Bytes;

use super::{FileError, entry};

/// About how many bytes of lines are made at once.
const CHUNK: usize = 64 * 1024;
/// How long the paths of directories may be together that wait to be listed, in bytes.
const MAX_WAITING: usize = 64 << 20;

/// A walk under way.
#[derive(Debug)]
pub struct Walk {
    /// The directory that is being listed.
    listed: Option<Directory>,
    /// Those that are to be listed.
    waiting: Vec<(PathBuf, u32)>,
    /// How long their paths are together, in bytes.
    waiting_len: usize,
    skip: HashSet<PathBuf>,
    /// The file system to stay on.
    device: Option<u64>,
    max_depth: u32,
    entries_left: u64,
    bytes_left: u64,
    cut: Option<WalkCut>,
    is_over: bool,
}

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    entries: ReadDir,
    /// How far it is below the first.
    depth: u32,
}

/// Whether a walk goes on.
enum Next {
    Goes,
    Ends(Option<WalkCut>),
}

impl Walk {
    /// Opens the first directory.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn open(request: &WalkRequest) -> Result<Self, FileError> {
        let path = Path::new(&request.path);
        let metadata = fs::metadata(path).map_err(FileError::system("look at", path))?;
        let entries = fs::read_dir(path).map_err(FileError::system("list", path))?;
        let mut walk = Self {
            listed: None,
            waiting: Vec::new(),
            waiting_len: 0,
            skip: request.skip.iter().map(PathBuf::from).collect(),
            device: (!request.other_file_systems).then(|| metadata.dev()),
            max_depth: request.max_depth,
            entries_left: request.max_entries,
            bytes_left: request.max_bytes,
            cut: None,
            is_over: false,
        };
        walk.listed = Some(Directory {
            path: path.to_owned(),
            entries,
            depth: 0,
        });
        Ok(walk)
    }

    /// The next lines, each a JSON [`WalkLine`]; `None` after the end.
    ///
    /// # Errors
    /// None but of writing JSON: what cannot be read is told, and left out.
    pub fn next_lines(&mut self) -> io::Result<Option<Bytes>> {
        if self.is_over {
            return Ok(None);
        }
        let mut lines = Lines {
            text: Vec::with_capacity(CHUNK),
        };
        // Each chunk says which directory it goes on with, as the first does.
        if let Some(listed) = &self.listed {
            lines.push(&WalkLine::Directory(text(&listed.path)))?;
        }
        let ended = loop {
            match self.step(&mut lines)? {
                Next::Goes if lines.text.len() + 1024 <= CHUNK => {}
                Next::Goes => break None,
                Next::Ends(cut) => break Some(cut),
            }
        };
        let length = u64::try_from(lines.text.len()).unwrap_or(u64::MAX);
        let ended = match self.bytes_left.checked_sub(length) {
            Some(left) => {
                self.bytes_left = left;
                ended
            }
            None => {
                // What is beyond the bound is not told.
                let most = usize::try_from(self.bytes_left).unwrap_or(usize::MAX);
                let whole = lines.text[..most].iter().rposition(|&byte| byte == b'\n');
                lines.text.truncate(whole.map_or(0, |end| end + 1));
                Some(Some(WalkCut::Bytes))
            }
        };
        if let Some(cut) = ended {
            self.is_over = true;
            self.listed = None;
            lines.push(&WalkLine::End { cut })?;
        }
        Ok(Some(lines.text.into()))
    }

    /// Tells one entry, or goes on to the next directory.
    fn step(&mut self, lines: &mut Lines) -> io::Result<Next> {
        let Some(listed) = &mut self.listed else {
            return self.go_on(lines);
        };
        let found = match listed.entries.next() {
            None => {
                self.listed = None;
                return Ok(Next::Goes);
            }
            Some(Ok(found)) => found,
            Some(Err(_)) => {
                lines.push(&WalkLine::Unreadable(text(&listed.path)))?;
                self.listed = None;
                return Ok(Next::Goes);
            }
        };
        let metadata = match found.metadata() {
            Ok(metadata) => metadata,
            // It was removed in the meantime.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Next::Goes),
            Err(_) => {
                lines.push(&WalkLine::Unreadable(text(&listed.path)))?;
                return Ok(Next::Goes);
            }
        };
        let Some(left) = self.entries_left.checked_sub(1) else {
            return Ok(Next::Ends(Some(WalkCut::Entries)));
        };
        self.entries_left = left;
        let path = listed.path.join(found.file_name());
        let told = entry(&found.file_name(), &metadata, || fs::read_link(&path));
        lines.push(&WalkLine::Entry(told))?;
        let is_elsewhere = self.device.is_some_and(|device| device != metadata.dev());
        if !metadata.is_dir() || is_elsewhere || self.skip.contains(&path) {
            return Ok(Next::Goes);
        }
        let len = self.waiting_len + path.as_os_str().len();
        match () {
            () if listed.depth >= self.max_depth => self.cut = Some(WalkCut::Depth),
            () if len > MAX_WAITING => self.cut = Some(WalkCut::Directories),
            () => {
                self.waiting_len = len;
                self.waiting.push((path, listed.depth + 1));
            }
        }
        Ok(Next::Goes)
    }

    fn go_on(&mut self, lines: &mut Lines) -> io::Result<Next> {
        let Some((path, depth)) = self.waiting.pop() else {
            return Ok(Next::Ends(self.cut));
        };
        self.waiting_len -= path.as_os_str().len();
        // It may be a symbolic link or a mount point by now.
        let is_same = fs::symlink_metadata(&path).is_ok_and(|metadata| {
            metadata.is_dir() && self.device.is_none_or(|device| device == metadata.dev())
        });
        match fs::read_dir(&path) {
            Ok(entries) if is_same => {
                lines.push(&WalkLine::Directory(text(&path)))?;
                self.listed = Some(Directory {
                    path,
                    entries,
                    depth,
                });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            _ => lines.push(&WalkLine::Unreadable(text(&path)))?,
        }
        Ok(Next::Goes)
    }
}

struct Lines {
    text: Vec<u8>,
}

impl Lines {
    fn push(&mut self, line: &WalkLine) -> io::Result<()> {
        serde_json::to_writer(&mut self.text, line)?;
        self.text.push(b'\n');
        Ok(())
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::{
        ffi::OsStr,
        os::unix::{ffi::OsStrExt, fs::symlink},
    };

    use super::*;

    fn request(path: &Path) -> WalkRequest {
        WalkRequest {
            path: path.to_str().unwrap().to_owned(),
            max_entries: 100_000,
            max_depth: 100,
            max_bytes: 100 << 20,
            other_file_systems: false,
            skip: Vec::new(),
        }
    }

    /// What a walk tells: paths of entries, in their order of the alphabet, and all other lines.
    fn walk(request: &WalkRequest) -> (Vec<String>, Vec<WalkLine>) {
        let mut walk = Walk::open(request).unwrap();
        let (mut paths, mut others, mut at) = (Vec::new(), Vec::new(), String::new());
        while let Some(lines) = walk.next_lines().unwrap() {
            for line in lines
                .split(|&byte| byte == b'\n')
                .filter(|line| !line.is_empty())
            {
                match serde_json::from_slice(line).unwrap() {
                    WalkLine::Directory(path) => at = path,
                    WalkLine::Entry(entry) => {
                        let path = format!("{}/{}", at.trim_end_matches('/'), entry.name);
                        let root = request.path.trim_end_matches('/');
                        paths.push(path.strip_prefix(root).unwrap().to_owned());
                    }
                    other => others.push(other),
                }
            }
        }
        paths.sort();
        (paths, others)
    }

    const WHOLE: [WalkLine; 1] = [WalkLine::End { cut: None }];

    fn cut(cut: WalkCut) -> [WalkLine; 1] {
        [WalkLine::End { cut: Some(cut) }]
    }

    #[test]
    fn a_tree_is_told_whole_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("a/b/c")).unwrap();
        fs::write(root.join("a/b/file"), "x").unwrap();
        symlink(root, root.join("a/loop")).unwrap();
        symlink("self", root.join("self")).unwrap();
        let strange = OsStr::from_bytes(b"a/\xff\xfe");
        fs::create_dir(root.join(strange)).unwrap();
        fs::write(root.join(strange).join("below"), "x").unwrap();
        let (paths, others) = walk(&request(root));
        let expected = [
            "/a",
            "/a/b",
            "/a/b/c",
            "/a/b/file",
            "/a/loop",
            "/a/\u{fffd}\u{fffd}",
            "/a/\u{fffd}\u{fffd}/below",
            "/self",
        ];
        assert_eq!(paths, expected);
        assert_eq!(others, WHOLE);

        let skipping = WalkRequest {
            skip: vec![root.join("a/b").to_str().unwrap().to_owned()],
            ..request(root)
        };
        let (paths, others) = walk(&skipping);
        assert!(paths.contains(&"/a/b".to_owned()));
        assert!(!paths.contains(&"/a/b/file".to_owned()));
        assert_eq!(others, WHOLE);
    }

    #[test]
    fn a_walk_ends_at_its_bounds_and_says_so() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join("1/2/3")).unwrap();
        let flat = |max_depth| {
            walk(&WalkRequest {
                max_depth,
                ..request(root)
            })
        };
        assert_eq!(flat(0), (vec!["/1".to_owned()], cut(WalkCut::Depth).into()));
        assert_eq!(flat(2).0.len(), 3);
        assert_eq!(flat(2).1, cut(WalkCut::Depth));
        assert_eq!(flat(3).1, WHOLE);

        let many = root.join("many");
        fs::create_dir(&many).unwrap();
        for number in 0..5000 {
            fs::write(many.join(number.to_string()), "").unwrap();
        }
        let (paths, others) = walk(&request(&many));
        assert_eq!(paths.len(), 5000);
        assert_eq!(others, WHOLE);
        for max_entries in [0, 1, 4999] {
            let (paths, others) = walk(&WalkRequest {
                max_entries,
                ..request(&many)
            });
            assert_eq!(paths.len() as u64, max_entries);
            assert_eq!(others, cut(WalkCut::Entries));
        }
        let exact = WalkRequest {
            max_entries: 5000,
            ..request(&many)
        };
        assert_eq!(walk(&exact).1, WHOLE);

        for max_bytes in [0, 100, 70_000, 200_000] {
            let bounded = WalkRequest {
                max_bytes,
                ..request(&many)
            };
            let mut bounded = Walk::open(&bounded).unwrap();
            let mut told = Vec::new();
            while let Some(lines) = bounded.next_lines().unwrap() {
                told.extend_from_slice(&lines);
            }
            let last = told.split(|&byte| byte == b'\n').nth_back(1).unwrap();
            let end: WalkLine = serde_json::from_slice(last).unwrap();
            assert_eq!([end], cut(WalkCut::Bytes));
            assert!(told.len() - last.len() - 1 <= max_bytes as usize);
        }
    }

    #[test]
    fn what_is_not_a_directory_is_not_walked() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Walk::open(&request(file.path())).is_err());
        assert!(Walk::open(&request(Path::new("/proc/none"))).is_err());
    }

    #[test]
    fn other_file_systems_are_told_and_not_entered() {
        let (paths, _) = walk(&WalkRequest {
            max_depth: 1,
            ..request(Path::new("/"))
        });
        // A mount point of every machine that tests run on.
        assert!(paths.contains(&"/proc".to_owned()));
        assert!(!paths.contains(&"/proc/self".to_owned()));
        let everywhere = WalkRequest {
            path: "/proc".to_owned(),
            max_depth: 0,
            other_file_systems: true,
            ..request(Path::new("/"))
        };
        assert!(walk(&everywhere).0.contains(&"/self".to_owned()));
    }
}
