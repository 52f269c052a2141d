//! Who gets what: a run its worker, a worker its run.
//!
//! Runs go by age, workers by evidence, load, and how long they have been without a lease. Both searches end
//! in [`give`], the one way in which a lease comes to be. They meet: whatever lets a run wait, or a worker be
//! free, begins one of them. Invariant: while a worker may be given a run that waits, none waits that it
//! could take, as far as the searches look: see [`next_for`] and [`limits::SELECTION`].

use std::ops::ControlFlow;

use super::store::{free_slot, put_lease, put_run};
use super::{Lease, LeaseState, Run, RunState, run, totals};
use crate::fleet::{self, Evidence, Worker};
use crate::ids::{Digest, Id};
use crate::read::Read;
use crate::tables::{self, Key as _, Text};
use crate::txn::Txn;
use crate::{limits, nodes};

/// Bytes of a key of the queue behind the tool: demand, order, id.
const PLACE: usize = 8 + 8 + 16;

/// Age of a run by its key of the queue behind the tool.
pub(super) fn order_of(key: &[u8]) -> (u64, Id) {
    let order = key
        .get(8..16)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_be_bytes);
    (order, key.get(16..).and_then(Id::from_slice).unwrap_or(Id::ZERO))
}

/// Looks for a worker for a run that waits.
pub(super) fn place(txn: &mut Txn<'_>, run_id: Id) {
    let Some(found) = run(txn, run_id).filter(|run| run.state() == RunState::Queued) else {
        return;
    };
    let is_fit = |id: &Id| fleet::worker(txn, *id).is_some_and(|worker| fits(txn, txn.now, &worker, &found));
    let candidates = candidates(txn, &found);
    if let Some(worker_id) = candidates.into_iter().find(is_fit) {
        give(txn, &found, worker_id);
    }
}

/// Workers to ask for a run, in their order. The labels of most may be others, so that more are asked.
fn candidates(r: &dyn Read, found: &Run) -> Vec<Id> {
    let limit = if found.labels.is_empty() {
        limits::SELECTION
    } else {
        limits::SELECTION_LABELS
    };
    fleet::candidates(r, &found.tool, limit)
}

/// Gives a worker what waits, oldest first, as far as it has free slots.
pub(crate) fn fill(txn: &mut Txn<'_>, worker_id: Id) {
    for _ in 0..limits::SLOTS_PER_WORKER {
        let Some(found) = fleet::worker(txn, worker_id).and_then(|worker| next_for(txn, txn.now, &worker))
        else {
            return;
        };
        give(txn, &found, worker_id);
    }
}

/// The oldest run that waits and this worker may be given at `now`.
///
/// Runs with equal demands (tool, evidence, labels) are one queue, of which only the first is looked at; of
/// each tool, the first [`limits::SELECTION`] queues that have runs. Of more than that a search sees only so
/// many, from a place that changes with each entry, so that none is out of sight for ever.
pub(crate) fn next_for(r: &dyn Read, now: u64, worker: &Worker) -> Option<Run> {
    let tools = &worker.attested.as_ref()?.tools;
    let mut best: Option<Run> = None;
    for tool in tools {
        if !fleet::may_take(r, now, worker, tool, Evidence::None) {
            continue;
        }
        for id in heads(r, tool) {
            let Some(found) = run(r, id) else { continue };
            let is_older = best
                .as_ref()
                .is_none_or(|best| (found.order, found.id) < (best.order, best.id));
            if is_older && fits(r, now, worker, &found) {
                best = Some(found);
            }
        }
    }
    best
}

/// The first run of each queue of a tool.
fn heads(r: &dyn Read, tool: &str) -> Vec<Id> {
    let all = heads_from(r, tool, 0);
    if all.len() < limits::SELECTION {
        return all;
    }
    let digest = Digest::of(&crate::meta::meta(r).index.to_be_bytes()).to_bytes();
    let start = digest[..8]
        .iter()
        .fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
    let mut found = heads_from(r, tool, start);
    found.extend(all);
    found.truncate(limits::SELECTION);
    found
}

