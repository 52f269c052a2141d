//! Stale reads: what a replica has by itself, which may be old, and must never be wrong.

use std::collections::HashMap;

use serde_json::Value;

use super::parse::{ABSENT, Access, Call, Effect, Key, Registers, tell};
use crate::context::Context;
use crate::history::Op;
use crate::verdict::{Check, Violation};

/// Checks all stale reads.
pub(super) fn check(registers: &Registers<'_>, context: &Context) -> Check {
    let mut violations = Vec::new();
    let (mut reads, mut undecided) = (0u64, 0u64);
    let mut sessions: HashMap<String, Op<'_>> = HashMap::new();
    for (key, ops) in &registers.keys {
        let chain = Chain::of(ops);
        for read in &ops.stale {
            reads += 1;
            match chain.explains(read) {
                Some(true) => {}
                Some(false) => violations.push(Violation::of(
                    format!(
                        "register {key}: {} is not what was there at revision {}: {}",
                        tell(&read.op),
                        read.rev.unwrap_or(0),
                        chain.at(read.rev).map_or("nothing".into(), |op| tell(&op.op))
                    ),
                    &[&read.op],
                )),
                None => undecided += 1,
            }
        }
    }
    let mut all: Vec<&Access<'_>> = registers.keys.values().flat_map(|key| &key.stale).collect();
    all.sort_by_key(|read| read.item.start);
    for read in &all {
        violations.extend(falls(&mut sessions, read));
    }
    let slack = context.bound("stale_slack_ms");
    if let Some(slack) = slack {
        violations.extend(too_old(registers, &all, slack));
    }
    let ages = all.iter().filter_map(|read| age_ms(&read.op));
    let mut check = Check::of("registry.stale-reads", violations)
        .fact("reads", reads)
        .fact("undecided", undecided)
        .fact("oldest_ms", ages.fold(0.0, f64::max));
    if let Some(slack) = slack {
        check = check.fact("stale_slack_ms", slack);
    }
    check
}

/// The changes of a key by revision.
struct Chain<'k, 'a> {
    changes: Vec<(u64, &'k Access<'a>)>,
    /// Values whose change has no known revision: what they explain cannot be refuted.
    open: Vec<u32>,
}

impl<'k, 'a> Chain<'k, 'a> {
    fn of(key: &'k Key<'a>) -> Self {
        let mut chain = Chain {
            changes: Vec::new(),
            open: Vec::new(),
        };
        for op in key
            .ops
            .iter()
            .filter(|op| op.item.call.effect() == Effect::Change)
        {
            match op.rev.filter(|_| !op.item.optional) {
                Some(rev) => chain.changes.push((rev, op)),
                None => chain.open.push(op.item.call.value()),
            }
        }
        chain.changes.sort_by_key(|(rev, _)| *rev);
        chain
    }

    /// The last change at or before a revision.
    fn at(&self, rev: Option<u64>) -> Option<&'k Access<'a>> {
        let rev = rev?;
        let after = self.changes.partition_point(|(at, _)| *at <= rev);
        after.checked_sub(1).map(|at| self.changes[at].1)
    }

    /// Whether a read answers what was there; `None` when that cannot be said.
    fn explains(&self, read: &Access<'_>) -> Option<bool> {
        read.rev?;
        let Call::Read { value, version } = read.item.call else {
            return None;
        };
        if self.open.contains(&value) {
            return None;
        }
        let last = self.at(read.rev).map(|change| change.item.call);
        let fits = last.map_or(ABSENT, |call| call.value()) == value;
        if !fits {
            // A change of unknown revision may have written over the one that is known.
            return (self.open.is_empty() || self.is_ahead(read, value)).then_some(false);
        }
        let made = last.and_then(|call| call.version());
        Some(match (made, version) {
            (Some(made), Some(told)) if value != ABSENT => made == told,
            _ => true,
        })
    }

    /// Whether the value was written only after the revision that the read tells.
    fn is_ahead(&self, read: &Access<'_>, value: u32) -> bool {
        let written = self.changes.iter().find(|(_, op)| op.item.call.value() == value);
        written.is_some_and(|(rev, _)| Some(*rev) > read.rev)
    }
}

fn falls<'a>(sessions: &mut HashMap<String, Op<'a>>, read: &Access<'a>) -> Option<Violation> {
    let session = read.op.field("session")?.to_string();
    let before = sessions.insert(session.clone(), read.op);
    let before = before.filter(|before| before.rev() > read.op.rev())?;
    let what = format!(
        "session {session} saw revision {} in {} and then only {} in {}",
        before.rev().unwrap_or(0),
        tell(&before),
        read.op.rev().unwrap_or(0),
        tell(&read.op)
    );
    Some(Violation::of(what, &[&before, &read.op]))
}

fn age_ms(op: &Op<'_>) -> Option<f64> {
    op.field("age_ms").and_then(Value::as_f64)
}

/// Reads that miss what was answered longer before their call than they say that they are old.
fn too_old(registers: &Registers<'_>, reads: &[&Access<'_>], slack_ms: f64) -> Vec<Violation> {
    let mut answered: Vec<(u64, u64, Op<'_>)> = Vec::new();
    for told in &registers.told {
        let returned = told.op.returned().unwrap_or(u64::MAX);
        answered.push((returned, told.rev, told.op));
    }
    answered.sort_by_key(|(returned, ..)| *returned);
    let mut highest: Option<(u64, Op<'_>)> = None;
    let highest: Vec<Option<(u64, Op<'_>)>> = answered
        .iter()
        .map(|(_, rev, op)| {
            if highest.is_none_or(|(most, _)| *rev > most) {
                highest = Some((*rev, *op));
            }
            highest
        })
        .collect();
    let miss = |read: &&&Access<'_>| {
        let (rev, age) = (read.rev?, age_ms(&read.op)?);
        let old = ((age + slack_ms) * 1e6) as u64;
        let horizon = read.op.invoke.time.checked_sub(old)?;
        let before = answered.partition_point(|(returned, ..)| *returned <= horizon);
        let (most, op) = before.checked_sub(1).and_then(|at| highest[at])?;
        (most > rev).then(|| {
            let what = format!(
                "{} says that it is {age} ms old and reflects revision {rev}, but {} had returned revision {most} more \
                 than {slack_ms} ms before that",
                tell(&read.op),
                tell(&op)
            );
            Violation::of(what, &[&op, &read.op])
        })
    };
    reads.iter().filter_map(|read| miss(&read)).collect()
}
