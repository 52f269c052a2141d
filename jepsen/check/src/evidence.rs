//! What the checkers of pairing, revocations, leases and dispatches share: rows of the server's own account, times in
//! which something was broken on purpose, and how long something may take when time is lost to faults.
//!
//! What never lives here: a condition. Invariants: a value that lacks a field is a failure of the harness, and ends
//! as *unknown*; a journal that was not read to its end proves nothing by what it lacks.
//!
//! # The operation `rows`
//!
//! `rows` is read at the end, page by page. Its `ok` has `{"rows": [ROW, …], "end": BOOL}`; `end` is true when the
//! page reaches the newest row. A ROW is `{"index", "ordinal", "at_ms", "action", "subject", "detail": {NAME:
//! TEXT}}`, as the server's journal has it, with `"request"` where it has one; `at_ms` is the server's time.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::history::{History, Kind, Op};
use crate::verdict::{Check, Violation};

/// Nanoseconds of a millisecond.
pub const MS: u64 = 1_000_000;

/// A time in which a fault was under way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Nanoseconds since the run began.
    pub from: u64,
    /// The same, of its end.
    pub to: u64,
    /// The fault.
    #[serde(default)]
    pub name: String,
    /// Replicas that are cut off from every quorum by it, or whose process stands still; empty when none is known to
    /// be.
    #[serde(default)]
    pub isolated: Vec<String>,
}

/// What a checker is told of the run that the history does not say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Setting {
    /// Times of faults, those of the last stage (restarts, healing) included.
    pub faults: Vec<Window>,
    /// For a cluster to serve again after a fault has ended, and for what is due to be noticed.
    pub recover_ms: u64,
    /// The server's time at the begin of the run. `None` when its clock was moved: what compares the two is skipped.
    pub epoch_ms: Option<u64>,
    /// The history's end, when clients stopped; 0: that of its last event.
    pub end: u64,
}

impl Default for Setting {
    fn default() -> Self {
        Setting {
            faults: Vec::new(),
            recover_ms: 5_000,
            epoch_ms: None,
            end: 0,
        }
    }
}

/// Partitions that leave the replicas that they strike without a quorum, when they strike a minority.
const ISOLATING: [&str; 5] = [
    "partition:leader",
    "partition:one",
    "partition:peers-only",
    "partition:oneway-in",
    "isolate-until-snapshot",
];

impl Setting {
    /// As the nemesis's events in a history tell it (see [`crate::history`]): faults with their `start` and `stop`,
    /// `phase` with `{"phase"}`, `ended` of a process, and `healed` when the last stage has everything started and in
    /// agreement.
    #[must_use]
    pub fn of(history: &History, epoch_ms: Option<u64>) -> Setting {
        let nodes: BTreeSet<&str> = history
            .events
            .iter()
            .filter_map(|event| event.node.as_deref())
            .collect();
        let end = history.events.last().map_or(0, |event| event.time);
        let mut open: BTreeMap<u64, Window> = BTreeMap::new();
        let mut setting = Setting {
            epoch_ms,
            ..Setting::default()
        };
        let point = |time: u64, name: &str| Window {
            from: time,
            to: time,
            name: name.to_owned(),
            isolated: Vec::new(),
        };
        for event in history.faults() {
            let value = &event.value;
            let number = value["id"].as_u64().unwrap_or(0);
            let name = event.f.as_str();
            let what = match value["phase"].as_str() {
                Some(phase @ ("start" | "stop")) => phase,
                _ => name,
            };
            match what {
                "start" => {
                    if name.starts_with("clock") || name.starts_with("cert-expire") {
                        setting.epoch_ms = None;
                    }
                    let mut window = point(event.time, name);
                    window.isolated = isolated(name, value, nodes.len());
                    open.insert(number, window);
                }
                "stop" => {
                    let window = open.remove(&number).filter(|_| value["outcome"] != "skipped");
                    setting.faults.extend(window.map(|window| Window {
                        to: event.time,
                        ..window
                    }));
                }
                "phase" if value["phase"] == "final" => {
                    drop(open.insert(FINAL, point(event.time, "last stage")))
                }
                "healed" => setting.faults.extend(open.remove(&FINAL).map(|window| Window {
                    to: event.time,
                    ..window
                })),
                "ended" => setting.faults.push(point(event.time, "end of a process")),
                _ => {}
            }
        }
        setting
            .faults
            .extend(open.into_values().map(|window| Window { to: end, ..window }));
        setting.faults.sort_by_key(|window| window.from);
        setting
    }

