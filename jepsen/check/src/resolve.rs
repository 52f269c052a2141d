//! Outcomes that nobody knew, told by the canonical journal afterwards.
//!
//! Invariants: only a journal that passed its own checks on every replica is canonical (see [`crate::journal`]);
//! absence means *never* only when the journal is whole, from its first row on, and was read after all replicas had
//! converged. The checks that would let the system explain itself away run on the unresolved history.

use std::collections::HashMap;

use crate::history::Op;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It took effect in the entry with this log index.
    At(u64),
    /// It had no effect, and never will.
    Never,
    /// The journal cannot tell.
    Open,
}

/// The journal that the cluster ended with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Canonical {
    /// By request id, the log index of the entry.
    pub revs: HashMap<String, u64>,
    /// Nothing is missing, and nothing can come any more.
    pub whole: bool,
}

impl Canonical {
    /// What became of an operation.
    #[must_use]
    pub fn fate(&self, op: &Op<'_>) -> Fate {
        let Some(request) = &op.invoke.request else {
            return Fate::Open;
        };
        match self.revs.get(request) {
            Some(rev) => Fate::At(*rev),
            None if self.whole => Fate::Never,
            None => Fate::Open,
        }
    }
}
