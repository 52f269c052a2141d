//! The life of certificates after the first one: renewal, first use, recovery, rotation, and the counter that
//! betrays a copied node.
//!
//! Invariants: a certificate that is issued and not used changes nothing; the first accepted command under it ends
//! the holder's older ones in the same entry; a device's counter never goes down; a counter that was used is good
//! for the same key only, so a request that is sent again is answered again and two machines with one folder are
//! found at the second one's first renewal; a suspected device keeps its session and may go on renewing in order,
//! and recovers not at all.

use super::rules::{record_unused, works};
use super::{
    Certificate, CertificateKind, CertificateStatus, ClearClone, Device, DeviceStatus, NewCertificate,
    RecoverDevice, RenewCertificate, RotateDevice, SetPolicy, certificate_by_fingerprint, certificates_of,
    claim_key, device,
};
use crate::actor::Actor;
use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{RenewalOutcome, Renewed, Reply, RotationRequested};
use crate::txn::Txn;
use crate::{check, limits, tables};

/// What the whole cluster holds certificates to.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CertificatePolicy {
    /// How long after its certificate's end a device may recover by itself; 0: never.
    #[prost(uint64, tag = "1")]
    pub recovery_ms: u64,
    /// When it was set; 0 when it never was.
    #[prost(uint64, tag = "2")]
    pub set_at: u64,
    /// Actor who set it; empty when nobody did.
    #[prost(string, tag = "3")]
    pub set_by: String,
}

/// Why a device is suspected to be two machines.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CloneSuspicion {
    /// Since when.
    #[prost(uint64, tag = "1")]
    pub since: u64,
    /// Where the renewal came from that was taken.
    #[prost(string, tag = "2")]
    pub taken_from: String,
    /// Where the request came from that gave it away.
    #[prost(string, tag = "3")]
    pub refused_from: String,
    /// The counter in that request.
    #[prost(uint64, tag = "4")]
    pub shown_counter: u64,
    /// The device's counter at that time.
    #[prost(uint64, tag = "5")]
    pub counter: u64,
    /// `renewal` or `recovery`.
    #[prost(string, tag = "6")]
    pub how: String,
}

/// A request of an operator that a device change its certificate and key.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Rotation {
    /// When it was asked for.
    #[prost(uint64, tag = "1")]
    pub requested_at: u64,
    /// Actor who asked.
    #[prost(string, tag = "2")]
    pub requested_by: String,
    /// Why; may be empty.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// First moment at which it is overdue.
    #[prost(uint64, tag = "4")]
    pub deadline_at: u64,
    /// Log index of the request.
    #[prost(uint64, tag = "5")]
    pub index: u64,
    /// When the device got its new certificate; 0 while it has not.
    #[prost(uint64, tag = "6")]
    pub fetched_at: u64,
    /// Log index at which that certificate was recorded; 0 while it was not.
    #[prost(uint64, tag = "7")]
    pub fetched_index: u64,
    /// When the device first used it; 0 while it has not.
    #[prost(uint64, tag = "8")]
    pub used_at: u64,
}

/// How far a rotation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RotationState {
    /// The device has not answered yet.
    Requested,
    /// The new certificate is issued, and not used yet.
    Fetched,
    /// It is in use: done.
    InUse,
    /// The deadline has passed, and it is not in use.
    Overdue,
}

impl RotationState {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            RotationState::Requested => "requested",
            RotationState::Fetched => "fetched",
            RotationState::InUse => "in_use",
            RotationState::Overdue => "overdue",
        }
    }
}

impl Rotation {
    /// How far it has come at `now`.
    #[must_use]
    pub fn state(&self, now: u64) -> RotationState {
        if self.used_at != 0 {
            RotationState::InUse
        } else if now >= self.deadline_at {
            RotationState::Overdue
        } else if self.fetched_at != 0 {
            RotationState::Fetched
        } else {
            RotationState::Requested
        }
    }

    /// Whether the device still has to get a new certificate.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.fetched_at == 0
    }
}

/// What the whole cluster holds certificates to.
#[must_use]
pub fn policy(r: &dyn Read) -> CertificatePolicy {
    tables::CERTIFICATE_POLICY
        .get(r, ())
        .unwrap_or_else(|| CertificatePolicy {
            recovery_ms: limits::RECOVERY_WINDOW,
            ..CertificatePolicy::default()
        })
}

