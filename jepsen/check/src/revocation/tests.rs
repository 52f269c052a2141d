//! A good history, and what each alteration of it violates.

use serde_json::{Value, json};

use super::{Bounds, check};
use crate::evidence::{MS, Setting, Window};
use crate::history::Kind;
use crate::sketch::{Sketch, all_hold, violated};

const NODES: [&str; 3] = ["r1", "r2", "r3"];

fn probe(s: &mut Sketch, at: u64, device: &str, node: &str, answer: Value) {
    let line = s.ok(
        at,
        at + 5,
        "probe",
        json!({"device": device, "how": "grpc"}),
        answer,
    );
    line.node = Some(node.to_owned());
}

fn yes() -> Value {
    json!({"accepted": true})
}

fn no(reason: &str) -> Value {
    json!({"accepted": false, "reason": reason})
}

/// `a` and `b` are accepted; `a` is revoked at 1 s while r3 is cut off, and accepted there for a while; `b` never is.
fn good() -> Sketch {
    let mut s = Sketch::default();
    for node in NODES {
        probe(&mut s, 100, "a", node, yes());
        probe(&mut s, 200, "b", node, yes());
        probe(&mut s, 30_000, "b", node, yes());
    }
    let stream = |number: u64, device: &str| json!({"device": device, "stream": number});
    let ended = s.ok(50, 1_150, "stream", stream(1, "a"), json!({"end": "revoked"}));
    ended.node = Some("r1".to_owned());
    let open = s.line(60, 60_000, Kind::Info, "stream", stream(2, "b"), json!({}));
    open.node = Some("r2".to_owned());
    s.ok(
        1_000,
        1_100,
        "revoke",
        json!({"device": "a"}),
        json!({"enforced": false}),
    );
    probe(&mut s, 1_200, "a", "r1", no("revoked"));
    probe(&mut s, 1_200, "a", "r2", no("revoked"));
    probe(&mut s, 1_200, "a", "r3", yes());
    s.ok(
        5_900,
        6_000,
        "revoke",
        json!({"device": "a"}),
        json!({"enforced": true}),
    );
    probe(&mut s, 8_000, "a", "r1", no("revoked"));
    probe(&mut s, 8_000, "a", "r2", no("revoked"));
    probe(&mut s, 8_000, "a", "r3", no("stale"));
    probe(&mut s, 8_000, "b", "r3", no("stale"));
    probe(&mut s, 30_000, "a", "r3", no("revoked"));
    s
}

fn setting() -> Setting {
    Setting {
        faults: vec![Window {
            from: 900 * MS,
            to: 9_000 * MS,
            name: "partition".to_owned(),
            isolated: vec!["r3".to_owned()],
        }],
        ..Setting::default()
    }
}

fn altered(alter: impl FnOnce(&mut Sketch)) -> Vec<String> {
    let mut sketch = good();
    alter(&mut sketch);
    let checks = check(&sketch.history(), &setting(), &Bounds::default());
    violated(&checks).into_iter().map(str::to_owned).collect()
}

#[test]
fn a_good_history_holds() {
    let checks = check(&good().history(), &setting(), &Bounds::default());
    all_hold(&checks);
    assert_eq!(checks.len(), 6);
    assert_eq!(checks[1].facts["last_accepted_after_ms"], 100);
}

#[test]
fn an_answer_that_is_not_true_is_found() {
    let found = altered(|s| s.nth("revoke", 0).answer = json!({"enforced": true}));
    assert_eq!(found, ["revocation.answer-true"]);
}

#[test]
fn acceptance_after_the_bound_is_found_on_new_connections_and_open_sessions() {
    let late = |f: &'static str| {
        move |s: &mut Sketch| {
            s.nth("revoke", 1).kind = Kind::Info;
            let line = s.ok(
                7_210,
                7_215,
                f,
                json!({"device": "a", "stream": 1}),
                json!({"accepted": true}),
            );
            line.node = Some("r3".to_owned());
        }
    };
    for f in ["probe", "ping"] {
        let found = altered(late(f));
        assert!(found.contains(&"revocation.bounded".to_owned()), "{f}: {found:?}");
        assert!(
            found.contains(&"revocation.monotone".to_owned()),
            "{f}: {found:?}"
        );
    }
}

