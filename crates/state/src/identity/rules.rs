//! How certificates and devices change, and when an actor is valid.

use super::{
    Action, Certificate, CertificateKind, CertificateStatus, Device, DeviceStatus, KeyOwner, NewCertificate,
    RenewOperatorCertificate, RevokeDevice, RevokeOperatorCertificate, bans, certificate_by_fingerprint,
    certificates_of, device, device_of_key, life,
};
use crate::access::{self, OperatorStatus};
use crate::actor::Actor;
use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{Reply, Revoked};
use crate::tables;
use crate::txn::Txn;
use crate::{ca, check, cluster, dispatch, fleet, limits, nodes, pairing};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::RevokeDevice(command) => revoke_device(txn, command),
        Action::RenewCertificate(command) => life::renew(txn, command),
        Action::RevokeOperatorCertificate(command) => revoke_operator_certificate(txn, command),
        Action::RenewOperatorCertificate(command) => renew_operator(txn, command),
        Action::RemoveDevice(command) => bans::remove(txn, command),
        Action::PurgeDevice(command) => bans::purge(txn, command),
        // That it came with the certificate is all that it says; see `life::note_use`.
        Action::ConfirmCertificate(_) => Ok(Reply::done()),
        Action::RotateDevice(command) => life::rotate(txn, command),
        Action::RecoverDevice(command) => life::recover(txn, command),
        Action::ClearClone(command) => life::clear_clone(txn, command),
        Action::SetPolicy(command) => life::set_policy(txn, command),
    }
}

/// Whether an actor is who it says, and still let in, at `now`. The edges ask this too, on every call.
///
/// # Errors
/// The refusal, of the class `Denied`.
pub fn is_valid(r: &dyn Read, actor: &Actor, now: u64) -> Result<(), Reject> {
    match actor {
        Actor::System | Actor::Anonymous { .. } => Ok(()),
        Actor::Replica { id } => match cluster::replica(r, *id) {
            Some(replica) if replica.is_member() => Ok(()),
            _ => Err(Reject::new(Code::ReplicaUnknown, [id])),
        },
        Actor::Operator { name, fingerprint } => match access::operator(r, name) {
            None => Err(Reject::new(Code::CertificateUnknown, [fingerprint])),
            Some(operator) if operator.status() == OperatorStatus::Removed => {
                Err(Reject::new(Code::OperatorRemoved, [name]))
            }
            Some(_) => check_certificate(r, *fingerprint, CertificateKind::Operator, name, now),
        },
        Actor::Node {
            device_id,
            fingerprint,
        } => match device(r, *device_id) {
            None if bans::ban(r, *device_id).is_some() => Err(Reject::new(Code::DeviceRevoked, [device_id])),
            None => Err(Reject::new(Code::CertificateUnknown, [fingerprint])),
            // Planted: only the certificate is looked at, and of it everything but that it is revoked.
            Some(device)
                if device.status() == DeviceStatus::Revoked && !palyra_fault::planted("revoked-let-in") =>
            {
                Err(Reject::new(Code::DeviceRevoked, [device_id]))
            }
            Some(_) => check_certificate(
                r,
                *fingerprint,
                CertificateKind::Node,
                &device_id.to_string(),
                now,
            ),
        },
    }
}

fn check_certificate(
    r: &dyn Read,
    fingerprint: Fingerprint,
    kind: CertificateKind,
    subject: &str,
    now: u64,
) -> Result<(), Reject> {
    let known = certificate_by_fingerprint(r, fingerprint)
        .filter(|certificate| certificate.kind() == kind && certificate.subject == subject);
    let Some(certificate) = known else {
        return Err(Reject::new(Code::CertificateUnknown, [&fingerprint]));
    };
    let let_in = palyra_fault::planted("revoked-let-in");
    if certificate.status() == CertificateStatus::Revoked && !let_in {
        return Err(Reject::new(Code::CertificateRevoked, [&fingerprint]));
    }
    if certificate.status() == CertificateStatus::Superseded {
        return Err(Reject::new(Code::CertificateSuperseded, [&fingerprint, &subject]));
    }
    if now >= certificate.not_after {
        return Err(Reject::new(
            Code::CertificateExpired,
            [&fingerprint, &certificate.not_after],
        ));
    }
    Ok(())
}

/// Whether a certificate lets its holder in at `now`.
pub(crate) fn works(certificate: &Certificate, now: u64) -> bool {
    let standing = matches!(
        certificate.status(),
        CertificateStatus::Active | CertificateStatus::Issued
    );
    standing && now < certificate.not_after
}

