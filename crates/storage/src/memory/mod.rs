//! [`MemEngine`], the twin of the production engine that keeps its data in memory, and [`Disk`], the disk
//! that outlives it and on which a test pulls the plug.
//!
//! Never here: threads, clocks or chance. What survives a power loss is decided by the caller, from its own
//! seed.
//!
//! What is modelled: the page cache (a killed process loses nothing), a power loss (the synced batches and a
//! prefix of the others survive), failing writes and syncs, a full disk, a damaged block, and a disk that
//! lies about sync. Opening makes durable what it found, as RocksDB does by flushing what it replays. Not
//! modelled: time; a caller that wants a slow disk awaits a `palyra_platform::io_point` around its calls.

mod versions;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::batch::{Batch, Op};
use crate::engine::{Engine, Family, Snapshot, Visit};
use crate::error::{EngineError, Result};
use versions::{Direction, Versions};

/// Entries that a scan takes at first in one turn of the lock: most callers want one or two.
const PAGE_MIN: usize = 4;
/// Entries that it takes at most.
const PAGE_MAX: usize = 256;

/// A fault that hits the next operation of its kind, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The next write fails with an I/O error; its batch is lost.
    WriteFails,
    /// The next write finds the disk full; its batch is lost.
    WriteFindsNoSpace,
    /// The next sync fails with an I/O error; nothing became durable by it.
    SyncFails,
    /// The next sync finds the disk full; nothing became durable by it.
    SyncFindsNoSpace,
    /// The next `get`, or the next step of a scan, fails with an I/O error.
    ReadFails,
    /// The next `get`, or the next step of a scan, meets a damaged block.
    ReadFindsCorruption,
}

/// A disk in memory: what a machine keeps when the process on it ends. Share it by its `Arc`.
#[derive(Debug)]
pub struct Disk {
    name: PathBuf,
    inside: Mutex<Inside>,
}

#[derive(Debug, Default)]
struct Inside {
    /// What survives a power loss, by family.
    durable: [BTreeMap<Bytes, Bytes>; 3],
    /// What the page cache holds beyond that, oldest first.
    unsynced: VecDeque<Batch>,
    faults: Vec<Fault>,
    sync_lies: bool,
    /// No write and no sync finds space.
    full: bool,
    /// Every read meets a damaged block, for ever.
    ruined: bool,
    /// Counts the processes that had the disk open; handles of an earlier one are dead.
    process: u64,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    versions: Versions,
    poisoned: Option<String>,
}

impl Disk {
    /// An empty disk. `name` appears in errors where a folder would.
    pub fn new(name: impl Into<PathBuf>) -> Arc<Disk> {
        Arc::new(Disk {
            name: name.into(),
            inside: Mutex::default(),
        })
    }

    /// Ends the process that has the disk open: its engine and snapshots answer `Poisoned` from here on.
    /// Everything written is still there for the next one.
    pub fn kill(&self) {
        self.lock().open = None;
    }

    /// Ends the process and cuts the power: of the batches that were not synced, the first `keep` survive.
    pub fn power_loss(&self, keep: usize) {
        let mut inside = self.lock();
        inside.open = None;
        inside.unsynced.truncate(keep);
        inside.settle(usize::MAX);
    }

    /// The number of batches that a power loss could take back now.
    pub fn unsynced(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Arms a fault. Several may be armed; those of one kind hit one operation each.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// While set, syncs answer `Ok` and make nothing durable. The first honest sync after it makes up for
    /// all.
    pub fn lie_about_sync(&self, lies: bool) {
        self.lock().sync_lies = lies;
    }

    /// While set, every write and every sync finds the disk full.
    pub fn fill(&self, full: bool) {
        self.lock().full = full;
    }

    /// Damages every block for good: each read from now on says so.
    pub fn ruin(&self) {
        self.lock().ruined = true;
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        // No code of ours panics with the lock held; a visitor runs outside of it.
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self, during: &'static str) -> EngineError {
        EngineError::Io {
            folder: self.name.clone(),
            during,
            cause: "injected input/output error".to_owned(),
        }
    }

    fn full(&self, during: &'static str) -> EngineError {
        EngineError::Full {
            folder: self.name.clone(),
            during,
        }
    }

    fn poisoned(&self, cause: &str) -> EngineError {
        EngineError::Poisoned {
            folder: self.name.clone(),
            cause: cause.to_owned(),
        }
    }
}

impl Inside {
    /// Makes the oldest `count` unsynced batches durable.
    fn settle(&mut self, count: usize) {
        let count = count.min(self.unsynced.len());
        for batch in self.unsynced.drain(..count) {
            for op in batch.ops() {
                settle_op(&mut self.durable, op);
            }
        }
    }

