//! What is exported is well formed, whole, and says what the history says.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::{Plan, truth};
use palyra_jepsen_check::export::{self, Title, edn, html, junit};
use palyra_jepsen_check::history::Answer;
use palyra_jepsen_check::{Facts, History, Kind, Process, Recorder, Verdict, judge};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Value, json};

fn title() -> Title {
    Title {
        workload: "registry".into(),
        nemesis: "kill,partition:leader".into(),
        seed: 7,
        replay: "jepsen run --workload registry --nemesis kill --seed 7".into(),
    }
}

/// A run with faults, leaders, and a read that lost the last write; larger than what is shown whole if wanted.
fn story(ops: usize, broken: bool) -> (History, Verdict) {
    let mut rng = SmallRng::seed_from_u64(3);
    let plan = Plan {
        ops,
        processes: 8,
        keys: 6,
        cas: 5,
        delete: 0,
        unknown: 1,
        versions: true,
    };
    let mut history = truth(&mut rng, plan);
    for event in &mut history.events {
        event.time = event.time.saturating_mul(3_000_000);
        event.node = Some(format!("r{}", event.index % 3 + 1));
    }
    let end = history.events.last().unwrap().time;
    let mut told = Recorder::default();
    for (term, (part, replica)) in [(0, "r1"), (30, "r2"), (62, "r3")].into_iter().enumerate() {
        told.fault(
            end / 100 * part,
            "leader",
            json!({"replica": replica, "term": term + 2}),
        );
    }
    for (id, (f, from, to)) in [("kill", 28, 36), ("partition:leader", 58, 74), ("kill", 80, 84)]
        .into_iter()
        .enumerate()
    {
        let value =
            |phase: &str| json!({"id": id, "phase": phase, "targets": ["r2"], "outcome": "installed"});
        told.fault(end / 100 * from, f, value("start"));
        told.fault(end / 100 * to, f, value("stop"));
    }
    for (part, phase) in [(0, "before"), (20, "faults"), (84, "after"), (90, "final")] {
        told.fault(end / 100 * part, "phase", json!({"phase": phase}));
    }
    told.fault(
        end / 100 * 33,
        "ended",
        json!({"replica": "r2", "how": "killed by signal 9"}),
    );
    told.fault(end / 100 * 93, "healed", json!({}));
    history.events.extend(told.history().events.iter().cloned());
    history.events.sort_by_key(|event| event.time);
    if broken {
        let reads: Vec<usize> = (0..history.events.len())
            .filter(|at| {
                history.events[*at].f == "read" && history.events[*at].value["version"].as_u64() > Some(3)
            })
            .collect();
        let event = &mut history.events[reads[reads.len() * 2 / 3]];
        event.value["version"] = json!(event.value["version"].as_u64().unwrap() - 2);
    }
    for (index, event) in (0..).zip(&mut history.events) {
        event.index = index;
    }
    let verdict = judge("registry", &history, &Facts::default()).unwrap();
    (history, verdict)
}

/// Reads EDN back into JSON: enough of it for what is written here.
struct Edn<'a>(&'a str);

impl Edn<'_> {
    fn all(text: &str) -> Vec<Value> {
        let mut edn = Edn(text);
        let mut found = Vec::new();
        while !edn.skip().is_empty() {
            found.push(edn.next());
        }
        found
    }

    fn skip(&mut self) -> &str {
        self.0 = self
            .0
            .trim_start_matches(|char: char| char.is_whitespace() || char == ',');
        self.0
    }

    fn many(&mut self, close: char) -> Vec<Value> {
        self.0 = &self.0[1..];
        let mut found = Vec::new();
        while !self.skip().starts_with(close) {
            found.push(self.next());
        }
        self.0 = &self.0[1..];
        found
    }

    fn next(&mut self) -> Value {
        match self.skip().chars().next().unwrap() {
            '{' => {
                let all = self.many('}');
                let fields = all
                    .chunks(2)
                    .map(|pair| (pair[0].as_str().unwrap().to_owned(), pair[1].clone()));
                Value::Object(fields.collect())
            }
            '[' => Value::Array(self.many(']')),
            '"' => {
                // EDN's strings are JSON's.
                let mut stream = serde_json::Deserializer::from_str(self.0).into_iter::<Value>();
                let text = stream.next().unwrap().unwrap();
                self.0 = &self.0[stream.byte_offset()..];
                text
            }
            _ => {
                let end = self
                    .0
                    .find(|char: char| char.is_whitespace() || ",]}".contains(char));
                let (word, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
                self.0 = rest;
                match word.strip_prefix(':') {
                    Some(keyword) => json!(keyword),
                    None if word == "nil" => Value::Null,
                    None => serde_json::from_str(word).unwrap(),
                }
            }
        }
    }
}

