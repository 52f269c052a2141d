//! A good story of members passes; each way to spoil it is found, by the check that is meant to.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::context::Facts;
use crate::history::{Event, Kind};
use crate::journal::tests::{Teller, chain, request};
use crate::verdict::Outcome;

fn row(index: u64, number: u64, action: &str, subject: &str, detail: Value) -> Value {
    json!({
        "index": index, "ordinal": 0, "at_ms": 1_000 + index, "actor": "operator/x", "action": action,
        "subject": subject, "request": request(number), "detail": detail,
    })
}

fn status(index: u64, number: u64, id: &str, from: &str, to: &str) -> Value {
    row(
        index,
        number,
        "cluster.replica_status",
        id,
        json!({"from": from, "to": to}),
    )
}

/// r1 alone; r2 joins and is a voter from 8 on; r3 joins; r1 is removed at 20, and r2 and r3 are left.
fn rows() -> Vec<Value> {
    let allocated = "cluster.replica_allocated";
    let admitted = "cluster.replica_admitted";
    vec![
        row(1, 1, "cluster.genesis", "01J", json!({})),
        row(4, 2, allocated, "2", json!({})),
        row(5, 3, admitted, "2", json!({})),
        status(6, 4, "2", "joining", "learner"),
        status(8, 5, "2", "learner", "voter"),
        row(10, 6, allocated, "3", json!({})),
        row(11, 7, admitted, "3", json!({})),
        status(14, 8, "3", "joining", "voter"),
        row(20, 9, "cluster.replica_removed", "1", json!({})),
    ]
}

fn members(told: &mut Teller, node: &str, rev: u64, members: Value) {
    told.answered("members", node, json!({}), json!({"members": members}), rev);
}

fn story(mut rows: Vec<Value>) -> History {
    chain(&mut rows);
    let mut told = Teller::default();
    members(&mut told, "r1", 2, json!([[1, "voter"]]));
    members(&mut told, "r1", 7, json!([[1, "voter"], [2, "learner"]]));
    members(&mut told, "r2", 7, json!([[1, "voter"], [2, "learner"]]));
    members(
        &mut told,
        "r2",
        12,
        json!([[1, "voter"], [2, "voter"], [3, "joining"]]),
    );
    told.time += 10;
    told.told.fault(told.time, "removed", json!({"replica": "r1"}));
    // Who has not heard of its own removal may say what it had.
    members(
        &mut told,
        "r1",
        16,
        json!([[1, "voter"], [2, "voter"], [3, "voter"]]),
    );
    told.write("r1", 50, Kind::Fail, None);
    told.write("r2", 51, Kind::Ok, Some(22));
    told.time += 10;
    told.told.fault(told.time, "healed", json!({}));
    for node in ["r2", "r3"] {
        members(&mut told, node, 20, json!([[2, "voter"], [3, "voter"]]));
        told.answered(
            "rows",
            node,
            json!({"after": null}),
            json!({"after": null, "rows": rows, "end": true}),
            23,
        );
    }
    told.told.history().clone()
}

fn context() -> Context {
    Context {
        facts: Facts {
            replicas: vec!["r2".into(), "r3".into()],
            ..Facts::default()
        },
        ..Context::default()
    }
}

fn outcome(history: &History, name: &str) -> Outcome {
    let checks = check(history, &context());
    let found = checks.into_iter().find(|check| check.name == name);
    found.unwrap_or_else(|| panic!("no check {name}")).outcome
}

fn is_invalid(history: &History, name: &str) {
    let outcome = outcome(history, name);
    assert!(matches!(outcome, Outcome::Invalid { .. }), "{name}: {outcome:?}");
}

/// The `nth` answer of `members`.
fn answer(history: &mut History, nth: usize) -> &mut Event {
    let mut answers = history
        .events
        .iter_mut()
        .filter(|event| event.f == "members" && event.kind == Kind::Ok);
    answers.nth(nth).unwrap()
}

#[test]
fn a_good_story_passes() {
    for check in check(&story(rows()), &context()) {
        assert!(check.holds(), "{check:?}");
    }
}

#[test]
fn two_replicas_with_different_members_at_one_index_are_found() {
    let mut history = story(rows());
    answer(&mut history, 2).value["members"] = json!([[1, "voter"], [2, "voter"]]);
    is_invalid(&history, "membership.one-config");
    is_invalid(&history, "membership.chain");
}

#[test]
fn members_that_no_row_tells_of_are_found() {
    let mut history = story(rows());
    answer(&mut history, 3).value["members"] =
        json!([[1, "voter"], [2, "voter"], [3, "joining"], [4, "voter"]]);
    is_invalid(&history, "membership.chain");
}

#[test]
fn a_change_that_came_before_its_row_is_found() {
    let mut history = story(rows());
    answer(&mut history, 1).rev = Some(5);
    is_invalid(&history, "membership.chain");
}

#[test]
fn a_removed_replica_that_is_a_member_again_is_found() {
    let mut history = story(rows());
    answer(&mut history, 5).value["members"] = json!([[1, "learner"], [2, "voter"], [3, "voter"]]);
    is_invalid(&history, "membership.ids-once");
    is_invalid(&history, "membership.settles");
}

#[test]
fn a_removed_replica_that_acknowledges_is_found() {
    let mut history = story(rows());
    let late = history
        .events
        .iter_mut()
        .filter(|event| event.f == "write" && event.node.as_deref() == Some("r1"));
    late.last().unwrap().kind = Kind::Ok;
    is_invalid(&history, "membership.removed-silent");
}

#[test]
fn a_voter_that_did_not_become_one_is_found() {
    let mut history = story(rows());
    answer(&mut history, 6).value["members"] = json!([[2, "voter"], [3, "learner"]]);
    is_invalid(&history, "membership.settles");
    is_invalid(&history, "membership.one-config");
}

#[test]
fn what_was_not_read_is_unknown() {
    let mut history = story(rows());
    history.events.retain(|event| event.f != "rows");
    assert!(matches!(
        outcome(&history, "membership.chain"),
        Outcome::Unknown { .. }
    ));
    history.events.retain(|event| event.f != "members");
    for name in ["membership.one-config", "membership.settles"] {
        assert!(
            matches!(outcome(&history, name), Outcome::Unknown { .. }),
            "{name}"
        );
    }
}

#[test]
fn rows_of_other_shapes_are_unknown_and_not_believed() {
    let mut wrong = rows();
    wrong[3]["detail"] = json!({});
    assert!(matches!(
        outcome(&story(wrong), "membership.chain"),
        Outcome::Unknown { .. }
    ));
    let mut wrong = rows();
    wrong[1]["subject"] = json!("nobody");
    assert!(matches!(
        outcome(&story(wrong), "membership.chain"),
        Outcome::Unknown { .. }
    ));
}