/// The first runs of the queues of a tool whose demand is `from` or above, at most [`limits::SELECTION`].
fn heads_from(r: &dyn Read, tool: &str, from: u64) -> Vec<Id> {
    let mut found = Vec::new();
    let mut from = Some(from);
    while let Some(demand) = from.filter(|_| found.len() < limits::SELECTION) {
        // Keys are longer than what is skipped to, so that the first of this demand is not passed over.
        let mut after = Vec::new();
        demand.write(&mut after);
        let mut head: Option<[u8; PLACE]> = None;
        tables::RUNS_QUEUED.visit(r, Text(tool), Some(&after), &mut |key, _| {
            head = key.try_into().ok();
            ControlFlow::Break(())
        });
        let Some(key) = head else { break };
        found.extend(Id::from_slice(&key[16..]));
        let demand = key[..8]
            .iter()
            .fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
        from = demand.checked_add(1);
    }
    found
}

/// Whether a worker may be given this run at `now`.
pub(crate) fn fits(r: &dyn Read, now: u64, worker: &Worker, found: &Run) -> bool {
    fleet::may_take(r, now, worker, &found.tool, found.min_evidence()) && has_labels(r, worker.id, found)
}

fn has_labels(r: &dyn Read, worker_id: Id, found: &Run) -> bool {
    if found.labels.is_empty() {
        return true;
    }
    nodes::node(r, worker_id).is_some_and(|node| {
        let has = |(name, value)| node.labels.get(name) == Some(value);
        found.labels.iter().all(has)
    })
}

/// Gives a run that waits to a worker with a free slot.
fn give(txn: &mut Txn<'_>, found: &Run, worker_id: Id) {
    let mut fence = (totals(txn).last_fence + 1).max(txn.index);
    // Planted: fences are counted from what is held now, and so are given again.
    if palyra_fault::planted("fence-forgets") {
        fence = totals(txn).live + 1;
    }
    let session = nodes::node(txn, worker_id)
        .and_then(|node| node.session)
        .unwrap_or_default();
    let ttl = found.ttl.min(fleet::max_ttl(txn));
    let lease = Lease {
        id: lease_id(txn, fence),
        run_id: found.id,
        attempt: found.attempt + 1,
        worker_id,
        slot: free_slot(txn, worker_id),
        fence,
        state: LeaseState::Granted as i32,
        ttl,
        granted_at: txn.now,
        deadline_at: (txn.now + ttl).min(found.deadline_at),
        epoch: session.epoch,
        replica_id: session.replica_id,
        tool: found.tool.clone(),
        run_deadline_at: found.deadline_at,
        ..Lease::default()
    };
    let mut leased = found.clone();
    leased.set_state(RunState::Leased);
    leased.attempt = lease.attempt;
    leased.lease_id = Some(lease.id);
    leased.worker_id = Some(worker_id);
    leased.fence = fence;
    put_lease(txn, None, &lease);
    put_run(txn, Some(found), &leased);
    txn.emit(
        "lease.granted",
        lease.id,
        [
            ("device", worker_id.to_string()),
            ("run", found.id.to_string()),
            ("tool", found.tool.clone()),
            ("attempt", lease.attempt.to_string()),
            ("slot", lease.slot.to_string()),
            ("fence", fence.to_string()),
            ("epoch", lease.epoch.to_string()),
            ("replica", lease.replica_id.to_string()),
            ("deadline_at", lease.deadline_at.to_string()),
        ],
    );
    fleet::take_slot(txn, worker_id, fence);
}

/// A ULID: the state's time, and 80 bits of what names this lease and no other.
fn lease_id(txn: &Txn<'_>, fence: u64) -> Id {
    let mut seed = b"palyra lease\0".to_vec();
    seed.extend_from_slice(&txn.request_id.to_bytes());
    seed.extend_from_slice(&fence.to_be_bytes());
    let digest = Digest::of(&seed).to_bytes();
    let mut bytes = [0; 16];
    bytes[..6].copy_from_slice(&txn.now.to_be_bytes()[2..]);
    bytes[6..].copy_from_slice(&digest[..10]);
    Id::from_bytes(bytes)
}
