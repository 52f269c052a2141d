//! Requests: how they are written, and how operators decide them.

use super::rules::change_totals;
use super::{
    Approve, MarkCompleted, Reject as RejectCommand, Request, RequestStatus, attempts, pending_of, request,
    request_status,
};
use crate::approvals::{self, ApprovalState};
use crate::identity::{self, CertificateKind, Device, DeviceStatus};
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{Approved, Reply};
use crate::txn::Txn;
use crate::{ca, check, limits, nodes, tables};

/// Writes a new, pending request.
pub(super) fn insert(txn: &mut Txn<'_>, new: &Request) {
    txn.put(&tables::PAIRINGS, new.id, new);
    txn.put(
        &tables::PAIRINGS_PENDING,
        new.device_id,
        &super::Pending { pairing_id: new.id },
    );
    change_totals(txn, |sums| {
        sums.requests += 1;
        sums.pending += 1;
    });
}

/// Writes a pending request that is pending no more.
fn decide(
    txn: &mut Txn<'_>,
    mut found: Request,
    status: RequestStatus,
    approval: ApprovalState,
    reason: &str,
) -> Request {
    found.set_status(status);
    found.decided_by = txn.actor.to_string();
    found.decided_at = txn.now;
    found.reason = reason.to_owned();
    txn.put(&tables::PAIRINGS, found.id, &found);
    txn.delete(&tables::PAIRINGS_PENDING, found.device_id);
    change_totals(txn, |sums| sums.pending = sums.pending.saturating_sub(1));
    approvals::close_pairing(txn, found.id, approval, reason);
    found
}

/// Ends a pending request that nobody decided in time.
pub(super) fn expire(txn: &mut Txn<'_>, found: Request) {
    end_undecided(txn, found, ApprovalState::Expired, "nobody decided in time");
}

/// Ends a pending request whose device asked again.
pub(super) fn replace(txn: &mut Txn<'_>, found: Request) {
    end_undecided(
        txn,
        found,
        ApprovalState::Withdrawn,
        "a newer request took its place",
    );
}

fn end_undecided(txn: &mut Txn<'_>, found: Request, approval: ApprovalState, reason: &str) {
    let found = decide(txn, found, RequestStatus::Expired, approval, reason);
    txn.emit(
        "pairing.request_expired",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("reason", reason.to_owned()),
        ],
    );
}

/// Rejects the pending request of a device, if it has one.
pub(crate) fn end_pending(txn: &mut Txn<'_>, device_id: Id, reason: &str) {
    if let Some(found) = pending_of(txn, device_id) {
        refuse(txn, found, ApprovalState::Withdrawn, reason);
    }
}

fn refuse(txn: &mut Txn<'_>, found: Request, approval: ApprovalState, reason: &str) {
    let found = decide(txn, found, RequestStatus::Rejected, approval, reason);
    txn.emit(
        "pairing.rejected",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("reason", reason.to_owned()),
        ],
    );
}

/// The request, if it can be decided now.
fn open(txn: &Txn<'_>, id: Id) -> Result<Request, Reject> {
    let found = request(txn, id).ok_or_else(|| Reject::new(Code::NoSuchPairing, [&id]))?;
    match (found.status(), request_status(&found, txn.now)) {
        (_, RequestStatus::PendingApproval) => Ok(found),
        // Planted: an approval may be used again.
        (RequestStatus::Approved, _) if palyra_fault::planted("approval-used-twice") => Ok(found),
        (RequestStatus::PendingApproval, _) => {
            Err(Reject::new(Code::PairingExpired, [&id, &found.expires_at]))
        }
        (status, _) => Err(Reject::new(Code::PairingDecided, [&id, &status.as_str()])),
    }
}

pub(super) fn approve(txn: &mut Txn<'_>, command: &Approve) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let mut found = open(txn, command.pairing_id)?;
    approvals::check_pairing(txn, found.id)?;
    if !command.sas.is_empty() && command.sas != found.sas {
        return Err(Reject::new(Code::SasMismatch, [&found.id]));
    }
    if command.certificate.spki != found.csr_spki {
        return Err(Reject::new(
            Code::BadCertificate,
            [&"its key is not the one of the request"],
        ));
    }
    let device_id = found.device_id;
    attempts::refuse_revoked(txn, device_id)?;
    let subject = device_id.to_string();
    let before = identity::device(txn, device_id);
    if before.is_some() {
        // Whoever pairs a known device again has lost its key, or somebody else has it.
        identity::revoke_all(txn, CertificateKind::Node, &subject);
        nodes::close_session(txn, device_id, "paired again");
    } else {
        nodes::count_device(txn)?;
        ca::device_trusted(txn, device_id);
    }
    let certificate = &command.certificate;
    let fingerprint = identity::record(txn, CertificateKind::Node, &subject, certificate, Some(found.id))?;
    identity::claim_key(txn, certificate.spki, device_id)?;
    let device = Device {
        id: device_id,
        status: DeviceStatus::Trusted as i32,
        name: found.device_name.clone(),
        paired_at: txn.now,
        paired_by: txn.actor.to_string(),
        spki: certificate.spki,
        // It never goes down; the machine that is paired now begins anew.
        counter: before.as_ref().map_or(0, |before| before.counter),
        resync: before.is_some_and(|before| before.counter > 0),
        ..Device::default()
    };
    txn.put(&tables::DEVICES, device_id, &device);
    found.certificate = Some(fingerprint);
    let found = decide(
        txn,
        found,
        RequestStatus::Approved,
        ApprovalState::Allowed,
        &command.reason,
    );
    txn.emit(
        "pairing.approved",
        found.id,
        [
            ("device", subject),
            ("device_name", found.device_name.clone()),
            ("fingerprint", fingerprint.to_string()),
            ("key", found.csr_spki.to_string()),
            ("sas_compared", (!command.sas.is_empty()).to_string()),
            ("reason", command.reason.clone()),
        ],
    );
    Ok(Reply::Approved(Approved {
        device_id,
        fingerprint,
    }))
}

pub(super) fn reject(txn: &mut Txn<'_>, command: &RejectCommand) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let found = open(txn, command.pairing_id)?;
    refuse(txn, found, ApprovalState::Denied, &command.reason);
    Ok(Reply::done())
}

pub(super) fn complete(txn: &mut Txn<'_>, command: &MarkCompleted) -> Result<Reply, Reject> {
    let id = command.pairing_id;
    let mut found = request(txn, id).ok_or_else(|| Reject::new(Code::NoSuchPairing, [&id]))?;
    match found.status() {
        RequestStatus::Completed => return Ok(Reply::done()),
        RequestStatus::Approved => {}
        other => return Err(Reject::new(Code::PairingDecided, [&id, &other.as_str()])),
    }
    found.set_status(RequestStatus::Completed);
    txn.put(&tables::PAIRINGS, id, &found);
    txn.emit("pairing.completed", id, [("device", found.device_id.to_string())]);
    Ok(Reply::done())
}
