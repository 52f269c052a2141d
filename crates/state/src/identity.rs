//! Devices and certificates: who is trusted, and by which key.
//!
//! What never lives here: private keys, and the making of certificates (they arrive signed).
//! Invariants: a certificate is recorded before anybody is given it; it and the ones before it work until it is
//! first used, and from then on it alone; a device's counter never goes down; a revoked device stays revoked, all its
//! certificates are revoked in the same entry, and it has no session and no open dispatch; a public key
//! belongs to one device; a device that is removed is forgotten, but what it was known by stays refused.

mod bans;
mod life;
mod rules;

pub(crate) use bans::check_ban;
pub use bans::{Ban, ban, bans, bans_by_prefix};
pub(crate) use life::note_use;
pub use life::{CertificatePolicy, CloneSuspicion, Rotation, RotationState, policy};
pub use rules::is_valid;
pub(crate) use rules::{apply, claim_key, has_working_certificate, record, revoke_all, works};

use bytes::Bytes;

use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::tables;

/// Whether a device is let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum DeviceStatus {
    /// Let in.
    Trusted = 0,
    /// Never again.
    Revoked = 1,
}

impl DeviceStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            DeviceStatus::Trusted => "trusted",
            DeviceStatus::Revoked => "revoked",
        }
    }
}

/// A machine that was paired.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Device {
    /// The device id; the node has the same.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// Whether it is let in.
    #[prost(enumeration = "DeviceStatus", tag = "2")]
    pub status: i32,
    /// What it calls itself, or the operator named it.
    #[prost(string, tag = "3")]
    pub name: String,
    /// When its pairing was approved.
    #[prost(uint64, tag = "4")]
    pub paired_at: u64,
    /// Actor who approved it.
    #[prost(string, tag = "5")]
    pub paired_by: String,
    /// When it was revoked; 0 when it was not.
    #[prost(uint64, tag = "6")]
    pub revoked_at: u64,
    /// Actor who revoked it.
    #[prost(string, tag = "7")]
    pub revoked_by: String,
    /// Why it was revoked.
    #[prost(string, tag = "8")]
    pub reason: String,
    /// SHA-256 of the SubjectPublicKeyInfo of its newest certificate.
    #[prost(message, required, tag = "9")]
    pub spki: Fingerprint,
    /// Log index of the revocation; 0 when there is none.
    #[prost(uint64, tag = "10")]
    pub revoked_index: u64,
    /// The counter of its newest renewal or recovery; never goes down. The node keeps the same number, so that two
    /// machines with one data folder betray themselves.
    #[prost(uint64, tag = "20")]
    pub counter: u64,
    /// Address that the newest renewal or recovery came from.
    #[prost(string, tag = "21")]
    pub counter_source: String,
    /// When it was.
    #[prost(uint64, tag = "22")]
    pub counter_at: u64,
    /// Why it is suspected to be two machines, while it is.
    #[prost(message, optional, tag = "23")]
    pub suspicion: Option<CloneSuspicion>,
    /// The newest request of an operator that it change its certificate.
    #[prost(message, optional, tag = "24")]
    pub rotation: Option<Rotation>,
    /// When it last recovered after its certificate had run out; 0 when it never did.
    #[prost(uint64, tag = "25")]
    pub recovered_at: u64,
    /// The next renewal is taken whatever its counter: an operator said that the machine is the only one, or it was
    /// paired anew.
    #[prost(bool, tag = "26")]
    pub resync: bool,
}

/// Whom a certificate names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum CertificateKind {
    /// A device; the subject is its id in text form.
    Node = 0,
    /// An operator; the subject is its name.
    Operator = 1,
    /// A replica; the subject is its id in decimal.
    Replica = 2,
}

impl CertificateKind {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            CertificateKind::Node => "node",
            CertificateKind::Operator => "operator",
            CertificateKind::Replica => "replica",
        }
    }
}

/// Where a certificate stands. Expiry is not a status: it follows from the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum CertificateStatus {
    /// The one in use.
    Active = 0,
    /// A newer one is in use; this one works no more.
    Superseded = 1,
    /// Works no more.
    Revoked = 2,
    /// Works, and was not used yet: until then the one before it works too.
    Issued = 3,
}

impl CertificateStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            CertificateStatus::Active => "active",
            CertificateStatus::Superseded => "superseded",
            CertificateStatus::Revoked => "revoked",
            CertificateStatus::Issued => "issued",
        }
    }
}

