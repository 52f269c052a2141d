//! A good story of a journal passes; each way to spoil it is found, by the check that is meant to.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};

use super::*;
use crate::context::{Facts, RegisterRows};
use crate::history::{Answer, Kind, Recorder};
use crate::resolve::Fate;
use crate::verdict::Outcome;

/// The request id with this number.
pub(crate) fn request(number: u64) -> String {
    format!("01J{number:023}")
}

/// Chains and hashes drafts of rows.
pub(crate) fn chain(drafts: &mut [Value]) {
    let mut prev = hash::ZERO.to_owned();
    for draft in drafts {
        draft["prev"] = json!(prev);
        draft["hash"] = json!("");
        let row: Row = serde_json::from_value(draft.clone()).expect("a draft is a row");
        prev = hash::of(&row).expect("a draft has a request id");
        draft["hash"] = json!(prev);
    }
}

/// A row without its hashes, about the register `a`.
pub(crate) fn draft(index: u64, ordinal: u32, number: u64, version: u64) -> Value {
    json!({
        "index": index, "ordinal": ordinal, "at_ms": 1_000 + index, "actor": "operator/x",
        "action": if ordinal == 0 { "node.registered" } else { "node.noted" },
        "subject": "a", "request": request(number), "detail": {"generation": version.to_string()},
    })
}

/// Writes 1 to 3 are acknowledged at 10, 12 and 14; 4 is unknown and took effect at 16; 5 is unknown and did not; 6
/// failed.
struct Story {
    drafts: Vec<Value>,
}

impl Story {
    fn new() -> Self {
        let drafts = vec![
            draft(10, 0, 1, 1),
            draft(12, 0, 2, 2),
            draft(12, 1, 2, 2),
            draft(14, 0, 3, 3),
            draft(16, 0, 4, 4),
        ];
        Story { drafts }
    }

    fn tell(mut self) -> History {
        chain(&mut self.drafts);
        let rows = self.drafts;
        let page = |rows: &[Value], after: Value| json!({"after": after, "rows": rows, "end": true});
        let mut told = Teller::default();
        told.write("r1", 1, Kind::Ok, Some(10));
        told.write("r1", 2, Kind::Ok, Some(12));
        told.write("r1", 6, Kind::Fail, None);
        told.answered(
            "tail",
            "r1",
            json!({"after": null}),
            page(&rows[..3], Value::Null),
            12,
        );
        let read = json!({"key": "a", "version": 2, "value": 2});
        told.answered("read", "r2", json!({"key": "a"}), read, 13);
        told.write("r2", 3, Kind::Ok, Some(14));
        told.write("r2", 4, Kind::Info, None);
        told.write("r2", 5, Kind::Info, None);
        let after = json!([12, 0]);
        told.answered("tail", "r2", json!({"after": after}), page(&rows[2..], after), 16);
        let head = rows.last().map(|row| row["hash"].clone());
        let head =
            json!({"rows": rows.len(), "first": [10, 0], "last": [16, 0], "head": head, "intact": true});
        told.answered("head", "r3", json!({}), head, 16);
        for node in ["r1", "r2", "r3"] {
            told.answered("rows", node, json!({"after": null}), page(&rows, Value::Null), 17);
        }
        told.told.history().clone()
    }
}

/// Writes a history, one operation after the other.
#[derive(Default)]
pub(crate) struct Teller {
    pub(crate) told: Recorder,
    pub(crate) time: u64,
}

impl Teller {
    pub(crate) fn write(&mut self, node: &str, number: u64, kind: Kind, rev: Option<u64>) {
        let value = json!({"key": "a", "value": number});
        self.op(
            "write",
            node,
            value.clone(),
            Some(request(number)),
            kind,
            Answer {
                value,
                rev,
                ..Answer::default()
            },
        );
    }

    pub(crate) fn answered(&mut self, f: &str, node: &str, call: Value, value: Value, rev: u64) {
        let answer = Answer {
            value,
            rev: Some(rev),
            ..Answer::default()
        };
        self.op(f, node, call, None, Kind::Ok, answer);
    }

