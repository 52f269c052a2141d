//! What must be true of every reachable state, and of every step. Each rung of the tests checks these same
//! rules: scripts, properties, simulation, and the harness on a copied data folder.
//!
//! The checks read the whole state and trust no index: indexes and counters are compared with the records.

mod approvals;
mod authorities;
mod dispatches;
mod fleet;
mod leases;
mod people;
mod steps;
mod trust;
mod workers;

pub use steps::check_step;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use prost::Message;

use crate::ids::Id;
use crate::read::Read;
use crate::tables::{self, Table};
use crate::{dedup, journal, limits, meta};

/// A rule that a state breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Stable name of the rule.
    pub rule: &'static str,
    /// What breaks it.
    pub detail: String,
}

/// Collects violations.
#[derive(Default)]
struct Findings {
    found: Vec<Violation>,
}

impl Findings {
    /// Notes a violation unless `holds`.
    fn expect(&mut self, rule: &'static str, holds: bool, detail: impl FnOnce() -> String) {
        if !holds {
            self.found.push(Violation {
                rule,
                detail: detail(),
            });
        }
    }

    /// Notes a violation unless both are equal.
    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, rule: &'static str, what: &str, is: T, should: T) {
        self.expect(rule, is == should, || {
            format!("{what}: is {is:?}, should be {should:?}")
        });
    }
}

/// Checks everything; empty when all holds. Reads the whole state.
#[must_use]
pub fn check(r: &dyn Read) -> Vec<Violation> {
    let mut findings = Findings::default();
    tables_are_known(r, &mut findings);
    journal_is_intact(r, &mut findings);
    requests_are_counted(r, &mut findings);
    people::check(r, &mut findings);
    trust::check(r, &mut findings);
    fleet::check(r, &mut findings);
    authorities::check(r, &mut findings);
    dispatches::check(r, &mut findings);
    approvals::check(r, &mut findings);
    workers::check(r, &mut findings);
    leases::check(r, &mut findings);
    findings.found
}

/// All rows of a table.
fn all<V: Message + Default>(r: &dyn Read, table: &Table<V>) -> Vec<V> {
    table.list(r, (), usize::MAX)
}

/// The bytes behind a table's tag, of every key.
fn keys<V: Message + Default>(r: &dyn Read, table: &Table<V>) -> Vec<Vec<u8>> {
    table.suffixes(r, (), usize::MAX)
}

fn tables_are_known(r: &dyn Read, findings: &mut Findings) {
    r.scan(&[], &[u8::MAX], &mut |key, _| {
        let known = key
            .first()
            .is_some_and(|tag| tables::ALL.iter().any(|(known, _)| known == tag));
        findings.expect("every key belongs to a table", known, || {
            format!("key {key:02x?}")
        });
        ControlFlow::Continue(())
    });
}

fn journal_is_intact(r: &dyn Read, findings: &mut Findings) {
    let meta = meta::meta(r);
    match journal::verify_all(r) {
        Ok(summary) => {
            findings.equal(
                "the journal's ends are known",
                "first row",
                meta.journal_first,
                summary.first,
            );
            if summary.rows > 0 {
                findings.equal(
                    "the journal's ends are known",
                    "last row",
                    meta.journal_last,
                    summary.last,
                );
            }
        }
        Err(broken) => findings.expect("the journal is an unbroken chain", false, || broken.to_string()),
    }
    findings.expect(
        "the journal is bounded",
        meta.journal_rows <= limits::JOURNAL_ROWS,
        || meta.journal_rows.to_string(),
    );
    findings.expect(
        "cursors do not run ahead",
        meta.journal_last.index <= meta.index,
        || format!("{:?} at index {}", meta.journal_last, meta.index),
    );
}

fn requests_are_counted(r: &dyn Read, findings: &mut Findings) {
    const RULE: &str = "remembered requests are counted and bounded";
    let seen = meta::meta(r).requests_seen;
    let by_actor = keys(r, &tables::REQUESTS_SEEN);
    let by_age: Vec<Vec<u8>> = keys(r, &tables::REQUESTS_BY_AGE);
    findings.equal(RULE, "rows", by_actor.len() as u64, seen);
    findings.expect(RULE, seen <= limits::DEDUP_MAX, || seen.to_string());
    // (age, id, actor) turned into (actor, id) must be the same set, with the ages that the records have.
    let mut listed: Vec<(Vec<u8>, u64)> = by_age
        .iter()
        .filter_map(|key| dedup::split(key))
        .map(|(age, id, actor)| ([actor.to_bytes(), id.to_bytes()].concat(), age))
        .collect();
    listed.sort();
    let ages = all(r, &tables::REQUESTS_SEEN).into_iter().map(|seen| seen.age);
    let seen_ages: Vec<(Vec<u8>, u64)> = by_actor.iter().cloned().zip(ages).collect();
    let oldest = meta::meta(r).requests_oldest;
    findings.expect(RULE, listed.iter().all(|(_, age)| *age >= oldest), || {
        format!("some are older than {oldest}")
    });
    findings.expect(RULE, listed == seen_ages, || {
        "the order of forgetting lists other requests".to_owned()
    });
    let mut per_actor: BTreeMap<Id, u64> = BTreeMap::new();
    for actor in by_actor.iter().filter_map(|key| Id::from_slice(&key[..16])) {
        *per_actor.entry(actor).or_default() += 1;
    }
    for (actor, count) in per_actor {
        let record = tables::REQUESTERS.get(r, actor).unwrap_or_default();
        findings.equal(RULE, "requests of an actor", record.remembered, count);
        findings.expect(RULE, count <= limits::DEDUP_PER_ACTOR, || count.to_string());
    }
}
