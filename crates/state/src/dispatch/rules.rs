//! How dispatches begin, are tried again, and end. How they move between sessions: `moves`.

use std::collections::BTreeSet;

use super::slots::{self, bind, fill, has_room, unbind};
use super::store::{insert, queue_length, update};
use super::{
    Action, Cancel, CancelAsked, Complete, Dispatch, Effect, Expire, Failure, Late, Outcome, Retry, State,
    Submit, Wake, dispatch, mediation, totals,
};
use crate::actor::Actor;
use crate::identity::{self, DeviceStatus};
use crate::ids::{Digest, Id};
use crate::reject::{Code, Reject};
use crate::reply::{Counted, Reply, Submitted};
use crate::tables::{self, Blob};
use crate::txn::Txn;
use crate::{check, limits, nodes};

pub(crate) fn apply(txn: &mut Txn<'_>, action: &Action) -> Result<Reply, Reject> {
    match action {
        Action::Submit(command) => submit(txn, command),
        Action::Complete(command) => complete(txn, command),
        Action::AwaitMediation(command) => mediation::begin(txn, command),
        Action::ResumeFromMediation(command) => mediation::end(txn, command),
        Action::Cancel(command) => cancel(txn, command),
        Action::Expire(command) => expire(txn, command),
        Action::Wake(command) => wake(txn, command),
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
    // Who finds a free slot passes nobody: while there is one, nothing waits that could have it.
    let session = node.session.clone().unwrap_or_default();
    let bound = session.epoch != 0 && has_room(txn, &node, &command.capability);
    check_queues(txn, command, &node, bound)?;
    let mut new = opened(txn, command, &node, timeout);
    if bound {
        bind(&mut new, &session, txn.now);
    }
    insert(txn, &new, &command.payload);
    let priority = match new.priority() {
        super::Priority::Normal => String::new(),
        other => other.as_str().to_owned(),
    };
    txn.emit(
        "dispatch.submitted",
        id,
        [
            ("device", device_id.to_string()),
            ("capability", new.capability.clone()),
            ("state", new.state().as_str().to_owned()),
            ("deadline_at", new.deadline_at.to_string()),
            ("priority", priority),
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

fn opened(txn: &Txn<'_>, command: &Submit, node: &nodes::Node, timeout: u64) -> Dispatch {
    let capability = node.capability(&command.capability);
    let effect = capability.map_or(Effect::Once, |capability| capability.effect());
    Dispatch {
        id: command.dispatch_id,
        device_id: command.device_id,
        capability: command.capability.clone(),
        effect: effect as i32,
        state: State::Queued as i32,
        submitted_at: txn.now,
        deadline_at: txn.now + timeout,
        submitted_by: txn.actor.to_string(),
        payload_size: command.payload.len() as u32,
        priority: command.priority,
        order: txn.index,
        retry: capability
            .filter(|_| effect == Effect::Idempotent)
            .map(|capability| Retry::of(capability, command.max_attempts)),
        ..Dispatch::default()
    }
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

fn check_queues(txn: &Txn<'_>, command: &Submit, node: &nodes::Node, has_slot: bool) -> Result<(), Reject> {
    let size = command.payload.len();
    if size > limits::PAYLOAD {
        return Err(Reject::new(Code::PayloadTooLarge, [&size, &limits::PAYLOAD]));
    }
    let (id, name) = (command.device_id, &command.capability);
    let queue = queue_length(txn, id);
    if queue.open >= limits::OPEN_PER_DEVICE {
        return Err(Reject::new(Code::QueueFull, [&id, &queue.open]));
    }
    let (waiting, limit) = (queue.open - queue.bound, slots::device_queue(node));
    if !has_slot && waiting >= limit {
        return Err(Reject::new(
            Code::DeviceQueueFull,
            [&id, &waiting, &queue.bound, &limit],
        ));
    }
    let (load, limit) = (slots::load(txn, id, name), slots::capability_queue(node, name));
    if !has_slot && load.waiting >= limit {
        return Err(Reject::new(
            Code::CapabilityQueueFull,
            [name, &id, &load.waiting, &load.bound, &limit],
        ));
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

/// An open dispatch of the node that asks, bound to this session.
pub(super) fn own(txn: &Txn<'_>, id: Id, epoch: u64) -> Result<Dispatch, Reject> {
    let found = of_actor(txn, id)?;
    let state = found.state();
    if state.is_terminal() {
        return Err(ended(&found));
    }
    // The clock has passed the deadline; the sweeper has not come round yet.
    if txn.now >= found.deadline_at {
        return Err(Reject::new(Code::ResultLate, [&id, &overdue(&found).as_str()]));
    }
    // Planted: a result counts from whatever session it comes.
    let any_session = palyra_fault::planted("epoch-ignored");
    if (found.epoch != epoch && !any_session) || state == State::Queued {
        return Err(Reject::new(Code::EpochStale, [&id, &found.epoch, &epoch]));
    }
    Ok(found)
}

fn of_actor(txn: &Txn<'_>, id: Id) -> Result<Dispatch, Reject> {
    let found = dispatch(txn, id).ok_or_else(|| Reject::new(Code::NoSuchDispatch, [&id]))?;
    let is_own = matches!(txn.actor, Actor::Node { device_id, .. } if *device_id == found.device_id);
    if is_own {
        Ok(found)
    } else {
        Err(Reject::new(Code::DispatchForeign, [&id]))
    }
}

/// Why nothing more can come of an ended dispatch: it has a result of its node, or came to its end without one.
fn ended(found: &Dispatch) -> Reject {
    let code = if found.reported {
        Code::ResultDuplicate
    } else {
        Code::ResultLate
    };
    Reject::new(code, [&found.id, &found.state().as_str()])
}

/// How an open dispatch ends whose deadline has passed.
fn overdue(found: &Dispatch) -> State {
    match found.state() {
        State::Cancelling => State::Cancelled,
        _ => State::TimedOut,
    }
}

fn complete(txn: &mut Txn<'_>, command: &Complete) -> Result<Reply, Reject> {
    let found = of_actor(txn, command.dispatch_id)?;
    check_result(command)?;
    if found.state().is_terminal() {
        return note_late(txn, found, command);
    }
    if txn.now >= found.deadline_at {
        let device_id = found.device_id;
        let ended = expire_one(txn, found);
        let late = note_late(txn, ended, command);
        fill(txn, device_id);
        return late;
    }
    let found = own(txn, command.dispatch_id, command.epoch)?;
    if command.attempt != 0 && command.attempt != found.attempt {
        return Err(Reject::new(
            Code::AttemptStale,
            [&found.id, &command.attempt, &found.attempt],
        ));
    }
    let device_id = found.device_id;
    if let Some(not_before) = again(txn, &found, command) {
        try_again(txn, found, command, not_before);
    } else {
        end_with(txn, found, command);
    }
    fill(txn, device_id);
    Ok(Reply::done())
}

fn check_result(command: &Complete) -> Result<(), Reject> {
    let size = command.result.len();
    if size > limits::PAYLOAD {
        return Err(Reject::new(Code::PayloadTooLarge, [&size, &limits::PAYLOAD]));
    }
    check::count(
        "the last lines of a log",
        command.log_tail.len(),
        limits::LOG_TAIL,
    )?;
    if let Some(failure) = &command.error {
        check::text("the error code", &failure.code, limits::REASON_MAX)?;
        check_message(&failure.message)?;
    }
    Ok(())
}

/// Ends a dispatch as its node says.
fn end_with(txn: &mut Txn<'_>, found: Dispatch, command: &Complete) {
    let state = match command.outcome() {
        Outcome::Succeeded => State::Succeeded,
        Outcome::Failed => State::Failed,
        Outcome::Rejected => State::Rejected,
        Outcome::Cancelled if found.state() == State::Cancelling => State::Cancelled,
        // Nobody here wanted it back.
        Outcome::Cancelled => State::Failed,
    };
    let blobs = [
        (&tables::RESULTS, &command.result),
        (&tables::LOG_TAILS, &command.log_tail),
    ];
    for (table, bytes) in blobs.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
        let bytes = bytes.clone();
        txn.put(table, found.id, &Blob { bytes });
    }
    // Why it was taken back is told with the end that this brought, and with no other.
    let reason = match state {
        State::Cancelled => found.reason.clone(),
        _ => String::new(),
    };
    let ended = Ended {
        state,
        reason,
        error: command.error.clone().filter(|_| state != State::Succeeded),
        result_size: command.result.len() as u32,
        tail_size: command.log_tail.len() as u32,
        reported: true,
    };
    end(txn, found, ended);
}

/// When the next attempt may begin, if there is to be one.
fn again(txn: &Txn<'_>, found: &Dispatch, command: &Complete) -> Option<u64> {
    let failed = match command.outcome() {
        Outcome::Failed => true,
        // What was refused has not begun; it is tried again where its code is named.
        Outcome::Rejected => false,
        Outcome::Succeeded | Outcome::Cancelled => return None,
    };
    let why = command.error.as_ref().map_or("", |failure| failure.code.as_str());
    next_attempt(found, why, failed, txn.now)
}

/// When the attempt after the present one may begin, if its policy and its deadline allow one after `why`.
pub(super) fn next_attempt(found: &Dispatch, why: &str, failed: bool, now: u64) -> Option<u64> {
    // Planted: work that must not run twice is tried again as any other.
    let once_more = palyra_fault::planted("once-tried-again").then(|| Retry {
        max_attempts: 3,
        on: vec![why.to_owned()],
        ..Retry::default()
    });
    let policy = found
        .retry
        .as_ref()
        .filter(|_| found.effect() == Effect::Idempotent)
        .or(once_more.as_ref())?;
    let allowed = found.state() != State::Cancelling
        && found.attempt < policy.max_attempts
        && policy.covers(why, failed);
    let at = now + policy.wait(found.attempt);
    (allowed && at < found.deadline_at).then_some(at)
}

fn try_again(txn: &mut Txn<'_>, found: Dispatch, command: &Complete, not_before: u64) {
    let failure = command.error.clone().unwrap_or_default();
    let mut changed = found.clone();
    changed.note_attempt(txn.now, &failure.code, &failure.message);
    unbind(&mut changed, if not_before > txn.now { not_before } else { 0 });
    update(txn, &found, &changed);
    say_requeued(txn, &found, &failure.code, changed.not_before);
}

/// Says that an attempt ended and another will follow.
pub(super) fn say_requeued(txn: &mut Txn<'_>, found: &Dispatch, why: &str, not_before: u64) {
    txn.emit(
        "dispatch.attempt_ended",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("attempt", found.attempt.to_string()),
            ("epoch", found.epoch.to_string()),
            ("replica", found.replica_id.to_string()),
            ("why", why.to_owned()),
            (
                "not_before",
                if not_before == 0 {
                    String::new()
                } else {
                    not_before.to_string()
                },
            ),
        ],
    );
}

/// Notes what came after the end, once; it changes nothing else. A node that reports again what it had reported is
/// told that it is known.
fn note_late(txn: &mut Txn<'_>, found: Dispatch, command: &Complete) -> Result<Reply, Reject> {
    if found.reported || found.late.is_some() {
        return Err(ended(&found));
    }
    let state = found.state;
    let failure = command.error.clone().unwrap_or_default();
    let mut noted = found.clone();
    noted.late = Some(Late {
        at: txn.now,
        outcome: command.outcome,
        code: failure.code.clone(),
        size: command.result.len() as u32,
        digest: Digest::of(&command.result),
    });
    update(txn, &found, &noted);
    txn.emit(
        "dispatch.result_late",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("state", found.state().as_str().to_owned()),
            ("outcome", command.outcome().as_str().to_owned()),
            ("error", failure.code),
            ("size", command.result.len().to_string()),
            ("digest", Digest::of(&command.result).to_string()),
        ],
    );
    Ok(Reply::Late(crate::reply::Late { state }))
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

fn cancel(txn: &mut Txn<'_>, command: &Cancel) -> Result<Reply, Reject> {
    check::text("the reason", &command.reason, limits::REASON_MAX)?;
    let id = command.dispatch_id;
    let found = dispatch(txn, id).ok_or_else(|| Reject::new(Code::NoSuchDispatch, [&id]))?;
    match found.state() {
        // Planted: the word is given, and the dispatch waits on.
        State::Queued if palyra_fault::planted("cancelled-delivered") => {}
        State::Queued => {
            finish(txn, found, State::Cancelled, &command.reason);
        }
        // It is under way.
        State::Cancelling => {}
        state if state.is_bound() => ask_back(txn, &found, &command.reason),
        state => return Err(Reject::new(Code::DispatchEnded, [&id, &state.as_str()])),
    }
    Ok(Reply::done())
}

/// Asks the node of a bound dispatch to stop it. It has to answer within its patience, wherever it is.
fn ask_back(txn: &mut Txn<'_>, found: &Dispatch, reason: &str) {
    let mut asked = found.clone();
    asked.set_state(State::Cancelling);
    asked.mediation = None;
    asked.reason = reason.to_owned();
    asked.cancel = Some(CancelAsked {
        at: txn.now,
        by: txn.actor.to_string(),
    });
    asked.deadline_at = found.deadline_at.min(txn.now + limits::CANCEL_PATIENCE);
    update(txn, found, &asked);
    txn.emit(
        "dispatch.cancelling",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("epoch", found.epoch.to_string()),
            ("replica", found.replica_id.to_string()),
            ("reason", reason.to_owned()),
            ("until", asked.deadline_at.to_string()),
        ],
    );
}

fn expire(txn: &mut Txn<'_>, command: &Expire) -> Result<Reply, Reject> {
    check::count("the list of dispatches", command.ids.len(), limits::EXPIRE_BATCH)?;
    let mut count = 0;
    let mut devices = BTreeSet::new();
    // Planted: the clock of whoever sweeps decides what is late.
    let believed = palyra_fault::planted("deadline-by-sweeper");
    for id in &command.ids {
        let late = |found: &Dispatch| believed || txn.now >= found.deadline_at;
        let due = dispatch(txn, *id).filter(|found| !found.state().is_terminal() && late(found));
        if let Some(found) = due {
            devices.insert(found.device_id);
            expire_one(txn, found);
            count += 1;
        }
    }
    for device_id in devices {
        fill(txn, device_id);
    }
    Ok(Reply::Counted(Counted { count }))
}

/// Ends a dispatch whose deadline has passed.
pub(super) fn expire_one(txn: &mut Txn<'_>, found: Dispatch) -> Dispatch {
    let state = overdue(&found);
    let reason = found.reason.clone();
    let error = (state == State::Cancelled).then(|| Failure {
        code: "cancel_unconfirmed".to_owned(),
        message:
            "the node did not say in time whether it stopped: whether its program ran to its end is not known"
                .to_owned(),
    });
    let ended = Ended {
        state,
        reason,
        error,
        ..Ended::default()
    };
    end(txn, found, ended)
}

fn wake(txn: &mut Txn<'_>, command: &Wake) -> Result<Reply, Reject> {
    check::count("the list of dispatches", command.ids.len(), limits::EXPIRE_BATCH)?;
    let mut count = 0;
    for id in &command.ids {
        let due = dispatch(txn, *id).filter(|found| {
            found.state() == State::Queued && found.not_before != 0 && txn.now >= found.not_before
        });
        let Some(found) = due else { continue };
        let mut ready = found.clone();
        ready.not_before = 0;
        update(txn, &found, &ready);
        txn.emit(
            "dispatch.ready",
            found.id,
            [
                ("device", found.device_id.to_string()),
                ("attempts", found.attempt.to_string()),
            ],
        );
        fill(txn, found.device_id);
        count += 1;
    }
    Ok(Reply::Counted(Counted { count }))
}

/// How a dispatch ends.
#[derive(Default)]
pub(super) struct Ended {
    pub(super) state: State,
    pub(super) reason: String,
    pub(super) error: Option<Failure>,
    pub(super) result_size: u32,
    pub(super) tail_size: u32,
    pub(super) reported: bool,
}

/// Ends a dispatch without a word of its node.
pub(super) fn finish(txn: &mut Txn<'_>, found: Dispatch, state: State, reason: &str) -> Dispatch {
    let ended = Ended {
        state,
        reason: reason.to_owned(),
        ..Ended::default()
    };
    end(txn, found, ended)
}

/// Ends a dispatch. The one place where that happens.
pub(super) fn end(txn: &mut Txn<'_>, found: Dispatch, how: Ended) -> Dispatch {
    let code = how.error.as_ref().map(|error| error.code.clone());
    let mut ended = Dispatch {
        ended_at: txn.now,
        not_before: 0,
        mediation: None,
        error: how.error,
        result_size: how.result_size,
        tail_size: how.tail_size,
        reported: how.reported,
        ..found.clone()
    };
    ended.set_state(how.state);
    if how.state == State::Cancelled || found.cancel.is_none() {
        ended.reason = how.reason.clone();
    }
    update(txn, &found, &ended);
    txn.emit(
        "dispatch.finished",
        ended.id,
        [
            ("state", how.state.as_str().to_owned()),
            ("device", ended.device_id.to_string()),
            ("capability", ended.capability.clone()),
            ("epoch", ended.epoch.to_string()),
            ("replica", ended.replica_id.to_string()),
            ("reason", how.reason),
            ("error", code.unwrap_or_default()),
        ],
    );
    ended
}

pub(super) fn say_assigned(txn: &mut Txn<'_>, assigned: &Dispatch) {
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
