//! Files: write.
//!
//! ```text
//! begin ──write*──> finish   the target has the new content
//!   └──────drop───────>      the target is untouched, the temporary file is gone
//! ```

use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, Metadata, OpenOptions},
    io::{self, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown, lchown},
    },
    path::{Path, PathBuf},
};

use agent_protocol::{Entry, FileQuery};

use super::FileError;
use crate::users;

/// Mode of a new file when none is asked for.
const DEFAULT_MODE: u32 = 0o644;

/// A file being written.
#[derive(Debug)]
pub struct Writing {
    target: PathBuf,
    temporary: Temporary,
    mode: u32,
    owner: Option<(u32, u32)>,
    /// Whether the target did not exist before.
    pub creates: bool,
}

impl Writing {
    /// Makes the parent directories and a temporary file beside the target.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn begin(query: &FileQuery) -> Result<Self, FileError> {
        let path = Path::new(OsStr::from_bytes(&query.path));
        let asked_owner = match &query.user {
            Some(user) => {
                let account = users::resolve(Some(user), Path::new("/etc"))?;
                Some((account.uid, account.gid))
            }
            None => None,
        };
        let (target, old) = find_target(path)?;
        let Some(parent) = target.parent() else {
            return Err(FileError::IsADirectory(target));
        };
        make_directories(parent, asked_owner)?;
        let temporary = Temporary::create(parent)?;

        let own = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        let old_owner = old.as_ref().map(|old| (old.uid(), old.gid()));
        Ok(Self {
            mode: query
                .mode
                .unwrap_or_else(|| old.as_ref().map_or(DEFAULT_MODE, |old| old.mode() & 0o7777)),
            owner: asked_owner.or(old_owner.filter(|&owner| owner != own)),
            creates: old.is_none(),
            temporary,
            target,
        })
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.temporary
            .file
            .write_all(bytes)
            .map_err(FileError::system("write", &self.target))
    }

    /// Gives the file its owner and mode, and puts it in the target's place.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn finish(mut self) -> Result<Entry, FileError> {
        let fail = FileError::system;
        let file = &self.temporary.file;
        // The owner first: changing it clears the set-user-id bits.
        if let Some((uid, gid)) = self.owner {
            fchown(file, Some(uid), Some(gid))
                .map_err(fail("change the owner of", &self.target))?;
        }
        file.set_permissions(fs::Permissions::from_mode(self.mode))
            .map_err(fail("change the mode of", &self.target))?;
        fs::rename(&self.temporary.path, &self.target).map_err(fail("replace", &self.target))?;
        self.temporary.renamed = true;
        super::stat(&self.target)
    }
}

/// The file that is to be replaced: `path`, or what it links to.
fn find_target(path: &Path) -> Result<(PathBuf, Option<Metadata>), FileError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.ends_with(b"/") || bytes.ends_with(b"/.") || bytes.ends_with(b"/..") {
        return Err(FileError::IsADirectory(path.to_owned()));
    }
    let target = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() => {
            // A link to nothing is replaced itself.
            fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
        }
        Ok(_) => path.to_owned(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((path.to_owned(), None)),
        Err(e) => return Err(FileError::system("look at", path)(e)),
    };
    let old = fs::symlink_metadata(&target).map_err(FileError::system("look at", path))?;
    if old.is_dir() {
        return Err(FileError::IsADirectory(target));
    }
    if old.is_symlink() {
        return Ok((target, None));
    }
    if !old.is_file() {
        return Err(FileError::NotARegularFile(target));
    }
    Ok((target, Some(old)))
}

/// Makes `path` and its missing parents, mode 0755.
fn make_directories(path: &Path, owner: Option<(u32, u32)>) -> Result<(), FileError> {
    let fail = FileError::system;
    // From the path upwards to the first that exists, then down again; a path has as many parts
    // as it likes, so there is no recursion.
    let mut missing = Vec::new();
    for ancestor in path.ancestors() {
        match fs::metadata(ancestor) {
            Ok(_) => break,
            Err(e) if e.kind() == io::ErrorKind::NotFound => missing.push(ancestor),
            Err(e) => return Err(fail("look at", ancestor)(e)),
        }
    }
    for directory in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o755).create(directory) {
            Ok(()) => {}
            // Someone else made it, or it ends in "..".
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(fail("make directory", directory)(e)),
        }
        if let Some((uid, gid)) = owner {
            lchown(directory, Some(uid), Some(gid))
                .map_err(fail("change the owner of", directory))?;
        }
    }
    Ok(())
}

/// A file that is removed unless it was renamed.
#[derive(Debug)]
struct Temporary {
    file: File,
    path: PathBuf,
    renamed: bool,
}

impl Temporary {
    fn create(directory: &Path) -> Result<Self, FileError> {
        let path = directory.join(random_name().map_err(FileError::system("write", directory))?);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(FileError::system("make a file in", directory))?;
        Ok(Self {
            file,
            path,
            renamed: false,
        })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn random_name() -> io::Result<OsString> {
    let mut random = [0u8; 8];
    // SAFETY: the buffer is valid for its length. At early boot the call waits for entropy.
    let len = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    if usize::try_from(len) != Ok(random.len()) {
        return Err(io::Error::last_os_error());
    }
    Ok(format!(".put-{:016x}.tmp", u64::from_ne_bytes(random)).into())
}

#[cfg(test)]
mod tests {
    use agent_protocol::ErrorCode;

    use super::*;

    fn begin(path: &Path) -> Result<Writing, FileError> {
        Writing::begin(&FileQuery::new(path.as_os_str().as_bytes()))
    }

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_dropped_write_leaves_the_old_content_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, "old").unwrap();
        let mut writing = begin(&path).unwrap();
        writing.write(b"new").unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        drop(writing);
        assert_eq!(names(dir.path()), ["a"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_link_is_followed_and_the_mode_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o751)).unwrap();
        std::os::unix::fs::symlink("a", &link).unwrap();
        let mut writing = begin(&link).unwrap();
        writing.write(b"new").unwrap();
        assert!(!writing.creates);
        assert_eq!(writing.finish().unwrap().mode, 0o751);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = |tail: &str| {
            begin(Path::new(&format!("{}{tail}", dir.path().display())))
                .unwrap_err()
                .code()
        };
        assert_eq!(error(""), ErrorCode::IsADirectory);
        assert_eq!(error("/"), ErrorCode::IsADirectory);
        assert_eq!(error("/.."), ErrorCode::IsADirectory);
        assert_eq!(error("/file/below"), ErrorCode::NotADirectory);
        assert_eq!(error(&format!("/{}", "x".repeat(256))), ErrorCode::BadPath);
        assert_eq!(
            begin(Path::new("/")).unwrap_err().code(),
            ErrorCode::IsADirectory
        );
        let null = begin(Path::new("/dev/null")).unwrap_err();
        assert_eq!(null.code(), ErrorCode::NotARegularFile);
        assert_eq!(names(dir.path()), ["file"]);
    }
}
