//! How the cluster and its replicas change.

use super::{
    Action, Addresses, AdmitReplica, AllocateReplica, AnnounceCertificate, Cluster, Genesis, JoinToken,
    MintJoinToken, RaiseFeatureLevel, RemoveReplica, Replica, ReplicaStatus, SetReplicaStatus,
    UpdateReplicaAddresses, cluster, join_token, join_tokens, next_feature_level, replica, replicas,
};
use crate::access::{self, Role};
use crate::actor::Actor;
use crate::identity::{self, CertificateKind};
use crate::ids::{Fingerprint, Id};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::{ReplicaAllocated, Reply, TokenMinted};
use crate::txn::Txn;
use crate::{ca, check, limits, tables};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::Genesis(command) => genesis(txn, command),
        Action::MintJoinToken(command) => mint_token(txn, command),
        Action::AllocateReplica(command) => allocate(txn, command),
        Action::AdmitReplica(command) => admit(txn, command),
        Action::SetReplicaStatus(command) => set_status(txn, command),
        Action::UpdateReplicaAddresses(command) => update_addresses(txn, command),
        Action::RemoveReplica(command) => remove(txn, command),
        Action::RaiseFeatureLevel(command) => raise_level(txn, command),
        Action::AnnounceCertificate(command) => announce(txn, command),
    }
}

fn genesis(txn: &mut Txn<'_>, command: &Genesis) -> Result<Reply, Reject> {
    if let Some(born) = cluster(txn) {
        return Err(Reject::new(Code::ClusterExists, [&born.cluster_id]));
    }
    check_genesis(command)?;
    let born = Cluster {
        cluster_id: command.cluster_id,
        trust_domain: command.trust_domain.clone(),
        root_cert_der: command.root_cert_der.clone(),
        root_key_sealed: command.root_key_sealed.clone(),
        created_at: txn.now,
        feature_level: limits::FIRST_FEATURE_LEVEL,
        next_replica_id: 2,
    };
    txn.put(&tables::CLUSTER, (), &born);
    ca::born(txn, &command.root_cert_der, &command.root_key_sealed);
    ca::replica_admitted(txn, 1, 1, &command.authority_cert_der)?;
    let first = Replica {
        id: 1,
        name: command.replica_name.clone(),
        status: ReplicaStatus::Voter as i32,
        addresses: command.addresses.clone(),
        authority_cert_der: command.authority_cert_der.clone(),
        certificate: command.replica_certificate.fingerprint(),
        joined_at: txn.now,
        removed_at: 0,
        feature_level: 0,
        max_staleness_ms: 0,
        certificate_not_after: 0,
    };
    txn.put(&tables::REPLICAS, 1u64, &first);
    txn.emit(
        "cluster.genesis",
        command.cluster_id,
        [
            ("trust_domain", command.trust_domain.clone()),
            ("replica", command.replica_name.clone()),
        ],
    );
    identity::record(
        txn,
        CertificateKind::Replica,
        "1",
        &command.replica_certificate,
        None,
    )?;
    access::admit(
        txn,
        &command.operator_name,
        Role::Admin,
        &command.operator_certificate,
    )?;
    Ok(Reply::done())
}

fn check_genesis(command: &Genesis) -> Result<(), Reject> {
    check::id("the cluster id", command.cluster_id)?;
    check::filled("the trust domain", &command.trust_domain, 253)?;
    check::bytes(
        "the root certificate",
        &command.root_cert_der,
        limits::CERTIFICATE_MAX,
    )?;
    check::bytes(
        "the sealed root key",
        &command.root_key_sealed,
        limits::SEALED_MAX,
    )?;
    check::bytes(
        "the authority certificate",
        &command.authority_cert_der,
        limits::CERTIFICATE_MAX,
    )?;
    check_replica_name(&command.replica_name)?;
    check_addresses(&command.addresses)?;
    if !check::is_short_name(&command.operator_name) {
        return Err(Reject::new(
            Code::BadOperatorName,
            [&check::quoted(&command.operator_name)],
        ));
    }
    Ok(())
}