    fn take_fault(&mut self, wanted: Fault) -> bool {
        let armed = self.faults.iter().position(|fault| *fault == wanted);
        armed.map(|at| self.faults.remove(at)).is_some()
    }
}

fn settle_op(durable: &mut [BTreeMap<Bytes, Bytes>; 3], op: &Op) {
    match op {
        Op::Put { family, key, value } => {
            durable[*family as usize].insert(key.clone(), value.clone());
        }
        Op::Delete { family, key } => {
            durable[*family as usize].remove(key);
        }
        Op::DeleteRange { family, from, to } => {
            let map = &mut durable[*family as usize];
            // Not by parts: joining two maps visits everything that either of them holds.
            let keys: Vec<Bytes> = map
                .range(from.clone()..to.clone())
                .map(|(key, _)| key.clone())
                .collect();
            for key in keys {
                map.remove(&key);
            }
        }
    }
}

/// An engine over a [`Disk`]. Dropping it is a clean shutdown, which loses nothing either.
#[derive(Debug)]
pub struct MemEngine {
    disk: Arc<Disk>,
    process: u64,
}

impl MemEngine {
    /// Opens `disk` as a new process would.
    ///
    /// # Errors
    /// `Locked` while another engine has the disk open and was neither dropped nor killed.
    pub fn open(disk: &Arc<Disk>) -> Result<MemEngine> {
        let mut inside = disk.lock();
        if inside.open.is_some() {
            return Err(EngineError::Locked {
                folder: disk.name.clone(),
            });
        }
        if !inside.sync_lies {
            inside.settle(usize::MAX);
        }
        let mut present = inside.durable.clone();
        for batch in &inside.unsynced {
            for op in batch.ops() {
                settle_op(&mut present, op);
            }
        }
        inside.process += 1;
        inside.open = Some(Open {
            versions: Versions::new(present),
            poisoned: None,
        });
        Ok(MemEngine {
            disk: disk.clone(),
            process: inside.process,
        })
    }

    /// The disk under this engine.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    fn pin(&self) -> Result<Pinned> {
        let at = self.disk.with(self.process, |_, open| Ok(open.versions.pin()))?;
        Ok(Pinned {
            disk: self.disk.clone(),
            process: self.process,
            at,
        })
    }
}

impl Disk {
    /// Runs `body` on the open state of `process`, unless that process is dead or poisoned.
    fn with<T>(&self, process: u64, body: impl FnOnce(&mut Inside, &mut Open) -> Result<T>) -> Result<T> {
        let mut inside = self.lock();
        let open = match inside.process == process {
            true => inside.open.take(),
            false => None,
        };
        let Some(mut open) = open else {
            return Err(self.poisoned("the process was killed"));
        };
        let result = match &open.poisoned {
            Some(cause) => Err(self.poisoned(cause)),
            None => body(&mut inside, &mut open),
        };
        inside.open = Some(open);
        result
    }

    /// The same for reads, which an armed fault may hit.
    fn read<T>(&self, process: u64, read: impl FnOnce(&Versions) -> T) -> Result<T> {
        self.with(process, |inside, open| {
            if inside.ruined || (!believes_the_disk() && inside.take_fault(Fault::ReadFindsCorruption)) {
                return Err(EngineError::Corrupt {
                    folder: self.name.clone(),
                    cause: "injected block checksum mismatch".to_owned(),
                });
            }
            if inside.take_fault(Fault::ReadFails) {
                return Err(self.io("read"));
            }
            Ok(read(&open.versions))
        })
    }

