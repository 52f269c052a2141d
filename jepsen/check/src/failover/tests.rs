//! A cluster that goes on in time passes; one that stops for too long is found, by the check that is meant to.
#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::*;
use crate::context::Facts;
use crate::history::{Answer, Kind, Recorder};
use crate::verdict::Outcome;

/// What happens at a millisecond.
enum What {
    Pulse,
    Tell(&'static str, serde_json::Value),
}

/// Thirty seconds, the middle third with faults, a pulse every 100 ms but for the silences; and what the nemesis did.
fn history(silences: &[(u64, u64)], faults: &[(u64, u64, &str, &[&str])]) -> History {
    let mut all: Vec<(u64, What)> = Vec::new();
    for (at, phase) in [
        (0, "before"),
        (10_000, "faults"),
        (20_000, "after"),
        (40_000, "final"),
    ] {
        all.push((at, What::Tell("phase", json!({"phase": phase}))));
    }
    all.push((0, What::Tell("leader", json!({"replica": "r1", "term": 2}))));
    for (number, (from, to, name, targets)) in faults.iter().enumerate() {
        let name: &'static str = Box::leak((*name).to_owned().into_boxed_str());
        for (at, phase) in [(from, "start"), (to, "stop")] {
            let value = json!({"id": number, "phase": phase, "targets": targets, "outcome": "installed"});
            all.push((*at, What::Tell(name, value)));
        }
    }
    let pulses = (0..40_000).step_by(100).map(|at| at + 50);
    let heard = pulses.filter(|at| !silences.iter().any(|(from, to)| (from..to).contains(&at)));
    all.extend(heard.map(|at| (at, What::Pulse)));
    all.sort_by_key(|(at, _)| *at);
    let mut recorder = Recorder::default();
    let process = recorder.process();
    for (at, what) in all {
        match what {
            What::Tell(f, value) => recorder.fault(at * MS, f, value),
            What::Pulse => {
                let call = recorder.invoke(at * MS, process, "pulse", json!({}), None, Some(at.to_string()));
                recorder.complete(at * MS, &call, Kind::Ok, Answer::default());
            }
        }
    }
    recorder.history().clone()
}

fn outcome(history: &History, late: f64, name: &str) -> Outcome {
    let facts = Facts {
        replicas: ["r1", "r2", "r3"].map(str::to_owned).to_vec(),
        bounds: [("late_ms".to_owned(), late)].into(),
        ..Facts::default()
    };
    let context = Context {
        facts,
        ..Context::default()
    };
    let checks = check(history, &context);
    let found = checks.into_iter().find(|check| check.name == name);
    found.unwrap_or_else(|| panic!("no check {name}")).outcome
}

const ALL: [&str; 4] = [
    "failover.leader-faults",
    "failover.follower-faults",
    "failover.heals",
    "failover.resumes",
];

/// Only this check finds something.
fn finds(history: &History, name: &str) {
    for other in ALL {
        let outcome = outcome(history, 10.0, other);
        let is_found = matches!(outcome, Outcome::Invalid { .. });
        assert_eq!(is_found, other == name, "{other}: {outcome:?}");
    }
}

#[test]
fn a_cluster_that_goes_on_in_time_passes() {
    let kills: [(u64, u64, &str, &[&str]); 3] = [
        (11_000, 12_500, "kill", &["r1"]),
        (14_000, 16_500, "pause", &["r2"]),
        (20_000, 20_010, "partition:halves", &[]),
    ];
    let history = history(&[(11_000, 12_800)], &kills);
    for name in ALL {
        assert_eq!(outcome(&history, 10.0, name), Outcome::Valid, "{name}");
    }
}

#[test]
fn a_leader_that_is_missed_for_too_long_is_found() {
    let history = history(&[(11_000, 13_800)], &[(11_000, 14_000, "kill", &["r1"])]);
    finds(&history, "failover.leader-faults");
    assert!(matches!(
        outcome(&history, 900.0, "failover.leader-faults"),
        Outcome::Unknown { .. }
    ));
}

#[test]
fn the_gap_of_the_next_fault_is_not_this_ones() {
    let two: [(u64, u64, &str, &[&str]); 2] = [
        (11_000, 12_000, "pause", &["r3"]),
        (13_500, 15_000, "kill", &["r1"]),
    ];
    let history = history(&[(13_450, 15_300)], &two);
    for name in ALL {
        assert_eq!(outcome(&history, 10.0, name), Outcome::Valid, "{name}");
    }
}

#[test]
fn a_follower_that_is_missed_at_all_is_found() {
    finds(
        &history(&[(11_000, 11_800)], &[(11_000, 14_000, "pause", &["r3"])]),
        "failover.follower-faults",
    );
}

#[test]
fn a_majority_may_be_missed_but_not_for_long_after() {
    let both: [&str; 2] = ["r1", "r2"];
    let long = [(11_000, 15_000, "kill", &both[..])];
    let history_of = |until: u64| history(&[(11_000, until)], &long);
    assert_eq!(
        outcome(&history_of(19_000), 10.0, "failover.heals"),
        Outcome::Valid
    );
    finds(&history_of(25_200), "failover.heals");
}

#[test]
fn faults_at_the_same_time_count_together() {
    let two: [(u64, u64, &str, &[&str]); 2] = [
        (11_000, 14_000, "kill", &["r1"]),
        (12_000, 15_000, "pause", &["r2"]),
    ];
    let history = history(&[(11_000, 16_000)], &two);
    for name in ALL {
        assert_eq!(outcome(&history, 10.0, name), Outcome::Valid, "{name}");
    }
}

#[test]
fn a_rate_that_does_not_come_back_is_found() {
    let gone: Vec<(u64, u64)> = (0..40).map(|at| (21_000 + at * 500, 21_250 + at * 500)).collect();
    finds(
        &history(&gone, &[(11_000, 12_000, "kill", &["r2"])]),
        "failover.resumes",
    );
}

#[test]
fn too_little_is_unknown() {
    let mut history = history(&[], &[]);
    history.events.retain(|event| event.f != "phase");
    assert!(matches!(
        outcome(&history, 10.0, "failover.resumes"),
        Outcome::Unknown { .. }
    ));
    history.events.truncate(20);
    assert!(matches!(
        outcome(&history, 10.0, "failover.resumes"),
        Outcome::Unknown { .. }
    ));
}
