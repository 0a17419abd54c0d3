//! The sandboxes that are connected, and what the packet filter has of each.
//!
//! Whoever changes what it has of a sandbox has that sandbox's turn meanwhile, so that the filter and
//! what is written down here agree; different sandboxes do not wait for each other.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::{OwnedMutexGuard, RwLockReadGuard, Semaphore};
use tracing::{debug, warn};

use super::dns::{Names, QUESTIONS_AT_A_TIME, Verdict};
use super::rules::{self, Counters, Member};
use super::{Inner, NetworkError};
use crate::chain;
use crate::domain::{Denied, DeniedWhat, Egress, MacAddress, SandboxId};

/// How much is remembered of what each sandbox was not allowed to do.
const DENIED_KEPT: usize = 100;

#[derive(Default)]
pub(super) struct Members {
    pub(super) by_id: HashMap<SandboxId, Connected>,
    pub(super) by_address: HashMap<Ipv4Addr, SandboxId>,
}

pub(super) struct Connected {
    pub(super) member: Member,
    /// Whether the packet filter has it.
    is_applied: bool,
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Until when the packet filter has an address in the set of a rule.
    resolved: HashMap<(usize, Ipv4Addr), Instant>,
    questions: Arc<Semaphore>,
    pub(super) denied_names: u64,
    pub(super) denied: VecDeque<Denied>,
}

impl Members {
    /// Adds one that the packet filter does not have yet.
    pub(super) fn insert(&mut self, member: Member) {
        let (id, address) = (member.id.clone(), member.address);
        let connected = Connected {
            member,
            is_applied: false,
            turn: Arc::default(),
            resolved: HashMap::new(),
            questions: Arc::new(Semaphore::new(QUESTIONS_AT_A_TIME)),
            denied_names: 0,
            denied: VecDeque::new(),
        };
        self.by_address.insert(address, id.clone());
        self.by_id.insert(id, connected);
    }

    fn remove(&mut self, id: &SandboxId) -> Option<Connected> {
        let connected = self.by_id.remove(id)?;
        self.by_address.remove(&connected.member.address);
        Some(connected)
    }

    /// One that the packet filter has.
    pub(super) fn applied(&self, id: &SandboxId) -> Option<&Connected> {
        let connected = self.by_id.get(id);
        connected.filter(|connected| connected.is_applied)
    }

    /// Those that the packet filter has.
    pub(super) fn all_applied(&self) -> impl Iterator<Item = (&SandboxId, &Connected)> {
        let all = self.by_id.iter();
        all.filter(|(_, connected)| connected.is_applied)
    }
}

impl Connected {
    /// The addresses that the packet filter has in the sets of rules, and for how many seconds from now.
    pub(super) fn resolved_at(&self, now: Instant) -> impl Iterator<Item = (usize, Ipv4Addr, u32)> {
        self.resolved
            .iter()
            .filter_map(move |((rule, address), until)| {
                let left = until.checked_duration_since(now)?.as_secs();
                let seconds = u32::try_from(left).ok().filter(|left| *left > 0)?;
                Some((*rule, *address, seconds))
            })
    }

    /// Remembers it, in place of the oldest if there are many.
    pub(super) fn note(&mut self, denied: Denied) {
        if self.denied.len() >= DENIED_KEPT {
            self.denied.pop_front();
        }
        self.denied.push_back(denied);
    }
}

/// The right to change what the packet filter has of one sandbox.
pub(super) struct Turn<'a> {
    _own: OwnedMutexGuard<()>,
    _shared: RwLockReadGuard<'a, ()>,
}

