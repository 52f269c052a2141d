//! Histories for tests, written as a list of operations with times in milliseconds.

use serde_json::Value;

use crate::evidence::MS;
use crate::history::{Event, History, Kind, Process};

/// A history that is being written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sketch {
    lines: Vec<Line>,
}

/// One operation.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    /// Of the call, in milliseconds.
    pub(crate) from: u64,
    /// Of its end.
    pub(crate) to: u64,
    /// How it ended.
    pub(crate) kind: Kind,
    /// The operation.
    pub(crate) f: String,
    /// Of the call.
    pub(crate) value: Value,
    /// What the answer adds.
    pub(crate) answer: Value,
    /// Of the call.
    pub(crate) request: Option<String>,
    /// Who was asked.
    pub(crate) node: Option<String>,
}

impl Sketch {
    /// Adds an operation that took effect.
    pub(crate) fn ok(&mut self, from: u64, to: u64, f: &str, value: Value, answer: Value) -> &mut Line {
        self.line(from, to, Kind::Ok, f, value, answer)
    }

    /// Adds any.
    pub(crate) fn line(
        &mut self,
        from: u64,
        to: u64,
        kind: Kind,
        f: &str,
        value: Value,
        answer: Value,
    ) -> &mut Line {
        self.lines.push(Line {
            from,
            to,
            kind,
            f: f.to_owned(),
            value,
            answer,
            request: None,
            node: None,
        });
        self.lines.last_mut().expect("one was just added")
    }

    /// The operations named so, in the order in which they were added.
    pub(crate) fn each<'a>(&'a mut self, f: &'a str) -> impl Iterator<Item = &'a mut Line> {
        self.lines.iter_mut().filter(move |line| line.f == f)
    }

    /// The one of these that stands at a place in that order.
    pub(crate) fn nth(&mut self, f: &str, at: usize) -> &mut Line {
        let mut named = self.lines.iter_mut().filter(|line| line.f == f);
        named.nth(at).expect("the sketch has so many of them")
    }

    /// Takes operations out.
    pub(crate) fn without(&mut self, f: &str) {
        self.lines.retain(|line| line.f != f);
    }

    /// The history, each operation with a process of its own.
    pub(crate) fn history(&self) -> History {
        let mut events: Vec<(u64, u8, Event)> = Vec::new();
        for (process, line) in (1..).zip(&self.lines) {
            let event = |time: u64, kind, value| Event {
                index: 0,
                time: time * MS,
                kind,
                process: Process::Client(process),
                f: line.f.clone(),
                value,
                node: line.node.clone(),
                rev: None,
                request: line.request.clone(),
                error: None,
            };
            let mut answer = line.value.clone();
            if let (Some(all), Some(more)) = (answer.as_object_mut(), line.answer.as_object()) {
                all.extend(more.clone());
            }
            events.push((line.from, 1, event(line.from, Kind::Invoke, line.value.clone())));
            let after = u8::from(line.from == line.to) * 2;
            events.push((line.to, after, event(line.to, line.kind, answer)));
        }
        events.sort_by_key(|(time, order, _)| (*time, *order));
        let numbered = (0..)
            .zip(events)
            .map(|(index, (_, _, event))| Event { index, ..event });
        History {
            events: numbered.collect(),
        }
    }
}

/// The name of the check that is violated; panics when there is none, or one that nobody can tell.
pub(crate) fn violated(checks: &[crate::Check]) -> Vec<&str> {
    let is = |check: &&crate::Check| matches!(check.outcome, crate::Outcome::Invalid { .. });
    checks
        .iter()
        .filter(is)
        .map(|check| check.name.as_str())
        .collect()
}

/// Panics unless all hold.
pub(crate) fn all_hold(checks: &[crate::Check]) {
    let bad: Vec<_> = checks.iter().filter(|check| !check.holds()).collect();
    assert!(bad.is_empty(), "{bad:#?}");
}
