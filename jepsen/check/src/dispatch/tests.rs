//! A good history, and what each alteration of it violates.

use serde_json::{Value, json};

use super::check;
use crate::evidence::MS;
use crate::history::Kind;
use crate::sketch::{Sketch, all_hold, violated};

fn row(index: u64, action: &str, job: &str, detail: Value) -> Value {
    json!({"index": index, "ordinal": 0, "at_ms": index, "action": action, "subject": job, "detail": detail,
           "request": if action == "dispatch.submitted" { format!("k{}", &job[1..]) } else { String::new() }})
}

/// `j1` runs once; `j2` is tried twice; `j3` is cancelled before it begins; `j4` was never answered, and ran.
fn good() -> Sketch {
    let mut sketch = Sketch::default();
    for (number, at, effect) in [
        (1, 10, "once"),
        (2, 20, "idempotent"),
        (3, 30, "once"),
        (4, 40, "once"),
    ] {
        let (job, key) = (format!("j{number}"), format!("k{number}"));
        let submit = json!({"device": "d", "effect": effect});
        let line = sketch.ok(at, at + 5, "submit", submit, json!({"job": job}));
        line.request = Some(key);
        if number == 4 {
            (line.kind, line.answer) = (Kind::Info, json!({}));
        }
    }
    // Sent again under the same key.
    let again = sketch.ok(
        50,
        55,
        "submit",
        json!({"device": "d", "effect": "once"}),
        json!({"job": "j1"}),
    );
    again.request = Some("k1".to_owned());
    sketch.ok(
        60,
        65,
        "cancel",
        json!({"job": "j3"}),
        json!({"state": "cancelled"}),
    );
    for (job, attempt, at, outcome) in [
        ("j1", 1, 100, "succeeded"),
        ("j2", 1, 110, ""),
        ("j2", 2, 300, "succeeded"),
        ("j4", 1, 120, "failed"),
    ] {
        let known = json!({"job": job, "attempt": attempt, "epoch": 9, "device": "d"});
        sketch.ok(at, at, "deliver", known.clone(), json!({}));
        if !outcome.is_empty() {
            let mut done = known;
            done["outcome"] = json!(outcome);
            sketch.ok(at + 50, at + 60, "complete", done, json!({}));
        }
    }
    for (job, state) in [
        ("j1", "succeeded"),
        ("j2", "succeeded"),
        ("j3", "cancelled"),
        ("j4", "failed"),
    ] {
        sketch.ok(900, 901, "job", json!({"job": job}), json!({"state": state}));
    }
    sketch.ok(910, 920, "rows", json!({}), json!({"rows": rows(), "end": true}));
    sketch
}

fn rows() -> Vec<Value> {
    let attempt = |number: u64| json!({"attempt": number.to_string()});
    let state = |state: &str| json!({"state": state});
    vec![
        row(1, "dispatch.submitted", "j1", json!({})),
        row(2, "dispatch.submitted", "j2", json!({})),
        row(3, "dispatch.submitted", "j3", json!({})),
        row(4, "dispatch.submitted", "j4", json!({})),
        row(5, "dispatch.finished", "j3", state("cancelled")),
        row(6, "dispatch.assigned", "j1", attempt(1)),
        row(7, "dispatch.assigned", "j2", attempt(1)),
        row(8, "dispatch.assigned", "j4", attempt(1)),
        row(9, "dispatch.finished", "j1", state("succeeded")),
        row(10, "dispatch.finished", "j4", state("failed")),
        row(11, "dispatch.attempt_ended", "j2", attempt(1)),
        row(12, "dispatch.assigned", "j2", attempt(2)),
        row(13, "dispatch.finished", "j2", state("succeeded")),
    ]
}

fn altered(alter: impl FnOnce(&mut Sketch)) -> Vec<String> {
    let mut sketch = good();
    alter(&mut sketch);
    let checks = check(&sketch.history());
    violated(&checks).into_iter().map(str::to_owned).collect()
}

fn alter_rows(sketch: &mut Sketch, alter: impl FnOnce(&mut Vec<Value>)) {
    alter(sketch.nth("rows", 0).answer["rows"].as_array_mut().expect("rows"));
}

#[test]
fn a_good_history_holds() {
    let checks = check(&good().history());
    all_hold(&checks);
    assert_eq!(checks.len(), 7);
}

#[test]
fn jobs_that_vanish_hang_or_end_twice_are_found() {
    assert_eq!(
        altered(|s| s.nth("job", 0).kind = Kind::Fail),
        ["dispatch.all-end"]
    );
    assert_eq!(
        altered(|s| s.nth("job", 1).answer["state"] = json!("dispatched")),
        ["dispatch.all-end", "dispatch.one-completion"]
    );
    let twice = |s: &mut Sketch| {
        alter_rows(s, |rows| {
            rows.push(row(14, "dispatch.finished", "j1", json!({"state": "failed"})))
        });
    };
    assert_eq!(altered(twice), ["dispatch.all-end"]);
    // Of very many that have ended the oldest are forgotten.
    let many = |s: &mut Sketch| {
        s.nth("job", 0).kind = Kind::Fail;
        alter_rows(s, |rows| {
            let other = |number: u64| {
                let id = format!("other-{number}");
                row(14 + number, "dispatch.finished", &id, json!({"state": "failed"}))
            };
            rows.extend((0..10_000).map(other));
        });
    };
    assert_eq!(altered(many), Vec::<String>::new());
}

