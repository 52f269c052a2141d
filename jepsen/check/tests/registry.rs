//! Known-good histories of registers, each way to spoil one, and the cost of a large one.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Plan, named, truth, violated};
use palyra_jepsen_check::history::Answer;
use palyra_jepsen_check::resolve::Canonical;
use palyra_jepsen_check::{Context, Facts, History, Kind, Recorder, registry};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

/// Writes a history, one operation after the other.
#[derive(Default)]
struct Teller {
    told: Recorder,
    time: u64,
}

impl Teller {
    fn tick(&mut self) -> u64 {
        self.time += 1_000_000;
        self.time
    }

    fn op(&mut self, f: &str, call: Value, kind: Kind, more: &Value, rev: Option<u64>) {
        let process = self.told.process();
        let request = (f != "read").then(|| format!("q{process}"));
        let mut value = call.clone();
        value
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let (from, to) = (self.tick(), self.tick());
        let pending = self
            .told
            .invoke(from, process, f, call, Some("r1".into()), request);
        self.told.complete(
            to,
            &pending,
            kind,
            Answer {
                value,
                rev,
                ..Answer::default()
            },
        );
    }

    fn write(&mut self, value: u64, version: u64, rev: u64) {
        self.op(
            "write",
            json!({"key": "a", "value": value}),
            Kind::Ok,
            &json!({"version": version}),
            Some(rev),
        );
    }

    fn read(&mut self, value: u64, version: u64, rev: u64) {
        self.op(
            "read",
            json!({"key": "a"}),
            Kind::Ok,
            &json!({"version": version, "value": value}),
            Some(rev),
        );
    }
}

/// Written at 5, 7, 9 and (unknown, but read) 11; a failed write and a failed cas; reads of each; stale reads of one
/// session.
fn story() -> History {
    let mut told = Teller::default();
    let absent = json!({"version": 0, "value": null});
    told.op("read", json!({"key": "a"}), Kind::Ok, &absent, Some(4));
    told.write(1, 1, 5);
    told.read(1, 1, 5);
    told.op(
        "cas",
        json!({"key": "a", "from": 1, "value": 2}),
        Kind::Ok,
        &json!({"version": 2}),
        Some(7),
    );
    told.op(
        "cas",
        json!({"key": "a", "from": 1, "value": 90}),
        Kind::Fail,
        &json!({}),
        None,
    );
    told.read(2, 2, 8);
    told.op(
        "write",
        json!({"key": "a", "value": 91}),
        Kind::Fail,
        &json!({}),
        None,
    );
    told.write(3, 3, 9);
    told.read(3, 3, 9);
    told.op(
        "write",
        json!({"key": "a", "value": 4}),
        Kind::Info,
        &json!({}),
        None,
    );
    told.read(4, 4, 11);
    told.op(
        "list",
        json!({}),
        Kind::Ok,
        &json!({"entries": [{"key": "a", "version": 4, "value": 4}]}),
        Some(12),
    );
    for (value, version, rev, age) in [(2, 2, 8, 3), (3, 3, 10, 2)] {
        let call = json!({"key": "a", "stale": true, "session": "s1"});
        told.op(
            "read",
            call,
            Kind::Ok,
            &json!({"value": value, "version": version, "age_ms": age}),
            Some(rev),
        );
    }
    told.told.history().clone()
}

/// The journal of that story.
fn canonical() -> Canonical {
    let revs = [("q2", 5), ("q4", 7), ("q8", 9), ("q10", 11)];
    Canonical {
        revs: revs.map(|(request, rev)| (request.to_owned(), rev)).into(),
        whole: true,
    }
}

fn context() -> Context {
    let bounds = [("stale_slack_ms".to_owned(), 10.0)];
    Context {
        canonical: Some(canonical()),
        facts: Facts {
            bounds: bounds.into(),
            ..Facts::default()
        },
        ..Context::default()
    }
}

/// The answer of the `nth` operation of this name.
fn answer<'a>(history: &'a mut History, f: &str, nth: usize) -> &'a mut palyra_jepsen_check::Event {
    let mut answers = history
        .events
        .iter_mut()
        .filter(|event| event.f == f && event.kind != Kind::Invoke);
    answers.nth(nth).unwrap()
}

/// Moves the operation of this name before everything else, or behind it.
fn replace_in_time(history: &mut History, f: &str, nth: usize, to_front: bool) {
    let end = answer(history, f, nth).index as usize;
    let pair: Vec<_> = history.events.drain(end - 1..=end).collect();
    let place = if to_front { 0 } else { history.events.len() };
    history.events.splice(place..place, pair);
    for (index, event) in (0..).zip(&mut history.events) {
        event.index = index;
        event.time = index * 1_000_000;
    }
}

type Alter = fn(&mut History);

