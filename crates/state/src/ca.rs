//! The cluster's authorities: its roots, the issuing authority of each replica, who has acknowledged which trust
//! bundle, and the lists of revoked certificates.
//!
//! What never lives here: plain private keys, and the reading of certificates (they arrive signed, as bytes).
//! Invariants: there is always a root that is trusted and signs; a rotation of the root goes from `distribute` to
//! `issue` to its end and back one phase at a time; the generation of the bundle and the step of the rotation never
//! fall; an authority has a certificate under a root that is trusted, for as long as a certificate that it issued may
//! be shown; a root's key is gone once the root is retired.

mod books;
mod rotation;
mod rules;
mod telling;

pub(crate) use books::{born, device_gone, device_trusted, issued, operator_added, operator_gone, revoked};
pub(crate) use rules::{apply, check_issuer, replica_admitted, replica_removed};

use std::ops::ControlFlow;

use bytes::Bytes;

use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::tables;

/// Where the rotation of the root stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Phase {
    /// No rotation is under way: one root is trusted.
    Idle = 0,
    /// Both roots are trusted, and everybody is told; the old one signs.
    Distribute = 1,
    /// Both roots are trusted; the new one signs, and authorities have a certificate under each.
    Issue = 2,
}

impl Phase {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Idle => "idle",
            Phase::Distribute => "distribute",
            Phase::Issue => "issue",
        }
    }
}

/// Where the authorities stand; there is one.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ca {
    /// Counts changes of the set of trusted roots, from 1.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Counts changes of phase, from 1: what replicas acknowledge.
    #[prost(uint64, tag = "2")]
    pub step: u64,
    /// The phase of the root's rotation.
    #[prost(enumeration = "Phase", tag = "3")]
    pub phase: i32,
    /// The root that signs.
    #[prost(uint32, tag = "4")]
    pub issuing: u32,
    /// The other root that is trusted during a rotation: the new one in `distribute`, the old one in `issue`.
    #[prost(uint32, tag = "5")]
    pub other: u32,
    /// The number that the next root gets.
    #[prost(uint32, tag = "6")]
    pub next_root: u32,
    /// Since when the phase is what it is.
    #[prost(uint64, tag = "7")]
    pub phase_since: u64,
    /// Actor who began the rotation; empty when there is none.
    #[prost(string, tag = "8")]
    pub begun_by: String,
    /// Devices that are trusted.
    #[prost(uint64, tag = "9")]
    pub devices: u64,
    /// Those that have acknowledged this generation.
    #[prost(uint64, tag = "10")]
    pub devices_acked: u64,
}

impl Ca {
    /// The numbers of the trusted roots, the one that signs first.
    #[must_use]
    pub fn trusted(&self) -> Vec<u32> {
        if self.phase() == Phase::Idle {
            vec![self.issuing]
        } else {
            vec![self.issuing, self.other]
        }
    }
}

/// A root of the cluster.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Root {
    /// Given once, from 1.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// Its certificate, DER.
    #[prost(bytes = "bytes", tag = "2")]
    pub der: Bytes,
    /// Its key, sealed under the cluster's KEK; empty once it is retired.
    #[prost(bytes = "bytes", tag = "3")]
    pub key_sealed: Bytes,
    /// When it was added.
    #[prost(uint64, tag = "4")]
    pub added_at: u64,
    /// Actor who added it.
    #[prost(string, tag = "5")]
    pub added_by: String,
    /// When it stopped being trusted; 0 while it is.
    #[prost(uint64, tag = "6")]
    pub retired_at: u64,
    /// Log index of the last entry that its list of revoked certificates has to reflect; 0 when there is none.
    #[prost(uint64, tag = "7")]
    pub revoked_index: u64,
}

impl Root {
    /// SHA-256 of its certificate.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.der)
    }
}

/// Where an authority stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum AuthorityStatus {
    /// Its replica issues with it.
    Active = 0,
    /// Issues nothing any more; what it issued is good until it expires.
    Retiring = 1,
}

impl AuthorityStatus {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            AuthorityStatus::Active => "active",
            AuthorityStatus::Retiring => "retiring",
        }
    }
}

