//! Refusals that anybody can cause, any number of times: of each kind, from each source, the first of a
//! minute is on record at once, and the others are one record at the minute's end, with their number.
//!
//! So who knocks without end makes two records a minute for each kind of call, and not the disk full. A
//! crash of the daemon loses the number of one minute, and no refusal that was the first.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use tracing::error;

use super::writer::Writer;
use super::{AuditError, Entry};
use crate::chain;

/// How long refusals are counted together.
const TOGETHER: Duration = Duration::from_secs(60);
/// How many kinds of refusals are counted at once with their callers told apart; those beyond are counted as
/// from anywhere. There are only so many actions and statuses, so this bounds the number of kinds.
const MAX_KINDS: usize = 4096;

/// What refusals have in common that are counted together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    source: Option<String>,
    user_id: String,
    action_type: String,
    status: Option<u64>,
}

/// Those that were counted since the first.
#[derive(Debug)]
struct Counted {
    number: u64,
    /// The latest of them.
    latest: Option<Entry>,
}

/// Counts refusals; clones share the counts.
#[derive(Clone, Default)]
pub struct Denials {
    kinds: Arc<Mutex<HashMap<Kind, Counted>>>,
}

impl Denials {
    fn lock(&self) -> MutexGuard<'_, HashMap<Kind, Counted>> {
        self.kinds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a refusal down, or counts it.
    pub async fn record(&self, writer: &Writer, mut entry: Entry) -> Result<(), AuditError> {
        let mut kind = Kind {
            source: entry.source_ip.clone(),
            user_id: entry.user_id.clone(),
            action_type: entry.action_type.clone(),
            status: entry.details.get("status").and_then(Value::as_u64),
        };
        {
            let mut kinds = self.lock();
            if kinds.len() >= MAX_KINDS && !kinds.contains_key(&kind) {
                kind.source = None;
                kind.user_id = "anonymous".to_owned();
                (entry.source_ip, entry.user_id) = (None, kind.user_id.clone());
            }
            if let Some(counted) = kinds.get_mut(&kind) {
                counted.number += 1;
                counted.latest = Some(entry);
                return Ok(());
            }
            let first = Counted {
                number: 0,
                latest: None,
            };
            kinds.insert(kind.clone(), first);
        }
        let (denials, last) = (self.clone(), writer.clone());
        tokio::spawn(async move {
            tokio::time::sleep(TOGETHER).await;
            let counted = denials.lock().remove(&kind);
            write(&last, counted).await;
        });
        writer.write(entry).await
    }

    /// Writes down what was counted until now.
    pub async fn flush(&self, writer: &Writer) {
        let all: Vec<_> = self.lock().drain().map(|(_, counted)| counted).collect();
        for counted in all {
            write(writer, Some(counted)).await;
        }
    }
}

/// Writes down how many there were, if there were any.
async fn write(writer: &Writer, counted: Option<Counted>) {
    let Some(Counted {
        number,
        latest: Some(mut entry),
    }) = counted
    else {
        return;
    };
    // What they were about may differ.
    entry.resource_id = None;
    entry.time = Timestamp::now();
    if let Value::Object(details) = &mut entry.details {
        details.insert("repeated".into(), number.into());
    }
    if let Err(source) = writer.write(entry).await {
        error!(error = chain(&source), number, "refusals are not on record");
    }
}
