//! What leases protect: a resource of the bench's own that looks at fences, and remembers who held what.
//!
//! What never lives here: the control plane's opinion. Invariants: a write is taken only under a fence that is not
//! lower than
//! the highest that was seen for its run and for its slot; every try is counted.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What is written to: a run's work, done in a slot of a worker.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Holder {
    /// Device id.
    pub(crate) worker: String,
    /// Of its slots.
    pub(crate) slot: u32,
    /// The run.
    pub(crate) run: String,
    /// Under which it holds them.
    pub(crate) fence: u64,
}

/// A time in which somebody believed to hold a lease, by its own conservative clock.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    /// Who, what.
    pub(crate) holder: Holder,
    /// From the receipt of the offer.
    pub(crate) from: Instant,
    /// Until it stopped, or until its own deadline.
    pub(crate) to: Instant,
}

/// What was tried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Writes that were taken.
    pub(crate) taken: u64,
    /// Writes of holders whose own time was over, under a fence that nobody had passed yet.
    pub(crate) late: u64,
    /// Writes behind a higher fence: refused.
    pub(crate) stale: u64,
}

#[derive(Debug, Default)]
struct Inner {
    runs: BTreeMap<String, u64>,
    slots: BTreeMap<(String, u32), u64>,
    counts: Counts,
    held: Vec<Held>,
    /// Fences of writes that were taken, by run, in their order.
    history: BTreeMap<String, Vec<u64>>,
}

/// The resource.
#[derive(Debug, Default)]
pub(crate) struct Resource(Mutex<Inner>);

impl Resource {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes; `late` when the writer's own time is over and it writes all the same. Whether it was taken.
    pub(crate) fn write(&self, holder: &Holder, late: bool) -> bool {
        let mut inner = self.inner();
        let slot = (holder.worker.clone(), holder.slot);
        let seen = inner.runs.get(&holder.run).max(inner.slots.get(&slot)).copied();
        if seen.is_some_and(|seen| holder.fence < seen) {
            inner.counts.stale += 1;
            return false;
        }
        inner.runs.insert(holder.run.clone(), holder.fence);
        inner.slots.insert(slot, holder.fence);
        inner
            .history
            .entry(holder.run.clone())
            .or_default()
            .push(holder.fence);
        if late {
            inner.counts.late += 1;
        } else {
            inner.counts.taken += 1;
        }
        true
    }

    /// Remembers that somebody held something.
    pub(crate) fn held(&self, held: Held) {
        self.inner().held.push(held);
    }

    /// What was tried.
    pub(crate) fn counts(&self) -> Counts {
        self.inner().counts
    }

    /// Pairs that held one slot, or one run, at one time, in words; and how many times were compared.
    pub(crate) fn overlaps(&self) -> (Vec<String>, usize) {
        let inner = self.inner();
        let mut found = Vec::new();
        let mut by_slot: BTreeMap<String, Vec<&Held>> = BTreeMap::new();
        for held in &inner.held {
            let slot = format!("slot {} of {}", held.holder.slot, held.holder.worker);
            by_slot.entry(slot).or_default().push(held);
            by_slot
                .entry(format!("run {}", held.holder.run))
                .or_default()
                .push(held);
        }
        for (what, mut times) in by_slot {
            times.sort_by_key(|held| held.from);
            for pair in times.windows(2) {
                if pair[1].from < pair[0].to && pair[0].holder.fence != pair[1].holder.fence {
                    let both = pair[0].to - pair[1].from;
                    found.push(format!(
                        "{what}: fences {} and {} at one time, for {} ms",
                        pair[0].holder.fence,
                        pair[1].holder.fence,
                        both.min(Duration::from_secs(3600)).as_millis()
                    ));
                }
            }
        }
        (found, inner.held.len())
    }

    /// Runs in whose history a fence is lower than one before it: the resource would be broken itself.
    pub(crate) fn went_back(&self) -> usize {
        let inner = self.inner();
        let back = |fences: &&Vec<u64>| fences.windows(2).any(|pair| pair[1] < pair[0]);
        inner.history.values().filter(back).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(worker: &str, run: &str, fence: u64) -> Holder {
        Holder {
            worker: worker.to_owned(),
            slot: 0,
            run: run.to_owned(),
            fence,
        }
    }

    #[test]
    fn a_lower_fence_is_refused_for_run_and_slot() {
        let resource = Resource::default();
        assert!(resource.write(&holder("a", "r", 5), false));
        assert!(resource.write(&holder("b", "r", 7), false));
        assert!(!resource.write(&holder("a", "r", 5), true), "the run has gone on");
        assert!(
            !resource.write(&holder("b", "s", 6), false),
            "the slot has gone on"
        );
        assert!(resource.write(&holder("b", "r", 7), true));
        let counts = Counts {
            taken: 2,
            late: 1,
            stale: 2,
        };
        assert_eq!((resource.counts(), resource.went_back()), (counts, 0));
    }

    #[test]
    fn two_at_one_time_are_found() {
        let resource = Resource::default();
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let mut times = vec![("a", "r", 1, 0, 10), ("b", "r", 2, 10, 20), ("a", "s", 3, 10, 30)];
        let held = |&(worker, run, fence, from, to): &(&str, &str, u64, u64, u64)| Held {
            holder: holder(worker, run, fence),
            from: at(from),
            to: at(to),
        };
        times.iter().map(held).for_each(|held| resource.held(held));
        assert_eq!(resource.overlaps(), (Vec::new(), 3));
        times = vec![("c", "r", 4, 15, 16)];
        times.iter().map(held).for_each(|held| resource.held(held));
        let (found, _) = resource.overlaps();
        assert_eq!(found, ["run r: fences 2 and 4 at one time, for 5 ms"]);
    }
}
