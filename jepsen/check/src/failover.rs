//! The workload `failover`: changes at a fixed rate, whoever answers them and however slowly, and how long none
//! succeeds.
//!
//! | `f` | call | answer (`ok`) |
//! |---|---|---|
//! | `pulse` | `{"number"}` | the same |
//!
//! A pulse is one try at one replica, sent when it is due, also when earlier ones have no answer yet. The nemesis's
//! events say what was broken when (see [`crate::history`]), and `phase` with `{"phase": "before" | "faults" |
//! "after" | "final"}` when clients had quiet. A *gap* is the time from one pulse that succeeded to the next one
//! that did; the gap of a fault is the longest from its begin to three seconds after its end, or to the begin of
//! the next one.
//!
//! Conditions. A fault that leaves a majority of the replicas untouched (of those named in [`BOUNDED`]; faults less
//! than a second apart count together) is bounded while it lasts; any other one from its end on.
//! - `failover.leader-faults`: the gap of a fault that strikes who leads is at most the bound `failover_leader_ms`.
//! - `failover.follower-faults`: of one that does not, at most `failover_follower_ms`.
//! - `failover.heals`: from the end of any other fault a pulse succeeds within `failover_heal_ms`.
//! - `failover.resumes`: after the last fault, when [`SETTLE_MS`] have passed or half of the quiet, pulses succeed
//!   at 90 % or more of the rate before the first.
//!
//! Times mean something only on a machine that had time: where the bound `late_ms` (by how much the harness itself
//! was late) says that it had not, what is too slow is *unknown*, not wrong. The death of a worker or of an agent
//! is judged by [`crate::lease`] and [`crate::dispatch`].

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::context::Context;
use crate::history::{Event, History};
use crate::verdict::{Check, Violation};

#[cfg(test)]
mod tests;

/// What the operations of this workload are called.
pub const FUNCTIONS: &[&str] = &["pulse"];

/// Three times the longest wait for an election.
pub const LEADER_MS: f64 = 3.0 * 850.0;
/// A heartbeat, and what an answer takes.
pub const FOLLOWER_MS: f64 = 500.0;
/// For processes to start and an election.
pub const HEAL_MS: f64 = 10_000.0;
/// For the rate to be what it was.
pub const SETTLE_MS: u64 = 10_000;
/// A harness that is later than this runs on a starved machine.
pub const STARVED_MS: f64 = 200.0;

/// Faults that leave a majority at work when they strike a minority: names, or how they begin.
pub const BOUNDED: &[&str] = &[
    "kill",
    "pause",
    "partition:leader",
    "partition:one",
    "partition:peers-only",
    "disk:stall",
    "power",
];

const MS: u64 = 1_000_000;
/// What a fault did may show a little after it ended.
const AFTER: u64 = 3_000 * MS;
/// Until this has passed after a fault, what it struck may not be what it was.
const WELL: u64 = 1_000 * MS;
/// Pulses that must be there to speak of a rate.
const FEW: usize = 20;

/// A fault.
#[derive(Debug)]
struct Fault {
    name: String,
    from: u64,
    to: u64,
    targets: BTreeSet<String>,
    /// Who led when it began.
    leader: Option<String>,
    events: Vec<u64>,
}

/// What can be asked of a cluster during a fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    Leader,
    Follower,
    Other,
}

/// Judges a history.
#[must_use]
pub fn check(history: &History, context: &Context) -> Vec<Check> {
    let pulses = pulses(history);
    if pulses.len() < FEW {
        let why = format!(
            "only {} pulses succeeded: nothing can be said of gaps",
            pulses.len()
        );
        return vec![Check::unknown("failover.resumes", why)];
    }
    let faults = faults(history);
    let mut checks = Vec::new();
    for (class, name, bound) in [
        (
            Class::Leader,
            "failover.leader-faults",
            context.bound_or("failover_leader_ms", LEADER_MS),
        ),
        (
            Class::Follower,
            "failover.follower-faults",
            context.bound_or("failover_follower_ms", FOLLOWER_MS),
        ),
        (
            Class::Other,
            "failover.heals",
            context.bound_or("failover_heal_ms", HEAL_MS),
        ),
    ] {
        checks.push(bounded(class, name, bound, &faults, &pulses, context));
    }
    checks.push(resumes(history, &pulses, context));
    checks
}

/// When pulses succeeded.
fn pulses(history: &History) -> Vec<u64> {
    let ops = history.ops().into_iter();
    let mut ends: Vec<u64> = ops
        .filter(|op| op.is_ok() && op.invoke.f == "pulse")
        .filter_map(|op| op.returned())
        .collect();
    ends.sort_unstable();
    ends
}

fn word<'a>(event: &'a Event, name: &str) -> &'a str {
    event.value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// Faults that were begun and ended.
fn faults(history: &History) -> Vec<Fault> {
    let mut open: BTreeMap<(String, u64), Fault> = BTreeMap::new();
    let mut done = Vec::new();
    let mut leader = None;
    for event in history.faults() {
        if event.f == "leader" {
            leader = Some(word(event, "replica").to_owned());
        }
        let Some(id) = event.value.get("id").and_then(Value::as_u64) else {
            continue;
        };
        let key = (event.f.clone(), id);
        match word(event, "phase") {
            "start" => {
                let targets = event.value.get("targets").and_then(Value::as_array);
                let names = targets.into_iter().flatten().filter_map(Value::as_str);
                let fault = Fault {
                    name: event.f.clone(),
                    from: event.time,
                    to: event.time,
                    targets: names.map(str::to_owned).collect(),
                    leader: leader.clone(),
                    events: vec![event.index],
                };
                open.insert(key, fault);
            }
            "stop" => {
                if let Some(mut fault) = open.remove(&key).filter(|_| word(event, "outcome") != "skipped") {
                    fault.to = event.time;
                    fault.events.push(event.index);
                    done.push(fault);
                }
            }
            _ => {}
        }
    }
    done
}

