//! Where runs and leases lie: the records, and the indexes and counters that follow them. Nothing else writes
//! these tables.

use std::ops::ControlFlow;

use super::{Lease, LeaseRef, LeaseState, Run, RunState, Totals, artifacts, lease, run, totals};
use crate::ids::{Digest, Id};
use crate::limits;
use crate::read::Read;
use crate::tables::{self, Key, Text};
use crate::txn::Txn;

/// How many ended runs are listed at a time while some are forgotten.
const FORGET_PAGE: usize = 64;

impl Run {
    /// What it counts in bytes beside its files: its parameters, result and last lines, and what its record
    /// holds of lists and labels.
    #[must_use]
    pub fn weight(&self) -> u64 {
        use prost::Message as _;
        let lists = [&self.inputs, &self.outputs];
        let lists: usize = lists.into_iter().flatten().map(|list| list.encoded_len()).sum();
        let scope = self.scope.as_ref().map_or(0, |scope| scope.encoded_len());
        let labels: usize = self
            .labels
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        let blobs = u64::from(self.params_size) + u64::from(self.result_size) + u64::from(self.tail_size);
        blobs + (lists + scope + labels) as u64
    }
}

/// What a run waits for of a worker beside its tool, in 8 bytes: runs of one tool and one demand are one
/// queue. 0: nothing.
fn demand(run: &Run) -> u64 {
    if run.labels.is_empty() && run.min_evidence == 0 {
        return 0;
    }
    let mut text = Vec::new();
    text.extend_from_slice(&run.min_evidence.to_be_bytes());
    for (name, value) in &run.labels {
        text.extend_from_slice(name.as_bytes());
        text.push(0);
        text.extend_from_slice(value.as_bytes());
        text.push(0);
    }
    let digest = Digest::of(&text).to_bytes();
    digest[..8]
        .iter()
        .fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// The key of a run in the queue: tool, demand, age.
pub(crate) fn queue_key(run: &Run) -> impl Key + '_ {
    (Text(&run.tool), demand(run), run.order, run.id)
}

/// Adds what a run counts to the totals, or takes it from them.
fn count(sums: &mut Totals, run: &Run, change: impl Fn(&mut u64, u64)) {
    sums.runs.resize(RunState::ALL.len(), 0);
    change(&mut sums.runs[run.state as usize], 1);
    change(&mut sums.artifact_bytes, run.artifact_bytes);
    if run.state().is_terminal() {
        change(&mut sums.ended_bytes, run.weight());
    } else {
        change(&mut sums.open_bytes, run.weight());
        change(&mut sums.open_artifact_bytes, run.artifact_bytes);
    }
}

impl Totals {
    /// Runs that have not ended.
    #[must_use]
    pub fn open_runs(&self) -> u64 {
        self.sum(false)
    }

    /// Ended runs that are kept.
    #[must_use]
    pub fn ended_runs(&self) -> u64 {
        self.sum(true)
    }

    fn sum(&self, terminal: bool) -> u64 {
        let states = RunState::ALL.into_iter().zip(&self.runs);
        states
            .filter(|(state, _)| state.is_terminal() == terminal)
            .map(|(_, count)| count)
            .sum()
    }
}

/// Writes a run over what it was; `None`: it is new.
pub(super) fn put_run(txn: &mut Txn<'_>, before: Option<&Run>, after: &Run) {
    let mut sums = totals(txn);
    if let Some(before) = before {
        count(&mut sums, before, |sum, by| *sum = sum.saturating_sub(by));
        unindex_run(txn, before, Some(after));
    }
    count(&mut sums, after, |sum, by| *sum += by);
    txn.put(&tables::LEASE_TOTALS, (), &sums);
    txn.put(&tables::RUNS, after.id, after);
    txn.mark(&tables::RUNS_BY_STATE, (after.state as u32, after.id));
    if after.state() == RunState::Queued {
        txn.mark(&tables::RUNS_QUEUED, queue_key(after));
    }
    if after.state().is_terminal() {
        txn.mark(&tables::RUNS_ENDED, (after.ended_at, after.id));
    } else {
        txn.mark(&tables::RUNS_DUE, (after.deadline_at, after.id));
    }
}

/// Takes a run from the indexes that it is not in any more.
fn unindex_run(txn: &mut Txn<'_>, before: &Run, after: Option<&Run>) {
    if after.is_none_or(|after| after.state != before.state) {
        txn.delete(&tables::RUNS_BY_STATE, (before.state as u32, before.id));
        if before.state() == RunState::Queued {
            txn.delete(&tables::RUNS_QUEUED, queue_key(before));
        }
        if before.state().is_terminal() {
            txn.delete(&tables::RUNS_ENDED, (before.ended_at, before.id));
        }
    }
    if !before.state().is_terminal() && after.is_none_or(|after| after.state().is_terminal()) {
        txn.delete(&tables::RUNS_DUE, (before.deadline_at, before.id));
    }
}

