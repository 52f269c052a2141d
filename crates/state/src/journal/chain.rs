//! The hash chain over the journal, and its check: the same code online, offline, and on a copied data
//! folder.

use std::fmt;
use std::ops::ControlFlow;

use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::{Cursor, Row};
use crate::ids::Digest;
use crate::meta::meta;
use crate::read::Read;
use crate::tables;

/// SHA-256 over every field of the row but `hash`, each behind its length.
#[must_use]
pub fn row_hash(row: &Row) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(b"palyra journal row\0");
    let mut field = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    field(&row.index.to_be_bytes());
    field(&row.ordinal.to_be_bytes());
    field(&row.at_ms.to_be_bytes());
    field(row.actor.as_bytes());
    field(row.action.as_bytes());
    field(row.subject.as_bytes());
    field(&row.request_id.to_bytes());
    field(&(row.detail.len() as u64).to_be_bytes());
    for (name, value) in &row.detail {
        field(name.as_bytes());
        field(value.as_bytes());
    }
    field(&row.prev_hash.to_bytes());
    Digest::from_bytes(hasher.finalize().into())
}

/// What a whole chain amounts to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// How many rows.
    pub rows: u64,
    /// The first; zero when there is none.
    pub first: Cursor,
    /// The last; zero when there is none.
    pub last: Cursor,
    /// Hash of the last row; what the chain began from when there is none.
    pub head: Digest,
}

/// Where a chain breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// The row.
    pub cursor: Cursor,
    /// What is wrong with it.
    pub problem: &'static str,
    /// What the hash would have to be.
    pub expected: Digest,
    /// What it is.
    pub found: Digest,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the journal is broken at {}.{}: {} (expected {}, found {})",
            self.cursor.index, self.cursor.ordinal, self.problem, self.expected, self.found
        )
    }
}

impl std::error::Error for Broken {}

/// Checks rows in order, from one whose predecessor's hash is `start`.
///
/// # Errors
/// [`Broken`] at the first row that does not fit.
pub fn verify(rows: impl IntoIterator<Item = Row>, start: Digest) -> Result<Summary, Broken> {
    let mut summary = Summary {
        head: start,
        ..Summary::default()
    };
    for row in rows {
        check_row(&mut summary, &row)?;
    }
    Ok(summary)
}

fn check_row(summary: &mut Summary, row: &Row) -> Result<(), Broken> {
    let cursor = row.cursor();
    let broken = |problem, expected, found| {
        Err(Broken {
            cursor,
            problem,
            expected,
            found,
        })
    };
    let hash = row_hash(row);
    if row.prev_hash != summary.head {
        return broken(
            "it does not follow the row before it",
            summary.head,
            row.prev_hash,
        );
    }
    if row.hash != hash {
        return broken("its contents do not match its hash", hash, row.hash);
    }
    if summary.rows > 0 && cursor <= summary.last {
        return broken("its cursor does not rise", hash, row.hash);
    }
    if summary.rows == 0 {
        summary.first = cursor;
    }
    summary.rows += 1;
    summary.last = cursor;
    summary.head = hash;
    Ok(())
}

/// A row as it lies in the table: one that cannot be read is a finding here, and no reason to stop.
fn read_row(key: &[u8], value: &[u8]) -> Result<Row, Broken> {
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
    let (index, ordinal) = key.split_at(key.len().min(8));
    let cursor = Cursor {
        index: number(index),
        ordinal: number(ordinal) as u32,
    };
    let broken = |problem| Broken {
        cursor,
        problem,
        expected: Digest::ZERO,
        found: Digest::of(value),
    };
    let row = Row::decode(value).map_err(|_| broken("it cannot be read"))?;
    if tables::JOURNAL.key((row.index, row.ordinal))[1..] != *key {
        return Err(broken("it is not where it says"));
    }
    Ok(row)
}

/// Checks everything that a state holds, including that nothing is missing at either end.
///
/// # Errors
/// [`Broken`] at the first row that does not fit.
pub fn verify_all(r: &dyn Read) -> Result<Summary, Broken> {
    let meta = meta(r);
    let mut summary = Summary {
        head: meta.journal_trimmed_hash,
        ..Summary::default()
    };
    let mut broken = None;
    // Not from the trimmed cursor: rows hidden before it must be found too.
    tables::JOURNAL.visit(r, (), None, &mut |key, value| match read_row(key, value)
        .and_then(|row| check_row(&mut summary, &row))
    {
        Ok(()) => ControlFlow::Continue(()),
        Err(found) => {
            broken = Some(found);
            ControlFlow::Break(())
        }
    });
    if let Some(broken) = broken {
        return Err(broken);
    }
    let end = |problem| Broken {
        cursor: summary.last,
        problem,
        expected: meta.journal_head,
        found: summary.head,
    };
    if summary.head != meta.journal_head {
        return Err(end("the newest rows are missing"));
    }
    if summary.rows != meta.journal_rows {
        return Err(end("the number of rows is not what the state says"));
    }
    Ok(summary)
}
