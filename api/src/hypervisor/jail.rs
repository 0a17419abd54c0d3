//! Users for jailed VMMs: each sandbox's own, so that nothing of one sandbox is open to another.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk_limits::DiskLimits;

/// How many users a host has for sandboxes.
const USERS: u32 = 1 << 16;

/// How VMMs are jailed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailConfig {
    /// The first of the uids and gids that sandboxes get, if the daemon is root.
    pub first_uid: u32,
    /// Where sandboxes have their cgroups.
    pub cgroup: CgroupParent,
    /// What each may take of the host's disk.
    pub disk_limits: DiskLimits,
}

/// Where sandboxes have their cgroups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CgroupParent {
    /// Below the daemon's own, if that can be arranged.
    Auto,
    /// In this directory of a cgroup file system (version 2), which the daemon may write.
    At(PathBuf),
    /// Nowhere: sandboxes have no limits but those of their processes.
    None,
}

/// The users that are free.
#[derive(Debug)]
pub(super) struct Users {
    first: u32,
    taken: Mutex<BTreeSet<u32>>,
}

/// A user that is one sandbox's until this is dropped.
#[derive(Debug)]
pub(super) struct User {
    users: Arc<Users>,
    uid: u32,
}

impl Users {
    pub(super) fn new(first: u32) -> Arc<Self> {
        Arc::new(Self {
            first,
            taken: Mutex::default(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first user that nobody is. `None` if all are taken.
    pub(super) fn take(self: &Arc<Self>) -> Option<User> {
        let mut taken = self.taken();
        let uid = (0..USERS)
            .map_while(|index| self.first.checked_add(index))
            .find(|uid| !taken.contains(uid))?;
        taken.insert(uid);
        Some(User {
            users: Arc::clone(self),
            uid,
        })
    }
}

impl Users {
    /// This user, for the sandbox that has been it. `None` if it is not one for sandboxes now, or
    /// is taken.
    pub(super) fn take_over(self: &Arc<Self>, uid: u32) -> Option<User> {
        let is_for_sandboxes = uid.checked_sub(self.first).is_some_and(|it| it < USERS);
        let is_free = is_for_sandboxes && self.taken().insert(uid);
        is_free.then(|| User {
            users: Arc::clone(self),
            uid,
        })
    }
}

impl User {
    /// Its number, which is also that of its group.
    pub(super) fn id(&self) -> u32 {
        self.uid
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.users.taken().remove(&self.uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_belongs_to_one_at_a_time() {
        let users = Users::new(100);
        let (a, b) = (users.take().unwrap(), users.take().unwrap());
        assert_eq!((a.id(), b.id()), (100, 101));
        drop(a);
        let c = users.take().unwrap();
        assert_eq!(c.id(), 100);
    }

    #[test]
    fn a_user_that_was_somebodys_stays_so() {
        let users = Users::new(100);
        let found = users.take_over(100).unwrap();
        assert!(users.take_over(100).is_none());
        assert!(users.take_over(99).is_none() && users.take_over(100 + USERS).is_none());
        assert_eq!(users.take().unwrap().id(), 101);
        drop(found);
        assert_eq!(users.take().unwrap().id(), 100);
    }

    #[test]
    fn users_come_to_an_end() {
        let users = Users::new(u32::MAX - 1);
        let _both = (users.take().unwrap(), users.take().unwrap());
        assert!(users.take().is_none());
    }
}
