//! The workload `membership`: who the members are, as every replica tells it, while replicas join, are replaced and
//! removed.
//!
//! The registers that clients write meanwhile are judged by [`crate::registry`], the journal by [`crate::journal`].
//!
//! | `f` | call | answer (`ok`) |
//! |---|---|---|
//! | `members` | `{}` | `{"members": [[ID, STATUS], ...]}`: what the asked replica has at the index `rev` |
//!
//! STATUS is `allocated`, `joining`, `learner` or `voter`; removed ones are left out. The nemesis's event `removed`
//! with `{"replica": "r4"}` says that the removal of that one was acknowledged. Rows of the journal (operation
//! `rows`) with the actions of [`ACTIONS`] tell of each change.
//!
//! Conditions:
//! - `membership.one-config`: at one index all replicas have the same members, at all times.
//! - `membership.chain`: the members at an index are what the journal's rows up to it make of the first member, and
//!   each row makes or ends at most one voter, so that majorities before and after it share a replica.
//! - `membership.ids-once`: who was removed is no member at any later index.
//! - `membership.removed-silent`: a removed replica acknowledges no change and answers no read that is not stale,
//!   from the acknowledgement of its removal on.
//! - `membership.settles`: at the end every replica names exactly the replicas of [`Facts::replicas`], all of them
//!   voters.
//!
//! [`Facts::replicas`]: crate::context::Facts::replicas

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

use crate::context::Context;
use crate::history::{History, Op};
use crate::journal::{Book, node};
use crate::verdict::{Check, Violation};

#[cfg(test)]
mod tests;

/// What the operations of this workload are called.
pub const FUNCTIONS: &[&str] = &["members"];

/// Actions of rows that tell of members.
pub const ACTIONS: &[&str] = &[
    "cluster.genesis",
    "cluster.replica_allocated",
    "cluster.replica_admitted",
    "cluster.replica_status",
    "cluster.replica_removed",
];

/// Members and what they are.
type Members = BTreeMap<u64, String>;

/// An answer of `members`.
struct Told<'a> {
    rev: u64,
    members: Members,
    op: Op<'a>,
}

/// Judges a history.
#[must_use]
pub fn check(history: &History, context: &Context) -> Vec<Check> {
    let (told, book) = match (told(history), Book::read(history)) {
        (Ok(told), Ok(book)) => (told, book),
        (Err(why), _) | (_, Err(why)) => return vec![Check::unknown("membership.history", why)],
    };
    vec![
        one_config(&told),
        chain(&told, &book),
        ids_once(&told, &book),
        removed_silent(history),
        settles(history, context, &told),
    ]
}

fn told(history: &History) -> Result<Vec<Told<'_>>, String> {
    let asked = history.ops().into_iter();
    let mut told = Vec::new();
    for op in asked.filter(|op| op.is_ok() && op.invoke.f == "members") {
        let wrong = |why: String| format!("event {}: `members`: {why}", op.start());
        let members = op.field("members").ok_or_else(|| wrong("no `members`".into()))?;
        let members: Vec<(u64, String)> =
            Deserialize::deserialize(members).map_err(|error| wrong(error.to_string()))?;
        told.push(Told {
            rev: op.rev().ok_or_else(|| wrong("no `rev`".into()))?,
            members: members.into_iter().collect(),
            op,
        });
    }
    Ok(told)
}

/// For people: `r1 voter, r2 learner`.
fn show(members: &Members) -> String {
    let each: Vec<String> = members
        .iter()
        .map(|(id, status)| format!("r{id} {status}"))
        .collect();
    each.join(", ")
}