/// A certificate that was issued.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Certificate {
    /// SHA-256 of `der`.
    #[prost(message, required, tag = "1")]
    pub fingerprint: Fingerprint,
    /// Serial number, big endian.
    #[prost(bytes = "bytes", tag = "2")]
    pub serial: Bytes,
    /// Whom it names.
    #[prost(enumeration = "CertificateKind", tag = "3")]
    pub kind: i32,
    /// Device id, operator name, or replica id.
    #[prost(string, tag = "4")]
    pub subject: String,
    /// The certificate, DER.
    #[prost(bytes = "bytes", tag = "5")]
    pub der: Bytes,
    /// Valid from.
    #[prost(uint64, tag = "6")]
    pub not_before: u64,
    /// Valid until, exclusive.
    #[prost(uint64, tag = "7")]
    pub not_after: u64,
    /// Replica whose authority signed it; 0 for the root.
    #[prost(uint64, tag = "8")]
    pub authority: u64,
    /// Where it stands.
    #[prost(enumeration = "CertificateStatus", tag = "9")]
    pub status: i32,
    /// When it was recorded.
    #[prost(uint64, tag = "10")]
    pub issued_at: u64,
    /// Pairing request that it came from, if it came from one.
    #[prost(message, optional, tag = "11")]
    pub pairing_id: Option<Id>,
    /// SHA-256 of its SubjectPublicKeyInfo.
    #[prost(message, required, tag = "12")]
    pub spki: Fingerprint,
    /// Log index of the entry that recorded it, which orders a holder's certificates; 0 for one that was its holder's
    /// only one from the beginning.
    #[prost(uint64, tag = "20")]
    pub issued_index: u64,
    /// When it was first used; 0 when it was not, or was in use from the beginning.
    #[prost(uint64, tag = "21")]
    pub used_at: u64,
    /// When a newer one took its place; 0 when none did.
    #[prost(uint64, tag = "22")]
    pub superseded_at: u64,
    /// The device's counter with it; 0 for the first one.
    #[prost(uint64, tag = "23")]
    pub counter: u64,
    /// Which of its signer's authorities, or which root; 0: the first.
    #[prost(uint32, tag = "35")]
    pub authority_number: u32,
}

impl Certificate {
    /// Who signed it: the replica, or 0 for a root, and the number of its authority or of the root.
    #[must_use]
    pub fn issuer(&self) -> (u64, u32) {
        (self.authority, self.authority_number.max(1))
    }
}

/// A certificate as a command brings it, signed and not yet recorded.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NewCertificate {
    /// The certificate, DER; its SHA-256 becomes the fingerprint.
    #[prost(bytes = "bytes", tag = "1")]
    pub der: Bytes,
    /// SHA-256 of its SubjectPublicKeyInfo.
    #[prost(message, required, tag = "2")]
    pub spki: Fingerprint,
    /// Serial number, big endian.
    #[prost(bytes = "bytes", tag = "3")]
    pub serial: Bytes,
    /// Valid from.
    #[prost(uint64, tag = "4")]
    pub not_before: u64,
    /// Valid until, exclusive.
    #[prost(uint64, tag = "5")]
    pub not_after: u64,
    /// Replica whose authority signed it; 0 for the root.
    #[prost(uint64, tag = "6")]
    pub authority: u64,
    /// Which of its signer's authorities, or which root; 0: the first.
    #[prost(uint32, tag = "35")]
    pub authority_number: u32,
}

impl NewCertificate {
    /// SHA-256 of the DER.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }
}

/// The device that a public key belongs to.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct KeyOwner {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
}

/// What is asked about identities.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11")]
    pub action: Option<Action>,
}

/// One thing to ask about identities.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`RevokeDevice`].
    #[prost(message, tag = "1")]
    RevokeDevice(RevokeDevice),
    /// See [`RenewCertificate`].
    #[prost(message, tag = "2")]
    RenewCertificate(RenewCertificate),
    /// See [`RevokeOperatorCertificate`].
    #[prost(message, tag = "3")]
    RevokeOperatorCertificate(RevokeOperatorCertificate),
    /// See [`RenewOperatorCertificate`].
    #[prost(message, tag = "4")]
    RenewOperatorCertificate(RenewOperatorCertificate),
    /// See [`ConfirmCertificate`].
    #[prost(message, tag = "5")]
    ConfirmCertificate(ConfirmCertificate),
    /// See [`RotateDevice`].
    #[prost(message, tag = "6")]
    RotateDevice(RotateDevice),
    /// See [`RecoverDevice`].
    #[prost(message, tag = "7")]
    RecoverDevice(RecoverDevice),
    /// See [`ClearClone`].
    #[prost(message, tag = "8")]
    ClearClone(ClearClone),
    /// See [`SetPolicy`].
    #[prost(message, tag = "9")]
    SetPolicy(SetPolicy),
    /// See [`RemoveDevice`].
    #[prost(message, tag = "10")]
    RemoveDevice(RemoveDevice),
    /// See [`PurgeDevice`].
    #[prost(message, tag = "11")]
    PurgeDevice(PurgeDevice),
}

/// Revokes a device: certificates, session, open dispatches and a pending pairing end in this entry.
/// Revoking it again changes nothing and is answered. Actor: operator. Reply: `Revoked`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevokeDevice {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Forgets a revoked device: its record and its node. Its id and its keys stay refused, see [`Ban`], and its
/// certificates until they expire; what it finished ages out as all finished work does. Removing it again changes
/// nothing and is answered. Actor: operator. Reply: `Revoked`, of the revocation.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RemoveDevice {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Revoke it in the same entry, if it is not.
    #[prost(bool, tag = "3")]
    pub revoke: bool,
}

