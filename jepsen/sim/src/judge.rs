//! The shared checkers at work on the history of a run, in the words of the simulation.
//!
//! What they judge is what they judge of real processes: `palyra_jepsen_check`, one module for each workload. What
//! the simulation knows better, since it sees everything, stays in `history`, `ledger`, `oracle` and `revocation`
//! beside them. Invariant: times are compared only as far as clocks were right: the cluster's time is that of whoever
//! leads.

use palyra_jepsen_check::context::{Context, Facts, RegisterRows};
use palyra_jepsen_check::evidence::{Setting, Window};
use palyra_jepsen_check::resolve::Canonical;
use palyra_jepsen_check::revocation::Bounds;
use palyra_jepsen_check::{
    Check, History, Outcome, dispatch, journal, lease, membership, pairing, registry, revocation as revoked,
    watch,
};
use palyra_state::journal::Row;

use crate::cluster::Cluster;
use crate::load::{Load, Workload};
use crate::revocation;
use crate::world::EPOCH_MS;

/// Beyond the faults, how long the cluster may take to notice what is due.
const RECOVER_MS: u64 = 8_000;
/// Checks that compare holders' clocks with the cluster's.
const BY_CLOCKS: [&str; 2] = ["lease.exclusive", "lease.not-early"];
/// Changes that leave a row, each under its own request, besides those that always do.
const JOURNALED: [&str; 7] = ["submit", "cancel", "mint", "close", "redeem", "approve", "reject"];

/// When the run was what.
pub(crate) struct Times {
    /// Faults ended, in nanoseconds.
    pub(crate) calm: u64,
    /// All replicas served again and had applied the same.
    pub(crate) settled: u64,
}

impl Load {
    /// Whether somebody takes part of whom the journal's rows have something to say, or who reads them.
    pub(crate) fn needs_rows(&self) -> bool {
        self.replaced || self.nodes + self.doors + self.workers + self.watchers() + self.readers > 0
    }

    /// Watchers of both kinds.
    pub(crate) fn watchers(&self) -> usize {
        self.roaming + self.settled
    }
}

/// What the checkers of the workloads that took part find; `rows` is the journal, which has passed its own checks: it
/// tells what became of requests whose outcome nobody knew.
pub(crate) fn check(cluster: &Cluster, times: &Times, rows: &[Row]) -> Vec<String> {
    let tape = cluster.tape.borrow();
    let history = tape.history();
    if let Some(broken) = history.problems().first() {
        return vec![format!("sim.history: it breaks its own rules: {broken}")];
    }
    let exact = !cluster.world.clocks_were_wrong();
    let checks = verdict(cluster, history, times, &context(cluster, rows), exact);
    checks
        .iter()
        .filter(|check| exact || !BY_CLOCKS.contains(&check.name.as_str()))
        .filter_map(told)
        .collect()
}

fn verdict(
    cluster: &Cluster,
    history: &History,
    times: &Times,
    context: &Context,
    exact: bool,
) -> Vec<Check> {
    let load = cluster.load;
    let setting = setting(times.calm, RECOVER_MS, exact);
    let mut checks = registry::check(history, context);
    if load.workers > 0 {
        checks.extend(lease::check(history, &setting));
    }
    if load.probes > 0 {
        let bounds = Bounds {
            revoked_ms: revocation::bound_ms(cluster),
            ..Bounds::default()
        };
        checks.extend(revoked::check(history, &setting, &bounds));
    }
    if load.nodes + load.doors > 0 {
        checks.extend(dispatch::check(history));
    }
    if load.doors > 0 {
        // Who comes when everybody serves again must be served.
        checks.extend(pairing::check(history, &self::setting(times.settled, 0, exact)));
    }
    if load.replaced {
        checks.extend(membership::check(history, context));
    }
    if load.needs_rows() {
        match journal::Book::read(history) {
            Ok(book) => {
                checks.extend(journal::judge(history, context, &book));
                if load.watchers() > 0 {
                    checks.extend(watch::judge(history, context, &book));
                }
            }
            Err(why) => checks.push(Check::unknown("journal.history", why)),
        }
    }
    checks
}

