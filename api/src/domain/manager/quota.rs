//! Quotas are checked under the lock of the records, in which the sandbox is then written down as one
//! that starts: what was checked is still so.

use std::collections::HashMap;

use super::Manager;
use crate::domain::error::StartRefused;
use crate::domain::host::HostError;
use crate::domain::id::UserId;
use crate::domain::quota::{Quota, Usage};
use crate::domain::sandbox::{Sandbox, Spec};

impl Manager {
    fn quota_of(&self, owner: Option<&UserId>) -> &Quota {
        match owner {
            Some(_) => &self.inner.limits.quotas.user,
            None => &self.inner.limits.quotas.local,
        }
    }

    /// Checks that the principal may have one more sandbox. The caller holds the lock of the records.
    pub(super) async fn check_quota_of_new(&self, spec: &Spec) -> Result<(), StartRefused> {
        self.check_quota(self.principal.owner(), spec, true).await
    }

    /// Checks that a sandbox may start that is there. The caller holds the lock of the records.
    pub(super) async fn check_quota_of(&self, sandbox: &Sandbox) -> Result<(), StartRefused> {
        let owner = sandbox.owner.as_ref();
        self.check_quota(owner, &sandbox.spec, false).await
    }

    async fn check_quota(
        &self,
        owner: Option<&UserId>,
        spec: &Spec,
        is_new: bool,
    ) -> Result<(), StartRefused> {
        let quota = self.quota_of(owner);
        if !quota.is_limited() {
            return Ok(());
        }
        let mut sizes = HashMap::new();
        let mut used = Usage::default();
        for other in self.inner.store.list_live().await? {
            if other.owner.as_ref() == owner {
                let disk_mb = match quota.disk_mb {
                    0 => 0,
                    _ => self.disk_mb(&other.spec, &mut sizes).await?,
                };
                used.add(&other, disk_mb);
            }
        }
        let disk_mb = match is_new && quota.disk_mb > 0 {
            true => self.disk_mb(spec, &mut sizes).await?,
            false => 0,
        };
        Ok(quota.check(used, spec, disk_mb)?)
    }

    /// Size of the disk of a sandbox, as its guest sees it, in MiB.
    async fn disk_mb(
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
            None => match self.inner.host.image(&spec.template, false).await {
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
