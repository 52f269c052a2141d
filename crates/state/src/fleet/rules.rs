//! What each command about one worker, and about the policy, does.
//!
//! What never lives here: whether a statement holds (`verify`), and what time and a new policy do to workers
//! (`sweeps`).

use prost::Message as _;

use super::follow::{change, ensure};
use super::policy::{self, Change};
use super::store::{policy as present, policy_version, worker};
use super::{
    Action, Attest, Attested, Challenge, Cleanup, Drain, Hold, OpenChallenge, Policy, Quarantine, Refusal,
    Release, Reverify, SetPolicy, Severity, Statement, Violate, Worker, sweeps, verify,
};
use crate::ids::Id;
use crate::leases::{self, EndReason, LeaseState};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{Attestation, Challenged, PolicySet, Reply};
use crate::txn::Txn;
use crate::{check, limits, nodes, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::SetPolicy(command) => set_policy(txn, command),
        Action::OpenChallenge(command) => open_challenge(txn, command),
        Action::Attest(command) => attest(txn, command),
        Action::Quarantine(command) => quarantine(txn, command),
        Action::Reverify(command) => reverify(txn, command),
        Action::Release(command) => release(txn, command),
        Action::Drain(command) => drain(txn, command),
        Action::Cleanup(command) => cleanup(txn, command),
        Action::Violate(command) => violate(txn, command),
        Action::Lapse(command) => sweeps::lapse(txn, command),
        Action::Recheck(command) => sweeps::recheck(txn, command),
        Action::Reap(command) => sweeps::reap(txn, command),
    }
}

fn known(r: &dyn Read, id: Id) -> Result<Worker, Reject> {
    worker(r, id).ok_or_else(|| Reject::new(Code::NoSuchWorker, [&id]))
}

fn set_policy(txn: &mut Txn<'_>, command: &SetPolicy) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let before = present(txn);
    let version = policy_version(txn);
    if command.expected_version != version {
        return Err(Reject::new(
            Code::PolicyConflict,
            [&version, &command.expected_version],
        ));
    }
    let mut after = policy::normal(&command.policy)?;
    let changes = policy::diff(before.as_ref(), &after);
    if before.is_some() && changes.is_empty() {
        return Ok(Reply::PolicySet(PolicySet { version }));
    }
    after.version = version + 1;
    after.set_at = txn.now;
    after.set_by = txn.actor.to_string();
    txn.put(&tables::FLEET_POLICY, (), &after);
    say_policy(txn, &after, &changes, &command.reason);
    Ok(Reply::PolicySet(PolicySet {
        version: after.version,
    }))
}

/// The first changes by themselves, the others as their number.
fn say_policy(txn: &mut Txn<'_>, after: &Policy, changes: &[Change], reason: &str) {
    let shown = |at: usize| {
        let one = changes.get(at);
        one.map_or_else(String::new, |one| {
            let or_none = |text: &str| if text.is_empty() { "-" } else { text }.to_owned();
            format!(
                "{}: {} -> {}",
                one.field,
                or_none(&one.before),
                or_none(&one.after)
            )
        })
    };
    txn.emit(
        "fleet.policy_set",
        "fleet",
        [
            ("version", after.version.to_string()),
            ("reason", reason.to_owned()),
            ("changes", changes.len().to_string()),
            ("change_01", shown(0)),
            ("change_02", shown(1)),
            ("change_03", shown(2)),
            ("change_04", shown(3)),
            ("change_05", shown(4)),
            ("change_06", shown(5)),
            ("change_07", shown(6)),
            ("change_08", shown(7)),
            ("change_09", shown(8)),
            ("change_10", shown(9)),
        ],
    );
}

/// Work is given, and statements are judged, in a node's present session, and in none that polls.
fn check_session(r: &dyn Read, id: Id, epoch: u64) -> Result<(), Reject> {
    let session = nodes::node(r, id).and_then(|node| node.session);
    let fits = session.is_some_and(|session| session.epoch == epoch && session.transport != "poll");
    if fits {
        return Ok(());
    }
    Err(Reject::new(Code::WorkerSession, [&id, &epoch]))
}

