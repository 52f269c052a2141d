//! Where workers lie: the record, the indexes and counters that follow it, and what is asked about them.
//!
//! What never lives here: what changes a worker (`rules`, `follow`). Invariants: [`update`] alone writes a
//! worker, so that no index, no counter and no lifecycle can lag behind it; a statement that is void, and one
//! whose end has passed when the record is written, is in no index.

use std::ops::ControlFlow;

use super::lifecycle::{self, Lifecycle};
use super::{Evidence, Policy, Totals, Worker};
use crate::ids::Id;
use crate::read::Read;
use crate::tables::{self, Text};
use crate::txn::Txn;
use crate::{limits, nodes};

/// The worker with this id.
#[must_use]
pub fn worker(r: &dyn Read, id: Id) -> Option<Worker> {
    tables::WORKERS.get(r, id)
}

/// Workers by id, at most `limit`, from the one after `after` on.
#[must_use]
pub fn workers(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Worker> {
    tables::WORKERS.page(r, (), after, limit)
}

/// Workers whose id begins with `prefix` (text form, either case), at most `limit`.
#[must_use]
pub fn workers_by_prefix(r: &dyn Read, prefix: &str, limit: usize) -> Vec<Worker> {
    let Some((first, last)) = Id::prefix_range(prefix) else {
        return Vec::new();
    };
    tables::WORKERS.between(r, first, last, limit)
}

/// Workers of a lifecycle by id, at most `limit`, from the one after `after` on.
#[must_use]
pub fn by_lifecycle(r: &dyn Read, state: Lifecycle, after: Option<Id>, limit: usize) -> Vec<Worker> {
    let ids = tables::WORKERS_BY_LIFECYCLE.ids(r, state as u32, after, limit);
    ids.into_iter().filter_map(|id| worker(r, id)).collect()
}

/// The policy.
#[must_use]
pub fn policy(r: &dyn Read) -> Option<Policy> {
    tables::FLEET_POLICY.get(r, ())
}

/// Its version; 0 when there is none, and nobody is admitted.
pub(super) fn policy_version(r: &dyn Read) -> u64 {
    policy(r).map_or(0, |policy| policy.version)
}

/// Counters of the fleet.
#[must_use]
pub fn totals(r: &dyn Read) -> Totals {
    tables::FLEET_TOTALS.get(r, ()).unwrap_or_default()
}

/// The fleet at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Workers by lifecycle, all nine.
    pub workers: [(Lifecycle, u64); 9],
    /// Slots of workers that are available or busy.
    pub slots: u64,
    /// Slots that are taken, of all workers.
    pub slots_used: u64,
    /// Workers whose statement counts.
    pub admitted: u64,
    /// Version of the policy; 0: there is none.
    pub policy_version: u64,
}

/// The fleet at one moment: counters that the records are written with, so that nothing is counted here.
#[must_use]
pub fn snapshot(r: &dyn Read) -> Snapshot {
    let sums = totals(r);
    Snapshot {
        workers: Lifecycle::ALL.map(|state| (state, count_of(&sums, state))),
        slots: sums.slots,
        slots_used: sums.slots_used,
        admitted: sums.admitted,
        policy_version: policy_version(r),
    }
}

fn count_of(sums: &Totals, state: Lifecycle) -> u64 {
    sums.by_lifecycle.get(state as usize).copied().unwrap_or_default()
}

/// How many workers are known.
pub(super) fn count(r: &dyn Read) -> u64 {
    totals(r).by_lifecycle.iter().sum()
}

