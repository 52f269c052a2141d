//! The page for people: one file without anything from elsewhere, that shows who did what when, what was broken at that
//! moment, who led, and where it went wrong.
//!
//! Here the history becomes small numbers and short texts; `timeline/` has the page itself. Clients that come one
//! after the other share a lane. A history of more than [`WHOLE`] operations is shown around its first violation, or
//! its first fault; the strip below always shows the whole run.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use super::Title;
use super::junit::escape;
use crate::history::{Event, History, Kind, Op};
use crate::verdict::{Outcome, Verdict};

/// Up to so many operations are shown all.
pub const WHOLE: usize = 5_000;

/// How many are shown before and after the first violation of a larger history.
pub const AROUND: usize = 200;

/// How many when there is no violation.
const AROUND_FAULT: usize = 2_000;

/// Longest text of a value: enough for a row or a register, not for a page of a journal.
const TEXT: usize = 300;

/// Columns of the strip that shows the whole run.
const COLUMNS: usize = 240;

/// Most violations that the page lists.
const VIOLATIONS: usize = 100;

const PAGE: &str = include_str!("timeline/page.html");
const STYLE: &str = include_str!("timeline/style.css");
const SCRIPT: &str = include_str!("timeline/script.js");

/// The page.
#[must_use]
pub fn page(title: &Title, history: &History, verdict: &Verdict) -> String {
    let data = model(title, history, verdict).to_string();
    // Inside of a script element only this could end it.
    let data = data.replace("</", "<\\/").replace("<!--", "<\\!--");
    let name = format!("{} · {} · seed {}", title.workload, title.nemesis, title.seed);
    // One pass, so that nothing in the data is taken for a place.
    let mut page = String::with_capacity(PAGE.len() + STYLE.len() + SCRIPT.len() + data.len());
    let mut rest = PAGE;
    while let Some((before, after)) = rest.split_once("{{") {
        let (place, behind) = after.split_once("}}").unwrap_or((after, ""));
        page.push_str(before);
        page.push_str(match place {
            "title" => "",
            "style" => STYLE,
            "script" => SCRIPT,
            "data" => &data,
            other => other,
        });
        if place == "title" {
            page.push_str(&escape(&name));
        }
        rest = behind;
    }
    page + rest
}

/// What the page's script is given.
#[must_use]
pub fn model(title: &Title, history: &History, verdict: &Verdict) -> Value {
    let all = history.ops();
    let shown = window(&all, history, verdict);
    let ops = &all[shown.clone()];
    let lanes = lanes(ops);
    let end = history.events.last().map_or(0, |event| event.time);
    let mut names = Names::default();
    let rows: Vec<Value> = ops
        .iter()
        .zip(&lanes)
        .map(|(op, lane)| row(op, *lane, &mut names))
        .collect();
    json!({
        "title": title,
        "valid": verdict.valid(),
        "end": end,
        "total": all.len(),
        "from": shown.start,
        "lanes": lanes.iter().max().map_or(0, |most| most + 1),
        "names": names.texts,
        "ops": rows,
        "strip": strip(&all, end),
        "bands": bands(history, end),
        "marks": marks(history),
        "leaders": leaders(history, end),
        "phases": phases(history, end),
        "checks": checks(verdict),
        "anomalies": anomalies(verdict),
        "results": counts(&all),
    })
}

