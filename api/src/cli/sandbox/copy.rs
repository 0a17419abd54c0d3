//! Files and directories, into sandboxes and out of them.
//!
//! What comes out of a sandbox was named by strangers: no name leads out of the directory that it is
//! copied to, and links, over which others could, are not made. Links and special files are left out
//! on the way in as well, and counted.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::sandbox_path;
use crate::cli::client::{Client, ClientError};
use crate::cli::{CliError, say};

/// How many levels of directories are listed at a time: what the API allows.
const DEPTH: usize = 64;
/// How many files get their permissions by one command.
const FILES_AT_A_TIME: usize = 200;
/// Permissions of an uploaded file.
const UPLOADED_MODE: u32 = 0o644;
/// How often it is told how far it is.
const TELL: Duration = Duration::from_secs(1);

/// Why nothing, or not everything, was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// Neither or both are in a sandbox.
    #[error("one of the two must be in a sandbox, as SANDBOX:PATH, and the other here")]
    Sides,
    /// A path in a sandbox.
    #[error("{0:?}: a path in a sandbox must be absolute, as in sb-1a2b3c4d:/root/file")]
    Relative(String),
    /// The source is not there.
    #[error("there is no {0} in the sandbox")]
    Missing(String),
    /// Not what can be copied.
    #[error("{0} is neither a file nor a directory")]
    Special(PathBuf),
    /// A file would have to become a directory.
    #[error("{0} is there, and no directory")]
    NoDirectory(String),
    /// A name in the sandbox.
    #[error("the sandbox has a file with a name that could lead elsewhere: {0:?}")]
    Name(String),
    /// A name here.
    #[error("{0:?} is no UTF-8, which the API needs")]
    Utf8(PathBuf),
    /// The answer of the daemon.
    #[error("the daemon lists a directory in a way that makes no sense")]
    Listing,
    /// A file here.
    #[error("{path} cannot be read or written")]
    Local {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The permissions of files were not set.
    #[error("the files are copied, but have no permissions: {0}")]
    Permissions(String),
}

fn local(path: &Path) -> impl FnOnce(io::Error) -> CopyError {
    let path = path.to_owned();
    move |source| CopyError::Local { path, source }
}

/// `SANDBOX:PATH`; `None` for a path here. One with a colon is written with a slash before it.
fn remote(text: &str) -> Option<(&str, &str)> {
    let (id, path) = text.split_once(':')?;
    (!id.is_empty() && !id.contains('/') && !id.starts_with('.')).then_some((id, path))
}

/// Copies.
///
/// # Errors
/// Nothing was copied, or not everything.
pub async fn copy(client: &Client, from: &str, to: &str) -> Result<(), CliError> {
    let mut copy = match (remote(from), remote(to)) {
        (Some((id, _)), None) | (None, Some((id, _))) => Copy::new(client, id),
        _ => return Err(CopyError::Sides.into()),
    };
    for (_, path) in remote(from).into_iter().chain(remote(to)) {
        if !path.starts_with('/') {
            return Err(CopyError::Relative(path.to_owned()).into());
        }
    }
    match (remote(from), remote(to)) {
        (Some((_, path)), _) => copy.download(path, Path::new(to)).await?,
        (_, Some((_, path))) => copy.upload(Path::new(from), path).await?,
        _ => {}
    }
    if copy.left_out > 0 {
        say(&format!(
            "links and special files left out: {}",
            copy.left_out
        ));
    }
    Ok(())
}

struct Copy<'a> {
    client: &'a Client,
    id: &'a str,
    files: u64,
    bytes: u64,
    left_out: u64,
    told: Instant,
}

/// What a file in a sandbox is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Directory,
    Other,
}

/// A file in a sandbox.
#[derive(Debug)]
struct Entry {
    path: String,
    kind: Kind,
    mode: u32,
}

impl Entry {
    fn parse(entry: &Value) -> Result<Self, CopyError> {
        let permissions = entry["permissions"].as_str().unwrap_or_default();
        let kind = match permissions.as_bytes().first() {
            Some(b'-') => Kind::File,
            Some(b'd') => Kind::Directory,
            Some(_) => Kind::Other,
            None => return Err(CopyError::Listing),
        };
        Ok(Self {
            path: entry["path"].as_str().ok_or(CopyError::Listing)?.to_owned(),
            mode: entry["mode"]
                .as_u64()
                .and_then(|mode| u32::try_from(mode).ok())
                .ok_or(CopyError::Listing)?,
            kind,
        })
    }
}

impl<'a> Copy<'a> {
    fn new(client: &'a Client, id: &'a str) -> Self {
        Self {
            client,
            id,
            files: 0,
            bytes: 0,
            left_out: 0,
            told: Instant::now(),
        }
    }

    async fn call(&self, what: &str, body: &Value) -> Result<Value, ClientError> {
        let path = format!("{}/{what}", sandbox_path(self.id));
        self.client.call_with("POST", &path, body).await
    }