/// Workers of which time has changed something by `now`, longest due first, at most `limit`: for the
/// sweeper's `Lapse`.
#[must_use]
pub fn due(r: &dyn Read, now: u64, limit: usize) -> Vec<Id> {
    let mut found = Vec::new();
    tables::WORKERS_DUE.visit(r, (), None, &mut |key, _| {
        if found.len() >= limit || time_of(key) > now {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found
}

/// When the first of them is due: when the sweeper has to look next.
#[must_use]
pub fn next_due(r: &dyn Read) -> Option<u64> {
    let mut first = None;
    tables::WORKERS_DUE.visit(r, (), None, &mut |key, _| {
        first = Some(time_of(key));
        ControlFlow::Break(())
    });
    first
}

fn time_of(key: &[u8]) -> u64 {
    key.first_chunk()
        .map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes))
}

/// Workers whose statement counts and was not held against the present policy yet, at most `limit`: for the
/// reconciler's `Recheck`.
#[must_use]
pub fn unchecked(r: &dyn Read, limit: usize) -> Vec<Id> {
    let present = policy_version(r);
    let mut found = Vec::new();
    tables::WORKERS_CHECKED.visit(r, (), None, &mut |key, _| {
        if found.len() >= limit || time_of(key) >= present {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found
}

/// Workers that may be given this tool, in the order in which they are asked: most evidence, least load,
/// longest without a lease, id. At most `limit`. Whoever gives asks [`may_take`] of each: time, or a new
/// policy, may have passed since the index was written.
#[must_use]
pub fn candidates(r: &dyn Read, tool: &str, limit: usize) -> Vec<Id> {
    let keys = tables::WORKERS_READY.suffixes(r, Text(tool), limit);
    // Evidence, load and fence stand in front of the id.
    keys.iter().filter_map(|key| Id::from_slice(&key[16..])).collect()
}

/// Whether a worker may be given this tool at `now`: it is available, its statement is good and held against
/// the present policy, names the tool, and proves as much as the policy and `min_evidence` want. The state's
/// time is `Txn::now` inside an entry, and `crate::clock` outside of one.
#[must_use]
pub fn may_take(r: &dyn Read, now: u64, worker: &Worker, tool: &str, min_evidence: Evidence) -> bool {
    let Some(policy) = policy(r) else { return false };
    let Some(trusted) = policy.capability(tool) else {
        return false;
    };
    let Some(attested) = &worker.attested else {
        return false;
    };
    let session = nodes::node(r, worker.id).and_then(|node| node.session);
    lifecycle::of(worker, now, policy.version).0 == Lifecycle::Available
        && session
            .is_some_and(|session| session.epoch == worker.reconciled_epoch && session.transport != "poll")
        && attested.tools.iter().any(|offered| offered == tool)
        && attested.evidence()
            >= trusted
                .min_evidence()
                .max(min_evidence)
                .max(Evidence::SelfReported)
}

/// Least evidence of a worker that is given this tool; nothing when the policy does not trust the tool, or
/// there is none.
#[must_use]
pub fn min_evidence(r: &dyn Read, tool: &str) -> Option<Evidence> {
    policy(r)?
        .capability(tool)
        .map(|trusted| trusted.min_evidence().max(Evidence::SelfReported))
}

/// Longest time between two renewals of a lease.
#[must_use]
pub fn max_ttl(r: &dyn Read) -> u64 {
    policy(r).map_or(limits::LEASE_TTL_MAX, |policy| policy.max_lease_ttl)
}

/// Writes a worker as it is after a change, with everything that follows: lifecycle, indexes, counters, and
/// the row of the journal when the lifecycle changed. `before` is what is stored now.
pub(super) fn update(txn: &mut Txn<'_>, before: &Worker, mut after: Worker) -> Worker {
    settle(txn, &mut after);
    if after == *before {
        return after;
    }
    unlist(txn, before);
    list(txn, &after);
    txn.put(&tables::WORKERS, after.id, &after);
    if before.lifecycle != after.lifecycle {
        say(txn, before, &after);
    }
    after
}

/// Writes a worker that is new.
pub(super) fn insert(txn: &mut Txn<'_>, mut new: Worker) -> Worker {
    // It differs from every lifecycle, so that its first one has a time, a reason and an actor.
    new.lifecycle = -1;
    settle(txn, &mut new);
    list(txn, &new);
    txn.put(&tables::WORKERS, new.id, &new);
    new
}

/// Forgets a worker, with everything that follows.
pub(super) fn delete(txn: &mut Txn<'_>, old: &Worker) {
    unlist(txn, old);
    txn.delete(&tables::WORKERS, old.id);
}

/// Derives what follows from the facts.
fn settle(txn: &Txn<'_>, worker: &mut Worker) {
    let now = txn.now;
    let trusted = worker.quarantine.is_none() && !worker.barred;
    if let Some(attested) = worker.attested.as_mut()
        && (!trusted || now >= attested.expires_at)
    {
        attested.policy_version = 0;
    }
    let (state, why) = lifecycle::of(worker, now, policy_version(txn));
    if worker.lifecycle != state as i32 {
        worker.lifecycle = state as i32;
        worker.lifecycle_since = now;
        worker.lifecycle_actor = txn.actor.to_string();
    }
    worker.lifecycle_reason = why.to_owned();
    worker.due_at = due_at(worker);
}

/// When time alone changes something of a worker as it is written; 0: never.
pub(crate) fn due_at(worker: &Worker) -> u64 {
    let expires = worker
        .attested
        .as_ref()
        .filter(|attested| attested.policy_version != 0)
        .map(|attested| attested.expires_at);
    let drained = worker
        .drain
        .as_ref()
        .filter(|drain| !drain.over)
        .map(|drain| drain.until);
    let lost = Some(worker.lost_at).filter(|at| *at != 0);
    [expires, drained, lost]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or_default()
}

/// Place of a worker in `WORKERS_READY`, behind the name of each tool that it offers; none unless it is
/// available.
pub(crate) fn ready_place(worker: &Worker) -> Option<(u32, u32, (u64, Id))> {
    let attested = worker
        .attested
        .as_ref()
        .filter(|_| worker.lifecycle() == Lifecycle::Available)?;
    let rank = 255u32.saturating_sub(attested.evidence as u32);
    Some((rank, worker.slots_used, (worker.last_fence, worker.id)))
}

/// Tools that a worker's statement names.
pub(crate) fn tools(worker: &Worker) -> &[String] {
    worker.attested.as_ref().map_or(&[], |attested| &attested.tools)
}

/// Version under which a worker is in `WORKERS_CHECKED`; 0: it is not.
fn checked(worker: &Worker) -> u64 {
    worker
        .attested
        .as_ref()
        .map_or(0, |attested| attested.policy_version)
}

/// What a worker adds to the counter of slots.
pub(crate) fn slots_of(worker: &Worker) -> u64 {
    let given = matches!(worker.lifecycle(), Lifecycle::Available | Lifecycle::Busy);
    let attested = worker.attested.as_ref().filter(|_| given);
    attested.map_or(0, |attested| u64::from(attested.slots))
}

fn unlist(txn: &mut Txn<'_>, old: &Worker) {
    txn.delete(&tables::WORKERS_BY_LIFECYCLE, (old.lifecycle as u32, old.id));
    if old.due_at != 0 {
        txn.delete(&tables::WORKERS_DUE, (old.due_at, old.id));
    }
    if checked(old) != 0 {
        txn.delete(&tables::WORKERS_CHECKED, (checked(old), old.id));
    }
    if let Some(place) = ready_place(old) {
        for tool in tools(old) {
            txn.delete(&tables::WORKERS_READY, (Text(tool), place));
        }
    }
    let mut sums = totals(txn);
    if let Some(counter) = sums.by_lifecycle.get_mut(old.lifecycle as usize) {
        *counter -= 1;
    }
    sums.slots -= slots_of(old);
    sums.slots_used -= u64::from(old.slots_used);
    sums.admitted -= u64::from(checked(old) != 0);
    txn.put(&tables::FLEET_TOTALS, (), &sums);
}

fn list(txn: &mut Txn<'_>, new: &Worker) {
    txn.mark(&tables::WORKERS_BY_LIFECYCLE, (new.lifecycle as u32, new.id));
    if new.due_at != 0 {
        txn.mark(&tables::WORKERS_DUE, (new.due_at, new.id));
    }
    if checked(new) != 0 {
        txn.mark(&tables::WORKERS_CHECKED, (checked(new), new.id));
    }
    if let Some(place) = ready_place(new) {
        for tool in tools(new) {
            txn.mark(&tables::WORKERS_READY, (Text(tool), place));
        }
    }
    let mut sums = totals(txn);
    sums.by_lifecycle.resize(Lifecycle::ALL.len(), 0);
    if let Some(counter) = sums.by_lifecycle.get_mut(new.lifecycle as usize) {
        *counter += 1;
    }
    sums.slots += slots_of(new);
    sums.slots_used += u64::from(new.slots_used);
    sums.admitted += u64::from(checked(new) != 0);
    txn.put(&tables::FLEET_TOTALS, (), &sums);
}

fn say(txn: &mut Txn<'_>, before: &Worker, after: &Worker) {
    let (from, to) = (before.lifecycle(), after.lifecycle());
    debug_assert!(lifecycle::allowed(from, to), "{from:?} to {to:?}");
    txn.emit(
        "worker.lifecycle",
        after.id,
        [
            ("from", from.as_str().to_owned()),
            ("to", to.as_str().to_owned()),
            ("reason", after.lifecycle_reason.clone()),
            ("slots_used", after.slots_used.to_string()),
        ],
    );
}
