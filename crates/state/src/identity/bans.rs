//! Devices that were removed, and what stays refused of them.
//!
//! What never lives here: the revocation (`rules`), which comes first. Invariants: a ban outlives the record of its
//! device, holds its id and its keys until it is purged, and is never pushed out by others: when the table is full no
//! more devices can be removed; certificates of a removed device stay recorded, as revoked, until they have expired.

use std::ops::ControlFlow;

use super::rules::{revoke, use_of};
use super::{
    CertificateKind, Device, DeviceStatus, KeyOwner, PurgeDevice, RemoveDevice, certificates_of, device,
    device_of_key,
};
use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{Reply, Revoked};
use crate::tables;
use crate::txn::Txn;
use crate::{check, fleet, limits, nodes};

/// A device that was removed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Ban {
    /// The device id.
    #[prost(message, required, tag = "1")]
    pub id: Id,
    /// What it was called.
    #[prost(string, tag = "2")]
    pub name: String,
    /// Why it was revoked, or removed when that has a reason of its own.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// When it was revoked.
    #[prost(uint64, tag = "4")]
    pub revoked_at: u64,
    /// Actor who revoked it.
    #[prost(string, tag = "5")]
    pub revoked_by: String,
    /// Log index of the revocation.
    #[prost(uint64, tag = "6")]
    pub revoked_index: u64,
    /// When it was removed.
    #[prost(uint64, tag = "7")]
    pub removed_at: u64,
    /// Actor who removed it.
    #[prost(string, tag = "8")]
    pub removed_by: String,
    /// SHA-256 of the SubjectPublicKeyInfo of each key that is known of it.
    #[prost(message, repeated, tag = "9")]
    pub keys: Vec<Fingerprint>,
    /// First moment at which all its certificates have expired; 0 when none was left.
    #[prost(uint64, tag = "10")]
    pub expires_at: u64,
}

/// What is refused of a removed device.
#[must_use]
pub fn ban(r: &dyn Read, device_id: Id) -> Option<Ban> {
    tables::BANS.get(r, device_id)
}

