//! How authorities change. The rotation of the root is in `rotation`, what replicas report in `telling`.

use bytes::Bytes;

use super::books::{forget_expired, list_changed};
use super::rotation::{advance, begin, revert};
use super::telling::{acknowledge, publish, ready};
use super::{
    Action, AskRotation, Authority, AuthorityCertificate, AuthorityStatus, CertifyAuthority, REPLICA,
    RetireAuthority, RotateAuthority, active_authority, authorities_of, authority, ca,
};
use crate::actor::Actor;
use crate::identity::NewCertificate;
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{Counted, Reply};
use crate::txn::Txn;
use crate::{check, cluster, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::BeginRoot(command) => begin(txn, command),
        Action::AdvanceRoot(command) => advance(txn, command),
        Action::RevertRoot(command) => revert(txn, command),
        Action::CertifyAuthority(command) => certify(txn, command),
        Action::RotateAuthority(command) => rotate(txn, command),
        Action::AskRotation(command) => ask(txn, command),
        Action::RetireAuthority(command) => retire_authority(txn, command),
        Action::Acknowledge(command) => acknowledge(txn, command),
        Action::ReplicaReady(command) => ready(txn, command),
        Action::PublishCrl(command) => publish(txn, command),
    }
}

fn bad_authority(replica_id: u64, cause: &str) -> Reject {
    Reject::new(Code::BadAuthority, [&replica_id, &cause])
}

pub(super) fn known(r: &dyn Read, replica_id: u64, number: u32) -> Result<Authority, Reject> {
    authority(r, replica_id, number).ok_or_else(|| Reject::new(Code::NoSuchAuthority, [&replica_id, &number]))
}

fn certify(txn: &mut Txn<'_>, command: &CertifyAuthority) -> Result<Reply, Reject> {
    check::bytes("the authority certificate", &command.der, limits::CERTIFICATE_MAX)?;
    let mut one = known(txn, command.replica_id, command.number)?;
    if !ca(txn).trusted().contains(&command.root) {
        return Err(bad_authority(
            one.replica_id,
            "the root that signed it is not trusted",
        ));
    }
    if one.under(command.root).is_some() {
        return Ok(Reply::done());
    }
    one.certificates.push(AuthorityCertificate {
        root: command.root,
        der: command.der.clone(),
    });
    txn.put(&tables::AUTHORITIES, (one.replica_id, one.number), &one);
    txn.emit(
        "ca.authority_certified",
        one.replica_id,
        [
            ("authority", one.number.to_string()),
            ("root", command.root.to_string()),
        ],
    );
    Ok(Reply::done())
}

pub(super) fn own(txn: &Txn<'_>, replica_id: u64) -> Result<(), Reject> {
    match txn.actor {
        Actor::Replica { id } if *id != replica_id => Err(Reject::new(
            Code::NotYours,
            [txn.actor, &format_args!("replica/{replica_id}")],
        )),
        _ => Ok(()),
    }
}

fn rotate(txn: &mut Txn<'_>, command: &RotateAuthority) -> Result<Reply, Reject> {
    own(txn, command.replica_id)?;
    check::bytes("the authority certificate", &command.der, limits::CERTIFICATE_MAX)?;
    let id = command.replica_id;
    let Some(mut before) = active_authority(txn, id) else {
        return Err(Reject::new(Code::NoSuchAuthority, [&id, &command.number]));
    };
    if command.number != before.number + 1 {
        let cause = format!(
            "its number is {}, and {} is active",
            command.number, before.number
        );
        return Err(bad_authority(id, &cause));
    }
    if command.root != ca(txn).issuing {
        return Err(bad_authority(id, "another root signs now"));
    }
    if authorities_of(txn, id).len() >= limits::AUTHORITIES {
        return Err(bad_authority(
            id,
            "too many of its older ones have certificates that are good; wait until some expire",
        ));
    }
    before.set_status(AuthorityStatus::Retiring);
    before.since = txn.now;
    before.rotation_asked_at = 0;
    txn.put(&tables::AUTHORITIES, (id, before.number), &before);
    put_new(txn, id, command.number, command.root, &command.der);
    if let Some(mut record) = cluster::replica(txn, id) {
        record.authority_cert_der = command.der.clone();
        txn.put(&tables::REPLICAS, id, &record);
    }
    txn.emit(
        "ca.authority_rotated",
        id,
        [
            ("from", before.number.to_string()),
            ("to", command.number.to_string()),
            ("root", command.root.to_string()),
            (
                "old_until",
                if before.last_not_after > txn.now {
                    before.last_not_after.to_string()
                } else {
                    String::new()
                },
            ),
        ],
    );
    Ok(Reply::done())
}