    async fn list(&self, path: &str, depth: usize) -> Result<Vec<Entry>, CliError> {
        let body = json!({"path": path, "depth": depth});
        let listed = self.call("files/list", &body).await?;
        let entries = listed["entries"].as_array().ok_or(CopyError::Listing)?;
        let entries: Result<_, _> = entries.iter().map(Entry::parse).collect();
        Ok(entries?)
    }

    /// What is at a path; `None` if nothing is.
    async fn find(&self, path: &str) -> Result<Option<Entry>, CliError> {
        let Some((parent, name)) = path.rsplit_once('/').filter(|(_, name)| !name.is_empty())
        else {
            return Ok(Some(Entry {
                path: "/".to_owned(),
                kind: Kind::Directory,
                mode: 0o755,
            }));
        };
        let parent = if parent.is_empty() { "/" } else { parent };
        let entries = match self.list(parent, 1).await {
            Err(CliError::Client(ClientError::Refused {
                status: 404,
                message,
                ..
            })) if message != "sandbox not found" => {
                return Ok(None);
            }
            listed => listed?,
        };
        let is_it = |entry: &Entry| entry.path.rsplit('/').next() == Some(name);
        Ok(entries.into_iter().find(is_it))
    }

    fn done(&mut self, bytes: u64) {
        self.files += 1;
        self.bytes += bytes;
        if self.told.elapsed() >= TELL {
            self.told = Instant::now();
            say(&format!(
                "copying …, {} files, {} MiB",
                self.files,
                self.bytes >> 20
            ));
        }
    }

    async fn download(&mut self, from: &str, to: &Path) -> Result<(), CliError> {
        let from = trim(from);
        let source = self.find(from).await?;
        let source = source.ok_or_else(|| CopyError::Missing(from.to_owned()))?;
        let to = match (to.is_dir(), from.rsplit('/').next()) {
            (true, Some(name)) if !name.is_empty() => to.join(checked(name)?),
            _ => to.to_owned(),
        };
        match source.kind {
            Kind::Directory => self.download_directory(from, &to).await,
            // A link is followed by the one who reads it, in the sandbox.
            Kind::File | Kind::Other => self.download_file(&source, &to).await,
        }
    }

    async fn download_directory(&mut self, from: &str, to: &Path) -> Result<(), CliError> {
        make_directory(to)?;
        let mut to_list = vec![from.to_owned()];
        while let Some(directory) = to_list.pop() {
            for entry in self.list(&directory, DEPTH).await? {
                let below = below(&entry.path, from)?;
                let path = to.join(&below);
                match entry.kind {
                    Kind::Directory => {
                        make_directory(&path)?;
                        let levels = entry.path[directory.len()..].matches('/').count();
                        if levels >= DEPTH {
                            to_list.push(entry.path);
                        }
                    }
                    Kind::File => self.download_file(&entry, &path).await?,
                    Kind::Other => self.left_out += 1,
                }
            }
        }
        Ok(())
    }

    /// The file appears under its name when all of it is there.
    async fn download_file(&mut self, entry: &Entry, to: &Path) -> Result<(), CliError> {
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let mut file = tempfile::Builder::new()
            .prefix(".sandboxd-cp")
            .tempfile_in(parent)
            .map_err(local(to))?;
        let body = json!({"path": entry.path});
        let path = format!("{}/files/read", sandbox_path(self.id));
        let read = self
            .client
            .download("POST", &path, Some(&body), file.as_file_mut());
        let size = read.await?;
        // No more than the owner's set-user-id bits and the like are lost.
        let mode = match entry.kind {
            Kind::File => entry.mode & 0o777,
            _ => UPLOADED_MODE,
        };
        let permissions = fs::Permissions::from_mode(mode);
        file.as_file()
            .set_permissions(permissions)
            .map_err(local(to))?;
        file.persist(to).map_err(|error| local(to)(error.error))?;
        self.done(size);
        Ok(())
    }

    async fn upload(&mut self, from: &Path, to: &str) -> Result<(), CliError> {
        let metadata = fs::metadata(from).map_err(local(from))?;
        let is_directory = match self.find(trim(to)).await? {
            None => to.ends_with('/') && !metadata.is_dir(),
            Some(entry) => entry.kind == Kind::Directory,
        };
        let name = fs::canonicalize(from).map_err(local(from))?;
        let to = match name.file_name() {
            Some(name) if is_directory => join(trim(to), Path::new(name))?,
            _ => trim(to).to_owned(),
        };
        let mut modes = BTreeMap::new();
        if metadata.is_dir() {
            self.upload_directory(from, &to, &mut modes).await?;
        } else if metadata.is_file() {
            self.upload_file(from, &to, &mut modes).await?;
        } else {
            return Err(CopyError::Special(from.to_owned()).into());
        }
        for (mode, paths) in modes {
            for paths in paths.chunks(FILES_AT_A_TIME) {
                self.set_mode(mode, paths).await?;
            }
        }
        Ok(())
    }

