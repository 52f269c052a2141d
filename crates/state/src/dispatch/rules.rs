//! How dispatches begin, move between sessions, and end.

use std::collections::BTreeSet;

use super::store::{insert, update};
use super::{
    Action, AwaitMediation, Cancel, Complete, Dispatch, Effect, Expire, Failure, Outcome,
    ResumeFromMediation, State, Submit, dispatch, open_count, open_of_device, totals,
};
use crate::actor::Actor;
use crate::identity::{self, DeviceStatus};
use crate::ids::Id;
use crate::reject::{Code, Reject};
use crate::reply::{Counted, Reply, Submitted};
use crate::tables::{self, Blob};
use crate::txn::Txn;
use crate::{check, limits, nodes};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::Submit(command) => submit(txn, command),
        Action::Complete(command) => complete(txn, command),
        Action::AwaitMediation(command) => await_mediation(txn, command),
        Action::ResumeFromMediation(command) => resume(txn, command),
        Action::Cancel(command) => cancel(txn, command),
        Action::Expire(command) => expire(txn, command),
    }
}

fn submit(txn: &mut Txn<'_>, command: &Submit) -> Result<Reply, Reject> {
    let (id, device_id) = (command.dispatch_id, command.device_id);
    check::id("the dispatch id", id)?;
    let timeout = if command.timeout_ms == 0 {
        limits::DEADLINE
    } else {
        command.timeout_ms
    };
    if timeout > limits::DEADLINE_MAX {
        return Err(Reject::new(Code::BadDeadline, [&timeout, &limits::DEADLINE_MAX]));
    }
    if dispatch(txn, id).is_some() {
        return Err(Reject::new(Code::DispatchExists, [&id]));
    }
    let node = check_target(txn, command)?;
    check_queues(txn, command)?;
    let effect = node
        .capability(&command.capability)
        .map_or(Effect::Once, |capability| capability.effect());
    let session = node.session.unwrap_or_default();
    let bound = session.epoch != 0;
    let new = Dispatch {
        id,
        device_id,
        capability: command.capability.clone(),
        effect: effect as i32,
        state: if bound { State::Dispatched } else { State::Queued } as i32,
        epoch: session.epoch,
        replica_id: session.replica_id,
        attempt: u32::from(bound),
        submitted_at: txn.now,
        deadline_at: txn.now + timeout,
        submitted_by: txn.actor.to_string(),
        payload_size: command.payload.len() as u32,
        ..Dispatch::default()
    };
    insert(txn, &new, &command.payload);
    txn.emit(
        "dispatch.submitted",
        id,
        [
            ("device", device_id.to_string()),
            ("capability", new.capability.clone()),
            ("state", new.state().as_str().to_owned()),
            ("deadline_at", new.deadline_at.to_string()),
        ],
    );
    if bound {
        say_assigned(txn, &new);
    }
    Ok(Reply::Submitted(Submitted {
        dispatch_id: id,
        state: new.state,
        epoch: new.epoch,
        replica_id: new.replica_id,
        deadline_at: new.deadline_at,
    }))
}

fn check_target(txn: &Txn<'_>, command: &Submit) -> Result<nodes::Node, Reject> {
    let id = command.device_id;
    match identity::device(txn, id) {
        None => return Err(Reject::new(Code::NoSuchDevice, [&id])),
        Some(device) if device.status() == DeviceStatus::Revoked => {
            return Err(Reject::new(Code::DeviceRevoked, [&id]));
        }
        Some(_) => {}
    }
    let node = nodes::node(txn, id).ok_or_else(|| Reject::new(Code::NodeUnknown, [&id]))?;
    if node.status() == nodes::NodeStatus::Gone {
        return Err(Reject::new(Code::NodeGone, [&id, &node.status_since]));
    }
    if node.capability(&command.capability).is_none() {
        let name = command
            .capability
            .chars()
            .take(limits::SHORT_NAME_MAX)
            .collect::<String>();
        return Err(Reject::new(Code::NoSuchCapability, [&id, &name]));
    }
    Ok(node)
}

fn check_queues(txn: &Txn<'_>, command: &Submit) -> Result<(), Reject> {
    let size = command.payload.len();
    if size > limits::PAYLOAD {
        return Err(Reject::new(Code::PayloadTooLarge, [&size, &limits::PAYLOAD]));
    }
    let open = open_count(txn, command.device_id);
    if open >= limits::OPEN_PER_DEVICE {
        return Err(Reject::new(Code::QueueFull, [&command.device_id, &open]));
    }
    let sums = totals(txn);
    let waiting = sums.open_bytes + sums.open * limits::DISPATCH_COST;
    if waiting + limits::DISPATCH_COST + size as u64 > limits::OPEN_BYTES {
        return Err(Reject::new(
            Code::ClusterQueueFull,
            [&waiting, &limits::OPEN_BYTES],
        ));
    }
    Ok(())
}