/// The certificate of an authority under one root.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AuthorityCertificate {
    /// The root that signed it.
    #[prost(uint32, tag = "1")]
    pub root: u32,
    /// The certificate, DER.
    #[prost(bytes = "bytes", tag = "2")]
    pub der: Bytes,
}

/// The key with which a replica issues, and its certificates: one under each trusted root, the same key in all.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Authority {
    /// The replica that holds the key.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// Counts the authorities of the replica, from 1.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// Where it stands.
    #[prost(enumeration = "AuthorityStatus", tag = "3")]
    pub status: i32,
    /// Its certificates, at most one per root.
    #[prost(message, repeated, tag = "4")]
    pub certificates: Vec<AuthorityCertificate>,
    /// When it was recorded.
    #[prost(uint64, tag = "5")]
    pub created_at: u64,
    /// Since when it is what it is.
    #[prost(uint64, tag = "6")]
    pub since: u64,
    /// End of the certificate that it issued with the latest end; 0 when it issued none.
    #[prost(uint64, tag = "7")]
    pub last_not_after: u64,
    /// When an operator asked for a new one in its place; 0 when none did.
    #[prost(uint64, tag = "8")]
    pub rotation_asked_at: u64,
    /// How many certificates it issued.
    #[prost(uint64, tag = "9")]
    pub issued: u64,
    /// Log index of the last entry that its list of revoked certificates has to reflect; 0 when there is none.
    #[prost(uint64, tag = "10")]
    pub revoked_index: u64,
}

impl Authority {
    /// Its certificate under a root.
    #[must_use]
    pub fn under(&self, root: u32) -> Option<&AuthorityCertificate> {
        self.certificates.iter().find(|one| one.root == root)
    }
}

/// What a device, an operator or a replica acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Ack {
    /// The generation of the bundle that it holds durably; of a replica, the step that it has taken.
    #[prost(uint64, tag = "1")]
    pub number: u64,
    /// When that was written down.
    #[prost(uint64, tag = "2")]
    pub at: u64,
}

/// A certificate that was revoked, for the list of its issuer, until it expires.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevokedCertificate {
    /// Serial number, big endian.
    #[prost(bytes = "bytes", tag = "1")]
    pub serial: Bytes,
    /// When it was revoked.
    #[prost(uint64, tag = "2")]
    pub revoked_at: u64,
    /// Its end.
    #[prost(uint64, tag = "3")]
    pub not_after: u64,
    /// The certificate.
    #[prost(message, required, tag = "4")]
    pub fingerprint: Fingerprint,
    /// Whom it names.
    #[prost(string, tag = "5")]
    pub subject: String,
}

/// A signed list of revoked certificates (RFC 5280), of one authority or one root.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Crl {
    /// The replica whose authority signed it; 0 for a root.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// The number of the authority or root.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// The list, DER.
    #[prost(bytes = "bytes", tag = "3")]
    pub der: Bytes,
    /// Its CRL number: the log index that it reflects.
    #[prost(uint64, tag = "4")]
    pub crl_number: u64,
    /// Good from.
    #[prost(uint64, tag = "5")]
    pub this_update: u64,
    /// A newer one is out by then.
    #[prost(uint64, tag = "6")]
    pub next_update: u64,
    /// How many certificates it lists.
    #[prost(uint32, tag = "7")]
    pub entries: u32,
    /// How many it leaves out because there are too many.
    #[prost(uint32, tag = "8")]
    pub left_out: u32,
}

/// What is asked about authorities.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10")]
    pub action: Option<Action>,
}

/// One thing to ask about authorities.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`BeginRoot`].
    #[prost(message, tag = "1")]
    BeginRoot(BeginRoot),
    /// See [`AdvanceRoot`].
    #[prost(message, tag = "2")]
    AdvanceRoot(AdvanceRoot),
    /// See [`RevertRoot`].
    #[prost(message, tag = "3")]
    RevertRoot(RevertRoot),
    /// See [`CertifyAuthority`].
    #[prost(message, tag = "4")]
    CertifyAuthority(CertifyAuthority),
    /// See [`RotateAuthority`].
    #[prost(message, tag = "5")]
    RotateAuthority(RotateAuthority),
    /// See [`AskRotation`].
    #[prost(message, tag = "6")]
    AskRotation(AskRotation),
    /// See [`RetireAuthority`].
    #[prost(message, tag = "7")]
    RetireAuthority(RetireAuthority),
    /// See [`Acknowledge`].
    #[prost(message, tag = "8")]
    Acknowledge(Acknowledge),
    /// See [`ReplicaReady`].
    #[prost(message, tag = "9")]
    ReplicaReady(ReplicaReady),
    /// See [`PublishCrl`].
    #[prost(message, tag = "10")]
    PublishCrl(PublishCrl),
}

