//! The workload `registry`: registers that clients write and read at all replicas.
//!
//! Operations. `key` is a text; `value` a number or a text that is written once per key and never again; `version`
//! counts the changes of a key, from 1, and may be left out where the interface does not tell it.
//!
//! | `f` | call | answer (`ok`) |
//! |---|---|---|
//! | `read` | `{"key"}` | `{"key", "version", "value"}`; of an absent key, version 0 and value `null` |
//! | `read` | `{"key", "stale": true, "session"}` | the same and `"age_ms"`: how old the replica says that this is |
//! | `list` | `{}` | `{"entries": [{"key", "version", "value"}, ...]}`: all keys at one revision |
//! | `write` | `{"key", "value"}` | `{"key", "value", "version"}` |
//! | `cas` | `{"key", "from", "value"}` | `{"key", "from", "value", "version"}`; `fail` when the value was not `from` |
//! | `delete` | `{"key"}` | `{"key", "version"}` |
//!
//! `rev` of an answer: of a change, the log index of its entry; of a read, the index that it reflects. An answer to a
//! request that was sent before carries `"duplicate": true`: its `rev` is then not before its entry. Changes carry
//! their `request` id. What registers hold before the clients begin is written by operations of the history as well.
//!
//! Conditions:
//! - `registry.linearizable`: of each key, the changes and the reads that are not stale have an order in which each
//!   version is one more than the one before, each read answers what was written last, and nothing stands before what
//!   had returned when it was called.
//! - `registry.claimed-order`: the order of the revisions is such an order.
//! - `registry.revs-follow-time`: over all keys, what is called after another has returned has no lower revision, and a
//!   higher one if it is a change.
//! - `registry.values-written`: no read answers a value that nobody wrote, that a failed change wrote, or that was
//!   written only after it.
//! - `registry.stale-reads`: a stale read answers what was there at its revision; within a session revisions do not
//!   fall. With the bound `stale_slack_ms`, it misses nothing that was answered more than `age_ms` and that much
//!   before its call.

mod order;
mod parse;
mod stale;

use std::collections::BTreeMap;

use crate::context::Context;
use crate::history::{Event, History};
use crate::verdict::{Check, Violation};
use crate::wgl::{self, Limits};
use crate::{linear::Item, zones};

use order::{Order, Register};
use parse::{Call, Effect, Key, Registers};

/// What the operations of this workload are called.
pub const FUNCTIONS: &[&str] = &["read", "list", "write", "cas", "delete"];

/// Judges a history.
#[must_use]
pub fn check(history: &History, context: &Context) -> Vec<Check> {
    let registers = match Registers::parse(history) {
        Ok(registers) => registers,
        Err(why) => return vec![Check::unknown("registry.linearizable", why)],
    };
    let resolved = registers.resolve(context.canonical.as_ref());
    vec![
        linearizable(history, &registers, &resolved, context.limits),
        claimed_order(history, &resolved),
        revs_follow_time(&registers),
        values_written(history, &registers),
        stale::check(&resolved, context),
    ]
}

/// What became of one key.
enum Ruling {
    Holds,
    Violated(Violation),
    Unknown(String),
}

fn linearizable(
    history: &History,
    registers: &Registers<'_>,
    resolved: &Registers<'_>,
    limits: Limits,
) -> Check {
    let name = "registry.linearizable";
    let mut violations = Vec::new();
    let mut unknown = Vec::new();
    let mut how: BTreeMap<&str, u64> = BTreeMap::new();
    let mut steps = 0;
    for (key, ops) in &registers.keys {
        let (mut ruling, mut way, mut taken) = judge_key(history, registers, key, ops, limits);
        if let (Ruling::Unknown(_), Some(Order::Lines { steps })) =
            (&ruling, order::by_rev(&resolved.keys[key]))
        {
            (ruling, way, taken) = (Ruling::Holds, "journal", steps);
        }
        *how.entry(way).or_default() += 1;
        steps += taken;
        match ruling {
            Ruling::Holds => {}
            Ruling::Violated(violation) => violations.push(violation),
            Ruling::Unknown(why) => unknown.push(format!("register {key}: {why}")),
        }
    }
    let mut check = match unknown.first() {
        Some(why) if violations.is_empty() => Check::unknown(name, why),
        _ => Check::of(name, violations),
    };
    check = check
        .fact("keys", registers.keys.len())
        .fact(
            "ops",
            registers.keys.values().map(|key| key.ops.len()).sum::<usize>(),
        )
        .fact("steps", steps)
        .fact("unknown_keys", unknown.len());
    for (way, keys) in how {
        check = check.fact(&format!("keys_by_{way}"), keys);
    }
    check
}

