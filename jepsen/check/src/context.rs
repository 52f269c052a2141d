//! What a judge knows besides the history: limits, bounds that the run was promised, and the canonical journal.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::resolve::Canonical;
use crate::wgl::Limits;

/// What a run tells of itself to the judge; stored as `facts.json`. Each workload's module names the bounds that it uses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// Bounds by name, such as `watch_heal_ms`.
    pub bounds: BTreeMap<String, f64>,
    /// Actors whose every request is in the history, as the journal names them.
    pub actors: Vec<String>,
    /// Replicas by name, in the order in which they are shown.
    pub replicas: Vec<String>,
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