#[test]
fn a_replica_that_is_alone_and_serves_is_found() {
    let alone = |at: u64| {
        altered(move |s| {
            probe(s, at, "b", "r3", json!({"accepted": true}));
        })
    };
    assert_eq!(alone(7_000), ["revocation.fail-closed"]);
    assert!(alone(6_800).is_empty(), "its authority had not run out");
    assert!(alone(9_001).is_empty(), "it is alone no more");
}

#[test]
fn a_replica_that_forgets_a_revocation_is_found() {
    let forgets = |s: &mut Sketch| {
        s.nth("revoke", 1).kind = Kind::Info;
        probe(s, 2_000, "a", "r1", json!({"accepted": true}));
    };
    assert_eq!(altered(forgets), ["revocation.monotone"]);
    let stranger = |s: &mut Sketch| {
        probe(
            s,
            2_000,
            "b",
            "r1",
            json!({"accepted": false, "reason": "revoked"}),
        )
    };
    assert_eq!(altered(stranger), ["revocation.monotone"]);
}

#[test]
fn sessions_that_stay_open_are_found() {
    let stays = |s: &mut Sketch| s.nth("stream", 0).kind = Kind::Info;
    assert_eq!(altered(stays), ["revocation.streams-end"]);
    // Cut off until 9 s, 5 s to recover, 6 s of bound.
    let ends = |at: u64| move |s: &mut Sketch| s.nth("stream", 0).to = at;
    assert!(altered(ends(19_000)).is_empty());
    assert_eq!(altered(ends(20_200)), ["revocation.streams-end"]);
}

#[test]
fn refusing_everybody_is_found() {
    let refuse = |s: &mut Sketch| {
        s.each("probe")
            .filter(|line| line.from == 30_000 && line.value["device"] == "b")
            .for_each(|line| {
                line.answer = json!({"accepted": false, "reason": "stale"});
            });
    };
    assert_eq!(altered(refuse), ["revocation.open"]);
    // Silence, at the end, of one that had answered.
    let silent = |s: &mut Sketch| {
        for at in [31_000, 32_000, 33_000] {
            probe(s, at, "b", "r2", json!({}));
        }
        s.each("probe")
            .filter(|line| line.from > 30_000)
            .for_each(|line| line.kind = Kind::Info);
    };
    assert_eq!(altered(silent), ["revocation.open"]);
}

#[test]
fn what_was_not_tried_is_unknown_and_not_valid() {
    let mut sketch = good();
    sketch.without("revoke");
    let checks = check(&sketch.history(), &setting(), &Bounds::default());
    assert!(checks.iter().all(|check| !check.holds()) && violated(&checks).is_empty());
    let mut sketch = good();
    sketch.each("probe").for_each(|line| {
        if line.value["device"] == "b" {
            line.kind = Kind::Info;
        }
    });
    let checks = check(&sketch.history(), &setting(), &Bounds::default());
    assert!(violated(&checks).is_empty());
    let open = checks.iter().find(|check| check.name == "revocation.open");
    assert!(open.is_some_and(|check| !check.holds()));
    let mut sketch = good();
    sketch.nth("probe", 0).node = None;
    let checks = check(&sketch.history(), &setting(), &Bounds::default());
    assert_eq!(checks[0].name, "revocation.history");
}

#[test]
fn what_a_revocation_took_is_told_by_the_fault_it_was_answered_under() {
    let checks = check(&good().history(), &setting(), &Bounds::default());
    let bounded = checks.iter().find(|check| check.name == "revocation.bounded");
    let expected = json!({
        "partition": {"revoked": 1, "last_accepted_after_ms": 100, "last_session_ended_after_ms": 50},
    });
    assert_eq!(bounded.expect("a check").facts["by_fault"], expected);
    let calm = Setting::default();
    assert!(calm.faults_at(5).contains("none"));
}
