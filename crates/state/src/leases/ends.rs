//! How leases end, and what becomes of their runs.
//!
//! Two steps: [`begin`], after which nothing of the lease is accepted but the report of the cleanup, and
//! [`close`], which frees the slot and lets the run go on. Between them lies the cleanup, or the rest of the
//! time until the deadline: before that the worker may still run it. Invariants: a lease is closed when its
//! worker says that it is clean or knows nothing of it, or when its deadline has passed; the run of a lease
//! that was begun to end has ended, or is `fenced` or `cancelling` until it is closed.

use super::store::{put_lease, put_run};
use super::{
    Attempt, CancelRun, EndReason, Expire, Lease, LeaseState, RevokeLease, Run, RunState, artifacts, lease,
    live_of, run, select,
};
use crate::dispatch::{Effect, Failure};
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{Counted, Reply};
use crate::txn::Txn;
use crate::{check, fleet, limits};

/// What is said of a run that no worker began.
const NOT_BEGUN: &str = "not_begun";

/// How a run ends.
#[derive(Default)]
pub(super) struct Ended {
    pub(super) state: RunState,
    /// Word for the journal.
    pub(super) why: String,
    pub(super) error: Option<Failure>,
}

/// Ends a run. `run` has whatever else changed, `before` is what is stored.
pub(super) fn end_run(txn: &mut Txn<'_>, before: &Run, mut run: Run, ended: Ended) {
    run.set_state(ended.state);
    run.ended_at = txn.now;
    if ended.error.is_some() {
        run.error = ended.error;
    }
    let outputs = run.outputs.clone();
    artifacts::keep_outputs(txn, &mut run, outputs.as_ref());
    put_run(txn, Some(before), &run);
    let error = run.error.as_ref().map_or("", |error| error.code.as_str());
    txn.emit(
        "run.finished",
        run.id,
        [
            ("state", run.state().as_str().to_owned()),
            (
                "device",
                run.worker_id.map_or_else(String::new, |id| id.to_string()),
            ),
            ("tool", run.tool.clone()),
            ("attempt", number(u64::from(run.attempt))),
            ("fence", number(run.fence)),
            (
                "lease",
                run.lease_id.map_or_else(String::new, |id| id.to_string()),
            ),
            (
                "exit_code",
                run.exit_code.map_or_else(String::new, |code| code.to_string()),
            ),
            ("error", error.to_owned()),
            ("why", ended.why),
        ],
    );
}

fn number(value: u64) -> String {
    if value == 0 {
        String::new()
    } else {
        value.to_string()
    }
}

/// Begins the end of a lease that has not begun to end. Its run is dealt with by the caller, or here with
/// [`fence`].
pub(super) fn begin(txn: &mut Txn<'_>, found: &Lease, reason: EndReason) -> Lease {
    let mut ending = found.clone();
    ending.set_state(LeaseState::Ending);
    ending.end_reason = reason as i32;
    ending.ended_by = txn.actor.to_string();
    ending.ending_at = txn.now;
    put_lease(txn, Some(found), &ending);
    txn.emit(
        "lease.ending",
        found.id,
        [
            ("device", found.worker_id.to_string()),
            ("run", found.run_id.to_string()),
            ("reason", reason.as_str().to_owned()),
            ("slot", found.slot.to_string()),
            ("fence", found.fence.to_string()),
            ("deadline_at", found.deadline_at.to_string()),
        ],
    );
    ending
}

/// Begins the end of a lease without a result: its run waits until the fence is past. One whose deadline has
/// passed is closed at once.
pub(super) fn fence(txn: &mut Txn<'_>, found: &Lease, reason: EndReason) -> Lease {
    let ending = begin(txn, found, reason);
    if let Some(before) = run(txn, found.run_id).filter(|run| !run.state().is_terminal()) {
        let mut fenced = before.clone();
        note_attempt(txn.now, &mut fenced, found, reason.as_str());
        artifacts::keep_outputs(txn, &mut fenced, None);
        let late = reason == EndReason::RunDeadline || txn.now >= fenced.deadline_at;
        if reason == EndReason::Cancelled {
            fenced.set_state(RunState::Cancelling);
            put_run(txn, Some(&before), &fenced);
        } else if late {
            let ended = Ended {
                state: RunState::TimedOut,
                why: reason.as_str().to_owned(),
                ..Ended::default()
            };
            end_run(txn, &before, fenced, ended);
        } else {
            fenced.set_state(RunState::Fenced);
            put_run(txn, Some(&before), &fenced);
        }
    }
    if txn.now >= ending.deadline_at {
        return close(txn, &ending);
    }
    ending
}

