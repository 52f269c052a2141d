//! Bookkeeping of the state machine, one record, rewritten by every entry.

use crate::ids::Digest;
use crate::journal::Cursor;
use crate::read::Read;
use crate::tables;

/// Clock, position, hash and the journal's ends.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Meta {
    /// Time of the state: the largest that any entry brought.
    #[prost(uint64, tag = "1")]
    pub clock: u64,
    /// Log index of the last entry.
    #[prost(uint64, tag = "2")]
    pub index: u64,
    /// Term of the last entry.
    #[prost(uint64, tag = "3")]
    pub term: u64,
    /// Running SHA-256 over everything that entries wrote.
    #[prost(message, required, tag = "4")]
    pub state_hash: Digest,
    /// Rows that the journal holds.
    #[prost(uint64, tag = "5")]
    pub journal_rows: u64,
    /// The first row that it holds; zero when it holds none.
    #[prost(message, required, tag = "6")]
    pub journal_first: Cursor,
    /// The newest row; zero when there was none.
    #[prost(message, required, tag = "7")]
    pub journal_last: Cursor,
    /// Hash of the newest row.
    #[prost(message, required, tag = "8")]
    pub journal_head: Digest,
    /// The newest row that was trimmed; zero when none was.
    #[prost(message, required, tag = "10")]
    pub journal_trimmed: Cursor,
    /// Hash of that row: what the first row held chains to.
    #[prost(message, required, tag = "11")]
    pub journal_trimmed_hash: Digest,
    /// Remembered requests.
    #[prost(uint64, tag = "9")]
    pub requests_seen: u64,
    /// No remembered request has a lower age: where forgetting looks for the oldest. Without it, it would step
    /// over everything that was forgotten and is not compacted away yet.
    #[prost(uint64, tag = "12")]
    pub requests_oldest: u64,
}

/// The bookkeeping record; all zero before the first entry.
#[must_use]
pub fn meta(r: &dyn Read) -> Meta {
    tables::META.get(r, ()).unwrap_or_default()
}

/// Time of the state in milliseconds since the Unix epoch: compare expiries against this, or a later clock.
#[must_use]
pub fn clock(r: &dyn Read) -> u64 {
    meta(r).clock
}

/// Running hash of the state: equal on all replicas at equal index.
#[must_use]
pub fn state_hash(r: &dyn Read) -> Digest {
    meta(r).state_hash
}