/// A quarantined worker is heard only when an operator asked for it.
fn check_heard(worker: &Worker) -> Result<(), Reject> {
    match &worker.quarantine {
        Some(hold) if worker.reverify_at == 0 => {
            Err(Reject::new(Code::WorkerQuarantined, [&worker.id, &hold.cause]))
        }
        _ => Ok(()),
    }
}

fn open_challenge(txn: &mut Txn<'_>, command: &OpenChallenge) -> Result<Reply, Reject> {
    let id = command.worker_id;
    check_session(txn, id, command.epoch)?;
    if command.nonce.is_zero() {
        return Err(check::invalid("the nonce", &"it is empty"));
    }
    let known = ensure(txn, id)?;
    check_heard(&known)?;
    if known.last_nonce == Some(command.nonce) {
        return Err(check::invalid("the nonce", &"it was used before"));
    }
    let expires_at = txn.now + limits::CHALLENGE_TTL;
    let challenge = Challenge {
        nonce: command.nonce,
        expires_at,
        epoch: command.epoch,
    };
    change(txn, id, |worker| worker.challenge = Some(challenge));
    txn.emit(
        "worker.challenged",
        id,
        [
            ("epoch", command.epoch.to_string()),
            ("expires_at", expires_at.to_string()),
        ],
    );
    Ok(Reply::Challenged(Challenged {
        nonce: command.nonce,
        expires_at,
        now: txn.now,
    }))
}

fn attest(txn: &mut Txn<'_>, command: &Attest) -> Result<Reply, Reject> {
    let id = command.worker_id;
    let known = known(txn, id)?;
    check_session(txn, id, command.epoch)?;
    check_heard(&known)?;
    let Some(challenge) = known.challenge else {
        // That it was shown before is worth a row; whatever else it is, nobody asked for it.
        let replayed = |nonce: &_| verify::is_over(&command.statement, *nonce);
        if known.last_nonce.as_ref().is_some_and(replayed) {
            return Ok(refuse(txn, &known, Reject::new(Code::StatementReplayed, [&id])));
        }
        return Err(Reject::new(Code::NoChallenge, [&id]));
    };
    match verify::judge(txn, &known, challenge, command) {
        Ok(passed) => Ok(admit(txn, &known, command, passed)),
        Err(fault) => Ok(refuse(txn, &known, fault)),
    }
}

fn admit(txn: &mut Txn<'_>, known: &Worker, command: &Attest, passed: verify::Passed) -> Reply {
    let (id, now) = (known.id, txn.now);
    let attested = Attested {
        statement: command.statement.clone(),
        public_key: command.public_key.clone(),
        signature: command.signature.clone(),
        evidence: passed.evidence as i32,
        accepted_at: now,
        index: txn.index,
        policy_version: policy_version(txn),
        expires_at: passed.expires_at,
        slots: passed.slots,
        tools: passed.tools,
    };
    say_attested(txn, id, &attested);
    if let Some(hold) = &known.quarantine {
        txn.emit(
            "worker.quarantine_lifted",
            id,
            [
                ("cause", hold.cause.clone()),
                ("since", hold.at.to_string()),
                ("reverify_by", known.reverify_by.clone()),
            ],
        );
    }
    let (evidence, expires_at) = (attested.evidence, attested.expires_at);
    change(txn, id, |worker| {
        close_challenge(worker);
        worker.attested = Some(attested);
        worker.quarantine = None;
        worker.refusal = None;
        worker.reverify_at = 0;
        worker.reverify_by.clear();
    });
    leases::fill(txn, id);
    Reply::Attestation(Attestation {
        refusal: None,
        severity: Severity::Low as i32,
        evidence,
        expires_at,
        quarantined: false,
        now,
    })
}

fn say_attested(txn: &mut Txn<'_>, id: Id, attested: &Attested) {
    let statement = Statement::decode(attested.statement.clone()).unwrap_or_default();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let egress = statement.egress.as_ref().map(|egress| egress.proxy.clone());
    txn.emit(
        "worker.attested",
        id,
        [
            ("evidence", attested.evidence().as_str().to_owned()),
            ("policy_version", attested.policy_version.to_string()),
            ("expires_at", attested.expires_at.to_string()),
            ("slots", attested.slots.to_string()),
            ("tools", attested.tools.join(" ")),
            ("image", hex(&statement.image)),
            ("build", hex(&statement.build)),
            ("artifact", hex(&statement.artifact)),
            ("supervisor", hex(&statement.supervisor)),
            ("egress", egress.unwrap_or_default()),
        ],
    );
}