/// Notes an attempt that ended without ending its run.
pub(super) fn note_attempt(now: u64, run: &mut Run, found: &Lease, why: &str) {
    run.attempts.push(Attempt {
        number: found.attempt,
        lease_id: found.id,
        worker_id: found.worker_id,
        fence: found.fence,
        leased_at: found.granted_at,
        ended_at: now,
        why: check::cut(why.to_owned(), limits::ATTEMPT_MESSAGE),
    });
}

/// Whether a run whose lease ends without a result may be leased again.
///
/// What was never taken ran nothing: it goes to another worker, whatever its effect, until offers have been
/// made too often. What a worker began goes again only when it is idempotent and has attempts left.
fn goes_again(run: &Run, found: &Lease) -> bool {
    if run.attempt >= limits::RUN_ATTEMPTS_MAX {
        return false;
    }
    found.accepted_at == 0 || (run.effect() == Effect::Idempotent && run.tried < run.max_attempts)
}

/// Frees the slot of a lease that is ending, and lets its run go on. Without a report that it is clean, its
/// worker gets nothing until there is one.
pub(super) fn close(txn: &mut Txn<'_>, found: &Lease) -> Lease {
    let clean = found.cleanup.as_ref().is_some_and(|cleanup| cleanup.ok);
    let mut over = found.clone();
    over.set_state(LeaseState::Ended);
    over.ended_at = txn.now;
    put_lease(txn, Some(found), &over);
    txn.emit(
        "lease.ended",
        over.id,
        [
            ("device", over.worker_id.to_string()),
            ("run", over.run_id.to_string()),
            ("reason", over.end_reason().as_str().to_owned()),
            ("slot", over.slot.to_string()),
            ("fence", over.fence.to_string()),
            ("clean", clean.to_string()),
        ],
    );
    let waits = settle(txn, &over);
    if clean {
        fleet::note_clean(txn, over.worker_id, over.id);
    } else {
        fleet::note_unclean(txn, over.worker_id, over.id);
    }
    fleet::free_slot(txn, over.worker_id);
    // The worker first: it takes the oldest that waits, which may be another one.
    select::fill(txn, over.worker_id);
    if waits {
        select::place(txn, over.run_id);
    }
    over
}

/// What becomes of a run whose fence is past. Whether it waits for a worker.
fn settle(txn: &mut Txn<'_>, over: &Lease) -> bool {
    let Some(before) = run(txn, over.run_id) else {
        return false;
    };
    let after = before.clone();
    let why = over.end_reason().as_str().to_owned();
    let ended = |state, error| Ended { state, why, error };
    match before.state() {
        RunState::Cancelling => end_run(txn, &before, after, ended(RunState::Cancelled, None)),
        RunState::Fenced if txn.now >= before.deadline_at => {
            end_run(txn, &before, after, ended(RunState::TimedOut, None));
        }
        // That a worker gave it back was weighed when it did.
        RunState::Fenced if over.end_reason() == EndReason::Finished || goes_again(&before, over) => {
            requeue(txn, &before, over);
            return true;
        }
        RunState::Fenced if over.accepted_at == 0 => {
            let error = Failure {
                code: NOT_BEGUN.to_owned(),
                message: format!("{} offers were not taken", before.attempt),
            };
            end_run(txn, &before, after, ended(RunState::Refused, Some(error)));
        }
        RunState::Fenced => end_run(txn, &before, after, ended(RunState::Lost, None)),
        _ => {}
    }
    false
}

fn requeue(txn: &mut Txn<'_>, before: &Run, over: &Lease) {
    let mut waits = before.clone();
    waits.set_state(RunState::Queued);
    put_run(txn, Some(before), &waits);
    txn.emit(
        "run.requeued",
        waits.id,
        [
            ("device", over.worker_id.to_string()),
            ("lease", over.id.to_string()),
            ("attempt", over.attempt.to_string()),
            ("fence", over.fence.to_string()),
            ("why", over.end_reason().as_str().to_owned()),
        ],
    );
}

/// Begins the end of all leases of a worker that have not begun to end; says how many.
pub(crate) fn end_all(txn: &mut Txn<'_>, worker_id: Id, reason: EndReason) -> u32 {
    let live = live_of(txn, worker_id);
    let mut count = 0;
    for found in live.iter().filter(|lease| lease.is_live()) {
        fence(txn, found, reason);
        count += 1;
    }
    count
}

