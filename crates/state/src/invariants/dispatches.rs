//! Rules about dispatches, their queues, and their indexes.

use std::collections::{BTreeMap, BTreeSet};

use super::{Findings, all, keys};
use crate::dispatch::{self, Dispatch, Effect, State, Totals};
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
    lengths: BTreeMap<Id, u32>,
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
    let queues = all(r, &tables::QUEUE_LENGTHS).len();
    findings.equal("queues are counted", "queues", queues, expected.lengths.len());
    for (device, length) in expected.lengths {
        findings.equal(
            "queues are counted",
            "a queue",
            dispatch::open_count(r, device),
            length,
        );
        findings.expect("queues are bounded", length <= limits::OPEN_PER_DEVICE, || {
            format!("{device}: {length}")
        });
    }
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
        found.state() != State::Queued || found.epoch == 0,
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
            self.totals.finished_bytes += payload + u64::from(found.result_size);
            self.finished
                .insert(tables::FINISHED.key((found.ended_at, found.id))[1..].to_vec());
            return;
        }
        self.totals.open += 1;
        self.totals.open_bytes += payload;
        *self.lengths.entry(found.device_id).or_default() += 1;
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
