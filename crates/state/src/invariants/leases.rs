//! Rules about runs, leases, their files, and their indexes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Findings, all, keys};
use crate::apply::Applied;
use crate::command::{Command, Envelope};
use crate::dispatch::Effect;
use crate::fleet;
use crate::ids::{Digest, Id};
use crate::leases::{self, Action, EndReason, Lease, LeaseState, Run, RunState, Totals};
use crate::read::Read;
use crate::reply::Reply;
use crate::tables::{self, Present, Table};
use crate::{limits, meta};

/// Keys that an index should have.
type Keys = BTreeSet<Vec<u8>>;

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    let runs = all(r, &tables::RUNS);
    let leases = all(r, &tables::LEASES);
    for run in &runs {
        check_run(r, run, findings);
    }
    for lease in &leases {
        check_lease(r, lease, findings);
    }
    runs_are_indexed(r, &runs, findings);
    leases_are_indexed(r, &leases, findings);
    slots_are_exclusive(r, &leases, findings);
    files_are_counted(r, &runs, findings);
    everything_is_counted(r, &runs, &leases, findings);
    no_slot_is_kept_back(r, &runs, findings);
}

fn check_run(r: &dyn Read, run: &Run, findings: &mut Findings) {
    let name = || format!("run {} in state {}", run.id, run.state().as_str());
    let state = run.state();
    let held = run.lease_id.and_then(|id| leases::lease(r, id));
    let lease = held.as_ref().map(Lease::state);
    let fits = match state {
        RunState::AwaitingInput => run.lease_id.is_none(),
        RunState::Queued => lease.is_none_or(|lease| lease == LeaseState::Ended),
        RunState::Leased => lease == Some(LeaseState::Granted),
        RunState::Running => lease == Some(LeaseState::Active),
        RunState::Fenced | RunState::Cancelling => lease == Some(LeaseState::Ending),
        _ => lease.is_none_or(|lease| matches!(lease, LeaseState::Ending | LeaseState::Ended)),
    };
    findings.expect("a run is where its lease is", fits, || {
        format!("{}, lease {lease:?}", name())
    });
    findings.expect(
        "an ended run has its time",
        state.is_terminal() == (run.ended_at != 0),
        name,
    );
    let files = leases::missing(r, run).is_empty();
    let begins = state == RunState::AwaitingInput || (state.is_terminal() && run.attempt == 0);
    findings.expect("a run begins with its files", files || begins, name);
    let attempts = run.tried <= run.max_attempts && run.attempt <= limits::RUN_ATTEMPTS_MAX;
    findings.expect("attempts are bounded", attempts && run.tried <= run.attempt, name);
    let taken = leases::leases_of_run(r, run.id)
        .iter()
        .filter(|lease| lease.accepted_at != 0)
        .count();
    let once = run.effect() != Effect::Once || taken <= 1;
    findings.expect("once work is begun at most once", once, name);
    let newest = held.is_none_or(|lease| lease.fence == run.fence && lease.attempt == run.attempt);
    findings.expect("a run names its newest lease", newest, name);
    let size = |blob: Option<bytes::Bytes>| blob.map_or(0, |bytes| bytes.len());
    let sizes = [
        size(leases::params(r, run.id)),
        size(leases::result(r, run.id)),
        size(leases::log_tail(r, run.id)),
    ];
    let said = [run.params_size, run.result_size, run.tail_size].map(|size| size as usize);
    findings.equal("what a run keeps has its size", &name(), sizes, said);
    if let Some(outputs) = &run.outputs {
        let there = |digest: &Digest| leases::artifact(r, run.id, *digest).is_some_and(|file| file.complete);
        findings.expect(
            "results come with their files",
            outputs.stored().keys().all(there),
            name,
        );
    }
}