/// Which operations are shown.
fn window(all: &[Op<'_>], history: &History, verdict: &Verdict) -> std::ops::Range<usize> {
    if all.len() <= WHOLE {
        return 0..all.len();
    }
    let at = |index: u64| all.partition_point(|op| op.start() < index);
    let first = verdict.first().and_then(|(_, violation)| {
        let event = violation.events.iter().min();
        event
            .map(|event| at(*event))
            .or_else(|| Some(all.partition_point(|op| op.invoke.time < violation.time)))
    });
    let fault = || {
        let fault = history.faults().find(|event| phase(event) == Some("start"))?;
        Some(at(fault.index))
    };
    let (middle, around) = match first {
        Some(first) => (first, AROUND),
        None => (fault().unwrap_or(0), AROUND_FAULT),
    };
    let last = verdict
        .first()
        .and_then(|(_, violation)| violation.events.iter().max());
    // Both ends of a violation, if they are not too far from each other.
    let last = last
        .map_or(middle, |last| at(*last))
        .clamp(middle, middle + WHOLE);
    middle.saturating_sub(around)..(last + around + 1).min(all.len())
}

/// A lane for each operation: a process stays in one, and one that comes after another has ended takes over its lane.
fn lanes(ops: &[Op<'_>]) -> Vec<usize> {
    let mut ends: HashMap<u64, u64> = HashMap::new();
    for op in ops {
        if let Some(process) = process(op) {
            let end = op.end.map_or(u64::MAX, |end| end.index);
            ends.insert(process, end);
        }
    }
    let mut lane_of: HashMap<u64, usize> = HashMap::new();
    let mut free_at: Vec<u64> = Vec::new();
    let mut lanes = Vec::with_capacity(ops.len());
    for op in ops {
        let process = process(op).unwrap_or(0);
        let lane = *lane_of.entry(process).or_insert_with(|| {
            let free = free_at.iter().position(|end| *end < op.start());
            let lane = free.unwrap_or(free_at.len());
            if lane == free_at.len() {
                free_at.push(0);
            }
            free_at[lane] = ends.get(&process).copied().unwrap_or(u64::MAX);
            lane
        });
        lanes.push(lane);
    }
    lanes
}

fn process(op: &Op<'_>) -> Option<u64> {
    match op.invoke.process {
        crate::Process::Client(process) => Some(process),
        crate::Process::Nemesis(_) => None,
    }
}

/// Texts that are said often, by number.
#[derive(Default)]
struct Names {
    texts: Vec<String>,
    numbers: HashMap<String, usize>,
}

impl Names {
    fn number(&mut self, text: &str) -> usize {
        if let Some(known) = self.numbers.get(text) {
            return *known;
        }
        let new = self.texts.len();
        self.texts.push(text.to_owned());
        self.numbers.insert(text.to_owned(), new);
        new
    }
}

/// `[lane, called, ended, kind, name, first event, last event, replica, revision, process, call, answer, error]`.
fn row(op: &Op<'_>, lane: usize, names: &mut Names) -> Value {
    let kind = match op.kind() {
        Kind::Ok => 0,
        Kind::Fail => 1,
        Kind::Info | Kind::Invoke => 2,
    };
    let node = op
        .end
        .and_then(|end| end.node.as_deref())
        .or(op.invoke.node.as_deref());
    let answer = op
        .end
        .map(|end| &end.value)
        .filter(|value| **value != op.invoke.value);
    json!([
        lane,
        op.invoke.time,
        op.end.map(|end| end.time),
        kind,
        names.number(&op.invoke.f),
        op.start(),
        op.end.map(|end| end.index),
        node.map(|node| names.number(node)),
        op.rev(),
        process(op),
        short(&op.invoke.value),
        answer.map(short),
        op.end
            .and_then(|end| end.error.as_deref())
            .map(|error| cut(error.to_owned())),
    ])
}

fn short(value: &Value) -> String {
    cut(value.to_string())
}

fn cut(text: String) -> String {
    match text.char_indices().nth(TEXT) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text,
    }
}

/// Operations that ended as ok, fail and info, over the whole run.
fn strip(ops: &[Op<'_>], end: u64) -> Value {
    let mut columns = vec![[0u32; 3]; COLUMNS];
    for op in ops {
        let time = op.end.unwrap_or(op.invoke).time;
        let at = (u128::from(time) * COLUMNS as u128 / (u128::from(end) + 1)) as usize;
        let kind = match op.kind() {
            Kind::Ok => 0,
            Kind::Fail => 1,
            Kind::Info | Kind::Invoke => 2,
        };
        columns[at.min(COLUMNS - 1)][kind] += 1;
    }
    json!(columns)
}

fn phase(event: &Event) -> Option<&str> {
    event.value.get("phase").and_then(Value::as_str)
}

/// What happens at a moment or lasts by other rules, and is no fault.
const NO_FAULTS: &[&str] = &["leader", "phase", "healed"];

/// Faults with a begin and an end.
fn bands(history: &History, end: u64) -> Vec<Value> {
    let mut open: BTreeMap<(String, String), &Event> = BTreeMap::new();
    let mut bands = Vec::new();
    let band = |begun: &Event, to: u64, over: &Event| {
        let outcome = over.value.get("outcome").and_then(Value::as_str);
        json!({
            "name": begun.f, "from": begun.time, "to": to, "targets": begun.value.get("targets"),
            "outcome": outcome, "why": over.value.get("why").and_then(Value::as_str).map(|why| cut(why.to_owned())),
        })
    };
    for event in history
        .faults()
        .filter(|event| !NO_FAULTS.contains(&event.f.as_str()))
    {
        let id = event.value.get("id").map_or(String::new(), Value::to_string);
        let key = (event.f.clone(), id);
        match phase(event) {
            Some("start") => drop(open.insert(key, event)),
            Some("stop") => bands.extend(open.remove(&key).map(|begun| band(begun, event.time, event))),
            _ => {}
        }
    }
    bands.extend(open.into_values().map(|begun| band(begun, end, begun)));
    bands.sort_by_key(|band| band["from"].as_u64());
    bands
}

/// What the nemesis tells of single moments.
fn marks(history: &History) -> Vec<Value> {
    let single = history.faults().filter(|event| {
        event.f == "healed"
            || (!NO_FAULTS.contains(&event.f.as_str()) && !matches!(phase(event), Some("start" | "stop")))
    });
    single
        .map(|event| json!({"name": event.f, "at": event.time, "value": short(&event.value)}))
        .collect()
}

/// Spans from an event of this name to the next one.
fn spans(history: &History, f: &str, end: u64, tell: fn(&Value) -> Value) -> Vec<Value> {
    let events: Vec<&Event> = history.faults().filter(|event| event.f == f).collect();
    let ends = events.iter().skip(1).map(|event| event.time).chain([end]);
    let spans = events.iter().zip(ends).map(|(event, to)| {
        let mut span = tell(&event.value);
        span["from"] = event.time.into();
        span["to"] = to.into();
        span
    });
    spans.collect()
}

fn leaders(history: &History, end: u64) -> Vec<Value> {
    spans(
        history,
        "leader",
        end,
        |value| json!({"replica": value["replica"], "term": value["term"]}),
    )
}

fn phases(history: &History, end: u64) -> Vec<Value> {
    spans(history, "phase", end, |value| json!({"name": value["phase"]}))
}

fn checks(verdict: &Verdict) -> Vec<Value> {
    let told = verdict.checks.iter().map(|check| {
        let (outcome, what, count) = match &check.outcome {
            Outcome::Valid => ("valid", String::new(), 0),
            Outcome::Unknown { why } => ("unknown", why.clone(), 0),
            Outcome::Invalid { violations } => {
                let first = violations
                    .first()
                    .map_or(String::new(), |first| first.what.clone());
                ("invalid", first, violations.len())
            }
        };
        json!({"name": check.name, "outcome": outcome, "what": what, "count": count, "facts": check.facts})
    });
    told.collect()
}

fn anomalies(verdict: &Verdict) -> Vec<Value> {
    let mut all: Vec<(u64, Value)> = Vec::new();
    for check in &verdict.checks {
        let Outcome::Invalid { violations } = &check.outcome else {
            continue;
        };
        all.extend(violations.iter().map(|violation| {
            let told = json!({
                "check": check.name, "what": violation.what, "time": violation.time, "events": violation.events,
            });
            (violation.time, told)
        }));
    }
    all.sort_by_key(|(time, _)| *time);
    all.into_iter().take(VIOLATIONS).map(|(_, told)| told).collect()
}

fn counts(ops: &[Op<'_>]) -> Value {
    let count = |kind: Kind| ops.iter().filter(|op| op.kind() == kind).count();
    json!({"ok": count(Kind::Ok), "fail": count(Kind::Fail), "info": count(Kind::Info)})
}
