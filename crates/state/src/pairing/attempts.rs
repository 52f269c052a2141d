//! Attempts: counted before they are answered, given back by a right proof.

use super::codes::{is_over, is_recent, open_pins};
use super::rules::{change_totals, check_method, close, known, shown, usable};
use super::{
    Attempt, BeginAttempt, Code, CodeStatus, FailAttempt, Method, Prove, Request, RequestStatus,
    code_by_number, code_status, decide, due_requests, pending_of, reopens_at, request, totals,
};
use crate::identity::{self, DeviceStatus};
use crate::ids::Id;
use crate::reject::{Code as Refusal, Reject};
use crate::reply::{AttemptCounted, AttemptOutcome, Proved, Reply};
use crate::txn::Txn;
use crate::{approvals, check, limits, tables};

pub(super) fn begin(txn: &mut Txn<'_>, command: &BeginAttempt) -> Result<Reply, Reject> {
    check::id("the attempt id", command.attempt_id)?;
    check::id("the device id", command.device_id)?;
    check::text("the source", &command.source, limits::REASON_MAX)?;
    refuse_closed(txn)?;
    let mut found = select(txn, command)?;
    check_method(&found, command.method())?;
    refuse_revoked(txn, command.device_id)?;
    if found
        .attempts
        .iter()
        .any(|attempt| attempt.id == command.attempt_id)
    {
        return Err(check::invalid("the attempt id", &"it exists already"));
    }
    if found.attempts.len() >= limits::ATTEMPTS as usize {
        let reply = counted(&found, command.attempt_id, AttemptOutcome::Burned);
        burn(txn, found, &command.source);
        return Ok(reply);
    }
    let attempt = Attempt {
        id: command.attempt_id,
        at: txn.now,
        failed: false,
        device_id: command.device_id,
    };
    found.attempts.push(attempt);
    txn.put(&tables::CODES, found.id, &found);
    let now = txn.now;
    change_totals(txn, |sums| {
        sums.failures.retain(|old| is_recent(old.at, now));
        sums.failures.push(attempt);
    });
    txn.emit(
        "pairing.attempt",
        found.id,
        [
            ("number", shown(&found)),
            ("device", command.device_id.to_string()),
            ("source", command.source.clone()),
            ("tries_left", tries_left(&found).to_string()),
        ],
    );
    Ok(counted(&found, command.attempt_id, AttemptOutcome::Granted))
}

fn refuse_closed(txn: &Txn<'_>) -> Result<(), Reject> {
    match reopens_at(txn, txn.now) {
        Some(at) => Err(Reject::new(Refusal::PairingClosed, [&limits::FAILURES, &at])),
        None => Ok(()),
    }
}

/// The code that an attempt is for, if it is open.
fn select(txn: &Txn<'_>, command: &BeginAttempt) -> Result<Code, Reject> {
    if let Some(id) = command.code_id {
        return usable(txn, known(txn, id)?);
    }
    if command.code_number != 0 {
        let number = command.code_number;
        let found = code_by_number(txn, number)
            .ok_or_else(|| Reject::new(Refusal::NoSuchCode, [&format_args!("C{number}")]))?;
        return usable(txn, found);
    }
    let mut pins = open_pins(txn, txn.now);
    match pins.len() {
        0 => Err(Reject::new(Refusal::NoOpenCode, [])),
        1 => Ok(pins.remove(0)),
        many => Err(Reject::new(Refusal::CodeAmbiguous, [&many])),
    }
}

pub(super) fn fail(txn: &mut Txn<'_>, command: &FailAttempt) -> Result<Reply, Reject> {
    check::text("the source", &command.source, limits::REASON_MAX)?;
    let mut found = usable(txn, known(txn, command.code_id)?)?;
    let at = open_attempt(txn, &found, command.attempt_id)?;
    found.attempts[at].failed = true;
    let device = found.attempts[at].device_id;
    txn.put(&tables::CODES, found.id, &found);
    txn.emit(
        "pairing.proof_failed",
        found.id,
        [
            ("number", shown(&found)),
            ("device", device.to_string()),
            ("source", command.source.clone()),
            ("tries_left", tries_left(&found).to_string()),
        ],
    );
    if code_status(&found, txn.now) == CodeStatus::Burned {
        let reply = counted(&found, command.attempt_id, AttemptOutcome::Burned);
        burn(txn, found, &command.source);
        return Ok(reply);
    }
    Ok(counted(&found, command.attempt_id, AttemptOutcome::Failed))
}

fn burn(txn: &mut Txn<'_>, found: Code, source: &str) {
    let (id, number, attempts) = (found.id, shown(&found), found.attempts.len());
    close(txn, found, CodeStatus::Burned);
    txn.emit(
        "pairing.code_burned",
        id,
        [
            ("number", number),
            ("attempts", attempts.to_string()),
            ("source", source.to_owned()),
        ],
    );
}

/// Where in the code the attempt is, if it may still be proved or failed.
fn open_attempt(txn: &Txn<'_>, found: &Code, id: Id) -> Result<usize, Reject> {
    found
        .attempts
        .iter()
        .position(|attempt| attempt.id == id && !attempt.failed && !is_over(attempt.at, txn.now))
        .ok_or_else(|| Reject::new(Refusal::NoSuchAttempt, [&id]))
}

fn tries_left(found: &Code) -> u32 {
    limits::ATTEMPTS.saturating_sub(found.attempts.len() as u32)
}

fn counted(found: &Code, attempt_id: Id, outcome: AttemptOutcome) -> Reply {
    Reply::Attempt(AttemptCounted {
        outcome: outcome as i32,
        code_id: found.id,
        code_number: found.number,
        method: found.method,
        tries_left: tries_left(found),
        attempt_id,
    })
}

