//! Rules about workers: lifecycles, what their indexes and counters say, and what ends a quarantine.

use std::collections::BTreeSet;

use super::{Findings, all, keys};
use crate::apply::Applied;
use crate::fleet::{self, Lifecycle, Totals, Worker, lifecycle};
use crate::read::Read;
use crate::tables::{self, Text};
use crate::{identity, limits, meta, nodes};

/// Keys that an index should have.
type Keys = BTreeSet<Vec<u8>>;

#[derive(Default)]
struct Expected {
    by_lifecycle: Keys,
    due: Keys,
    ready: Keys,
    checked: Keys,
    totals: Totals,
}

pub(super) fn check(r: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "indexes of workers follow their records";
    let mut expected = Expected::default();
    expected.totals.by_lifecycle = vec![0; Lifecycle::ALL.len()];
    let workers = all(r, &tables::WORKERS);
    for worker in &workers {
        check_one(r, worker, findings);
        expected.add(worker);
    }
    for (table, is, should) in [
        (
            "by lifecycle",
            keys(r, &tables::WORKERS_BY_LIFECYCLE),
            expected.by_lifecycle,
        ),
        ("due", keys(r, &tables::WORKERS_DUE), expected.due),
        ("ready", keys(r, &tables::WORKERS_READY), expected.ready),
        ("checked", keys(r, &tables::WORKERS_CHECKED), expected.checked),
    ] {
        let is: Keys = is.into_iter().collect();
        findings.expect(RULE, is == should, || {
            format!("{table}: {} rows instead of {}", is.len(), should.len())
        });
    }
    let sums = fleet::totals(r);
    let counted = if sums.by_lifecycle.is_empty() && workers.is_empty() {
        Totals::default()
    } else {
        expected.totals
    };
    findings.equal("workers are counted", "totals", sums, counted);
    findings.expect(
        "workers are bounded",
        workers.len() as u64 <= limits::WORKERS,
        || workers.len().to_string(),
    );
    if fleet::policy(r).is_none() {
        let admitted = workers.iter().any(|worker| checked(worker) != 0);
        findings.expect("without a policy nobody is admitted", !admitted, String::new);
    }
}

fn checked(worker: &Worker) -> u64 {
    worker
        .attested
        .as_ref()
        .map_or(0, |attested| attested.policy_version)
}

fn check_one(r: &dyn Read, worker: &Worker, findings: &mut Findings) {
    let name = worker.id.to_string();
    let (clock, policy) = (meta::clock(r), fleet::policy(r));
    let version = policy.as_ref().map_or(0, |policy| policy.version);
    let (state, _) = lifecycle::of(worker, clock, version);
    // Time and a new policy change what a record comes to without writing it: then it waits for `Lapse` or
    // `Recheck`.
    let is_due = worker.due_at != 0 && worker.due_at <= clock;
    let waits = is_due || (checked(worker) != 0 && checked(worker) < version);
    findings.expect(
        "a lifecycle is what the facts come to",
        waits || worker.lifecycle() == state,
        || format!("{name} is {:?}, and comes to {state:?}", worker.lifecycle()),
    );
    findings.equal(
        "who waits for time is due",
        &name,
        worker.due_at,
        fleet::due_at(worker),
    );
    let admitted = checked(worker) != 0;
    let trusted = worker.quarantine.is_none() && !worker.barred;
    findings.expect("who is not trusted is not admitted", !admitted || trusted, || {
        name.clone()
    });
    findings.expect(
        "nobody is held against a policy to come",
        checked(worker) <= version,
        || format!("{name}: {} of {version}", checked(worker)),
    );
    let session = nodes::node(r, worker.id).and_then(|node| node.session);
    let away = worker.away_since != 0;
    findings.expect(
        "who has no session is away",
        worker.barred || away == session.is_none(),
        || format!("{name}: away since {}, session {session:?}", worker.away_since),
    );
    let reconciled = worker.reconciled_epoch;
    let fits = reconciled == 0 || session.is_some_and(|session| session.epoch == reconciled);
    findings.expect("work is given in a reconciled session", fits, || {
        format!("{name}: {reconciled}")
    });
    let trusted_device = identity::device(r, worker.id).is_some_and(|device| device.revoked_index == 0);
    findings.expect(
        "a worker of a revoked device is barred",
        worker.barred != trusted_device,
        || name.clone(),
    );
    let bounded = worker.unclean.len() <= limits::UNCLEAN && worker.slots_used <= limits::SLOTS_PER_WORKER;
    findings.expect("what a worker holds is bounded", bounded, || name.clone());
}