/// The dispatch, if the acting node may report on it in this session.
fn own(txn: &Txn<'_>, id: Id, epoch: u64) -> Result<Dispatch, Reject> {
    let found = dispatch(txn, id).ok_or_else(|| Reject::new(Code::NoSuchDispatch, [&id]))?;
    let is_own = matches!(txn.actor, Actor::Node { device_id, .. } if *device_id == found.device_id);
    if !is_own {
        return Err(Reject::new(Code::DispatchForeign, [&id]));
    }
    let state = found.state();
    match state {
        State::Succeeded | State::Failed | State::Rejected => {
            Err(Reject::new(Code::ResultDuplicate, [&id, &state.as_str()]))
        }
        State::TimedOut | State::Cancelled | State::SessionLost => {
            Err(Reject::new(Code::ResultLate, [&id, &state.as_str()]))
        }
        // The clock has passed the deadline; the sweeper has not come round yet.
        _ if txn.now >= found.deadline_at => {
            Err(Reject::new(Code::ResultLate, [&id, &State::TimedOut.as_str()]))
        }
        _ if found.epoch != epoch || state == State::Queued => {
            Err(Reject::new(Code::EpochStale, [&id, &found.epoch, &epoch]))
        }
        _ => Ok(found),
    }
}

fn complete(txn: &mut Txn<'_>, command: &Complete) -> Result<Reply, Reject> {
    let found = own(txn, command.dispatch_id, command.epoch)?;
    let size = command.result.len();
    if size > limits::PAYLOAD {
        return Err(Reject::new(Code::PayloadTooLarge, [&size, &limits::PAYLOAD]));
    }
    let state = match command.outcome() {
        Outcome::Succeeded => State::Succeeded,
        Outcome::Failed => State::Failed,
        Outcome::Rejected => State::Rejected,
    };
    let error = match &command.error {
        Some(failure) if state != State::Succeeded => {
            check::text("the error code", &failure.code, limits::REASON_MAX)?;
            check_message(&failure.message)?;
            Some(failure.clone())
        }
        _ => None,
    };
    if !command.result.is_empty() {
        txn.put(
            &tables::RESULTS,
            found.id,
            &Blob {
                bytes: command.result.clone(),
            },
        );
    }
    let ended = Dispatch {
        error,
        result_size: size as u32,
        ..found
    };
    finish(txn, ended, state, "");
    Ok(Reply::done())
}

/// What a program wrote may hold line breaks; only its length is bounded.
fn check_message(message: &str) -> Result<(), Reject> {
    let size = message.len();
    if size > limits::ERROR_MESSAGE_MAX {
        let cause = format_args!("it has {size} bytes; the limit is {}", limits::ERROR_MESSAGE_MAX);
        return Err(check::invalid("the error message", &cause));
    }
    Ok(())
}

fn await_mediation(txn: &mut Txn<'_>, command: &AwaitMediation) -> Result<Reply, Reject> {
    let found = own(txn, command.dispatch_id, command.epoch)?;
    change_mediation(txn, found, State::Dispatched, State::AwaitingLocalMediation)
}

fn resume(txn: &mut Txn<'_>, command: &ResumeFromMediation) -> Result<Reply, Reject> {
    let found = own(txn, command.dispatch_id, command.epoch)?;
    change_mediation(txn, found, State::AwaitingLocalMediation, State::Dispatched)
}

fn change_mediation(txn: &mut Txn<'_>, mut found: Dispatch, from: State, to: State) -> Result<Reply, Reject> {
    if found.state() == to {
        return Ok(Reply::done());
    }
    found.set_state(to);
    update(txn, from, &found);
    let action = match to {
        State::AwaitingLocalMediation => "dispatch.awaiting_local_mediation",
        _ => "dispatch.resumed",
    };
    txn.emit(
        action,
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("epoch", found.epoch.to_string()),
        ],
    );
    Ok(Reply::done())
}

fn cancel(txn: &mut Txn<'_>, command: &Cancel) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.dispatch_id;
    let found = dispatch(txn, id).ok_or_else(|| Reject::new(Code::NoSuchDispatch, [&id]))?;
    if found.state().is_terminal() {
        return Err(Reject::new(Code::DispatchEnded, [&id, &found.state().as_str()]));
    }
    finish(txn, found, State::Cancelled, &command.reason);
    Ok(Reply::done())
}

