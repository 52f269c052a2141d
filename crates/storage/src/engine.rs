//! The contract between a replica and its disk.
//!
//! Never here: an implementation. Everything is synchronous: whoever calls decides which thread waits for the
//! disk.

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;

use crate::batch::Batch;
use crate::error::Result;

/// The key spaces of an engine. They share one write-ahead log, so one batch may span them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// The replicated log: appended at one end, purged at the other.
    Log,
    /// A few small records about the log and the state: the vote, the committed index, who we are.
    Meta,
    /// The applied state: random reads, random writes.
    State,
}

impl Family {
    /// Every family.
    pub const ALL: [Family; 3] = [Family::Log, Family::Meta, Family::State];

    /// The name on disk. Never changes.
    pub fn name(self) -> &'static str {
        match self {
            Family::Log => "log",
            Family::Meta => "meta",
            Family::State => "state",
        }
    }
}

/// What a scan calls with each key and value; `Break` ends the scan. It may use the engine.
pub type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>;

/// A view that does not change while others write, over all families at one moment.
///
/// It keeps what it shows on disk, and the folder open, for as long as it lives: let go of it.
pub trait Snapshot: Send + Sync {
    /// The value under `key`, if there is one.
    ///
    /// # Errors
    /// `Io` and `Corrupt` from the disk, `Poisoned` after an earlier failure. So do all methods here.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>>;

    /// Visits the keys `from <= key < to` in ascending byte order until `visit` breaks. An empty or reversed
    /// range visits nothing; there is no bound that means "to the end" (see [`prefix_end`]).
    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()>;

    /// The same keys in descending order: starts below `to`, ends at `from`.
    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()>;
}

/// One data folder, opened by one process. It reads as a snapshot of this moment: each `get` sees all that
/// was written before it, each scan all that was written before the scan began.
pub trait Engine: Snapshot {
    /// Applies `batch` atomically, after all earlier batches. Visible to readers on return, **not durable**:
    /// a power loss takes it back, together with every later batch. Its operations apply in order, so a later
    /// one wins.
    ///
    /// # Errors
    /// `TooLarge` changes nothing. `Io`, `Full` and `Corrupt` poison the engine.
    fn write(&self, batch: Batch) -> Result<()>;

    /// Returns once everything written before the call is durable.
    ///
    /// # Errors
    /// `Io` and `Full` poison the engine: the caller must end the process, and must never call this again
    /// instead.
    fn sync(&self) -> Result<()>;

    /// Pins the present. Cheap; does not copy.
    ///
    /// # Errors
    /// `Poisoned` after an earlier failure.
    fn snapshot(&self) -> Result<Arc<dyn Snapshot>>;

    /// Gives back disk space of `from..to` at once instead of some day. A hint that may do nothing.
    ///
    /// The caller has deleted that range by a batch that has been **synced**: the space is freed ahead of the
    /// write-ahead log, so a deletion that a power loss takes back would leave a hole. No snapshot may need
    /// the range any more.
    ///
    /// # Errors
    /// `Io`, `Full` and `Corrupt` poison the engine.
    fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) -> Result<()> {
        let _ = (family, from, to);
        Ok(())
    }
}

/// The smallest key above every key that starts with `prefix`: `scan(prefix, prefix_end(prefix))` visits
/// exactly the keys with that prefix. `None` when there is no such key (the prefix is empty or all `0xff`).
pub fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let last = prefix.iter().rposition(|byte| *byte != 0xff)?;
    let mut end = prefix[..=last].to_vec();
    end[last] += 1;
    Some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_ends_where_the_next_one_begins() {
        assert_eq!(prefix_end(b"ab"), Some(b"ac".to_vec()));
        assert_eq!(prefix_end(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(prefix_end(b"\xff"), None);
        assert_eq!(prefix_end(b""), None);
    }
}