pub(super) fn set_policy(txn: &mut Txn<'_>, command: &SetPolicy) -> Result<Reply, Reject> {
    if command.recovery_ms > limits::RECOVERY_WINDOW_MAX {
        let cause = format_args!("{} ms are more than a year", command.recovery_ms);
        return Err(check::invalid("the recovery window", &cause));
    }
    let before = policy(txn).recovery_ms;
    if before == command.recovery_ms {
        return Ok(Reply::done());
    }
    let policy = CertificatePolicy {
        recovery_ms: command.recovery_ms,
        set_at: txn.now,
        set_by: txn.actor.to_string(),
    };
    txn.put(&tables::CERTIFICATE_POLICY, (), &policy);
    txn.emit(
        "identity.policy_changed",
        "certificates",
        [
            ("recovery_ms", command.recovery_ms.to_string()),
            ("before_ms", before.to_string()),
        ],
    );
    Ok(Reply::done())
}

/// Ends a holder's certificates that were recorded at `index` or before, save `kept`; says how many.
pub(super) fn supersede_before(
    txn: &mut Txn<'_>,
    kind: CertificateKind,
    subject: &str,
    index: u64,
    kept: Fingerprint,
) -> usize {
    let mut count = 0;
    for mut older in certificates_of(txn, kind, subject) {
        let stands = matches!(
            older.status(),
            CertificateStatus::Active | CertificateStatus::Issued
        );
        if stands && older.issued_index <= index && older.fingerprint != kept {
            older.set_status(CertificateStatus::Superseded);
            older.superseded_at = txn.now;
            txn.put(&tables::CERTIFICATES, older.fingerprint, &older);
            count += 1;
        }
    }
    count
}

/// Takes note that the actor's certificate was used: at its first use the older ones of its holder end.
pub(crate) fn note_use(txn: &mut Txn<'_>) {
    let (fingerprint, device_id) = match txn.actor {
        Actor::Node {
            device_id,
            fingerprint,
        } => (*fingerprint, Some(*device_id)),
        Actor::Operator { fingerprint, .. } => (*fingerprint, None),
        Actor::System | Actor::Replica { .. } | Actor::Anonymous { .. } => return,
    };
    let issued = |found: &Certificate| found.status() == CertificateStatus::Issued;
    let Some(mut used) = certificate_by_fingerprint(txn, fingerprint).filter(issued) else {
        return;
    };
    let (kind, subject) = (used.kind(), used.subject.clone());
    let ended = supersede_before(txn, kind, &subject, used.issued_index, fingerprint);
    used.set_status(CertificateStatus::Active);
    used.used_at = txn.now;
    txn.put(&tables::CERTIFICATES, fingerprint, &used);
    txn.emit(
        "identity.certificate_in_use",
        &subject,
        [
            ("fingerprint", fingerprint.to_string()),
            ("superseded", ended.to_string()),
        ],
    );
    if let Some(id) = device_id {
        complete_rotation(txn, id, &used);
    }
}

fn complete_rotation(txn: &mut Txn<'_>, id: Id, used: &Certificate) {
    let Some(mut device) = device(txn, id) else {
        return;
    };
    let Some(rotation) = device.rotation.as_mut() else {
        return;
    };
    let done = rotation.used_at == 0 && rotation.fetched_at != 0;
    if !done || used.issued_index < rotation.fetched_index {
        return;
    }
    rotation.used_at = txn.now;
    let took = txn.now.saturating_sub(rotation.requested_at);
    txn.put(&tables::DEVICES, id, &device);
    txn.emit(
        "identity.rotation_completed",
        id,
        [
            ("fingerprint", used.fingerprint.to_string()),
            ("took_ms", took.to_string()),
        ],
    );
}

fn trusted(r: &dyn Read, id: Id) -> Result<Device, Reject> {
    let device = device(r, id).ok_or_else(|| Reject::new(Code::NoSuchDevice, [&id]))?;
    if device.status() == DeviceStatus::Revoked {
        return Err(Reject::new(Code::DeviceRevoked, [&id]));
    }
    Ok(device)
}

/// A request for the next certificate of a device.
struct Asked<'a> {
    certificate: &'a NewCertificate,
    counter: u64,
    source: &'a str,
    how: &'static str,
}

