//! The disk of a simulated replica: the engine's twin in memory, watched.
//!
//! Everything that is written goes into the digest that two runs of one seed must share. What a loss of power took is
//! counted by kind, so that a run shows whether it hit votes and entries that were on their way. Some [`Break`]s live
//! here.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use palyra_replica::inspect::{self, Record};
use palyra_storage::{Batch, Disk, Engine, Family, Fault, MemEngine, Op, Result, Snapshot, Visit};

use crate::breaks::Break;
use crate::chance;
use crate::world::World;

/// What a batch that is not synced holds.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    vote: bool,
    entries: bool,
    state: bool,
    flip: bool,
    purge: bool,
    truncation: bool,
}

/// One replica's disk. It outlives the replica's processes.
pub(crate) struct SimDisk {
    replica: u64,
    world: &'static World,
    disk: Arc<Disk>,
    /// One for each batch that the twin holds unsynced, oldest first.
    unsynced: Mutex<Vec<Held>>,
}

impl SimDisk {
    /// An empty disk.
    pub(crate) fn new(replica: u64, world: &'static World) -> Arc<SimDisk> {
        Arc::new(SimDisk {
            replica,
            world,
            disk: Disk::new(format!("disk-{replica}")),
            unsynced: Mutex::default(),
        })
    }

    /// Opens it as a new process.
    pub(crate) fn open(self: &Arc<Self>) -> Result<Arc<dyn Engine>> {
        let engine = MemEngine::open(&self.disk)?;
        // Opening made durable what it found.
        self.unsynced().clear();
        self.world.raft().synced(self.replica);
        Ok(Arc::new(Watched {
            engine,
            disk: self.clone(),
        }))
    }

    /// Ends the process on it: what was written stays.
    pub(crate) fn kill(&self) {
        self.disk.kill();
    }

    /// Ends the process and cuts the power: of what was not synced, a prefix of the seed's choice survives.
    pub(crate) fn power_loss(&self) {
        let keep = usize::try_from(chance::below(self.disk.unsynced() as u64 + 1)).unwrap_or(0);
        let mut unsynced = self.unsynced();
        for lost in unsynced.iter().skip(keep) {
            let kinds = [
                (lost.vote, "power-lost-vote"),
                (lost.entries, "power-lost-entries"),
                (lost.state, "power-lost-state"),
                (lost.flip, "power-lost-flip"),
            ];
            for (_, name) in kinds.iter().filter(|(is, _)| *is) {
                self.world.reach(name);
            }
        }
        unsynced.clear();
        self.disk.power_loss(keep);
        self.world.raft().power_loss(self.replica, keep);
    }

    /// Arms a fault.
    pub(crate) fn inject(&self, fault: Fault) {
        self.disk.inject(fault);
    }

    /// While set, nothing finds space on it.
    pub(crate) fn fill(&self, full: bool) {
        self.disk.fill(full);
    }

    /// Damages every block for good.
    pub(crate) fn ruin(&self) {
        self.disk.ruin();
    }

    fn unsynced(&self) -> MutexGuard<'_, Vec<Held>> {
        self.unsynced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is(&self, broken: Break) -> bool {
        self.world.broken() == Some(broken)
    }

    /// What a batch becomes on this disk: itself, unless a break says otherwise.
    fn broken_up(&self, batch: Batch) -> Vec<Batch> {
        let flip = held(&batch).flip;
        if self.is(Break::LoseVote) {
            return vec![only(&batch, |op| !is_put(op, b"vote"))];
        }
        if self.is(Break::SplitApply) && !flip {
            let position = |op: &Op| is_put(op, b"applied");
            return vec![only(&batch, |op| !position(op)), only(&batch, position)];
        }
        if self.is(Break::SplitInstall) && flip {
            let state = |op: &Op| is_put(op, b"applied") || is_put(op, b"snapshot");
            return vec![only(&batch, |op| !state(op)), only(&batch, state)];
        }
        if self.is(Break::DropPut) && self.replica == 2 {
            let keeps = |op: &Op| {
                !matches!(
                    op,
                    Op::Put {
                        family: Family::State,
                        ..
                    }
                ) || !chance::percent(2)
            };
            return vec![only(&batch, keeps)];
        }
        vec![batch]
    }
}