/// Whether an operator has a certificate that lets it in at `now`.
pub(crate) fn has_working_certificate(r: &dyn Read, name: &str, now: u64) -> bool {
    certificates_of(r, CertificateKind::Operator, name)
        .iter()
        .any(|certificate| works(certificate, now))
}

/// Records a certificate that is its holder's one certificate from now on.
pub(crate) fn record(
    txn: &mut Txn<'_>,
    kind: CertificateKind,
    subject: &str,
    new: &NewCertificate,
    pairing_id: Option<Id>,
) -> Result<Fingerprint, Reject> {
    let fingerprint = insert(txn, kind, subject, new, |new| new.pairing_id = pairing_id)?;
    life::supersede_before(txn, kind, subject, txn.index, fingerprint);
    Ok(fingerprint)
}

/// Records a certificate that takes the place of the holder's others when it is first used; see `life::note_use`.
pub(super) fn record_unused(
    txn: &mut Txn<'_>,
    kind: CertificateKind,
    subject: &str,
    new: &NewCertificate,
    counter: u64,
) -> Result<Fingerprint, Reject> {
    let index = txn.index;
    insert(txn, kind, subject, new, |new| {
        new.set_status(CertificateStatus::Issued);
        new.issued_index = index;
        new.counter = counter;
    })
}

fn insert(
    txn: &mut Txn<'_>,
    kind: CertificateKind,
    subject: &str,
    new: &NewCertificate,
    finish: impl FnOnce(&mut Certificate),
) -> Result<Fingerprint, Reject> {
    let fingerprint = new.fingerprint();
    check_new(txn, new, fingerprint)?;
    make_room(txn, kind, subject)?;
    let mut certificate = Certificate {
        fingerprint,
        serial: new.serial.clone(),
        kind: kind as i32,
        subject: subject.to_owned(),
        der: new.der.clone(),
        not_before: new.not_before,
        not_after: new.not_after,
        authority: new.authority,
        status: CertificateStatus::Active as i32,
        issued_at: txn.now,
        spki: new.spki,
        authority_number: new.authority_number,
        ..Certificate::default()
    };
    finish(&mut certificate);
    txn.put(&tables::CERTIFICATES, fingerprint, &certificate);
    ca::issued(txn, &certificate);
    txn.mark(
        &tables::CERTIFICATES_OF,
        (kind as u32, tables::Text(subject), fingerprint),
    );
    Ok(fingerprint)
}

fn check_new(txn: &Txn<'_>, new: &NewCertificate, fingerprint: Fingerprint) -> Result<(), Reject> {
    let bad = |cause: &str| Err(Reject::new(Code::BadCertificate, [&cause]));
    if new.der.is_empty() || new.der.len() > limits::CERTIFICATE_MAX {
        return bad("its DER is empty or too large");
    }
    if new.serial.is_empty() || new.serial.len() > 32 || new.spki.is_zero() {
        return bad("it has no serial number or no key");
    }
    if new.not_before >= new.not_after || new.not_after <= txn.now {
        return bad("it is not valid now");
    }
    let signed_by_member =
        new.authority == 0 || cluster::replica(txn, new.authority).is_some_and(|replica| replica.is_member());
    if !signed_by_member {
        return bad("the replica that signed it is no member");
    }
    ca::check_issuer(txn, new)?;
    if certificate_by_fingerprint(txn, fingerprint).is_some() {
        return Err(Reject::new(Code::CertificateRecorded, [&fingerprint]));
    }
    Ok(())
}

/// Forgets certificates that are no use any more, oldest first, until one more fits. The one in use stays, also when
/// it ran out: by its key the holder recovers.
fn make_room(txn: &mut Txn<'_>, kind: CertificateKind, subject: &str) -> Result<(), Reject> {
    let mut kept = certificates_of(txn, kind, subject);
    while kept.len() >= limits::CERTIFICATES {
        let now = txn.now;
        let useless = |old: &Certificate| !works(old, now) && old.status() != CertificateStatus::Active;
        let Some(at) = kept.iter().position(useless) else {
            return Err(Reject::new(Code::TooManyCertificates, [&subject, &kept.len()]));
        };
        let old = kept.remove(at);
        txn.delete(&tables::CERTIFICATES, old.fingerprint);
        txn.delete(
            &tables::CERTIFICATES_OF,
            (kind as u32, tables::Text(subject), old.fingerprint),
        );
        if kind == CertificateKind::Node && kept.iter().all(|other| other.spki != old.spki) {
            txn.delete(&tables::DEVICE_KEYS, old.spki);
        }
    }
    Ok(())
}

