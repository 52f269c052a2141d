//! What other domains write down here: certificates as they are issued and revoked, and who comes and goes.
//!
//! Rows of expired certificates go a few at a time, as others come, so that no entry has to sweep.

use super::{Ack, Ca, OPERATOR, REPLICA, RevokedCertificate, Root, authority, ca, device_ack, root};
use crate::identity::Certificate;
use crate::ids::{Fingerprint, Id};
use crate::read::Read as _;
use crate::tables::{self, Table};
use crate::txn::Txn;
use std::ops::ControlFlow;

/// Rows of expired certificates that one entry may forget, of each of the two tables.
const FORGET: usize = 4;

/// Writes the first root, at the birth of the cluster.
pub(crate) fn born(txn: &mut Txn<'_>, der: &bytes::Bytes, key_sealed: &bytes::Bytes) {
    let first = Ca {
        generation: 1,
        step: 1,
        issuing: 1,
        next_root: 2,
        phase_since: txn.now,
        ..Ca::default()
    };
    txn.put(&tables::CA, (), &first);
    let root = Root {
        number: 1,
        der: der.clone(),
        key_sealed: key_sealed.clone(),
        added_at: txn.now,
        added_by: txn.actor.to_string(),
        retired_at: 0,
        revoked_index: 0,
    };
    txn.put(&tables::ROOTS, 1u32, &root);
}

/// Counts a certificate to the authority that signed it.
pub(crate) fn issued(txn: &mut Txn<'_>, certificate: &Certificate) {
    let (replica_id, number) = certificate.issuer();
    if let Some(mut by) = authority(txn, replica_id, number) {
        by.last_not_after = by.last_not_after.max(certificate.not_after);
        by.issued += 1;
        txn.put(&tables::AUTHORITIES, (replica_id, number), &by);
    }
    let key = (
        (replica_id, number, certificate.not_after),
        certificate.fingerprint,
    );
    txn.mark(&tables::ISSUED, key);
    forget_expired(txn, &tables::ISSUED, (replica_id, number), FORGET);
}

/// Puts a certificate on the list of its issuer; one that has expired needs none.
pub(crate) fn revoked(txn: &mut Txn<'_>, certificate: &Certificate) {
    // Planted: the list of revoked certificates stays empty.
    if certificate.not_after <= txn.now || palyra_fault::planted("crl-forgets") {
        return;
    }
    let (replica_id, number) = certificate.issuer();
    let listed = RevokedCertificate {
        serial: certificate.serial.clone(),
        revoked_at: txn.now,
        not_after: certificate.not_after,
        fingerprint: certificate.fingerprint,
        subject: certificate.subject.clone(),
    };
    let key = (
        (replica_id, number, certificate.not_after),
        certificate.fingerprint,
    );
    txn.put(&tables::REVOKED, key, &listed);
    if let Some(mut by) = authority(txn, replica_id, number) {
        by.revoked_index = txn.index;
        txn.put(&tables::AUTHORITIES, (replica_id, number), &by);
    } else if replica_id == 0 {
        list_changed(txn, number);
    }
    forget_expired(txn, &tables::REVOKED, (replica_id, number), FORGET);
}

/// The list of a root has to be made anew.
pub(super) fn list_changed(txn: &mut Txn<'_>, number: u32) {
    if let Some(mut by) = root(txn, number) {
        by.revoked_index = txn.index;
        txn.put(&tables::ROOTS, number, &by);
    }
}

/// Takes rows of expired certificates out, the oldest first.
pub(super) fn forget_expired<V: prost::Message + Default>(
    txn: &mut Txn<'_>,
    table: &Table<V>,
    (replica_id, number): (u64, u32),
    limit: usize,
) {
    let (from, to) = (
        table.key((replica_id, number, 0u64)),
        table.key((replica_id, number, txn.now.saturating_add(1))),
    );
    let mut expired: Vec<(u64, Fingerprint)> = Vec::new();
    txn.scan(&from, &to, &mut |key, _| {
        let split = key.len() - 32;
        let at = key[split - 8..split].try_into().map(u64::from_be_bytes);
        if let (Ok(at), Some(fingerprint)) = (at, Fingerprint::from_slice(&key[split..])) {
            expired.push((at, fingerprint));
        }
        if expired.len() >= limit {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    });
    for (at, fingerprint) in expired {
        txn.delete(table, ((replica_id, number, at), fingerprint));
    }
}

/// A device is trusted from now on. It gets the bundle of now with its certificate, and so has acknowledged it.
pub(crate) fn device_trusted(txn: &mut Txn<'_>, device_id: Id) {
    let mut state = ca(txn);
    state.devices += 1;
    state.devices_acked += 1;
    let ack = Ack {
        number: state.generation,
        at: txn.now,
    };
    txn.put(&tables::DEVICE_ACKS, device_id, &ack);
    txn.put(&tables::CA, (), &state);
}

/// A device is trusted no more.
pub(crate) fn device_gone(txn: &mut Txn<'_>, device_id: Id) {
    let mut state = ca(txn);
    state.devices = state.devices.saturating_sub(1);
    if device_ack(txn, device_id).is_some_and(|ack| ack.number == state.generation) {
        state.devices_acked = state.devices_acked.saturating_sub(1);
    }
    txn.delete(&tables::DEVICE_ACKS, device_id);
    txn.put(&tables::CA, (), &state);
}

/// An operator is let in, and gets the bundle of now with its certificate.
pub(crate) fn operator_added(txn: &mut Txn<'_>, name: &str) {
    let ack = Ack {
        number: ca(txn).generation,
        at: txn.now,
    };
    txn.put(&tables::MEMBER_ACKS, (OPERATOR, name), &ack);
}

/// An operator is let in no more.
pub(crate) fn operator_gone(txn: &mut Txn<'_>, name: &str) {
    txn.delete(&tables::MEMBER_ACKS, (OPERATOR, name));
}

/// Writes down the step that a replica has taken.
pub(super) fn replica_ready(txn: &mut Txn<'_>, replica_id: u64, step: u64) {
    let ack = Ack {
        number: step,
        at: txn.now,
    };
    let id = replica_id.to_string();
    txn.put(&tables::MEMBER_ACKS, (REPLICA, id.as_str()), &ack);
}
