//! What runs reached: every fault that struck and every rare path that was taken, counted by name.
//!
//! A simulation that tests nothing passes as well. So each seed says what it reached, the summary adds it up, and a
//! long range of seeds that never reached one of [`NEEDED`] does not count as passed.

use std::collections::BTreeMap;

use crate::load::Workload;

/// Seeds from which on every name of [`NEEDED`] must have been reached at least once.
pub(crate) const MANY_SEEDS: u64 = 100;

/// What a range of seeds must reach: faults, and what only they lead to.
pub(crate) const NEEDED: &[&str] = &[
    // Faults that struck, not only ones that were asked for.
    "kill",
    "power",
    "power-all",
    "crash-at-log.write",
    "crash-at-log.sync",
    "crash-at-log.synced",
    "crash-at-apply.write",
    "crash-at-apply.answer",
    "power-lost-entries",
    "power-lost-state",
    "died-in-change",
    "disk-failed",
    "disk-stalled",
    "disk-ruined",
    "space-came-back",
    "link-cut",
    "link-held-message",
    "leader-isolated",
    "swizzled",
    "message-lost",
    "message-repeated",
    "append-repeated",
    "answer-lost",
    "clock-skewed",
    "clock-drifted",
    "point-struck",
    "handed-over",
    // Paths of Raft and of the replica.
    "leader-changed",
    "snapshot-installed",
    "log-purged",
    "log-truncated",
    "replica-joined",
    "replica-removed",
    // What every client meets.
    "outcome-unknown",
    "answered-on-retry",
    "command-refused",
    "read-failed",
];

/// What the load must reach besides, by workload; a mix has all of it.
fn by_load(workload: Workload) -> &'static [&'static [&'static str]] {
    match workload {
        Workload::Registry | Workload::Failover => &[],
        Workload::Membership => &[&["change-cut-short"]],
        Workload::Pairing => &[PAIRING],
        Workload::Revocation => &[PAIRING, REVOCATION],
        Workload::Lease => &[LEASES],
        Workload::Dispatch => &[DISPATCHES],
        Workload::Journal => &[PAIRING, DISPATCHES, WATCH],
        Workload::Watch => &[WATCH],
        Workload::Mix => &[PAIRING, REVOCATION, LEASES, DISPATCHES, WATCH],
    }
}

const PAIRING: &[&str] = &["code-raced", "approval-raced"];
const REVOCATION: &[&str] = &[
    "revoked-was-refused",
    "revoked-with-dispatches",
    "revoked-was-closed",
    "revocation-complete",
    "revocation-pending",
    "probe-accepted",
    "probe-revoked",
    "probe-stale",
];
const LEASES: &[&str] = &[
    "worker-admitted",
    "worker-paused",
    "lease-offered",
    "worker-died",
    "worker-cleaned-unknown",
    "lease-renewed",
    "lease-over-by-own-clock",
    "lease-ending-finished",
    "lease-ending-expired",
    "run-requeued",
];
const DISPATCHES: &[&str] = &[
    "line-held",
    "dispatch-rebound",
    "dispatch-lost",
    "dispatch-timed-out",
    "stale-epoch-refused",
];
const WATCH: &[&str] = &["feed-moved"];

/// Seeds from which on every name of [`RARE`] must have been reached, too.
pub(crate) const VERY_MANY_SEEDS: u64 = 1_000;

/// What takes more seeds to reach.
pub(crate) const RARE: &[&str] = &[
    "crash-at-snapshot.build",
    "crash-at-snapshot.receive",
    "crash-at-snapshot.flip",
    "crash-at-snapshot.flipped",
    "power-lost-vote",
];

/// Counts by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reached(BTreeMap<String, u64>);

impl Reached {
    /// One more of this name.
    pub(crate) fn note(&mut self, name: &str) {
        match self.0.get_mut(name) {
            Some(count) => *count += 1,
            None => {
                self.0.insert(name.to_owned(), 1);
            }
        }
    }

    /// `name:count,name:count`, as a seed's line carries it.
    pub(crate) fn encode(&self) -> String {
        let pairs: Vec<String> = self
            .0
            .iter()
            .map(|(name, count)| format!("{name}:{count}"))
            .collect();
        pairs.join(",")
    }

    /// How often this was reached.
    pub(crate) fn count(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// All of it.
    pub(crate) fn counts(&self) -> &BTreeMap<String, u64> {
        &self.0
    }

    /// Adds what another seed said.
    pub(crate) fn add(&mut self, encoded: &str) {
        for (name, count) in encoded.split(',').filter_map(|pair| pair.split_once(':')) {
            *self.0.entry(name.to_owned()).or_default() += count.parse::<u64>().unwrap_or(0);
        }
    }

    /// What so many seeds had to reach, and did not.
    pub(crate) fn missing(&self, workload: Workload, seeds: u64) -> Vec<&'static str> {
        let needed = if seeds >= MANY_SEEDS { NEEDED } else { &[] };
        let load = if seeds >= MANY_SEEDS {
            by_load(workload)
        } else {
            &[]
        };
        let rare = if seeds >= VERY_MANY_SEEDS { RARE } else { &[] };
        needed
            .iter()
            .chain(load.iter().copied().flatten())
            .chain(rare)
            .copied()
            .filter(|name| !self.0.contains_key(*name))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_over_seeds_and_gaps_are_named() {
        let mut one = Reached::default();
        one.note("kill");
        one.note("kill");
        one.note("power");
        let mut sum = Reached::default();
        sum.add(&one.encode());
        sum.add(&one.encode());
        assert_eq!(sum.encode(), "kill:4,power:2");
        let missing = |workload, seeds| sum.missing(workload, seeds);
        assert!(!missing(Workload::Registry, 100).contains(&"kill"));
        assert_eq!(missing(Workload::Mix, 99).len(), 0, "too few seeds to say");
        assert_eq!(missing(Workload::Registry, 100).len(), NEEDED.len() - 2);
        assert_eq!(
            missing(Workload::Watch, VERY_MANY_SEEDS).len(),
            NEEDED.len() - 2 + WATCH.len() + RARE.len()
        );
    }
}