    /// Faults with the time that it takes to recover from them, in order, none touching another.
    #[must_use]
    pub fn disturbed(&self) -> Vec<(u64, u64)> {
        let after = self.recover_ms.saturating_mul(MS);
        let mut all: Vec<(u64, u64)> = self
            .faults
            .iter()
            .map(|window| (window.from, window.to.saturating_add(after)))
            .collect();
        all.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (from, to) in all {
            match joined.last_mut() {
                Some(last) if from <= last.1 => last.1 = last.1.max(to),
                _ => joined.push((from, to)),
            }
        }
        joined
    }

    /// When something is due that takes `bound` of undisturbed time from `from` on.
    #[must_use]
    pub fn due(&self, from: u64, bound: u64) -> u64 {
        let mut at = from;
        let mut left = bound;
        for (begin, end) in self.disturbed() {
            if end <= at {
                continue;
            }
            let calm = begin.saturating_sub(at);
            if calm > left {
                break;
            }
            left -= calm.min(left);
            at = at.max(end);
        }
        at.saturating_add(left)
    }

    /// Whether nothing was wrong from `from` to `to`.
    #[must_use]
    pub fn is_calm(&self, from: u64, to: u64) -> bool {
        !self
            .disturbed()
            .iter()
            .any(|(begin, end)| *begin <= to && from < *end)
    }

    /// What was wrong at that moment, each fault once: those that lasted, and those that were being recovered from;
    /// `none` alone when nothing was.
    #[must_use]
    pub fn faults_at(&self, time: u64) -> BTreeSet<&str> {
        let after = self.recover_ms.saturating_mul(MS);
        let lasts = |window: &&Window| (window.from..=window.to.saturating_add(after)).contains(&time);
        let found: BTreeSet<&str> = self
            .faults
            .iter()
            .filter(lasts)
            .map(|window| window.name.as_str())
            .collect();
        if found.is_empty() {
            return BTreeSet::from(["none"]);
        }
        found
    }

    /// The moment of the run at which the server's clock said so.
    #[must_use]
    pub fn moment(&self, at_ms: u64) -> Option<u64> {
        let since = at_ms.saturating_sub(self.epoch_ms?);
        Some(since.saturating_mul(MS))
    }

    /// Where the history ends.
    #[must_use]
    pub fn end_of(&self, history: &History) -> u64 {
        let last = history.events.last().map_or(0, |event| event.time);
        if self.end == 0 { last } else { self.end.min(last) }
    }
}

/// The number under which the last stage stands among faults.
const FINAL: u64 = u64::MAX;

/// Who has no quorum while this lasts.
fn isolated(nemesis: &str, value: &Value, replicas: usize) -> Vec<String> {
    let minority = |names: &[String]| names.len() * 2 < replicas;
    let targets = value["targets"].as_array().into_iter().flatten();
    let targets: Vec<String> = targets
        .filter_map(|name| name.as_str().map(str::to_owned))
        .collect();
    if ISOLATING.contains(&nemesis) {
        return Some(targets).filter(|names| minority(names)).unwrap_or_default();
    }
    if nemesis == "partition:halves" {
        let order: Vec<&str> = value["draw"].as_str().unwrap_or("").split(',').collect();
        let rest = order.get(order.len() / 2 + 1..).unwrap_or_default();
        let rest: Vec<String> = rest.iter().map(|name| (*name).to_owned()).collect();
        return Some(rest).filter(|names| minority(names)).unwrap_or_default();
    }
    Vec::new()
}

