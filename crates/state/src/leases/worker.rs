//! What a worker says of its leases: that it takes one, wants it longer, has a result, is clean.
//!
//! Invariant: nothing is accepted under another fence than that of the run's present lease, nor after its end
//! or deadline; every refusal of a stale fence names both. What a worker says at the beginning of a session:
//! `reconcile`.

use super::artifacts::absent;
use super::ends::{self, Ended, begin, close, end_run, note_attempt};
use super::files::check_manifest;
use super::store::{put_lease, put_run};
use super::{
    Accept, Cleaned, Cleanup, EndReason, Finish, Lease, LeaseRef, LeaseState, Outcome, Renew, Run, RunState,
    lease, live_of, run,
};
use crate::actor::Actor;
use crate::dispatch::{Effect, Failure};
use crate::ids::Id;
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{LeasesRenewed, Renewal, Reply};
use crate::tables::{self, Blob};
use crate::txn::Txn;
use crate::{check, fleet, limits};

/// The lease of the worker that asks, with this fence.
fn of_actor(txn: &Txn<'_>, id: Id, fence: u64) -> Result<Lease, Reject> {
    let found = lease(txn, id).ok_or_else(|| Reject::new(Code::NoSuchLease, [&id]))?;
    match txn.actor {
        Actor::Node { device_id, .. } if *device_id == found.worker_id => {}
        _ => return Err(Reject::new(Code::LeaseForeign, [&id])),
    }
    check_fence(&found, fence)?;
    Ok(found)
}

fn check_fence(found: &Lease, fence: u64) -> Result<(), Reject> {
    if found.fence == fence {
        return Ok(());
    }
    let thing = format!("lease {}", found.id);
    Err(Reject::new(Code::FenceStale, [&thing, &found.fence, &fence]))
}

/// The live lease of the worker that asks, with this fence.
pub(super) fn own(txn: &Txn<'_>, id: Id, fence: u64) -> Result<Lease, Reject> {
    let found = of_actor(txn, id, fence)?;
    // Planted: whoever held the run once may still speak for it.
    if !palyra_fault::planted("fence-ignored") {
        is_present(txn, &found, txn.now)?;
    }
    Ok(found)
}

/// Whether what is said under a lease counts at `now`.
fn is_present(r: &dyn Read, found: &Lease, now: u64) -> Result<(), Reject> {
    if found.is_live() && now < found.deadline_at {
        return Ok(());
    }
    // Whoever comes so late that the run is somebody else's is told under which fence.
    if !found.is_live()
        && let Some(newer) = run(r, found.run_id).filter(|run| run.fence > found.fence)
    {
        let thing = format!("run {}", newer.id);
        return Err(Reject::new(
            Code::FenceStale,
            [&thing, &newer.fence, &found.fence],
        ));
    }
    Err(over(found))
}

/// Why nothing more is accepted of a lease.
pub(super) fn over(found: &Lease) -> Reject {
    let why = match found.end_reason() {
        EndReason::None => format!("its deadline was at {}", found.deadline_at),
        reason => reason.as_str().to_owned(),
    };
    Reject::new(Code::LeaseOver, [&found.id, &found.state().as_str(), &why])
}

fn check_epoch(found: &Lease, epoch: u64) -> Result<(), Reject> {
    if found.epoch == epoch {
        return Ok(());
    }
    let thing = format!("lease {}", found.id);
    Err(Reject::new(Code::SessionStale, [&thing, &found.epoch, &epoch]))
}

pub(super) fn accept(txn: &mut Txn<'_>, command: &Accept) -> Result<Reply, Reject> {
    let found = own(txn, command.lease_id, command.fence)?;
    check_epoch(&found, command.epoch)?;
    take(txn, &found);
    Ok(Reply::done())
}

/// The worker has it. Again: changes nothing.
pub(super) fn take(txn: &mut Txn<'_>, found: &Lease) {
    if found.state() != LeaseState::Granted {
        return;
    }
    let mut taken = found.clone();
    taken.set_state(LeaseState::Active);
    taken.accepted_at = txn.now;
    put_lease(txn, Some(found), &taken);
    if let Some(before) = run(txn, found.run_id) {
        let mut runs = before.clone();
        runs.set_state(RunState::Running);
        runs.tried += 1;
        put_run(txn, Some(&before), &runs);
    }
    txn.emit(
        "lease.accepted",
        found.id,
        [
            ("device", found.worker_id.to_string()),
            ("run", found.run_id.to_string()),
            ("attempt", found.attempt.to_string()),
            ("slot", found.slot.to_string()),
            ("fence", found.fence.to_string()),
        ],
    );
}