    fn op(&mut self, f: &str, node: &str, call: Value, request: Option<String>, kind: Kind, answer: Answer) {
        let process = self.told.process();
        self.time += 10;
        let pending = self
            .told
            .invoke(self.time, process, f, call, Some(node.into()), request);
        self.told.complete(self.time + 5, &pending, kind, answer);
    }
}

fn context() -> Context {
    let registers = RegisterRows {
        action: "node.registered".into(),
        version: "generation".into(),
    };
    let facts = Facts {
        actors: vec!["operator/x".into()],
        replicas: ["r1", "r2", "r3"].map(String::from).to_vec(),
        settled: true,
        registers: Some(registers),
        ..Facts::default()
    };
    Context {
        facts,
        ..Context::default()
    }
}

/// The answer to the operation of this name that was asked as the `nth` one.
fn answer<'a>(history: &'a mut History, f: &str, nth: usize) -> &'a mut crate::Event {
    let mut answers = history
        .events
        .iter_mut()
        .filter(|event| event.f == f && event.kind != Kind::Invoke);
    answers.nth(nth).expect("the story has it")
}

fn violated(history: &History) -> Vec<String> {
    assert_eq!(history.problems(), []);
    let checks = check(history, &context());
    let violated = checks
        .into_iter()
        .filter(|check| matches!(check.outcome, Outcome::Invalid { .. }));
    violated.map(|check| check.name).collect()
}

#[test]
fn a_good_journal_passes_and_tells_what_became_of_unknown_requests() {
    let history = Story::new().tell();
    for check in check(&history, &context()) {
        assert!(check.holds(), "{check:#?}");
    }
    let canonical = canonical(&history, &context()).expect("it passed");
    let fates: Vec<Fate> = history.ops().iter().map(|op| canonical.fate(op)).collect();
    assert_eq!(fates[0], Fate::At(10));
    assert_eq!((fates[6], fates[7]), (Fate::At(16), Fate::Never));
    let unsettled = Context::default();
    let canonical = super::canonical(&history, &unsettled).expect("it passed");
    assert_eq!(canonical.fate(&history.ops()[7]), Fate::Open);
}

/// Changes a history that was told.
type Alter = fn(&mut History);

/// What is spoiled, the check that must find it, and how.
const LIES: &[(&str, &str, Alter)] = &[
    ("a row is left out", "journal.one-history", |history| {
        answer(history, "tail", 0).value["rows"]
            .as_array_mut()
            .unwrap()
            .remove(1);
    }),
    ("a row is repeated", "journal.gapless", |history| {
        let rows = answer(history, "tail", 1).value["rows"].as_array_mut().unwrap();
        let again = rows[1].clone();
        rows.insert(1, again);
    }),
    ("an entry lacks its first row", "journal.gapless", |history| {
        answer(history, "rows", 2).value["rows"]
            .as_array_mut()
            .unwrap()
            .remove(1);
    }),
    (
        "another journal begins after the cursor",
        "journal.gapless",
        |history| {
            answer(history, "tail", 1).value["rows"]
                .as_array_mut()
                .unwrap()
                .remove(0);
            answer(history, "tail", 1).value["rows"][0]["ordinal"] = json!(1);
        },
    ),
    (
        "a bit flips in a later answer",
        "journal.one-history",
        |history| {
            answer(history, "rows", 1).value["rows"][2]["subject"] = json!("b");
        },
    ),
    ("a bit flips in every answer", "journal.chain", |history| {
        for event in &mut history.events {
            let rows = event.value.get_mut("rows").and_then(Value::as_array_mut);
            for row in rows.into_iter().flatten().filter(|row| row["index"] == 14) {
                row["at_ms"] = json!(7);
            }
        }
    }),
    ("a hash is another one", "journal.one-history", |history| {
        answer(history, "rows", 0).value["rows"][0]["hash"] = json!(hash::ZERO);
    }),
    ("a head is of another journal", "journal.heads", |history| {
        answer(history, "head", 0).value["head"] = json!(hash::ZERO);
    }),
    ("a head counts wrong", "journal.heads", |history| {
        answer(history, "head", 0).value["rows"] = json!(4);
    }),
    ("a replica finds itself broken", "journal.heads", |history| {
        answer(history, "head", 0).value["intact"] = json!(false);
    }),
    (
        "an acknowledged write is not there",
        "journal.mutations",
        |history| {
            for event in history
                .events
                .iter_mut()
                .filter(|event| event.request == Some(request(2)))
            {
                event.request = Some(request(99));
            }
        },
    ),
    ("a failed write is there", "journal.mutations", |history| {
        answer(history, "write", 1).kind = Kind::Fail;
    }),
    ("a write was told another entry", "journal.mutations", |history| {
        answer(history, "write", 1).rev = Some(13);
    }),
    (
        "a write was told that it changed nothing",
        "journal.mutations",
        |history| {
            answer(history, "write", 1).value["quiet"] = json!(true);
        },
    ),
    ("a read answers an old version", "journal.state", |history| {
        answer(history, "read", 0).value["version"] = json!(1);
    }),
    ("a replica stays behind", "journal.converged", |history| {
        answer(history, "rows", 2).value["rows"]
            .as_array_mut()
            .unwrap()
            .truncate(3);
    }),
];