/// Forgets of a removed device what it is refused by, too: a machine with its id or keys may pair again. Actor: admin.
/// Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PurgeDevice {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Also while a certificate of it has not expired.
    #[prost(bool, tag = "3")]
    pub force: bool,
}

/// Records a device's next certificate; the present one works until the next is used. The same key under the same
/// counter is answered again; another key under a counter that was used makes the device suspected to be two
/// machines. Actor: that node. Reply: `Renewed`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RenewCertificate {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// The new certificate.
    #[prost(message, required, tag = "2")]
    pub certificate: NewCertificate,
    /// One more than the counter that the node holds; from 1.
    #[prost(uint64, tag = "3")]
    pub counter: u64,
    /// Address that it came from.
    #[prost(string, tag = "4")]
    pub source: String,
}

/// Uses the certificate that it comes with, and does nothing else: the ones before it end. Actor: operator. Reply:
/// `Done`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct ConfirmCertificate {}

/// Asks a device to change its certificate and key now. While a request is open, another changes nothing. Actor:
/// operator. Reply: `RotationRequested`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RotateDevice {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// Within which time it should be in use, after which it is overdue; 0: a day.
    #[prost(uint64, tag = "3")]
    pub deadline_ms: u64,
}

/// Records the next certificate of a device whose certificates have run out. The serving replica has verified that
/// the request is signed with the key of `shown`. Counter and refusals as of a renewal; a device that is suspected
/// to be two machines recovers not at all. Actor: replica. Reply: `Renewed`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RecoverDevice {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// The new certificate.
    #[prost(message, required, tag = "2")]
    pub certificate: NewCertificate,
    /// One more than the counter that the node holds; from 1.
    #[prost(uint64, tag = "3")]
    pub counter: u64,
    /// Address that it came from.
    #[prost(string, tag = "4")]
    pub source: String,
    /// The certificate whose key signed the request.
    #[prost(message, required, tag = "5")]
    pub shown: Fingerprint,
}

/// Says that a suspected device is one machine after all. Its next renewal is taken whatever its counter. Actor:
/// operator. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ClearClone {
    /// The device.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Sets what the whole cluster holds certificates to. Actor: admin. Reply: `Done`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct SetPolicy {
    /// How long after its certificate's end a device may recover by itself; 0: never.
    #[prost(uint64, tag = "1")]
    pub recovery_ms: u64,
}

/// Revokes one certificate of an operator. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevokeOperatorCertificate {
    /// The certificate.
    #[prost(message, required, tag = "1")]
    pub fingerprint: Fingerprint,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Records an operator's next certificate; the present one works until the next is used. Actor: that operator, or an
/// admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RenewOperatorCertificate {
    /// The operator.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The new certificate.
    #[prost(message, required, tag = "2")]
    pub certificate: NewCertificate,
}

/// The device with this id, revoked or not.
#[must_use]
pub fn device(r: &dyn Read, id: Id) -> Option<Device> {
    tables::DEVICES.get(r, id)
}

/// Devices by id, at most `limit`, from the one after `after` on.
#[must_use]
pub fn devices(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Device> {
    tables::DEVICES.page(r, (), after, limit)
}

/// Devices whose id begins with `prefix` (text form, either case), at most `limit`.
#[must_use]
pub fn devices_by_prefix(r: &dyn Read, prefix: &str, limit: usize) -> Vec<Device> {
    let Some((first, last)) = Id::prefix_range(prefix) else {
        return Vec::new();
    };
    tables::DEVICES.between(r, first, last, limit)
}

/// The device that a public key belongs to, revoked or not, by SHA-256 of its SubjectPublicKeyInfo.
#[must_use]
pub fn device_of_key(r: &dyn Read, spki: Fingerprint) -> Option<Id> {
    tables::DEVICE_KEYS.get(r, spki).map(|owner| owner.device_id)
}

/// The certificate with this fingerprint.
#[must_use]
pub fn certificate_by_fingerprint(r: &dyn Read, fingerprint: Fingerprint) -> Option<Certificate> {
    tables::CERTIFICATES.get(r, fingerprint)
}

/// The certificates that are kept for a holder, oldest first.
#[must_use]
pub fn certificates_of(r: &dyn Read, kind: CertificateKind, subject: &str) -> Vec<Certificate> {
    let mut found: Vec<Certificate> = tables::CERTIFICATES_OF
        .suffixes(r, (kind as u32, tables::Text(subject)), usize::MAX)
        .iter()
        .filter_map(|bytes| Fingerprint::from_slice(bytes))
        .filter_map(|fingerprint| certificate_by_fingerprint(r, fingerprint))
        .collect();
    found.sort_by_key(|certificate| {
        (
            certificate.issued_at,
            certificate.issued_index,
            certificate.fingerprint,
        )
    });
    found
}
