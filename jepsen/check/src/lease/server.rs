//! What the server's own rows say of leases, against what their holders know.
//!
//! What never lives here: trust. A row is the server's claim; where a worker saw otherwise, that is the violation.

use std::collections::{BTreeMap, BTreeSet};

use super::{ENDS, Lease};
use crate::evidence::{MS, Row, Rows, Setting, field, seconds, violation};
use crate::history::{Kind, Op};
use crate::verdict::{Check, Violation};

/// Bound of `lease.grantable-again`, beyond the time that faults and recovery take.
const GRACE_MS: u64 = 2_000;

/// Grants whose fences do not rise, or are not what workers were told.
pub(super) fn fences(rows: &Rows, leases: &BTreeMap<String, Lease<'_>>) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut highest = 0;
    for row in rows.of_action("lease.granted") {
        let fence = row.number("fence").unwrap_or(0);
        if fence <= highest {
            let what = format!(
                "lease {} was granted with fence {fence} after {highest}",
                row.subject
            );
            found.push(rows.violation(what));
        }
        highest = highest.max(fence);
        if let Some(lease) = leases.get(&row.subject) {
            let told = lease.fence;
            if told != fence || (!lease.run.is_empty() && lease.run != row.detail("run")) {
                let what = format!(
                    "lease {}: its worker was told fence {told} for run {}, the journal has {fence} and {}",
                    row.subject,
                    lease.run,
                    row.detail("run")
                );
                found.push(rows.violation(what));
            }
        }
    }
    let granted: BTreeSet<&str> = rows
        .of_action("lease.granted")
        .map(|row| row.subject.as_str())
        .collect();
    for (id, lease) in leases.iter().filter(|(id, _)| !granted.contains(id.as_str())) {
        if rows.whole && lease.accept.is_some() {
            let shown: Vec<&Op<'_>> = lease.accept.iter().collect();
            let what = format!("lease {id}, fence {}, was offered and never granted", lease.fence);
            found.push(violation(what, &shown));
        }
    }
    found
}

/// Rows tell whole milliseconds, and so does the beginning of the run: a row may be from so much later than it says.
const COARSE: u64 = 2 * MS;

/// By when the log had come so far, from answers that name an index: what they told was written by then.
struct Seen(Vec<(u64, u64)>);

impl Seen {
    fn of(told: impl IntoIterator<Item = (u64, u64)>) -> Seen {
        let mut told: Vec<(u64, u64)> = told.into_iter().collect();
        told.sort_unstable();
        let mut earliest = u64::MAX;
        for (_, time) in told.iter_mut().rev() {
            earliest = earliest.min(*time);
            *time = earliest;
        }
        Seen(told)
    }

    /// The earliest moment at which somebody had an answer that stands at this index or behind it.
    fn by(&self, index: u64) -> Option<u64> {
        let at = self.0.partition_point(|(rev, _)| *rev < index);
        self.0.get(at).map(|(_, time)| *time)
    }
}

/// Rows that end a lease without a word of its holder before the end that the holder was promised. Rows tell the log's
/// time, which may be late: by as long as a message was held back by which a leader of later knew it. So where answers
/// name indexes, one of them must show that the row was there before that end.
pub(super) fn ended_early(
    rows: &Rows,
    ops: &[Op<'_>],
    leases: &BTreeMap<String, Lease<'_>>,
    setting: &Setting,
) -> Vec<Violation> {
    let told = |op: &Op<'_>| Some((op.rev()?, op.end?.time));
    let seen = Seen::of(ops.iter().filter(|op| op.kind() == Kind::Ok).filter_map(told));
    let mut found = Vec::new();
    for row in &rows.rows {
        let expired = row.action == "lease.ending" && row.detail("reason") == "expired";
        let freed = row.action == "lease.ended" && row.detail("clean") == "false";
        if !expired && !freed {
            continue;
        }
        let promised = leases
            .get(&row.subject)
            .and_then(|lease| Some((lease.promised()?, lease.given_back)));
        let Some((((renewal, until), back), at)) = promised.zip(setting.moment(row.at_ms)) else {
            continue;
        };
        let before = |moment: u64| moment < until && back.is_none_or(|back| back > moment);
        let shown = seen.0.is_empty() || seen.by(row.index).is_some_and(before);
        if before(at + COARSE) && shown {
            let what = format!(
                "lease {}, fence {}: {} {} before the end that a confirmed renewal promised",
                row.subject,
                row.detail("fence"),
                if expired { "expired" } else { "its slot was freed" },
                seconds(until - at)
            );
            found.push(violation(what, &[&renewal]));
        }
    }
    found
}

/// Leases that nobody gave back: from their deadline to the free slot.
pub(super) fn grantable_again(rows: &Rows, setting: &Setting) -> Check {
    let name = "lease.grantable-again";
    let mut deadlines: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut found, mut worst, mut freed, mut skipped) = (Vec::new(), 0, 0u64, 0u64);
    for row in &rows.rows {
        if let Some(at) = row.number("deadline_at") {
            deadlines.insert(&row.subject, at);
        }
        if row.action != "lease.ended" || row.detail("clean") != "false" {
            continue;
        }
        let Some(deadline) = deadlines.get(row.subject.as_str()) else {
            continue;
        };
        freed += 1;
        worst = worst.max(row.at_ms.saturating_sub(*deadline));
        let Some((due, at)) = setting.moment(*deadline).zip(setting.moment(row.at_ms)) else {
            skipped += 1;
            continue;
        };
        let latest = setting.due(due, GRACE_MS * MS);
        if at > latest {
            let what = format!(
                "lease {}, fence {}: its slot was freed {} after its deadline, {} too late",
                row.subject,
                row.detail("fence"),
                seconds(at - due),
                seconds(at - latest)
            );
            found.push(rows.violation(what));
        }
    }
    Check::of(name, found)
        .fact("freed_at_deadline", freed)
        .fact("worst_ms", worst)
        .fact("not_compared", skipped)
}

