//! Rules about dispatches, their queues, and their indexes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Findings, all, keys};
use crate::dispatch::{self, Dispatch, Effect, Load, QueueLength, State, Totals, waiting_key};
use crate::ids::Id;
use crate::read::Read;
use crate::tables::{self, Present, Table};
use crate::{limits, nodes};

/// Keys that an index should have.
type Keys = BTreeSet<Vec<u8>>;

#[derive(Default)]
struct Expected {
    totals: Totals,
    queues: Keys,
    deadlines: Keys,
    by_state: Keys,
    of_device: Keys,
    finished: Keys,
    waiting: Keys,
    delayed: Keys,
    lengths: BTreeMap<Id, QueueLength>,
    loads: BTreeMap<(Id, String), Load>,
}

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    let mut expected = Expected::default();
    for found in all(r, &tables::DISPATCHES) {
        check_one(r, &found, findings);
        expected.add(&found);
    }
    indexed(r, &tables::QUEUES, &expected.queues, findings);
    indexed(r, &tables::DEADLINES, &expected.deadlines, findings);
    indexed(r, &tables::DISPATCHES_BY_STATE, &expected.by_state, findings);
    indexed(r, &tables::DISPATCHES_OF, &expected.of_device, findings);
    indexed(r, &tables::FINISHED, &expected.finished, findings);
    indexed(r, &tables::WAITING, &expected.waiting, findings);
    indexed(r, &tables::DELAYED, &expected.delayed, findings);
    slots_are_counted(r, &expected, findings);
    let payloads = keys(r, &tables::PAYLOADS).len() as u64;
    let known = dispatch::totals(r);
    let first = expected.finished.first();
    let oldest = known.finished_oldest.to_be_bytes();
    findings.expect(
        "forgetting begins at the oldest",
        first.is_none_or(|first| first.as_slice() >= oldest.as_slice()),
        || format!("{first:02x?} ended before {}", known.finished_oldest),
    );
    let totals = Totals {
        finished_oldest: known.finished_oldest,
        ..expected.totals
    };
    findings.equal(
        "a dispatch has its payload",
        "payloads",
        payloads,
        totals.open + totals.finished,
    );
    findings.equal("dispatches are counted", "totals", known, totals);
    findings.expect(
        "queues are bounded",
        totals.open_bytes + totals.open * limits::DISPATCH_COST <= limits::OPEN_BYTES,
        || format!("{} bytes of {}", totals.open_bytes, totals.open),
    );
    findings.expect(
        "ended dispatches are bounded",
        totals.finished <= limits::FINISHED && totals.finished_bytes <= limits::FINISHED_BYTES,
        || format!("{} bytes of {}", totals.finished_bytes, totals.finished),
    );
}

/// Every counter of slots and queues is what the records say, and no free slot is kept from what waits for it.
fn slots_are_counted(r: &dyn Read, expected: &Expected, findings: &mut Findings) {
    let queues = all(r, &tables::QUEUE_LENGTHS).len();
    findings.equal("queues are counted", "queues", queues, expected.lengths.len());
    for (device, length) in &expected.lengths {
        let is = dispatch::queue_length(r, *device);
        findings.equal("queues are counted", "a queue", is, *length);
        let bounded = length.open <= limits::OPEN_PER_DEVICE && length.bound <= limits::BOUND_PER_DEVICE;
        findings.expect("queues are bounded", bounded, || format!("{device}: {length:?}"));
    }
    let loads = all(r, &tables::LOADS).len();
    findings.equal("slots are counted", "loads", loads, expected.loads.len());
    for ((device, capability), load) in &expected.loads {
        let is = dispatch::load(r, *device, capability);
        findings.equal("slots are counted", "a load", is, *load);
    }
    for device in expected.lengths.keys() {
        let node = nodes::node(r, *device).filter(|node| node.session.is_some());
        let idle = node.and_then(|node| dispatch::next_runnable(r, &node));
        findings.expect("no free slot is kept from what waits", idle.is_none(), || {
            format!("{device}: {idle:?}")
        });
    }
}