fn one_config(told: &[Told<'_>]) -> Check {
    let mut first: BTreeMap<u64, &Told<'_>> = BTreeMap::new();
    let mut violations = Vec::new();
    for now in told {
        let known = *first.entry(now.rev).or_insert(now);
        if known.members != now.members {
            let what = format!(
                "at index {} {} has the members {}, and {} has {}",
                now.rev,
                node(&known.op),
                show(&known.members),
                node(&now.op),
                show(&now.members)
            );
            violations.push(Violation::of(what, &[&known.op, &now.op]));
        }
    }
    or_nothing("membership.one-config", told, violations).fact("indexes", first.len())
}

fn or_nothing(name: &str, told: &[Told<'_>], violations: Vec<Violation>) -> Check {
    if told.is_empty() {
        return Check::unknown(name, "no replica ever told its members");
    }
    Check::of(name, violations).fact("answers", told.len())
}

/// What a row makes of the members.
fn follow(members: &mut Members, action: &str, subject: &str, to: Option<&str>) -> Result<(), String> {
    // Genesis is about the cluster; its first replica has the first id.
    let id = match action {
        "cluster.genesis" => 1,
        _ => {
            let digits = subject.rsplit('/').next().unwrap_or(subject);
            digits
                .parse()
                .map_err(|_| format!("{action} about {subject:?}, which is no replica"))?
        }
    };
    let status = match action {
        "cluster.genesis" => "voter",
        "cluster.replica_allocated" => "allocated",
        "cluster.replica_admitted" => "joining",
        "cluster.replica_removed" => {
            members.remove(&id);
            return Ok(());
        }
        _ => to.ok_or_else(|| format!("{action} of {id} does not say what it is now"))?,
    };
    members.insert(id, status.to_owned());
    Ok(())
}

fn voters(members: &Members) -> BTreeSet<u64> {
    let voters = members.iter().filter(|(_, status)| *status == "voter");
    voters.map(|(id, _)| *id).collect()
}

fn chain(told: &[Told<'_>], book: &Book<'_>) -> Check {
    let name = "membership.chain";
    if told.is_empty() {
        return Check::unknown(name, "no replica ever told its members");
    }
    if !book.whole {
        return Check::unknown(
            name,
            "the journal was not read from its first row to its end without holes",
        );
    }
    let mut members = Members::new();
    // The members from each index on, and what each change was.
    let mut known: BTreeMap<u64, Members> = BTreeMap::from([(0, Members::new())]);
    let mut violations = Vec::new();
    for (cursor, seen) in &book.rows {
        let row = &seen.row;
        if !ACTIONS.contains(&row.action.as_str()) {
            continue;
        }
        let before = voters(&members);
        let to = row.detail.get("to").map(String::as_str);
        if let Err(why) = follow(&mut members, &row.action, &row.subject, to) {
            return Check::unknown(name, format!("row {}.{}: {why}", cursor.0, cursor.1));
        }
        let after = voters(&members);
        if before.symmetric_difference(&after).count() > 1 {
            let what = format!(
                "row {}.{} makes voters {after:?} of {before:?} at once: their majorities need not meet",
                cursor.0, cursor.1
            );
            violations.push(Violation::of(what, &[&seen.op]));
        }
        known.insert(cursor.0, members.clone());
    }
    let last = book.rows.keys().next_back().map_or(0, |cursor| cursor.0);
    for now in told.iter().filter(|now| now.rev <= last) {
        let expected = known.range(..=now.rev).next_back().map(|(_, members)| members);
        if expected != Some(&now.members) {
            let what = format!(
                "{} has at index {} the members {}, where the journal's rows make {}",
                node(&now.op),
                now.rev,
                show(&now.members),
                expected.map_or(String::new(), show)
            );
            violations.push(Violation::of(what, &[&now.op]));
        }
    }
    Check::of(name, violations).fact("changes", known.len() - 1)
}

fn ids_once(told: &[Told<'_>], book: &Book<'_>) -> Check {
    let mut removed: BTreeMap<u64, u64> = BTreeMap::new();
    for (cursor, seen) in &book.rows {
        if seen.row.action == "cluster.replica_removed"
            && let Some(Ok(id)) = seen.row.subject.rsplit('/').next().map(str::parse)
        {
            removed.entry(id).or_insert(cursor.0);
        }
    }
    let mut violations = Vec::new();
    for now in told {
        for (id, at) in &removed {
            if now.rev >= *at
                && let Some(status) = now.members.get(id)
            {
                let what = format!(
                    "{} has r{id} as {status} at index {}, which was removed at {at}",
                    node(&now.op),
                    now.rev
                );
                violations.push(Violation::of(what, &[&now.op]));
            }
        }
    }
    or_nothing("membership.ids-once", told, violations).fact("removed", removed.len())
}

fn removed_silent(history: &History) -> Check {
    let mut removed: BTreeMap<&str, u64> = BTreeMap::new();
    for event in history.faults().filter(|event| event.f == "removed") {
        if let Some(replica) = event.value.get("replica").and_then(Value::as_str) {
            removed.entry(replica).or_insert(event.index);
        }
    }
    let mut violations = Vec::new();
    let mut asked = 0u64;
    for op in history.ops() {
        let Some(at) = removed.get(node(&op)).filter(|at| op.start() > **at) else {
            continue;
        };
        asked += 1;
        let is_stale = op.field("stale").and_then(Value::as_bool).unwrap_or(false);
        let is_read = matches!(op.invoke.f.as_str(), "read" | "list") && !is_stale;
        if op.is_ok() && (op.invoke.request.is_some() || is_read) {
            let what = format!(
                "{} acknowledged `{}` although its removal had been acknowledged before (event {at})",
                node(&op),
                op.invoke.f
            );
            violations.push(Violation::of(what, &[&op]));
        }
    }
    Check::of("membership.removed-silent", violations)
        .fact("removed", removed.len())
        .fact("asked_after_removal", asked)
}

fn settles(history: &History, context: &Context, told: &[Told<'_>]) -> Check {
    let name = "membership.settles";
    let Some(healed) = history.faults().filter(|event| event.f == "healed").last() else {
        return Check::unknown(
            name,
            "the history has no event `healed`, which says when everything was whole",
        );
    };
    let wanted: BTreeSet<String> = context.facts.replicas.iter().cloned().collect();
    if wanted.is_empty() {
        return Check::unknown(name, "the run does not say which replicas it ended with");
    }
    let mut last: BTreeMap<&str, &Told<'_>> = BTreeMap::new();
    for now in told.iter().filter(|now| now.op.start() > healed.index) {
        last.insert(node(&now.op), now);
    }
    let mut violations = Vec::new();
    for now in last.values() {
        let voters: BTreeSet<String> = voters(&now.members).iter().map(|id| format!("r{id}")).collect();
        if voters != wanted || now.members.len() != wanted.len() {
            let what = format!(
                "after everything was whole {} has the members {}, where the voters are to be {}",
                node(&now.op),
                show(&now.members),
                Vec::from_iter(wanted.clone()).join(", ")
            );
            violations.push(Violation::of(what, &[&now.op]));
        }
    }
    let unread: Vec<String> = wanted
        .iter()
        .filter(|name| !last.contains_key(name.as_str()))
        .cloned()
        .collect();
    if violations.is_empty() && !unread.is_empty() {
        let why = format!("{} did not tell its members at the end", unread.join(", "));
        return Check::unknown(name, why);
    }
    Check::of(name, violations).fact("voters", wanted.len())
}