pub(super) fn renew(txn: &mut Txn<'_>, command: &RenewCertificate) -> Result<Reply, Reject> {
    let device = trusted(txn, command.device_id)?;
    let asked = Asked {
        certificate: &command.certificate,
        counter: command.counter,
        source: &command.source,
        how: "renewal",
    };
    next_certificate(txn, device, &asked)
}

pub(super) fn recover(txn: &mut Txn<'_>, command: &RecoverDevice) -> Result<Reply, Reject> {
    let id = command.device_id;
    let device = trusted(txn, id)?;
    let asked = Asked {
        certificate: &command.certificate,
        counter: command.counter,
        source: &command.source,
        how: "recovery",
    };
    let shown = certificate_by_fingerprint(txn, command.shown)
        .filter(|found| found.kind() == CertificateKind::Node && found.subject == id.to_string())
        .ok_or_else(|| Reject::new(Code::CertificateUnknown, [&command.shown]))?;
    if shown.status() == CertificateStatus::Revoked {
        return Err(Reject::new(Code::CertificateRevoked, [&command.shown]));
    }
    check_window(txn, id, &shown)?;
    // A newer certificate of this device has been used: whoever comes with this key is not who used it.
    if shown.status() == CertificateStatus::Superseded || device.suspicion.is_some() {
        return suspect(txn, device, &asked);
    }
    next_certificate(txn, device, &asked)
}

/// Whether a device whose newest certificate is `shown` may recover now.
fn check_window(txn: &Txn<'_>, id: Id, shown: &Certificate) -> Result<(), Reject> {
    let window = policy(txn).recovery_ms;
    let cause = if window == 0 {
        "recovery is switched off in this cluster".to_owned()
    } else if txn.now >= shown.not_after.saturating_add(window) {
        format!(
            "its certificate ended at {} and the window of {window} ms is over",
            shown.not_after
        )
    } else {
        return Ok(());
    };
    Err(Reject::new(Code::RecoveryClosed, [&id, &cause]))
}

/// Records the next certificate, answers the same again, or finds a copy.
fn next_certificate(txn: &mut Txn<'_>, mut device: Device, asked: &Asked<'_>) -> Result<Reply, Reject> {
    check::text("the source", asked.source, limits::REASON_MAX)?;
    if asked.counter == 0 {
        return Err(Reject::new(Code::NoCounter, [&device.id]));
    }
    let mut counter = asked.counter;
    if counter <= device.counter {
        let same = counter == device.counter && asked.certificate.spki == device.spki;
        if same && let Some(known) = working_with_key(txn, &device) {
            return Ok(Reply::Renewed(Renewed {
                outcome: RenewalOutcome::Repeated as i32,
                fingerprint: known,
                counter: device.counter,
            }));
        }
        if !same && !device.resync {
            return suspect(txn, device, asked);
        }
        // The same request, so late that its certificate ran out: nothing was taken, so nothing is counted. Or the
        // first one after an operator vouched for the machine.
        counter = device.counter + u64::from(!same);
    }
    issue(txn, &mut device, asked, counter)
}

/// The newest certificate of a device, if it works.
fn working_with_key(txn: &Txn<'_>, device: &Device) -> Option<Fingerprint> {
    certificates_of(txn, CertificateKind::Node, &device.id.to_string())
        .into_iter()
        .rfind(|found| found.spki == device.spki && works(found, txn.now))
        .map(|found| found.fingerprint)
}