fn check_lease(r: &dyn Read, lease: &Lease, findings: &mut Findings) {
    let name = || format!("lease {} in state {}", lease.id, lease.state().as_str());
    let state = lease.state();
    findings.expect(
        "an end has its reason and its times",
        lease.is_live() == (lease.end_reason() == EndReason::None)
            && lease.is_live() == (lease.ending_at == 0)
            && lease.is_over() == (lease.ended_at != 0),
        name,
    );
    findings.expect(
        "deadlines are bounded",
        lease.deadline_at <= lease.run_deadline_at,
        name,
    );
    let taken = state != LeaseState::Active || lease.accepted_at != 0;
    findings.expect("an active lease was taken", taken, name);
    findings.expect(
        "a lease has its run",
        leases::run(r, lease.run_id).is_some(),
        name,
    );
    if lease.is_over() {
        return;
    }
    let present = leases::run(r, lease.run_id).is_some_and(|run| run.lease_id == Some(lease.id));
    findings.expect("a run has at most one live lease", present, name);
    let known = fleet::worker(r, lease.worker_id);
    let trusted = known
        .as_ref()
        .is_some_and(|worker| worker.quarantine.is_none() && !worker.barred);
    findings.expect(
        "who is not trusted has no live lease",
        trusted || !lease.is_live(),
        name,
    );
}

fn runs_are_indexed(r: &dyn Read, runs: &[Run], findings: &mut Findings) {
    let of = |keep: &dyn Fn(&Run) -> bool, key: &dyn Fn(&Run) -> Vec<u8>| -> Keys {
        runs.iter()
            .filter(|run| keep(run))
            .map(|run| key(run)[1..].to_vec())
            .collect()
    };
    let is_queued = |run: &Run| run.state() == RunState::Queued;
    let is_open = |run: &Run| !run.state().is_terminal();
    let is_ended = |run: &Run| run.state().is_terminal();
    let queued = of(&is_queued, &|run| tables::RUNS_QUEUED.key(leases::queue_key(run)));
    indexed(r, &tables::RUNS_QUEUED, &queued, findings);
    let by_state = of(&|_| true, &|run| {
        tables::RUNS_BY_STATE.key((run.state as u32, run.id))
    });
    indexed(r, &tables::RUNS_BY_STATE, &by_state, findings);
    let due = of(&is_open, &|run| tables::RUNS_DUE.key((run.deadline_at, run.id)));
    indexed(r, &tables::RUNS_DUE, &due, findings);
    let ended = of(&is_ended, &|run| tables::RUNS_ENDED.key((run.ended_at, run.id)));
    indexed(r, &tables::RUNS_ENDED, &ended, findings);
    let oldest = leases::totals(r).ended_oldest;
    findings.expect(
        "forgetting begins at the oldest",
        runs.iter()
            .filter(|run| is_ended(run))
            .all(|run| run.ended_at >= oldest),
        || format!("some ended before {oldest}"),
    );
}

fn leases_are_indexed(r: &dyn Read, leases: &[Lease], findings: &mut Findings) {
    let of = |keep: &dyn Fn(&Lease) -> bool, key: &dyn Fn(&Lease) -> Vec<u8>| -> Keys {
        let kept = leases.iter().filter(|lease| keep(lease));
        kept.map(|lease| key(lease)[1..].to_vec()).collect()
    };
    let is_open = |lease: &Lease| !lease.is_over();
    let due = of(&is_open, &|lease| {
        tables::LEASES_DUE.key((lease.deadline_at, lease.id))
    });
    indexed(r, &tables::LEASES_DUE, &due, findings);
    let of_runs = of(&|_| true, &|lease| {
        tables::LEASES_OF.key((lease.run_id, lease.id))
    });
    indexed(r, &tables::LEASES_OF, &of_runs, findings);
    let ended = of(&Lease::is_over, &|lease| {
        tables::LEASES_ENDED.key((lease.worker_id, lease.ended_at, lease.id))
    });
    indexed(r, &tables::LEASES_ENDED, &ended, findings);
}

fn indexed(r: &dyn Read, table: &Table<Present>, expected: &Keys, findings: &mut Findings) {
    let is: Keys = keys(r, table).into_iter().collect();
    findings.expect("indexes follow their records", is == *expected, || {
        format!(
            "{}: {} rows instead of {}",
            table.name(),
            is.len(),
            expected.len()
        )
    });
}

