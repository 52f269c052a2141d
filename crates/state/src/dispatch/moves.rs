//! What happens to all dispatches of a node at once: when it attaches, when it is revoked, when it is given up.
//!
//! Invariant: what is bound here and held there goes on; what is bound here and not held there is settled at the
//! attach, by its effect and its policy, before anything else is given to the node.

use std::collections::BTreeMap;

use super::rules::{Ended, end, expire_one, finish, next_attempt, say_requeued};
use super::slots::{fill, unbind};
use super::store::{open_of_device, update};
use super::{Dispatch, Effect, Failure, SESSION_LOST, State};
use crate::ids::Id;
use crate::nodes;
use crate::txn::Txn;

/// What a session that was lost means, in words.
const NOT_HELD: &str = "the node came back and does not hold it";

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
            (State::Queued | State::Cancelling, _) | (_, Effect::Idempotent) => State::Cancelled,
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

/// Moves the open dispatches of a node to its new session, the epoch of which is this entry's index. `held` says
/// which attempt of which dispatch the node has; attempt 0 is the present one.
pub(crate) fn on_attach(txn: &mut Txn<'_>, device_id: Id, held: &BTreeMap<Id, u32>) -> Moved {
    let mut moved = Moved::default();
    for found in open_of_device(txn, device_id, None, usize::MAX) {
        if txn.now >= found.deadline_at {
            expire_one(txn, found);
            moved.lost += 1;
            continue;
        }
        if found.state() == State::Queued {
            continue;
        }
        let attempt = held.get(&found.id).copied();
        // Planted: what the node was given before is given again, whether it has it or not.
        let given_again = palyra_fault::planted("given-again");
        if given_again || attempt.is_some_and(|attempt| attempt == 0 || attempt == found.attempt) {
            rebind(txn, &found);
            moved.rebound += 1;
        } else {
            moved.lost += u32::from(settle_lost(txn, found));
        }
    }
    moved.assigned = fill(txn, device_id);
    moved
}

/// It goes on in the new session.
fn rebind(txn: &mut Txn<'_>, found: &Dispatch) {
    let session = nodes::node(txn, found.device_id)
        .and_then(|node| node.session)
        .unwrap_or_default();
    let mut bound = found.clone();
    bound.epoch = session.epoch;
    bound.replica_id = session.replica_id;
    update(txn, found, &bound);
    txn.emit(
        "dispatch.rebound",
        found.id,
        [
            ("device", found.device_id.to_string()),
            ("epoch", bound.epoch.to_string()),
            ("replica", bound.replica_id.to_string()),
        ],
    );
}

/// The node does not hold it. Whether this ended it.
fn settle_lost(txn: &mut Txn<'_>, found: Dispatch) -> bool {
    if found.state() == State::Cancelling {
        // What was wanted back is not there: that is what was wanted.
        let ended = Ended {
            state: State::Cancelled,
            reason: found.reason.clone(),
            error: Some(Failure {
                code: SESSION_LOST.to_owned(),
                message: NOT_HELD.to_owned(),
            }),
            ..Ended::default()
        };
        end(txn, found, ended);
        return true;
    }
    // The node is here, and has lost nothing by its own doing: no wait.
    if next_attempt(&found, SESSION_LOST, false, txn.now).is_none() {
        finish(txn, found, State::SessionLost, "the node does not hold it");
        return true;
    }
    let mut waits = found.clone();
    waits.note_attempt(txn.now, SESSION_LOST, NOT_HELD);
    unbind(&mut waits, 0);
    update(txn, &found, &waits);
    say_requeued(txn, &found, SESSION_LOST, 0);
    false
}
