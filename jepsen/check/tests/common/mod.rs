//! Histories for the tests: of a true register under random interleavings, whole or with lies in the answers; and the
//! slow, plain search that the fast ones are compared with.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;

use palyra_jepsen_check::history::Answer;
use palyra_jepsen_check::{Check, History, Kind, Op, Outcome, Recorder};
use rand::Rng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

/// What a random history may contain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) ops: usize,
    pub(crate) processes: usize,
    pub(crate) keys: u64,
    /// Percent of operations that are cas.
    pub(crate) cas: u32,
    /// Percent of operations that are deletions.
    pub(crate) delete: u32,
    /// Percent of operations that end unknown, and as many that fail.
    pub(crate) unknown: u32,
    pub(crate) versions: bool,
}

/// An operation under way.
struct Flight {
    pending: palyra_jepsen_check::history::Pending,
    f: &'static str,
    call: Value,
    answer: Option<(Kind, Value, u64)>,
}

/// What the true registers hold.
#[derive(Default)]
struct World {
    held: BTreeMap<u64, (u64, Value)>,
    rev: u64,
}

impl World {
    /// Lets the operation take effect.
    fn apply(&mut self, f: &str, call: &Value, versions: bool) -> (Kind, Value, u64) {
        let key: u64 = call["key"].as_str().unwrap()[1..].parse().unwrap();
        let (version, value) = self.held.entry(key).or_insert((0, Value::Null));
        let mut answer = call.clone();
        if f == "cas" && *value != call["from"] {
            return (Kind::Fail, answer, self.rev);
        }
        if f == "read" {
            answer["value"] = value.clone();
        } else {
            *value = call.get("value").cloned().unwrap_or(Value::Null);
            *version += 1;
            self.rev += 1;
        }
        if versions {
            answer["version"] = json!(version);
        }
        (Kind::Ok, answer, self.rev)
    }
}

/// A history of true registers.
pub(crate) fn truth(rng: &mut SmallRng, plan: Plan) -> History {
    let mut recorder = Recorder::default();
    let mut world = World::default();
    let mut flights: Vec<Option<Flight>> = Vec::new();
    let mut processes: Vec<u64> = Vec::new();
    for _ in 0..plan.processes {
        flights.push(None);
        processes.push(recorder.process());
    }
    let mut ghosts: Vec<(&str, Value)> = Vec::new();
    let (mut started, mut time, mut values) = (0, 0, 0u64);
    while started < plan.ops || flights.iter().any(Option::is_some) {
        time += rng.gen_range(0..3);
        if !ghosts.is_empty() && rng.gen_range(0..6) == 0 {
            let (f, call) = ghosts.swap_remove(rng.gen_range(0..ghosts.len()));
            world.apply(f, &call, plan.versions);
        }
        let at = rng.gen_range(0..plan.processes);
        let Some(flight) = &mut flights[at] else {
            if started < plan.ops {
                started += 1;
                let (f, call) = draw(rng, plan, &mut values);
                let request = (f != "read").then(|| format!("q{started}"));
                let pending = recorder.invoke(time, processes[at], f, call.clone(), None, request);
                flights[at] = Some(Flight {
                    pending,
                    f,
                    call,
                    answer: None,
                });
            }
            continue;
        };
        if flight.answer.is_none() {
            let fate = rng.gen_range(0..100);
            if fate < plan.unknown {
                let answer = Answer {
                    value: flight.call.clone(),
                    ..Answer::default()
                };
                recorder.complete(time, &flight.pending, Kind::Info, answer);
                // It may take effect later, or not at all.
                if flight.f != "read" {
                    ghosts.push((flight.f, flight.call.clone()));
                }
                processes[at] = recorder.process();
                flights[at] = None;
            } else if fate < 2 * plan.unknown {
                flight.answer = Some((Kind::Fail, flight.call.clone(), 0));
            } else {
                flight.answer = Some(world.apply(flight.f, &flight.call, plan.versions));
            }
            continue;
        }
        let flight = flights[at].take().unwrap();
        let (kind, value, rev) = flight.answer.unwrap();
        let rev = (kind == Kind::Ok).then_some(rev);
        recorder.complete(
            time,
            &flight.pending,
            kind,
            Answer {
                value,
                rev,
                ..Answer::default()
            },
        );
    }
    recorder.history().clone()
}