fn expire(txn: &mut Txn<'_>, command: &Expire) -> Result<Reply, Reject> {
    check::count("the list of dispatches", command.ids.len(), limits::EXPIRE_BATCH)?;
    let mut count = 0;
    for id in &command.ids {
        let due =
            dispatch(txn, *id).filter(|found| !found.state().is_terminal() && txn.now >= found.deadline_at);
        if let Some(found) = due {
            finish(txn, found, State::TimedOut, "");
            count += 1;
        }
    }
    Ok(Reply::Counted(Counted { count }))
}

/// Ends a dispatch. The one place where that happens.
fn finish(txn: &mut Txn<'_>, mut ended: Dispatch, state: State, reason: &str) {
    let before = ended.state();
    ended.set_state(state);
    ended.ended_at = txn.now;
    ended.reason = reason.to_owned();
    update(txn, before, &ended);
    let Failure { code, .. } = ended.error.clone().unwrap_or_default();
    txn.emit(
        "dispatch.finished",
        ended.id,
        [
            ("state", state.as_str().to_owned()),
            ("device", ended.device_id.to_string()),
            ("capability", ended.capability),
            ("epoch", ended.epoch.to_string()),
            ("replica", ended.replica_id.to_string()),
            ("reason", reason.to_owned()),
            ("error", code),
        ],
    );
}

fn say_assigned(txn: &mut Txn<'_>, assigned: &Dispatch) {
    txn.emit(
        "dispatch.assigned",
        assigned.id,
        [
            ("device", assigned.device_id.to_string()),
            ("epoch", assigned.epoch.to_string()),
            ("replica", assigned.replica_id.to_string()),
            ("attempt", assigned.attempt.to_string()),
        ],
    );
}

/// Ends all open dispatches of a device; says how many.
pub(crate) fn cancel_all(txn: &mut Txn<'_>, device_id: Id, reason: &str) -> u32 {
    let open = open_of_device(txn, device_id, None, usize::MAX);
    let count = open.len() as u32;
    for found in open {
        finish(txn, found, State::Cancelled, reason);
    }
    count
}

/// Ends the open dispatches of a node that is gone; says how many. What it may have begun and must not run twice is
/// lost with its session; the rest is taken back, for nobody is going to do it.
pub(crate) fn on_gone(txn: &mut Txn<'_>, device_id: Id) -> u32 {
    let open = open_of_device(txn, device_id, None, usize::MAX);
    let count = open.len() as u32;
    for found in open {
        let state = match (found.state(), found.effect()) {
            (State::Queued, _) | (_, Effect::Idempotent) => State::Cancelled,
            (_, Effect::Once) => State::SessionLost,
        };
        finish(txn, found, state, "the node is gone");
    }
    count
}

/// What an attach did to the open dispatches of its node.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Moved {
    pub(crate) assigned: u32,
    pub(crate) rebound: u32,
    pub(crate) lost: u32,
}

/// Moves the open dispatches of a node to its new session, the epoch of which is this entry's index.
pub(crate) fn on_attach(txn: &mut Txn<'_>, device_id: Id, replica_id: u64, held: &[Id]) -> Moved {
    let held: BTreeSet<Id> = held.iter().copied().collect();
    let mut moved = Moved::default();
    for mut found in open_of_device(txn, device_id, None, usize::MAX) {
        let before = found.state();
        if txn.now >= found.deadline_at {
            finish(txn, found, State::TimedOut, "");
            moved.lost += 1;
            continue;
        }
        let delivered = before != State::Queued;
        let is_held = delivered && held.contains(&found.id);
        if delivered && !is_held && found.effect() == Effect::Once {
            finish(txn, found, State::SessionLost, "the node does not hold it");
            moved.lost += 1;
            continue;
        }
        found.epoch = txn.index;
        found.replica_id = replica_id;
        if is_held {
            update(txn, before, &found);
            txn.emit(
                "dispatch.rebound",
                found.id,
                [
                    ("device", device_id.to_string()),
                    ("epoch", found.epoch.to_string()),
                    ("replica", replica_id.to_string()),
                ],
            );
            moved.rebound += 1;
            continue;
        }
        found.attempt += 1;
        found.set_state(State::Dispatched);
        update(txn, before, &found);
        say_assigned(txn, &found);
        moved.assigned += 1;
    }
    moved
}
