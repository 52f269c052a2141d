//! The shared checkers at work on the history of a run, in the words of the simulation.
//!
//! What they judge is what they judge of real processes: `palyra_jepsen_check`, one module for each workload. What
//! the simulation knows better, since it sees everything, stays in `history`, `ledger`, `oracle` and `revocation`
//! beside them. Invariant: times are compared only as far as clocks were right: the cluster's time is that of whoever
//! leads.

use palyra_jepsen_check::context::Context;
use palyra_jepsen_check::evidence::{Setting, Window};
use palyra_jepsen_check::resolve::Canonical;
use palyra_jepsen_check::revocation::Bounds;
use palyra_jepsen_check::{Check, Outcome, lease, registry, revocation as revoked};
use palyra_state::journal::Row;

use crate::cluster::Cluster;
use crate::revocation;
use crate::world::EPOCH_MS;

/// Beyond the faults, how long the cluster may take to notice what is due.
const RECOVER_MS: u64 = 8_000;
/// Checks that compare holders' clocks with the cluster's.
const BY_CLOCKS: [&str; 2] = ["lease.exclusive", "lease.not-early"];

/// What the checkers of the workloads that took part find; faults ended at `calm`, and `rows` is the journal, which has
/// passed its own checks: it tells what became of requests whose outcome nobody knew.
pub(crate) fn check(cluster: &Cluster, calm: u64, rows: &[Row]) -> Vec<String> {
    let exact = !cluster.world.clocks_were_wrong();
    let setting = Setting {
        faults: vec![Window {
            from: 0,
            to: calm,
            name: "faults".to_owned(),
            isolated: Vec::new(),
        }],
        recover_ms: RECOVER_MS,
        epoch_ms: exact.then_some(EPOCH_MS),
        end: 0,
    };
    let tape = cluster.tape.borrow();
    let history = tape.history();
    let mut canonical = Canonical {
        whole: true,
        ..Canonical::default()
    };
    for row in rows {
        let request = row.request_id.to_string();
        canonical.revs.entry(request).or_insert(row.index);
    }
    let context = Context {
        canonical: Some(canonical),
        ..Context::default()
    };
    let mut checks = registry::check(history, &context);
    if cluster.load.workers > 0 {
        checks.extend(lease::check(history, &setting));
    }
    if cluster.load.probes > 0 {
        let bounds = Bounds {
            revoked_ms: revocation::bound_ms(cluster),
            ..Bounds::default()
        };
        checks.extend(revoked::check(history, &setting, &bounds));
    }
    checks
        .iter()
        .filter(|check| exact || !BY_CLOCKS.contains(&check.name.as_str()))
        .filter_map(told)
        .collect()
}

/// The first violation of a check, under its name.
fn told(check: &Check) -> Option<String> {
    match &check.outcome {
        Outcome::Invalid { violations } => {
            let first = violations.first()?;
            let at = first.time / 1_000_000;
            Some(format!("{}: {} ({at} ms)", check.name, first.what))
        }
        // That there was nothing to judge is seen by what was not reached.
        Outcome::Valid | Outcome::Unknown { .. } => None,
    }
}