    async fn upload_directory(
        &mut self,
        from: &Path,
        to: &str,
        modes: &mut BTreeMap<u32, Vec<String>>,
    ) -> Result<(), CliError> {
        let mut waiting = vec![(from.to_owned(), to.to_owned())];
        while let Some((from, to)) = waiting.pop() {
            self.call("files/mkdir", &json!({"path": to})).await?;
            for entry in fs::read_dir(&from).map_err(local(&from))? {
                let entry = entry.map_err(local(&from))?;
                let path = entry.path();
                let kind = entry.file_type().map_err(local(&path))?;
                let to = join(&to, Path::new(&entry.file_name()))?;
                if kind.is_dir() {
                    waiting.push((path, to));
                } else if kind.is_file() {
                    self.upload_file(&path, &to, modes).await?;
                } else {
                    self.left_out += 1;
                }
            }
        }
        Ok(())
    }

    async fn upload_file(
        &mut self,
        from: &Path,
        to: &str,
        modes: &mut BTreeMap<u32, Vec<String>>,
    ) -> Result<(), CliError> {
        let file = File::open(from).map_err(local(from))?;
        let metadata = file.metadata().map_err(local(from))?;
        let path = format!("{}/files/write", sandbox_path(self.id));
        self.client.upload(&path, to, file, metadata.len()).await?;
        let mode = metadata.permissions().mode() & 0o777;
        if mode != UPLOADED_MODE {
            modes.entry(mode).or_default().push(to.to_owned());
        }
        self.done(metadata.len());
        Ok(())
    }

    async fn set_mode(&self, mode: u32, paths: &[String]) -> Result<(), CliError> {
        let mut args = vec![format!("{mode:04o}"), "--".to_owned()];
        args.extend_from_slice(paths);
        let ended = self
            .call("exec", &json!({"cmd": "chmod", "args": args}))
            .await?;
        if ended["exit_code"] == 0 {
            return Ok(());
        }
        let said = ended["stderr"].as_str().unwrap_or_default();
        let said: String = said.trim().chars().filter(|c| !c.is_control()).collect();
        Err(CopyError::Permissions(said).into())
    }
}

/// Without slashes at the end.
fn trim(path: &str) -> &str {
    match path.trim_end_matches('/') {
        "" => "/",
        path => path,
    }
}

fn join(directory: &str, name: &Path) -> Result<String, CopyError> {
    let name = name
        .to_str()
        .ok_or_else(|| CopyError::Utf8(name.to_owned()))?;
    Ok(format!("{}/{name}", directory.trim_end_matches('/')))
}

/// A name, if it is one, and not a way to somewhere else.
fn checked(name: &str) -> Result<&str, CopyError> {
    let mut components = Path::new(name).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(_)), None) if !name.contains('\0') => Ok(name),
        _ => Err(CopyError::Name(name.to_owned())),
    }
}

/// The path of an entry below a directory that was listed.
fn below(path: &str, directory: &str) -> Result<PathBuf, CopyError> {
    let bad = || CopyError::Name(path.to_owned());
    let rest = path.strip_prefix(directory.trim_end_matches('/'));
    let rest = rest
        .and_then(|rest| rest.strip_prefix('/'))
        .ok_or_else(bad)?;
    rest.split('/')
        .map(|name| checked(name).map_err(|_| bad()))
        .collect()
}

fn make_directory(path: &Path) -> Result<(), CopyError> {
    match fs::create_dir(path) {
        // Not one that a link leads to: what is in there may be somewhere else.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let metadata = fs::symlink_metadata(path).map_err(local(path))?;
            if metadata.is_dir() {
                Ok(())
            } else {
                Err(CopyError::NoDirectory(path.display().to_string()))
            }
        }
        made => made.map_err(local(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_here_and_in_sandboxes() {
        assert_eq!(remote("sb-1:/a:b"), Some(("sb-1", "/a:b")));
        for here in ["a", "/a", "./a:b", "/a:b", ":a", "../x:y"] {
            assert_eq!(remote(here), None, "{here}");
        }
        assert_eq!((trim("/a/"), trim("//"), trim("/")), ("/a", "/", "/"));
        assert_eq!(join("/", Path::new("a")).unwrap(), "/a");
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        assert_eq!(below("/d/a/b", "/d").unwrap(), Path::new("a/b"));
        assert_eq!(below("/a", "/").unwrap(), Path::new("a"));
        for bad in [
            "/d/../x",
            "/d/a/../../x",
            "/d//etc/passwd",
            "/e/a",
            "/d",
            "/d/",
            "/d/./a",
            "/dd/a",
            "/d/a\0",
        ] {
            assert!(below(bad, "/d").is_err(), "{bad}");
        }
        for bad in ["", ".", "..", "a/b", "/a"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", dir.path().join("link")).unwrap();
        assert!(make_directory(&dir.path().join("link")).is_err());
        make_directory(&dir.path().join("new")).unwrap();
        make_directory(&dir.path().join("new")).unwrap();
    }
}
