//! Quotas are checked under the lock of the records, in which the sandbox is then written down as one
//! that starts: what was checked is still so.

use std::collections::HashMap;

use super::Manager;
use crate::domain::error::StartRefused;
use crate::domain::host::{HostError, ImageDigest};
use crate::domain::id::{KeyId, SandboxId, UserId};
use crate::domain::quota::{Quota, QuotaOf, Usage};
use crate::domain::sandbox::{Sandbox, Spec};

/// Whom a sandbox is made by: whose it is, and with which API key.
#[derive(Clone, Copy)]
struct By<'a> {
    owner: Option<&'a UserId>,
    key: Option<&'a KeyId>,
}

impl<'a> By<'a> {
    fn of(sandbox: &'a Sandbox) -> Self {
        Self {
            owner: sandbox.owner.as_ref(),
            key: sandbox.key.as_ref(),
        }
    }
}

impl Manager {
    fn quota_of(&self, owner: Option<&UserId>) -> &Quota {
        match owner {
            Some(_) => &self.inner.limits.quotas.user,
            None => &self.inner.limits.quotas.local,
        }
    }

    /// Checks that the principal may have one more sandbox. The caller holds the lock of the records.
    pub(super) async fn check_quota_of_new(&self, spec: &Spec) -> Result<(), StartRefused> {
        let by = By {
            owner: self.principal.owner(),
            key: self.principal.key(),
        };
        self.check_quota(by, spec, true, None).await
    }

    /// Checks that a sandbox may start that is there. The caller holds the lock of the records.
    pub(super) async fn check_quota_of(&self, sandbox: &Sandbox) -> Result<(), StartRefused> {
        self.check_quota(By::of(sandbox), &sandbox.spec, false, None)
            .await
    }

    /// Checks that a running sandbox may have what `spec` says instead. The caller holds the lock of the
    /// records.
    pub(super) async fn check_quota_of_resized(
        &self,
        sandbox: &Sandbox,
        spec: &Spec,
    ) -> Result<(), StartRefused> {
        self.check_quota(By::of(sandbox), spec, false, Some(&sandbox.id))
            .await
    }

    async fn check_quota(
        &self,
        by: By<'_>,
        spec: &Spec,
        is_new: bool,
        instead_of: Option<&SandboxId>,
    ) -> Result<(), StartRefused> {
        let of_key = match by.key {
            Some(key) => self.inner.store.quota_of_key(key).await?,
            None => None,
        };
        let of_key = of_key.unwrap_or_default();
        let quotas = [
            (QuotaOf::Owner, *self.quota_of(by.owner)),
            (QuotaOf::Key, of_key),
        ];
        if !quotas.iter().any(|(_, quota)| quota.is_limited()) {
            return Ok(());
        }
        let counts_disks = quotas.iter().any(|(_, quota)| quota.disk_mb > 0);
        let mut sizes = HashMap::new();
        let mut used = [Usage::default(); 2];
        for other in self.inner.store.list_live().await? {
            if other.owner.as_ref() != by.owner || Some(&other.id) == instead_of {
                continue;
            }
            let disk_mb = match counts_disks {
                true => self.disk_mb(&other.spec, &mut sizes).await?,
                false => 0,
            };
            used[0].add(&other, disk_mb);
            if other.key.as_ref() == by.key {
                used[1].add(&other, disk_mb);
            }
        }
        let disk_mb = match is_new && counts_disks {
            true => self.disk_mb(spec, &mut sizes).await?,
            false => 0,
        };
        for ((of, quota), used) in quotas.into_iter().zip(used) {
            quota.check(of, used, spec, disk_mb)?;
        }
        Ok(())
    }

    /// Size of the disk of a sandbox, as its guest sees it, in MiB.
    pub(super) async fn disk_mb(
        &self,
        spec: &Spec,
        sizes: &mut HashMap<String, u64>,
    ) -> Result<u64, StartRefused> {
        if let Some(disk_mb) = spec.disk_mb {
            return Ok(u64::from(disk_mb));
        }
        if let Some(size) = sizes.get(&spec.template) {
            return Ok(*size);
        }
        let built = self.inner.store.find_template(&spec.template).await?;
        let bytes = match built.and_then(|template| template.content) {
            Some(content) => content.disk_bytes,
            None => match self
                .inner
                .host
                .image(&spec.template, ImageDigest::Unasked)
                .await
            {
                Ok(image) => image.disk_bytes,
                // The template is not there any more.
                Err(HostError::UnknownTemplate { .. }) => 0,
                Err(source) => return Err(StartRefused::Host(source)),
            },
        };
        let size = bytes.div_ceil(1 << 20);
        sizes.insert(spec.template.clone(), size);
        Ok(size)
    }
}