    /// Planted: a damaged block is handed out as it is.
    fn damaged(&self, value: Bytes) -> Bytes {
        if !believes_the_disk() || !self.lock().take_fault(Fault::ReadFindsCorruption) {
            return value;
        }
        let mut damaged = value.to_vec();
        if let Some(last) = damaged.last_mut() {
            *last ^= 1;
        }
        damaged.into()
    }

    /// The same for writes and syncs, whose failure poisons.
    fn with_poison<T>(
        &self,
        process: u64,
        body: impl FnOnce(&mut Inside, &mut Open) -> Result<T>,
    ) -> Result<T> {
        self.with(process, |inside, open| {
            let result = body(inside, open);
            if let Err(error) = &result {
                open.poisoned = Some(error.to_string());
            }
            result
        })
    }
}

impl Drop for MemEngine {
    fn drop(&mut self) {
        let mut inside = self.disk.lock();
        if inside.process == self.process {
            inside.open = None;
        }
    }
}

impl Engine for MemEngine {
    fn write(&self, batch: Batch) -> Result<()> {
        batch.check_size()?;
        if batch.is_empty() {
            return self.disk.with(self.process, |_, _| Ok(()));
        }
        self.disk.with_poison(self.process, |inside, open| {
            if inside.take_fault(Fault::WriteFails) {
                return Err(self.disk.io("write"));
            }
            if inside.full || inside.take_fault(Fault::WriteFindsNoSpace) {
                return Err(self.disk.full("write"));
            }
            open.versions.apply(&batch);
            inside.unsynced.push_back(batch);
            Ok(())
        })
    }

    fn sync(&self) -> Result<()> {
        self.disk.with_poison(self.process, |inside, _| {
            if inside.take_fault(Fault::SyncFails) {
                return Err(self.disk.io("sync"));
            }
            if inside.full || inside.take_fault(Fault::SyncFindsNoSpace) {
                return Err(self.disk.full("sync"));
            }
            if !inside.sync_lies {
                inside.settle(usize::MAX);
            }
            Ok(())
        })
    }

    fn snapshot(&self) -> Result<Arc<dyn Snapshot>> {
        Ok(Arc::new(self.pin()?))
    }
}

impl Snapshot for MemEngine {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>> {
        let found = self
            .disk
            .read(self.process, |versions| versions.get(family, key, u64::MAX))?;
        Ok(found.map(|value| self.disk.damaged(value)))
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.pin()?.scan(family, from, to, visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.pin()?.scan_rev(family, from, to, visit)
    }
}

/// Planted: nobody compares checksums.
fn believes_the_disk() -> bool {
    palyra_fault::planted("checksums-unread")
}

/// A pinned moment of one process's view of the disk.
struct Pinned {
    disk: Arc<Disk>,
    process: u64,
    at: u64,
}

impl Pinned {
    /// Several entries per turn of the lock, and none while `visit` runs, which may use the engine.
    fn walk(
        &self,
        family: Family,
        (from, to): (&[u8], &[u8]),
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<()> {
        let mut last: Option<Bytes> = None;
        let mut wanted = PAGE_MIN;
        loop {
            let page = self.disk.read(self.process, |versions| {
                versions.page(family, (from, to), last.as_deref(), direction, (self.at, wanted))
            })?;
            for (key, value) in &page {
                if visit(key, &self.disk.damaged(value.clone())).is_break() {
                    return Ok(());
                }
            }
            if page.len() < wanted {
                return Ok(());
            }
            last = page.into_iter().next_back().map(|(key, _)| key);
            wanted = (wanted * 4).min(PAGE_MAX);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut inside = self.disk.lock();
        if inside.process == self.process
            && let Some(open) = &mut inside.open
        {
            open.versions.unpin(self.at);
        }
    }
}

impl Snapshot for Pinned {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>> {
        let found = self
            .disk
            .read(self.process, |versions| versions.get(family, key, self.at))?;
        Ok(found.map(|value| self.disk.damaged(value)))
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.walk(family, (from, to), Direction::Ascending, visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.walk(family, (from, to), Direction::Descending, visit)
    }
}

#[cfg(test)]
mod tests;
