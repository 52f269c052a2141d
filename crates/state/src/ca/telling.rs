//! What replicas tell: who holds which bundle, which step they have taken, and what is revoked.

use super::books::{forget_expired, replica_ready};
use super::rules::{known, own};
use super::{
    Ack, Acknowledge, OPERATOR, PublishCrl, ReplicaReady, ca, crl, device_ack, operator_ack, replica_step,
};
use crate::access::{self, OperatorStatus};
use crate::identity::{self, DeviceStatus};
use crate::reject::{Code, Reject};
use crate::reply::{Counted, Reply};
use crate::txn::Txn;
use crate::{check, cluster, limits, tables};

pub(super) fn acknowledge(txn: &mut Txn<'_>, command: &Acknowledge) -> Result<Reply, Reject> {
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

pub(super) fn ready(txn: &mut Txn<'_>, command: &ReplicaReady) -> Result<Reply, Reject> {
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

pub(super) fn publish(txn: &mut Txn<'_>, command: &PublishCrl) -> Result<Reply, Reject> {
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
