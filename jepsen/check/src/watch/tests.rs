//! A good story of watchers passes; each way to spoil it is found, by the check that is meant to.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::history::Kind;
use crate::journal::tests::{Teller, chain, draft};
use crate::verdict::Outcome;

/// A watcher's operation, whose answer repeats the call.
fn op(told: &mut Teller, f: &str, node: &str, call: Value, answer: &Value) {
    let mut value = call.clone();
    let more = answer.as_object().cloned().unwrap_or_default();
    value.as_object_mut().unwrap().extend(more);
    told.answered(f, node, call, value, 17);
}

fn open(told: &mut Teller, node: &str, call: Value, stream: u64) {
    op(told, "watch", node, call, &json!({"stream": stream}));
}

fn next(told: &mut Teller, node: &str, watcher: &str, stream: u64, item: &Value) {
    op(
        told,
        "next",
        node,
        json!({"watcher": watcher, "stream": stream}),
        item,
    );
}

/// Rows 10.0, 12.0, 12.1, 14.0, 16.0. `w1` is cut off after 12.0 and resumes elsewhere; `w2` wants only what was noted;
/// `w3` begins now; `w4` is told of a gap.
fn story() -> History {
    let mut rows = vec![
        draft(10, 0, 1, 1),
        draft(12, 0, 2, 2),
        draft(12, 1, 2, 2),
        draft(14, 0, 3, 3),
        draft(16, 0, 4, 4),
    ];
    chain(&mut rows);
    let all = |rows: &[Value], cursor: Value| json!({"rows": rows, "cursor": cursor});
    let first = |watcher: &str| json!({"watcher": watcher, "after": "first"});
    let mut told = Teller::default();
    for (number, rev) in [(1, 10), (2, 12), (3, 14), (4, 16)] {
        told.write("r1", number, Kind::Ok, Some(rev));
    }
    open(&mut told, "r1", first("w1"), 1);
    next(&mut told, "r1", "w1", 1, &all(&rows[..2], json!([12, 0])));
    open(&mut told, "r2", json!({"watcher": "w1", "after": [12, 0]}), 2);
    let noted = json!({"watcher": "w2", "after": "first", "filter": {"action": "node.noted"}});
    open(&mut told, "r2", noted, 3);
    next(&mut told, "r2", "w2", 3, &json!({"heartbeat": [11, 0]}));
    open(&mut told, "r3", json!({"watcher": "w3", "after": "now"}), 4);
    next(&mut told, "r3", "w3", 4, &json!({"caught_up": [13, 0]}));
    open(&mut told, "r3", first("w4"), 5);
    next(&mut told, "r3", "w4", 5, &json!({"gap": [12, 1], "rescan": 12}));
    told.time += 10;
    told.told.fault(told.time, "healed", json!({}));
    next(&mut told, "r2", "w1", 2, &all(&rows[2..], json!([16, 0])));
    next(&mut told, "r2", "w2", 3, &all(&rows[2..3], json!([12, 1])));
    next(&mut told, "r3", "w3", 4, &all(&rows[3..], json!([16, 0])));
    next(&mut told, "r3", "w4", 5, &all(&rows[2..], json!([16, 0])));
    for node in ["r1", "r2", "r3"] {
        let page = json!({"after": null, "rows": rows, "end": true});
        op(&mut told, "rows", node, json!({"after": null}), &page);
    }
    told.told.history().clone()
}

/// The answer of the `nth` item.
fn item(history: &mut History, nth: usize) -> &mut Value {
    let mut items = history
        .events
        .iter_mut()
        .filter(|event| event.f == "next" && event.kind == Kind::Ok);
    &mut items.nth(nth).expect("the story has it").value
}

fn rows(history: &mut History, nth: usize) -> &mut Vec<Value> {
    item(history, nth)["rows"]
        .as_array_mut()
        .expect("the item has rows")
}

#[test]
fn good_watchers_pass() {
    let history = story();
    assert_eq!(history.problems(), []);
    for check in check(&history, &Context::default()) {
        assert!(check.holds(), "{check:#?}");
    }
}

/// Changes a history that was told.
type Alter = fn(&mut History);

/// What is spoiled, the check that must find it, and how.
const LIES: &[(&str, &str, Alter)] = &[
    ("a row comes twice", "watch.ordered", |history| {
        let again = rows(history, 0)[1].clone();
        rows(history, 0).push(again);
    }),
    ("rows change places", "watch.ordered", |history| {
        rows(history, 0).swap(0, 1)
    }),
    ("a resumed stream repeats a row", "watch.ordered", |history| {
        let again = rows(history, 0)[1].clone();
        rows(history, 4).insert(0, again);
    }),
    ("a resumed stream skips a row", "watch.gapless", |history| {
        drop(rows(history, 4).remove(0))
    }),
    ("a row in the middle is skipped", "watch.gapless", |history| {
        drop(rows(history, 4).remove(1))
    }),
    ("a filtered stream skips its row", "watch.bookmarks", |history| {
        drop(rows(history, 5).remove(0))
    }),
    ("a heartbeat is ahead", "watch.bookmarks", |history| {
        item(history, 1)["heartbeat"] = json!([13, 0])
    }),
    (
        "a stream that begins now skips a row",
        "watch.gapless",
        |history| drop(rows(history, 6).remove(0)),
    ),
    ("a row is of another history", "watch.committed", |history| {
        rows(history, 4)[1]["hash"] = json!("00");
    }),
    ("a row was never committed", "watch.committed", |history| {
        let mut ghost = rows(history, 4)[2].clone();
        ghost["index"] = json!(18);
        rows(history, 4).push(ghost);
    }),
    ("a row does not match", "watch.committed", |history| {
        rows(history, 5)[0]["action"] = json!("node.other");
    }),
    ("a gap lies behind", "watch.gaps", |history| {
        item(history, 0)["gap"] = Value::Null;
        item(history, 2)["caught_up"] = json!([13, 0]);
        *item(history, 6) = json!({"watcher": "w3", "stream": 4, "gap": [12, 0], "rescan": 12});
    }),
    ("what follows a gap begins later", "watch.gapless", |history| {
        drop(rows(history, 7).remove(0))
    }),
    ("a watcher stays behind", "watch.reaches-end", |history| {
        rows(history, 4).truncate(1);
        item(history, 4)["cursor"] = json!([12, 1]);
        for event in history.events.iter_mut().filter(|event| event.f == "rows") {
            event.time += 60_000_000_000;
        }
    }),
];

#[test]
fn each_lie_to_a_watcher_is_found() {
    for (lie, name, alter) in LIES {
        let mut history = story();
        alter(&mut history);
        assert_eq!(history.problems(), [], "{lie}");
        let checks = check(&history, &Context::default());
        let found = checks
            .iter()
            .filter(|check| matches!(check.outcome, Outcome::Invalid { .. }));
        let found: Vec<&str> = found.map(|check| check.name.as_str()).collect();
        assert!(found.contains(name), "{lie}: {found:?}");
    }
}

#[test]
fn without_the_journal_nothing_is_said_to_be_complete() {
    let mut history = story();
    history.events.retain(|event| event.f != "rows");
    let checks = check(&history, &Context::default());
    let unknown = checks
        .iter()
        .filter(|check| matches!(check.outcome, Outcome::Unknown { .. }));
    assert_eq!(unknown.count(), 4, "{checks:#?}");
}
