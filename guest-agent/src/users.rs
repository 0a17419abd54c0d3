//! Users and groups of the guest, read from its `/etc/passwd` and `/etc/group` (passwd(5),
//! group(5)). The agent is linked statically, so it cannot use the C library's name services.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// How much of `/etc/passwd` and `/etc/group` is read, in bytes.
const MAX_DATABASE: u64 = 4 << 20;

/// Who a program runs as, or a file belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Login name; the number's digits if the user has no entry.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// All group ids, the primary one included.
    pub groups: Vec<u32>,
    /// Home directory; `/` if the user has no entry.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Why a user cannot be found.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The text is no `USER` or `USER:GROUP`.
    #[error("{0:?} is no user; expected USER or USER:GROUP, each a name or a number")]
    Malformed(String),
    /// No such user.
    #[error("the guest has no user {0:?}")]
    UnknownUser(String),
    /// No such group.
    #[error("the guest has no group {0:?}")]
    UnknownGroup(String),
    /// A database could not be read.
    #[error("cannot read {path}")]
    Database {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Finds the account that `spec` names (`USER` or `USER:GROUP`, each a name or a number), in the
/// databases of directory `etc`. Without `spec` it is the agent's own user.
///
/// # Errors
/// [`UserError`]
pub fn resolve(spec: Option<&str>, etc: &Path) -> Result<Account, UserError> {
    let own = rustix::process::geteuid().as_raw().to_string();
    let spec = spec.unwrap_or(&own);
    let (user, group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    if user.is_empty() || group.is_some_and(|g| g.is_empty() || g.contains(':')) {
        return Err(UserError::Malformed(spec.to_owned()));
    }

    let mut account = find_user(user, &etc.join("passwd"))?;
    let groups = etc.join("group");
    if let Some(group) = group {
        account.gid = find_group(group, &groups)?;
        account.groups = vec![account.gid];
    } else {
        account.groups = memberships(&account, &groups)?;
    }
    Ok(account)
}

fn find_user(user: &str, path: &Path) -> Result<Account, UserError> {
    let number = id(user);
    let mut found = None;
    each_line(path, |line| {
        let mut fields = line.split(':');
        let (Some(name), Some(_password)) = (fields.next(), fields.next()) else {
            return true;
        };
        let (Some(uid), Some(gid)) = (fields.next().and_then(id), fields.next().and_then(id))
        else {
            return true;
        };
        if name != user && number != Some(uid) {
            return true;
        }
        let or = |value: Option<&str>, default: &str| match value {
            Some(value) if !value.is_empty() => value.to_owned(),
            _ => default.to_owned(),
        };
        found = Some(Account {
            name: name.to_owned(),
            uid,
            gid,
            groups: vec![gid],
            home: or(fields.nth(1), "/"),
            shell: or(fields.next(), "/bin/sh"),
        });
        false
    })?;
    match (found, number) {
        (Some(account), _) => Ok(account),
        (None, Some(uid)) => Ok(Account {
            name: user.to_owned(),
            uid,
            gid: uid,
            groups: vec![uid],
            home: "/".to_owned(),
            shell: "/bin/sh".to_owned(),
        }),
        (None, None) => Err(UserError::UnknownUser(user.to_owned())),
    }
}

fn find_group(group: &str, path: &Path) -> Result<u32, UserError> {
    if let Some(gid) = id(group) {
        return Ok(gid);
    }
    let mut found = None;
    each_line(path, |line| {
        let mut fields = line.split(':');
        if fields.next() == Some(group) {
            found = fields.nth(1).and_then(id);
        }
        found.is_none()
    })?;
    found.ok_or_else(|| UserError::UnknownGroup(group.to_owned()))
}

fn memberships(account: &Account, path: &Path) -> Result<Vec<u32>, UserError> {
    let mut groups = vec![account.gid];
    each_line(path, |line| {
        let mut fields = line.split(':').skip(2);
        if let (Some(gid), Some(members)) = (fields.next().and_then(id), fields.next())
            && members.split(',').any(|member| member == account.name)
            && !groups.contains(&gid)
        {
            groups.push(gid);
        }
        true
    })?;
    Ok(groups)
}

/// A user or group id. The largest number is no id: system calls take it for "unchanged".
fn id(text: &str) -> Option<u32> {
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok().filter(|&id| id != u32::MAX)
}

/// Calls `visit` for each line until it returns false. A missing file has no lines.
fn each_line(path: &Path, mut visit: impl FnMut(&str) -> bool) -> Result<(), UserError> {
    let fail = |source| UserError::Database {
        path: path.to_owned(),
        source,
    };
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail(e)),
    };
    let mut reader = BufReader::new(file.take(MAX_DATABASE));
    let mut line = Vec::new();
    loop {
        line.clear();
        if reader.read_until(b'\n', &mut line).map_err(fail)? == 0 {
            return Ok(());
        }
        if let Ok(text) = std::str::from_utf8(&line)
            && !visit(text.trim_end_matches('\n'))
        {
            return Ok(());
        }
    }
}

/// Opens without waiting for the other end of a FIFO that a guest may have put there.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn etc(passwd: &[u8], group: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("passwd"), passwd).unwrap();
        std::fs::write(dir.path().join("group"), group).unwrap();
        dir
    }

    fn debian() -> tempfile::TempDir {
        etc(
            b"root:x:0:0:root:/root:/bin/bash\nbroken\n\nann:x:1000:1001:Ann,,,:/home/ann:\n",
            b"root:x:0:\nsudo:x:27:bob,ann\nann:x:1001:ann\nstaff:x:50:annabel\n",
        )
    }

    #[test]
    fn names_numbers_and_groups() {
        let etc = debian();
        let ann = resolve(Some("ann"), etc.path()).unwrap();
        assert_eq!(
            (ann.uid, ann.gid, ann.groups.as_slice()),
            (1000, 1001, &[1001, 27][..])
        );
        assert_eq!(
            (ann.home.as_str(), ann.shell.as_str()),
            ("/home/ann", "/bin/sh")
        );
        assert_eq!(resolve(Some("1000"), etc.path()).unwrap(), ann);
        let with_group = resolve(Some("ann:sudo"), etc.path()).unwrap();
        assert_eq!((with_group.gid, with_group.groups), (27, vec![27]));
        let stranger = resolve(Some("4242:7"), etc.path()).unwrap();
        assert_eq!(
            (stranger.uid, stranger.gid, stranger.home.as_str()),
            (4242, 7, "/")
        );
    }

    #[test]
    fn unknown_and_malformed_are_told_apart() {
        let etc = debian();
        let error = |spec| resolve(Some(spec), etc.path()).unwrap_err();
        assert!(matches!(error("eve"), UserError::UnknownUser(_)));
        assert!(matches!(error("ann:wheel"), UserError::UnknownGroup(_)));
        assert!(matches!(error("4294967295"), UserError::UnknownUser(_)));
        for spec in ["", ":", "ann:", ":sudo", "a:b:c"] {
            assert!(matches!(error(spec), UserError::Malformed(_)), "{spec}");
        }
    }

    #[test]
    fn a_guest_without_databases_has_numbers_only() {
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(resolve(Some("0"), empty.path()).unwrap().home, "/");
        assert!(resolve(Some("root"), empty.path()).is_err());
    }

    proptest! {
        #[test]
        fn hostile_databases_do_no_harm(passwd: Vec<u8>, group: Vec<u8>, spec: String) {
            let etc = etc(&passwd, &group);
            let _ = resolve(Some(&spec), etc.path());
        }
    }
}