pub(super) fn refuse_revoked(txn: &Txn<'_>, device_id: Id) -> Result<(), Reject> {
    let revoked = |device: identity::Device| device.status() == DeviceStatus::Revoked;
    if identity::device(txn, device_id).is_some_and(revoked) {
        return Err(Reject::new(Refusal::DeviceRevoked, [&device_id]));
    }
    identity::check_ban(txn, device_id, None)
}

pub(super) fn prove(txn: &mut Txn<'_>, command: &Prove) -> Result<Reply, Reject> {
    check_fields(txn, command)?;
    let mut found = known(txn, command.code_id)?;
    // Planted: that the code is open was looked at before the entry, and no more.
    if !palyra_fault::planted("code-checked-before-log") {
        found = usable(txn, found)?;
    }
    give_back(txn, &mut found, command)?;
    refuse_revoked(txn, command.device_id)?;
    identity::check_ban(txn, command.device_id, Some(command.csr_spki))?;
    if let Some(owner) = identity::device_of_key(txn, command.csr_spki)
        && owner != command.device_id
    {
        return Err(Reject::new(Refusal::KeyInUse, [&owner]));
    }
    if let Some(old) = pending_of(txn, command.device_id) {
        decide::replace(txn, old);
    }
    make_room(txn)?;
    let new = new_request(txn, command, &found);
    let (number, minted_by) = (shown(&found), found.issued_by.clone());
    found.request_id = Some(new.id);
    close(txn, found, CodeStatus::Used);
    decide::insert(txn, &new);
    let known_device = identity::device(txn, new.device_id).is_some();
    txn.emit(
        "pairing.proved",
        new.id,
        [
            ("device", new.device_id.to_string()),
            ("device_name", new.device_name.clone()),
            ("number", number),
            ("method", new.method().as_str().to_owned()),
            ("source", new.source.clone()),
            ("served_by", new.served_by.to_string()),
            ("key", new.csr_spki.to_string()),
            ("known_device", known_device.to_string()),
        ],
    );
    approvals::open_pairing(txn, &new, &minted_by)?;
    Ok(Reply::Proved(Proved {
        pairing_id: new.id,
        expires_at: new.expires_at,
    }))
}

fn check_fields(txn: &Txn<'_>, command: &Prove) -> Result<(), Reject> {
    check::id("the pairing id", command.pairing_id)?;
    check::id("the device id", command.device_id)?;
    check::text("the device's name", &command.device_name, limits::NAME_MAX)?;
    check::bytes("the CSR", &command.csr_der, limits::CERTIFICATE_MAX)?;
    check::filled("the SAS", &command.sas, 16)?;
    check::text("the source", &command.source, limits::REASON_MAX)?;
    if command.csr_spki.is_zero() || command.fetch_token_hash.is_zero() {
        return Err(check::invalid("the proof", &"it has no key or no fetch token"));
    }
    if request(txn, command.pairing_id).is_some() {
        return Err(check::invalid("the pairing id", &"it exists already"));
    }
    Ok(())
}

/// Takes the attempt off the counts. A ticket's secret cannot be guessed, so it may go without one; but closed
/// is closed, save for attempts that began before.
fn give_back(txn: &mut Txn<'_>, found: &mut Code, command: &Prove) -> Result<(), Reject> {
    let Some(id) = command.attempt_id else {
        return match found.method() {
            Method::Ticket => refuse_closed(txn),
            Method::Pin => Err(check::invalid("the attempt id", &"a PIN needs one")),
        };
    };
    let at = open_attempt(txn, found, id)?;
    if found.attempts[at].device_id != command.device_id {
        return Err(Reject::new(Refusal::NoSuchAttempt, [&id]));
    }
    found.attempts.remove(at);
    change_totals(txn, |sums| sums.failures.retain(|attempt| attempt.id != id));
    Ok(())
}

/// Refuses when too many requests wait; forgets the oldest decided one when too many are kept.
fn make_room(txn: &mut Txn<'_>) -> Result<(), Reject> {
    if totals(txn).pending >= limits::REQUESTS_PENDING {
        for id in due_requests(txn, txn.now) {
            if let Some(old) = request(txn, id) {
                decide::expire(txn, old);
            }
        }
    }
    let sums = totals(txn);
    if sums.pending >= limits::REQUESTS_PENDING {
        return Err(Reject::new(Refusal::TooManyPending, [&sums.pending]));
    }
    if sums.requests >= limits::REQUESTS {
        // Fewer than `REQUESTS_PENDING` of them are pending, so one of these is not.
        let oldest = tables::PAIRINGS.list(txn, (), limits::REQUESTS_PENDING as usize);
        if let Some(old) = oldest
            .iter()
            .find(|old| old.status() != RequestStatus::PendingApproval)
        {
            txn.delete(&tables::PAIRINGS, old.id);
            change_totals(txn, |sums| sums.requests -= 1);
        }
    }
    Ok(())
}

fn new_request(txn: &Txn<'_>, command: &Prove, code: &Code) -> Request {
    // The operator's name for the machine outranks what the machine calls itself.
    let name = if code.device_name.is_empty() {
        &command.device_name
    } else {
        &code.device_name
    };
    Request {
        id: command.pairing_id,
        code_id: code.id,
        device_id: command.device_id,
        device_name: name.clone(),
        csr_der: command.csr_der.clone(),
        csr_spki: command.csr_spki,
        sas: command.sas.clone(),
        source: command.source.clone(),
        method: code.method,
        served_by: command.served_by,
        fetch_token_hash: command.fetch_token_hash,
        status: RequestStatus::PendingApproval as i32,
        decided_by: String::new(),
        decided_at: 0,
        reason: String::new(),
        certificate: None,
        created_at: txn.now,
        expires_at: txn.now + limits::REQUEST_TTL,
    }
}
