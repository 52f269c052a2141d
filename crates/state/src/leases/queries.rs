//! What is asked about runs and leases. Nothing here writes.

use std::ops::ControlFlow;

use super::{Artifact, Lease, LeaseState, Run, RunState, Totals, select};
use crate::fleet;
use crate::ids::{Digest, Id};
use crate::limits;
use crate::read::Read;
use crate::reply::MustEnd;
use crate::tables::{self, Present, Table, Text};
use bytes::Bytes;

/// The run with this id.
#[must_use]
pub fn run(r: &dyn Read, id: Id) -> Option<Run> {
    tables::RUNS.get(r, id)
}

/// Runs by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn runs(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Run> {
    tables::RUNS.page(r, (), after, limit)
}

/// Runs with ids from `first` to `last`, at most `limit`.
#[must_use]
pub fn runs_between(r: &dyn Read, first: Id, last: Id, limit: usize) -> Vec<Run> {
    tables::RUNS.between(r, first, last, limit)
}

/// Runs in this state by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn runs_in_state(r: &dyn Read, state: RunState, after: Option<Id>, limit: usize) -> Vec<Run> {
    let ids = tables::RUNS_BY_STATE.ids(r, state as u32, after, limit);
    ids.into_iter().filter_map(|id| run(r, id)).collect()
}

/// The parameters of a run.
#[must_use]
pub fn params(r: &dyn Read, id: Id) -> Option<Bytes> {
    tables::RUN_PARAMS.get(r, id).map(|blob| blob.bytes)
}

/// The result of a run; nothing when there is none, or it is empty.
#[must_use]
pub fn result(r: &dyn Read, id: Id) -> Option<Bytes> {
    tables::RUN_RESULTS.get(r, id).map(|blob| blob.bytes)
}

/// The last lines that the program of a run wrote; nothing when there are none.
#[must_use]
pub fn log_tail(r: &dyn Read, id: Id) -> Option<Bytes> {
    tables::RUN_LOG_TAILS.get(r, id).map(|blob| blob.bytes)
}

/// A file of a run.
#[must_use]
pub fn artifact(r: &dyn Read, run_id: Id, digest: Digest) -> Option<Artifact> {
    tables::ARTIFACTS.get(r, (run_id, digest))
}

/// The piece of a file of a run that begins at `offset`, a multiple of `limits::ARTIFACT_CHUNK`.
#[must_use]
pub fn artifact_chunk(r: &dyn Read, run_id: Id, digest: Digest, offset: u64) -> Option<Bytes> {
    let chunk = limits::ARTIFACT_CHUNK as u64;
    let number = u32::try_from(offset / chunk)
        .ok()
        .filter(|_| offset.is_multiple_of(chunk))?;
    tables::ARTIFACT_CHUNKS
        .get(r, (run_id, digest, number))
        .map(|blob| blob.bytes)
}

/// The lease with this id.
#[must_use]
pub fn lease(r: &dyn Read, id: Id) -> Option<Lease> {
    tables::LEASES.get(r, id)
}

/// All leases by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn leases(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Lease> {
    tables::LEASES.page(r, (), after, limit)
}

/// Leases with ids from `first` to `last`, at most `limit`.
#[must_use]
pub fn leases_between(r: &dyn Read, first: Id, last: Id, limit: usize) -> Vec<Lease> {
    tables::LEASES.between(r, first, last, limit)
}

/// Leases that have not ended, by (worker, slot), from the one after `after` on, at most `limit`.
#[must_use]
pub fn live(r: &dyn Read, after: Option<(Id, u32)>, limit: usize) -> Vec<Lease> {
    let held = tables::SLOTS.page(r, (), after, limit);
    held.iter().filter_map(|held| lease(r, held.lease_id)).collect()
}

/// Leases of a worker that have not ended, by slot.
#[must_use]
pub fn live_of(r: &dyn Read, worker_id: Id) -> Vec<Lease> {
    let held = tables::SLOTS.list(r, worker_id, limits::SLOTS_PER_WORKER as usize);
    held.iter().filter_map(|held| lease(r, held.lease_id)).collect()
}

/// Whether a slot of this worker is taken.
#[must_use]
pub fn is_held(r: &dyn Read, worker_id: Id) -> bool {
    !tables::SLOTS.list(r, worker_id, 1).is_empty()
}

/// All leases of a run, oldest first.
#[must_use]
pub fn leases_of_run(r: &dyn Read, run_id: Id) -> Vec<Lease> {
    let ids = tables::LEASES_OF.ids(r, run_id, None, limits::RUN_ATTEMPTS_MAX as usize);
    ids.into_iter().filter_map(|id| lease(r, id)).collect()
}

