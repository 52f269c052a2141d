//! What must hold between replicas, whatever clients saw: one state at an index, progress that never goes
//! back; and at the end equal states that are sound in themselves. Not here: one leader in a term. openraft
//! orders leaders by term and id, so one replica after another may lead in the same term.
//!
//! Never here: faults, clients. What is judged here is judged from outside, by what replicas show to anybody.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use bytes::Bytes;
use palyra_replica::Replica;
use palyra_state::{Digest, MemRead, Read, Writes};

use crate::world::Life;

/// What a replica shows at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Glimpse {
    term: u64,
    applied: u64,
    hash: Digest,
}

impl Glimpse {
    /// Looks at a replica that is alive.
    pub(crate) fn of(replica: &Replica) -> Glimpse {
        let status = replica.status();
        Glimpse {
            term: status.term,
            applied: status.applied,
            hash: status.state_hash,
        }
    }
}

/// Remembers what replicas showed and finds contradictions.
#[derive(Default)]
pub(crate) struct Oracle {
    hashes: BTreeMap<u64, (u64, Digest)>,
    progress: BTreeMap<Life, (u64, u64)>,
}

impl Oracle {
    /// Compares one glimpse with all before it.
    pub(crate) fn look(&mut self, life: Life, seen: &Glimpse) -> Vec<String> {
        let mut problems = Vec::new();
        let id = life.replica();
        let (other, hash) = *self.hashes.entry(seen.applied).or_insert((id, seen.hash));
        if hash != seen.hash {
            problems.push(format!(
                "r{other} and r{id} have different states at index {}",
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
                "r{id} went back from term and index {before:?} to {now:?}"
            ));
        }
        problems
    }
}

/// A copy of a replica's whole state.
pub(crate) fn state_of(replica: &Replica) -> MemRead {
    let view = replica.view();
    let mut writes = Writes::new();
    view.scan(&[], &[0xff; 64], &mut |key, value| {
        writes.insert(key.to_vec(), Some(Bytes::copy_from_slice(value)));
        ControlFlow::Continue(())
    });
    let mut state = MemRead::new();
    state.absorb(&writes);
    state
}

/// Problems between and in the final states of all replicas: equal, sound, with an unbroken journal.
pub(crate) fn agreement(states: &[(u64, MemRead)]) -> Vec<String> {
    let mut problems = Vec::new();
    let Some((first_id, first)) = states.first() else {
        return problems;
    };
    for (id, state) in states {
        if !state.iter().eq(first.iter()) {
            problems.push(format!("r{id} has another state than r{first_id}"));
        }
    }
    for violation in palyra_state::invariants::check(first) {
        problems.push(format!("invariant {}: {}", violation.rule, violation.detail));
    }
    if let Err(broken) = palyra_state::journal::verify_all(first) {
        problems.push(format!("the journal is broken: {broken:?}"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glimpse(term: u64, applied: u64, state: &[u8]) -> Glimpse {
        Glimpse {
            term,
            applied,
            hash: Digest::of(state),
        }
    }

    #[test]
    fn contradictions_are_found() {
        let (one, two) = (Life::of(1, 1), Life::of(2, 2));
        let mut oracle = Oracle::default();
        assert_eq!(oracle.look(one, &glimpse(1, 5, b"a")), Vec::<String>::new());
        assert_eq!(oracle.look(two, &glimpse(1, 5, b"a")), Vec::<String>::new());
        assert_eq!(
            oracle.look(two, &glimpse(2, 5, b"b")).len(),
            1,
            "two states at an index"
        );
        assert_eq!(oracle.look(two, &glimpse(2, 4, b"c")).len(), 1, "back in time");
        let restarted = Life::of(2, 3);
        assert_eq!(oracle.look(restarted, &glimpse(2, 3, b"d")), Vec::<String>::new());
    }
}