/// Begins a rotation of the root: from here on both are trusted. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BeginRoot {
    /// The new root's certificate, DER.
    #[prost(bytes = "bytes", tag = "1")]
    pub der: Bytes,
    /// Its key, sealed.
    #[prost(bytes = "bytes", tag = "2")]
    pub key_sealed: Bytes,
    /// Why; may be empty.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Goes on to the next phase. Refused while somebody has not acknowledged the present one, unless forced. Actor:
/// admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AdvanceRoot {
    /// The phase that is left; another one means that somebody else was faster.
    #[prost(enumeration = "Phase", tag = "1")]
    pub from: i32,
    /// Also when somebody is left behind.
    #[prost(bool, tag = "2")]
    pub force: bool,
    /// Why; required when forced.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Goes back one phase; from the first, the rotation is given up. Actor: admin. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RevertRoot {
    /// The phase that is left.
    #[prost(enumeration = "Phase", tag = "1")]
    pub from: i32,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Records the certificate of an authority's key under a further trusted root. Actor: a replica or system. Reply:
/// `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertifyAuthority {
    /// The replica that holds the key.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// Which of its authorities.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// The root that signed.
    #[prost(uint32, tag = "3")]
    pub root: u32,
    /// The certificate, DER.
    #[prost(bytes = "bytes", tag = "4")]
    pub der: Bytes,
}

/// Gives a replica a new authority; the one before issues no more. Actor: that replica. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RotateAuthority {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// The number that follows the active one's.
    #[prost(uint32, tag = "2")]
    pub number: u32,
    /// The root that signed: the one that signs now.
    #[prost(uint32, tag = "3")]
    pub root: u32,
    /// The certificate, DER.
    #[prost(bytes = "bytes", tag = "4")]
    pub der: Bytes,
}

/// Asks a replica for a new authority; it makes one by itself, as soon as it runs. Actor: admin. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct AskRotation {
    /// The replica; 0: all members.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// Why; may be empty.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// Forgets an authority that issues no more and whose last certificate has expired. Actor: system or a replica.
/// Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RetireAuthority {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// Which of its authorities.
    #[prost(uint32, tag = "2")]
    pub number: u32,
}

/// Says who holds a generation of the bundle durably. Whoever is not trusted, or has said so before, is passed
/// over. Actor: a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Acknowledge {
    /// The generation.
    #[prost(uint64, tag = "1")]
    pub generation: u64,
    /// Devices, at most `limits::ACK_BATCH`.
    #[prost(message, repeated, tag = "2")]
    pub devices: Vec<Id>,
    /// Operators, at most `limits::ACK_BATCH`.
    #[prost(string, repeated, tag = "3")]
    pub operators: Vec<String>,
}

/// Says that a replica has taken a step: it trusts and shows what the state says, and has it on disk. Actor: that
/// replica. Reply: `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ReplicaReady {
    /// The replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// The step.
    #[prost(uint64, tag = "2")]
    pub step: u64,
}

/// Publishes a list of revoked certificates in place of an older one. Actor: the replica that signed it. Reply:
/// `Done`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PublishCrl {
    /// The list.
    #[prost(message, required, tag = "1")]
    pub crl: Crl,
}

/// Where the authorities stand; all zero before the cluster is born.
#[must_use]
pub fn ca(r: &dyn Read) -> Ca {
    tables::CA.get(r, ()).unwrap_or_default()
}

/// The root with this number.
#[must_use]
pub fn root(r: &dyn Read, number: u32) -> Option<Root> {
    tables::ROOTS.get(r, number)
}

