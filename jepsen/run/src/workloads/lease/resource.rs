//! What leases protect: a resource that takes a write only under a fence that is not lower than the highest it has
//! seen.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// The resource.
#[derive(Debug, Default)]
pub(super) struct Resource(Mutex<BTreeMap<String, u64>>);

impl Resource {
    /// Writes under a fence, for a run and a slot. Whether it was taken.
    pub(super) fn write(&self, run: &str, slot: &str, fence: u64) -> bool {
        let mut highest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let places = [format!("run {run}"), format!("slot {slot}")];
        if places
            .iter()
            .any(|place| highest.get(place).is_some_and(|seen| fence < *seen))
        {
            return false;
        }
        for place in places {
            highest.insert(place, fence);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lower_fence_is_refused_for_run_and_slot() {
        let resource = Resource::default();
        assert!(resource.write("r", "a/0", 5));
        assert!(resource.write("r", "b/0", 7));
        assert!(!resource.write("r", "a/0", 5), "the run has gone on");
        assert!(!resource.write("s", "b/0", 6), "the slot has gone on");
        assert!(resource.write("r", "b/0", 7));
    }
}
