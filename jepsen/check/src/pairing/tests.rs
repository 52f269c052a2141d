//! A good history, and what each alteration of it violates.

use serde_json::{Value, json};

use super::check;
use crate::evidence::{MS, Setting, Window};
use crate::history::Kind;
use crate::sketch::{Sketch, all_hold, violated};

fn row(index: u64, action: &str, subject: &str, detail: Value) -> Value {
    json!({"index": index, "ordinal": 0, "at_ms": index, "action": action, "subject": subject, "detail": detail})
}

/// `c1` has two rivals and an approval that is sent twice; `c2` is taken back; `c3` runs out; `c4` is somebody's
/// alone; the one who has `c5` never hears the answer.
fn good() -> Sketch {
    let mut s = Sketch::default();
    for (number, at) in [(1, 10), (2, 20), (3, 30), (4, 40), (5, 50)] {
        let mint = json!({"method": "ticket", "ttl_ms": 30_000});
        let line = s.ok(at, at + 5, "mint", mint, json!({"code": format!("c{number}")}));
        line.request = Some(format!("m{number}"));
    }
    let redeem = |code: &str, device: &str| json!({"code": code, "device": device});
    s.ok(100, 200, "redeem", redeem("c1", "a"), json!({"pairing": "p1"}));
    s.line(100, 190, Kind::Fail, "redeem", redeem("c1", "b"), json!({}));
    s.line(
        90,
        95,
        Kind::Fail,
        "redeem",
        json!({"code": "c1", "device": "b", "wrong": true}),
        json!({}),
    );
    s.ok(100, 110, "close", json!({"code": "c2"}), json!({}));
    s.line(120, 130, Kind::Fail, "redeem", redeem("c2", "a"), json!({}));
    s.line(40_000, 40_010, Kind::Fail, "redeem", redeem("c3", "a"), json!({}));
    let alone = json!({"code": "c4", "device": "d", "alone": true});
    s.ok(300, 310, "redeem", alone, json!({"pairing": "p4"}));
    s.line(300, 5_000, Kind::Info, "redeem", redeem("c5", "e"), json!({}));
    for (pairing, device, at) in [("p1", "a", 400), ("p1", "a", 500), ("p4", "d", 600)] {
        let certificate = json!({"certificate": format!("of {pairing}")});
        let fetched = json!({"state": "approved", "certificate": format!("of {pairing}")});
        s.ok(at, at + 10, "approve", json!({"pairing": pairing}), certificate);
        s.ok(
            at + 20,
            at + 30,
            "fetch",
            json!({"pairing": pairing, "device": device}),
            fetched,
        );
    }
    s.ok(
        50_000,
        50_010,
        "rows",
        json!({}),
        json!({"rows": rows(), "end": true}),
    );
    s
}

fn rows() -> Vec<Value> {
    let mut rows = Vec::new();
    for number in 1..=5 {
        let code = format!("c{number}");
        rows.push(row(
            number,
            "pairing.code_minted",
            &code,
            json!({"number": format!("C{number}")}),
        ));
    }
    for (index, pairing, device, number) in [
        (10, "p1", "a", "C1"),
        (11, "p4", "d", "C4"),
        (12, "p5", "e", "C5"),
    ] {
        rows.push(row(
            index,
            "pairing.proved",
            pairing,
            json!({"device": device, "number": number}),
        ));
    }
    for (index, pairing) in [(20, "p1"), (21, "p4")] {
        rows.push(row(
            index,
            "pairing.approved",
            pairing,
            json!({"fingerprint": format!("of {pairing}")}),
        ));
    }
    rows
}

fn setting() -> Setting {
    Setting {
        epoch_ms: Some(0),
        ..Setting::default()
    }
}

fn altered(alter: impl FnOnce(&mut Sketch)) -> Vec<String> {
    let mut sketch = good();
    alter(&mut sketch);
    let checks = check(&sketch.history(), &setting());
    violated(&checks).into_iter().map(str::to_owned).collect()
}

fn has(found: &[String], name: &str) -> bool {
    found.iter().any(|one| one == name)
}

#[test]
fn a_good_history_holds() {
    let checks = check(&good().history(), &setting());
    all_hold(&checks);
    assert_eq!(checks.len(), 6);
}

#[test]
fn a_code_with_two_winners_is_found() {
    let two = |s: &mut Sketch| {
        let line = s.nth("redeem", 1);
        (line.kind, line.answer) = (Kind::Ok, json!({"pairing": "p9"}));
    };
    let found = altered(two);
    assert!(
        has(&found, "pairing.one-winner") && has(&found, "pairing.one-certificate"),
        "{found:?}"
    );
    // The journal has two proofs of one code, whatever was answered.
    let proofs = |s: &mut Sketch| {
        s.nth("redeem", 1).kind = Kind::Info;
        let rows = s.nth("rows", 0).answer["rows"].as_array_mut().expect("rows");
        rows.push(row(
            13,
            "pairing.proved",
            "p9",
            json!({"device": "b", "number": "C1"}),
        ));
    };
    assert_eq!(altered(proofs), ["pairing.one-certificate"]);
}

