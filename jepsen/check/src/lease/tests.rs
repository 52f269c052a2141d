//! A good history, and what each alteration of it violates.

use serde_json::{Value, json};

use super::check;
use crate::evidence::{MS, Setting, Window};
use crate::history::Kind;
use crate::sketch::{Sketch, all_hold, violated};

const EPOCH: u64 = 1_000_000;

fn row(index: u64, at_ms: u64, action: &str, subject: &str, detail: Value) -> Value {
    json!({"index": index, "ordinal": 0, "at_ms": EPOCH + at_ms, "action": action, "subject": subject,
           "detail": detail})
}

fn of_lease(index: u64, at: u64, action: &str, lease: (&str, &str, u64), more: &[(&str, String)]) -> Value {
    let (id, run, fence) = lease;
    let mut detail = json!({"device": "a", "run": run, "slot": "0", "fence": fence.to_string()});
    for (name, value) in more {
        detail[*name] = json!(value);
    }
    row(index, at, action, id, detail)
}

/// Two runs in one slot: the first lease ends by itself (its worker is silent), its run goes on under another one in
/// the same slot and finishes, then comes the second run.
fn good() -> Sketch {
    let mut sketch = Sketch::default();
    for (run, at) in [("r1", 10), ("r2", 20)] {
        sketch.ok(at, at + 5, "start", json!({"run": run}), json!({}));
    }
    let leases = [
        ("L1", "r1", 5, 100),
        ("L2", "r1", 7, 1_700),
        ("L3", "r2", 9, 2_300),
    ];
    for (lease, run, fence, at) in leases {
        let known = json!({"lease": lease, "fence": fence});
        let offer = json!({"lease": lease, "fence": fence, "run": run, "slot": "a/0"});
        sketch.ok(at, at + 10, "accept", offer, json!({})).request = Some(format!("accept {lease}"));
        let until = json!({"until": (at + 1_010) * MS});
        sketch.ok(at + 20, at + 30, "renew", known.clone(), until);
        let write = json!({"run": run, "slot": "a/0", "fence": fence});
        sketch.ok(at + 100, at + 100, "touch", write, json!({}));
        if lease != "L1" {
            let finish = json!({"lease": lease, "fence": fence, "outcome": "succeeded"});
            sketch.ok(at + 300, at + 320, "finish", finish, json!({}));
            sketch.ok(at + 330, at + 330, "stop", known.clone(), json!({}));
            sketch.ok(at + 340, at + 350, "clean", known, json!({}));
        }
    }
    sketch.ok(
        1_100,
        1_100,
        "stop",
        json!({"lease": "L1", "fence": 5}),
        json!({}),
    );
    sketch.ok(
        4_000,
        4_001,
        "run",
        json!({"run": "r1"}),
        json!({"state": "succeeded", "fence": 7}),
    );
    sketch.ok(
        4_000,
        4_001,
        "run",
        json!({"run": "r2"}),
        json!({"state": "succeeded", "fence": 9}),
    );
    sketch.ok(
        4_010,
        4_020,
        "rows",
        json!({}),
        json!({"rows": rows(), "end": true}),
    );
    sketch
}

fn rows() -> Vec<Value> {
    let deadline = |at: u64| ("deadline_at", (EPOCH + at).to_string());
    let why = |reason: &str| ("reason", reason.to_owned());
    let clean = |clean: bool| ("clean", clean.to_string());
    let (l1, l2, l3) = (("L1", "r1", 5), ("L2", "r1", 7), ("L3", "r2", 9));
    let finished = |fence: u64| json!({"state": "succeeded", "fence": fence.to_string()});
    vec![
        row(3, 12, "run.submitted", "r1", json!({})),
        row(4, 22, "run.submitted", "r2", json!({})),
        of_lease(5, 90, "lease.granted", l1, &[deadline(1_090)]),
        of_lease(6, 1_500, "lease.ending", l1, &[deadline(1_400), why("expired")]),
        of_lease(6, 1_500, "lease.ended", l1, &[clean(false)]),
        of_lease(7, 1_690, "lease.granted", l2, &[deadline(2_690)]),
        row(8, 2_010, "run.finished", "r1", finished(7)),
        of_lease(8, 2_010, "lease.ending", l2, &[deadline(2_690), why("finished")]),
        of_lease(8, 2_045, "lease.ended", l2, &[clean(true)]),
        of_lease(9, 2_290, "lease.granted", l3, &[deadline(3_290)]),
        row(10, 2_610, "run.finished", "r2", finished(9)),
    ]
    .into_iter()
    .enumerate()
    .map(|(ordinal, mut row)| {
        row["ordinal"] = json!(ordinal);
        row
    })
    .collect()
}