/// A challenge is good for one statement, whatever became of it.
fn close_challenge(worker: &mut Worker) {
    if let Some(challenge) = worker.challenge.take() {
        worker.last_nonce = Some(challenge.nonce);
    }
}

/// Notes a statement that does not hold. Whoever was admitted and shows what may not run is quarantined;
/// whoever shows anything that is worse than a clock is not admitted any more by an older statement.
fn refuse(txn: &mut Txn<'_>, known: &Worker, fault: Reject) -> Reply {
    let (id, now) = (known.id, txn.now);
    let severity = verify::severity(fault.kind());
    let drifted = verify::is_drift(fault.kind()) && known.attested.is_some() && known.quarantine.is_none();
    txn.emit(
        "worker.attestation_refused",
        id,
        [
            ("code", fault.code()),
            ("severity", severity.as_str().to_owned()),
            ("message", fault.message()),
            (
                "quarantined",
                if drifted { "true".to_owned() } else { String::new() },
            ),
        ],
    );
    change(txn, id, |worker| {
        close_challenge(worker);
        if let Some(attested) = worker.attested.as_mut().filter(|_| severity > Severity::Low) {
            attested.policy_version = 0;
        }
        worker.refusal = Some(Refusal {
            at: now,
            reject: Some(fault.clone()),
            severity: severity as i32,
        });
    });
    if drifted {
        hold_back(txn, id, "digest_drift", &fault.message(), None);
    }
    Reply::Attestation(Attestation {
        refusal: Some(fault),
        severity: severity as i32,
        quarantined: drifted,
        now,
        ..Attestation::default()
    })
}

/// Quarantines a worker and ends its leases. Says how many.
pub(super) fn hold_back(txn: &mut Txn<'_>, id: Id, cause: &str, reason: &str, lease_id: Option<Id>) -> u32 {
    let hold = Hold {
        at: txn.now,
        by: txn.actor.to_string(),
        cause: cause.to_owned(),
        reason: check::cut(reason.to_owned(), limits::REASON_MAX),
        lease_id,
        ..Hold::default()
    };
    change(txn, id, |worker| {
        worker.challenge = None;
        worker.reverify_at = 0;
        worker.reverify_by.clear();
        worker.quarantine = Some(hold);
    });
    let ended = leases::end_all(txn, id, EndReason::Quarantined);
    txn.emit(
        "worker.quarantined",
        id,
        [
            ("cause", cause.to_owned()),
            ("reason", reason.to_owned()),
            ("lease", lease_id.map_or_else(String::new, |id| id.to_string())),
            ("leases_ended", ended.to_string()),
        ],
    );
    ended
}

fn quarantine(txn: &mut Txn<'_>, command: &Quarantine) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let known = known(txn, command.worker_id)?;
    // The first cause stands; but a request to lift it is taken back.
    let held = known.quarantine.is_some();
    if held && known.reverify_at == 0 {
        return Ok(Reply::done());
    }
    hold_back(txn, known.id, "operator", &command.reason, None);
    Ok(Reply::done())
}

fn reverify(txn: &mut Txn<'_>, command: &Reverify) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.worker_id;
    let known = known(txn, id)?;
    if known.barred {
        return Err(Reject::new(Code::WorkerBarred, [&id]));
    }
    let (now, by) = (txn.now, txn.actor.to_string());
    if known.reverify_at == now && known.reverify_by == by {
        // Asked for in this very moment.
        return Ok(Reply::done());
    }
    change(txn, id, |worker| {
        worker.reverify_at = now;
        worker.reverify_by = by;
    });
    txn.emit("worker.reverify_asked", id, [("reason", command.reason.clone())]);
    Ok(Reply::done())
}

