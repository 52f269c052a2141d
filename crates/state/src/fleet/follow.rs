//! What other domains tell of a worker: its node's sessions, its device's end, and the leases that it holds.
//!
//! What never lives here: what is asked of the fleet itself (`rules`). Invariants: work is given in a session
//! only after the worker was reconciled in it; a lease that was not reported clean keeps everything from its
//! worker; a worker of a revoked device is barred for good, and forgotten with its device once it holds no
//! slot.

use super::store::{count, delete, insert, policy, update, worker};
use super::{Hold, Worker};
use crate::ids::Id;
use crate::leases::{self, EndReason};
use crate::reject::{Code, Reject};
use crate::txn::Txn;
use crate::{identity, limits};

/// The node has a session. Nothing is given in it until it is reconciled.
pub(crate) fn on_attach(txn: &mut Txn<'_>, id: Id) {
    change(txn, id, |worker| {
        worker.away_since = 0;
        worker.lost_at = 0;
        worker.reconciled_epoch = 0;
    });
}

/// The node's session ended; it was last heard at `heard_at`, from where its absence counts.
pub(crate) fn on_detach(txn: &mut Txn<'_>, id: Id, heard_at: u64) {
    let patience = policy(txn).map_or(limits::HEARTBEAT_TIMEOUT, |policy| policy.heartbeat_timeout);
    change(txn, id, |worker| {
        worker.away_since = heard_at.max(1);
        worker.lost_at = heard_at.saturating_add(patience).max(1);
        worker.reconciled_epoch = 0;
    });
}

/// The device was revoked: its leases end, and nothing is ever given to it.
pub(crate) fn on_revoked(txn: &mut Txn<'_>, id: Id) {
    if worker(txn, id).is_none() {
        return;
    }
    leases::end_all(txn, id, EndReason::DeviceRevoked);
    change(txn, id, |worker| {
        worker.barred = true;
        worker.challenge = None;
        worker.lost_at = 0;
    });
}

/// The device was removed, after it was revoked: the worker is forgotten, at once or when its last slot is
/// free.
pub(crate) fn forget(txn: &mut Txn<'_>, id: Id) {
    let Some(old) = worker(txn, id) else { return };
    if old.slots_used == 0 {
        delete(txn, &old);
        say_forgotten(txn, &old, "device_removed");
    }
}

pub(super) fn say_forgotten(txn: &mut Txn<'_>, old: &Worker, reason: &str) {
    txn.emit(
        "worker.forgotten",
        old.id,
        [
            ("reason", reason.to_owned()),
            ("lifecycle", old.lifecycle().as_str().to_owned()),
        ],
    );
}

/// A slot is taken by the lease with this fence.
pub(crate) fn take_slot(txn: &mut Txn<'_>, id: Id, fence: u64) {
    change(txn, id, |worker| {
        worker.slots_used += 1;
        worker.last_fence = fence;
    });
}

/// A slot is free.
pub(crate) fn free_slot(txn: &mut Txn<'_>, id: Id) {
    change(txn, id, |worker| {
        worker.slots_used = worker.slots_used.saturating_sub(1)
    });
    let gone = |old: &Worker| old.barred && old.slots_used == 0;
    if let Some(old) = worker(txn, id).filter(gone)
        && identity::device(txn, id).is_none()
    {
        delete(txn, &old);
        say_forgotten(txn, &old, "device_removed");
    }
}

/// A lease ended and no cleanup of it was reported: nothing is given to the worker until it says that it is
/// clean.
pub(crate) fn note_unclean(txn: &mut Txn<'_>, id: Id, lease_id: Id) {
    let Some(known) = worker(txn, id) else { return };
    if known.unclean.contains(&lease_id) {
        return;
    }
    if known.unclean.len() >= limits::UNCLEAN {
        let message = format!(
            "{} leases ended without a word of its cleanup",
            known.unclean.len() + 1
        );
        fail(txn, id, Some(lease_id), &message);
        return;
    }
    change(txn, id, |worker| worker.unclean.push(lease_id));
}

/// The worker says that nothing of a lease is left. A failure ends with the last of them, if an operator
/// asked for the cleanup.
pub(crate) fn note_clean(txn: &mut Txn<'_>, id: Id, lease_id: Id) {
    let Some(known) = worker(txn, id) else { return };
    let listed = known.unclean.contains(&lease_id);
    let asked = known.failure.is_some() && known.cleanup_at != 0;
    if !listed && !asked {
        return;
    }
    let mut cleaned = known.clone();
    cleaned.unclean.retain(|other| *other != lease_id);
    let recovered = asked && cleaned.unclean.is_empty();
    if recovered {
        cleaned.failure = None;
        cleaned.cleanup_at = 0;
    }
    update(txn, &known, cleaned);
    if recovered {
        txn.emit("worker.cleaned", id, [("lease", lease_id.to_string())]);
    }
}

/// A cleanup failed: nothing is given to the worker until an operator has it cleaned.
pub(crate) fn fail(txn: &mut Txn<'_>, id: Id, lease_id: Option<Id>, message: &str) {
    let Some(known) = worker(txn, id) else { return };
    let mut failed = known.clone();
    let listed = |lease_id: &Id| failed.unclean.contains(lease_id);
    if let Some(lease_id) = lease_id.filter(|lease_id| !listed(lease_id))
        && failed.unclean.len() < limits::UNCLEAN
    {
        failed.unclean.push(lease_id);
    }
    failed.cleanup_at = 0;
    failed.failure = Some(Hold {
        at: txn.now,
        by: txn.actor.to_string(),
        cause: "cleanup".to_owned(),
        reason: crate::check::cut(message.to_owned(), limits::REASON_MAX),
        lease_id,
        ..Hold::default()
    });
    update(txn, &known, failed);
    txn.emit(
        "worker.failed",
        id,
        [
            ("lease", lease_id.map_or_else(String::new, |id| id.to_string())),
            ("message", message.to_owned()),
        ],
    );
}

/// What the worker has of leases was compared with the ledger in the session with this epoch, and what it
/// must end was told: from now on it may be given work. Makes the node a worker, if it is none.
///
/// # Errors
/// There are too many workers.
pub(crate) fn reconciled(txn: &mut Txn<'_>, id: Id, epoch: u64) -> Result<(), Reject> {
    ensure(txn, id)?;
    change(txn, id, |worker| {
        worker.reconciled_epoch = epoch;
        worker.orphaned = false;
    });
    Ok(())
}

/// The worker; a new one, if the node is none.
pub(super) fn ensure(txn: &mut Txn<'_>, id: Id) -> Result<Worker, Reject> {
    if let Some(known) = worker(txn, id) {
        return Ok(known);
    }
    if count(txn) >= limits::WORKERS {
        return Err(Reject::new(
            Code::TooManyWorkers,
            [&id, &count(txn), &limits::WORKERS],
        ));
    }
    let new = insert(
        txn,
        Worker {
            id,
            registered_at: txn.now,
            ..Worker::default()
        },
    );
    let state = new.lifecycle().as_str().to_owned();
    txn.emit("worker.registered", id, [("lifecycle", state)]);
    Ok(new)
}

/// Changes the facts of a worker, if there is one.
pub(super) fn change(txn: &mut Txn<'_>, id: Id, facts: impl FnOnce(&mut Worker)) {
    let Some(before) = worker(txn, id) else { return };
    let mut after = before.clone();
    facts(&mut after);
    update(txn, &before, after);
}