fn setting() -> Setting {
    Setting {
        epoch_ms: Some(EPOCH),
        recover_ms: 500,
        ..Setting::default()
    }
}

/// What is violated when the good history is altered.
fn altered(alter: impl FnOnce(&mut Sketch)) -> Vec<String> {
    let mut sketch = good();
    alter(&mut sketch);
    let checks = check(&sketch.history(), &setting());
    violated(&checks).into_iter().map(str::to_owned).collect()
}

/// Alters a row: the one at a place among those of an action.
fn alter_row(sketch: &mut Sketch, action: &str, at: usize, alter: impl FnOnce(&mut Value)) {
    let rows = sketch.nth("rows", 0).answer["rows"].as_array_mut().expect("rows");
    let mut named = rows.iter_mut().filter(|row| row["action"] == action);
    alter(named.nth(at).expect("so many rows"));
}

#[test]
fn a_good_history_holds() {
    let checks = check(&good().history(), &setting());
    all_hold(&checks);
    assert_eq!(checks.len(), 8);
}

#[test]
fn tokens_that_do_not_rise_are_found() {
    let same = |sketch: &mut Sketch| {
        alter_row(sketch, "lease.granted", 1, |row| {
            row["detail"]["fence"] = json!("4")
        });
    };
    assert!(altered(same).contains(&"lease.tokens-rise".to_owned()));
    // The worker was told another number than the journal has.
    assert!(
        altered(|s| s.nth("accept", 2).value["fence"] = json!(11)).contains(&"lease.tokens-rise".to_owned())
    );
    // Two leases with one number.
    let twice = altered(|s| {
        for f in ["accept", "renew", "finish", "stop", "clean", "touch"] {
            for line in s.each(f).filter(|line| line.value["fence"] == 9) {
                line.value["fence"] = json!(7);
            }
        }
    });
    assert!(twice.contains(&"lease.tokens-rise".to_owned()), "{twice:?}");
    // A lease that was never granted.
    let rows = |s: &mut Sketch| {
        let rows = s.nth("rows", 0).answer["rows"].as_array_mut().expect("rows");
        rows.retain(|row| row["action"] != "lease.granted" || row["subject"] != "L3");
    };
    assert_eq!(altered(rows), ["lease.tokens-rise"]);
}

#[test]
fn a_stale_write_that_is_taken_is_found_and_one_that_is_refused_is_right() {
    let stale = |s: &mut Sketch, kind| {
        let write = json!({"run": "r1", "slot": "a/0", "fence": 5});
        s.line(1_900, 1_901, kind, "touch", write, json!({}));
    };
    assert_eq!(altered(|s| stale(s, Kind::Ok)), ["lease.fenced-resource"]);
    assert!(altered(|s| stale(s, Kind::Fail)).is_empty());
    assert!(altered(|s| stale(s, Kind::Info)).is_empty());
}

#[test]
fn a_stale_word_that_the_server_takes_is_found_but_not_the_repetition_of_an_old_one() {
    let late = |s: &mut Sketch, request: &str| {
        let offer = json!({"lease": "L1", "fence": 5, "run": "r1", "slot": "a/0"});
        s.ok(1_900, 1_910, "accept", offer, json!({})).request = Some(request.to_owned());
    };
    assert_eq!(altered(|s| late(s, "new")), ["lease.fenced-control"]);
    assert!(altered(|s| late(s, "accept L1")).is_empty());
    let late = |s: &mut Sketch, kind| {
        let finish = json!({"lease": "L1", "fence": 5, "outcome": "refused"});
        s.line(1_900, 1_910, kind, "finish", finish, json!({}));
    };
    assert_eq!(altered(|s| late(s, Kind::Ok)), ["lease.fenced-control"]);
    assert!(altered(|s| late(s, Kind::Fail)).is_empty());
}

