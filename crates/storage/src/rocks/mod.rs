//! [`RocksEngine`]: the production engine. One RocksDB, one write-ahead log, one column family per
//! [`Family`].
//!
//! Never here: tuning (`options`), the folder's format and lock (`format`), the check of the log before it is
//! replayed (`wal`). `docs/decisions/rocksdb.md` says why it is one database and why its log is replayed the
//! way it is.
//!
//! Invariants: every `write` has reached the operating system on return (`manual_wal_flush` is off), so only
//! a machine can lose it, not a process; what `open` shows is durable, because RocksDB flushes what it
//! replays to synced table files; nothing is called on the database after a write or a sync failed.

mod format;
mod options;
mod pinned;
mod wal;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{ColumnFamily, DB, DBRawIterator, ErrorKind, ReadOptions, WriteBatch, WriteOptions};

use crate::batch::{Batch, Op};
use crate::engine::{Engine, Family, Snapshot, Visit};
use crate::error::{EngineError, Result};
use pinned::Pinned;

pub use format::FORMAT_VERSION;
pub use options::Options;

/// A data folder in RocksDB. The folder stays locked until the engine and all its snapshots are dropped.
#[derive(Debug)]
pub struct RocksEngine {
    folder: Arc<Folder>,
}

/// The open database and what errors about it need to say.
struct Folder {
    db: DB,
    path: PathBuf,
    /// The first failed write or sync.
    poisoned: OnceLock<String>,
    /// After `db`, so that it is let go of last.
    _lock: format::Lock,
}

impl fmt::Debug for Folder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Folder")
            .field("path", &self.path)
            .field("poisoned", &self.poisoned)
            .finish_non_exhaustive()
    }
}

impl RocksEngine {
    /// Opens `dir`, which is created when it does not exist, and replays its log. What this shows is durable.
    ///
    /// # Errors
    /// `Locked` by another process or another engine of this one; `Future` when a later release wrote the
    /// folder; `Corrupt` when its content contradicts itself, which includes a damaged record in the middle
    /// of the log; `Io` and `Full` from the operating system.
    pub fn open(dir: &Path, options: Options) -> Result<RocksEngine> {
        let lock = format::prepare(dir)?;
        wal::check(dir, || oldest_needed_log(dir, &options))?;
        let db = DB::open_cf_descriptors(&options.database(), dir, options.families())
            .map_err(|error| classify(dir, "opening the database", &error))?;
        let sequence = db.latest_sequence_number();
        tracing::debug!(folder = %dir.display(), sequence, "data folder opened");
        Ok(RocksEngine {
            folder: Arc::new(Folder {
                db,
                path: dir.to_owned(),
                poisoned: OnceLock::new(),
                _lock: lock,
            }),
        })
    }

    /// The data folder.
    pub fn path(&self) -> &Path {
        &self.folder.path
    }

    /// Writes a copy of the present, unsynced batches included, to `dir`, which must not exist. The copy
    /// shares its table files with the original by hard links while both are on one file system, and opens
    /// like any data folder.
    ///
    /// # Errors
    /// `Io` and `Full` from the operating system; this engine goes on.
    pub fn checkpoint(&self, dir: &Path) -> Result<()> {
        self.folder.usable()?;
        let during = "writing a checkpoint";
        if dir.exists() {
            let cause = "it exists already; name a folder that does not".to_owned();
            return Err(EngineError::Io {
                folder: dir.to_owned(),
                during,
                cause,
            });
        }
        Checkpoint::new(&self.folder.db)
            .and_then(|checkpoint| checkpoint.create_checkpoint(dir))
            .map_err(|error| classify(dir, during, &error))?;
        // Last: a copy that is not whole does not open.
        format::mark(dir)
    }

    fn run(&self, during: &'static str, body: impl FnOnce(&DB) -> Result<(), rocksdb::Error>) -> Result<()> {
        self.folder.usable()?;
        body(&self.folder.db).map_err(|error| {
            let error = classify(&self.folder.path, during, &error);
            tracing::error!(%error, "the data folder is closed for this process");
            // Whoever came first has the better message.
            let _ = self.folder.poisoned.set(error.to_string());
            error
        })
    }
}

impl Engine for RocksEngine {
    fn write(&self, batch: Batch) -> Result<()> {
        batch.check_size()?;
        self.folder.usable()?;
        if batch.is_empty() {
            return Ok(());
        }
        let mut native = WriteBatch::with_capacity_bytes(batch.bytes() + 16 * batch.len());
        for op in batch.ops() {
            match op {
                Op::Put { family, key, value } => native.put_cf(self.folder.handle(*family)?, key, value),
                Op::Delete { family, key } => native.delete_cf(self.folder.handle(*family)?, key),
                Op::DeleteRange { family, from, to } => {
                    native.delete_range_cf(self.folder.handle(*family)?, from, to);
                }
            }
        }
        let mut unsynced = WriteOptions::default();
        unsynced.set_sync(false);
        self.run("write", |db| db.write_opt(native, &unsynced))
    }

    fn sync(&self) -> Result<()> {
        // Not an empty batch with `sync = true`: this runs outside of the write queue, so the unsynced writes
        // of the applied state do not line up behind the log's fsync.
        self.run("sync", |db| db.flush_wal(true))
    }

