//! Histories: what clients asked and what they heard, in the order in which that happened.
//!
//! The format is Jepsen's: a flat list of events, two for each operation, `invoke` and one of `ok`, `fail`, `info`.
//! `fail` means that the operation certainly had no effect, `info` that nobody knows. A process has one operation at a
//! time; after an `info` it is never used again, so that whatever is still under way overlaps everything later.
//!
//! What came before what is told by `index`, never by `time`: a recorder writes `invoke` before it sends and the end
//! after it heard, so that an end with a lower index than an invocation really came before it, also when the clock has
//! only a coarse tick.
//!
//! Events of the process `nemesis`, all `info`:
//!
//! | `f` | `value` |
//! |---|---|
//! | a fault's name: `kill`, `partition:leader` | `{"id": 3, "phase": "start" or "stop", "targets": ["r1"], ...}` |
//! | `leader` | `{"replica": "r2", "term": 7}`: it was first seen to lead |
//! | `phase` | `{"phase": "before"}`: what the run does from here on |
//! | `healed` | `{}`: the last fault has ended and all replicas are up; what must follow is timed from here |
//!
//! Any other one is a single moment, such as `ended` of a process.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What an event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The operation was sent.
    Invoke,
    /// It took effect.
    Ok,
    /// It had no effect and never will.
    Fail,
    /// Nobody knows. Of the nemesis: something that it did.
    Info,
}

/// Who does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Process {
    /// A client; never used again after an `info`.
    Client(u64),
    /// The one that causes faults. Its events are all `info`.
    Nemesis(Nemesis),
}

/// The word `nemesis`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Nemesis {
    /// Its only value.
    Nemesis,
}

/// One line of `history.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its place in the history.
    pub index: u64,
    /// Nanoseconds since the run began, on one monotonic clock for the whole run; virtual in a simulation.
    pub time: u64,
    /// What it says.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// Who.
    pub process: Process,
    /// The operation; the workload's module lists them.
    pub f: String,
    /// Its arguments, and in the completion its answer.
    pub value: Value,
    /// Name of the replica that was asked: `r2`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The log index that the answer reflects: of a change, that of its entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rev: Option<u64>,
    /// The request id, which the journal has too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
    /// Why it failed or is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An operation: a call, and what became of it.
#[derive(Clone, Copy, Debug)]
pub struct Op<'a> {
    /// The call.
    pub invoke: &'a Event,
    /// How it ended; `None` when the history ends before it does, which is as good as `info`.
    pub end: Option<&'a Event>,
}

/// A whole history.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// In the order in which they happened.
    pub events: Vec<Event>,
}

/// A call that has not ended yet.
#[derive(Debug)]
#[must_use = "an operation that is not completed counts as unknown"]
pub struct Pending {
    /// Its process.
    pub process: u64,
    f: String,
    node: Option<String>,
    request: Option<String>,
}

/// What a completion says besides its kind.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// Arguments and answer.
    pub value: Value,
    /// See [`Event::rev`].
    pub rev: Option<u64>,
    /// See [`Event::error`].
    pub error: Option<String>,
    /// The replica that answered in the end, when it is another.
    pub node: Option<String>,
}

/// Writes a history down while it happens. The caller brings the clock, so that a simulation can bring its own.
#[derive(Debug, Default)]
pub struct Recorder {
    history: History,
    next_process: u64,
}

impl<'a> Op<'a> {
    /// `ok`, `fail` or `info`.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.end.map_or(Kind::Info, |end| end.kind)
    }

    /// The answer's value, or the call's when there is none.
    #[must_use]
    pub fn value(&self) -> &'a Value {
        self.end.map_or(&self.invoke.value, |end| &end.value)
    }

    /// See [`Event::rev`].
    #[must_use]
    pub fn rev(&self) -> Option<u64> {
        self.end.and_then(|end| end.rev)
    }

    /// Index of its call.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.invoke.index
    }

    /// Index of its end; `None` when nobody knows that it ended.
    #[must_use]
    pub fn stop(&self) -> Option<u64> {
        self.end.filter(|end| end.kind != Kind::Info).map(|end| end.index)
    }

    /// Whether it took effect for certain.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.kind() == Kind::Ok
    }

    /// Indexes of its events.
    #[must_use]
    pub fn events(&self) -> Vec<u64> {
        std::iter::once(self.invoke.index)
            .chain(self.end.map(|end| end.index))
            .collect()
    }

    /// A field of the answer's value, or else of the call's.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&'a Value> {
        let found = self.end.and_then(|end| end.value.get(name));
        found.or_else(|| self.invoke.value.get(name))
    }

    /// When it returned; `None` when nobody knows that it did.
    #[must_use]
    pub fn returned(&self) -> Option<u64> {
        self.end.filter(|end| end.kind != Kind::Info).map(|end| end.time)
    }
}

