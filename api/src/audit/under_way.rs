//! Acts that are not answered yet: what is on record of them if they never are.

use jiff::Timestamp;
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::time::Duration;

use super::{AuditError, AuditLog, Entry};

/// The outcome of an act that was not answered when the record was made: it may have been done, or be done
/// yet.
pub const UNANSWERED: &str = "unanswered";
/// After how long an act is on record that is still under way, lest a crash of the daemon takes all that is
/// known of it.
const LONG: Duration = Duration::from_secs(10);

/// An act that somebody waits for. If this is dropped before [`answered`](Self::answered), as when the
/// caller hangs up, a record says so.
pub struct UnderWay {
    audit: AuditLog,
    /// What would be on record; `None` once it was answered.
    entry: Option<Entry>,
}

impl UnderWay {
    /// An act that begins, and what it would be on record as.
    pub fn new(audit: AuditLog, entry: Entry) -> Self {
        let entry = Some(entry);
        Self { audit, entry }
    }

    /// Waits until this has taken long, and has written down that it is under way.
    ///
    /// # Errors
    /// That is not on record.
    pub async fn on_record(&self) -> Result<(), AuditError> {
        tokio::time::sleep(LONG).await;
        match self.unanswered("under way") {
            Some(entry) => self.audit.record(entry).await,
            None => Ok(()),
        }
    }

    /// It has an answer, which is on record otherwise.
    pub fn answered(mut self) {
        self.entry = None;
    }

    fn unanswered(&self, why: &str) -> Option<Entry> {
        let mut entry = self.entry.clone()?;
        entry.time = Timestamp::now();
        entry.outcome = UNANSWERED.to_owned();
        if let Value::Object(details) = &mut entry.details {
            details.insert(UNANSWERED.to_owned(), why.into());
        }
        Some(entry)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // Without a runtime nothing is left that could write, and nobody who acts.
        if let (Some(entry), Ok(_)) = (
            self.unanswered("the connection ended"),
            Handle::try_current(),
        ) {
            self.audit.write(entry);
        }
    }
}
