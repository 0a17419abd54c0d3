//! What sandboxes have had since some time.

use jiff::Timestamp;

use super::super::error::LookupError;
use super::super::runs::Runs;
use super::Manager;

impl Manager {
    /// Those of the principal's sandboxes, deleted ones included, that ran at `since` or later; with the
    /// time before that in which they ran without a break.
    ///
    /// # Errors
    /// The store failed.
    pub async fn runs(&self, since: Timestamp) -> Result<Runs, LookupError> {
        let owner = self.only_of();
        let runs = self.inner.store.runs(owner.as_ref(), since).await?;
        Ok(runs.into())
    }
}
