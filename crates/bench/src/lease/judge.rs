//! What the journal says of leases, and whether it kept its promises.
//!
//! What never lives here: what workers believed (see `resource`). Invariant: every row of every lease is judged, in
//! the order of
//! the log.

use std::collections::BTreeMap;
use std::time::Duration;

use palyra_proto::journal::v1::Row;

use crate::spread::Spread;

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Leases that were granted.
    pub(crate) granted: u64,
    /// Of them ended without a word of the worker: at their deadlines.
    pub(crate) passed: u64,
    /// Why leases began to end.
    pub(crate) reasons: BTreeMap<String, u64>,
    /// Two leases of one slot, or of one run.
    pub(crate) double: Vec<String>,
    /// A fence that was not higher than all before it.
    pub(crate) fences: Vec<String>,
    /// A slot that was given back before its lease's deadline without a report that it is clean.
    pub(crate) early: Vec<String>,
    /// From a deadline that passed to the free slot.
    pub(crate) freed: Spread,
    /// Runs by the state that they ended in.
    pub(crate) runs: BTreeMap<String, u64>,
    /// Runs that ended twice.
    pub(crate) twice: Vec<String>,
    /// How each lease began to end, and the fence that its run finished under.
    ended: BTreeMap<String, String>,
}

/// Judges rows of `lease.` and `run.`. `deadlines` are those that the cluster keeps of ended leases: renewals have
/// no rows.
pub(crate) fn judge(rows: &[Row], deadlines: &BTreeMap<String, u64>) -> Verdict {
    let mut verdict = Verdict::default();
    let mut taken: BTreeMap<String, String> = BTreeMap::new();
    let mut last_fence = 0;
    let mut over: BTreeMap<String, String> = BTreeMap::new();
    for row in rows {
        let detail = |name: &str| row.detail.get(name).cloned().unwrap_or_default();
        let places = [
            format!("slot {} of {}", detail("slot"), detail("device")),
            format!("run {}", detail("run")),
        ];
        match row.action.as_str() {
            "lease.granted" => {
                verdict.granted += 1;
                let fence: u64 = detail("fence").parse().unwrap_or(0);
                if fence <= last_fence {
                    let text = format!("lease {}: fence {fence} after {last_fence}", row.subject);
                    verdict.fences.push(text);
                }
                last_fence = last_fence.max(fence);
                for place in places {
                    if let Some(before) = taken.insert(place.clone(), row.subject.clone()) {
                        let text = format!("{place}: lease {} while {before} had not ended", row.subject);
                        verdict.double.push(text);
                    }
                }
            }
            "lease.ending" => {
                *verdict.reasons.entry(detail("reason")).or_default() += 1;
                verdict.ended.insert(row.subject.clone(), detail("reason"));
            }
            "lease.ended" => {
                for place in places {
                    if taken.get(&place) == Some(&row.subject) {
                        taken.remove(&place);
                    }
                }
                if detail("clean") == "false" {
                    verdict.passed += 1;
                    let deadline = deadlines.get(&row.subject).copied();
                    verdict.free(row, deadline);
                }
            }
            "run.finished" => {
                *verdict.runs.entry(detail("state")).or_default() += 1;
                if let Some(before) = over.insert(row.subject.clone(), detail("fence")) {
                    let text = format!("run {} under {before} and {}", row.subject, detail("fence"));
                    verdict.twice.push(text);
                }
            }
            _ => {}
        }
    }
    verdict
}

impl Verdict {
    fn free(&mut self, row: &Row, deadline: Option<u64>) {
        // Forgotten meanwhile: nothing can be said.
        let Some(deadline) = deadline else { return };
        match row.at_ms.checked_sub(deadline) {
            Some(later) => self.freed.record(Duration::from_millis(later)),
            None => {
                let text = format!(
                    "lease {}: {} ms before its deadline",
                    row.subject,
                    deadline - row.at_ms
                );
                self.early.push(text);
            }
        }
    }

    /// Whether a result under this lease was taken although it had begun to end otherwise.
    pub(crate) fn was_stale(&self, lease_id: &str) -> bool {
        self.ended
            .get(lease_id)
            .is_some_and(|reason| reason != "finished")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(action: &str, lease: &str, at_ms: u64, detail: &[(&str, &str)]) -> Row {
        Row {
            action: action.to_owned(),
            subject: lease.to_owned(),
            at_ms,
            detail: detail
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect(),
            ..Row::default()
        }
    }

    fn granted(lease: &str, device: &str, run: &str, fence: &str) -> Row {
        let detail = [("device", device), ("run", run), ("fence", fence), ("slot", "0")];
        row("lease.granted", lease, 0, &detail)
    }

    fn ended(lease: &str, device: &str, run: &str, at_ms: u64, clean: &str) -> Row {
        let detail = [("device", device), ("run", run), ("slot", "0"), ("clean", clean)];
        row("lease.ended", lease, at_ms, &detail)
    }

    #[test]
    fn leases_one_after_the_other_are_held() {
        let rows = [
            granted("L1", "a", "r", "5"),
            row("lease.ending", "L1", 90, &[("reason", "expired")]),
            ended("L1", "a", "r", 110, "false"),
            granted("L2", "b", "r", "6"),
            row("lease.ending", "L2", 120, &[("reason", "finished")]),
            ended("L2", "b", "r", 120, "true"),
        ];
        let verdict = judge(&rows, &[("L1".to_owned(), 100)].into());
        assert_eq!(
            (verdict.granted, verdict.passed, verdict.freed.count()),
            (2, 1, 1)
        );
        assert!(verdict.double.is_empty() && verdict.fences.is_empty() && verdict.early.is_empty());
        assert!(verdict.was_stale("L1") && !verdict.was_stale("L2"));
    }

    #[test]
    fn what_is_broken_is_found() {
        let rows = [
            granted("L1", "a", "r", "5"),
            granted("L2", "b", "r", "5"),
            ended("L1", "a", "r", 99, "false"),
            row("run.finished", "r", 1, &[("state", "succeeded"), ("fence", "5")]),
            row("run.finished", "r", 2, &[("state", "failed"), ("fence", "5")]),
        ];
        let verdict = judge(&rows, &[("L1".to_owned(), 100)].into());
        assert_eq!(verdict.double, ["run r: lease L2 while L1 had not ended"]);
        assert_eq!(verdict.fences, ["lease L2: fence 5 after 5"]);
        assert_eq!(verdict.early, ["lease L1: 1 ms before its deadline"]);
        assert_eq!(verdict.twice.len(), 1);
    }
}
