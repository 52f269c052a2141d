//! Whether a run tested enough for its verdict to mean something.
//!
//! A run that exercised nothing must not pass. So each kind of operation must have succeeded often enough before,
//! during and after faults; each nemesis that was asked for must have been installed, with evidence; and where
//! leaders were struck, leadership must have changed. What is missed makes the verdict *unknown*, exit code 2, never
//! *violated*.

use std::collections::BTreeMap;

use palyra_jepsen_check::{Check, History, Kind, Process};
use serde_json::json;

use crate::conduct::Done;
use crate::nemesis::Outcome;
use crate::run::Phase;
use crate::target::Aim;

/// So many operations of a kind must have succeeded in a phase that is long enough.
const ENOUGH: u64 = 20;
/// In a phase that is shorter, in proportion, but never fewer than [`LEAST`].
const LONG_ENOUGH_NS: u64 = 8_000_000_000;
const LEAST: u64 = 3;

/// When a phase was, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its beginning.
    pub from: u64,
    /// Its end.
    pub to: u64,
}

/// The phases of a history that have ended.
#[must_use]
pub fn phases(history: &History) -> BTreeMap<Phase, Span> {
    let mut open: Option<(Phase, u64)> = None;
    let mut spans = BTreeMap::new();
    for event in history.faults().filter(|event| event.f == "phase") {
        if let Some((phase, from)) = open.take() {
            spans.insert(phase, Span { from, to: event.time });
        }
        open = serde_json::from_value(event.value["phase"].clone())
            .ok()
            .map(|phase| (phase, event.time));
    }
    spans
}

/// The floor of a phase of that length.
#[must_use]
pub fn floor(span: Span) -> u64 {
    let length = span.to.saturating_sub(span.from).min(LONG_ENOUGH_NS);
    (ENOUGH * length / LONG_ENOUGH_NS).max(LEAST)
}

/// Whether each kind of operation succeeded often enough before, during and after faults.
#[must_use]
pub fn operations(history: &History, kinds: &[&str]) -> Check {
    let name = "coverage.operations";
    let mut missing = Vec::new();
    let mut facts = BTreeMap::new();
    let spans = phases(history);
    for phase in [Phase::Before, Phase::Faults, Phase::After] {
        let word = json!(phase).as_str().unwrap_or_default().to_owned();
        let Some(span) = spans.get(&phase) else {
            missing.push(format!("the run has no phase {word}"));
            continue;
        };
        for kind in kinds {
            let count = succeeded(history, kind, *span);
            let floor = floor(*span);
            facts.insert(format!("{word}.{kind}"), json!(count));
            if count < floor {
                missing.push(format!("{count} of at least {floor} {kind} succeeded in {word}"));
            }
        }
    }
    finish(name, &missing, facts)
}

fn succeeded(history: &History, f: &str, span: Span) -> u64 {
    let ok = history.events.iter().filter(|event| {
        event.kind == Kind::Ok && event.f == f && matches!(event.process, Process::Client(_))
    });
    ok.filter(|event| (span.from..span.to).contains(&event.time))
        .count() as u64
}

/// Whether each nemesis that was asked for did something.
#[must_use]
pub fn faults(asked: &[String], done: &[Done]) -> Check {
    let mut missing = Vec::new();
    let mut facts = BTreeMap::new();
    for name in asked {
        let of = || done.iter().filter(|done| done.step.nemesis == *name);
        let installed = of()
            .filter(|done| matches!(done.outcome, Outcome::Installed(_)))
            .count();
        facts.insert(
            name.clone(),
            json!({"planned": of().count(), "installed": installed}),
        );
        if installed == 0 {
            missing.push(match of().next_back().map(|done| &done.outcome) {
                None => format!("{name} was never begun"),
                Some(Outcome::Skipped(why)) => format!("{name} was skipped: {why}"),
                Some(Outcome::Indeterminate(why) | Outcome::Installed(why)) => {
                    format!("nothing shows that {name} happened: {why}")
                }
            });
        }
    }
    finish("coverage.faults", &missing, facts)
}

