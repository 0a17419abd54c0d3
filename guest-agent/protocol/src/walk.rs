//! Walks of a tree of directories.

use serde::{Deserialize, Serialize};

use crate::{Entry, MAX_PATH};

/// The most entries that a walk may be asked for.
pub const MAX_WALK_ENTRIES: u64 = 1_000_000;
/// The deepest that a walk may be asked to go, in directories below the first.
pub const MAX_WALK_DEPTH: u32 = 1024;
/// The longest answer that may be asked for, in bytes.
pub const MAX_WALK_BYTES: u64 = 1 << 30;
/// The most directories that a walk may be asked to stay out of.
pub const MAX_WALK_SKIPPED: usize = 64;

/// What to walk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WalkRequest {
    /// The directory to begin at, absolute; if it is a symbolic link, what that leads to.
    pub path: String,
    /// How many entries to tell at most, up to [`MAX_WALK_ENTRIES`].
    pub max_entries: u64,
    /// How many directories deep to go, up to [`MAX_WALK_DEPTH`]; with 0, only what is in `path` is told.
    pub max_depth: u32,
    /// How long the lines may be together, in bytes, up to [`MAX_WALK_BYTES`].
    pub max_bytes: u64,
    /// Whether to enter directories of other file systems than that of `path`.
    #[serde(default)]
    pub other_file_systems: bool,
    /// Directories that are told but not entered, absolute; [`MAX_WALK_SKIPPED`] at most.
    #[serde(default)]
    pub skip: Vec<String>,
}

impl WalkRequest {
    /// Whether it can be carried out.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), &'static str> {
        let is_path =
            |path: &String| path.starts_with('/') && !path.contains('\0') && path.len() <= MAX_PATH;
        match () {
            () if !is_path(&self.path) => {
                Err("path must be absolute, without NUL, of at most 4095 bytes")
            }
            () if self.max_entries > MAX_WALK_ENTRIES => Err("max_entries must be 1000000 at most"),
            () if self.max_depth > MAX_WALK_DEPTH => Err("max_depth must be 1024 at most"),
            () if self.max_bytes > MAX_WALK_BYTES => Err("max_bytes must be 1073741824 at most"),
            () if self.skip.len() > MAX_WALK_SKIPPED => Err("skip must have 64 paths at most"),
            () if !self.skip.iter().all(is_path) => {
                Err("skip must be paths that are absolute, without NUL, of at most 4095 bytes")
            }
            () => Ok(()),
        }
    }
}

/// One line of the answer to a walk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalkLine {
    /// The entries that follow are in the directory of this path, with U+FFFD for what is not UTF-8.
    Directory(String),
    /// What is in the directory that was told last.
    Entry(Entry),
    /// The directory of this path could not be listed, or not wholly.
    Unreadable(String),
    /// The last line.
    End {
        /// Why not all was walked; absent if all was, but for what is unreadable, skipped, and on other file
        /// systems.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cut: Option<WalkCut>,
    },
}

/// Why a walk left something out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalkCut {
    /// There are more entries than were asked for. The walk ended there.
    Entries,
    /// Directories lie deeper. They were told and not entered.
    Depth,
    /// There are more directories than the agent remembers. The others were told and not entered.
    Directories,
    /// The lines are as long as was asked for. The walk ended there.
    Bytes,
    /// Something that this version does not know.
    #[serde(other)]
    Other,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> WalkRequest {
        WalkRequest {
            path: "/".into(),
            max_entries: MAX_WALK_ENTRIES,
            max_depth: MAX_WALK_DEPTH,
            max_bytes: MAX_WALK_BYTES,
            other_file_systems: false,
            skip: vec!["/proc".into(); MAX_WALK_SKIPPED],
        }
    }

    #[test]
    fn what_is_beyond_the_bounds_is_refused() {
        assert_eq!(request().check(), Ok(()));
        let long = format!("/{}", "x".repeat(MAX_PATH));
        type Spoil = fn(&mut WalkRequest);
        let bad: [(&str, Spoil); 4] = [
            ("max_entries", |it| it.max_entries += 1),
            ("max_depth", |it| it.max_depth += 1),
            ("max_bytes", |it| it.max_bytes += 1),
            ("skip", |it| it.skip.push("/x".into())),
        ];
        for (name, change) in bad {
            let mut request = request();
            change(&mut request);
            assert!(request.check().unwrap_err().starts_with(name));
        }
        for path in ["", "etc", "/a\0b", &long] {
            let request = WalkRequest {
                path: path.into(),
                ..request()
            };
            assert!(request.check().unwrap_err().starts_with("path"), "{path}");
            let request = WalkRequest {
                path: "/".into(),
                skip: vec![path.into()],
                ..request
            };
            assert!(request.check().unwrap_err().starts_with("skip"), "{path}");
        }
    }

    #[test]
    fn lines_are_objects_of_one_field() {
        let line = |line: &WalkLine| serde_json::to_string(line).unwrap();
        assert_eq!(
            line(&WalkLine::Directory("/a".into())),
            r#"{"directory":"/a"}"#
        );
        assert_eq!(line(&WalkLine::End { cut: None }), r#"{"end":{}}"#);
        let cut = WalkLine::End {
            cut: Some(WalkCut::Entries),
        };
        assert_eq!(line(&cut), r#"{"end":{"cut":"entries"}}"#);
        let later = r#"{"end":{"cut":"moon"}}"#;
        let later: WalkLine = serde_json::from_str(later).unwrap();
        assert_eq!(
            later,
            WalkLine::End {
                cut: Some(WalkCut::Other)
            }
        );
    }
}