fn mint_token(txn: &mut Txn<'_>, command: &MintJoinToken) -> Result<Reply, Reject> {
    let id = command.token_id;
    check::id("the token id", id)?;
    check_replica_name(&command.name)?;
    check::bytes(
        "the sealed secret",
        &command.secret_key_sealed,
        limits::SEALED_MAX,
    )?;
    let ttl = if command.ttl_ms == 0 {
        limits::JOIN_TOKEN_TTL
    } else {
        command.ttl_ms
    };
    if !(limits::JOIN_TOKEN_TTL_MIN..=limits::JOIN_TOKEN_TTL_MAX).contains(&ttl) {
        return Err(Reject::new(Code::CodeTtl, [&ttl]));
    }
    if join_token(txn, id).is_some() {
        return Err(check::invalid("the token id", &"it exists already"));
    }
    // Planted: a replica that lost its disk comes back as who it was.
    let comes_back = palyra_fault::planted("wiped-comes-back");
    let is_taken = |replica: &Replica| replica.status() != ReplicaStatus::Allocated && !comes_back;
    if let Some(taken) = replica_named(txn, &command.name).filter(is_taken) {
        return Err(Reject::new(Code::ReplicaNameTaken, [&command.name, &taken.id]));
    }
    make_token_room(txn)?;
    let token = JoinToken {
        id,
        secret_key_sealed: command.secret_key_sealed.clone(),
        name: command.name.clone(),
        expires_at: txn.now + ttl,
        used_by: 0,
        issued_by: txn.actor.to_string(),
        created_at: txn.now,
    };
    txn.put(&tables::JOIN_TOKENS, id, &token);
    txn.emit(
        "cluster.join_token_minted",
        id,
        [
            ("name", token.name.clone()),
            ("expires_at", token.expires_at.to_string()),
        ],
    );
    Ok(Reply::TokenMinted(TokenMinted {
        token_id: id,
        expires_at: token.expires_at,
    }))
}

/// Forgets the oldest used or expired token when there is no room for another.
fn make_token_room(txn: &mut Txn<'_>) -> Result<(), Reject> {
    let tokens = join_tokens(txn);
    if tokens.len() < limits::JOIN_TOKENS {
        return Ok(());
    }
    let Some(old) = tokens
        .iter()
        .find(|token| token.used_by != 0 || txn.now >= token.expires_at)
    else {
        return Err(Reject::new(Code::TooManyJoinTokens, [&tokens.len()]));
    };
    txn.delete(&tables::JOIN_TOKENS, old.id);
    Ok(())
}

fn allocate(txn: &mut Txn<'_>, command: &AllocateReplica) -> Result<Reply, Reject> {
    check_addresses(&command.addresses)?;
    let mut token = usable_token(txn, command.token_id, &command.name)?;
    match replica_named(txn, &command.name) {
        // A join that died between its two entries holds the name and nothing else.
        Some(mut left) if left.status() == ReplicaStatus::Allocated => {
            set_removed(txn, &mut left);
        }
        // Planted: a replica that lost its disk comes back as who it was.
        Some(mut known) if palyra_fault::planted("wiped-comes-back") => {
            known.set_status(ReplicaStatus::Allocated);
            txn.put(&tables::REPLICAS, known.id, &known);
            return Ok(Reply::ReplicaAllocated(ReplicaAllocated { replica_id: known.id }));
        }
        Some(taken) => return Err(Reject::new(Code::ReplicaNameTaken, [&command.name, &taken.id])),
        None => {}
    }
    let mut born = cluster(txn).ok_or_else(|| Reject::new(Code::NoCluster, []))?;
    let present = replicas(txn)
        .iter()
        .filter(|replica| replica.status() != ReplicaStatus::Removed)
        .count();
    if present >= limits::REPLICAS || born.next_replica_id > limits::REPLICAS_EVER {
        return Err(Reject::new(Code::TooManyReplicas, [&limits::REPLICAS]));
    }
    let id = born.next_replica_id;
    born.next_replica_id += 1;
    txn.put(&tables::CLUSTER, (), &born);
    token.used_by = id;
    txn.put(&tables::JOIN_TOKENS, token.id, &token);
    let new = Replica {
        id,
        name: command.name.clone(),
        status: ReplicaStatus::Allocated as i32,
        addresses: command.addresses.clone(),
        authority_cert_der: bytes::Bytes::new(),
        certificate: Fingerprint::ZERO,
        joined_at: txn.now,
        removed_at: 0,
        feature_level: 0,
        max_staleness_ms: 0,
        certificate_not_after: 0,
    };
    txn.put(&tables::REPLICAS, id, &new);
    txn.emit(
        "cluster.replica_allocated",
        id,
        [
            ("name", new.name.clone()),
            ("peer", new.addresses.peer.clone()),
            ("token", token.id.to_string()),
        ],
    );
    Ok(Reply::ReplicaAllocated(ReplicaAllocated { replica_id: id }))
}

fn usable_token(r: &Txn<'_>, id: Id, name: &str) -> Result<JoinToken, Reject> {
    let token = join_token(r, id).ok_or_else(|| Reject::new(Code::NoSuchJoinToken, [&id]))?;
    if token.used_by != 0 {
        return Err(Reject::new(Code::JoinTokenUsed, [&id, &token.used_by]));
    }
    if r.now >= token.expires_at {
        return Err(Reject::new(Code::JoinTokenExpired, [&id, &token.expires_at]));
    }
    if token.name != name {
        return Err(Reject::new(Code::JoinTokenName, [&id, &token.name, &name]));
    }
    Ok(token)
}