/// Whether leadership changed, when faults were to strike leaders for longer than an election takes.
#[must_use]
pub fn leaders(history: &History, done: &[Done]) -> Option<Check> {
    let aimed = done.iter().filter(|done| {
        let ends_leaders = [
            "kill",
            "pause",
            "partition:leader",
            "partition:peers-only",
            "transfer",
            "power",
            "restart",
        ];
        done.step.aim == Aim::Leader
            && ends_leaders.contains(&done.step.nemesis.as_str())
            && matches!(done.outcome, Outcome::Installed(_))
            && done.ended - done.began > 1_500_000_000
    });
    if aimed.count() == 0 {
        return None;
    }
    let spans = phases(history);
    let from = spans.get(&Phase::Faults).map_or(0, |span| span.from);
    let changes = history
        .faults()
        .filter(|event| event.f == "leader" && event.time > from)
        .count();
    let missing = if changes == 0 {
        vec!["leaders were struck, and nobody else came to lead".to_owned()]
    } else {
        Vec::new()
    };
    let facts = BTreeMap::from([("changes".to_owned(), json!(changes))]);
    Some(finish("coverage.leaders", &missing, facts))
}

fn finish(name: &str, missing: &[String], facts: BTreeMap<String, serde_json::Value>) -> Check {
    let mut check = if missing.is_empty() {
        Check::of(name, Vec::new())
    } else {
        Check::unknown(name, format!("it tested too little: {}", missing.join("; ")))
    };
    check.facts.extend(facts);
    check
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Step;
    use palyra_jepsen_check::Recorder;
    use palyra_jepsen_check::history::Answer;

    const SECOND: u64 = 1_000_000_000;

    /// Ten seconds of each phase, with so many writes in each.
    fn history(writes: [u64; 3]) -> History {
        let mut recorder = Recorder::default();
        let process = recorder.process();
        let phases = [Phase::Before, Phase::Faults, Phase::After];
        for (at, (phase, count)) in phases.into_iter().zip(writes).enumerate() {
            let from = at as u64 * 10 * SECOND;
            recorder.fault(from, "phase", json!({"phase": phase}));
            for number in 0..count {
                let pending = recorder.invoke(from + number, process, "write", json!({}), None, None);
                recorder.complete(from + number, &pending, Kind::Ok, Answer::default());
            }
        }
        recorder.fault(30 * SECOND, "phase", json!({"phase": Phase::Final}));
        recorder.history().clone()
    }

    #[test]
    fn each_kind_must_have_succeeded_in_each_phase() {
        assert!(operations(&history([20, 20, 20]), &["write"]).holds());
        for few in [[19, 20, 20], [20, 19, 20], [20, 20, 0]] {
            assert!(!operations(&history(few), &["write"]).holds(), "{few:?}");
        }
        let check = operations(&history([20, 20, 20]), &["write", "cas"]);
        assert!(format!("{check:?}").contains("0 of at least 20 cas succeeded in before"));
        assert!(
            !operations(&History::default(), &[]).holds(),
            "a run without phases shows nothing"
        );
    }

    #[test]
    fn short_phases_have_lower_floors() {
        let of = |seconds: u64| {
            floor(Span {
                from: 5,
                to: 5 + seconds * SECOND,
            })
        };
        assert_eq!([of(60), of(8), of(4), of(1)], [20, 20, 10, 3]);
    }

    fn done(nemesis: &str, aim: Aim, outcome: Outcome) -> Done {
        let step = Step {
            number: 1,
            at_ms: 0,
            for_ms: 0,
            nemesis: nemesis.to_owned(),
            aim,
            draw: String::new(),
        };
        Done {
            step,
            targets: vec![1],
            began: 0,
            ended: 2 * SECOND,
            isolated: Vec::new(),
            outcome,
        }
    }

    #[test]
    fn what_was_asked_for_must_have_happened() {
        let asked = ["kill".to_owned()];
        let with = |outcome| faults(&asked, &[done("kill", Aim::Nobody, outcome)]);
        assert!(with(Outcome::Installed("pid".to_owned())).holds());
        let check = with(Outcome::Indeterminate("nothing was done".to_owned()));
        assert!(format!("{check:?}").contains("nothing shows that kill happened: nothing was done"));
        assert!(!with(Outcome::Skipped("no".to_owned())).holds());
        assert!(!faults(&asked, &[]).holds());
    }

    #[test]
    fn leaders_that_were_struck_must_have_been_followed() {
        let installed = || Outcome::Installed(String::new());
        let struck = [done("kill", Aim::Leader, installed())];
        assert!(!leaders(&history([1, 1, 1]), &struck).unwrap().holds());
        assert_eq!(
            leaders(
                &history([1, 1, 1]),
                &[done("kill", Aim::Follower(0), installed())]
            ),
            None
        );
        let mut recorder = Recorder::default();
        recorder.fault(1, "phase", json!({"phase": Phase::Faults}));
        recorder.fault(5, "leader", json!({"replica": "r2", "term": 4}));
        assert!(leaders(recorder.history(), &struck).unwrap().holds());
    }
}