fn draw(rng: &mut SmallRng, plan: Plan, values: &mut u64) -> (&'static str, Value) {
    let key = format!("k{}", rng.gen_range(0..plan.keys));
    let kind = rng.gen_range(0..100);
    let mut next = || {
        *values += 1;
        *values
    };
    if kind < plan.cas {
        let value = next();
        let from = rng.gen_range(0..=value);
        let from = if from == 0 { Value::Null } else { json!(from) };
        ("cas", json!({"key": key, "from": from, "value": value}))
    } else if kind < plan.cas + plan.delete {
        ("delete", json!({"key": key}))
    } else if kind < 55 {
        ("write", json!({"key": key, "value": next()}))
    } else {
        ("read", json!({"key": key}))
    }
}

/// Puts a lie into one answer.
pub(crate) fn lie(rng: &mut SmallRng, history: &mut History) {
    let told: Vec<usize> = (0..history.events.len())
        .filter(|at| history.events[*at].kind == Kind::Ok)
        .collect();
    if told.is_empty() {
        return;
    }
    let at = told[rng.gen_range(0..told.len())];
    let event = &mut history.events[at];
    let versioned = event.value.get("version").is_some();
    if event.f == "read" && (!versioned || rng.r#gen()) {
        event.value["value"] = match rng.gen_range(0..6) {
            0 => Value::Null,
            other => json!(other),
        };
    } else if versioned {
        event.value["version"] = json!(rng.gen_range(0..5));
    } else {
        event.kind = Kind::Fail;
    }
}

/// Whether the operations of each key have a linearization: every order is tried.
pub(crate) fn brute_force(history: &History) -> bool {
    let ops = history.ops();
    let key = |op: &Op<'_>| op.invoke.value["key"].as_str().unwrap().to_owned();
    let mut keys: BTreeMap<String, Vec<Op<'_>>> = BTreeMap::new();
    for op in ops {
        let read = op.invoke.f == "read";
        let gone = op.kind() == Kind::Fail || (read && op.kind() == Kind::Info);
        keys.entry(key(&op)).or_default().extend((!gone).then_some(op));
    }
    keys.values().all(|ops| {
        let mut placed = vec![false; ops.len()];
        place(ops, &mut placed, 0, &Value::Null)
    })
}

fn place(ops: &[Op<'_>], placed: &mut Vec<bool>, version: u64, value: &Value) -> bool {
    let open = |at: &usize| !placed[*at];
    if (0..ops.len()).filter(open).all(|at| !ops[at].is_ok()) {
        return true;
    }
    let due = (0..ops.len()).filter(open).filter_map(|at| ops[at].stop()).min();
    for at in 0..ops.len() {
        if placed[at] || due.is_some_and(|due| ops[at].start() > due) {
            continue;
        }
        if let Some((version, value)) = step(&ops[at], version, value) {
            placed[at] = true;
            if place(ops, placed, version, &value) {
                return true;
            }
            placed[at] = false;
        }
    }
    false
}

fn step(op: &Op<'_>, version: u64, value: &Value) -> Option<(u64, Value)> {
    let told = op
        .end
        .filter(|_| op.is_ok())
        .and_then(|end| end.value.get("version"));
    let told = told.and_then(Value::as_u64);
    if op.invoke.f == "read" {
        let absent = value.is_null() && told == Some(0);
        let fits = op.value()["value"] == *value && (told.is_none() || told == Some(version) || absent);
        return fits.then(|| (version, value.clone()));
    }
    let fits = op.invoke.f != "cas" || op.invoke.value["from"] == *value;
    let fits = fits && told.is_none_or(|told| told == version + 1);
    let next = op.invoke.value.get("value").cloned().unwrap_or(Value::Null);
    fits.then_some((version + 1, next))
}

/// The check of this name.
pub(crate) fn named<'a>(checks: &'a [Check], name: &str) -> &'a Check {
    checks.iter().find(|check| check.name == name).unwrap()
}

/// Whether it is violated; `None` when it is unknown.
pub(crate) fn violated(check: &Check) -> Option<bool> {
    match check.outcome {
        Outcome::Valid => Some(false),
        Outcome::Invalid { .. } => Some(true),
        Outcome::Unknown { .. } => None,
    }
}