fn check_one(r: &dyn Read, found: &Dispatch, findings: &mut Findings) {
    let name = || format!("{} in state {}", found.id, found.state().as_str());
    let ended = found.state().is_terminal();
    findings.expect(
        "an ended dispatch has its time",
        ended == (found.ended_at != 0),
        name,
    );
    findings.expect(
        "a queued dispatch is not bound",
        found.state() != State::Queued || (found.epoch == 0 && found.replica_id == 0),
        name,
    );
    let waits_for_somebody = found.state() == State::AwaitingLocalMediation;
    findings.expect(
        "who has to act is known while somebody has to",
        waits_for_somebody == found.mediation.is_some(),
        name,
    );
    findings.expect(
        "only what waits has a first moment",
        found.state() == State::Queued || found.not_before == 0,
        name,
    );
    let allowed = found.retry.as_ref().map_or(1, |retry| retry.max_attempts);
    findings.expect("attempts are bounded", found.attempt <= allowed, name);
    findings.expect(
        "only ended work has late results",
        found.late.is_none() || ended,
        name,
    );
    let once = found.effect() != Effect::Once || found.attempt <= 1;
    findings.expect("once work is delivered at most once", once, name);
    if !ended && found.state() != State::Queued {
        // It stays bound to the newest session, live or lost, until the next attach moves it.
        let newest = nodes::node(r, found.device_id).map(|node| node.last_epoch);
        findings.equal(
            "an open dispatch is bound to the newest session",
            &name(),
            newest,
            Some(found.epoch),
        );
    }
    let result = dispatch::result(r, found.id).map_or(0, |bytes| bytes.len());
    findings.equal(
        "a result has its size",
        &name(),
        result,
        found.result_size as usize,
    );
    let tail = dispatch::log_tail(r, found.id).map_or(0, |bytes| bytes.len());
    findings.equal("a log has its size", &name(), tail, found.tail_size as usize);
    let payload = dispatch::payload(r, found.id).map(|bytes| bytes.len());
    findings.equal(
        "a payload has its size",
        &name(),
        payload,
        Some(found.payload_size as usize),
    );
}

impl Expected {
    fn add(&mut self, found: &Dispatch) {
        self.by_state
            .insert(tables::DISPATCHES_BY_STATE.key((found.state as u32, found.id))[1..].to_vec());
        self.of_device
            .insert(tables::DISPATCHES_OF.key((found.device_id, found.id))[1..].to_vec());
        let payload = u64::from(found.payload_size);
        if found.state().is_terminal() {
            self.totals.finished += 1;
            self.totals.finished_bytes += payload + u64::from(found.result_size) + u64::from(found.tail_size);
            self.finished
                .insert(tables::FINISHED.key((found.ended_at, found.id))[1..].to_vec());
            return;
        }
        self.totals.open += 1;
        self.totals.open_bytes += payload;
        let bound = u32::from(found.state().is_bound());
        let length = self.lengths.entry(found.device_id).or_default();
        length.open += 1;
        length.bound += bound;
        let load = self
            .loads
            .entry((found.device_id, found.capability.clone()))
            .or_default();
        load.bound += bound;
        load.waiting += 1 - bound;
        if found.not_before != 0 {
            self.delayed
                .insert(tables::DELAYED.key((found.not_before, found.id))[1..].to_vec());
        } else if found.state() == State::Queued {
            self.waiting
                .insert(tables::WAITING.key(waiting_key(found))[1..].to_vec());
        }
        self.queues
            .insert(tables::QUEUES.key((found.device_id, found.id))[1..].to_vec());
        self.deadlines
            .insert(tables::DEADLINES.key((found.deadline_at, found.id))[1..].to_vec());
    }
}

fn indexed(r: &dyn Read, table: &Table<Present>, expected: &Keys, findings: &mut Findings) {
    let is: Keys = keys(r, table).into_iter().collect();
    findings.expect("indexes follow their records", is == *expected, || {
        format!(
            "{}: {} rows instead of {}",
            table.name(),
            is.len(),
            expected.len()
        )
    });
}
