//! A batch: operations that happen together or not at all.
//!
//! Never here: an engine's own form of a batch. Both engines walk [`Batch::ops`], so they cannot differ in
//! what a batch says.

use bytes::Bytes;

use crate::engine::Family;
use crate::error::{EngineError, Result};

/// The largest batch that an engine takes, keys and values. Far above what any caller needs (snapshots are
/// installed in batches of 4 MiB) and far below what would make a memtable or one log record a problem.
pub const MAX_BATCH_BYTES: usize = 64 * 1024 * 1024;

/// One operation of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Sets a key.
    Put {
        /// Where.
        family: Family,
        /// The key.
        key: Bytes,
        /// Its new value.
        value: Bytes,
    },
    /// Removes a key, if it is there.
    Delete {
        /// Where.
        family: Family,
        /// The key.
        key: Bytes,
    },
    /// Removes all keys `from <= key < to`.
    DeleteRange {
        /// Where.
        family: Family,
        /// The first key.
        from: Bytes,
        /// The first key that stays; above `from`.
        to: Bytes,
    },
}

/// Operations in the order in which they apply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    ops: Vec<Op>,
    bytes: usize,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Batch::default()
    }

    /// Sets `key` to `value`.
    pub fn put(&mut self, family: Family, key: impl Into<Bytes>, value: impl Into<Bytes>) -> &mut Self {
        let (key, value) = (key.into(), value.into());
        self.bytes += key.len() + value.len();
        self.ops.push(Op::Put { family, key, value });
        self
    }

    /// Removes `key`.
    pub fn delete(&mut self, family: Family, key: impl Into<Bytes>) -> &mut Self {
        let key = key.into();
        self.bytes += key.len();
        self.ops.push(Op::Delete { family, key });
        self
    }

    /// Removes `from <= key < to`; an empty or reversed range removes nothing.
    pub fn delete_range(
        &mut self,
        family: Family,
        from: impl Into<Bytes>,
        to: impl Into<Bytes>,
    ) -> &mut Self {
        let (from, to) = (from.into(), to.into());
        if from < to {
            self.bytes += from.len() + to.len();
            self.ops.push(Op::DeleteRange { family, from, to });
        }
        self
    }

    /// Adds the operations of `later` after those of this batch: group commit.
    pub fn append(&mut self, later: Batch) {
        self.bytes += later.bytes;
        self.ops.extend(later.ops);
    }

    /// The operations, first to last.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// The number of operations.
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn check_size(&self) -> Result<()> {
        match self.bytes > MAX_BATCH_BYTES {
            true => Err(EngineError::TooLarge {
                bytes: self.bytes,
                limit: MAX_BATCH_BYTES,
            }),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_counts_its_bytes_and_drops_empty_ranges() {
        let mut batch = Batch::new();
        batch
            .put(Family::Log, &b"k"[..], &b"value"[..])
            .delete(Family::Meta, &b"gone"[..]);
        batch
            .delete_range(Family::State, &b"b"[..], &b"a"[..])
            .delete_range(Family::State, &b"a"[..], &b"a"[..]);
        assert_eq!((batch.len(), batch.bytes()), (2, 10));
        let mut first = Batch::new();
        first.delete_range(Family::State, &b"a"[..], &b"b"[..]);
        first.append(batch);
        assert_eq!((first.len(), first.bytes()), (3, 12));
        assert!(matches!(first.ops()[0], Op::DeleteRange { .. }));
    }
}