/// A row of the server's journal.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Row {
    /// Log index of its entry.
    pub index: u64,
    /// Place within the entry.
    pub ordinal: u64,
    /// The server's time.
    pub at_ms: u64,
    /// What happened.
    pub action: String,
    /// To what.
    pub subject: String,
    /// Under which request id; empty when it has none.
    #[serde(default)]
    pub request: String,
    /// More, by name.
    #[serde(default)]
    pub detail: BTreeMap<String, String>,
}

impl Row {
    /// A detail; empty when there is none.
    #[must_use]
    pub fn detail(&self, name: &str) -> &str {
        self.detail.get(name).map_or("", String::as_str)
    }

    /// A detail that is a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.detail(name).parse().ok()
    }
}

/// The server's journal as it was read at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// In their order, each once.
    pub rows: Vec<Row>,
    /// Whether the newest is among them.
    pub whole: bool,
    /// The event that completed the reading.
    pub event: u64,
    /// When that was.
    pub time: u64,
}

impl Rows {
    /// Reads them out of a history. `None` when nobody has read the journal.
    ///
    /// Errors: pages that are not what the doc of this module says.
    pub fn of(ops: &[Op<'_>]) -> Result<Option<Rows>, String> {
        let mut found: BTreeMap<(u64, u64), Row> = BTreeMap::new();
        let (mut any, mut whole, mut event, mut time) = (false, false, 0, 0);
        for op in ops
            .iter()
            .filter(|op| op.invoke.f == "rows" && op.kind() == Kind::Ok)
        {
            any = true;
            let page = Row::page(op)?;
            found.extend(page.into_iter().map(|row| ((row.index, row.ordinal), row)));
            whole |= op.value()["end"].as_bool().unwrap_or(false);
            let end = op.end.unwrap_or(op.invoke);
            (event, time) = (end.index, end.time);
        }
        let rows = found.into_values().collect();
        Ok(any.then_some(Rows {
            rows,
            whole,
            event,
            time,
        }))
    }

    /// Those of one action.
    pub fn of_action<'r>(&'r self, action: &'r str) -> impl Iterator<Item = &'r Row> {
        self.rows.iter().filter(move |row| row.action == action)
    }

    /// A violation that rows show.
    #[must_use]
    pub fn violation(&self, what: String) -> Violation {
        Violation {
            what,
            time: self.time,
            events: vec![self.event],
        }
    }
}

impl Row {
    fn page(op: &Op<'_>) -> Result<Vec<Row>, String> {
        Deserialize::deserialize(&op.value()["rows"])
            .map_err(|error| format!("event {}: rows: {error}", op.invoke.index))
    }
}

/// A field that is text.
///
/// Errors: it is missing or something else.
pub fn text<'a>(op: &Op<'a>, name: &str) -> Result<&'a str, String> {
    field(op, name).as_str().ok_or_else(|| lacks(op, name, "a text"))
}

/// A field that is a number.
///
/// Errors: it is missing or something else.
pub fn number(op: &Op<'_>, name: &str) -> Result<u64, String> {
    field(op, name)
        .as_u64()
        .ok_or_else(|| lacks(op, name, "a number"))
}

/// A field of the answer, or of the call when the answer does not have it.
#[must_use]
pub fn field<'a>(op: &Op<'a>, name: &str) -> &'a Value {
    match &op.value()[name] {
        Value::Null => &op.invoke.value[name],
        found => found,
    }
}

fn lacks(op: &Op<'_>, name: &str, what: &str) -> String {
    format!(
        "event {}: {} has no {name:?} that is {what}",
        op.invoke.index, op.invoke.f
    )
}

/// What is said when a history is not what a checker can read: that is the harness's fault and no verdict.
#[must_use]
pub fn unreadable(workload: &str, why: &str) -> Vec<Check> {
    vec![Check::unknown(format!("{workload}.history"), why)]
}

