//! How many dispatches a node is given at a time, and which comes next.
//!
//! A bound dispatch takes a slot of its node and one of its capability, from its delivery to its end. Counters say
//! how many are taken, so that no transition counts records; every replica, and every leader, sees the same ones.
//! Invariants: no slot is given beyond the limit that holds at that moment; while a node has a session and free
//! slots, nothing waits that could have one.

use std::ops::ControlFlow;

use super::rules::{finish, say_assigned};
use super::store::{queue_length, update};
use super::{Dispatch, Load, Mediation, State, dispatch};
use crate::ids::Id;
use crate::limits;
use crate::nodes::{self, Node, Session};
use crate::read::Read;
use crate::tables::{self, Text};
use crate::txn::Txn;

/// How many dispatches a node is given at a time.
#[must_use]
pub fn device_slots(node: &Node) -> u32 {
    match node.max_concurrency {
        0 => limits::BOUND_PER_DEVICE,
        declared => declared.min(limits::BOUND_PER_DEVICE),
    }
}

/// How many dispatches of one capability a node is given at a time. What it does not offer any more has no limit of
/// its own: the node refuses it.
#[must_use]
pub fn capability_slots(node: &Node, capability: &str) -> u32 {
    match node
        .capability(capability)
        .map_or(0, |found| found.max_concurrency)
    {
        0 => u32::MAX,
        declared => declared,
    }
}

/// How many dispatches may wait for a node.
#[must_use]
pub fn device_queue(node: &Node) -> u32 {
    match node.queue_limit {
        0 => limits::OPEN_PER_DEVICE,
        declared => declared.min(limits::OPEN_PER_DEVICE),
    }
}

/// How many dispatches may wait for one capability of a node.
#[must_use]
pub fn capability_queue(node: &Node, capability: &str) -> u32 {
    match node.capability(capability).map_or(0, |found| found.queue_limit) {
        0 => limits::OPEN_PER_DEVICE,
        declared => declared.min(limits::OPEN_PER_DEVICE),
    }
}

/// How many dispatches of a capability are with a node, and how many wait.
#[must_use]
pub fn load(r: &dyn Read, device_id: Id, capability: &str) -> Load {
    tables::LOADS
        .get(r, (device_id, Text(capability)))
        .unwrap_or_default()
}

/// Whether one more dispatch of this capability may be given to the node now.
pub(super) fn has_room(r: &dyn Read, node: &Node, capability: &str) -> bool {
    queue_length(r, node.device_id).bound < device_slots(node)
        && load(r, node.device_id, capability).bound < capability_slots(node, capability)
}

/// The waiting dispatch that comes next and has room; nothing while the node's own slots are taken.
#[must_use]
pub fn next_runnable(r: &dyn Read, node: &Node) -> Option<Id> {
    if queue_length(r, node.device_id).bound >= device_slots(node) {
        return None;
    }
    let mut busy: Vec<String> = Vec::new();
    tables::LOADS.visit(r, node.device_id, None, &mut |key, value| {
        let load = tables::LOADS.decode(value);
        // The key is the name and a zero byte.
        let name = key
            .split_last()
            .and_then(|(_, name)| std::str::from_utf8(name).ok());
        let room = |name: &&str| load.waiting > 0 && load.bound < capability_slots(node, name);
        busy.extend(name.filter(room).map(str::to_owned));
        ControlFlow::Continue(())
    });
    // At most one look for each capability that somebody waits for.
    let heads = busy.iter().filter_map(|name| {
        let mut head = None;
        tables::WAITING.visit(r, (node.device_id, Text(name)), None, &mut |key, _| {
            head = Some(key.to_vec());
            ControlFlow::Break(())
        });
        head
    });
    // Rank, order, id: as they stand in the key.
    heads.min().and_then(|key| Id::from_slice(&key[16..]))
}

/// Gives the node what waits, as long as there are slots. Answers how many it gave.
pub(crate) fn fill(txn: &mut Txn<'_>, device_id: Id) -> u32 {
    let Some(node) = nodes::node(txn, device_id) else {
        return 0;
    };
    let Some(session) = node.session.clone() else {
        return 0;
    };
    let mut given = 0;
    while let Some(found) = next_runnable(txn, &node).and_then(|id| dispatch(txn, id)) {
        if txn.now >= found.deadline_at {
            finish(txn, found, State::TimedOut, "");
            continue;
        }
        let mut bound = found.clone();
        bind(&mut bound, &session, txn.now);
        update(txn, &found, &bound);
        say_assigned(txn, &bound);
        given += 1;
    }
    given
}

/// Makes it the next attempt, in this session.
pub(super) fn bind(found: &mut Dispatch, session: &Session, now: u64) {
    found.set_state(State::Dispatched);
    found.epoch = session.epoch;
    found.replica_id = session.replica_id;
    found.attempt += 1;
    found.assigned_at = now;
}

/// Takes it from its session: it waits again, until `not_before` at least.
pub(super) fn unbind(found: &mut Dispatch, not_before: u64) {
    found.set_state(State::Queued);
    found.epoch = 0;
    found.replica_id = 0;
    found.not_before = not_before;
    found.mediation = None::<Mediation>;
}
