//! How roots and authorities change, and what holds a rotation back.

use bytes::Bytes;

use super::books::{forget_expired, list_changed, replica_ready};
use super::{
    Ack, Acknowledge, Action, AdvanceRoot, AskRotation, Authority, AuthorityCertificate, AuthorityStatus,
    BeginRoot, Ca, CertifyAuthority, OPERATOR, Phase, PublishCrl, REPLICA, ReplicaReady, RetireAuthority,
    RevertRoot, Root, RotateAuthority, active_authority, authorities, authorities_of, authority, ca, crl,
    device_ack, operator_ack, replica_step, root, roots,
};
use crate::access::{self, OperatorStatus};
use crate::actor::Actor;
use crate::identity::{self, DeviceStatus, NewCertificate};
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

fn begin(txn: &mut Txn<'_>, command: &BeginRoot) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    check::bytes("the root certificate", &command.der, limits::CERTIFICATE_MAX)?;
    check::bytes("the sealed root key", &command.key_sealed, limits::SEALED_MAX)?;
    let mut state = ca(txn);
    if state.phase() != Phase::Idle {
        return Err(Reject::new(
            Code::RotationUnderWay,
            [&state.phase().as_str(), &state.begun_by],
        ));
    }
    if roots(txn).iter().any(|known| known.der == command.der) {
        return Err(Reject::new(
            Code::BadRoot,
            [&"it is, or was, one of this cluster"],
        ));
    }
    make_root_room(txn);
    let new = Root {
        number: state.next_root,
        der: command.der.clone(),
        key_sealed: command.key_sealed.clone(),
        added_at: txn.now,
        added_by: txn.actor.to_string(),
        retired_at: 0,
        revoked_index: 0,
    };
    txn.put(&tables::ROOTS, new.number, &new);
    state.other = new.number;
    state.next_root += 1;
    state.begun_by = txn.actor.to_string();
    change_bundle(&mut state);
    enter(txn, state, Phase::Distribute);
    txn.emit(
        "ca.rotation_begun",
        new.fingerprint(),
        [
            ("root", new.number.to_string()),
            ("phase", Phase::Distribute.as_str().to_owned()),
            ("reason", command.reason.clone()),
        ],
    );
    Ok(Reply::done())
}

/// Forgets the oldest retired root when there is no room for another.
fn make_root_room(txn: &mut Txn<'_>) {
    let kept = roots(txn);
    let retired = kept.iter().find(|known| known.retired_at != 0);
    if kept.len() >= limits::ROOTS
        && let Some(oldest) = retired
    {
        txn.delete(&tables::ROOTS, oldest.number);
    }
}

fn change_bundle(state: &mut Ca) {
    state.generation += 1;
    state.devices_acked = 0;
}

fn enter(txn: &mut Txn<'_>, mut state: Ca, phase: Phase) {
    state.set_phase(phase);
    state.step += 1;
    state.phase_since = txn.now;
    txn.put(&tables::CA, (), &state);
}

/// The state, if the rotation is in the phase that the asker believes it to be in.
fn in_phase(txn: &Txn<'_>, believed: Phase) -> Result<Ca, Reject> {
    let state = ca(txn);
    if state.phase() == Phase::Idle {
        return Err(Reject::new(Code::NoRotation, []));
    }
    if state.phase() != believed {
        return Err(Reject::new(
            Code::RotationPhase,
            [&state.phase().as_str(), &believed.as_str()],
        ));
    }
    Ok(state)
}

fn advance(txn: &mut Txn<'_>, command: &AdvanceRoot) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let state = in_phase(txn, command.from())?;
    if command.force && command.reason.trim().is_empty() {
        return Err(check::invalid(
            "the reason",
            &"it is empty, and a forced step needs one",
        ));
    }
    let behind = replicas_behind(txn, state.step);
    if !behind.is_empty() && !command.force {
        return Err(Reject::new(
            Code::ReplicasNotReady,
            [&behind.join(", "), &state.step],
        ));
    }
    if state.phase() == Phase::Distribute {
        return to_issue(txn, state, command, &behind);
    }
    to_end(txn, state, command, &behind)
}

/// Names of the members that have not taken this step.
fn replicas_behind(r: &dyn Read, step: u64) -> Vec<String> {
    let members = cluster::replicas(r).into_iter().filter(|one| one.is_member());
    members
        .filter(|member| replica_step(r, member.id) < step)
        .map(|member| member.name)
        .collect()
}

fn to_issue(
    txn: &mut Txn<'_>,
    mut state: Ca,
    command: &AdvanceRoot,
    behind: &[String],
) -> Result<Reply, Reject> {
    swap_roots(txn, &mut state)?;
    enter(txn, state, Phase::Issue);
    say_advanced(txn, Phase::Issue, command, behind, 0);
    Ok(Reply::done())
}