impl History {
    /// The clients' operations, in the order of their calls.
    #[must_use]
    pub fn ops(&self) -> Vec<Op<'_>> {
        let mut open: BTreeMap<u64, usize> = BTreeMap::new();
        let mut ops: Vec<Op<'_>> = Vec::new();
        for event in &self.events {
            let Process::Client(process) = event.process else {
                continue;
            };
            if event.kind == Kind::Invoke {
                open.insert(process, ops.len());
                ops.push(Op {
                    invoke: event,
                    end: None,
                });
            } else if let Some(at) = open.remove(&process) {
                ops[at].end = Some(event);
            }
        }
        ops
    }

    /// When the last fault had ended, in nanoseconds; `None` when the run did not say.
    #[must_use]
    pub fn healed(&self) -> Option<u64> {
        self.faults()
            .filter(|event| event.f == "healed")
            .map(|event| event.time)
            .last()
    }

    /// Where the history breaks its own rules, at most a hundred places. Such a history is the harness's failure, and
    /// no verdict can be built on it.
    #[must_use]
    pub fn problems(&self) -> Vec<Problem> {
        let mut rules = Rules::default();
        for (at, event) in self.events.iter().enumerate() {
            rules.see(at as u64, event);
            if rules.problems.len() >= MAX_PROBLEMS {
                break;
            }
        }
        rules.problems
    }

    /// What the nemesis did.
    pub fn faults(&self) -> impl Iterator<Item = &Event> {
        self.events
            .iter()
            .filter(|event| matches!(event.process, Process::Nemesis(_)))
    }
}

/// How many problems of one history are told: the first ones say what is wrong with the recorder.
const MAX_PROBLEMS: usize = 100;

/// A place where a history breaks its own rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Position in the history, from 0.
    pub at: u64,
    /// Which rule, and how.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "event {}: {}", self.at, self.what)
    }
}

/// What the rules of a history need to remember of its beginning.
#[derive(Default)]
struct Rules<'a> {
    time: u64,
    open: BTreeMap<u64, &'a Event>,
    ended: BTreeSet<u64>,
    problems: Vec<Problem>,
}

impl<'a> Rules<'a> {
    fn see(&mut self, at: u64, event: &'a Event) {
        let mut wrong = |what: String| self.problems.push(Problem { at, what });
        if event.index != at {
            wrong(format!(
                "its index is {}, and {at} events stand before it",
                event.index
            ));
        }
        if event.time < self.time {
            wrong(format!(
                "its time, {} ns, is before that of the event before it, {} ns",
                event.time, self.time
            ));
        }
        self.time = self.time.max(event.time);
        let process = match event.process {
            Process::Client(process) => process,
            Process::Nemesis(_) if event.kind == Kind::Info => return,
            Process::Nemesis(_) => return wrong("an event of the nemesis that is not `info`".into()),
        };
        if event.kind == Kind::Invoke {
            if self.ended.contains(&process) {
                wrong(format!(
                    "process {process} calls `{}` although its last operation ended as `info`",
                    event.f
                ));
            }
            if let Some(before) = self.open.insert(process, event) {
                self.problems.push(Problem {
                    at,
                    what: format!(
                        "process {process} calls `{}` while its `{}` (event {}) is under way",
                        event.f, before.f, before.index
                    ),
                });
            }
            return;
        }
        match self.open.remove(&process) {
            None => wrong(format!(
                "process {process} ends a `{}` that it never called",
                event.f
            )),
            Some(call) if call.f != event.f => wrong(format!(
                "process {process} called `{}` (event {}) and ends `{}`",
                call.f, call.index, event.f
            )),
            Some(_) => {}
        }
        if event.kind == Kind::Info {
            self.ended.insert(process);
        }
    }
}

impl Recorder {
    /// A process that was never used.
    pub fn process(&mut self) -> u64 {
        self.next_process += 1;
        self.next_process
    }

    /// A call goes out.
    pub fn invoke(
        &mut self,
        time: u64,
        process: u64,
        f: &str,
        value: Value,
        node: Option<String>,
        request: Option<String>,
    ) -> Pending {
        let pending = Pending {
            process,
            f: f.to_owned(),
            node,
            request,
        };
        let answer = Answer {
            value,
            ..Answer::default()
        };
        self.push(time, Kind::Invoke, &pending, answer);
        pending
    }

    /// It has ended.
    pub fn complete(&mut self, time: u64, pending: &Pending, kind: Kind, answer: Answer) {
        self.push(time, kind, pending, answer);
    }

    /// The nemesis did something.
    pub fn fault(&mut self, time: u64, f: &str, value: Value) {
        let index = self.history.events.len() as u64;
        self.history.events.push(Event {
            index,
            time,
            kind: Kind::Info,
            process: Process::Nemesis(Nemesis::Nemesis),
            f: f.to_owned(),
            value,
            node: None,
            rev: None,
            request: None,
            error: None,
        });
    }

    fn push(&mut self, time: u64, kind: Kind, pending: &Pending, answer: Answer) {
        let index = self.history.events.len() as u64;
        self.history.events.push(Event {
            index,
            time,
            kind,
            process: Process::Client(pending.process),
            f: pending.f.clone(),
            value: answer.value,
            node: answer.node.or_else(|| pending.node.clone()),
            rev: answer.rev,
            request: pending.request.clone(),
            error: answer.error,
        });
    }

    /// What was written down so far.
    #[must_use]
    pub fn history(&self) -> &History {
        &self.history
    }
}