#[test]
fn edn_says_what_the_history_says() {
    let (history, _) = story(300, false);
    let mut text = Vec::new();
    edn::history(&mut text, &history).unwrap();
    let ops = Edn::all(std::str::from_utf8(&text).unwrap());
    assert_eq!(ops.len(), history.events.len());
    for (op, event) in ops.iter().zip(&history.events) {
        assert_eq!(*op, serde_json::to_value(event).unwrap());
    }
}

#[test]
fn odd_names_and_texts_survive() {
    let mut told = Recorder::default();
    let process = told.process();
    let odd =
        json!({"a key": "quote \" slash \\ line \n bell \u{7} é", "1": [null, true, -3, 1.5], "ok?": {}});
    let pending = told.invoke(1, process, "strange op", odd.clone(), None, Some("q\"1".into()));
    told.complete(
        2,
        &pending,
        Kind::Info,
        Answer {
            value: odd,
            error: Some("</script><b>".into()),
            ..Answer::default()
        },
    );
    let history = told.history();
    let mut text = Vec::new();
    edn::history(&mut text, history).unwrap();
    let ops = Edn::all(std::str::from_utf8(&text).unwrap());
    assert_eq!(ops[1], serde_json::to_value(&history.events[1]).unwrap());
    let page = html::page(&title(), history, &Verdict::default());
    assert_eq!(page.matches("</script>").count(), 2, "the page's own two");
}

#[test]
fn each_register_has_a_history_that_knossos_reads() {
    let (history, _) = story(400, false);
    let keys = edn::independent(&history);
    assert_eq!(
        keys.keys().map(String::as_str).collect::<Vec<_>>(),
        ["k0", "k1", "k2", "k3", "k4", "k5"]
    );
    for events in keys.values() {
        let history = History {
            events: events.clone(),
        };
        assert_eq!(history.problems(), vec![]);
        for event in events {
            let fits = match event.f.as_str() {
                "cas" => event.value.as_array().is_some_and(|pair| pair.len() == 2),
                "read" | "write" => !event.value.is_object(),
                _ => false,
            };
            assert!(fits && matches!(event.process, Process::Client(_)), "{event:?}");
        }
    }
}

#[test]
fn names_of_keys_stay_in_their_folder() {
    let mut told = Recorder::default();
    for key in ["../../etc/passwd", "a/b", "a_b", ""] {
        let process = told.process();
        let pending = told.invoke(1, process, "write", json!({"key": key, "value": 1}), None, None);
        told.complete(1, &pending, Kind::Fail, Answer::default());
    }
    let keys = edn::independent(told.history());
    assert_eq!(keys.len(), 4);
    assert!(
        keys.keys()
            .all(|name| !name.is_empty() && !name.contains(['/', '.'])),
        "{:?}",
        keys.keys()
    );
}