/// Removed devices by id, at most `limit`, from the one after `after` on.
#[must_use]
pub fn bans(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Ban> {
    tables::BANS.page(r, (), after, limit)
}

/// Removed devices whose id begins with `prefix` (text form, either case), at most `limit`.
#[must_use]
pub fn bans_by_prefix(r: &dyn Read, prefix: &str, limit: usize) -> Vec<Ban> {
    let Some((first, last)) = Id::prefix_range(prefix) else {
        return Vec::new();
    };
    tables::BANS.between(r, first, last, limit)
}

/// Refuses what a removed device is known by: its id, or one of its keys.
pub(crate) fn check_ban(r: &dyn Read, device_id: Id, spki: Option<Fingerprint>) -> Result<(), Reject> {
    let owner = spki.and_then(|spki| device_of_key(r, spki));
    match [Some(device_id), owner]
        .into_iter()
        .flatten()
        .find(|id| ban(r, *id).is_some())
    {
        Some(banned) => Err(Reject::new(Code::DeviceBanned, [&banned])),
        None => Ok(()),
    }
}

pub(super) fn remove(txn: &mut Txn<'_>, command: &RemoveDevice) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.device_id;
    let Some(mut known) = device(txn, id) else {
        return match ban(txn, id) {
            Some(ban) => Ok(answer(ban.revoked_index, true, 0)),
            None => Err(Reject::new(Code::NoSuchDevice, [&id])),
        };
    };
    if nodes::totals(txn).bans >= limits::BANS {
        return Err(Reject::new(Code::TooManyBans, [&limits::BANS]));
    }
    let mut cancelled = 0;
    if known.status() == DeviceStatus::Trusted {
        if !command.revoke {
            return Err(Reject::new(Code::DeviceTrusted, [&id]));
        }
        cancelled = revoke(txn, &mut known, &command.reason);
    }
    forget_expired(txn);
    insert(txn, &known, &command.reason);
    txn.delete(&tables::DEVICES, id);
    nodes::forget(txn, id);
    fleet::forget(txn, id);
    Ok(answer(known.revoked_index, false, cancelled))
}

fn answer(index: u64, already: bool, cancelled: u32) -> Reply {
    Reply::Revoked(Revoked {
        index,
        already,
        cancelled,
    })
}

fn insert(txn: &mut Txn<'_>, known: &Device, reason: &str) {
    let id = known.id;
    let certificates = certificates_of(txn, CertificateKind::Node, &id.to_string());
    let mut keys: Vec<Fingerprint> = certificates.iter().map(|certificate| certificate.spki).collect();
    keys.push(known.spki);
    keys.sort_unstable();
    keys.dedup();
    for key in &keys {
        txn.put(&tables::DEVICE_KEYS, *key, &KeyOwner { device_id: id });
    }
    let ends = certificates.iter().map(|certificate| certificate.not_after);
    let new = Ban {
        id,
        name: known.name.clone(),
        reason: use_of(reason, &known.reason),
        revoked_at: known.revoked_at,
        revoked_by: known.revoked_by.clone(),
        revoked_index: known.revoked_index,
        removed_at: txn.now,
        removed_by: txn.actor.to_string(),
        keys,
        expires_at: ends.max().unwrap_or_default(),
    };
    txn.put(&tables::BANS, id, &new);
    if new.expires_at != 0 {
        txn.mark(&tables::BANS_DUE, (new.expires_at, id));
    }
    nodes::count_ban(txn, true);
    txn.emit(
        "identity.device_removed",
        id,
        [
            ("name", new.name.clone()),
            ("reason", reason.to_owned()),
            ("revoked_index", new.revoked_index.to_string()),
            ("keys", new.keys.len().to_string()),
            ("expires_at", new.expires_at.to_string()),
        ],
    );
}

/// Forgets the expired certificates of a few removed devices: more than one entry adds, so that they do not pile up.
fn forget_expired(txn: &mut Txn<'_>) {
    let now = txn.now;
    let mut due = Vec::new();
    tables::BANS_DUE.visit(txn, (), None, &mut |key, _| {
        let at = key
            .first_chunk()
            .map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes));
        if at > now || due.len() >= limits::BANS_SWEPT {
            return ControlFlow::Break(());
        }
        due.extend(Id::from_slice(&key[8..]).map(|id| (at, id)));
        ControlFlow::Continue(())
    });
    for (at, id) in due {
        txn.delete(&tables::BANS_DUE, (at, id));
        forget_certificates(txn, id);
    }
}

fn forget_certificates(txn: &mut Txn<'_>, id: Id) {
    let subject = id.to_string();
    let kind = CertificateKind::Node;
    for old in certificates_of(txn, kind, &subject) {
        txn.delete(&tables::CERTIFICATES, old.fingerprint);
        txn.delete(
            &tables::CERTIFICATES_OF,
            (kind as u32, tables::Text(&subject), old.fingerprint),
        );
    }
}

pub(super) fn purge(txn: &mut Txn<'_>, command: &PurgeDevice) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.device_id;
    let Some(old) = ban(txn, id) else {
        return Err(match device(txn, id) {
            Some(known) => Reject::new(Code::DeviceNotRemoved, [&id, &known.status().as_str()]),
            None => Reject::new(Code::NoSuchDevice, [&id]),
        });
    };
    let valid = old.expires_at > txn.now;
    if valid && !command.force {
        return Err(Reject::new(Code::CertificatesValid, [&id, &old.expires_at]));
    }
    forget_certificates(txn, id);
    for key in &old.keys {
        if device_of_key(txn, *key) == Some(id) {
            txn.delete(&tables::DEVICE_KEYS, *key);
        }
    }
    txn.delete(&tables::BANS_DUE, (old.expires_at, id));
    txn.delete(&tables::BANS, id);
    nodes::count_ban(txn, false);
    txn.emit(
        "identity.device_purged",
        id,
        [
            ("name", old.name),
            ("reason", command.reason.clone()),
            ("forced", valid.to_string()),
        ],
    );
    Ok(Reply::done())
}
