//! What must hold between replicas, whatever clients saw: one state at an index, progress that never goes
//! back, a quorum's age that is never younger than the truth; and at the end equal states that are sound in
//! themselves. What Raft promises about logs and votes: see `raft`.
//!
//! Never here: faults, clients. What is judged here is judged from outside, by what replicas show to anybody.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::Duration;

use bytes::Bytes;
use palyra_replica::{Replica, Role, View};
use palyra_state::{Digest, MemRead, Read};

use crate::world::Life;

/// What a replica shows at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Glimpse {
    term: u64,
    applied: u64,
    hash: Digest,
    leads: bool,
    quorum_age: Option<Duration>,
}

impl Glimpse {
    /// Whether it says that it leads.
    pub(crate) fn leads(&self) -> bool {
        self.leads
    }

    /// Its term.
    pub(crate) fn term(&self) -> u64 {
        self.term
    }

    /// Looks at a replica that is alive.
    pub(crate) fn of(replica: &Replica) -> Glimpse {
        let status = replica.status();
        Glimpse {
            term: status.term,
            applied: status.applied,
            hash: status.state_hash,
            leads: status.role == Role::Leader,
            quorum_age: status.quorum_age,
        }
    }
}

/// Remembers what replicas showed and finds contradictions.
#[derive(Default)]
pub(crate) struct Oracle {
    hashes: BTreeMap<u64, (u64, Digest)>,
    progress: BTreeMap<Life, (u64, u64)>,
    leaders: BTreeSet<(u64, u64)>,
    /// By how many parts in a thousand clocks of replicas are wrong, at most.
    drift: u64,
    /// The largest index that anybody was told of, by the virtual millisecond in which that was.
    acknowledged: BTreeMap<u64, u64>,
}

impl Oracle {
    /// For replicas whose clocks are wrong by at most so many parts in a thousand.
    pub(crate) fn new(drift: u64) -> Oracle {
        Oracle {
            drift,
            ..Oracle::default()
        }
    }

    /// Somebody was told that this index is applied.
    pub(crate) fn acknowledged(&mut self, now_ms: u64, index: u64) {
        let before = self.acknowledged.last_key_value().map_or(0, |(_, index)| *index);
        self.acknowledged.insert(now_ms, before.max(index));
    }

    /// Whether this shows a leader that was not seen before.
    pub(crate) fn leads(&mut self, id: u64, seen: &Glimpse) -> bool {
        seen.leads && self.leaders.insert((seen.term, id))
    }

    /// Compares one glimpse with all before it; says what the replica did wrong.
    pub(crate) fn look(&mut self, life: Life, seen: &Glimpse, now_ms: u64) -> Vec<String> {
        let mut problems = Vec::new();
        let id = life.replica();
        let (other, hash) = *self.hashes.entry(seen.applied).or_insert((id, seen.hash));
        if hash != seen.hash {
            problems.push(format!(
                "replica.same-state: r{id} has another state at index {} than r{other} had",
                seen.applied
            ));
        }
        let before = self
            .progress
            .insert(life, (seen.term, seen.applied))
            .unwrap_or_default();
        if before.0 > seen.term || before.1 > seen.applied {
            let now = (seen.term, seen.applied);
            problems.push(format!(
                "replica.progress: r{id} went back from term and index {before:?} to {now:?}"
            ));
        }
        problems.extend(self.too_young(id, seen, now_ms));
        problems
    }

    /// A replica that says that a quorum stood behind its state so long ago has applied all that anybody was told of
    /// before. The services of nodes are shut by this age, so that a revocation reaches a replica that is cut off.
    fn too_young(&self, id: u64, seen: &Glimpse, now_ms: u64) -> Option<String> {
        let age = u64::try_from(seen.quorum_age?.as_millis()).unwrap_or(u64::MAX);
        // A clock that is too slow shows less than has passed, by this much at most; two clocks may add to one age.
        let slack = if self.drift == 0 {
            0
        } else {
            2 + age.saturating_mul(2 * self.drift) / (1_000 - self.drift)
        };
        let at = now_ms.saturating_sub(age + slack);
        let (_, index) = self.acknowledged.range(..at).next_back()?;
        (seen.applied < *index).then(|| {
            format!(
                "replica.freshness: r{id} says that a quorum stood behind index {} {age} ms ago, \
                 when {index} had been answered",
                seen.applied
            )
        })
    }
}