/// One live lease of each slot, fences that differ, and as many slots taken as the worker counts.
fn slots_are_exclusive(r: &dyn Read, leases: &[Lease], findings: &mut Findings) {
    let mut slots: BTreeMap<(Id, u32), &Lease> = BTreeMap::new();
    let mut used: BTreeMap<Id, u32> = BTreeMap::new();
    let mut fences = BTreeSet::new();
    for lease in leases {
        findings.expect("a fence is one lease's", fences.insert(lease.fence), || {
            lease.fence.to_string()
        });
        if lease.is_over() {
            continue;
        }
        *used.entry(lease.worker_id).or_default() += 1;
        let other = slots.insert((lease.worker_id, lease.slot), lease);
        findings.expect("a slot has one live lease", other.is_none(), || {
            format!("slot {} of {}", lease.slot, lease.worker_id)
        });
    }
    let known = keys(r, &tables::SLOTS).len();
    findings.equal("slots are the live leases", "slots", known, slots.len());
    for ((worker_id, slot), lease) in slots {
        let held = tables::SLOTS.get(r, (worker_id, slot));
        let should = leases::LeaseRef {
            lease_id: lease.id,
            fence: lease.fence,
            worker_id,
            epoch: lease.epoch,
        };
        findings.equal("slots are the live leases", "a slot", held, Some(should));
    }
    for worker in all(r, &tables::WORKERS) {
        let should = used.get(&worker.id).copied().unwrap_or_default();
        findings.equal(
            "a worker counts its slots",
            &worker.id.to_string(),
            worker.slots_used,
            should,
        );
    }
}

/// The bytes of files are what their pieces have; a complete one has its digest.
fn files_are_counted(r: &dyn Read, runs: &[Run], findings: &mut Findings) {
    let mut pieces = keys(r, &tables::ARTIFACT_CHUNKS).len();
    let mut files = keys(r, &tables::ARTIFACTS).len();
    for run in runs {
        let mut sum = 0;
        for file in tables::ARTIFACTS.list(r, run.id, usize::MAX) {
            let chunks = tables::ARTIFACT_CHUNKS.list(r, (run.id, file.digest), usize::MAX);
            let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.bytes.to_vec()).collect();
            pieces -= chunks.len();
            files -= 1;
            sum += file.received;
            let name = || format!("{} of {}", file.digest, run.id);
            findings.equal("a file has its bytes", &name(), bytes.len() as u64, file.received);
            findings.expect(
                "a complete file has its digest",
                !file.complete || (file.received == file.size && Digest::of(&bytes) == file.digest),
                name,
            );
        }
        findings.equal("files are counted", "a run", run.artifact_bytes, sum);
    }
    findings.equal(
        "files have their runs",
        "pieces and files",
        (pieces, files),
        (0, 0),
    );
}

fn everything_is_counted(r: &dyn Read, runs: &[Run], leases: &[Lease], findings: &mut Findings) {
    let known = leases::totals(r);
    let over = leases.iter().filter(|lease| lease.is_over()).count() as u64;
    let newest = leases.iter().map(|lease| lease.fence).max().unwrap_or_default();
    findings.expect("fences rise", newest <= known.last_fence, || {
        format!("{newest} is above {}", known.last_fence)
    });
    let mut should = Totals {
        live: leases.len() as u64 - over,
        ended: over,
        last_fence: known.last_fence,
        ended_oldest: known.ended_oldest,
        ..Totals::default()
    };
    if !known.runs.is_empty() {
        should.runs = vec![0; RunState::ALL.len()];
    }
    for run in runs {
        should.runs[run.state as usize] += 1;
        should.artifact_bytes += run.artifact_bytes;
        if run.state().is_terminal() {
            should.ended_bytes += run.weight();
        } else {
            should.open_bytes += run.weight();
            should.open_artifact_bytes += run.artifact_bytes;
        }
    }
    let bounded = should.open_runs() <= limits::RUNS_OPEN
        && should.open_bytes <= limits::RUNS_OPEN_BYTES
        && should.artifact_bytes <= limits::ARTIFACT_BYTES;
    findings.equal("runs and leases are counted", "totals", known, should);
    findings.expect("runs are bounded", bounded, || {
        "too many, or too large".to_owned()
    });
}

/// Whoever may be given work has none that waits which it could take.
fn no_slot_is_kept_back(r: &dyn Read, runs: &[Run], findings: &mut Findings) {
    if runs.iter().all(|run| run.state() != RunState::Queued) {
        return;
    }
    let now = meta::clock(r);
    for worker in all(r, &tables::WORKERS) {
        let idle = leases::next_for(r, now, &worker).map(|run| run.id);
        findings.expect("no free slot is kept from what waits", idle.is_none(), || {
            format!("{}: {idle:?}", worker.id)
        });
    }
}

