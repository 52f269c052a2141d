//! The fast checks against a plain search that tries every order, and against stateright, on random small histories.
//!
//! `PALYRA_JEPSEN_HISTORIES` sets how many, each judged with and without versions; the seed of a history is its
//! number, so that a failure names it.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{Plan, brute_force, lie, named, truth, violated};
use palyra_jepsen_check::wgl::Limits;
use palyra_jepsen_check::{Context, History, Kind, registry};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;
use stateright::semantics::register::{Register, RegisterOp, RegisterRet};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester};

fn histories() -> u64 {
    let wanted = std::env::var("PALYRA_JEPSEN_HISTORIES").ok();
    wanted.map_or(50_000, |text| text.parse().expect("a number of histories"))
}

fn draw(seed: u64, versions: bool) -> History {
    let mut rng = SmallRng::seed_from_u64(seed);
    let plain = rng.gen_range(0..3) == 0;
    let plan = Plan {
        ops: rng.gen_range(1..=8),
        processes: rng.gen_range(1..=4),
        keys: rng.gen_range(1..=2),
        cas: if plain { 0 } else { 20 },
        delete: if plain { 0 } else { 8 },
        unknown: rng.gen_range(0..20),
        versions,
    };
    let mut history = truth(&mut rng, plan);
    for _ in 0..rng.gen_range(0..3) {
        lie(&mut rng, &mut history);
    }
    history
}

fn linearizable(history: &History, limits: Limits) -> Option<bool> {
    let context = Context {
        limits,
        ..Context::default()
    };
    let checks = registry::check(history, &context);
    violated(named(&checks, "registry.linearizable")).map(|violated| !violated)
}

#[test]
fn every_way_to_decide_agrees_with_trying_every_order() {
    let never_search = Limits {
        ops: 0,
        ..Limits::default()
    };
    let (mut good, mut bad, mut by_zones) = (0, 0, 0);
    for seed in 0..histories() {
        for versions in [true, false] {
            let mut history = draw(seed, versions);
            assert_eq!(history.problems(), vec![], "seed {seed}");
            // Without revisions nothing but versions and searches decide.
            history.events.iter_mut().for_each(|event| event.rev = None);
            let expected = brute_force(&history);
            let found = linearizable(&history, Limits::default());
            assert_eq!(
                found,
                Some(expected),
                "seed {seed}, versions {versions}: {history:#?}"
            );
            let without = linearizable(&history, never_search);
            assert!(
                without.is_none_or(|found| found == expected),
                "seed {seed}, versions {versions}, without search: {history:#?}"
            );
            by_zones += u64::from(!versions && without.is_some());
            if expected { good += 1 } else { bad += 1 }
        }
    }
    // The mixture is one that tests something.
    assert!(good > bad / 10 && bad > good / 10, "{good} good, {bad} bad");
    assert!(by_zones > histories() / 10, "{by_zones} decided by zones");
}

#[test]
fn truth_satisfies_every_check_also_by_revision() {
    for seed in 0..histories() / 20 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let plan = Plan {
            ops: 40,
            processes: 5,
            keys: 3,
            cas: 10,
            delete: 0,
            unknown: 3,
            versions: seed % 2 == 0,
        };
        let history = truth(&mut rng, plan);
        for check in registry::check(&history, &Context::default()) {
            let fine = violated(&check) == Some(false)
                || (violated(&check).is_none() && check.name.ends_with("order"));
            assert!(fine, "seed {seed}: {check:#?}");
        }
    }
}

#[test]
fn stateright_agrees() {
    for seed in 0..histories() / 10 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let plan = Plan {
            ops: 8,
            processes: 4,
            keys: 1,
            cas: 0,
            delete: 0,
            unknown: 10,
            versions: false,
        };
        let mut history = truth(&mut rng, plan);
        for _ in 0..rng.gen_range(0..2) {
            lie(&mut rng, &mut history);
        }
        history.events.iter_mut().for_each(|event| event.rev = None);
        let expected = stateright(&history);
        assert_eq!(
            linearizable(&history, Limits::default()),
            Some(expected),
            "seed {seed}: {history:#?}"
        );
    }
}

/// What stateright says: a failed operation never was, an unknown one is still in flight.
fn stateright(history: &History) -> bool {
    let mut tester = LinearizabilityTester::new(Register(Value::Null));
    let ends: BTreeMap<u64, Kind> = history.ops().iter().map(|op| (op.start(), op.kind())).collect();
    let mut skipped = std::collections::BTreeSet::new();
    for event in &history.events {
        let palyra_jepsen_check::Process::Client(process) = event.process else {
            unreachable!()
        };
        let read = event.f == "read";
        if event.kind == Kind::Invoke {
            if ends[&event.index] == Kind::Fail {
                skipped.insert(process);
                continue;
            }
            let op = if read {
                RegisterOp::Read
            } else {
                RegisterOp::Write(event.value["value"].clone())
            };
            tester.on_invoke(process, op).unwrap();
        } else if event.kind == Kind::Ok {
            let ret = if read {
                RegisterRet::ReadOk(event.value["value"].clone())
            } else {
                RegisterRet::WriteOk
            };
            tester.on_return(process, ret).unwrap();
        }
    }
    tester.is_consistent()
}
