//! What a reader was told against what the journal holds: pure.

use std::collections::{BTreeMap, BTreeSet};

use palyra_proto::journal::v1::Row;

/// A row, by its place and its link in the hash chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    /// Index and ordinal.
    pub(super) place: (u64, u32),
    /// The row's hash: the same row on every replica, or another row.
    pub(super) hash: Vec<u8>,
}

impl Mark {
    /// Of a row.
    pub(super) fn of(row: &Row) -> Mark {
        let cursor = row.cursor.unwrap_or_default();
        Mark {
            place: (cursor.index, cursor.ordinal),
            hash: row.hash.to_vec(),
        }
    }
}

/// What is wrong with what was told.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Comparison {
    /// In the journal, never told.
    pub(super) missing: usize,
    /// Told again.
    pub(super) repeated: usize,
    /// Told after a later one.
    pub(super) out_of_order: usize,
    /// Told, and not in the journal, or with another content.
    pub(super) foreign: usize,
}

/// Compares; both in the order in which they were told.
pub(super) fn compare(told: &[Mark], journal: &[Mark]) -> Comparison {
    let held: BTreeMap<(u64, u32), &Mark> = journal.iter().map(|mark| (mark.place, mark)).collect();
    let mut found = Comparison::default();
    let mut seen = BTreeSet::new();
    let mut highest = None;
    for mark in told {
        if !seen.insert(mark.place) {
            found.repeated += 1;
        } else if highest.is_some_and(|highest| mark.place < highest) {
            found.out_of_order += 1;
        }
        highest = highest.max(Some(mark.place));
        if held.get(&mark.place) != Some(&mark) {
            found.foreign += 1;
        }
    }
    found.missing = held.keys().filter(|place| !seen.contains(place)).count();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks(places: &[u64]) -> Vec<Mark> {
        let mark = |index: &u64| Mark {
            place: (*index, 0),
            hash: vec![u8::try_from(*index).unwrap()],
        };
        places.iter().map(mark).collect()
    }

    #[test]
    fn each_kind_of_fault_is_found() {
        let journal = marks(&[1, 2, 3, 4]);
        let none = Comparison::default();
        assert_eq!(compare(&marks(&[1, 2, 3, 4]), &journal), none);
        assert_eq!(
            compare(&marks(&[1, 2, 4]), &journal),
            Comparison { missing: 1, ..none }
        );
        assert_eq!(
            compare(&marks(&[1, 2, 2, 3, 4]), &journal),
            Comparison { repeated: 1, ..none }
        );
        assert_eq!(
            compare(&marks(&[1, 3, 2, 4]), &journal),
            Comparison {
                out_of_order: 1,
                ..none
            }
        );
        let mut other = marks(&[1, 2, 3, 4]);
        other[2].hash = vec![9];
        assert_eq!(compare(&other, &journal), Comparison { foreign: 1, ..none });
        assert_eq!(
            compare(&marks(&[1, 2, 3, 4, 5]), &journal),
            Comparison { foreign: 1, ..none }
        );
    }
}
