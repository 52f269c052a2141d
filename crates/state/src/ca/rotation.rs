//! The rotation of the root: how it begins, goes on, goes back, and what holds it up.

use bytes::Bytes;

use super::{
    AdvanceRoot, Authority, BeginRoot, Ca, Phase, RevertRoot, Root, authorities, ca, operator_ack,
    replica_step, root, roots,
};
use crate::access::{self, OperatorStatus};
use crate::read::Read;
use crate::reject::{Code, Reject};
use crate::reply::Reply;
use crate::txn::Txn;
use crate::{check, cluster, limits, tables};

pub(super) fn begin(txn: &mut Txn<'_>, command: &BeginRoot) -> Result<Reply, Reject> {
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

pub(super) fn advance(txn: &mut Txn<'_>, command: &AdvanceRoot) -> Result<Reply, Reject> {
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

pub(super) fn revert(txn: &mut Txn<'_>, command: &RevertRoot) -> Result<Reply, Reject> {
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