pub(super) fn renew(txn: &mut Txn<'_>, command: &Renew) -> Result<Reply, Reject> {
    check::count("the list of renewals", command.leases.len(), limits::RENEW_BATCH)?;
    let renewals = command.leases.iter().map(|wish| match renew_one(txn, wish) {
        Ok(deadline_at) => Renewal {
            lease_id: wish.lease_id,
            deadline_at,
            refusal: None,
        },
        Err(reject) => Renewal {
            lease_id: wish.lease_id,
            deadline_at: 0,
            refusal: Some(reject),
        },
    });
    let renewals = renewals.collect();
    Ok(Reply::LeasesRenewed(LeasesRenewed { renewals }))
}

fn renew_one(txn: &mut Txn<'_>, wish: &LeaseRef) -> Result<u64, Reject> {
    let id = wish.lease_id;
    let found = lease(txn, id).ok_or_else(|| Reject::new(Code::NoSuchLease, [&id]))?;
    if found.worker_id != wish.worker_id {
        return Err(Reject::new(Code::LeaseForeign, [&id]));
    }
    check_fence(&found, wish.fence)?;
    is_present(txn, &found, txn.now)?;
    check_epoch(&found, wish.epoch)?;
    let mut longer = found.clone();
    longer.deadline_at = (txn.now + found.ttl).min(found.run_deadline_at);
    longer.renewed_at = txn.now;
    longer.renewals += 1;
    put_lease(txn, Some(&found), &longer);
    Ok(longer.deadline_at)
}

pub(super) fn finish(txn: &mut Txn<'_>, command: &Finish) -> Result<Reply, Reject> {
    let found = own(txn, command.lease_id, command.fence)?;
    check_result(command)?;
    let before = run(txn, found.run_id).ok_or_else(|| Reject::new(Code::NoSuchRun, [&found.run_id]))?;
    let absent = absent(txn, before.id, command.outputs.as_ref());
    if let Some(digest) = absent.first() {
        return Err(Reject::new(Code::OutputMissing, [digest, &before.id]));
    }
    let mut run = before.clone();
    if found.accepted_at == 0 {
        // It counts as an attempt also when the worker would not begin, so that no run is refused for ever.
        run.tried += 1;
    }
    run.usage.clone_from(&command.usage);
    run.sandbox.clone_from(&command.sandbox);
    if gives_back(&run, command) {
        let why = command.error.as_ref().map_or("", |error| error.code.as_str());
        let why = if why.is_empty() {
            command.outcome().as_str()
        } else {
            why
        };
        note_attempt(txn.now, &mut run, &found, why);
        super::artifacts::keep_outputs(txn, &mut run, None);
        run.set_state(RunState::Fenced);
        put_run(txn, Some(&before), &run);
    } else {
        end_with(txn, &before, run, command);
    }
    begin(txn, &found, EndReason::Finished);
    Ok(Reply::done())
}

/// Whether the worker gives the run back without a result, and another attempt follows: it would not begin,
/// or it was stopped in what may be run again.
fn gives_back(run: &Run, command: &Finish) -> bool {
    let may = match command.outcome() {
        Outcome::Succeeded | Outcome::Failed => false,
        Outcome::Refused => true,
        Outcome::Cancelled => run.effect() == Effect::Idempotent,
    };
    may && run.tried < run.max_attempts && run.attempt < limits::RUN_ATTEMPTS_MAX
}

/// Ends a run as its worker says.
fn end_with(txn: &mut Txn<'_>, before: &Run, mut run: Run, command: &Finish) {
    let state = match command.outcome() {
        Outcome::Succeeded => RunState::Succeeded,
        Outcome::Failed => RunState::Failed,
        Outcome::Refused => RunState::Refused,
        Outcome::Cancelled => RunState::Cancelled,
    };
    if state == RunState::Cancelled {
        run.cancelled_by = txn.actor.to_string();
    }
    let blobs = [
        (&tables::RUN_RESULTS, &command.result),
        (&tables::RUN_LOG_TAILS, &command.log_tail),
    ];
    for (table, bytes) in blobs.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
        let bytes = bytes.clone();
        txn.put(table, run.id, &Blob { bytes });
    }
    run.result_size = command.result.len() as u32;
    run.tail_size = command.log_tail.len() as u32;
    run.exit_code = command.exit_code;
    run.outputs.clone_from(&command.outputs);
    let ended = Ended {
        state,
        why: String::new(),
        error: command.error.clone().filter(|_| state != RunState::Succeeded),
    };
    end_run(txn, before, run, ended);
}