fn issue(txn: &mut Txn<'_>, device: &mut Device, asked: &Asked<'_>, counter: u64) -> Result<Reply, Reject> {
    let (id, new) = (device.id, asked.certificate);
    let subject = id.to_string();
    let known_key = certificates_of(txn, CertificateKind::Node, &subject)
        .iter()
        .any(|known| known.spki == new.spki);
    claim_key(txn, new.spki, id)?;
    let fingerprint = record_unused(txn, CertificateKind::Node, &subject, new, counter)?;
    // Making room may have let the key of a forgotten certificate go; a renewal with that key keeps it.
    claim_key(txn, new.spki, id)?;
    device.spki = new.spki;
    device.counter = counter;
    device.counter_source = asked.source.to_owned();
    device.counter_at = txn.now;
    device.resync = false;
    if asked.how == "recovery" {
        device.recovered_at = txn.now;
    }
    let (now, index) = (txn.now, txn.index);
    // With the old key again it would be no rotation.
    if let Some(rotation) = device
        .rotation
        .as_mut()
        .filter(|open| open.is_wanted() && !known_key)
    {
        rotation.fetched_at = now;
        rotation.fetched_index = index;
    }
    txn.put(&tables::DEVICES, id, device);
    let action = match asked.how {
        "recovery" => "identity.device_recovered",
        _ => "identity.certificate_renewed",
    };
    txn.emit(
        action,
        id,
        [
            ("fingerprint", fingerprint.to_string()),
            ("not_after", new.not_after.to_string()),
            ("authority", new.authority.to_string()),
            ("counter", counter.to_string()),
            ("source", asked.source.to_owned()),
        ],
    );
    Ok(Reply::Renewed(Renewed {
        outcome: RenewalOutcome::Issued as i32,
        fingerprint,
        counter,
    }))
}

/// Marks a device as two machines. Once is enough: the second that insists writes nothing more.
fn suspect(txn: &mut Txn<'_>, mut device: Device, asked: &Asked<'_>) -> Result<Reply, Reject> {
    check::text("the source", asked.source, limits::REASON_MAX)?;
    let reply = Reply::Renewed(Renewed {
        outcome: RenewalOutcome::CloneSuspected as i32,
        fingerprint: Fingerprint::ZERO,
        counter: device.counter,
    });
    if device.suspicion.is_some() {
        return Ok(reply);
    }
    device.suspicion = Some(CloneSuspicion {
        since: txn.now,
        taken_from: device.counter_source.clone(),
        refused_from: asked.source.to_owned(),
        shown_counter: asked.counter,
        counter: device.counter,
        how: asked.how.to_owned(),
    });
    txn.put(&tables::DEVICES, device.id, &device);
    txn.emit(
        "identity.clone_suspected",
        device.id,
        [
            ("name", device.name.clone()),
            ("taken_from", device.counter_source.clone()),
            ("refused_from", asked.source.to_owned()),
            ("shown_counter", asked.counter.to_string()),
            ("counter", device.counter.to_string()),
            ("how", asked.how.to_owned()),
        ],
    );
    Ok(reply)
}

pub(super) fn clear_clone(txn: &mut Txn<'_>, command: &ClearClone) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.device_id;
    let mut device = trusted(txn, id)?;
    let Some(cleared) = device.suspicion.take() else {
        return Err(Reject::new(Code::NoSuspicion, [&id]));
    };
    device.resync = true;
    txn.put(&tables::DEVICES, id, &device);
    txn.emit(
        "identity.clone_cleared",
        id,
        [
            ("name", device.name.clone()),
            ("since", cleared.since.to_string()),
            ("reason", command.reason.clone()),
        ],
    );
    Ok(Reply::done())
}

pub(super) fn rotate(txn: &mut Txn<'_>, command: &RotateDevice) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let within = match command.deadline_ms {
        0 => limits::ROTATION_DEADLINE,
        asked => asked,
    };
    if !(limits::ROTATION_DEADLINE_MIN..=limits::ROTATION_DEADLINE_MAX).contains(&within) {
        let cause = format_args!("{within} ms; from a second to 30 days are allowed");
        return Err(check::invalid("the deadline", &cause));
    }
    let id = command.device_id;
    let mut device = trusted(txn, id)?;
    if let Some(open) = device.rotation.as_ref().filter(|open| open.used_at == 0) {
        return Ok(Reply::RotationRequested(RotationRequested {
            index: open.index,
            already: true,
            deadline_at: open.deadline_at,
        }));
    }
    let deadline_at = txn.now.saturating_add(within);
    device.rotation = Some(Rotation {
        requested_at: txn.now,
        requested_by: txn.actor.to_string(),
        reason: command.reason.clone(),
        deadline_at,
        index: txn.index,
        ..Rotation::default()
    });
    txn.put(&tables::DEVICES, id, &device);
    txn.emit(
        "identity.rotation_requested",
        id,
        [
            ("name", device.name.clone()),
            ("reason", command.reason.clone()),
            ("deadline_at", deadline_at.to_string()),
        ],
    );
    Ok(Reply::RotationRequested(RotationRequested {
        index: txn.index,
        already: false,
        deadline_at,
    }))
}