/// What can be asked while a fault lasts, with all that lasts at the same time.
fn class_of(fault: &Fault, all: &[Fault], replicas: usize) -> Class {
    let together = all
        .iter()
        .filter(|other| other.from <= fault.to + WELL && fault.from <= other.to + WELL);
    let mut struck: BTreeSet<&str> = BTreeSet::new();
    let mut leads = false;
    for other in together {
        let is_bounded = BOUNDED.iter().any(|name| other.name.starts_with(name));
        if !is_bounded || other.targets.is_empty() {
            return Class::Other;
        }
        struck.extend(other.targets.iter().map(String::as_str));
        leads |= other
            .leader
            .as_ref()
            .is_none_or(|leader| other.targets.contains(leader));
    }
    if 2 * struck.len() >= replicas {
        Class::Other
    } else if leads {
        Class::Leader
    } else {
        Class::Follower
    }
}

/// The longest time without a pulse within one span, in milliseconds, and when it began.
fn gap(pulses: &[u64], from: u64, to: u64) -> (u64, u64) {
    let overlapping = pulses.windows(2).filter(|pair| pair[1] > from && pair[0] < to);
    let longest = overlapping
        .map(|pair| (pair[0].max(from), pair[1].min(to)))
        .map(|(since, until)| ((until - since) / MS, since))
        .max_by_key(|(length, _)| *length);
    longest.unwrap_or((0, from))
}

fn bounded(
    class: Class,
    name: &str,
    bound: f64,
    faults: &[Fault],
    pulses: &[u64],
    context: &Context,
) -> Check {
    let replicas = context.facts.replicas.len();
    let mut gaps = Vec::new();
    let mut violations = Vec::new();
    for fault in faults
        .iter()
        .filter(|fault| class_of(fault, faults, replicas) == class)
    {
        let (length, since) = if class == Class::Other {
            // As long as another one lasts nothing is promised.
            let ends = faults
                .iter()
                .filter(|other| other.from <= fault.to + WELL && other.to > fault.to);
            let ended = ends.map(|other| other.to).max().unwrap_or(fault.to);
            let next = pulses.iter().find(|pulse| **pulse >= ended);
            // One that nothing follows came too near to the end of the load to say.
            (next.map_or(0, |next| (next - ended) / MS), ended)
        } else {
            let later = faults.iter().map(|other| other.from);
            let next = later.filter(|from| *from > fault.to).min().unwrap_or(u64::MAX);
            gap(pulses, fault.from, next.min(fault.to + AFTER))
        };
        gaps.push(length);
        if length as f64 > bound {
            let whom = Vec::from_iter(fault.targets.clone()).join(", ");
            violations.push(Violation {
                what: format!(
                    "{} of {} stopped all changes for {length} ms; the bound is {bound} ms",
                    fault.name,
                    if whom.is_empty() { "the cluster" } else { &whom },
                ),
                time: since,
                events: fault.events.clone(),
            });
        }
    }
    gaps.sort_unstable();
    let median = gaps.get(gaps.len().saturating_sub(1) / 2).copied().unwrap_or(0);
    timely(name, violations, context)
        .fact("faults", gaps.len())
        .fact("median_ms", median)
        .fact("worst_ms", gaps.last().copied().unwrap_or(0))
        .fact("bound_ms", bound)
}

/// Violations of time count on a machine that had time.
fn timely(name: &str, violations: Vec<Violation>, context: &Context) -> Check {
    let late = context.bound_or("late_ms", 0.0);
    match violations.first() {
        Some(first) if late > STARVED_MS => Check::unknown(
            name,
            format!(
                "{}; but the harness itself was late by {late} ms: the machine has too little time for this",
                first.what
            ),
        ),
        _ => Check::of(name, violations),
    }
}

/// When each phase began.
fn phases(history: &History) -> BTreeMap<&str, u64> {
    let told = history.faults().filter(|event| event.f == "phase");
    told.map(|event| (word(event, "phase"), event.time)).collect()
}

fn resumes(history: &History, pulses: &[u64], context: &Context) -> Check {
    let name = "failover.resumes";
    let phases = phases(history);
    let at = |phase: &str| phases.get(phase).copied();
    let (Some(before), Some(faults), Some(after), Some(last)) =
        (at("before"), at("faults"), at("after"), at("final"))
    else {
        return Check::unknown(name, "the history does not say when clients had quiet");
    };
    let settled = after + (SETTLE_MS * MS).min(last.saturating_sub(after) / 2);
    let count = |from: u64, to: u64| pulses.iter().filter(|pulse| (from..to).contains(*pulse)).count();
    let rate = |from: u64, to: u64| count(from, to) as f64 / (to.saturating_sub(from).max(1) as f64 / 1e9);
    if count(before, faults) < FEW || last <= settled {
        return Check::unknown(name, "there was too little quiet before or after the faults");
    }
    let (was, is) = (rate(before, faults), rate(settled, last));
    let mut violations = Vec::new();
    if is < 0.9 * was {
        violations.push(Violation {
            what: format!(
                "{} ms after the faults had ended {is:.1} pulses a second succeeded, and {was:.1} before them",
                (settled - after) / MS
            ),
            time: settled,
            events: Vec::new(),
        });
    }
    timely(name, violations, context)
        .fact("before_per_s", (was * 10.0).round() / 10.0)
        .fact("after_per_s", (is * 10.0).round() / 10.0)
}
