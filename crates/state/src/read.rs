//! What the state machine reads from, and a map in memory that serves tests and simulation.
//!
//! Reads do not fail here: a disk error ends the replica below this trait, so that no entry is ever half
//! applied.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use bytes::Bytes;

/// What an entry changes: a value to put, or `None` to delete, by key, in key order.
pub type Writes = BTreeMap<Vec<u8>, Option<Bytes>>;

/// A callback over keys and values in order; it says whether to go on.
pub type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> ControlFlow<()> + 'a;

/// An ordered view of the state.
pub trait Read {
    /// The value under `key`.
    fn get(&self, key: &[u8]) -> Option<Bytes>;
    /// Visits keys in `from..to`, ascending, until told to stop.
    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>);
    /// Visits keys in `from..to`, descending, until told to stop.
    fn scan_rev(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>);
}

/// The state in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemRead {
    map: BTreeMap<Vec<u8>, Bytes>,
}

impl MemRead {
    /// An empty state.
    #[must_use]
    pub fn new() -> MemRead {
        MemRead::default()
    }

    /// Takes in what an entry changed.
    pub fn absorb(&mut self, writes: &Writes) {
        for (key, value) in writes {
            match value {
                Some(value) => self.map.insert(key.clone(), value.clone()),
                None => self.map.remove(key),
            };
        }
    }

    /// All keys and values, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&[u8], &[u8])> {
        self.map
            .iter()
            .map(|(key, value)| (key.as_slice(), value.as_ref()))
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
}

impl FromIterator<(Vec<u8>, Bytes)> for MemRead {
    /// The state that has these keys and values.
    fn from_iter<T: IntoIterator<Item = (Vec<u8>, Bytes)>>(pairs: T) -> MemRead {
        MemRead {
            map: pairs.into_iter().collect(),
        }
    }
}

impl Read for MemRead {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        self.map.get(key).cloned()
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        if from >= to {
            return;
        }
        for (key, value) in self.map.range(from.to_vec()..to.to_vec()) {
            if visit(key, value).is_break() {
                return;
            }
        }
    }

    fn scan_rev(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        if from >= to {
            return;
        }
        for (key, value) in self.map.range(from.to_vec()..to.to_vec()).rev() {
            if visit(key, value).is_break() {
                return;
            }
        }
    }
}