/// Judges one key by the cheapest way that decides; the way, and the steps that it took.
fn judge_key(
    history: &History,
    registers: &Registers<'_>,
    key: &str,
    ops: &Key<'_>,
    limits: Limits,
) -> (Ruling, &'static str, u64) {
    match order::by_version(ops) {
        Some(Order::Lines { steps }) => return (Ruling::Holds, "version", steps),
        Some(Order::Broken(broken)) => {
            return (Ruling::Violated(broken.tell(key, registers)), "version", 0);
        }
        None => {}
    }
    if let Some(Order::Lines { steps }) = order::by_rev(ops) {
        return (Ruling::Holds, "rev", steps);
    }
    let items: Vec<Item<Call>> = ops.ops.iter().map(|op| op.item.clone()).collect();
    let large =
        items.len() > limits.ops || items.iter().filter(|item| item.optional).count() > limits.optional;
    if let Some(found) = large.then(|| by_zones(history, registers, key, ops)).flatten() {
        return (found, "zones", items.len() as u64);
    }
    match wgl::search(&Register, &items, limits) {
        wgl::Search::Found { steps, .. } => (Ruling::Holds, "search", steps),
        wgl::Search::Unknown { why } => (Ruling::Unknown(why), "search", 0),
        wgl::Search::None {
            longest,
            stuck,
            steps,
        } => {
            let last = longest.last().map(|at| &ops.ops[*at].op);
            let stuck = &ops.ops[stuck].op;
            let what = format!(
                "register {key}: no order of its {} operations explains their answers; after the first {} of the best \
                 one, {} has no place",
                items.len(),
                longest.len(),
                parse::tell(stuck),
            );
            let shown: Vec<_> = last.into_iter().chain([stuck]).collect();
            (Ruling::Violated(Violation::of(what, &shown)), "search", steps)
        }
    }
}

/// Registers that are only read and written, each value once, are decided without a search.
fn by_zones(history: &History, registers: &Registers<'_>, key: &str, ops: &Key<'_>) -> Option<Ruling> {
    let accesses: Option<Vec<zones::Access>> = ops.ops.iter().map(|op| op.access()).collect();
    let broken = match zones::check(&accesses?)? {
        Ok(()) => return Some(Ruling::Holds),
        Err(broken) => broken,
    };
    let shown: Vec<u64> = broken.events.iter().filter_map(|at| *at).collect();
    let values: Vec<String> = broken
        .values
        .iter()
        .map(|value| registers.value(*value))
        .collect();
    Some(Ruling::Violated(Violation {
        what: format!("register {key}: {}", broken.tell(&values)),
        time: shown.iter().map(|at| time_of(history, *at)).max().unwrap_or(0),
        events: shown,
    }))
}

fn time_of(history: &History, index: u64) -> u64 {
    let event = usize::try_from(index).ok().and_then(|at| history.events.get(at));
    event.map_or(0, |event: &Event| event.time)
}

fn claimed_order(history: &History, resolved: &Registers<'_>) -> Check {
    let name = "registry.claimed-order";
    let (mut violations, mut keys, mut steps) = (Vec::new(), 0, 0);
    for (key, ops) in &resolved.keys {
        match order::claimed(ops) {
            Some(Order::Lines { steps: taken }) => {
                keys += 1;
                steps += taken;
            }
            Some(Order::Broken(broken)) => violations.push(broken.tell(key, resolved)),
            None => {}
        }
    }
    let undecided = resolved.keys.len() - keys - violations.len();
    let none = violations.is_empty() && keys == 0 && !resolved.keys.is_empty();
    let check = if none {
        let why = format!(
            "none of {undecided} registers has a revision for each operation: {} events tell none, or are unknown",
            history.events.len()
        );
        Check::unknown(name, why)
    } else {
        Check::of(name, violations)
    };
    check
        .fact("keys", keys)
        .fact("keys_without_order", undecided)
        .fact("steps", steps)
}

/// One sweep with the highest revision that had returned when each operation was called.
fn revs_follow_time(registers: &Registers<'_>) -> Check {
    let mut moments = Vec::new();
    for told in &registers.told {
        moments.push((told.op.start(), None, told));
        if let Some(stop) = told.op.stop() {
            moments.push((stop, Some(told.rev), told));
        }
    }
    moments.sort_by_key(|(at, _, _)| *at);
    let mut highest: Option<(u64, &parse::Told<'_>)> = None;
    let mut violations = Vec::new();
    for (_, returned, told) in moments {
        if let Some(rev) = returned {
            if highest.is_none_or(|(most, _)| rev > most) {
                highest = Some((rev, told));
            }
            continue;
        }
        let Some((most, earlier)) = highest else { continue };
        let changes = told.effect == Effect::Change;
        if told.rev < most || (changes && told.rev == most) {
            let what = format!(
                "{} has revision {}, but {} had returned revision {most} before it was called",
                parse::tell(&told.op),
                told.rev,
                parse::tell(&earlier.op),
            );
            violations.push(Violation::of(what, &[&earlier.op, &told.op]));
        }
    }
    Check::of("registry.revs-follow-time", violations).fact("ops", registers.told.len())
}

fn values_written(history: &History, registers: &Registers<'_>) -> Check {
    let mut violations = Vec::new();
    let mut reads = 0;
    for (key, ops) in &registers.keys {
        for read in ops.ops.iter().chain(&ops.stale) {
            let Call::Read { value, .. } = read.item.call else {
                continue;
            };
            reads += 1;
            if value == parse::ABSENT {
                continue;
            }
            let why = match ops.writers.get(&value) {
                None => "nobody ever wrote it",
                Some(writer) if !writer.possible => "the change that wrote it failed",
                Some(writer) if read.item.stop.is_some_and(|stop| writer.start > stop) => {
                    "it was written only later"
                }
                Some(_) => continue,
            };
            let writer = ops.writers.get(&value).map(|writer| writer.start);
            let mut violation = Violation::of(
                format!("register {key}: {}, but {why}", parse::tell(&read.op)),
                &[&read.op],
            );
            violation.events.extend(writer);
            violation.time = violation
                .events
                .iter()
                .map(|at| time_of(history, *at))
                .max()
                .unwrap_or(0);
            violations.push(violation);
        }
    }
    Check::of("registry.values-written", violations).fact("reads", reads)
}
