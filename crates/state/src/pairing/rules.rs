//! How codes open and close.

use super::codes::open_rows;
use super::{
    Action, Code, CodeStatus, Expire, Method, MintCode, RequestStatus, RevokeCode, Totals, attempts, code,
    code_status, decide, due_codes, request, request_status, totals,
};
use crate::ids::Id;
use crate::reject::{Code as Refusal, Reject};
use crate::reply::{CodeMinted, Counted, Reply};
use crate::txn::Txn;
use crate::{check, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::MintCode(command) => mint(txn, command),
        Action::RevokeCode(command) => revoke(txn, command),
        Action::BeginAttempt(command) => attempts::begin(txn, command),
        Action::FailAttempt(command) => attempts::fail(txn, command),
        Action::Prove(command) => attempts::prove(txn, command),
        Action::Approve(command) => decide::approve(txn, command),
        Action::Reject(command) => decide::reject(txn, command),
        Action::MarkCompleted(command) => decide::complete(txn, command),
        Action::Expire(command) => expire(txn, command),
    }
}

fn mint(txn: &mut Txn<'_>, command: &MintCode) -> Result<Reply, Reject> {
    let id = command.code_id;
    check::id("the code id", id)?;
    check::bytes("the sealed secret", &command.sealed, limits::SEALED_MAX)?;
    check::text("the device's name", &command.device_name, limits::NAME_MAX)?;
    let ttl = if command.ttl_ms == 0 {
        limits::CODE_TTL
    } else {
        command.ttl_ms
    };
    if !(limits::CODE_TTL_MIN..=limits::CODE_TTL_MAX).contains(&ttl) {
        return Err(Reject::new(Refusal::CodeTtl, [&ttl]));
    }
    if code(txn, id).is_some() {
        return Err(check::invalid("the code id", &"it exists already"));
    }
    for ended in due_codes(txn, txn.now) {
        close_due(txn, ended);
    }
    let open = open_rows(txn).len();
    if open >= limits::CODES_OPEN {
        return Err(Reject::new(Refusal::TooManyCodes, [&open]));
    }
    make_room(txn);
    let mut sums = totals(txn);
    let number = sums.next_number.max(1);
    sums.next_number = number + 1;
    sums.codes += 1;
    txn.put(&tables::PAIRING_TOTALS, (), &sums);
    let new = Code {
        id,
        number,
        method: command.method,
        sealed: command.sealed.clone(),
        created_at: txn.now,
        expires_at: txn.now + ttl,
        issued_by: txn.actor.to_string(),
        attempts: Vec::new(),
        status: CodeStatus::Open as i32,
        device_name: command.device_name.clone(),
        closed_at: 0,
        request_id: None,
    };
    txn.put(&tables::CODES, id, &new);
    txn.mark(&tables::CODES_OPEN, id);
    txn.emit(
        "pairing.code_minted",
        id,
        [
            ("number", format!("C{number}")),
            ("method", new.method().as_str().to_owned()),
            ("expires_at", new.expires_at.to_string()),
            ("device_name", new.device_name.clone()),
        ],
    );
    Ok(Reply::CodeMinted(CodeMinted {
        code_id: id,
        number,
        expires_at: new.expires_at,
    }))
}

/// Forgets the oldest closed code when there is no room for another.
fn make_room(txn: &mut Txn<'_>) {
    let mut sums = totals(txn);
    if sums.codes < limits::CODES {
        return;
    }
    // At most `CODES_OPEN` of them are open, so one of these is not.
    let oldest = tables::CODES.list(txn, (), limits::CODES_OPEN + 1);
    if let Some(old) = oldest.iter().find(|old| old.status() != CodeStatus::Open) {
        txn.delete(&tables::CODES, old.id);
        sums.codes -= 1;
        txn.put(&tables::PAIRING_TOTALS, (), &sums);
    }
}