/// Writes a lease over what it was; `None`: it is new.
pub(super) fn put_lease(txn: &mut Txn<'_>, before: Option<&Lease>, after: &Lease) {
    txn.put(&tables::LEASES, after.id, after);
    let is_over = after.state() == LeaseState::Ended;
    let was_live = before.is_some_and(|before| before.state() != LeaseState::Ended);
    if let Some(before) =
        before.filter(|before| was_live && (is_over || before.deadline_at != after.deadline_at))
    {
        txn.delete(&tables::LEASES_DUE, (before.deadline_at, before.id));
    }
    let slot = (after.worker_id, after.slot);
    if is_over {
        // The slot of one that was over before may be another's now.
        if was_live {
            txn.delete(&tables::SLOTS, slot);
            txn.mark(&tables::LEASES_ENDED, (after.worker_id, after.ended_at, after.id));
        }
    } else {
        if before.is_none_or(|before| before.deadline_at != after.deadline_at) {
            txn.mark(&tables::LEASES_DUE, (after.deadline_at, after.id));
        }
        if before.is_none_or(|before| before.epoch != after.epoch) {
            let held = LeaseRef {
                lease_id: after.id,
                fence: after.fence,
                worker_id: after.worker_id,
                epoch: after.epoch,
            };
            txn.put(&tables::SLOTS, slot, &held);
        }
    }
    if before.is_none() {
        txn.mark(&tables::LEASES_OF, (after.run_id, after.id));
    }
    if before.is_none() || was_live == is_over {
        let mut sums = totals(txn);
        if before.is_none() {
            sums.live += 1;
            sums.last_fence = after.fence;
        } else if was_live {
            sums.live = sums.live.saturating_sub(1);
            sums.ended += 1;
        }
        txn.put(&tables::LEASE_TOTALS, (), &sums);
    }
}

/// Forgets the oldest ended runs, with their leases and files, until they are not too many and there is room
/// for `files` bytes more. Those whose lease has not ended stay.
pub(super) fn make_room(txn: &mut Txn<'_>, files: u64) {
    let is_full = |sums: &Totals| {
        sums.ended_runs() > limits::RUNS_ENDED
            || sums.ended_bytes > limits::RUNS_ENDED_BYTES
            || sums.artifact_bytes + files > limits::ARTIFACT_BYTES
    };
    let first = totals(txn);
    if !is_full(&first) {
        return;
    }
    let mut after = first.ended_oldest.to_be_bytes().to_vec();
    // What stays is where the next search must begin.
    let mut kept = None;
    let mut newest = first.ended_oldest;
    'full: while is_full(&totals(txn)) {
        let page = ended_after(txn, &after);
        let Some(last) = page.last() else { break };
        after.clone_from(last);
        for id in page.iter().filter_map(|key| Id::from_slice(&key[8..])) {
            if !is_full(&totals(txn)) {
                break 'full;
            }
            let Some(old) = run(txn, id) else { continue };
            newest = old.ended_at;
            if old
                .lease_id
                .and_then(|id| lease(txn, id))
                .is_some_and(|lease| !lease.is_over())
            {
                kept = kept.or(Some(old.ended_at));
            } else {
                forget_run(txn, &old);
            }
        }
    }
    let mut sums = totals(txn);
    sums.ended_oldest = kept.unwrap_or(newest);
    txn.put(&tables::LEASE_TOTALS, (), &sums);
}

/// Forgets what is too much, after every entry that changed something.
pub(crate) fn forget(txn: &mut Txn<'_>) {
    make_room(txn, 0);
}

fn ended_after(txn: &Txn<'_>, after: &[u8]) -> Vec<Vec<u8>> {
    let mut page = Vec::new();
    tables::RUNS_ENDED.visit(txn, (), Some(after), &mut |key, _| {
        page.push(key.to_vec());
        if page.len() < FORGET_PAGE {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    page
}

fn forget_run(txn: &mut Txn<'_>, old: &Run) {
    artifacts::drop_all(txn, old.id);
    let leases = tables::LEASES_OF.ids(txn, old.id, None, usize::MAX);
    let mut sums = totals(txn);
    for id in leases {
        if let Some(found) = lease(txn, id) {
            txn.delete(&tables::LEASES_ENDED, (found.worker_id, found.ended_at, id));
            txn.delete(&tables::LEASES, id);
            sums.ended = sums.ended.saturating_sub(1);
        }
        txn.delete(&tables::LEASES_OF, (old.id, id));
    }
    count(&mut sums, old, |sum, by| *sum = sum.saturating_sub(by));
    txn.put(&tables::LEASE_TOTALS, (), &sums);
    unindex_run(txn, old, None);
    txn.delete(&tables::RUNS, old.id);
    txn.delete(&tables::RUN_PARAMS, old.id);
    txn.delete(&tables::RUN_RESULTS, old.id);
    txn.delete(&tables::RUN_LOG_TAILS, old.id);
}

/// The lowest slot of a worker that is free.
pub(super) fn free_slot(r: &dyn Read, worker_id: Id) -> u32 {
    let taken = tables::SLOTS.suffixes(r, worker_id, limits::SLOTS_PER_WORKER as usize);
    let mut slot = 0;
    for key in taken {
        if key != u32::to_be_bytes(slot) {
            break;
        }
        slot += 1;
    }
    slot
}