/// Revokes every certificate of a holder; says how many.
pub(crate) fn revoke_all(txn: &mut Txn<'_>, kind: CertificateKind, subject: &str) -> usize {
    let mut count = 0;
    for mut certificate in certificates_of(txn, kind, subject) {
        if certificate.status() != CertificateStatus::Revoked {
            certificate.set_status(CertificateStatus::Revoked);
            txn.put(&tables::CERTIFICATES, certificate.fingerprint, &certificate);
            ca::revoked(txn, &certificate);
            count += 1;
        }
    }
    count
}

/// Gives a public key to a device, for as long as one of its certificates is kept.
pub(crate) fn claim_key(txn: &mut Txn<'_>, spki: Fingerprint, device_id: Id) -> Result<(), Reject> {
    bans::check_ban(txn, device_id, Some(spki))?;
    match device_of_key(txn, spki) {
        Some(owner) if owner != device_id => Err(Reject::new(Code::KeyInUse, [&owner])),
        _ => {
            txn.put(&tables::DEVICE_KEYS, spki, &KeyOwner { device_id });
            Ok(())
        }
    }
}

fn revoke_device(txn: &mut Txn<'_>, command: &RevokeDevice) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.device_id;
    let done = |index: u64, already: bool, cancelled: u32| {
        Ok(Reply::Revoked(Revoked {
            index,
            already,
            cancelled,
        }))
    };
    let Some(mut device) = device(txn, id) else {
        return match bans::ban(txn, id) {
            Some(ban) => done(ban.revoked_index, true, 0),
            None => Err(Reject::new(Code::NoSuchDevice, [&id])),
        };
    };
    if device.status() == DeviceStatus::Revoked {
        return done(device.revoked_index, true, 0);
    }
    let cancelled = revoke(txn, &mut device, &command.reason);
    done(txn.index, false, cancelled)
}

/// Revokes a trusted device, with everything that it has; says how many dispatches that ended.
pub(super) fn revoke(txn: &mut Txn<'_>, device: &mut Device, reason: &str) -> u32 {
    let id = device.id;
    device.set_status(DeviceStatus::Revoked);
    device.revoked_at = txn.now;
    device.revoked_by = txn.actor.to_string();
    device.revoked_index = txn.index;
    device.reason = reason.to_owned();
    txn.put(&tables::DEVICES, id, device);
    ca::device_gone(txn, id);
    let certificates = revoke_all(txn, CertificateKind::Node, &id.to_string());
    txn.emit(
        "identity.device_revoked",
        id,
        [
            ("name", device.name.clone()),
            ("reason", reason.to_owned()),
            ("certificates", certificates.to_string()),
        ],
    );
    nodes::close_session(txn, id, "revoked");
    fleet::on_revoked(txn, id);
    let cancelled = dispatch::cancel_all(txn, id, "revoked");
    pairing::end_pending(txn, id, "the device was revoked");
    cancelled
}

/// A reason, or the one before it when it is empty.
pub(super) fn use_of(reason: &str, before: &str) -> String {
    if reason.is_empty() { before } else { reason }.to_owned()
}

fn renew_operator(txn: &mut Txn<'_>, command: &RenewOperatorCertificate) -> Result<Reply, Reject> {
    let name = command.name.as_str();
    access::active(txn, name)?;
    let fingerprint = record_unused(txn, CertificateKind::Operator, name, &command.certificate, 0)?;
    txn.emit(
        "identity.operator_certificate_renewed",
        name,
        [
            ("fingerprint", fingerprint.to_string()),
            ("not_after", command.certificate.not_after.to_string()),
        ],
    );
    Ok(Reply::done())
}

fn revoke_operator_certificate(
    txn: &mut Txn<'_>,
    command: &RevokeOperatorCertificate,
) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let known = certificate_by_fingerprint(txn, command.fingerprint)
        .filter(|certificate| certificate.kind() == CertificateKind::Operator);
    let Some(mut certificate) = known else {
        return Err(Reject::new(Code::CertificateUnknown, [&command.fingerprint]));
    };
    if certificate.status() == CertificateStatus::Revoked {
        return Ok(Reply::done());
    }
    let others = certificates_of(txn, CertificateKind::Operator, &certificate.subject);
    let another = |other: &Certificate| other.fingerprint != certificate.fingerprint && works(other, txn.now);
    if access::is_last_admin(txn, &certificate.subject, txn.now) && !others.iter().any(another) {
        return Err(Reject::new(Code::LastAdmin, [&certificate.subject]));
    }
    certificate.set_status(CertificateStatus::Revoked);
    txn.put(&tables::CERTIFICATES, certificate.fingerprint, &certificate);
    ca::revoked(txn, &certificate);
    txn.emit(
        "identity.operator_certificate_revoked",
        &certificate.subject,
        [
            ("fingerprint", certificate.fingerprint.to_string()),
            ("reason", command.reason.clone()),
        ],
    );
    Ok(Reply::done())
}
