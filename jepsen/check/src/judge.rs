//! From a history to its verdict: which checkers look at what.
//!
//! The checker of the workload that ran always has its say; those of other workloads join in when the history has
//! operations of theirs, so that `mix` is judged by all, and a run of leases whose journal was read by that of the
//! journal.
//!
//! Invariants: a history that breaks its own rules gets no verdict at all; a workload that did nothing is *unknown*.

use crate::context::{Context, Facts};
use crate::history::{History, Problem, Process};
use crate::resolve::Canonical;
use crate::verdict::{Check, Verdict};
use crate::{dispatch, failover, journal, lease, membership, pairing, registry, revocation, watch};

/// Why a history has no verdict: that is a failure of the harness.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoVerdict {
    /// The history breaks its own rules.
    #[error("the history breaks its own rules in {} places; first: {}", .0.len(), .0[0])]
    Broken(Vec<Problem>),
    /// Nobody knows how to judge this workload.
    #[error("there is no workload {name:?}; there are {}", names().join(", "))]
    NoWorkload {
        /// What it was called.
        name: String,
    },
}

/// A workload's checker.
struct Module {
    name: &'static str,
    /// Operations by which it knows that there is something to judge.
    functions: &'static [&'static str],
    check: fn(&History, &Context) -> Vec<Check>,
}

const MODULES: &[Module] = &[
    Module {
        name: "registry",
        functions: &["read", "list", "cas", "delete"],
        check: registry::check,
    },
    Module {
        name: "journal",
        functions: &["tail", "head", "rows"],
        check: journal::check,
    },
    Module {
        name: "watch",
        functions: watch::FUNCTIONS,
        check: watch::check,
    },
    Module {
        name: "membership",
        functions: membership::FUNCTIONS,
        check: membership::check,
    },
    Module {
        name: "failover",
        functions: failover::FUNCTIONS,
        check: failover::check,
    },
    Module {
        name: "lease",
        functions: &["accept", "renew", "start"],
        check: |history, context| lease::check(history, &context.facts.setting),
    },
    Module {
        name: "dispatch",
        functions: &["submit", "deliver", "complete"],
        check: |history, _| dispatch::check(history),
    },
    Module {
        name: "pairing",
        functions: &["mint", "redeem", "approve"],
        check: |history, context| pairing::check(history, &context.facts.setting),
    },
    Module {
        name: "revocation",
        functions: &["revoke", "probe", "stream"],
        check: |history, context| {
            revocation::check(history, &context.facts.setting, &context.facts.revocation)
        },
    },
];

/// The workloads that can be judged.
#[must_use]
pub fn names() -> Vec<&'static str> {
    MODULES.iter().map(|module| module.name).chain(["mix"]).collect()
}

/// Judges the history of a workload.
///
/// # Errors
/// [`NoVerdict`]: the history is not one, or the workload is not known.
pub fn judge(workload: &str, history: &History, facts: &Facts) -> Result<Verdict, NoVerdict> {
    if !names().contains(&workload) {
        return Err(NoVerdict::NoWorkload {
            name: workload.to_owned(),
        });
    }
    let problems = history.problems();
    if !problems.is_empty() {
        return Err(NoVerdict::Broken(problems));
    }
    let mut context = Context {
        facts: facts.clone(),
        ..Context::default()
    };
    context.canonical = journal::canonical(history, &context);
    let called = |module: &Module| {
        let functions = module.functions;
        history
            .events
            .iter()
            .filter(|event| matches!(event.process, Process::Client(_)))
            .any(|event| functions.contains(&event.f.as_str()))
    };
    let mut verdict = Verdict::default();
    for module in MODULES {
        if called(module) {
            verdict.checks.extend((module.check)(history, &context));
        } else if module.name == workload {
            let name = format!("{workload}.coverage");
            let functions = module.functions.join(", ");
            let why = format!("the history has no operation of {workload}, such as {functions}");
            verdict.checks.push(Check::unknown(name, why));
        }
    }
    Ok(with_journal(verdict, context.canonical.as_ref()))
}

/// Says how far the journal could tell what became of unknown outcomes.
fn with_journal(mut verdict: Verdict, canonical: Option<&Canonical>) -> Verdict {
    let told = canonical.map_or(
        "nothing",
        |canonical| if canonical.whole { "all" } else { "what it has" },
    );
    if let Some(first) = verdict.checks.first_mut() {
        first.facts.insert("outcomes_by_journal".into(), told.into());
    }
    verdict
}
