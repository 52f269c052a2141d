//! What checkers say.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::history::Op;

/// How one check ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// It holds.
    Valid,
    /// It is violated, the first violation first.
    Invalid {
        /// At most a hundred.
        violations: Vec<Violation>,
    },
    /// Time, memory or the history did not suffice to say.
    Unknown {
        /// Why.
        why: String,
    },
}

/// One violation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Violation {
    /// One line for people: the thing, what it did, what it should have done.
    pub what: String,
    /// Nanoseconds since the run began.
    pub time: u64,
    /// Indexes of the events that show it.
    pub events: Vec<u64>,
}

impl Violation {
    /// What operations did: `what` for people, the time and the events from the operations, the last of which gave it
    /// away.
    #[must_use]
    pub fn of(what: impl Into<String>, ops: &[&Op<'_>]) -> Self {
        let time = |op: &Op<'_>| op.end.unwrap_or(op.invoke).time;
        Violation {
            what: what.into(),
            time: ops.iter().map(|op| time(op)).max().unwrap_or(0),
            events: ops.iter().flat_map(|op| op.events()).collect(),
        }
    }
}

/// One named check of a history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// `registry.linearizable`: the workload, and the condition.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// Figures: how much was checked, bounds that were used, the worst that was seen.
    pub facts: BTreeMap<String, Value>,
}

/// All checks of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// In the order in which they ran.
    pub checks: Vec<Check>,
}

impl Check {
    /// Valid without violations, invalid with.
    #[must_use]
    pub fn of(name: impl Into<String>, mut violations: Vec<Violation>) -> Self {
        violations.sort_by_key(|violation| violation.time);
        violations.truncate(100);
        let outcome = if violations.is_empty() {
            Outcome::Valid
        } else {
            Outcome::Invalid { violations }
        };
        Check {
            name: name.into(),
            outcome,
            facts: BTreeMap::new(),
        }
    }

    /// What cannot be said.
    #[must_use]
    pub fn unknown(name: impl Into<String>, why: impl Into<String>) -> Self {
        let outcome = Outcome::Unknown { why: why.into() };
        Check {
            name: name.into(),
            outcome,
            facts: BTreeMap::new(),
        }
    }

    /// Adds a figure.
    #[must_use]
    pub fn fact(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(name.to_owned(), value.into());
        self
    }

    /// Whether it holds.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.outcome == Outcome::Valid
    }
}

impl Verdict {
    /// `Some(true)` when each check holds, `Some(false)` when one is violated, `None` when nobody knows: also when
    /// nothing was checked.
    #[must_use]
    pub fn valid(&self) -> Option<bool> {
        let violated = |check: &Check| matches!(check.outcome, Outcome::Invalid { .. });
        if self.checks.iter().any(violated) {
            Some(false)
        } else {
            (!self.checks.is_empty() && self.checks.iter().all(Check::holds)).then_some(true)
        }
    }

    /// `checks=5/6`: how many hold, of how many.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let holding = self.checks.iter().filter(|check| check.holds()).count();
        (holding, self.checks.len())
    }

    /// The earliest violation, with the name of its check.
    #[must_use]
    pub fn first(&self) -> Option<(&str, &Violation)> {
        let all = self.checks.iter().filter_map(|check| match &check.outcome {
            Outcome::Invalid { violations } => Some((check.name.as_str(), violations.first()?)),
            _ => None,
        });
        all.min_by_key(|(_, violation)| violation.time)
    }
}