fn admit(txn: &mut Txn<'_>, command: &AdmitReplica) -> Result<Reply, Reject> {
    check::bytes(
        "the authority certificate",
        &command.authority_cert_der,
        limits::CERTIFICATE_MAX,
    )?;
    let mut replica = known(txn, command.replica_id)?;
    if replica.status() != ReplicaStatus::Allocated {
        return Err(refused_change(&replica, ReplicaStatus::Joining));
    }
    ca::replica_admitted(txn, replica.id, command.root, &command.authority_cert_der)?;
    let subject = replica.id.to_string();
    replica.certificate = identity::record(
        txn,
        CertificateKind::Replica,
        &subject,
        &command.certificate,
        None,
    )?;
    replica.authority_cert_der = command.authority_cert_der.clone();
    replica.set_status(ReplicaStatus::Joining);
    txn.put(&tables::REPLICAS, replica.id, &replica);
    txn.emit(
        "cluster.replica_admitted",
        replica.id,
        [
            ("name", replica.name.clone()),
            ("fingerprint", replica.certificate.to_string()),
        ],
    );
    Ok(Reply::done())
}

fn announce(txn: &mut Txn<'_>, command: &AnnounceCertificate) -> Result<Reply, Reject> {
    let id = command.replica_id;
    if matches!(txn.actor, Actor::Replica { id: own } if *own != id) {
        return Err(Reject::new(
            Code::NotYours,
            [txn.actor, &format_args!("replica/{id}")],
        ));
    }
    if command.certificate.is_zero() || command.not_after <= txn.now {
        return Err(Reject::new(Code::BadCertificate, [&"it is not valid now"]));
    }
    let mut replica = known(txn, id)?;
    let said = (replica.certificate, replica.certificate_not_after);
    if said == (command.certificate, command.not_after) {
        return Ok(Reply::done());
    }
    if !replica.is_member() {
        return Err(Reject::new(Code::ReplicaUnknown, [&id]));
    }
    // Only what it shows: who speaks for a replica is decided by its chain and its membership.
    replica.certificate = command.certificate;
    replica.certificate_not_after = command.not_after;
    txn.put(&tables::REPLICAS, id, &replica);
    txn.emit(
        "cluster.replica_certificate",
        id,
        [
            ("name", replica.name.clone()),
            ("fingerprint", replica.certificate.to_string()),
            ("not_after", command.not_after.to_string()),
        ],
    );
    Ok(Reply::done())
}

fn set_status(txn: &mut Txn<'_>, command: &SetReplicaStatus) -> Result<Reply, Reject> {
    let mut replica = known(txn, command.replica_id)?;
    let (before, after) = (replica.status(), command.status());
    if before == after {
        return Ok(Reply::done());
    }
    let member = |status| {
        matches!(
            status,
            ReplicaStatus::Joining | ReplicaStatus::Learner | ReplicaStatus::Voter
        )
    };
    if !member(before) || !member(after) {
        return Err(refused_change(&replica, after));
    }
    if before == ReplicaStatus::Voter && is_last_voter(txn, replica.id) {
        return Err(Reject::new(Code::LastVoter, [&replica.id]));
    }
    replica.set_status(after);
    txn.put(&tables::REPLICAS, replica.id, &replica);
    txn.emit(
        "cluster.replica_status",
        replica.id,
        [
            ("name", replica.name.clone()),
            ("from", before.as_str().to_owned()),
            ("to", after.as_str().to_owned()),
        ],
    );
    Ok(Reply::done())
}

fn update_addresses(txn: &mut Txn<'_>, command: &UpdateReplicaAddresses) -> Result<Reply, Reject> {
    check_addresses(&command.addresses)?;
    let mut replica = known(txn, command.replica_id)?;
    if let Actor::Replica { id } = txn.actor
        && *id != replica.id
    {
        return Err(Reject::new(
            Code::NotYours,
            [txn.actor, &format_args!("replica/{}", replica.id)],
        ));
    }
    if replica.status() == ReplicaStatus::Removed {
        return Err(Reject::new(Code::ReplicaRemoved, [&replica.id]));
    }
    let said = command.feature_level;
    let levels = (said != 0 && said != replica.understands()).then_some((replica.understands(), said));
    let said = command.max_staleness_ms;
    let stales = (said != 0 && said != replica.max_staleness_ms).then_some((replica.max_staleness_ms, said));
    let has_moved = replica.addresses != command.addresses;
    if !has_moved && levels.is_none() && stales.is_none() {
        return Ok(Reply::done());
    }
    if let Some((before, after)) = stales {
        replica.max_staleness_ms = after;
        txn.emit(
            "cluster.replica_staleness",
            replica.id,
            [("from_ms", before.to_string()), ("to_ms", after.to_string())],
        );
    }
    replica.addresses = command.addresses.clone();
    if let Some((before, after)) = levels {
        replica.feature_level = after;
        txn.emit(
            "cluster.replica_level",
            replica.id,
            [("from", before.to_string()), ("to", after.to_string())],
        );
    }
    txn.put(&tables::REPLICAS, replica.id, &replica);
    if has_moved {
        txn.emit(
            "cluster.replica_moved",
            replica.id,
            [
                ("peer", replica.addresses.peer.clone()),
                ("node", replica.addresses.node.clone()),
                ("enrol", replica.addresses.enrol.clone()),
                ("quic", replica.addresses.quic.clone()),
            ],
        );
    }
    Ok(Reply::done())
}