/// What an entry may do to leases: none ends before its deadline but by a word of its worker, of an operator,
/// or of the ledger; what has begun to end does not come back; fences rise.
pub(super) fn check_step(
    before: &dyn Read,
    after: &dyn Read,
    envelope: &Envelope,
    applied: &Applied,
    findings: &mut Findings,
) {
    let fence = leases::totals(before).last_fence;
    let (old, new) = (tables::LEASES.key(())[0], meta::clock(after));
    let touched = applied.writes.iter().filter(|(key, _)| key[0] == old);
    for (_, value) in touched {
        let Some(is) = value.as_ref().map(|bytes| tables::LEASES.decode(bytes)) else {
            continue;
        };
        let name = || format!("lease {} after {}", is.id, envelope.command.name());
        let Some(was) = leases::lease(before, is.id) else {
            let rises = is.fence > fence && is.fence >= applied.rows.first().map_or(0, |row| row.index);
            findings.expect("fences rise", rises, name);
            continue;
        };
        let kept = (was.fence, was.worker_id, was.slot, was.run_id, was.granted_at);
        findings.equal(
            "a lease stays what it is",
            &name(),
            (is.fence, is.worker_id, is.slot, is.run_id, is.granted_at),
            kept,
        );
        findings.expect("what ends does not come back", is.state >= was.state, name);
        findings.expect(
            "deadlines are not taken back",
            is.deadline_at >= was.deadline_at,
            name,
        );
        let renewed = is.deadline_at != was.deadline_at;
        findings.expect(
            "only renewals move deadlines",
            !renewed || is_renewal(envelope),
            name,
        );
        let late = was.is_live() && renewed && new >= was.deadline_at;
        findings.expect("what is over is not renewed", !late, name);
        let ends_early = was.is_live() && !is.is_live() && is.end_reason() == EndReason::Expired;
        findings.expect(
            "no lease expires before its deadline",
            !ends_early || new >= was.deadline_at,
            name,
        );
        let closed_early = !was.is_over() && is.is_over() && new < was.deadline_at;
        let by_word = is_word_of_cleanup(envelope);
        findings.expect(
            "a slot is free after its deadline, or by a word that it is clean",
            !closed_early || by_word,
            name,
        );
    }
    results_come_under_their_fence(before, envelope, applied, findings);
}

fn is_renewal(envelope: &Envelope) -> bool {
    matches!(&envelope.command, Command::Leases(command) if matches!(command.action, Some(Action::Renew(_))))
}

/// Whether its worker says that nothing of a lease is left, or operators vouch for it.
/// The worker's, or that of an operator who vouches.
fn is_word_of_cleanup(envelope: &Envelope) -> bool {
    match &envelope.command {
        Command::Leases(command) => {
            matches!(command.action, Some(Action::Cleaned(_) | Action::Reconcile(_)))
        }
        Command::Fleet(command) => {
            matches!(&command.action, Some(fleet::Action::Cleanup(cleanup)) if cleanup.force)
        }
        _ => false,
    }
}

/// What an accepted command says under a fence is of a lease that was live under it.
fn results_come_under_their_fence(
    before: &dyn Read,
    envelope: &Envelope,
    applied: &Applied,
    findings: &mut Findings,
) {
    let Command::Leases(command) = &envelope.command else {
        return;
    };
    let said = match (&command.action, &applied.reply) {
        _ if applied.duplicate => Vec::new(),
        (Some(Action::Accept(command)), Ok(_)) => vec![(command.lease_id, command.fence)],
        (Some(Action::Finish(command)), Ok(_)) => vec![(command.lease_id, command.fence)],
        (Some(Action::PutArtifact(command)), Ok(_)) => command
            .lease_id
            .map(|id| (id, command.fence))
            .into_iter()
            .collect(),
        (Some(Action::Renew(command)), Ok(Reply::LeasesRenewed(reply))) => {
            let renewed = command.leases.iter().zip(&reply.renewals);
            let renewed = renewed.filter(|(_, renewal)| renewal.refusal.is_none());
            renewed.map(|(wish, _)| (wish.lease_id, wish.fence)).collect()
        }
        _ => Vec::new(),
    };
    for (id, fence) in said {
        let was = leases::lease(before, id);
        let counts = was.is_some_and(|lease| lease.is_live() && lease.fence == fence);
        findings.expect("nothing is accepted under a stale fence", counts, || {
            format!("lease {id}, fence {fence}")
        });
    }
}
