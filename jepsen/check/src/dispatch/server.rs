//! What the server's own rows say of dispatches: its account must be possible in itself, and agree with what was asked.

use std::collections::{BTreeMap, BTreeSet};

use super::{ENDS, Found};
use crate::evidence::{Rows, violation};
use crate::history::{Kind, Op};
use crate::verdict::Violation;

/// Jobs that end twice, or in a state that is no end.
pub(super) fn ends(rows: &Rows) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut ended: BTreeMap<&str, &str> = BTreeMap::new();
    for row in rows.of_action("dispatch.finished") {
        let state = row.detail("state");
        if let Some(before) = ended.insert(&row.subject, state) {
            found.push(rows.violation(format!("job {} ended as {before} and as {state}", row.subject)));
        }
        if !ENDS.contains(&state) {
            found.push(rows.violation(format!("job {} ended as {state:?}, which is no end", row.subject)));
        }
    }
    found
}

/// Attempts that are assigned while another is open, after the end, or out of order.
pub(super) fn attempts(rows: &Rows) -> Vec<Violation> {
    #[derive(Default)]
    struct State {
        open: Option<u64>,
        last: u64,
        over: bool,
    }
    let mut found = Vec::new();
    let mut jobs: BTreeMap<&str, State> = BTreeMap::new();
    for row in &rows.rows {
        let job = jobs.entry(&row.subject).or_default();
        match row.action.as_str() {
            "dispatch.assigned" => {
                let attempt = row.number("attempt").unwrap_or(0);
                let wrong = if job.over {
                    Some("after its end".to_owned())
                } else if let Some(open) = job.open {
                    Some(format!("while attempt {open} had not ended"))
                } else if attempt <= job.last {
                    Some(format!("after attempt {}", job.last))
                } else {
                    None
                };
                if let Some(wrong) = wrong {
                    found.push(rows.violation(format!(
                        "attempt {attempt} of job {} was assigned {wrong}",
                        row.subject
                    )));
                }
                job.open = Some(attempt);
                job.last = job.last.max(attempt);
            }
            "dispatch.attempt_ended" => job.open = None,
            "dispatch.finished" => {
                job.open = None;
                job.over = true;
            }
            _ => {}
        }
    }
    found
}

/// How often each job was assigned.
pub(super) fn assigned(rows: &Rows) -> BTreeMap<&str, usize> {
    let mut counts = BTreeMap::new();
    for row in rows.of_action("dispatch.assigned") {
        *counts.entry(row.subject.as_str()).or_default() += 1;
    }
    counts
}

/// Jobs against the keys that were sent: what is wrong, and all jobs.
pub(super) fn keys<'r>(rows: &'r Rows, keys: &BTreeMap<&str, Vec<Op<'_>>>) -> Found<'r> {
    let mut found = Vec::new();
    let mut jobs = BTreeSet::new();
    let mut made: BTreeMap<&str, &str> = BTreeMap::new();
    for row in rows.of_action("dispatch.submitted") {
        jobs.insert(row.subject.as_str());
        if row.request.is_empty() {
            continue;
        }
        if let Some(before) = made.insert(&row.request, &row.subject) {
            let what = format!("key {} made jobs {before} and {}", row.request, row.subject);
            found.push(rows.violation(what));
        }
        match keys.get(row.request.as_str()) {
            None => {
                let what = format!(
                    "job {} has the key {}, which nobody sent",
                    row.subject, row.request
                );
                found.push(rows.violation(what));
            }
            // Of one that failed at one replica and is unknown at another the unknown one may have done it.
            Some(ops) if ops.iter().all(|op| op.kind() == Kind::Fail) => {
                let shown: Vec<&Op<'_>> = ops.iter().collect();
                let what = format!("job {} is there although its submission was refused", row.subject);
                found.push(violation(what, &shown));
            }
            Some(_) => {}
        }
    }
    (found, jobs)
}

/// Jobs that were being cancelled and got another attempt.
pub(super) fn cancelled(rows: &Rows) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut asked: BTreeSet<&str> = BTreeSet::new();
    for row in &rows.rows {
        match row.action.as_str() {
            "dispatch.cancelling" => drop(asked.insert(&row.subject)),
            "dispatch.assigned" if asked.contains(row.subject.as_str()) => {
                let what = format!(
                    "job {} got attempt {} while it was being cancelled",
                    row.subject,
                    row.detail("attempt")
                );
                found.push(rows.violation(what));
            }
            _ => {}
        }
    }
    found
}