/// A copy of a whole state.
pub(crate) fn state_of(view: &View) -> MemRead {
    let mut pairs = Vec::new();
    view.scan(&[], &[0xff; 64], &mut |key, value| {
        pairs.push((key.to_vec(), Bytes::copy_from_slice(value)));
        ControlFlow::Continue(())
    });
    pairs.into_iter().collect()
}

/// Problems in one state: rules of the state machine, the journal's chain among them.
pub(crate) fn soundness(state: &MemRead) -> Vec<String> {
    palyra_state::invariants::check(state)
        .into_iter()
        .map(|violation| format!("invariant {}: {}", violation.rule, violation.detail))
        .collect()
}

/// Problems between and in the final states of all replicas: equal byte for byte, and each of them sound.
pub(crate) fn agreement(states: &[(u64, MemRead)]) -> Vec<String> {
    let mut problems = Vec::new();
    for (at, (id, state)) in states.iter().enumerate() {
        // What is equal to the first is as sound as that one.
        if at > 0 {
            if state.iter().eq(states[0].1.iter()) {
                continue;
            }
            problems.push(format!(
                "replica.same-state: r{id} ended with another state than r{}",
                states[0].0
            ));
        }
        problems.extend(
            soundness(state)
                .into_iter()
                .map(|what| format!("replica.invariants: r{id}: {what}")),
        );
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use palyra_state::Writes;

    fn glimpse(term: u64, applied: u64, state: &[u8]) -> Glimpse {
        Glimpse {
            term,
            applied,
            hash: Digest::of(state),
            leads: false,
            quorum_age: None,
        }
    }

    #[test]
    fn contradictions_are_found() {
        let (one, two) = (Life::of(1, 1), Life::of(2, 2));
        let mut oracle = Oracle::default();
        let mut look = |life, seen: Glimpse| oracle.look(life, &seen, 0).len();
        assert_eq!(look(one, glimpse(1, 5, b"a")), 0);
        assert_eq!(look(two, glimpse(1, 5, b"a")), 0);
        assert_eq!(look(two, glimpse(2, 5, b"b")), 1, "two states at an index");
        assert_eq!(look(two, glimpse(2, 4, b"c")), 1, "back in time");
        let restarted = Life::of(2, 3);
        assert_eq!(look(restarted, glimpse(2, 3, b"d")), 0);
    }

    #[test]
    fn an_age_that_is_too_young_is_found() {
        let mut oracle = Oracle::default();
        oracle.acknowledged(1_000, 7);
        oracle.acknowledged(2_000, 9);
        let aged = |applied, ms| Glimpse {
            quorum_age: Some(Duration::from_millis(ms)),
            ..glimpse(1, applied, b"a")
        };
        assert_eq!(
            oracle.too_young(1, &aged(7, 600), 2_500),
            None,
            "at 1900, 9 was not answered"
        );
        assert!(
            oracle.too_young(1, &aged(7, 400), 2_500).is_some(),
            "at 2100 it was"
        );
        assert_eq!(oracle.too_young(1, &aged(9, 0), 2_500), None);
        assert_eq!(
            oracle.too_young(1, &glimpse(1, 7, b"a"), 2_500),
            None,
            "it claims nothing"
        );
    }

    #[test]
    fn states_that_differ_are_found() {
        let mut other = MemRead::new();
        other.absorb(&Writes::from([(vec![0xee], Some(Bytes::from_static(b"x")))]));
        let found = agreement(&[(1, MemRead::new()), (2, other)]);
        assert!(
            found.iter().any(|what| what.contains("another state")),
            "{found:?}"
        );
        assert!(
            found
                .iter()
                .any(|what| what.starts_with("replica.invariants: r2: invariant")),
            "{found:?}"
        );
        assert!(!found.iter().any(|what| what.contains(" r1:")), "{found:?}");
    }
}
