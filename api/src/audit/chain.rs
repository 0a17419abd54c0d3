//! The chain of records.

use rusqlite::Connection;
use sha2::{Digest, Sha256};

use super::head::Told;
use super::{COLUMNS, Entry, read_row};
use crate::hex;

/// The hash before the first record.
pub const START: [u8; 32] = [0; 32];

/// An intact log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Intact {
    /// How many records it has.
    pub records: u64,
    /// Hash of the last one, as hexadecimal digits.
    pub last: String,
}

/// The action of a record that the daemon makes when it finds at its start that the log was cut off.
pub const CUT_OFF: &str = "audit_log_cut_off";

/// A log was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A record is not as it was written.
    #[error("record {seq} is not what was written there, or the one before it is missing")]
    Record {
        /// The first such.
        seq: u64,
    },
    /// Records are missing at the end.
    #[error("the log ends with record {records}, and went as far as record {last}")]
    CutOff {
        /// How many there are.
        records: u64,
        /// How many there were, at the least.
        last: u64,
    },
    /// Records were missing at the end when the daemon was started.
    #[error(
        "records behind number {records} were missing when the daemon was started the next time"
    )]
    WasCutOff {
        /// How many there were then.
        records: u64,
    },
    /// What says how far it went is missing or was changed.
    #[error("audit.head, which says how far the log went, is missing or was changed")]
    Head,
}

/// The hash of a record: of the hash before it, and of each of its fields with its length.
pub fn hash(before: &[u8; 32], seq: u64, entry: &Entry) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(before);
    digest.update(seq.to_be_bytes());
    digest.update(entry.time.as_microsecond().to_be_bytes());
    let details = entry.details.to_string();
    let frameworks = entry.frameworks.join(",");
    for field in [
        Some(&entry.action_type),
        Some(&entry.resource_type),
        entry.resource_id.as_ref(),
        Some(&entry.user_id),
        entry.source_ip.as_ref(),
        Some(&entry.outcome),
        Some(&details),
        Some(&frameworks),
    ] {
        match field {
            Some(text) => {
                digest.update([1]);
                digest.update((text.len() as u64).to_be_bytes());
                digest.update(text.as_bytes());
            }
            None => digest.update([0]),
        }
    }
    digest.finalize().into()
}

/// Checks every record from the first, and that the log goes as far as it went.
pub fn verify(connection: &Connection, told: Told) -> rusqlite::Result<Result<Intact, Broken>> {
    let Told::Head(told) = told else {
        return Ok(Err(Broken::Head));
    };
    let mut statement =
        connection.prepare(&format!("SELECT {COLUMNS} FROM records ORDER BY seq"))?;
    let mut rows = statement.query([])?;
    let (mut before, mut records) = (START, 0);
    while let Some(row) = rows.next()? {
        records += 1;
        let seq = row.get::<_, i64>(0)?.cast_unsigned();
        // A record that cannot even be read is not as it was written.
        let Ok((seq, entry, found)) = read_row(row) else {
            return Ok(Err(Broken::Record { seq }));
        };
        let expected = hash(&before, records, &entry);
        if seq != records || found != expected {
            return Ok(Err(Broken::Record { seq: records }));
        }
        if entry.action_type == CUT_OFF {
            let records = records.saturating_sub(1);
            return Ok(Err(Broken::WasCutOff { records }));
        }
        if seq == told.seq && found != told.hash {
            return Ok(Err(Broken::Record { seq }));
        }
        before = expected;
    }
    if records < told.seq {
        let last = told.seq;
        return Ok(Err(Broken::CutOff { records, last }));
    }
    Ok(Ok(Intact {
        records,
        last: hex(&before),
    }))
}