#[test]
fn two_holders_at_one_time_are_found() {
    // The first believes in its lease for longer than until the second begins.
    let long = |s: &mut Sketch| {
        s.nth("renew", 0).answer["until"] = json!(1_800 * MS);
        s.each("stop").for_each(|line| {
            if line.value["lease"] == "L1" {
                (line.from, line.to) = (1_800, 1_800);
            }
        });
    };
    let found = altered(long);
    assert!(found.contains(&"lease.exclusive".to_owned()), "{found:?}");
    // A program that lived on beside the next one.
    let program = |from: u64, to: u64| {
        move |s: &mut Sketch| {
            let held = json!({"run": "r1", "fence": 5, "from": from * MS, "to": to * MS});
            s.ok(4_000, 4_000, "held", held, json!({}));
        }
    };
    assert_eq!(altered(program(150, 1_740)), ["lease.exclusive"]);
    assert!(altered(program(150, 1_720)).is_empty());
}

#[test]
fn a_place_that_is_given_away_early_is_found() {
    let early = altered(|s| {
        s.nth("renew", 0).answer["until"] = json!(1_705 * MS);
    });
    assert!(early.contains(&"lease.not-early".to_owned()), "{early:?}");
    // Whoever came back without it has given it back.
    let back = altered(|s| {
        s.nth("renew", 0).answer["until"] = json!(1_705 * MS);
        s.nth("stop", 0).from = 1_400;
        s.ok(
            1_410,
            1_420,
            "report",
            json!({"device": "a", "held": []}),
            json!({}),
        );
    });
    assert!(back.is_empty(), "{back:?}");
    // The journal frees the slot before the promised end, though nobody was offered it yet.
    let freed = altered(|s| {
        alter_row(s, "lease.ending", 0, |row| row["at_ms"] = json!(EPOCH + 1_050));
    });
    assert_eq!(freed, ["lease.not-early"]);
}

#[test]
fn a_slot_that_stays_taken_is_found_unless_faults_took_the_time() {
    let late = |s: &mut Sketch| {
        alter_row(s, "lease.ended", 0, |row| row["at_ms"] = json!(EPOCH + 3_500));
    };
    assert_eq!(altered(late), ["lease.grantable-again"]);
    let mut sketch = good();
    late(&mut sketch);
    let mut faulty = setting();
    faulty.faults = vec![Window {
        from: 1_300 * MS,
        to: 2_900 * MS,
        ..Window::default()
    }];
    all_hold(&check(&sketch.history(), &faulty));
    faulty.epoch_ms = None;
    faulty.faults.clear();
    all_hold(&check(&sketch.history(), &faulty));
}

#[test]
fn results_that_are_lost_or_doubled_are_found() {
    let lost = altered(|s| {
        alter_row(s, "run.finished", 1, |row| row["detail"]["state"] = json!("lost"));
    });
    assert_eq!(lost, ["lease.one-result"]);
    let twice = altered(|s| {
        let rows = s.nth("rows", 0).answer["rows"].as_array_mut().expect("rows");
        let mut again = rows.last().cloned().expect("rows");
        again["ordinal"] = json!(90);
        rows.push(again);
    });
    assert_eq!(twice, ["lease.one-result"]);
}

#[test]
fn runs_that_vanish_hang_or_come_from_nowhere_are_found() {
    assert_eq!(altered(|s| s.nth("run", 0).kind = Kind::Fail), ["lease.runs-end"]);
    let hangs = altered(|s| s.nth("run", 0).answer["state"] = json!("queued"));
    assert_eq!(hangs, ["lease.runs-end"]);
    assert_eq!(
        altered(|s| s.nth("start", 1).kind = Kind::Fail),
        ["lease.runs-end"]
    );
    let rows = |s: &mut Sketch| {
        let rows = s.nth("rows", 0).answer["rows"].as_array_mut().expect("rows");
        rows.push(row(11, 3_000, "run.submitted", "r9", json!({})));
    };
    assert_eq!(altered(rows), ["lease.runs-end"]);
    assert!(altered(|s| s.nth("start", 1).kind = Kind::Info).is_empty());
}

#[test]
fn what_was_not_read_is_unknown_and_not_valid() {
    let mut sketch = good();
    sketch.without("rows");
    let checks = check(&sketch.history(), &setting());
    assert!(violated(&checks).is_empty());
    assert_eq!(checks.iter().filter(|check| !check.holds()).count(), 3);
    let mut sketch = good();
    sketch.nth("renew", 1).value = json!({"lease": "L2"});
    let checks = check(&sketch.history(), &setting());
    assert_eq!(checks[0].name, "lease.history");
    assert!(!checks[0].holds());
    assert!(
        check(&Sketch::default().history(), &setting())
            .iter()
            .any(|check| !check.holds())
    );
}