/// Lets the other root sign.
fn swap_roots(txn: &mut Txn<'_>, state: &mut Ca) -> Result<(), Reject> {
    std::mem::swap(&mut state.issuing, &mut state.other);
    let signs = root(txn, state.issuing).ok_or_else(|| Reject::new(Code::NoRotation, []))?;
    let mut born = cluster::cluster(txn).ok_or_else(|| Reject::new(Code::NoCluster, []))?;
    born.root_cert_der = signs.der;
    born.root_key_sealed = signs.key_sealed;
    txn.put(&tables::CLUSTER, (), &born);
    Ok(())
}

fn to_end(
    txn: &mut Txn<'_>,
    mut state: Ca,
    command: &AdvanceRoot,
    behind: &[String],
) -> Result<Reply, Reject> {
    // Not to be forced: what such an authority issued would be worth nothing, and it takes no one's help to sign it.
    let unsigned = |one: &Authority| one.under(state.issuing).is_none();
    if let Some(one) = authorities(txn).into_iter().find(unsigned) {
        let names = format!(
            "{} (its authority is not signed by the new root yet)",
            one.replica_id
        );
        return Err(Reject::new(Code::ReplicasNotReady, [&names, &state.step]));
    }
    let devices = state.devices.saturating_sub(state.devices_acked);
    let operators = operators_behind(txn, state.generation);
    if devices + operators > 0 && !command.force {
        return Err(Reject::new(
            Code::NotAcknowledged,
            [&devices, &operators, &state.generation],
        ));
    }
    let old = state.other;
    for mut one in authorities(txn) {
        if one.under(old).is_some() {
            one.certificates.retain(|certificate| certificate.root != old);
            txn.put(&tables::AUTHORITIES, (one.replica_id, one.number), &one);
        }
    }
    retire_root(txn, old);
    state.other = 0;
    state.begun_by.clear();
    change_bundle(&mut state);
    enter(txn, state, Phase::Idle);
    say_advanced(txn, Phase::Idle, command, behind, devices + operators);
    Ok(Reply::done())
}

/// How many operators that are let in have not acknowledged this generation.
fn operators_behind(r: &dyn Read, generation: u64) -> u64 {
    let active = access::operators(r)
        .into_iter()
        .filter(|one| one.status() == OperatorStatus::Active);
    active
        .filter(|one| operator_ack(r, &one.name).is_none_or(|ack| ack.number < generation))
        .count() as u64
}

fn say_advanced(txn: &mut Txn<'_>, to: Phase, command: &AdvanceRoot, behind: &[String], left: u64) {
    let state = ca(txn);
    let fingerprint = root(txn, state.issuing).map(|signs| signs.fingerprint());
    txn.emit(
        "ca.rotation_advanced",
        fingerprint.unwrap_or_default(),
        [
            ("from", command.from().as_str().to_owned()),
            ("to", to.as_str().to_owned()),
            (
                "forced",
                if command.force {
                    "true".to_owned()
                } else {
                    String::new()
                },
            ),
            ("replicas_behind", behind.join(" ")),
            (
                "left_behind",
                if left == 0 {
                    String::new()
                } else {
                    left.to_string()
                },
            ),
            ("reason", command.reason.clone()),
        ],
    );
}

/// A root that is trusted no more: its key, its list and what belongs to that go.
fn retire_root(txn: &mut Txn<'_>, number: u32) {
    let Some(mut old) = root(txn, number) else { return };
    old.key_sealed = Bytes::new();
    old.retired_at = txn.now;
    txn.put(&tables::ROOTS, number, &old);
    txn.delete(&tables::CRLS, (0u64, number));
    txn.emit(
        "ca.root_retired",
        old.fingerprint(),
        [("root", number.to_string())],
    );
}

fn revert(txn: &mut Txn<'_>, command: &RevertRoot) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let mut state = in_phase(txn, command.from())?;
    let to = if state.phase() == Phase::Issue {
        swap_roots(txn, &mut state)?;
        Phase::Distribute
    } else {
        for mut one in authorities(txn) {
            if one.under(state.other).is_some() {
                let given_up = state.other;
                one.certificates
                    .retain(|certificate| certificate.root != given_up);
                txn.put(&tables::AUTHORITIES, (one.replica_id, one.number), &one);
            }
        }
        retire_root(txn, state.other);
        state.other = 0;
        state.begun_by.clear();
        change_bundle(&mut state);
        Phase::Idle
    };
    if to == Phase::Distribute
        && let Some(one) = authorities(txn)
            .iter()
            .find(|one| one.under(state.issuing).is_none())
    {
        // It was made under the new root a moment ago; the leader signs it with the old one as well.
        let names = format!(
            "{} (its authority is not signed by the old root yet)",
            one.replica_id
        );
        return Err(Reject::new(Code::ReplicasNotReady, [&names, &state.step]));
    }
    let issuing = state.issuing;
    enter(txn, state, to);
    let fingerprint = root(txn, issuing).map(|signs| signs.fingerprint());
    txn.emit(
        "ca.rotation_reverted",
        fingerprint.unwrap_or_default(),
        [
            ("from", command.from().as_str().to_owned()),
            ("to", to.as_str().to_owned()),
            ("reason", command.reason.clone()),
        ],
    );
    Ok(Reply::done())
}