impl Expected {
    fn add(&mut self, worker: &Worker) {
        let id = worker.id;
        let listed = tables::WORKERS_BY_LIFECYCLE.key((worker.lifecycle as u32, id));
        self.by_lifecycle.insert(listed[1..].to_vec());
        if worker.due_at != 0 {
            self.due
                .insert(tables::WORKERS_DUE.key((worker.due_at, id))[1..].to_vec());
        }
        if checked(worker) != 0 {
            self.checked
                .insert(tables::WORKERS_CHECKED.key((checked(worker), id))[1..].to_vec());
            self.totals.admitted += 1;
        }
        if let (Some(place), Some(attested)) = (fleet::ready_place(worker), &worker.attested) {
            for tool in &attested.tools {
                self.ready
                    .insert(tables::WORKERS_READY.key((Text(tool), place))[1..].to_vec());
            }
        }
        self.totals.by_lifecycle[worker.lifecycle() as usize] += 1;
        self.totals.slots += fleet::slots_of(worker);
        self.totals.slots_used += u64::from(worker.slots_used);
    }
}

/// A lifecycle changes as the table has it, with a row that says so; a quarantine ends by an accepted
/// statement that somebody asked for; a nonce that was open is closed or stays.
pub(super) fn check_step(before: &dyn Read, after: &dyn Read, applied: &Applied, findings: &mut Findings) {
    for old in all(before, &tables::WORKERS) {
        let Some(new) = fleet::worker(after, old.id) else {
            let barred = identity::device(after, old.id).is_none();
            // Leases of a device that was removed run out by themselves.
            let forgettable = barred || (old.slots_used == 0 && old.lifecycle() == Lifecycle::Offline);
            findings.expect("what holds a worker is not forgotten", forgettable, || {
                format!("{old:?}")
            });
            continue;
        };
        let id = old.id.to_string();
        check_rows(&old, &new, applied, findings);
        if old.quarantine.is_some() && new.quarantine.is_none() {
            let accepted = new.attested.as_ref().map(|attested| attested.index);
            let passed = old.reverify_at != 0 && accepted == Some(meta::meta(after).index);
            findings.expect(
                "a quarantine ends by a statement that was asked for",
                passed,
                || id.clone(),
            );
        }
        let fence = (old.last_fence, new.last_fence);
        findings.expect("fences of a worker rise", fence.0 <= fence.1, || {
            format!("{id}: {fence:?}")
        });
    }
}

/// The rows of an entry lead from the old lifecycle to the new one, each step of which may be.
fn check_rows(old: &Worker, new: &Worker, applied: &Applied, findings: &mut Findings) {
    const RULE: &str = "a lifecycle changes as the table has it, and says so";
    let id = old.id.to_string();
    let mut at = old.lifecycle();
    for row in applied
        .rows
        .iter()
        .filter(|row| row.subject == id && row.action == "worker.lifecycle")
    {
        let step = (
            Lifecycle::parse(row.detail("from")),
            Lifecycle::parse(row.detail("to")),
        );
        let (Some(from), Some(to)) = step else {
            findings.expect(RULE, false, || format!("{id}: {step:?}"));
            return;
        };
        findings.expect(RULE, from == at && lifecycle::allowed(from, to), || {
            format!("{id}: {at:?}, then {from:?} to {to:?}")
        });
        at = to;
    }
    findings.expect(RULE, at == new.lifecycle(), || {
        format!("{id}: {at:?}, {:?}", new.lifecycle())
    });
}