/// Runs that end twice, or otherwise than the one result said that was taken.
pub(super) fn one_result(rows: &Rows, ops: &[Op<'_>], leases: &BTreeMap<String, Lease<'_>>) -> Check {
    let mut ends: BTreeMap<&str, &Row> = BTreeMap::new();
    let mut found = Vec::new();
    for row in rows.of_action("run.finished") {
        if let Some(before) = ends.insert(&row.subject, row) {
            let what = format!(
                "run {} ended as {} under fence {} and as {} under fence {}",
                row.subject,
                before.detail("state"),
                before.detail("fence"),
                row.detail("state"),
                row.detail("fence")
            );
            found.push(rows.violation(what));
        }
    }
    let mut results = 0u64;
    for op in ops
        .iter()
        .filter(|op| op.invoke.f == "finish" && op.kind() == Kind::Ok)
    {
        let outcome = field(op, "outcome").as_str().unwrap_or("");
        let lease = field(op, "lease").as_str().and_then(|id| leases.get(id));
        let Some(lease) = lease.filter(|lease| !lease.run.is_empty() && ENDS.contains(&outcome)) else {
            continue;
        };
        results += 1;
        // Refused by its worker, or stopped by it, a run may go to another one.
        if matches!(outcome, "refused" | "cancelled") {
            continue;
        }
        let end = ends.get(lease.run.as_str());
        let same =
            end.is_some_and(|row| row.number("fence") == Some(lease.fence) && row.detail("state") == outcome);
        if !same {
            let is = end.map_or_else(
                || "has not ended".to_owned(),
                |row| format!("is {} under fence {}", row.detail("state"), row.detail("fence")),
            );
            let what = format!(
                "run {}: {outcome} under fence {} was taken, and the run {is}",
                lease.run, lease.fence
            );
            found.push(violation(what, &[op]));
        }
    }
    Check::of("lease.one-result", found)
        .fact("runs_ended", ends.len())
        .fact("results", results)
}

fn subjects<'r>(rows: &'r Rows, action: &'static str) -> BTreeSet<&'r str> {
    let found = rows.of_action(action);
    found.map(|row| row.subject.as_str()).collect()
}

/// So many runs that have ended are kept; of what is older only the journal tells.
const KEPT: usize = 10_000;

/// Runs that vanished, hang, or come from nowhere.
pub(super) fn runs_end(rows: &Rows, ops: &[Op<'_>]) -> Check {
    let name = "lease.runs-end";
    let submitted = subjects(rows, "run.submitted");
    let run_of = |op: &Op<'_>| field(op, "run").as_str().unwrap_or("").to_owned();
    let (mut asked, mut refused, mut last) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for op in ops {
        match (op.invoke.f.as_str(), op.kind()) {
            ("start", Kind::Fail) => drop(refused.insert(run_of(op), op)),
            ("start", _) => drop(asked.insert(run_of(op), op)),
            ("run", Kind::Ok | Kind::Fail) => drop(last.insert(run_of(op), op)),
            _ => {}
        }
    }
    if asked.is_empty() {
        return Check::unknown(name, "no run was started");
    }
    let mut found = Vec::new();
    for (run, op) in refused.iter().filter(|(run, _)| !asked.contains_key(*run)) {
        if submitted.contains(run.as_str()) {
            found.push(violation(
                format!("run {run} is there although its start was refused"),
                &[*op],
            ));
        }
    }
    for run in submitted
        .iter()
        .filter(|run| !asked.contains_key(**run) && !refused.contains_key(**run))
    {
        found.push(rows.violation(format!("run {run} is there and nobody asked for it")));
    }
    let finished = subjects(rows, "run.finished");
    let forgotten = |run: &str| finished.len() > KEPT && finished.contains(run);
    let mut unread = 0u64;
    for (run, op) in asked.iter().filter(|(_, op)| op.kind() == Kind::Ok) {
        if !submitted.contains(run.as_str()) {
            found.push(violation(
                format!("run {run} was started, and the journal has no start of it"),
                &[*op],
            ));
        }
        match last.get(run) {
            None => unread += 1,
            Some(read) if read.kind() == Kind::Fail && forgotten(run) => {}
            Some(read) if read.kind() == Kind::Fail => {
                found.push(violation(
                    format!("run {run} was started and is gone"),
                    &[*op, *read],
                ));
            }
            Some(read) => {
                let state = field(read, "state").as_str().unwrap_or("");
                if !ENDS.contains(&state) {
                    let what = format!("run {run} is {state:?} and has not come to an end");
                    found.push(violation(what, &[*op, *read]));
                }
            }
        }
    }
    if unread > 0 && found.is_empty() {
        return Check::unknown(
            name,
            format!("{unread} of {} runs were not read at the end", asked.len()),
        );
    }
    Check::of(name, found).fact("runs", asked.len())
}

#[cfg(test)]
mod tests {
    use super::Seen;

    #[test]
    fn an_answer_behind_a_row_tells_by_when_it_was_there() {
        let seen = Seen::of([(7, 500), (3, 100), (9, 300), (12, 900)]);
        assert_eq!(seen.by(1), Some(100));
        assert_eq!(seen.by(4), Some(300), "the answer at 9 came before the one at 7");
        assert_eq!(seen.by(10), Some(900));
        assert_eq!(seen.by(13), None);
    }
}