#[test]
fn each_lie_of_a_reader_or_a_replica_is_found() {
    for (lie, name, alter) in LIES {
        let mut history = Story::new().tell();
        alter(&mut history);
        let violated = violated(&history);
        assert!(violated.iter().any(|check| check == name), "{lie}: {violated:?}");
    }
}

/// Changes the journal itself before it is told.
type Spoil = fn(&mut Vec<Value>);

#[test]
fn each_wrong_entry_is_found_although_the_chain_is_whole() {
    let wrong: &[(&str, Spoil)] = &[
        ("a request takes effect twice", |drafts| {
            drafts.push(draft(18, 0, 2, 5))
        }),
        ("a failed request takes effect", |drafts| {
            drafts.push(draft(18, 0, 6, 5))
        }),
        ("an acknowledged request is lost", |drafts| drop(drafts.remove(3))),
        ("nobody asked", |drafts| drafts.push(draft(18, 0, 77, 5))),
        ("an entry is at another index", |drafts| {
            drafts[3]["index"] = json!(15)
        }),
    ];
    for (what, spoil) in wrong {
        let mut story = Story::new();
        spoil(&mut story.drafts);
        let mut history = story.tell();
        history.events.retain(|event| event.f != "head");
        for (index, event) in (0..).zip(&mut history.events) {
            event.index = index;
        }
        let violated = violated(&history);
        assert!(
            violated.iter().any(|check| check == "journal.mutations"),
            "{what}: {violated:?}"
        );
        assert!(
            !violated.iter().any(|check| check == "journal.chain"),
            "{what}: {violated:?}"
        );
    }
}

#[test]
fn what_was_not_read_is_unknown_and_not_wrong() {
    let mut history = Story::new().tell();
    history.events.retain(|event| event.node.as_deref() != Some("r3"));
    for (index, event) in (0..).zip(&mut history.events) {
        event.index = index;
    }
    let checks = check(&history, &context());
    let unknown: Vec<&str> = checks
        .iter()
        .filter(|check| !check.holds())
        .map(|check| check.name.as_str())
        .collect();
    assert_eq!(unknown, ["journal.converged"]);
    history.events.retain(|event| event.f == "write");
    assert!(canonical(&history, &context()).is_none());
}

#[test]
fn the_hash_is_that_of_the_published_definition() {
    // The product pins the same row to the same hash (crates/state/src/journal.rs).
    let row = Row {
        index: 258,
        ordinal: 3,
        at_ms: 1_700_000_000_123,
        actor: "operator/x".into(),
        action: "node.registered".into(),
        subject: "a".into(),
        request: request(7),
        detail: [("generation", "2"), ("platform", "linux/x86_64")]
            .map(|(name, value)| (name.into(), value.into()))
            .into(),
        prev: "11".repeat(32),
        hash: String::new(),
    };
    assert_eq!(
        hash::of(&row).as_deref(),
        Some("408b2a5d04584c5242bcab21ee6ac0ffbc7a6e33839389f16651d37cf6823745")
    );
    assert_eq!(
        hash::of(&Row {
            request: "not an id".into(),
            ..row.clone()
        }),
        None
    );
    assert_eq!(
        hash::of(&Row {
            prev: "1".into(),
            ..row.clone()
        }),
        None
    );
}