/// Something was wrong all the time until `to`.
fn setting(to: u64, recover_ms: u64, exact: bool) -> Setting {
    Setting {
        faults: vec![Window {
            from: 0,
            to,
            name: "faults".to_owned(),
            isolated: Vec::new(),
        }],
        recover_ms,
        epoch_ms: exact.then_some(EPOCH_MS),
        end: 0,
    }
}

fn context(cluster: &Cluster, rows: &[Row]) -> Context {
    let mut canonical = Canonical {
        whole: true,
        ..Canonical::default()
    };
    for row in rows {
        let request = row.request_id.to_string();
        canonical.revs.entry(request).or_insert(row.index);
    }
    let facts = Facts {
        journaled: JOURNALED.map(str::to_owned).to_vec(),
        settled: true,
        replicas: cluster.members().iter().map(|id| format!("r{id}")).collect(),
        registers: Some(RegisterRows {
            action: "node.registered".to_owned(),
            version: "generation".to_owned(),
        }),
        ..Facts::default()
    };
    Context {
        facts,
        canonical: Some(canonical),
        ..Context::default()
    }
}

/// The first violation of a check, under its name. A history that a checker cannot read is the simulation's fault.
fn told(check: &Check) -> Option<String> {
    match &check.outcome {
        Outcome::Invalid { violations } => {
            let first = violations.first()?;
            let at = first.time / 1_000_000;
            Some(format!("{}: {} ({at} ms)", check.name, first.what))
        }
        Outcome::Unknown { why } if check.name.ends_with(".history") => {
            Some(format!("{}: the checker cannot read it: {why}", check.name))
        }
        // That there was nothing to judge is seen by what was not reached.
        Outcome::Valid | Outcome::Unknown { .. } => None,
    }
}

/// The checks that a workload is held to.
pub(crate) fn names(workload: Workload) -> Vec<&'static str> {
    let load = match workload {
        // Some seed has each of them.
        Workload::Mix => Load {
            nodes: 1,
            doors: 1,
            probes: 1,
            workers: 1,
            roaming: 1,
            ..Load::default()
        },
        other => other.draw(),
    };
    let parts: [(bool, &[&str]); 8] = [
        (true, REGISTRY),
        (load.workers > 0, LEASE),
        (load.probes > 0, REVOCATION),
        (load.nodes + load.doors > 0, DISPATCH),
        (load.doors > 0, PAIRING),
        (load.replaced, MEMBERSHIP),
        (load.needs_rows(), JOURNAL),
        (load.watchers() > 0, WATCH),
    ];
    let there = parts.into_iter().filter(|(there, _)| *there);
    there.flat_map(|(_, names)| names.iter().copied()).collect()
}

const REGISTRY: &[&str] = &[
    "registry.linearizable",
    "registry.claimed-order",
    "registry.revs-follow-time",
    "registry.values-written",
];
const LEASE: &[&str] = &[
    "lease.tokens-rise",
    "lease.fenced-resource",
    "lease.fenced-control",
    "lease.exclusive",
    "lease.not-early",
    "lease.grantable-again",
    "lease.one-result",
    "lease.runs-end",
];
const REVOCATION: &[&str] = &[
    "revocation.answer-true",
    "revocation.bounded",
    "revocation.monotone",
    "revocation.open",
];
const DISPATCH: &[&str] = &[
    "dispatch.all-end",
    "dispatch.delivered-once",
    "dispatch.attempts-follow",
    "dispatch.one-completion",
    "dispatch.effects",
    "dispatch.one-job-per-key",
    "dispatch.cancelled-stays",
];
const PAIRING: &[&str] = &[
    "pairing.one-winner",
    "pairing.same-answer",
    "pairing.in-time",
    "pairing.one-certificate",
    "pairing.live",
];
const MEMBERSHIP: &[&str] = &[
    "membership.one-config",
    "membership.chain",
    "membership.ids-once",
    "membership.settles",
];
const JOURNAL: &[&str] = &[
    "journal.gapless",
    "journal.chain",
    "journal.one-history",
    "journal.heads",
    "journal.mutations",
    "journal.state",
    "journal.converged",
];
const WATCH: &[&str] = &[
    "watch.ordered",
    "watch.committed",
    "watch.gapless",
    "watch.bookmarks",
    "watch.reaches-end",
];
