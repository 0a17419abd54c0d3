//! What the principal that a manager acts for may see and touch: this is the only place that decides
//! it. What it may not see is not there.

use super::Manager;
use crate::domain::id::UserId;
use crate::domain::sandbox::Sandbox;
use crate::domain::snapshot::Snapshot;
use crate::domain::template::Template;

/// A thing that belongs to somebody.
pub trait Owned {
    /// Whose it is; `None` is the local principal.
    fn owner(&self) -> Option<&UserId>;
}

impl Owned for Sandbox {
    fn owner(&self) -> Option<&UserId> {
        self.owner.as_ref()
    }
}

impl Owned for Snapshot {
    fn owner(&self) -> Option<&UserId> {
        self.owner.as_ref()
    }
}

impl Owned for Template {
    fn owner(&self) -> Option<&UserId> {
        self.owner.as_ref()
    }
}

impl Manager {
    /// Whether this may be seen and touched.
    pub(super) fn sees(&self, thing: &impl Owned) -> bool {
        self.principal.may_see(thing.owner())
    }

    /// Whether this is the principal's own.
    pub(super) fn owns(&self, thing: &impl Owned) -> bool {
        self.principal.owns(thing.owner())
    }

    /// Whether sandboxes may be made of this template. Those of the local principal are everybody's
    /// to use.
    pub(super) fn may_use(&self, template: &Template) -> bool {
        template.owner.is_none() || self.sees(template)
    }

    /// Whose things are to be listed; `None` is everybody's.
    pub(super) fn only_of(&self) -> Option<UserId> {
        match self.principal.is_admin() {
            true => None,
            false => self.principal.owner().cloned(),
        }
    }

    /// Of the things of one name, which each owner may have one of, the principal's own; else, for
    /// one who sees all, the only one.
    pub(super) fn choose<T: Owned>(&self, mut named: Vec<T>) -> Option<T> {
        if let Some(own) = named.iter().position(|thing| self.owns(thing)) {
            return Some(named.swap_remove(own));
        }
        match named.len() {
            1 => named.pop().filter(|thing| self.sees(thing)),
            _ => None,
        }
    }
}