fn is_put(op: &Op, name: &[u8]) -> bool {
    matches!(op, Op::Put { family: Family::Meta, key, .. } if key.as_ref() == name)
}

fn held(batch: &Batch) -> Held {
    let mut held = Held::default();
    for op in batch.ops() {
        match op {
            Op::Put {
                family: Family::Log, ..
            } => held.entries = true,
            Op::Put {
                family: Family::State,
                ..
            } => held.state = true,
            Op::DeleteRange {
                family: Family::Log, ..
            } => held.truncation = true,
            _ => {}
        }
    }
    let puts = |name: &[u8]| batch.ops().iter().any(|op| is_put(op, name));
    held.vote = puts(b"vote");
    held.purge = puts(b"purged");
    held.flip = puts(b"applied") && puts(b"snapshot");
    held
}

/// A batch of those operations that `wanted` names.
fn only(batch: &Batch, mut wanted: impl FnMut(&Op) -> bool) -> Batch {
    let mut out = Batch::new();
    for op in batch.ops().iter().filter(|op| wanted(op)) {
        match op {
            Op::Put { family, key, value } => out.put(*family, key.clone(), value.clone()),
            Op::Delete { family, key } => out.delete(*family, key.clone()),
            Op::DeleteRange { family, from, to } => out.delete_range(*family, from.clone(), to.clone()),
        };
    }
    out
}

/// The engine of one process on a disk.
struct Watched {
    engine: MemEngine,
    disk: Arc<SimDisk>,
}

impl Engine for Watched {
    fn write(&self, batch: Batch) -> Result<()> {
        let world = self.disk.world;
        for op in batch.ops() {
            match op {
                Op::Put { key, value, .. } => {
                    world.absorb(key);
                    world.absorb(value);
                }
                Op::Delete { key, .. } => world.absorb(key),
                Op::DeleteRange { from, to, .. } => {
                    world.absorb(from);
                    world.absorb(to);
                }
            }
        }
        for batch in self.disk.broken_up(batch) {
            if batch.is_empty() {
                continue;
            }
            let held = held(&batch);
            let records: Vec<Record> = batch.ops().iter().filter_map(inspect::record).collect();
            let in_two = |record: &Record| match record {
                Record::Entry { voters, .. } => voters.as_ref().is_some_and(|halves| halves.len() > 1),
                _ => false,
            };
            let changes = records.iter().any(in_two);
            self.engine.write(batch)?;
            world.raft().wrote(self.disk.replica, records);
            if changes {
                world.change_begun(self.disk.replica);
            }
            if held.purge {
                world.reach("log-purged");
            } else if held.truncation {
                world.reach("log-truncated");
            }
            self.disk.unsynced().push(held);
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        if self.disk.is(Break::AckBeforeSync) {
            return Ok(());
        }
        self.engine.sync()?;
        self.disk.unsynced().clear();
        self.disk.world.raft().synced(self.disk.replica);
        Ok(())
    }

    fn snapshot(&self) -> Result<Arc<dyn Snapshot>> {
        self.engine.snapshot()
    }
}

impl Snapshot for Watched {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_known_by_what_they_hold() {
        let mut batch = Batch::new();
        batch.put(Family::Log, &b"1"[..], &b"entry"[..]);
        batch.put(Family::Meta, &b"applied"[..], &b"5"[..]);
        let found = held(&batch);
        assert!(found.entries && !found.vote && !found.state && !found.flip);
        batch.put(Family::Meta, &b"snapshot"[..], &b"5"[..]);
        batch.put(Family::Meta, &b"vote"[..], &b"2"[..]);
        let found = held(&batch);
        assert!(found.entries && found.vote && found.flip);
        let rest = only(&batch, |op| !is_put(op, b"vote"));
        assert_eq!(rest.len(), 3);
        assert!(!held(&rest).vote);
    }
}