fn check_result(command: &Finish) -> Result<(), Reject> {
    let blobs = [
        ("the result", command.result.len(), limits::RUN_RESULT),
        ("the log's last lines", command.log_tail.len(), limits::LOG_TAIL),
    ];
    for (field, size, max) in blobs {
        if size > max {
            let cause = format_args!("it has {size} bytes; the limit is {max}");
            return Err(check::invalid(field, &cause));
        }
    }
    if let Some(Failure { code, message }) = &command.error {
        check::text("the error code", code, limits::REASON_MAX)?;
        if message.len() > limits::ERROR_MESSAGE_MAX {
            let cause = format_args!(
                "it has {} bytes; the limit is {}",
                message.len(),
                limits::ERROR_MESSAGE_MAX
            );
            return Err(check::invalid("the error message", &cause));
        }
    }
    if let Some(outputs) = &command.outputs {
        check_manifest("output", outputs)?;
    }
    check::count("the usage", command.usage.len(), limits::RUN_USAGE)?;
    for name in command.usage.keys() {
        check::filled("the usage", name, limits::SHORT_NAME_MAX)?;
    }
    check::count("the sandbox", command.sandbox.len(), limits::RUN_USAGE)?;
    for word in &command.sandbox {
        check::filled("the sandbox", word, limits::NAME_MAX)?;
    }
    Ok(())
}

pub(super) fn cleaned(txn: &mut Txn<'_>, command: &Cleaned) -> Result<Reply, Reject> {
    if command.message.len() > limits::ERROR_MESSAGE_MAX {
        let cause = format_args!("it has more than {} bytes", limits::ERROR_MESSAGE_MAX);
        return Err(check::invalid("the message", &cause));
    }
    let (id, message) = (command.lease_id, command.message.as_str());
    let Actor::Node { device_id, .. } = txn.actor else {
        return Err(Reject::new(Code::LeaseForeign, [&id]));
    };
    if lease(txn, id).is_none() {
        // Its run was forgotten meanwhile; its worker was not.
        let worker_id = *device_id;
        if !is_unclean(txn, worker_id, id) {
            return Err(Reject::new(Code::NoSuchLease, [&id]));
        }
        tell_fleet(txn, worker_id, id, command.ok, message);
        return Ok(Reply::done());
    }
    let found = of_actor(txn, id, command.fence)?;
    let cleanup = Cleanup {
        at: txn.now,
        ok: command.ok,
        message: check::cut(message.to_owned(), limits::REASON_MAX),
        removed_files: command.removed_files,
        removed_bytes: command.removed_bytes,
        by: txn.actor.to_string(),
    };
    note_cleanup(txn, &found, cleanup);
    Ok(Reply::done())
}

/// Whether the fleet waits for this worker's word that this lease is clean.
pub(super) fn is_unclean(r: &dyn Read, worker_id: Id, lease_id: Id) -> bool {
    fleet::worker(r, worker_id).is_some_and(|worker| worker.unclean.contains(&lease_id))
}

/// Notes what a worker says of the cleanup. A lease that had not begun to end does so: nothing of it runs.
pub(super) fn note_cleanup(txn: &mut Txn<'_>, found: &Lease, cleanup: Cleanup) {
    let (ok, message) = (cleanup.ok, cleanup.message.clone());
    let found = if found.is_live() {
        ends::fence(txn, found, EndReason::WorkerRestarted)
    } else {
        found.clone()
    };
    if found.cleanup.as_ref().is_some_and(|known| known.ok) {
        // It was clean before. What is said again changes nothing, and what is said against it is not
        // believed of this lease.
        if !ok {
            tell_fleet(txn, found.worker_id, found.id, false, &message);
        }
        return;
    }
    let mut noted = found.clone();
    noted.cleanup = Some(cleanup);
    put_lease(txn, Some(&found), &noted);
    if found.state() == LeaseState::Ending && ok {
        close(txn, &noted);
    } else {
        txn.emit(
            "lease.cleaned",
            found.id,
            [
                ("device", found.worker_id.to_string()),
                ("run", found.run_id.to_string()),
                ("fence", found.fence.to_string()),
                ("ok", ok.to_string()),
                ("message", message.clone()),
            ],
        );
        tell_fleet(txn, found.worker_id, found.id, ok, &message);
    }
}

/// Takes an operator's word for the leases of a worker whose cleanup failed: nothing of them is left.
pub(crate) fn vouch(txn: &mut Txn<'_>, worker_id: Id, reason: &str) {
    for found in live_of(txn, worker_id) {
        let failed = found.cleanup.as_ref().is_some_and(|cleanup| !cleanup.ok);
        if found.state() != LeaseState::Ending || !failed {
            continue;
        }
        let mut noted = found.clone();
        noted.cleanup = Some(Cleanup {
            at: txn.now,
            ok: true,
            message: check::cut(reason.to_owned(), limits::REASON_MAX),
            by: txn.actor.to_string(),
            ..Cleanup::default()
        });
        put_lease(txn, Some(&found), &noted);
        close(txn, &noted);
    }
}

/// Clean: it may be given work again. Not clean: it fails closed.
pub(super) fn tell_fleet(txn: &mut Txn<'_>, worker_id: Id, lease_id: Id, ok: bool, message: &str) {
    if ok {
        fleet::note_clean(txn, worker_id, lease_id);
        super::select::fill(txn, worker_id);
    } else {
        fleet::fail(txn, worker_id, Some(lease_id), message);
    }
}