/// Takes a run back that has not ended.
fn cancel_run(txn: &mut Txn<'_>, found: &Run, reason: &str) {
    let mut taken = found.clone();
    taken.reason = reason.to_owned();
    taken.cancelled_by = txn.actor.to_string();
    match found.state() {
        RunState::AwaitingInput | RunState::Queued => {
            let ended = Ended {
                state: RunState::Cancelled,
                ..Ended::default()
            };
            end_run(txn, found, taken, ended);
        }
        RunState::Leased | RunState::Running => {
            put_run(txn, Some(found), &taken);
            say_cancelling(txn, &taken);
            if let Some(lease) = found.lease_id.and_then(|id| lease(txn, id)) {
                fence(txn, &lease, EndReason::Cancelled);
            }
        }
        RunState::Fenced => {
            taken.set_state(RunState::Cancelling);
            put_run(txn, Some(found), &taken);
            say_cancelling(txn, &taken);
        }
        // It is asked for already, or over.
        _ => {}
    }
}

fn say_cancelling(txn: &mut Txn<'_>, taken: &Run) {
    txn.emit(
        "run.cancelling",
        taken.id,
        [
            (
                "device",
                taken.worker_id.map_or_else(String::new, |id| id.to_string()),
            ),
            (
                "lease",
                taken.lease_id.map_or_else(String::new, |id| id.to_string()),
            ),
            ("fence", taken.fence.to_string()),
            ("reason", taken.reason.clone()),
        ],
    );
}

pub(super) fn cancel(txn: &mut Txn<'_>, command: &CancelRun) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.run_id;
    let found = run(txn, id).ok_or_else(|| Reject::new(Code::NoSuchRun, [&id]))?;
    if found.state().is_terminal() {
        return Err(Reject::new(Code::RunEnded, [&id, &found.state().as_str()]));
    }
    cancel_run(txn, &found, &command.reason);
    Ok(Reply::done())
}

/// Takes the run of a grant back, if it has not ended.
pub(crate) fn cancel_by_grant(txn: &mut Txn<'_>, run_id: Id, reason: &str) {
    if let Some(found) = run(txn, run_id) {
        cancel_run(txn, &found, reason);
    }
}

pub(super) fn revoke(txn: &mut Txn<'_>, command: &RevokeLease) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.lease_id;
    let found = lease(txn, id).ok_or_else(|| Reject::new(Code::NoSuchLease, [&id]))?;
    if !found.is_live() {
        return Err(super::worker::over(&found));
    }
    let ending = fence(txn, &found, EndReason::Revoked);
    if !command.reason.is_empty() {
        txn.emit(
            "lease.revoked",
            id,
            [
                ("device", ending.worker_id.to_string()),
                ("run", ending.run_id.to_string()),
                ("fence", ending.fence.to_string()),
                ("reason", command.reason.clone()),
            ],
        );
    }
    Ok(Reply::done())
}

/// Ends a lease whose deadline has passed, whatever it was doing.
pub(super) fn expire_lease(txn: &mut Txn<'_>, found: &Lease) {
    if found.is_live() {
        let reason = if txn.now >= found.run_deadline_at {
            EndReason::RunDeadline
        } else {
            EndReason::Expired
        };
        fence(txn, found, reason);
    } else if found.state() == LeaseState::Ending {
        close(txn, found);
    }
}

/// Ends a run whose deadline has passed. Its lease's has, too, for it is never later.
fn expire_run(txn: &mut Txn<'_>, found: &Run) {
    match found.state() {
        RunState::AwaitingInput | RunState::Queued => {
            let ended = Ended {
                state: RunState::TimedOut,
                why: found.state().as_str().to_owned(),
                ..Ended::default()
            };
            end_run(txn, found, found.clone(), ended);
        }
        _ => {
            if let Some(held) = found.lease_id.and_then(|id| lease(txn, id)) {
                expire_lease(txn, &held);
            }
        }
    }
}

pub(super) fn expire(txn: &mut Txn<'_>, command: &Expire) -> Result<Reply, Reject> {
    check::count("the list of leases", command.leases.len(), limits::EXPIRE_BATCH)?;
    check::count("the list of runs", command.runs.len(), limits::EXPIRE_BATCH)?;
    let mut count = 0;
    for id in &command.leases {
        // Planted: what whoever sweeps names is ended, renewed meanwhile or not.
        let believed = palyra_fault::planted("sweeper-decides");
        let due = |lease: &Lease| !lease.is_over() && (believed || txn.now >= lease.deadline_at);
        if let Some(found) = lease(txn, *id).filter(due) {
            expire_lease(txn, &found);
            count += 1;
        }
    }
    for id in &command.runs {
        let due = |run: &Run| !run.state().is_terminal() && txn.now >= run.deadline_at;
        if let Some(found) = run(txn, *id).filter(due) {
            expire_run(txn, &found);
            count += 1;
        }
    }
    Ok(Reply::Counted(Counted { count }))
}