/// A violation that operations show, at the time of the last of them.
#[must_use]
pub fn violation(what: String, ops: &[&Op<'_>]) -> Violation {
    let ends: Vec<&crate::Event> = ops.iter().map(|op| op.end.unwrap_or(op.invoke)).collect();
    Violation {
        what,
        time: ends.iter().map(|event| event.time).max().unwrap_or(0),
        events: ends.iter().map(|event| event.index).collect(),
    }
}

/// Seconds, for people.
#[must_use]
pub fn seconds(nanoseconds: u64) -> String {
    let ms = nanoseconds / MS;
    format!("{}.{:03} s", ms / 1_000, ms % 1_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(faults: &[(u64, u64)]) -> Setting {
        let faults = faults.iter().map(|&(from, to)| Window {
            from: from * MS,
            to: to * MS,
            ..Window::default()
        });
        Setting {
            faults: faults.collect(),
            recover_ms: 10,
            ..Setting::default()
        }
    }

    #[test]
    fn faults_are_read_from_the_history() {
        let mut recorder = crate::Recorder::default();
        let process = recorder.process();
        for (time, node) in [(1, "r1"), (2, "r2"), (3, "r3")] {
            let call = recorder.invoke(time, process, "x", json!({}), Some(node.to_owned()), None);
            recorder.complete(time, &call, Kind::Ok, crate::history::Answer::default());
        }
        let mut fault = |time: u64, id: u64, name: &str, phase: &str, outcome: &str| {
            let (targets, draw) = match name {
                "partition:leader" => (json!(["r2"]), ""),
                "partition:halves" => (json!([]), "r3,r1,r2"),
                _ => (json!(["r1", "r2"]), ""),
            };
            let value =
                json!({"id": id, "phase": phase, "targets": targets, "draw": draw, "outcome": outcome});
            recorder.fault(time, name, value);
        };
        fault(10, 1, "partition:leader", "start", "");
        fault(20, 2, "partition:halves", "start", "");
        fault(25, 4, "kill", "start", "");
        fault(26, 4, "kill", "stop", "skipped");
        fault(30, 1, "partition:leader", "stop", "installed");
        fault(40, 2, "partition:halves", "stop", "installed");
        fault(50, 3, "partition:one", "start", "");
        recorder.fault(60, "phase", json!({"phase": "final"}));
        recorder.fault(70, "healed", json!({}));
        recorder.fault(80, "ended", json!({"replica": "r1"}));
        let setting = Setting::of(recorder.history(), Some(5));
        let times: Vec<_> = setting
            .faults
            .iter()
            .map(|window| (window.from, window.to))
            .collect();
        assert_eq!(times, [(10, 30), (20, 40), (50, 80), (60, 70), (80, 80)]);
        let alone: Vec<String> = setting
            .faults
            .iter()
            .map(|window| window.isolated.join("+"))
            .collect();
        assert_eq!(
            alone,
            ["r2", "r2", "", "", ""],
            "a majority that is cut off serves on"
        );
        assert_eq!(setting.epoch_ms, Some(5));
        recorder.fault(
            90,
            "clock:jump",
            json!({"id": 9, "phase": "start", "targets": ["r1"]}),
        );
        assert_eq!(Setting::of(recorder.history(), Some(5)).epoch_ms, None);
    }

    #[test]
    fn time_lost_to_faults_does_not_count() {
        let setting = with(&[(100, 150), (155, 200), (400, 410)]);
        assert_eq!(setting.disturbed(), [(100 * MS, 210 * MS), (400 * MS, 420 * MS)]);
        for (from, bound, due) in [
            (0, 50, 50),
            (0, 99, 99),
            (0, 120, 230),
            (150, 5, 215),
            (210, 100, 310),
            (300, 100, 420),
            (300, 110, 430),
            (500, 7, 507),
        ] {
            assert_eq!(setting.due(from * MS, bound * MS), due * MS, "{from} {bound}");
        }
        assert!(setting.is_calm(0, 99 * MS) && setting.is_calm(210 * MS, 399 * MS));
        assert!(!setting.is_calm(0, 100 * MS) && !setting.is_calm(205 * MS, 208 * MS));
    }
}