/// A small parser of XML: tags close in order, attributes are quoted, and no character stands where it may not.
fn well_formed(xml: &str) -> Vec<String> {
    let mut open: Vec<String> = Vec::new();
    let mut seen = Vec::new();
    let mut rest = xml
        .strip_prefix("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n")
        .unwrap();
    while let Some(at) = rest.find('<') {
        let text = &rest[..at];
        assert!(!text.contains('>') && entities_are_known(text), "{text}");
        let end = rest[at..].find('>').unwrap() + at;
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name));
            continue;
        }
        let (tag, closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let (name, mut attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        while let Some((_, value)) = attributes.split_once("=\"") {
            let (value, behind) = value.split_once('"').unwrap();
            assert!(entities_are_known(value), "{value}");
            attributes = behind;
        }
        assert_eq!(attributes.trim(), "");
        seen.push(name.to_owned());
        if !closed {
            open.push(name.to_owned());
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty());
    seen
}

fn entities_are_known(text: &str) -> bool {
    let known = ["amp;", "lt;", "gt;", "quot;", "#39;", "#10;"];
    text.split('&')
        .skip(1)
        .all(|rest| known.iter().any(|name| rest.starts_with(name)))
        && text.chars().all(|char| !char.is_control() || char == '\n')
}

#[test]
fn junit_is_well_formed_and_has_each_check() {
    let (history, mut verdict) = story(300, true);
    assert_eq!(verdict.valid(), Some(false));
    verdict.checks.push(palyra_jepsen_check::Check::unknown(
        "odd.check",
        "a < b && \"c\" > 'd' \u{1} \n é",
    ));
    let seen = well_formed(&junit::report(&title(), &history, &verdict));
    let count = |name: &str| seen.iter().filter(|tag| *tag == name).count();
    assert_eq!(count("testcase"), verdict.checks.len());
    assert!(count("failure") >= 1 && count("error") >= 1, "{seen:?}");
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_shows_the_first_violation() {
    let (history, verdict) = story(600, true);
    let page = html::page(&title(), &history, &verdict);
    for outside in ["http://", "https://", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    let model = html::model(&title(), &history, &verdict);
    assert_eq!(model["ops"].as_array().unwrap().len(), history.ops().len());
    assert_eq!(model["bands"].as_array().unwrap().len(), 3);
    assert_eq!(model["leaders"].as_array().unwrap().len(), 3);
    let (_, violation) = verdict.first().unwrap();
    assert_eq!(model["anomalies"][0]["events"], json!(violation.events));
    // No two operations of a lane are under way at one time.
    let mut ends = std::collections::BTreeMap::new();
    for op in model["ops"].as_array().unwrap() {
        let (start, end) = (op[5].as_u64().unwrap(), op[6].as_u64().unwrap_or(u64::MAX));
        let before = ends.insert(op[0].as_u64().unwrap(), end).unwrap_or(0);
        assert!(before <= start, "{op}");
    }
}

#[test]
fn a_large_history_is_shown_around_its_first_violation() {
    let (history, verdict) = story(6_000, true);
    assert_eq!(verdict.valid(), Some(false), "{verdict:#?}");
    let model = html::model(&title(), &history, &verdict);
    let shown = model["ops"].as_array().unwrap();
    assert!(
        shown.len() < 3 * html::AROUND + html::WHOLE && shown.len() > html::AROUND,
        "{}",
        shown.len()
    );
    let first = *verdict.first().unwrap().1.events.iter().min().unwrap();
    assert!(
        shown
            .iter()
            .any(|op| op[5] == json!(first) || op[6] == json!(first))
    );
    let sum: u64 = model["strip"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|column| column.as_array().unwrap())
        .filter_map(Value::as_u64)
        .sum();
    assert_eq!(sum, 6_000, "the strip shows the whole run");
}

#[test]
fn a_run_leaves_all_its_files() {
    let (history, verdict) = story(200, true);
    let kept = std::env::var_os("PALYRA_JEPSEN_SAMPLE");
    let temporary = tempfile::tempdir().unwrap();
    let folder = kept.map_or(temporary.path().to_owned(), Into::into);
    let results = export::results(&title(), &history, &verdict);
    export::write_all(&folder, &title(), &history, &verdict, &results).unwrap();
    for name in [
        "history.edn",
        "results.edn",
        "results.json",
        "junit.xml",
        "timeline.html",
        "independent/k0/history.edn",
    ] {
        assert!(fs::metadata(folder.join(name)).unwrap().len() > 100, "{name}");
    }
    let results: Value = serde_json::from_slice(&fs::read(folder.join("results.json")).unwrap()).unwrap();
    assert_eq!(results["valid"], json!(false));
    assert_eq!(results["ops"], json!(200));
    assert_eq!(
        Edn::all(&fs::read_to_string(folder.join("results.edn")).unwrap()),
        [results]
    );
}
