//! What time and a new policy do to workers: batches that the leader proposes, each bounded by what it ends.
//!
//! Invariants: whoever is not due, or was checked already, is left alone, so that a batch may be proposed
//! twice.

use prost::Message as _;

use super::follow::{change, say_forgotten};
use super::rules::hold_back;
use super::store::{by_lifecycle, delete, policy as present, worker};
use super::{Attested, Lapse, Lifecycle, Policy, Reap, Recheck, Statement, Worker, verify};
use crate::ids::Id;
use crate::leases::{self, EndReason};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{Counted, Reply};
use crate::txn::Txn;
use crate::{check, limits};

pub(super) fn lapse(txn: &mut Txn<'_>, command: &Lapse) -> Result<Reply, Reject> {
    check::count("the list of workers", command.ids.len(), limits::LAPSE_BATCH)?;
    let (mut count, mut ended) = (0, 0);
    for id in &command.ids {
        // One worker may have many leases, and one entry does not end those of many workers.
        if ended >= limits::EXPIRE_BATCH as u32 {
            break;
        }
        let now = txn.now;
        let Some(due) = worker(txn, *id).filter(|found| found.due_at != 0 && found.due_at <= now) else {
            continue;
        };
        count += 1;
        ended += lapse_one(txn, &due);
    }
    Ok(Reply::Counted(Counted { count }))
}

/// Does what is due of one worker; how many leases that ended.
fn lapse_one(txn: &mut Txn<'_>, due: &Worker) -> u32 {
    let (id, now) = (due.id, txn.now);
    let mut ended = 0;
    if due
        .attested
        .as_ref()
        .is_some_and(|known| known.policy_version != 0 && now >= known.expires_at)
    {
        txn.emit(
            "worker.statement_expired",
            id,
            [("index", index_of(due).to_string())],
        );
    }
    if due
        .drain
        .as_ref()
        .is_some_and(|drain| !drain.over && now >= drain.until)
    {
        ended += leases::end_all(txn, id, EndReason::Drained);
        change(txn, id, |worker| {
            if let Some(drain) = worker.drain.as_mut() {
                drain.over = true;
            }
        });
        txn.emit("worker.drained", id, [("leases_ended", ended.to_string())]);
    }
    if due.lost_at != 0 && now >= due.lost_at {
        let held = leases::is_held(txn, id);
        let lost = leases::end_all(txn, id, EndReason::WorkerLost);
        change(txn, id, |worker| {
            worker.lost_at = 0;
            worker.orphaned |= held;
        });
        txn.emit(
            "worker.lost",
            id,
            [
                ("away_since", due.away_since.to_string()),
                ("orphaned", held.to_string()),
                ("leases_ended", lost.to_string()),
            ],
        );
        ended += lost;
    }
    // An end of the statement is seen by every writing of the record.
    change(txn, id, |_| {});
    ended
}

/// Log index of the statement that counts.
fn index_of(worker: &Worker) -> u64 {
    worker.attested.as_ref().map_or(0, |attested| attested.index)
}

pub(super) fn recheck(txn: &mut Txn<'_>, command: &Recheck) -> Result<Reply, Reject> {
    check::count("the list of workers", command.ids.len(), limits::RECHECK_BATCH)?;
    let Some(policy) = present(txn) else {
        return Ok(Reply::Counted(Counted { count: 0 }));
    };
    let (mut count, mut ended) = (0, 0);
    for id in &command.ids {
        if ended >= limits::EXPIRE_BATCH as u32 {
            break;
        }
        let unchecked = worker(txn, *id).and_then(|found| {
            let attested = found.attested?;
            let behind = attested.policy_version != 0 && attested.policy_version < policy.version;
            behind.then_some(attested)
        });
        let Some(attested) = unchecked else { continue };
        count += 1;
        let outcome = Statement::decode(attested.statement.clone())
            .map_err(|_| Reject::new(Code::StatementMalformed, [id, &"it does not decode"]))
            .and_then(|statement| verify::hold(txn.now, *id, &policy, &statement));
        match outcome {
            Ok(passed) => keep(txn, *id, policy.version, passed),
            Err(fault) => ended += hold_back(txn, *id, "digest_drift", &fault.to_string(), None),
        }
    }
    Ok(Reply::Counted(Counted { count }))
}

/// A statement holds under a new policy too.
fn keep(txn: &mut Txn<'_>, id: Id, version: u64, passed: verify::Passed) {
    txn.emit("worker.rechecked", id, [("policy_version", version.to_string())]);
    change(txn, id, |worker| {
        if let Some(attested) = worker.attested.as_mut() {
            attested.policy_version = version;
            attested.slots = passed.slots;
            attested.expires_at = passed.expires_at;
        }
    });
    leases::fill(txn, id);
}

/// How many admitted workers would not be under this policy: for what only asks. Reads them all, and checks
/// up to two signatures of each.
#[must_use]
pub fn unmet(r: &dyn Read, now: u64, asked: &Policy) -> u64 {
    let fails = |found: &Worker| {
        let counts = |attested: &&Attested| attested.policy_version != 0;
        found.attested.as_ref().filter(counts).is_some_and(|attested| {
            let statement = Statement::decode(attested.statement.clone()).unwrap_or_default();
            verify::hold(now, found.id, asked, &statement).is_err()
        })
    };
    let mut after = None;
    let mut count = 0;
    loop {
        let page = super::workers(r, after, limits::PAGE);
        let Some(last) = page.last() else { return count };
        after = Some(last.id);
        count += page.iter().filter(|found| fails(found)).count() as u64;
    }
}

pub(super) fn reap(txn: &mut Txn<'_>, command: &Reap) -> Result<Reply, Reject> {
    let age = match command.older_than_ms {
        0 => limits::REAP_AFTER,
        asked => asked,
    };
    let now = txn.now;
    let old = |found: &Worker| {
        let away = found.away_since != 0 && found.away_since.saturating_add(age) <= now;
        away && found.slots_used == 0 && found.unclean.is_empty()
    };
    // Those that are failed or quarantined are no offline ones: what holds them must not be forgotten.
    let offline = by_lifecycle(txn, Lifecycle::Offline, None, limits::WORKERS as usize);
    let mut count = 0;
    for found in offline
        .iter()
        .filter(|found| old(found))
        .take(limits::LAPSE_BATCH)
    {
        delete(txn, found);
        say_forgotten(txn, found, "reaped");
        count += 1;
    }
    Ok(Reply::Counted(Counted { count }))
}
