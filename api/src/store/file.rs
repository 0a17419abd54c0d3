//! Files of databases.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use rusqlite::{Connection, ffi};

use crate::private;

/// What SQLite has beside a database, by what their names end with.
const COMPANIONS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// Opens the database `path` to read and write, and makes it if it is not there. Nobody but the daemon's
/// user may read it: SQLite would let everybody, and makes the files beside it with the mode that it has.
///
/// # Errors
/// It cannot be opened, or be kept from others.
pub fn open(path: &Path) -> rusqlite::Result<Connection> {
    close(path).map_err(|error| {
        let text = format!("it cannot be kept from others: {error}");
        rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_CANTOPEN), Some(text))
    })?;
    Connection::open(path)
}

fn close(path: &Path) -> io::Result<()> {
    private::file(path)?;
    for companion in COMPANIONS {
        private::file_if_there(&beside(path, companion))?;
    }
    Ok(())
}

/// The file beside a database whose name ends so.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(end);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::audit::AuditLog;
    use crate::store::SqliteStore;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    /// Opens a database of either kind, and drops it.
    type Open = fn(&Path);
    const KINDS: [Open; 2] = [
        |path| drop(SqliteStore::open(path).unwrap()),
        |path| drop(AuditLog::open(path).unwrap()),
    ];

    #[test]
    fn nobody_else_reads_a_database_in_a_directory_that_everybody_reads() {
        for make in KINDS {
            let dir = tempfile::tempdir().unwrap();
            fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
            let path = dir.path().join("db");
            make(&path);
            assert_eq!(mode(&path), 0o600);

            // One from before, with what a crash leaves beside it.
            let log = beside(&path, "-wal");
            fs::write(&log, "").unwrap();
            for path in [&path, &log] {
                fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
            }
            let other = Connection::open(&path).unwrap();
            other.execute_batch("PRAGMA user_version").unwrap();
            make(&path);
            assert_eq!(mode(&path), 0o600);
            let beside = COMPANIONS.map(|end| beside(&path, end));
            for path in beside.iter().filter(|path| path.exists()) {
                assert_eq!(mode(path), 0o600, "{}", path.display());
            }
        }
    }

    #[test]
    fn a_database_that_cannot_be_made_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = open(&dir.path().join("none/db")).unwrap_err().to_string();
        assert!(error.contains("cannot be kept from others"), "{error}");
    }
}