fn release(txn: &mut Txn<'_>, command: &Release) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.worker_id;
    if known(txn, id)?.drain.is_none() {
        return Err(Reject::new(Code::NotDraining, [&id]));
    }
    txn.emit("worker.released", id, [("reason", command.reason.clone())]);
    change(txn, id, |worker| worker.drain = None);
    leases::fill(txn, id);
    Ok(Reply::done())
}

fn drain(txn: &mut Txn<'_>, command: &Drain) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.worker_id;
    let known = known(txn, id)?;
    let wait = match command.deadline_ms {
        0 => limits::DRAIN,
        asked if asked > limits::DRAIN_MAX => {
            let cause = format_args!("{asked} ms is over the limit of {}", limits::DRAIN_MAX);
            return Err(check::invalid("the deadline of a drain", &cause));
        }
        asked => asked,
    };
    let until = if command.force { txn.now } else { txn.now + wait };
    let hold = Hold {
        at: txn.now,
        by: txn.actor.to_string(),
        cause: "operator".to_owned(),
        reason: command.reason.clone(),
        until,
        forced: command.force,
        over: command.force,
        ..Hold::default()
    };
    if known.drain.as_ref() == Some(&hold) {
        // Asked for in this very moment.
        return Ok(Reply::done());
    }
    txn.emit(
        "worker.drain_asked",
        id,
        [
            ("reason", command.reason.clone()),
            ("until", until.to_string()),
            ("forced", command.force.to_string()),
        ],
    );
    change(txn, id, |worker| worker.drain = Some(hold));
    if command.force {
        leases::end_all(txn, id, EndReason::Drained);
    }
    Ok(Reply::done())
}

fn cleanup(txn: &mut Txn<'_>, command: &Cleanup) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let known = known(txn, command.worker_id)?;
    let id = known.id;
    if known.failure.is_none() && known.unclean.is_empty() {
        return Err(Reject::new(Code::NothingToClean, [&id]));
    }
    if !command.force {
        let now = txn.now;
        if known.cleanup_at == now {
            // Asked for in this very moment.
            return Ok(Reply::done());
        }
        change(txn, id, |worker| worker.cleanup_at = now);
        txn.emit("worker.cleanup_asked", id, [("reason", command.reason.clone())]);
        return Ok(Reply::done());
    }
    txn.emit(
        "worker.cleanup_vouched",
        id,
        [
            ("reason", command.reason.clone()),
            ("unclean", known.unclean.len().to_string()),
        ],
    );
    change(txn, id, |worker| {
        worker.failure = None;
        worker.cleanup_at = 0;
        worker.unclean.clear();
    });
    // Its lease is over before its deadline, by the operator's word.
    leases::vouch(txn, id, &command.reason);
    leases::fill(txn, id);
    Ok(Reply::done())
}

fn violate(txn: &mut Txn<'_>, command: &Violate) -> Result<Reply, Reject> {
    let id = command.worker_id;
    known(txn, id)?;
    if !matches!(command.kind.as_str(), "scope" | "disk" | "escape" | "manifest") {
        let cause = format_args!("{} is none", check::quoted(&command.kind));
        return Err(check::invalid("the kind of a violation", &cause));
    }
    let size = command.message.len();
    if size > limits::ERROR_MESSAGE_MAX {
        let cause = format_args!("it has {size} bytes; the limit is {}", limits::ERROR_MESSAGE_MAX);
        return Err(check::invalid("the message", &cause));
    }
    let live = leases::lease(txn, command.lease_id).filter(|lease| {
        lease.worker_id == id && lease.fence == command.fence && lease.state() != LeaseState::Ended
    });
    let Some(lease) = live else {
        return Err(Reject::new(
            Code::ViolationStale,
            [&id, &command.lease_id, &command.fence],
        ));
    };
    txn.emit(
        "worker.violation",
        id,
        [
            ("lease", lease.id.to_string()),
            ("fence", lease.fence.to_string()),
            ("run", lease.run_id.to_string()),
            ("kind", command.kind.clone()),
            ("message", command.message.clone()),
        ],
    );
    let reason = format!("{}: {}", command.kind, command.message);
    hold_back(txn, id, "scope_violation", &reason, Some(lease.id));
    Ok(Reply::done())
}
