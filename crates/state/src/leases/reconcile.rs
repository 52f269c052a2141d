//! The beginning of a worker's session: what it has of leases, and what the ledger has, become one.
//!
//! | the ledger has | the worker runs it, or has a result | it is clean | something is left | it does not name it |
//! | - | - | - | - | - |
//! | live, deadline ahead | goes on in this session | ended, clean | ending; the worker fails | ended: nothing runs |
//! | ending | must end | ended, clean | ending; the worker fails | ended |
//! | ended, or deadline past | must end | clean | the worker fails | - |
//! | another worker's, or another fence | must end | - | the worker fails | - |
//! | nothing | must end | clean | the worker fails | - |
//!
//! What was ended without the worker's word that it is clean is named to it as `unclean`; it gets work when
//! it has said so.

use std::collections::BTreeMap;

use super::store::put_lease;
use super::worker::{is_unclean, note_cleanup, take, tell_fleet};
use super::{
    Cleanup, EndReason, Held, HeldState, Lease, LeaseState, Reconcile, ends, lease, live_of, select,
};
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{MustEnd, Reconciled, Reply};
use crate::txn::Txn;
use crate::{check, fleet, limits, nodes};

/// A lease that the ledger does not know.
const UNKNOWN: &str = "unknown";
/// Another worker's.
const FOREIGN: &str = "foreign";
/// The worker has another fence.
const FENCE_STALE: &str = "fence_stale";
/// It ended without the worker's word that it is clean.
pub(super) const UNCLEAN: &str = "unclean";

pub(super) fn reconcile(txn: &mut Txn<'_>, command: &Reconcile) -> Result<Reply, Reject> {
    let worker_id = command.worker_id;
    check::count("the list of leases", command.held.len(), limits::LEASES_HELD)?;
    for held in &command.held {
        check::text(
            "what is said of a lease",
            &held.message,
            limits::ERROR_MESSAGE_MAX,
        )?;
    }
    let session = nodes::node(txn, worker_id)
        .and_then(|node| node.session)
        .unwrap_or_default();
    if session.epoch == 0 || session.epoch != command.epoch {
        let thing = format!("worker {worker_id}");
        return Err(Reject::new(
            Code::SessionStale,
            [&thing, &session.epoch, &command.epoch],
        ));
    }
    let held: BTreeMap<Id, &Held> = command.held.iter().map(|held| (held.lease_id, held)).collect();
    let mut answer = Reconciled::default();
    // First what is over anyway, so that it is not taken for live.
    for found in live_of(txn, worker_id) {
        if txn.now >= found.deadline_at {
            ends::expire_lease(txn, &found);
        }
    }
    for held in held.values() {
        compare(txn, worker_id, held, &mut answer);
    }
    for found in live_of(txn, worker_id) {
        let known = held.get(&found.id).is_some_and(|held| held.fence == found.fence);
        if known {
            rebind(txn, &found, &session);
        } else {
            not_held(txn, &found);
        }
    }
    name_unclean(txn, worker_id, &mut answer);
    // Said again in the same session it changes nothing but what has rows of its own.
    let first = fleet::worker(txn, worker_id)
        .is_none_or(|worker| worker.reconciled_epoch != command.epoch || worker.orphaned);
    if first {
        fleet::reconciled(txn, worker_id, command.epoch)?;
        txn.emit(
            "lease.reconciled",
            worker_id,
            [
                ("device", worker_id.to_string()),
                ("epoch", command.epoch.to_string()),
                ("held", command.held.len().to_string()),
                ("kept", answer.keep.len().to_string()),
                ("end", answer.end.len().to_string()),
            ],
        );
    }
    select::fill(txn, worker_id);
    Ok(Reply::Reconciled(answer))
}

/// One lease that the worker has something of.
fn compare(txn: &mut Txn<'_>, worker_id: Id, held: &Held, answer: &mut Reconciled) {
    let runs = matches!(held.state(), HeldState::Running | HeldState::Finished);
    let mut must_end = |reason: &str| {
        answer.end.push(MustEnd {
            lease_id: held.lease_id,
            fence: held.fence,
            reason: reason.to_owned(),
        });
    };
    let known = lease(txn, held.lease_id);
    let strange = match &known {
        None => Some(UNKNOWN),
        Some(found) if found.worker_id != worker_id => Some(FOREIGN),
        Some(found) if found.fence != held.fence => Some(FENCE_STALE),
        Some(_) => None,
    };
    match (known, strange) {
        (Some(found), None) if runs && found.is_live() => {
            take(txn, &found);
            answer.keep.push(found.id);
        }
        (Some(found), None) if runs => must_end(found.end_reason().as_str()),
        (Some(found), None) => {
            let cleanup = Cleanup {
                at: txn.now,
                ok: held.state() == HeldState::Cleaned,
                message: check::cut(held.message.clone(), limits::REASON_MAX),
                by: txn.actor.to_string(),
                ..Cleanup::default()
            };
            note_cleanup(txn, &found, cleanup);
        }
        (_, Some(reason)) if runs => must_end(reason),
        (_, _) if held.state() == HeldState::Unclean => {
            tell_fleet(txn, worker_id, held.lease_id, false, &held.message);
        }
        // Nobody waits for that word, unless the ledger has forgotten the lease and the fleet has not.
        (_, _) if is_unclean(txn, worker_id, held.lease_id) => {
            tell_fleet(txn, worker_id, held.lease_id, true, "");
        }
        (_, _) => {}
    }
}

/// It goes on in the new session, or ends in it.
fn rebind(txn: &mut Txn<'_>, found: &Lease, session: &nodes::Session) {
    if found.epoch == session.epoch {
        return;
    }
    let mut bound = found.clone();
    bound.epoch = session.epoch;
    bound.replica_id = session.replica_id;
    put_lease(txn, Some(found), &bound);
    txn.emit(
        "lease.rebound",
        found.id,
        [
            ("device", found.worker_id.to_string()),
            ("run", found.run_id.to_string()),
            ("fence", found.fence.to_string()),
            ("epoch", bound.epoch.to_string()),
            ("replica", bound.replica_id.to_string()),
        ],
    );
}

/// The worker is here and says nothing of it: nothing of it runs, so that its deadline need not be waited
/// for. One that it had taken may have left something; one that it had not has not.
fn not_held(txn: &mut Txn<'_>, found: &Lease) {
    let mut ending = if found.state() == LeaseState::Ending {
        found.clone()
    } else {
        ends::fence(txn, found, EndReason::WorkerRestarted)
    };
    if ending.accepted_at == 0 && ending.cleanup.is_none() {
        ending.cleanup = Some(Cleanup {
            at: txn.now,
            ok: true,
            message: "it was never taken".to_owned(),
            by: txn.actor.to_string(),
            ..Cleanup::default()
        });
    }
    if ending.state() == LeaseState::Ending {
        ends::close(txn, &ending);
    }
}

/// Names what the fleet waits for, as far as it was not named already.
fn name_unclean(txn: &Txn<'_>, worker_id: Id, answer: &mut Reconciled) {
    let unclean = fleet::worker(txn, worker_id)
        .map(|worker| worker.unclean)
        .unwrap_or_default();
    for lease_id in unclean {
        if answer.end.iter().any(|named| named.lease_id == lease_id) {
            continue;
        }
        answer.end.push(MustEnd {
            lease_id,
            fence: lease(txn, lease_id).map_or(0, |lease| lease.fence),
            reason: UNCLEAN.to_owned(),
        });
    }
}
