//! Where dispatches lie: the record, its payload and result, and the indexes that follow its state.
//!
//! Only [`insert`], [`update`] and [`forget_finished`] write, so that no index can lag behind its record.

use std::ops::ControlFlow;

use bytes::Bytes;

use super::{Dispatch, QueueLength, State, Totals, dispatch, totals};
use crate::ids::Id;
use crate::limits;
use crate::read::Read;
use crate::tables::{self, Blob, Key, Present, Table, Text};
use crate::txn::Txn;

/// How many ended dispatches are read at a time to forget them.
const FORGET_PAGE: usize = 64;

/// The payload of a dispatch.
#[must_use]
pub fn payload(r: &dyn Read, id: Id) -> Option<Bytes> {
    tables::PAYLOADS.get(r, id).map(|blob| blob.bytes)
}

/// The result of a dispatch, once it has one.
#[must_use]
pub fn result(r: &dyn Read, id: Id) -> Option<Bytes> {
    tables::RESULTS.get(r, id).map(|blob| blob.bytes)
}

/// The last lines that the program of a dispatch wrote, once it has ended.
#[must_use]
pub fn log_tail(r: &dyn Read, id: Id) -> Option<Bytes> {
    tables::LOG_TAILS.get(r, id).map(|blob| blob.bytes)
}

/// How many dispatches of a device have not ended, and how many of them are with it.
#[must_use]
pub fn queue_length(r: &dyn Read, device_id: Id) -> QueueLength {
    tables::QUEUE_LENGTHS.get(r, device_id).unwrap_or_default()
}

/// How many wait for the same capability of the same node and come before this one, counted up to `limit`; nothing
/// when it does not wait for a slot.
#[must_use]
pub fn ahead_of(r: &dyn Read, found: &Dispatch, limit: usize) -> Option<usize> {
    if place(found) != Place::Waiting {
        return None;
    }
    let own = tables::WAITING.key(waiting_key(found));
    let shared = tables::WAITING
        .key((found.device_id, Text(&found.capability)))
        .len();
    let mut count = 0;
    tables::WAITING.visit(
        r,
        (found.device_id, Text(&found.capability)),
        None,
        &mut |key, _| {
            if count >= limit || *key >= own[shared..] {
                return ControlFlow::Break(());
            }
            count += 1;
            ControlFlow::Continue(())
        },
    );
    Some(count)
}

/// Dispatches whose wait for the next attempt is over at `now`, at most `limit`: for the sweeper.
#[must_use]
pub fn due_again(r: &dyn Read, now: u64, limit: usize) -> Vec<Id> {
    ids_until(r, &tables::DELAYED, now, limit)
}

/// Dispatches by id, from the one after `after` on, at most `limit`.
#[must_use]
pub fn list(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Dispatch> {
    tables::DISPATCHES.page(r, (), after, limit)
}

/// Dispatches of a device by id, ended ones too.
#[must_use]
pub fn list_of_device(r: &dyn Read, device_id: Id, after: Option<Id>, limit: usize) -> Vec<Dispatch> {
    let ids = tables::DISPATCHES_OF.ids(r, device_id, after, limit);
    ids.into_iter().filter_map(|id| dispatch(r, id)).collect()
}

/// Dispatches in a state, by id.
#[must_use]
pub fn by_state(r: &dyn Read, state: State, after: Option<Id>, limit: usize) -> Vec<Dispatch> {
    let ids = tables::DISPATCHES_BY_STATE.ids(r, state as u32, after, limit);
    ids.into_iter().filter_map(|id| dispatch(r, id)).collect()
}

/// Dispatches of a device that have not ended, by id.
#[must_use]
pub fn open_of_device(r: &dyn Read, device_id: Id, after: Option<Id>, limit: usize) -> Vec<Dispatch> {
    let ids = tables::QUEUES.ids(r, device_id, after, limit);
    ids.into_iter().filter_map(|id| dispatch(r, id)).collect()
}

/// Open dispatches whose deadline has passed at `now`, earliest first, at most `limit`: for the sweeper.
#[must_use]
pub fn due(r: &dyn Read, now: u64, limit: usize) -> Vec<Id> {
    ids_until(r, &tables::DEADLINES, now, limit)
}

/// The ids in an index by time whose time has come at `now`, earliest first.
fn ids_until(r: &dyn Read, table: &Table<Present>, now: u64, limit: usize) -> Vec<Id> {
    let mut found = Vec::new();
    table.visit(r, (), None, &mut |key, _| {
        let time = key
            .first_chunk()
            .map_or(u64::MAX, |bytes| u64::from_be_bytes(*bytes));
        if time > now || found.len() >= limit {
            return ControlFlow::Break(());
        }
        found.extend(Id::from_slice(&key[8..]));
        ControlFlow::Continue(())
    });
    found
}

/// The earliest deadline of an open dispatch, or end of a wait for the next attempt: when the sweeper has to look next.
#[must_use]
pub fn next_deadline(r: &dyn Read) -> Option<u64> {
    let first = |table: &Table<Present>| {
        let mut first = None;
        table.visit(r, (), None, &mut |key, _| {
            first = key.first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
            ControlFlow::Break(())
        });
        first
    };
    [first(&tables::DEADLINES), first(&tables::DELAYED)]
        .into_iter()
        .flatten()
        .min()
}

/// Where an open dispatch lies, as its record says: it follows from nothing else.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Waits for a slot or a session.
    Waiting,
    /// Waits for its next attempt.
    Delayed(u64),
    /// Is with its node.
    Bound,
    /// Has ended.
    Ended,
}

