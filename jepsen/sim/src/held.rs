//! Leases as their worker sees them, and the resource that they protect. Never here: what a worker does when, see
//! `workers`.

use std::cell::RefCell;
use std::collections::BTreeMap;

use palyra_control::{CleanedUp, Finished, HeldLease, LeaseName};
use palyra_jepsen_check::history::Answer;
use palyra_state::Id;
use serde_json::Value;

use crate::fleet;

/// What leases protect: it takes no write under a fence that is lower than one before it for that place.
#[derive(Default)]
pub(crate) struct Resource(RefCell<BTreeMap<String, u64>>);

impl Resource {
    /// Whether a write is taken; one that does not `look` at fences takes them all.
    pub(crate) fn write(&self, places: &[String; 2], fence: u64, looks: bool) -> bool {
        let mut highest = self.0.borrow_mut();
        let passed = places
            .iter()
            .any(|place| highest.get(place).is_some_and(|seen| *seen > fence));
        if passed && looks {
            return false;
        }
        for place in places {
            let seen = highest.entry(place.clone()).or_default();
            *seen = (*seen).max(fence);
        }
        true
    }
}

/// Where a lease stands with its worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Its acceptance is not answered yet.
    Offered,
    /// It is the worker's; it works from the first confirmed renewal on.
    Running,
    /// Its result is not answered yet.
    Finishing,
    /// All of it is dead; the cleanup is not answered yet.
    Cleaning,
}

/// A lease that a worker has.
pub(crate) struct Lease {
    pub(crate) run: Id,
    pub(crate) slot: String,
    pub(crate) fence: u64,
    pub(crate) stage: Stage,
    /// The word of this stage, the same for each try.
    pub(crate) request: Id,
    pub(crate) said_at: Option<u64>,
    /// Own, conservative end, in nanoseconds of the run; 0 before the first confirmed renewal.
    pub(crate) until: u64,
    pub(crate) stopped: bool,
    pub(crate) ttl_ms: u64,
    pub(crate) renew_at: u64,
    /// When the work is done.
    pub(crate) done_at: u64,
    pub(crate) work_ms: u64,
}

impl Lease {
    /// The next stage, whose word was not said yet.
    pub(crate) fn next(&mut self, stage: Stage) {
        self.stage = stage;
        self.request = fleet::fresh();
        self.said_at = None;
    }

    /// As the worker reports it when a session begins.
    pub(crate) fn told(&self, id: Id) -> HeldLease {
        let state = match self.stage {
            Stage::Offered | Stage::Running => "running",
            Stage::Finishing => "finished",
            Stage::Cleaning => "cleaned",
        };
        HeldLease {
            lease: LeaseName {
                id: id.to_string(),
                fence: self.fence,
            },
            state: state.to_owned(),
            message: String::new(),
        }
    }
}

/// The result of every run.
pub(crate) fn succeeded() -> Finished {
    Finished {
        outcome: "succeeded".to_owned(),
        exit_code: Some(0),
        result: bytes::Bytes::from_static(b"{}"),
        ..Finished::default()
    }
}

/// All of it is dead and removed.
pub(crate) fn clean() -> CleanedUp {
    CleanedUp {
        ok: true,
        message: String::new(),
        removed_files: 0,
        removed_bytes: 0,
    }
}

/// An answer of the history that tells this.
pub(crate) fn answer(value: Value) -> Answer {
    Answer {
        value,
        ..Answer::default()
    }
}

/// One that was refused with this code.
pub(crate) fn refused(code: &str) -> Answer {
    Answer {
        error: Some(code.to_owned()),
        ..Answer::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resource_takes_nothing_behind_a_higher_fence() {
        let resource = Resource::default();
        let places = |run: &str, slot: &str| [format!("run {run}"), format!("slot {slot}")];
        assert!(resource.write(&places("a", "x/0"), 5, true));
        assert!(resource.write(&places("a", "y/0"), 7, true));
        assert!(!resource.write(&places("a", "x/0"), 5, true), "the run went on");
        assert!(!resource.write(&places("b", "y/0"), 6, true), "the slot went on");
        assert!(resource.write(&places("b", "x/0"), 6, true));
        assert!(
            resource.write(&places("a", "x/0"), 5, false),
            "one that does not look"
        );
    }
}