    fn snapshot(&self) -> Result<Arc<dyn Snapshot>> {
        self.folder.usable()?;
        Ok(Arc::new(Pinned::new(self.folder.clone())))
    }

    fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let handle = self.folder.handle(family)?;
        // RocksDB's end is inclusive, and `to` is a key that the caller keeps: it could be the last one of a
        // file.
        let Some(last) = just_below(to) else { return Ok(()) };
        if last.as_slice() < from {
            return Ok(());
        }
        self.run("freeing a range", |db| {
            db.delete_file_in_range_cf(handle, from, last.as_slice())
        })
    }
}

/// A key below `to`, close to it; `None` for the few without one. Keys between the two keep their files, no
/// more.
fn just_below(to: &[u8]) -> Option<Vec<u8>> {
    let mut key = to.to_vec();
    let last = key.iter().rposition(|byte| *byte != 0)?;
    key[last] -= 1;
    key[last + 1..].fill(0xff);
    Some(key)
}

impl Snapshot for RocksEngine {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>> {
        self.folder.get(family, key, &ReadOptions::default())
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.folder
            .scan(family, (from, to), ReadOptions::default(), visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.folder
            .scan_rev(family, (from, to), ReadOptions::default(), visit)
    }
}

impl Folder {
    fn usable(&self) -> Result<()> {
        match self.poisoned.get() {
            Some(cause) => Err(EngineError::Poisoned {
                folder: self.path.clone(),
                cause: cause.clone(),
            }),
            None => Ok(()),
        }
    }

    fn handle(&self, family: Family) -> Result<&ColumnFamily> {
        self.db
            .cf_handle(family.name())
            .ok_or_else(|| EngineError::Corrupt {
                folder: self.path.clone(),
                cause: format!("the column family `{}` is not there", family.name()),
            })
    }

    fn get(&self, family: Family, key: &[u8], options: &ReadOptions) -> Result<Option<Bytes>> {
        self.usable()?;
        let found = self.db.get_cf_opt(self.handle(family)?, key, options);
        Ok(found
            .map_err(|error| classify(&self.path, "read", &error))?
            .map(Bytes::from))
    }

    fn scan(
        &self,
        family: Family,
        (from, to): (&[u8], &[u8]),
        options: ReadOptions,
        visit: Visit<'_>,
    ) -> Result<()> {
        let Some(mut iterator) = self.iterator(family, (from, to), options)? else {
            return Ok(());
        };
        iterator.seek(from);
        while let Some((key, value)) = iterator.item() {
            if visit(key, value).is_break() {
                return Ok(());
            }
            iterator.next();
        }
        iterator
            .status()
            .map_err(|error| classify(&self.path, "read", &error))
    }

    fn scan_rev(
        &self,
        family: Family,
        (from, to): (&[u8], &[u8]),
        options: ReadOptions,
        visit: Visit<'_>,
    ) -> Result<()> {
        let Some(mut iterator) = self.iterator(family, (from, to), options)? else {
            return Ok(());
        };
        // Goes to the last key below the upper bound.
        iterator.seek_to_last();
        while let Some((key, value)) = iterator.item() {
            if visit(key, value).is_break() {
                return Ok(());
            }
            iterator.prev();
        }
        iterator
            .status()
            .map_err(|error| classify(&self.path, "read", &error))
    }

    /// Both bounds are always set: without them a scan over a purged range walks every deleted key beyond it.
    fn iterator(
        &self,
        family: Family,
        (from, to): (&[u8], &[u8]),
        mut options: ReadOptions,
    ) -> Result<Option<DBRawIterator<'_>>> {
        self.usable()?;
        if from >= to {
            return Ok(None);
        }
        options.set_iterate_lower_bound(from);
        options.set_iterate_upper_bound(to);
        Ok(Some(self.db.raw_iterator_cf_opt(self.handle(family)?, options)))
    }
}

/// The number of the first log file that a start replays, as the manifest has it. Opens the database for
/// reading only, which changes nothing on disk and replays into memory: slow, and rarely asked.
fn oldest_needed_log(dir: &Path, options: &Options) -> Result<u64> {
    let during = "reading the manifest";
    DB::open_cf_descriptors_read_only(&options.database(), dir, options.families(), false)
        .and_then(|db| db.property_int_value(rocksdb::properties::MIN_LOG_NUMBER_TO_KEEP))
        .map(|number| number.unwrap_or(0))
        .map_err(|error| classify(dir, during, &error))
}

/// RocksDB's errors are text; only their kind and a few well-known phrases can be told apart.
fn classify(folder: &Path, during: &'static str, error: &rocksdb::Error) -> EngineError {
    classify_text(folder, during, error.kind(), error.to_string())
}

fn classify_text(folder: &Path, during: &'static str, kind: ErrorKind, cause: String) -> EngineError {
    let folder = folder.to_owned();
    if cause.contains("No space left on device") || cause.contains("Disk quota exceeded") {
        return EngineError::Full { folder, during };
    }
    match kind {
        ErrorKind::IOError if cause.contains("lock") && cause.contains("LOCK") => {
            EngineError::Locked { folder }
        }
        ErrorKind::Corruption | ErrorKind::InvalidArgument | ErrorKind::NotSupported => {
            EngineError::Corrupt { folder, cause }
        }
        _ => EngineError::Io {
            folder,
            during,
            cause,
        },
    }
}

#[cfg(test)]
mod tests;