fn place(found: &Dispatch) -> Place {
    match found.state() {
        State::Queued if found.not_before > 0 => Place::Delayed(found.not_before),
        State::Queued => Place::Waiting,
        state if state.is_bound() => Place::Bound,
        _ => Place::Ended,
    }
}

/// Writes a new, open dispatch.
pub(super) fn insert(txn: &mut Txn<'_>, new: &Dispatch, payload: &Bytes) {
    txn.put(&tables::DISPATCHES, new.id, new);
    txn.put(
        &tables::PAYLOADS,
        new.id,
        &Blob {
            bytes: payload.clone(),
        },
    );
    txn.mark(&tables::QUEUES, (new.device_id, new.id));
    txn.mark(&tables::DEADLINES, (new.deadline_at, new.id));
    txn.mark(&tables::DISPATCHES_BY_STATE, (new.state as u32, new.id));
    txn.mark(&tables::DISPATCHES_OF, (new.device_id, new.id));
    enter(txn, new);
    let mut sums = totals(txn);
    sums.open += 1;
    sums.open_bytes += u64::from(new.payload_size);
    txn.put(&tables::DISPATCH_TOTALS, (), &sums);
}

/// Writes a changed dispatch over what it was. An ended one leaves the queue.
pub(super) fn update(txn: &mut Txn<'_>, before: &Dispatch, changed: &Dispatch) {
    txn.put(&tables::DISPATCHES, changed.id, changed);
    if before.state != changed.state {
        txn.delete(&tables::DISPATCHES_BY_STATE, (before.state as u32, changed.id));
        txn.mark(&tables::DISPATCHES_BY_STATE, (changed.state as u32, changed.id));
    }
    if before.deadline_at != changed.deadline_at {
        txn.delete(&tables::DEADLINES, (before.deadline_at, changed.id));
        txn.mark(&tables::DEADLINES, (changed.deadline_at, changed.id));
    }
    if place(before) != place(changed) {
        leave(txn, before);
        enter(txn, changed);
    }
    if !before.state().is_terminal() && changed.state().is_terminal() {
        close(txn, changed);
    }
}

/// Counts an open dispatch where it lies now.
fn enter(txn: &mut Txn<'_>, found: &Dispatch) {
    match place(found) {
        Place::Ended => return,
        Place::Bound => {}
        Place::Waiting => txn.mark(&tables::WAITING, waiting_key(found)),
        Place::Delayed(until) => txn.mark(&tables::DELAYED, (until, found.id)),
    }
    change_counts(txn, found, |count| *count += 1);
}