#[test]
fn another_answer_to_the_same_question_is_found() {
    let other = altered(|s| s.nth("fetch", 1).answer["certificate"] = json!("another"));
    assert!(has(&other, "pairing.same-answer"), "{other:?}");
    let mint = |s: &mut Sketch| {
        let mint = json!({"method": "ticket", "ttl_ms": 30_000});
        s.ok(60, 65, "mint", mint, json!({"code": "c9"})).request = Some("m1".to_owned());
    };
    assert_eq!(altered(mint), ["pairing.same-answer"]);
    let shared = altered(|s| {
        s.nth("approve", 2).answer["certificate"] = json!("of p1");
        s.nth("fetch", 2).answer["certificate"] = json!("of p1");
    });
    assert!(has(&shared, "pairing.same-answer"), "{shared:?}");
}

#[test]
fn success_out_of_time_is_found() {
    let takes = |at: usize, pairing: &'static str| {
        move |s: &mut Sketch| {
            let line = s.nth("redeem", at);
            (line.kind, line.answer) = (Kind::Ok, json!({"pairing": pairing}));
            let (code, device) = (line.value["code"].clone(), line.value["device"].clone());
            let number = code.as_str().expect("a code").to_uppercase();
            let rows = s.nth("rows", 0).answer["rows"].as_array_mut().expect("rows");
            rows.push(row(
                14,
                "pairing.proved",
                pairing,
                json!({"device": device, "number": number}),
            ));
        }
    };
    assert_eq!(altered(takes(3, "p2")), ["pairing.in-time"], "taken back");
    assert_eq!(altered(takes(4, "p3")), ["pairing.in-time"], "run out");
    let early = |s: &mut Sketch| (s.nth("redeem", 5).from, s.nth("redeem", 5).to) = (1, 2);
    assert_eq!(altered(early), ["pairing.in-time"]);
    let unapproved = |s: &mut Sketch| {
        s.each("approve")
            .filter(|line| line.value["pairing"] == "p4")
            .for_each(|line| line.kind = Kind::Fail);
    };
    let found = altered(unapproved);
    assert!(
        has(&found, "pairing.in-time") && has(&found, "pairing.one-certificate"),
        "{found:?}"
    );
    let rejected = |s: &mut Sketch| {
        drop(
            s.ok(450, 460, "reject", json!({"pairing": "p4"}), json!({}))
                .node
                .take(),
        )
    };
    assert_eq!(altered(rejected), ["pairing.in-time"]);
    // Where the clock was moved, nothing is said of its end.
    let mut sketch = good();
    takes(4, "p3")(&mut sketch);
    all_hold(&check(&sketch.history(), &Setting::default()));
}

#[test]
fn a_wrong_secret_that_is_taken_is_found() {
    let wrong = |s: &mut Sketch| {
        let line = s.nth("redeem", 0);
        line.value["wrong"] = json!(true);
    };
    assert_eq!(altered(wrong), ["pairing.proof-needed"]);
}

#[test]
fn a_journal_that_disagrees_is_found() {
    let alter = |change: fn(&mut Vec<Value>)| {
        altered(move |s| change(s.nth("rows", 0).answer["rows"].as_array_mut().expect("rows")))
    };
    let lacks = alter(|rows| rows.retain(|row| row["subject"] != "p4" || row["action"] != "pairing.proved"));
    assert_eq!(lacks, ["pairing.one-certificate"]);
    let other = alter(|rows| rows[9]["detail"]["fingerprint"] = json!("another"));
    assert_eq!(other, ["pairing.one-certificate"]);
    let twice = alter(|rows| {
        let mut again = rows[9].clone();
        again["index"] = json!(30);
        rows.push(again);
    });
    assert_eq!(twice, ["pairing.one-certificate"]);
    let stranger = alter(|rows| rows[5]["detail"]["device"] = json!("z"));
    assert_eq!(stranger, ["pairing.one-certificate"]);
}

#[test]
fn a_good_code_that_fails_in_peace_is_found() {
    let fails = |s: &mut Sketch| {
        s.nth("redeem", 5).kind = Kind::Fail;
    };
    let found = altered(fails);
    assert!(has(&found, "pairing.live"), "{found:?}");
    let mut sketch = good();
    sketch.nth("redeem", 5).kind = Kind::Info;
    let mut faulty = setting();
    faulty.faults = vec![Window {
        from: 250 * MS,
        to: 305 * MS,
        ..Window::default()
    }];
    let checks = check(&sketch.history(), &faulty);
    assert!(violated(&checks).is_empty(), "{checks:?}");
    let expired = |s: &mut Sketch| s.nth("fetch", 0).answer = json!({"state": "expired"});
    assert_eq!(altered(expired), ["pairing.live"]);
    for (state, expected) in [("pending", None), ("rejected", Some("pairing.live"))] {
        let mut sketch = good();
        sketch.nth("fetch", 0).answer = json!({"state": state});
        faulty.faults[0].to = u64::MAX;
        let checks = check(&sketch.history(), &faulty);
        assert_eq!(violated(&checks).first().copied(), expected, "{state}");
    }
}

#[test]
fn what_was_not_read_is_unknown_and_not_valid() {
    let mut sketch = good();
    sketch.without("rows");
    let checks = check(&sketch.history(), &setting());
    assert!(violated(&checks).is_empty() && checks.iter().any(|check| !check.holds()));
    let mut sketch = good();
    sketch.nth("redeem", 0).value = json!({"code": "c1"});
    assert_eq!(check(&sketch.history(), &setting())[0].name, "pairing.history");
}
