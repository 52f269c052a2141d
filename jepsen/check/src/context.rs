//! What a judge knows besides the history: limits, bounds that the run was promised, and the canonical journal.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::evidence::Setting;
use crate::resolve::Canonical;
use crate::revocation;
use crate::wgl::Limits;

/// What a run tells of itself to the judge; stored as `facts.json`. Each workload's module names the bounds that it
/// uses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Bounds by name, such as `watch_heal_ms`.
    pub bounds: BTreeMap<String, f64>,
    /// Actors whose every request is in the history, as the journal names them.
    pub actors: Vec<String>,
    /// Replicas by name, in the order in which they are shown; each is read at the end.
    pub replicas: Vec<String>,
    /// Operations whose changes leave entries in the journal, besides those that always do.
    pub journaled: Vec<String>,
    /// No request of a client was under way any more when the journal was last read: what it does not have never was.
    pub settled: bool,
    /// How rows of the journal tell of registers; `None` when they do not.
    pub registers: Option<RegisterRows>,
    /// When something was broken on purpose, and how long things may take.
    pub setting: Setting,
    /// Within what time revocations must hold.
    pub revocation: revocation::Bounds,
}

/// Which rows of the journal tell of registers: their subject is the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterRows {
    /// Their action.
    pub action: String,
    /// Name of the detail that holds the version.
    pub version: String,
}

/// What checkers are given.
#[derive(Clone, Debug, Default)]
pub struct Context {
    /// When searches give up.
    pub limits: Limits,
    /// See [`Facts`].
    pub facts: Facts,
    /// The journal that the cluster ended with, when it passed its own checks.
    pub canonical: Option<Canonical>,
}

impl Context {
    /// A bound.
    #[must_use]
    pub fn bound(&self, name: &str) -> Option<f64> {
        self.facts.bounds.get(name).copied()
    }

    /// A bound, or what it is when the run says nothing.
    #[must_use]
    pub fn bound_or(&self, name: &str, usual: f64) -> f64 {
        self.bound(name).unwrap_or(usual)
    }
}