#[test]
fn an_attempt_that_is_delivered_again_is_found() {
    let again = |s: &mut Sketch| {
        let known = json!({"job": "j2", "attempt": 1, "epoch": 12, "device": "d"});
        s.ok(200, 200, "deliver", known, json!({}));
    };
    let found = altered(again);
    assert!(found.contains(&"dispatch.delivered-once".to_owned()), "{found:?}");
    assert!(
        found.contains(&"dispatch.effects".to_owned()),
        "begun three times, assigned twice: {found:?}"
    );
}

#[test]
fn a_result_of_an_attempt_that_was_over_is_found() {
    let late = |s: &mut Sketch, kind| {
        let done = json!({"job": "j2", "attempt": 1, "epoch": 9, "device": "d", "outcome": "failed"});
        s.line(310, 320, kind, "complete", done, json!({}));
    };
    assert_eq!(altered(|s| late(s, Kind::Ok)), ["dispatch.attempts-follow"]);
    assert!(altered(|s| late(s, Kind::Fail)).is_empty());
    let open = |s: &mut Sketch| {
        alter_rows(s, |rows| {
            rows.retain(|row| row["action"] != "dispatch.attempt_ended")
        })
    };
    assert_eq!(altered(open), ["dispatch.attempts-follow"]);
    let after = |s: &mut Sketch| {
        alter_rows(s, |rows| {
            rows.push(row(14, "dispatch.assigned", "j1", json!({"attempt": "2"})))
        });
    };
    assert_eq!(altered(after), ["dispatch.attempts-follow"]);
}

#[test]
fn two_results_that_count_are_found() {
    let twice = |s: &mut Sketch| {
        let done = json!({"job": "j1", "attempt": 1, "epoch": 9, "device": "d", "outcome": "succeeded"});
        s.ok(170, 180, "complete", done, json!({}));
    };
    assert_eq!(altered(twice), ["dispatch.one-completion"]);
    assert_eq!(
        altered(|s| s.nth("job", 0).answer["state"] = json!("session_lost")),
        ["dispatch.one-completion"]
    );
}

#[test]
fn effects_that_are_too_many_or_of_nothing_are_found() {
    let effects = |list: Value| {
        move |s: &mut Sketch| {
            s.without("deliver");
            s.without("complete");
            s.ok(
                899,
                899,
                "effects",
                json!({"device": "d"}),
                json!({"effects": list}),
            );
        }
    };
    let one = |job: &str, ms: u64| json!({"job": job, "from": ms * MS, "to": null});
    let good = vec![one("j1", 100), one("j2", 110), one("j2", 300), one("j4", 120)];
    assert!(altered(effects(json!(good))).is_empty());
    let more = |extra: Value| {
        let mut list = good.clone();
        list.push(extra);
        altered(effects(json!(list)))
    };
    assert_eq!(more(one("j1", 400)), ["dispatch.effects"], "once, twice");
    assert_eq!(
        more(one("j2", 400)),
        ["dispatch.effects"],
        "more often than assigned"
    );
    assert_eq!(more(one("j9", 400)), ["dispatch.effects"], "nobody asked for it");
    assert_eq!(
        more(one("j3", 400)),
        ["dispatch.cancelled-stays"],
        "after the cancel"
    );
    assert_eq!(
        altered(effects(json!(good[1..]))),
        ["dispatch.effects"],
        "succeeded without an effect"
    );
}

#[test]
fn keys_that_make_two_jobs_or_refused_ones_that_make_one_are_found() {
    assert_eq!(
        altered(|s| s.nth("submit", 4).answer["job"] = json!("j3")),
        ["dispatch.one-job-per-key"]
    );
    let two = |s: &mut Sketch| {
        alter_rows(s, |rows| {
            let mut again = row(14, "dispatch.submitted", "j7", json!({}));
            again["request"] = json!("k1");
            rows.push(again);
        });
    };
    assert_eq!(altered(two), ["dispatch.one-job-per-key"]);
    let nobody = |s: &mut Sketch| {
        alter_rows(s, |rows| {
            rows.push(row(14, "dispatch.submitted", "j8", json!({})))
        })
    };
    assert_eq!(altered(nobody), ["dispatch.one-job-per-key"]);
    assert_eq!(
        altered(|s| s.nth("submit", 3).kind = Kind::Fail),
        ["dispatch.one-job-per-key"]
    );
    let lost = |s: &mut Sketch| alter_rows(s, |rows| drop(rows.remove(0)));
    assert_eq!(altered(lost), ["dispatch.one-job-per-key"]);
}

#[test]
fn a_cancelled_job_that_begins_is_found() {
    let begins = |s: &mut Sketch| {
        s.ok(
            70,
            70,
            "deliver",
            json!({"job": "j3", "attempt": 1, "epoch": 9, "device": "d"}),
            json!({}),
        );
    };
    assert_eq!(altered(begins), ["dispatch.cancelled-stays"]);
    let goes_on = |s: &mut Sketch| {
        alter_rows(s, |rows| {
            rows.insert(11, row(11, "dispatch.cancelling", "j2", json!({})));
            rows[11]["ordinal"] = json!(1);
        });
    };
    assert_eq!(altered(goes_on), ["dispatch.cancelled-stays"]);
    let waits_on = |s: &mut Sketch| s.nth("cancel", 0).answer["state"] = json!("queued");
    assert_eq!(altered(waits_on), ["dispatch.cancelled-stays"]);
}

#[test]
fn what_was_not_read_is_unknown_and_not_valid() {
    for f in ["rows", "job"] {
        let mut sketch = good();
        sketch.without(f);
        let checks = check(&sketch.history());
        assert!(violated(&checks).is_empty());
        assert!(checks.iter().any(|check| !check.holds()), "{f}");
    }
    let mut sketch = good();
    sketch.nth("deliver", 0).value = json!({"job": "j1"});
    assert_eq!(check(&sketch.history())[0].name, "dispatch.history");
}