/// All roots that are kept, oldest first, retired ones too.
#[must_use]
pub fn roots(r: &dyn Read) -> Vec<Root> {
    tables::ROOTS.list(r, (), usize::MAX)
}

/// The roots that are trusted, the one that signs first.
#[must_use]
pub fn trusted_roots(r: &dyn Read) -> Vec<Root> {
    let trusted = ca(r).trusted();
    trusted.into_iter().filter_map(|number| root(r, number)).collect()
}

/// One authority; number 0 means the replica's first.
#[must_use]
pub fn authority(r: &dyn Read, replica_id: u64, number: u32) -> Option<Authority> {
    tables::AUTHORITIES.get(r, (replica_id, number.max(1)))
}

/// All authorities, by replica and number.
#[must_use]
pub fn authorities(r: &dyn Read) -> Vec<Authority> {
    tables::AUTHORITIES.list(r, (), usize::MAX)
}

/// The authorities of a replica, by number.
#[must_use]
pub fn authorities_of(r: &dyn Read, replica_id: u64) -> Vec<Authority> {
    tables::AUTHORITIES.list(r, replica_id, usize::MAX)
}

/// The authority with which a replica issues.
#[must_use]
pub fn active_authority(r: &dyn Read, replica_id: u64) -> Option<Authority> {
    authorities_of(r, replica_id)
        .into_iter()
        .find(|one| one.status() == AuthorityStatus::Active)
}

/// What a device acknowledged.
#[must_use]
pub fn device_ack(r: &dyn Read, device_id: Id) -> Option<Ack> {
    tables::DEVICE_ACKS.get(r, device_id)
}

/// What an operator acknowledged.
#[must_use]
pub fn operator_ack(r: &dyn Read, name: &str) -> Option<Ack> {
    tables::MEMBER_ACKS.get(r, (OPERATOR, name))
}

/// The step that a replica has taken.
#[must_use]
pub fn replica_step(r: &dyn Read, replica_id: u64) -> u64 {
    let id = replica_id.to_string();
    tables::MEMBER_ACKS
        .get(r, (REPLICA, id.as_str()))
        .map_or(0, |ack| ack.number)
}

/// The list that an authority, or for replica 0 a root, has published.
#[must_use]
pub fn crl(r: &dyn Read, replica_id: u64, number: u32) -> Option<Crl> {
    tables::CRLS.get(r, (replica_id, number))
}

/// All published lists.
#[must_use]
pub fn crls(r: &dyn Read) -> Vec<Crl> {
    tables::CRLS.list(r, (), usize::MAX)
}

/// Certificates of an issuer that are revoked and end after `now`, those that end last first, at most `limit`.
#[must_use]
pub fn revoked_of(
    r: &dyn Read,
    replica_id: u64,
    number: u32,
    now: u64,
    limit: usize,
) -> Vec<RevokedCertificate> {
    let (from, to) = (
        tables::REVOKED.key((replica_id, number, now)),
        tables::REVOKED.key((replica_id, number, u64::MAX)),
    );
    let mut found = Vec::new();
    r.scan_rev(&from, &to, &mut |_, value| {
        if found.len() >= limit {
            return ControlFlow::Break(());
        }
        found.push(tables::REVOKED.decode(value));
        ControlFlow::Continue(())
    });
    found.retain(|one: &RevokedCertificate| one.not_after > now);
    found
}

/// How many certificates of an issuer end after `now`: issued ones, and revoked ones among them.
#[must_use]
pub fn live_of(r: &dyn Read, replica_id: u64, number: u32, now: u64) -> (u64, u64) {
    let count = |from: Vec<u8>, to: Vec<u8>| {
        let mut count = 0;
        r.scan(&from, &to, &mut |_, _| {
            count += 1;
            ControlFlow::Continue(())
        });
        count
    };
    let (first, last) = ((replica_id, number, now + 1), (replica_id, number, u64::MAX));
    (
        count(tables::ISSUED.key(first), tables::ISSUED.key(last)),
        count(tables::REVOKED.key(first), tables::REVOKED.key(last)),
    )
}

/// Kinds in the keys of acknowledgements.
pub(crate) const OPERATOR: u32 = 1;
/// See [`OPERATOR`].
pub(crate) const REPLICA: u32 = 2;