fn revoke(txn: &mut Txn<'_>, command: &RevokeCode) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let found = known(txn, command.code_id)?;
    let status = code_status(&found, txn.now);
    if status == CodeStatus::Revoked {
        return Ok(Reply::done());
    }
    if status != CodeStatus::Open {
        return Err(Reject::new(
            Refusal::CodeClosed,
            [&shown(&found), &status.as_str()],
        ));
    }
    let id = found.id;
    let number = shown(&found);
    close(txn, found, CodeStatus::Revoked);
    txn.emit(
        "pairing.code_revoked",
        id,
        [("number", number), ("reason", command.reason.clone())],
    );
    Ok(Reply::done())
}

fn expire(txn: &mut Txn<'_>, command: &Expire) -> Result<Reply, Reject> {
    check::count(
        "the list",
        command.codes.len() + command.requests.len(),
        limits::EXPIRE_BATCH,
    )?;
    let mut count = 0;
    for id in &command.codes {
        count += u32::from(close_due(txn, *id));
    }
    for id in &command.requests {
        let due = request(txn, *id).filter(|found| {
            found.status() == RequestStatus::PendingApproval
                && request_status(found, txn.now) == RequestStatus::Expired
        });
        if let Some(found) = due {
            decide::expire(txn, found);
            count += 1;
        }
    }
    Ok(Reply::Counted(Counted { count }))
}

/// Writes down that the clock has ended an open code; says whether it had.
fn close_due(txn: &mut Txn<'_>, id: Id) -> bool {
    let Some(found) = code(txn, id).filter(|found| found.status() == CodeStatus::Open) else {
        return false;
    };
    let number = shown(&found);
    let action = match code_status(&found, txn.now) {
        CodeStatus::Burned => "pairing.code_burned",
        CodeStatus::Expired => "pairing.code_expired",
        CodeStatus::Open | CodeStatus::Used | CodeStatus::Revoked => return false,
    };
    let status = code_status(&found, txn.now);
    close(txn, found, status);
    txn.emit(action, id, [("number", number)]);
    true
}

/// Writes a code that is open no more.
pub(super) fn close(txn: &mut Txn<'_>, mut found: Code, status: CodeStatus) {
    found.set_status(status);
    found.closed_at = txn.now;
    txn.delete(&tables::CODES_OPEN, found.id);
    txn.put(&tables::CODES, found.id, &found);
}

pub(super) fn known(txn: &Txn<'_>, id: Id) -> Result<Code, Reject> {
    code(txn, id).ok_or_else(|| Reject::new(Refusal::NoSuchCode, [&id]))
}

/// The code, if it is open now.
pub(super) fn usable(txn: &Txn<'_>, found: Code) -> Result<Code, Reject> {
    let number = shown(&found);
    match code_status(&found, txn.now) {
        CodeStatus::Open => Ok(found),
        CodeStatus::Used => Err(Reject::new(Refusal::CodeUsed, [&number])),
        CodeStatus::Burned => Err(Reject::new(Refusal::CodeBurned, [&number, &found.attempts.len()])),
        CodeStatus::Expired => Err(Reject::new(Refusal::CodeExpired, [&number, &found.expires_at])),
        CodeStatus::Revoked => Err(Reject::new(Refusal::CodeRevoked, [&number])),
    }
}

/// How people see a code.
pub(super) fn shown(found: &Code) -> String {
    format!("C{}", found.number)
}

pub(super) fn check_method(found: &Code, method: Method) -> Result<(), Reject> {
    if found.method() == method {
        return Ok(());
    }
    let (is, asked) = (found.method().as_str(), method.as_str());
    Err(Reject::new(Refusal::CodeMethod, [&shown(found), &is, &asked]))
}

pub(super) fn change_totals(txn: &mut Txn<'_>, change: impl FnOnce(&mut Totals)) {
    let mut sums = totals(txn);
    change(&mut sums);
    txn.put(&tables::PAIRING_TOTALS, (), &sums);
}