/// What is spoiled, the check that must find it, and how.
const LIES: &[(&str, &str, Alter)] = &[
    (
        "a read answers what was overwritten",
        "registry.linearizable",
        |history| {
            answer(history, "read", 3).value = json!({"key": "a", "version": 2, "value": 2});
        },
    ),
    (
        "a read answers another value at its version",
        "registry.linearizable",
        |history| {
            answer(history, "read", 3).value["value"] = json!(2);
        },
    ),
    (
        "a read finds nothing where something was written",
        "registry.linearizable",
        |history| {
            answer(history, "read", 4).value = json!({"key": "a", "version": 0, "value": null});
        },
    ),
    (
        "a read answers before the write is sent",
        "registry.linearizable",
        |history| {
            replace_in_time(history, "read", 3, true);
        },
    ),
    (
        "an acknowledged write vanishes",
        "registry.linearizable",
        |history| {
            answer(history, "read", 4).value["version"] = json!(3);
            answer(history, "list", 0).value["entries"][0]["version"] = json!(3);
        },
    ),
    (
        "two writes make one version",
        "registry.linearizable",
        |history| {
            answer(history, "write", 2).value["version"] = json!(1);
        },
    ),
    (
        "a cas succeeds from another value",
        "registry.linearizable",
        |history| {
            for event in history
                .events
                .iter_mut()
                .filter(|event| event.f == "cas" && event.value["value"] == 2)
            {
                event.value["from"] = json!(7);
            }
        },
    ),
    (
        "a version appears that nobody made",
        "registry.linearizable",
        |history| {
            answer(history, "read", 4).value["version"] = json!(6);
            answer(history, "list", 0).value["entries"][0]["version"] = json!(6);
        },
    ),
    (
        "a list is older than a read before it",
        "registry.linearizable",
        |history| {
            answer(history, "list", 0).value["entries"][0] = json!({"key": "a", "version": 3, "value": 3});
        },
    ),
    ("a failed write took effect", "registry.linearizable", |history| {
        answer(history, "read", 4).value["value"] = json!(91);
    }),
    ("a failed write is read", "registry.values-written", |history| {
        answer(history, "read", 4).value["value"] = json!(91);
    }),
    (
        "a value comes from nowhere",
        "registry.values-written",
        |history| {
            answer(history, "read", 1).value["value"] = json!(77);
        },
    ),
    (
        "a value is read before it is written",
        "registry.values-written",
        |history| {
            replace_in_time(history, "write", 2, false);
        },
    ),
    (
        "a stale read answers what nobody wrote",
        "registry.values-written",
        |history| {
            answer(history, "read", 5).value["value"] = json!(77);
        },
    ),
    (
        "the revision of a write falls",
        "registry.revs-follow-time",
        |history| {
            answer(history, "write", 2).rev = Some(6);
        },
    ),
    (
        "two writes have one revision",
        "registry.revs-follow-time",
        |history| {
            answer(history, "write", 2).rev = Some(8);
            answer(history, "read", 2).rev = Some(8);
        },
    ),
    (
        "the revision of a read falls",
        "registry.revs-follow-time",
        |history| {
            answer(history, "list", 0).rev = Some(10);
        },
    ),
    (
        "a read claims a revision before its write",
        "registry.claimed-order",
        |history| {
            answer(history, "read", 4).rev = Some(10);
        },
    ),
    (
        "a stale read answers what came only later",
        "registry.stale-reads",
        |history| {
            answer(history, "read", 5).rev = Some(6);
        },
    ),
    (
        "a stale read answers what was gone",
        "registry.stale-reads",
        |history| {
            answer(history, "read", 6).value = json!({"key": "a", "version": 1, "value": 1});
        },
    ),
    ("a session goes back", "registry.stale-reads", |history| {
        answer(history, "read", 5).rev = Some(10);
        answer(history, "read", 5).value = json!({"key": "a", "version": 3, "value": 3});
        answer(history, "read", 6).rev = Some(8);
        answer(history, "read", 6).value = json!({"key": "a", "version": 2, "value": 2});
    }),
    (
        "a stale read is older than it says",
        "registry.stale-reads",
        |history| {
            for event in history
                .events
                .iter_mut()
                .filter(|event| event.value["stale"] == true)
            {
                event.time += 60_000_000_000;
            }
        },
    ),
];

