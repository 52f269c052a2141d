//! The disk under the replica, with a meter on what it costs: writes, syncs, and the time that syncs took.
//!
//! Invariant: nothing is changed on the way; errors pass through as they are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use palyra_storage::{Batch, Engine, Family, Result, Snapshot, Visit};

/// What was counted since the start.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    writes: AtomicU64,
    syncs: AtomicU64,
    sync_us: AtomicU64,
}

impl Meter {
    /// Batches written.
    pub(crate) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Syncs that returned.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Microseconds spent in them.
    pub(crate) fn sync_us(&self) -> u64 {
        self.sync_us.load(Ordering::Relaxed)
    }
}

/// An engine with a meter.
pub(crate) struct Metered<E> {
    engine: E,
    meter: Arc<Meter>,
}

impl<E> Metered<E> {
    /// Puts a meter in front of an engine.
    pub(crate) fn new(engine: E, meter: Arc<Meter>) -> Metered<E> {
        Metered { engine, meter }
    }
}

impl<E: Engine> Snapshot for Metered<E> {
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Bytes>> {
        self.engine.get(family, key)
    }

    fn scan(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.engine.scan(family, from, to, visit)
    }

    fn scan_rev(&self, family: Family, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.engine.scan_rev(family, from, to, visit)
    }
}

impl<E: Engine> Engine for Metered<E> {
    fn write(&self, batch: Batch) -> Result<()> {
        self.engine.write(batch)?;
        self.meter.writes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        let watch = palyra_platform::Stopwatch::start();
        self.engine.sync()?;
        let spent = u64::try_from(watch.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.meter.sync_us.fetch_add(spent, Ordering::Relaxed);
        self.meter.syncs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn snapshot(&self) -> Result<Arc<dyn Snapshot>> {
        self.engine.snapshot()
    }

    fn reclaim(&self, family: Family, from: &[u8], to: &[u8]) -> Result<()> {
        self.engine.reclaim(family, from, to)
    }
}