fn bad_authority(replica_id: u64, cause: &str) -> Reject {
    Reject::new(Code::BadAuthority, [&replica_id, &cause])
}

fn known(r: &dyn Read, replica_id: u64, number: u32) -> Result<Authority, Reject> {
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

fn own(txn: &Txn<'_>, replica_id: u64) -> Result<(), Reject> {
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

fn acknowledge(txn: &mut Txn<'_>, command: &Acknowledge) -> Result<Reply, Reject> {
    check::count("the list of devices", command.devices.len(), limits::ACK_BATCH)?;
    check::count(
        "the list of operators",
        command.operators.len(),
        limits::ACK_BATCH,
    )?;
    let mut state = ca(txn);
    let number = command.generation;
    if number == 0 || number > state.generation {
        return Err(check::invalid("the generation", &"the cluster has no such one"));
    }
    let ack = Ack { number, at: txn.now };
    let (mut devices, mut operators) = (0u32, 0u32);
    for id in &command.devices {
        let trusted = identity::device(txn, *id).is_some_and(|one| one.status() == DeviceStatus::Trusted);
        if !trusted || device_ack(txn, *id).is_some_and(|known| known.number >= number) {
            continue;
        }
        txn.put(&tables::DEVICE_ACKS, *id, &ack);
        devices += 1;
    }
    if number == state.generation && devices > 0 {
        state.devices_acked += u64::from(devices);
        txn.put(&tables::CA, (), &state);
    }
    for name in &command.operators {
        let active = access::operator(txn, name).is_some_and(|one| one.status() == OperatorStatus::Active);
        if !active || operator_ack(txn, name).is_some_and(|known| known.number >= number) {
            continue;
        }
        txn.put(&tables::MEMBER_ACKS, (OPERATOR, name.as_str()), &ack);
        operators += 1;
    }
    if devices + operators > 0 {
        let count = |count: u32| {
            if count == 0 {
                String::new()
            } else {
                count.to_string()
            }
        };
        txn.emit(
            "ca.acknowledged",
            number,
            [("devices", count(devices)), ("operators", count(operators))],
        );
    }
    Ok(Reply::Counted(Counted {
        count: devices + operators,
    }))
}

fn ready(txn: &mut Txn<'_>, command: &ReplicaReady) -> Result<Reply, Reject> {
    own(txn, command.replica_id)?;
    let member = cluster::replica(txn, command.replica_id).is_some_and(|one| one.is_member());
    if !member {
        return Err(Reject::new(Code::ReplicaUnknown, [&command.replica_id]));
    }
    if command.step == 0 || command.step > ca(txn).step {
        return Err(check::invalid("the step", &"the rotation has not come to it"));
    }
    if replica_step(txn, command.replica_id) >= command.step {
        return Ok(Reply::done());
    }
    replica_ready(txn, command.replica_id, command.step);
    txn.emit(
        "ca.replica_ready",
        command.replica_id,
        [("step", command.step.to_string())],
    );
    Ok(Reply::done())
}

fn publish(txn: &mut Txn<'_>, command: &PublishCrl) -> Result<Reply, Reject> {
    let new = &command.crl;
    check::bytes("the list of revoked certificates", &new.der, limits::CRL_MAX)?;
    if new.replica_id == 0 {
        if !ca(txn).trusted().contains(&new.number) {
            return Err(Reject::new(
                Code::BadRoot,
                [&"it is not trusted, so it publishes no list"],
            ));
        }
    } else {
        own(txn, new.replica_id)?;
        known(txn, new.replica_id, new.number)?;
    }
    if new.this_update >= new.next_update || new.crl_number > txn.index {
        return Err(check::invalid(
            "the list of revoked certificates",
            &"its times or its number make no sense",
        ));
    }
    let issuer = (new.replica_id, new.number);
    if let Some(before) = crl(txn, new.replica_id, new.number)
        && before.crl_number >= new.crl_number
    {
        return Err(Reject::new(Code::StaleCrl, [&before.crl_number, &new.crl_number]));
    }
    txn.put(&tables::CRLS, issuer, new);
    forget_expired(txn, &tables::REVOKED, issuer, limits::ACK_BATCH);
    let name = if new.replica_id == 0 {
        format!("root/{}", new.number)
    } else {
        format!("{}/{}", new.replica_id, new.number)
    };
    txn.emit(
        "ca.crl_published",
        name,
        [
            ("number", new.crl_number.to_string()),
            ("entries", new.entries.to_string()),
            ("next_update", new.next_update.to_string()),
        ],
    );
    Ok(Reply::done())
}