impl Inner {
    /// Waits until nobody else changes what the packet filter has of a sandbox. There is none of one that
    /// is not connected.
    pub(super) async fn turn(&self, id: &SandboxId) -> Option<Turn<'_>> {
        let shared = self.changes.read().await;
        loop {
            let turn = Arc::clone(&self.members().by_id.get(id)?.turn);
            let own = Arc::clone(&turn).lock_owned().await;
            // It may be another's by now: connected anew meanwhile.
            let members = self.members();
            if Arc::ptr_eq(&members.by_id.get(id)?.turn, &turn) {
                drop(members);
                return Some(Turn {
                    _own: own,
                    _shared: shared,
                });
            }
        }
    }

    /// Puts a sandbox into the packet filter, if it is still to be there.
    pub(super) async fn apply(
        &self,
        member: Member,
        index: u32,
        counters: Counters,
    ) -> Result<(), NetworkError> {
        let turn = self.turn(&member.id).await;
        let _turn = turn.ok_or(NetworkError::NotConnected)?;
        let is_current = |connected: &Connected| connected.member.mark == member.mark;
        if !self.members().by_id.get(&member.id).is_some_and(is_current) {
            return Err(NetworkError::NotConnected);
        }
        let (address, mac) = (member.address, MacAddress::of(member.address));
        self.links
            .bind(self.bridge.index, index, address, mac)
            .await?;
        self.nft
            .apply(self.tables.attach(&member, counters))
            .await?;
        if let Some(connected) = self.members().by_id.get_mut(&member.id) {
            connected.is_applied = true;
        }
        Ok(())
    }

    /// Takes a sandbox out of the packet filter.
    pub(super) async fn detach(&self, id: &SandboxId) -> Result<(), NetworkError> {
        let Some(_turn) = self.turn(id).await else {
            return Ok(());
        };
        let Some(connected) = self.members().remove(id) else {
            return Ok(());
        };
        if connected.is_applied {
            let script = self.tables.detach(&connected.member);
            self.nft.apply(script).await?;
        }
        Ok(())
    }

    /// Replaces the policy of a sandbox. What it has resolved stays known where the new one allows it.
    pub(super) async fn set_egress(
        &self,
        id: &SandboxId,
        egress: Egress,
    ) -> Result<(), NetworkError> {
        let turn = self.turn(id).await;
        let _turn = turn.ok_or(NetworkError::NotConnected)?;
        let (before, names) = {
            let members = self.members();
            let connected = members.applied(id).ok_or(NetworkError::NotConnected)?;
            (connected.member.clone(), connected.resolved.clone())
        };
        let after = Member {
            mark: before.mark.next(),
            egress,
            ..before.clone()
        };
        // The address of a name stays, if a rule of the new policy is about the same names.
        let mut kept: BTreeMap<usize, Vec<(Ipv4Addr, Instant)>> = BTreeMap::new();
        for ((rule, address), until) in names {
            for new in same_rules(&before.egress, rule, &after.egress) {
                kept.entry(new).or_default().push((address, until));
            }
        }
        let now = Instant::now();
        let mut script = self.tables.change(&before, &after);
        let mut resolved = HashMap::new();
        for (rule, addresses) in kept {
            let left: Vec<_> = addresses
                .iter()
                .filter_map(|(address, until)| {
                    let seconds = until.checked_duration_since(now)?.as_secs();
                    let seconds = u32::try_from(seconds).ok().filter(|left| *left > 0)?;
                    Some((*address, seconds))
                })
                .collect();
            script.push_str(&self.tables.resolved(&after, &[rule], &left));
            resolved.extend(
                addresses
                    .into_iter()
                    .map(|(address, until)| ((rule, address), until)),
            );
        }
        self.nft.apply(script).await?;
        if let Some(connected) = self.members().by_id.get_mut(id) {
            connected.member = after;
            connected.resolved = resolved;
        }
        Ok(())
    }

    /// Writes down that a name has these addresses, as far as that matters to a policy.
    async fn learn(&self, client: Ipv4Addr, name: &str, addresses: &[(Ipv4Addr, u32)]) {
        let Some(id) = self.members().by_address.get(&client).cloned() else {
            return;
        };
        let Some(_turn) = self.turn(&id).await else {
            return;
        };
        let now = Instant::now();
        let (member, rules, news) = {
            let members = self.members();
            let Some(connected) = members.applied(&id) else {
                return;
            };
            let member = connected.member.clone();
            let rules: Vec<_> = member.egress.rules_for(name).collect();
            // A name that is allowed is no way to private addresses: whoever owns it says what
            // addresses it has.
            let public = addresses
                .iter()
                .filter(|(address, _)| !rules::is_private(*address));
            let news: Vec<_> = public
                .filter(|(address, seconds)| {
                    let until = now + Duration::from_secs(u64::from(*seconds));
                    let has = |rule: &usize| connected.resolved.get(&(*rule, *address));
                    rules
                        .iter()
                        .any(|rule| has(rule).is_none_or(|has| *has < until))
                })
                .copied()
                .collect();
            (member, rules, news)
        };
        if rules.is_empty() || news.is_empty() {
            return;
        }
        let script = self.tables.resolved(&member, &rules, &news);
        if let Err(error) = self.nft.apply(script).await {
            warn!(sandbox = %id, error = %chain(&error), "addresses of a name are not let through");
            return;
        }
        if let Some(connected) = self.members().by_id.get_mut(&id) {
            connected.resolved.retain(|_, until| *until > now);
            for (address, seconds) in news {
                let until = now + Duration::from_secs(u64::from(seconds));
                let entries = rules.iter().map(|rule| ((*rule, address), until));
                connected.resolved.extend(entries);
            }
        }
    }
}

/// What sandboxes may look up, as long as there is the network.
pub(super) struct WeakNames(pub(super) Weak<Inner>);

#[async_trait]
impl Names for WeakNames {
    fn verdict(&self, client: Ipv4Addr, name: &str) -> Verdict {
        let Some(inner) = self.0.upgrade() else {
            return Verdict::Unknown;
        };
        let mut members = inner.members();
        let Members { by_id, by_address } = &mut *members;
        let Some(connected) = by_address.get(&client).and_then(|id| by_id.get_mut(id)) else {
            return Verdict::Unknown;
        };
        if connected.member.egress.allows_name(name) {
            return Verdict::Allowed;
        }
        debug!(sandbox = %connected.member.id, name, "a name was denied");
        connected.denied_names = connected.denied_names.saturating_add(1);
        connected.note(Denied {
            at: Timestamp::now(),
            what: DeniedWhat::Name {
                name: name.to_owned(),
            },
        });
        Verdict::Denied
    }

    fn turns(&self, client: Ipv4Addr) -> Option<Arc<Semaphore>> {
        let inner = self.0.upgrade()?;
        let members = inner.members();
        let connected = members.by_id.get(members.by_address.get(&client)?)?;
        Some(Arc::clone(&connected.questions))
    }

    async fn learned(&self, client: Ipv4Addr, name: &str, addresses: &[(Ipv4Addr, u32)]) {
        if let Some(inner) = self.0.upgrade() {
            inner.learn(client, name, addresses).await;
        }
    }
}

/// The rules of a new policy that are about the same names as this rule of the old one.
fn same_rules(before: &Egress, rule: usize, after: &Egress) -> Vec<usize> {
    let (Egress::Allow(before), Egress::Allow(after)) = (before, after) else {
        return Vec::new();
    };
    let Some(old) = before.get(rule) else {
        return Vec::new();
    };
    let same = after.iter().enumerate().filter(|(_, new)| new.to == old.to);
    same.map(|(index, _)| index).collect()
}