#[test]
fn a_good_history_passes() {
    let mut history = story();
    // The stale reads are as old as they say.
    let checks = registry::check(&history, &context());
    let wrong: Vec<_> = checks.iter().filter(|check| !check.holds()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Without the journal the unknown write has no revision, but whoever read it tells its place.
    let checks = registry::check(&history, &Context::default());
    assert!(
        checks.iter().all(palyra_jepsen_check::Check::holds),
        "{checks:#?}"
    );
    // Without versions too.
    for event in &mut history.events {
        event.value.as_object_mut().unwrap().remove("version");
    }
    assert!(
        named(
            &registry::check(&history, &Context::default()),
            "registry.linearizable"
        )
        .holds()
    );
}

#[test]
fn each_lie_is_found_by_its_check() {
    for (lie, name, alter) in LIES {
        let mut history = story();
        alter(&mut history);
        assert_eq!(history.problems(), vec![], "{lie}");
        let checks = registry::check(&history, &context());
        assert_eq!(violated(named(&checks, name)), Some(true), "{lie}: {checks:#?}");
    }
}

#[test]
fn what_the_journal_never_had_cannot_explain_a_read() {
    let mut history = story();
    let mut context = context();
    context.canonical.as_mut().unwrap().revs.remove("q10");
    let checks = registry::check(&history, &context);
    // It was read, so that it must have happened; the journal is wrong about it, and the claimed order says so.
    assert!(named(&checks, "registry.linearizable").holds());
    assert_eq!(violated(named(&checks, "registry.claimed-order")), Some(true));
    // Operations of other workloads are none of its business.
    history.events.retain(|event| event.f == "write");
    for event in &mut history.events {
        event.value = json!({"run": "x", "slot": "y", "fence": 3});
    }
    assert!(
        registry::check(&history, &context)
            .iter()
            .all(|check| violated(check) != Some(true))
    );
}

#[test]
fn a_large_history_is_decided_in_one_step_for_each_operation() {
    let mut rng = SmallRng::seed_from_u64(1);
    let plan = Plan {
        ops: 200_000,
        processes: 20,
        keys: 40,
        cas: 0,
        delete: 0,
        unknown: 1,
        versions: true,
    };
    let history = truth(&mut rng, plan);
    let checks = registry::check(&history, &Context::default());
    let check = named(&checks, "registry.linearizable");
    assert!(check.holds(), "{check:#?}");
    let fact = |name: &str| check.facts[name].as_u64().unwrap();
    assert_eq!(fact("keys_by_version"), 40);
    assert!(
        fact("ops") > 150_000 && fact("steps") <= fact("ops"),
        "{:?}",
        check.facts
    );
}

#[test]
fn a_history_that_breaks_its_rules_is_told_with_the_place() {
    type Break = fn(&mut History);
    let breaks: &[(&str, Break)] = &[
        ("its index is 9", |history| history.events[2].index = 9),
        ("is before that of the event before it", |history| {
            history.events[2].time = 0
        }),
        ("that it never called", |history| {
            history.events[2].kind = Kind::Ok
        }),
        ("is under way", |history| history.events[1].kind = Kind::Invoke),
        ("and ends `write`", |history| history.events[1].f = "write".into()),
        ("ended as `info`", |history| {
            history.events[1].kind = Kind::Info;
            history.events[2].process = history.events[0].process;
            history.events[3].process = history.events[0].process;
        }),
    ];
    for (what, spoil) in breaks {
        let mut history = story();
        spoil(&mut history);
        let problems = history.problems();
        assert!(
            problems.iter().any(|problem| problem.what.contains(what)),
            "{what}: {problems:?}"
        );
        let none = palyra_jepsen_check::judge("registry", &history, &Facts::default());
        assert!(none.is_err(), "a failure of the harness is no verdict");
    }
}

#[test]
fn a_stored_history_is_read_back_and_a_damaged_one_names_the_line() {
    let history = story();
    let mut text = Vec::new();
    history.write(&mut text).unwrap();
    assert_eq!(History::read("h", text.as_slice()).unwrap(), history);
    let lines: Vec<&[u8]> = text.split_inclusive(|byte| *byte == b'\n').collect();
    let error = |bytes: &[u8]| History::read("history.jsonl", bytes).unwrap_err().to_string();
    let cut = error(&text[..text.len() - 5]);
    assert!(
        cut.starts_with(&format!("history.jsonl, line {}: it is cut off", lines.len())),
        "{cut}"
    );
    let mut odd = lines[..3].concat();
    odd.extend(b"{\"index\": true}\n");
    assert!(
        error(&odd).starts_with("history.jsonl, line 4: not an event"),
        "{}",
        error(&odd)
    );
    let mut long = lines[0].to_vec();
    long.extend(vec![b' '; palyra_jepsen_check::jsonl::MAX_LINE + 2]);
    assert!(error(&long).contains("line 2: it is longer"), "{}", error(&long));
}

#[test]
fn what_found_nothing_and_tells_no_revision_stands_before_all_changes() {
    let absent = json!({"version": 0, "value": null});
    let with = |deletes: bool| {
        let mut told = Teller::default();
        let read = |told: &mut Teller| told.op("read", json!({"key": "a"}), Kind::Ok, &absent, None);
        read(&mut told);
        told.write(1, 1, 5);
        if deletes {
            told.op(
                "delete",
                json!({"key": "a"}),
                Kind::Ok,
                &json!({"version": 2}),
                Some(6),
            );
            read(&mut told);
        } else {
            told.read(1, 1, 6);
        }
        let checks = registry::check(told.told.history(), &Context::default());
        violated(named(&checks, "registry.claimed-order"))
    };
    assert_eq!(with(false), Some(false), "it is in order");
    assert_eq!(with(true), None, "it may be from after the deletion");
}