/// Ended leases of a worker, the first to end first, after (end, id), at most `limit`.
#[must_use]
pub fn ended_of(r: &dyn Read, worker_id: Id, after: Option<(u64, Id)>, limit: usize) -> Vec<Lease> {
    let after = after.map(|(at, id)| [at.to_be_bytes().as_slice(), id.to_bytes().as_slice()].concat());
    let mut found = Vec::new();
    tables::LEASES_ENDED.visit(r, worker_id, after.as_deref(), &mut |key, _| {
        if found.len() >= limit {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found.into_iter().filter_map(|id| lease(r, id)).collect()
}

/// Runs of which a worker has or had a lease, at most `limit`: what it has first, then what it had, the first
/// to end first.
#[must_use]
pub fn runs_of_worker(r: &dyn Read, worker_id: Id, limit: usize) -> Vec<Run> {
    let mut ids: Vec<Id> = live_of(r, worker_id).iter().map(|lease| lease.run_id).collect();
    for ended in ended_of(r, worker_id, None, limit) {
        if !ids.contains(&ended.run_id) {
            ids.push(ended.run_id);
        }
    }
    ids.into_iter().take(limit).filter_map(|id| run(r, id)).collect()
}

/// Leases and runs whose deadline has passed at `now`, at most `limits::EXPIRE_BATCH` of each: what an
/// `Expire` should name.
#[must_use]
pub fn due(r: &dyn Read, now: u64) -> super::Expire {
    super::Expire {
        leases: due_in(r, &tables::LEASES_DUE, now),
        runs: due_in(r, &tables::RUNS_DUE, now),
    }
}

fn due_in(r: &dyn Read, table: &Table<Present>, now: u64) -> Vec<Id> {
    let mut found = Vec::new();
    table.visit(r, (), None, &mut |key, _| {
        if found.len() >= limits::EXPIRE_BATCH || time_of(key) > now {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found
}

/// The next deadline of a lease or a run.
#[must_use]
pub fn next_due(r: &dyn Read) -> Option<u64> {
    let first = |table: &Table<Present>| {
        let keys = table.suffixes(r, (), 1);
        keys.first().map(|key| time_of(key))
    };
    let nexts = [first(&tables::LEASES_DUE), first(&tables::RUNS_DUE)];
    nexts.into_iter().flatten().min()
}

fn time_of(key: &[u8]) -> u64 {
    key.first_chunk()
        .map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes))
}

/// Leases that a worker is to be offered in the session with this epoch, by slot: granted in it, and not
/// taken.
#[must_use]
pub fn offers(r: &dyn Read, worker_id: Id, epoch: u64) -> Vec<Lease> {
    let mut found = live_of(r, worker_id);
    found.retain(|lease| lease.state() == LeaseState::Granted && lease.epoch == epoch);
    found
}

/// What a worker must end, and say that it is clean of: leases that are ending without a word of its cleanup,
/// and those that ended without one. A session tells it when it begins, and whenever a row of the journal
/// says that a lease of it ends.
#[must_use]
pub fn to_end(r: &dyn Read, worker_id: Id) -> Vec<MustEnd> {
    let ending = live_of(r, worker_id).into_iter();
    let ending = ending.filter(|lease| lease.state() == LeaseState::Ending && lease.cleanup.is_none());
    let mut found: Vec<MustEnd> = ending
        .map(|lease| MustEnd {
            lease_id: lease.id,
            fence: lease.fence,
            reason: lease.end_reason().as_str().to_owned(),
        })
        .collect();
    let unclean = fleet::worker(r, worker_id)
        .map(|worker| worker.unclean)
        .unwrap_or_default();
    for lease_id in unclean {
        if found.iter().all(|named| named.lease_id != lease_id) {
            found.push(MustEnd {
                lease_id,
                fence: lease(r, lease_id).map_or(0, |lease| lease.fence),
                reason: super::reconcile::UNCLEAN.to_owned(),
            });
        }
    }
    found
}

/// What a run waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Waits {
    /// Nothing: it is with a worker, or has ended.
    Nothing,
    /// Files with these digests.
    Input(Vec<Digest>),
    /// A worker. So many runs of its tool are before it, of at most 16 times `limits::SELECTION` that were
    /// looked at.
    Worker {
        /// Runs before it.
        ahead: usize,
        /// Workers that could be given its tool now, of at most `limits::SELECTION`: they are free and do not
        /// fit.
        free: usize,
        /// The policy trusts its tool.
        trusted: bool,
    },
    /// The end of its present lease: so long may its worker still be running it.
    Fence {
        /// First moment at which it cannot.
        until: u64,
    },
}

/// What a run waits for.
#[must_use]
pub fn waits_for(r: &dyn Read, found: &Run) -> Waits {
    match found.state() {
        RunState::AwaitingInput => Waits::Input(super::missing(r, found)),
        RunState::Queued => Waits::Worker {
            ahead: ahead(r, found),
            free: fleet::candidates(r, &found.tool, limits::SELECTION).len(),
            trusted: fleet::min_evidence(r, &found.tool).is_some(),
        },
        RunState::Fenced | RunState::Cancelling => Waits::Fence {
            until: found
                .lease_id
                .and_then(|id| lease(r, id))
                .map_or(0, |lease| lease.deadline_at),
        },
        _ => Waits::Nothing,
    }
}

/// How many runs of the same tool wait that are older, of those that were looked at.
fn ahead(r: &dyn Read, found: &Run) -> usize {
    let mut count = 0;
    let mut seen = 0;
    tables::RUNS_QUEUED.visit(r, Text(&found.tool), None, &mut |key, _| {
        seen += 1;
        count += usize::from(select::order_of(key) < (found.order, found.id));
        if seen < limits::SELECTION * 16 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    count
}

/// Counters of runs and leases.
#[must_use]
pub fn totals(r: &dyn Read) -> Totals {
    tables::LEASE_TOTALS.get(r, ()).unwrap_or_default()
}
