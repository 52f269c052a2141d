//! Unavailability: for how long nothing succeeded, in the whole run and around each fault.
//!
//! A gap is the time between two changes that succeeded one after the other, whoever made them. The gap of a fault
//! is the longest that overlaps it, from its beginning until a little after its end.

use std::collections::BTreeMap;

use palyra_jepsen_check::{History, Kind, Process};
use serde::{Deserialize, Serialize};

use crate::conduct::Done;
use crate::floors::{self, Span};
use crate::nemesis::Outcome;
use crate::run::Phase;

/// What a fault did may show a little after it ended.
const AFTER_NS: u64 = 3_000_000_000;

/// Gaps of one kind of fault, in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gaps {
    /// How many faults.
    pub faults: usize,
    /// Half of them had a gap no longer than this.
    pub median_ms: u64,
    /// The longest.
    pub worst_ms: u64,
}

/// Moments at which a change succeeded, while clients worked, from the beginning to the end of that.
fn successes(history: &History) -> Vec<u64> {
    let spans = floors::phases(history);
    let load = match (spans.get(&Phase::Before), spans.get(&Phase::After)) {
        (Some(before), Some(after)) => Span {
            from: before.from,
            to: after.to,
        },
        _ => return Vec::new(),
    };
    let ok = history.events.iter().filter(|event| {
        let is_change = event.request.is_some();
        event.kind == Kind::Ok && is_change && matches!(event.process, Process::Client(_))
    });
    let inside = ok
        .map(|event| event.time)
        .filter(|time| (load.from..load.to).contains(time));
    let mut all: Vec<u64> = std::iter::once(load.from).chain(inside).collect();
    all.push(load.to);
    all
}

/// The longest gap of the run, in milliseconds.
#[must_use]
pub fn longest(history: &History) -> u64 {
    let all = successes(history);
    all.windows(2)
        .map(|pair| (pair[1] - pair[0]) / 1_000_000)
        .max()
        .unwrap_or(0)
}

/// The gaps of each kind of fault.
#[must_use]
pub fn by_fault(history: &History, faults: &[Done]) -> BTreeMap<String, Gaps> {
    let all = successes(history);
    let mut found: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for done in faults
        .iter()
        .filter(|done| matches!(done.outcome, Outcome::Installed(_)))
    {
        let until = done.ended + AFTER_NS;
        let overlapping = all
            .windows(2)
            .filter(|pair| pair[1] > done.began && pair[0] < until);
        let gap = overlapping
            .map(|pair| (pair[1] - pair[0]) / 1_000_000)
            .max()
            .unwrap_or(0);
        let name = format!("{} {}", done.step.nemesis, kind_of(done));
        found.entry(name.trim().to_owned()).or_default().push(gap);
    }
    let gaps = |mut list: Vec<u64>| {
        list.sort_unstable();
        Gaps {
            faults: list.len(),
            median_ms: list[(list.len() - 1) / 2],
            worst_ms: list[list.len() - 1],
        }
    };
    found.into_iter().map(|(name, list)| (name, gaps(list))).collect()
}

/// A leader that is struck costs more than a follower: apart.
fn kind_of(done: &Done) -> String {
    use crate::target::Aim;
    match &done.step.aim {
        Aim::Nobody => String::new(),
        Aim::Leader => "leader".to_owned(),
        Aim::Follower(_) => "follower".to_owned(),
        Aim::These(ids) if ids.len() == 1 => "one".to_owned(),
        Aim::These(ids) => format!("{} replicas", ids.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Step;
    use crate::target::Aim;
    use palyra_jepsen_check::Recorder;
    use palyra_jepsen_check::history::Answer;
    use serde_json::json;

    const MS: u64 = 1_000_000;

    #[test]
    fn gaps_are_between_changes_and_belong_to_the_faults_that_they_overlap() {
        let mut recorder = Recorder::default();
        let process = recorder.process();
        let ok = |recorder: &mut Recorder, at: u64, request: Option<&str>| {
            let pending = recorder.invoke(at * MS, process, "x", json!({}), None, request.map(str::to_owned));
            recorder.complete(at * MS, &pending, Kind::Ok, Answer::default());
        };
        recorder.fault(0, "phase", json!({"phase": Phase::Before}));
        ok(&mut recorder, 100, Some("a"));
        recorder.fault(200 * MS, "phase", json!({"phase": Phase::Faults}));
        ok(&mut recorder, 1_000, None);
        ok(&mut recorder, 2_100, Some("b"));
        ok(&mut recorder, 9_000, Some("c"));
        recorder.fault(9_100 * MS, "phase", json!({"phase": Phase::After}));
        recorder.fault(9_200 * MS, "phase", json!({"phase": Phase::Final}));
        let history = recorder.history();
        assert_eq!(longest(history), 6_900);
        let fault = |began: u64, ended: u64, aim: Aim| Done {
            step: Step {
                number: 1,
                at_ms: 0,
                for_ms: 0,
                nemesis: "kill".to_owned(),
                aim,
                draw: String::new(),
            },
            targets: vec![1],
            began: began * MS,
            ended: ended * MS,
            isolated: Vec::new(),
            outcome: Outcome::Installed(String::new()),
        };
        let all = [
            fault(300, 400, Aim::Follower(0)),
            fault(5_000, 6_000, Aim::Leader),
            fault(9_050, 9_060, Aim::Leader),
        ];
        // The first ends at 400, and the three seconds after it reach into the long gap.
        let gaps = by_fault(history, &all);
        assert_eq!(gaps["kill follower"].worst_ms, 6_900);
        assert_eq!(
            (gaps["kill leader"].median_ms, gaps["kill leader"].worst_ms),
            (200, 6_900)
        );
    }
}
