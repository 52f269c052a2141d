//! The journal against what clients asked and were told.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use serde_json::Value;

use super::book::{Book, node, show};
use super::{Cursor, JOURNALED};
use crate::context::{Context, RegisterRows};
use crate::history::{Kind, Op};
use crate::verdict::{Check, Violation};

/// Each acknowledged change once, each failed one never, nothing that nobody asked for.
pub(super) fn mutations(ops: &[Op<'_>], context: &Context, book: &Book<'_>) -> Check {
    let name = "journal.mutations";
    if book.rows.is_empty() {
        return Check::unknown(name, "no row of the journal was ever read");
    }
    let mut entries: HashMap<&str, BTreeSet<u64>> = HashMap::new();
    for (cursor, seen) in &book.rows {
        entries.entry(&seen.row.request).or_default().insert(cursor.0);
    }
    let journaled = |f: &str| {
        let own = context.facts.journaled.iter().any(|name| name == f);
        own || JOURNALED.contains(&f)
    };
    let mut violations = Vec::new();
    let (mut checked, mut found_unknown) = (0u64, 0u64);
    let none = BTreeSet::new();
    for op in ops.iter().filter(|op| journaled(&op.invoke.f)) {
        let Some(request) = &op.invoke.request else {
            continue;
        };
        checked += 1;
        let found = entries.get(request.as_str()).unwrap_or(&none);
        found_unknown += u64::from(op.kind() == Kind::Info && !found.is_empty());
        if let Some(what) = misfit(op, found, book) {
            let what = format!("`{}` with request {request} {what}", op.invoke.f);
            violations.push(Violation::of(what, &[op]));
        }
    }
    violations.extend(unasked(ops, context, book));
    Check::of(name, violations)
        .fact("changes", checked)
        .fact("unknown_that_took_effect", found_unknown)
}

/// What is wrong with the entries of a change.
fn misfit(op: &Op<'_>, found: &BTreeSet<u64>, book: &Book<'_>) -> Option<String> {
    let flag = |name: &str| op.field(name).and_then(Value::as_bool).unwrap_or(false);
    let places = || {
        let places: Vec<String> = found.iter().map(u64::to_string).collect();
        places.join(", ")
    };
    if found.len() > 1 {
        return Some(format!(
            "took effect {} times, in the entries {}",
            found.len(),
            places()
        ));
    }
    match (op.kind(), found.first()) {
        (Kind::Fail, Some(_)) => Some(format!("failed, but is in the journal at {}", places())),
        (Kind::Ok, Some(_)) if flag("quiet") => Some(format!(
            "changed nothing, as it was told, but is in the journal at {}",
            places()
        )),
        (Kind::Ok, Some(at)) => {
            let told = op.rev()?;
            let fits = *at == told || (*at < told && flag("duplicate"));
            (!fits).then(|| format!("was told entry {told}, but is in the journal at {at}"))
        }
        (Kind::Ok, None) if !flag("quiet") && is_covered(op, book) => {
            Some("was acknowledged, but is not in the journal".to_owned())
        }
        _ => None,
    }
}

/// Whether the journal was read where the entry would be, and after it was acknowledged.
fn is_covered(op: &Op<'_>, book: &Book<'_>) -> bool {
    let first = book.rows.keys().next().map(|cursor| cursor.0);
    let is_behind_first = op.rev().is_some_and(|rev| Some(rev) >= first);
    book.unbroken && (book.whole || is_behind_first) && book.covers(op)
}

/// Entries of recorded actors that nobody asked for.
fn unasked(ops: &[Op<'_>], context: &Context, book: &Book<'_>) -> Vec<Violation> {
    let actors: BTreeSet<&str> = context.facts.actors.iter().map(String::as_str).collect();
    let asked: HashSet<&str> = ops.iter().filter_map(|op| op.invoke.request.as_deref()).collect();
    let rows = book.rows.values();
    let alien = rows.filter(|seen| {
        actors.contains(seen.row.actor.as_str()) && !asked.contains(seen.row.request.as_str())
    });
    let told = alien.map(|seen| {
        let what = format!(
            "row {} says that {} did {} under request {}, which nobody sent",
            show(seen.row.cursor()),
            seen.row.actor,
            seen.row.action,
            seen.row.request
        );
        Violation::of(what, &[&seen.op])
    });
    told.collect()
}

/// What reads of registers answer, against the rows about them.
pub(super) fn state(ops: &[Op<'_>], registers: &RegisterRows, book: &Book<'_>) -> Check {
    let mut versions: HashMap<&str, BTreeMap<Cursor, u64>> = HashMap::new();
    for (cursor, seen) in book
        .rows
        .iter()
        .filter(|(_, seen)| seen.row.action == registers.action)
    {
        let version = seen
            .row
            .detail
            .get(&registers.version)
            .and_then(|text| text.parse().ok());
        if let Some(version) = version {
            versions
                .entry(&seen.row.subject)
                .or_default()
                .insert(*cursor, version);
        }
    }
    let mut violations = Vec::new();
    let mut compared = 0u64;
    let last = book.rows.keys().next_back().map(|cursor| cursor.0);
    for op in ops
        .iter()
        .filter(|op| op.is_ok() && matches!(op.invoke.f.as_str(), "read" | "list"))
    {
        let Some(rev) = op.rev().filter(|rev| book.whole && Some(*rev) <= last) else {
            continue;
        };
        let entries = match op.value().get("entries").and_then(Value::as_array) {
            Some(entries) => entries.iter().collect(),
            None => vec![op.value()],
        };
        for entry in entries {
            let (Some(key), Some(version)) = (
                entry.get("key").and_then(Value::as_str),
                entry.get("version").and_then(Value::as_u64),
            ) else {
                continue;
            };
            let rows = versions.get(key);
            let expected = rows.and_then(|rows| rows.range(..=(rev, u32::MAX)).next_back());
            compared += 1;
            let expected = expected.map_or(0, |(_, version)| *version);
            if version != expected {
                let what = format!(
                    "{} answered version {version} of {key} at revision {rev}, where the journal says {expected}",
                    node(op)
                );
                violations.push(Violation::of(what, &[op]));
            }
        }
    }
    Check::of("journal.state", violations).fact("answers", compared)
}

/// At the end every replica has everything that was acknowledged.
pub(super) fn converged(ops: &[Op<'_>], context: &Context, book: &Book<'_>) -> Check {
    let name = "journal.converged";
    let acknowledged = ops.iter().filter(|op| op.is_ok() && op.invoke.request.is_some());
    // Only what has rows: the log goes on without them.
    let highest = acknowledged
        .filter_map(|op| op.rev().map(|rev| (rev, op)))
        .filter(|(rev, _)| book.rows.range((*rev, 0)..=(*rev, u32::MAX)).next().is_some())
        .max_by_key(|(rev, _)| *rev);
    let mut violations = Vec::new();
    for (replica, (last, read)) in &book.ends {
        if let Some((rev, op)) = highest.filter(|(rev, op)| *rev > last.0 && op.stop() < Some(read.start())) {
            let what = format!(
                "{replica} ends at {} although entry {rev} was acknowledged (event {}) before it was read",
                show(*last),
                op.start()
            );
            violations.push(Violation::of(what, &[op, read]));
        }
    }
    let missing: Vec<&str> = context.facts.replicas.iter().map(String::as_str).collect();
    let missing: Vec<&str> = missing
        .into_iter()
        .filter(|name| !book.ends.contains_key(*name))
        .collect();
    let check = if violations.is_empty() && (book.ends.is_empty() || !missing.is_empty()) {
        let who = if missing.is_empty() {
            "any replica".to_owned()
        } else {
            missing.join(", ")
        };
        Check::unknown(
            name,
            format!("the journal of {who} was not read to its end after the run"),
        )
    } else {
        Check::of(name, violations)
    };
    check.fact("replicas", book.ends.len())
}