/// Takes it from where it lay.
fn leave(txn: &mut Txn<'_>, found: &Dispatch) {
    match place(found) {
        Place::Ended => return,
        Place::Bound => {}
        Place::Waiting => txn.delete(&tables::WAITING, waiting_key(found)),
        Place::Delayed(until) => txn.delete(&tables::DELAYED, (until, found.id)),
    }
    change_counts(txn, found, |count| *count = count.saturating_sub(1));
}

/// The key of a waiting dispatch: node, capability, and its place among those that wait for both.
pub(crate) fn waiting_key(found: &Dispatch) -> impl Key + '_ {
    ((found.device_id, Text(&found.capability)), found.rank())
}

fn change_counts(txn: &mut Txn<'_>, found: &Dispatch, change: impl Fn(&mut u32)) {
    let device_id = found.device_id;
    let mut queue = queue_length(txn, device_id);
    change(&mut queue.open);
    let key = (device_id, Text(&found.capability));
    let mut load = tables::LOADS.get(txn, key).unwrap_or_default();
    if found.state().is_bound() {
        change(&mut queue.bound);
        change(&mut load.bound);
    } else {
        change(&mut load.waiting);
    }
    if queue.open == 0 {
        txn.delete(&tables::QUEUE_LENGTHS, device_id);
    } else {
        txn.put(&tables::QUEUE_LENGTHS, device_id, &queue);
    }
    if load.bound + load.waiting == 0 {
        txn.delete(&tables::LOADS, key);
    } else {
        txn.put(&tables::LOADS, key, &load);
    }
}

fn close(txn: &mut Txn<'_>, ended: &Dispatch) {
    txn.delete(&tables::QUEUES, (ended.device_id, ended.id));
    txn.delete(&tables::DEADLINES, (ended.deadline_at, ended.id));
    txn.mark(&tables::FINISHED, (ended.ended_at, ended.id));
    let mut sums = totals(txn);
    sums.open = sums.open.saturating_sub(1);
    sums.open_bytes = sums.open_bytes.saturating_sub(u64::from(ended.payload_size));
    sums.finished += 1;
    sums.finished_bytes += size(ended);
    txn.put(&tables::DISPATCH_TOTALS, (), &sums);
}

/// Forgets the oldest ended dispatches until neither their number nor their bytes are too many. Not a few at
/// a time: one entry can end a whole queue.
pub(crate) fn forget_finished(txn: &mut Txn<'_>) {
    let mut sums = totals(txn);
    let full =
        |sums: &Totals| sums.finished > limits::FINISHED || sums.finished_bytes > limits::FINISHED_BYTES;
    if !full(&sums) {
        return;
    }
    let mut after = sums.finished_oldest.to_be_bytes().to_vec();
    while full(&sums) {
        let mut oldest = Vec::new();
        tables::FINISHED.visit(txn, (), Some(&after), &mut |key, _| {
            oldest.push(key.to_vec());
            if oldest.len() < FORGET_PAGE {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        for id in oldest.iter().filter_map(|key| Id::from_slice(&key[8..])) {
            let Some(old) = dispatch(txn, id).filter(|_| full(&sums)) else {
                break;
            };
            sums.finished = sums.finished.saturating_sub(1);
            sums.finished_bytes = sums.finished_bytes.saturating_sub(size(&old));
            sums.finished_oldest = old.ended_at;
            remove(txn, &old);
        }
        let Some(last) = oldest.pop() else { break };
        after = last;
    }
    txn.put(&tables::DISPATCH_TOTALS, (), &sums);
}

fn remove(txn: &mut Txn<'_>, old: &Dispatch) {
    txn.delete(&tables::DISPATCHES, old.id);
    txn.delete(&tables::PAYLOADS, old.id);
    txn.delete(&tables::RESULTS, old.id);
    txn.delete(&tables::LOG_TAILS, old.id);
    txn.delete(&tables::DISPATCHES_BY_STATE, (old.state as u32, old.id));
    txn.delete(&tables::DISPATCHES_OF, (old.device_id, old.id));
    txn.delete(&tables::FINISHED, (old.ended_at, old.id));
}

fn size(dispatch: &Dispatch) -> u64 {
    u64::from(dispatch.payload_size) + u64::from(dispatch.result_size) + u64::from(dispatch.tail_size)
}
