//! From a run that fails to a smaller one that fails in the same way: without each kind of fault that it does not need,
//! and over the shortest time.
//!
//! Each trial is a run in a process of its own. Leaving something out changes everything that comes after it, so a
//! smaller run may fail for another reason: only the same words count.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Duration;

use crate::case::Case;
use crate::faults::{Kind, Plan};
use crate::fork::{self, Ended};
use crate::simulate;

/// Shrinks a case and prints the line that replays what is left.
pub(crate) fn run(case: &Case, jobs: usize) -> ExitCode {
    let Some(whole) = try_all(std::slice::from_ref(case), jobs, |_| true).pop() else {
        println!("seed {} passes: there is nothing to shrink", case.seed);
        return ExitCode::from(2);
    };
    let (_, first) = whole;
    println!("seed {} fails: {first}", case.seed);
    let same = |what: &str| essence(what) == essence(&first);
    let mut best = case.clone();
    best.only = Some(Plan::draw(case).kinds.into_iter().collect());
    loop {
        let trials: Vec<Case> = without_one(&best);
        let Some((smaller, _)) = try_all(&trials, jobs, same).into_iter().next() else {
            break;
        };
        best = smaller;
        println!(
            "  {} kinds are enough",
            best.only.as_ref().map_or(0, BTreeSet::len)
        );
    }
    let shorter = horizons(&best);
    if let Some((smaller, _)) = try_all(&shorter, jobs, same).into_iter().next() {
        best = smaller;
    }
    if try_all(std::slice::from_ref(&best), jobs, same).is_empty() {
        // None of the faults that it uses left out, and the seed's own time: that is the run itself.
        best = case.clone();
    }
    println!("smallest: {}", best.replay());
    ExitCode::from(1)
}

/// The same without one of its kinds, for each of them.
fn without_one(case: &Case) -> Vec<Case> {
    let kinds = case.only.clone().unwrap_or_default();
    let leave = |kind: &Kind| {
        let mut rest = kinds.clone();
        rest.remove(kind);
        Case {
            only: Some(rest),
            ..case.clone()
        }
    };
    kinds.iter().map(leave).collect()
}

/// The same over shorter times, the shortest first: up to just after each strike.
fn horizons(case: &Case) -> Vec<Case> {
    let plan = Plan::draw(case);
    let mut ends: BTreeSet<u64> = plan.strikes.iter().map(|strike| strike.at_ms + 1).collect();
    ends.extend((1..=plan.end_ms / 500).map(|half| half * 500));
    ends.retain(|end| *end < plan.end_ms);
    let over = |end: u64| Case {
        horizon: Some(Duration::from_millis(end)),
        ..case.clone()
    };
    ends.into_iter().map(over).collect()
}

/// Those of the cases that fail as wanted, in their order, up to the first.
fn try_all(cases: &[Case], jobs: usize, wanted: impl Fn(&str) -> bool) -> Vec<(Case, String)> {
    let mut found: Vec<(u64, String)> = Vec::new();
    let run = |at: u64| simulate(&cases[usize::try_from(at).unwrap_or(0)], false);
    fork::for_each(0..cases.len() as u64, jobs, run, |at, ended| {
        let what = match ended {
            Ended::Said(line) if line.starts_with("ok") => None,
            Ended::Said(line) => Some(brief(&line)),
            Ended::Died(how) => Some(format!("its process died: {how}")),
            Ended::Hung => Some("it hung".to_owned()),
        };
        if let Some(what) = what.filter(|what| wanted(what)) {
            found.push((at, what));
        }
        // Those that run already may be earlier ones.
        if found.is_empty() {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    found.sort();
    let case = |(at, what): (u64, String)| (cases[usize::try_from(at).unwrap_or(0)].clone(), what);
    found.into_iter().map(case).collect()
}

fn brief(line: &str) -> String {
    let what = line.split(" seed=").next().unwrap_or(line);
    let what = what.rsplit_once(" (").map_or(what, |(what, _)| what);
    what.trim_start_matches("FAIL ").to_owned()
}

/// The first words of a problem without ids and numbers: what makes two failures the same.
fn essence(what: &str) -> Vec<&str> {
    let plain = |word: &&str| {
        word.bytes()
            .all(|byte| byte.is_ascii_alphabetic() || byte == b'.' || byte == b':')
    };
    what.split_whitespace().filter(plain).take(6).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_the_same_whatever_their_numbers() {
        let one = brief("FAIL r2 has another state at index 51 than r1 had (3 problems) seed=4 ok=1");
        assert_eq!(one, "r2 has another state at index 51 than r1 had");
        assert_eq!(
            essence(&one),
            essence("r3 has another state at index 7 than r1 had")
        );
        assert_ne!(essence(&one), essence("r3 went back from term and index (1, 2)"));
    }

    #[test]
    fn trials_are_smaller() {
        let case = Case {
            seed: 9,
            only: Some([Kind::Kill, Kind::Power].into()),
            ..Case::default()
        };
        assert_eq!(without_one(&case).len(), 2);
        let ends: Vec<_> = horizons(&case).into_iter().map(|case| case.horizon).collect();
        assert!(ends.is_sorted() && !ends.is_empty());
    }
}