fn remove(txn: &mut Txn<'_>, command: &RemoveReplica) -> Result<Reply, Reject> {
    let mut replica = known(txn, command.replica_id)?;
    if replica.status() == ReplicaStatus::Removed {
        return Ok(Reply::done());
    }
    if replica.status() == ReplicaStatus::Voter && is_last_voter(txn, replica.id) {
        return Err(Reject::new(Code::LastVoter, [&replica.id]));
    }
    set_removed(txn, &mut replica);
    Ok(Reply::done())
}

fn set_removed(txn: &mut Txn<'_>, replica: &mut Replica) {
    replica.set_status(ReplicaStatus::Removed);
    replica.removed_at = txn.now;
    txn.put(&tables::REPLICAS, replica.id, replica);
    identity::revoke_all(txn, CertificateKind::Replica, &replica.id.to_string());
    ca::replica_removed(txn, replica.id);
    txn.emit(
        "cluster.replica_removed",
        replica.id,
        [("name", replica.name.clone())],
    );
}

fn raise_level(txn: &mut Txn<'_>, command: &RaiseFeatureLevel) -> Result<Reply, Reject> {
    let mut born = cluster(txn).ok_or_else(|| Reject::new(Code::NoCluster, []))?;
    let (before, after) = (born.feature_level, command.level);
    if before == after {
        return Ok(Reply::done());
    }
    // What the members said decides, never what this binary understands: replicas of two versions apply this.
    if next_feature_level(txn).is_none_or(|common| after > common) || after < before {
        return Err(Reject::new(Code::FeatureLevel, [&before, &after]));
    }
    born.feature_level = after;
    txn.put(&tables::CLUSTER, (), &born);
    txn.emit(
        "cluster.feature_level",
        born.cluster_id,
        [("from", before.to_string()), ("to", after.to_string())],
    );
    Ok(Reply::done())
}

fn known(r: &dyn Read, id: u64) -> Result<Replica, Reject> {
    replica(r, id).ok_or_else(|| Reject::new(Code::NoSuchReplica, [&id]))
}

fn refused_change(replica: &Replica, to: ReplicaStatus) -> Reject {
    if replica.status() == ReplicaStatus::Removed {
        return Reject::new(Code::ReplicaRemoved, [&replica.id]);
    }
    Reject::new(
        Code::ReplicaStatusChange,
        [&replica.id, &replica.status().as_str(), &to.as_str()],
    )
}

/// The replica of this name that is not removed.
fn replica_named(r: &dyn Read, name: &str) -> Option<Replica> {
    replicas(r)
        .into_iter()
        .find(|replica| replica.name == name && replica.status() != ReplicaStatus::Removed)
}

fn is_last_voter(r: &dyn Read, id: u64) -> bool {
    replicas(r)
        .iter()
        .all(|replica| replica.id == id || replica.status() != ReplicaStatus::Voter)
}

fn check_replica_name(name: &str) -> Result<(), Reject> {
    if check::is_short_name(name) {
        return Ok(());
    }
    Err(check::invalid(
        "the replica's name",
        &"use lower-case letters, digits, `.`, `_` and `-`, 63 at most",
    ))
}

fn check_addresses(addresses: &Addresses) -> Result<(), Reject> {
    check::filled("the peer address", &addresses.peer, limits::REASON_MAX)?;
    check::filled("the node address", &addresses.node, limits::REASON_MAX)?;
    check::filled("the enrol address", &addresses.enrol, limits::REASON_MAX)?;
    check::text("the HTTP address", &addresses.http, limits::REASON_MAX)?;
    check::text("the metrics address", &addresses.metrics, limits::REASON_MAX)?;
    check::text("the QUIC address", &addresses.quic, limits::REASON_MAX)
}