fn put_new(txn: &mut Txn<'_>, replica_id: u64, number: u32, root: u32, der: &Bytes) {
    let new = Authority {
        replica_id,
        number,
        status: AuthorityStatus::Active as i32,
        certificates: vec![AuthorityCertificate {
            root,
            der: der.clone(),
        }],
        created_at: txn.now,
        since: txn.now,
        last_not_after: 0,
        rotation_asked_at: 0,
        issued: 0,
        revoked_index: 0,
    };
    txn.put(&tables::AUTHORITIES, (replica_id, number), &new);
}

/// The first authority of a replica that is admitted; `root` 0 means the first.
pub(crate) fn replica_admitted(
    txn: &mut Txn<'_>,
    replica_id: u64,
    root: u32,
    der: &Bytes,
) -> Result<(), Reject> {
    let root = root.max(1);
    if root != ca(txn).issuing {
        return Err(bad_authority(replica_id, "another root signs now"));
    }
    put_new(txn, replica_id, 1, root, der);
    Ok(())
}

/// A removed replica issues no more, and nobody waits for it.
pub(crate) fn replica_removed(txn: &mut Txn<'_>, replica_id: u64) {
    if let Some(mut active) = active_authority(txn, replica_id) {
        active.set_status(AuthorityStatus::Retiring);
        active.since = txn.now;
        txn.put(&tables::AUTHORITIES, (replica_id, active.number), &active);
    }
    // Nobody can sign the list of its authority any more; the roots list the authority itself.
    for number in ca(txn).trusted() {
        list_changed(txn, number);
    }
    let id = replica_id.to_string();
    txn.delete(&tables::MEMBER_ACKS, (REPLICA, id.as_str()));
}

/// Refuses a certificate whose issuer is not known, or not trusted any more.
pub(crate) fn check_issuer(r: &dyn Read, new: &NewCertificate) -> Result<(), Reject> {
    let number = new.authority_number.max(1);
    let (known, cause) = match new.authority {
        0 => (
            ca(r).trusted().contains(&number),
            "the root that signed it is not trusted",
        ),
        replica_id => (
            authority(r, replica_id, number).is_some(),
            "the authority that signed it is not known",
        ),
    };
    if known {
        Ok(())
    } else {
        Err(Reject::new(Code::BadCertificate, [&cause]))
    }
}

fn ask(txn: &mut Txn<'_>, command: &AskRotation) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let members = cluster::replicas(txn).into_iter().filter(|one| one.is_member());
    let asked: Vec<u64> = members
        .map(|member| member.id)
        .filter(|id| command.replica_id == 0 || command.replica_id == *id)
        .collect();
    if asked.is_empty() {
        return Err(Reject::new(Code::NoSuchReplica, [&command.replica_id]));
    }
    let mut count = 0;
    for id in asked {
        let Some(mut active) = active_authority(txn, id).filter(|one| one.rotation_asked_at == 0) else {
            continue;
        };
        active.rotation_asked_at = txn.now;
        txn.put(&tables::AUTHORITIES, (id, active.number), &active);
        txn.emit(
            "ca.rotation_asked",
            id,
            [
                ("authority", active.number.to_string()),
                ("reason", command.reason.clone()),
            ],
        );
        count += 1;
    }
    Ok(Reply::Counted(Counted { count }))
}

fn retire_authority(txn: &mut Txn<'_>, command: &RetireAuthority) -> Result<Reply, Reject> {
    let one = known(txn, command.replica_id, command.number)?;
    if one.status() == AuthorityStatus::Active || one.last_not_after > txn.now {
        return Err(Reject::new(
            Code::AuthorityInUse,
            [&one.replica_id, &one.number, &one.last_not_after],
        ));
    }
    let issuer = (one.replica_id, one.number);
    txn.delete(&tables::AUTHORITIES, issuer);
    txn.delete(&tables::CRLS, issuer);
    forget_expired(txn, &tables::ISSUED, issuer, limits::CRL_ENTRIES);
    forget_expired(txn, &tables::REVOKED, issuer, limits::CRL_ENTRIES);
    txn.emit(
        "ca.authority_retired",
        one.replica_id,
        [
            ("authority", one.number.to_string()),
            ("issued", one.issued.to_string()),
        ],
    );
    Ok(Reply::done())
}
