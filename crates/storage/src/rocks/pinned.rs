//! The self-owning snapshot: `rocksdb`'s borrows the database, ours keeps it open.
//!
//! The only `unsafe` of this crate, and nothing else lives here.
#![allow(unsafe_code)]

use std::sync::Arc;

use bytes::Bytes;
use rocksdb::{DB, ReadOptions, SnapshotWithThreadMode};

use super::Folder;
use crate::engine::{Family, Snapshot, Visit};
use crate::error::Result;

/// A pinned moment of a data folder.
pub(super) struct Pinned {
    // Before `folder`: fields drop in the order of their declaration, and the snapshot is released on the
    // database.
    snapshot: SnapshotWithThreadMode<'static, DB>,
    folder: Arc<Folder>,
}

impl Pinned {
    pub(super) fn new(folder: Arc<Folder>) -> Self {
        // SAFETY: the reference is to the inside of an `Arc`, whose heap place does not move. `self.folder`
        // keeps that place alive for longer than `self.snapshot`, the only holder of the reference (see the
        // field order). `'static` never leaves this module: `options` uses the snapshot under the lifetime of
        // `&self`.
        let db: &'static DB = unsafe { &(*Arc::as_ptr(&folder)).db };
        Pinned {
            snapshot: db.snapshot(),
            folder,
        }
    }

    /// Read options that show this moment. They must not outlive `self`; both callers use them up in one
    /// call.
    fn options(&self) -> ReadOptions {
        let mut options = ReadOptions::default();
        options.set_snapshot(&self.snapshot);
        options
    }
}

impl Snapshot for Pinned {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>> {
        self.folder.get(family, key, &self.options())
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.folder.scan(family, (from, to), self.options(), visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.folder.scan_rev(family, (from, to), self.options(), visit)
    }
}
