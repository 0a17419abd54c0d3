//! All processes of one exec, so that they can be killed together.
//!
//! The first process leads a session and process group of its own. Where the guest has cgroup v2
//! it also starts in a cgroup of its own, which its descendants cannot leave by `setsid`, and
//! which the kernel kills atomically (`cgroup.kill`, since Linux 5.14).

use std::{
    cell::{Cell, RefCell},
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    rc::Rc,
};

use rustix::process::{Pid, Signal};

use crate::{log::warning, reaper::Reaper};

/// Makes and removes the cgroups of execs, below one directory.
#[derive(Debug)]
pub struct Cgroups {
    base: PathBuf,
    next: Cell<u64>,
    /// Cgroups in which processes were left running, to be removed when they are empty.
    occupied: RefCell<Vec<PathBuf>>,
}

impl Cgroups {
    /// Uses `base`, a directory of a cgroup v2 file system, which is made if it is missing.
    ///
    /// # Errors
    /// If it cannot be made, or is not a cgroup that can be killed.
    pub fn new(base: &Path) -> io::Result<Rc<Self>> {
        match fs::create_dir(base) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        fs::metadata(base.join("cgroup.kill"))?;
        Ok(Rc::new(Self {
            base: base.to_owned(),
            next: Cell::new(0),
            occupied: RefCell::default(),
        }))
    }

    /// Makes the cgroup of one exec, and opens its list of processes for writing.
    ///
    /// # Errors
    /// If the directory cannot be made.
    pub fn create(self: &Rc<Self>) -> io::Result<(Cgroup, File)> {
        let number = self.next.get();
        self.next.set(number + 1);
        let path = self.base.join(format!("exec-{number}"));
        fs::create_dir(&path)?;
        let cgroup = Cgroup {
            owner: self.clone(),
            path,
        };
        let procs = OpenOptions::new()
            .write(true)
            .open(cgroup.path.join("cgroup.procs"))?;
        Ok((cgroup, procs))
    }

    fn release(&self, path: &Path) {
        let mut occupied = self.occupied.borrow_mut();
        occupied.push(path.to_owned());
        occupied.retain(|path| {
            fs::remove_dir(path).is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy)
        });
    }
}

/// The cgroup of one exec. Dropping it lets go of the processes in it.
#[derive(Debug)]
pub struct Cgroup {
    owner: Rc<Cgroups>,
    path: PathBuf,
}

impl Cgroup {
    fn kill(&self) -> io::Result<()> {
        OpenOptions::new()
            .write(true)
            .open(self.path.join("cgroup.kill"))?
            .write_all(b"1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.owner.release(&self.path);
    }
}

/// The processes of one exec. Dropped while the first process runs, it kills them all.
#[derive(Debug)]
pub struct ProcessGroup {
    leader: Pid,
    reaper: Rc<Reaper>,
    cgroup: Option<Cgroup>,
}

impl ProcessGroup {
    /// The group that `leader` was started in, and whose exit was asked for at `reaper`.
    pub fn new(leader: Pid, reaper: Rc<Reaper>, cgroup: Option<Cgroup>) -> Self {
        Self {
            leader,
            reaper,
            cgroup,
        }
    }

    /// Kills all processes with SIGKILL.
    pub fn kill(&self) {
        // Once the leader was waited for, its number may belong to another process.
        if self.reaper.expects(self.leader) {
            // The group does not exist before the child has called setsid.
            let _ = rustix::process::kill_process(self.leader, Signal::KILL);
            let _ = rustix::process::kill_process_group(self.leader, Signal::KILL);
        }
        if let Some(cgroup) = &self.cgroup
            && let Err(error) = cgroup.kill()
        {
            warning!("cannot kill {}: {error}", cgroup.path.display());
        }
    }
}

impl ProcessGroup {
    /// Sends a signal to the first process's group, which is gone once that was waited for: then
    /// nothing happens.
    ///
    /// # Errors
    /// Of kill(2).
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.reaper.expects(self.leader) {
            rustix::process::kill_process_group(self.leader, signal)?;
        }
        Ok(())
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        if self.reaper.expects(self.leader) {
            self.kill();
        }
    }
}
