//! The maps of an open [`super::MemEngine`], with as many versions of each value as the live snapshots need.
//!
//! Never here: durability. Invariants: a key's versions have ascending moments; the last one is the present;
//! an earlier one is kept only while a pinned moment reads it; `crowded` names exactly the keys with more
//! than that.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use bytes::Bytes;

use crate::batch::{Batch, Op};
use crate::engine::Family;

/// Which way a scan goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Ascending,
    Descending,
}

/// A value, or `None` for "deleted", and the moment from which on it holds.
type Version = (u64, Option<Bytes>);

#[derive(Debug)]
pub(super) struct Versions {
    families: [BTreeMap<Bytes, Vec<Version>>; 3],
    /// Counts batches.
    now: u64,
    /// Pinned moments, each with the number of its holders.
    pinned: BTreeMap<u64, usize>,
    crowded: BTreeSet<(Family, Bytes)>,
}

impl Versions {
    pub(super) fn new(present: [BTreeMap<Bytes, Bytes>; 3]) -> Self {
        let families = present.map(|map| {
            map.into_iter()
                .map(|(key, value)| (key, vec![(0, Some(value))]))
                .collect()
        });
        Versions {
            families,
            now: 0,
            pinned: BTreeMap::new(),
            crowded: BTreeSet::new(),
        }
    }

    pub(super) fn apply(&mut self, batch: &Batch) {
        self.now += 1;
        for op in batch.ops() {
            match op {
                Op::Put { family, key, value } => self.set(*family, key, Some(value.clone())),
                Op::Delete { family, key } => self.set(*family, key, None),
                Op::DeleteRange { family, from, to } => {
                    let range = self.families[*family as usize].range(from.clone()..to.clone());
                    let keys: Vec<Bytes> = range.map(|(key, _)| key.clone()).collect();
                    for key in keys {
                        self.set(*family, &key, None);
                    }
                }
            }
        }
    }

    fn set(&mut self, family: Family, key: &Bytes, value: Option<Bytes>) {
        // Nobody looks back: only the present is kept.
        if self.pinned.is_empty() && self.crowded.is_empty() {
            match value {
                Some(value) => {
                    let versions = self.families[family as usize].entry(key.clone()).or_default();
                    versions.clear();
                    versions.push((self.now, Some(value)));
                }
                None => drop(self.families[family as usize].remove(key)),
            }
            return;
        }
        let versions = self.families[family as usize].entry(key.clone()).or_default();
        match versions.last_mut() {
            Some(last) if last.0 == self.now => last.1 = value,
            _ => versions.push((self.now, value)),
        }
        self.prune(family, key);
    }

    /// Drops the versions of `key` that neither the present nor a pinned moment reads.
    fn prune(&mut self, family: Family, key: &Bytes) {
        let Some(versions) = self.families[family as usize].get_mut(key) else {
            return;
        };
        let mut kept: Vec<Version> = Vec::with_capacity(1);
        for at in 0..versions.len() {
            let needed = match versions.get(at + 1) {
                Some(next) => self.pinned.range(versions[at].0..next.0).next().is_some(),
                None => true,
            };
            // A deletion with nothing before it says the same as no version at all.
            if needed && !(kept.is_empty() && versions[at].1.is_none()) {
                kept.push(std::mem::take(&mut versions[at]));
            }
        }
        let crowded = kept.len() > 1;
        match kept.is_empty() {
            true => drop(self.families[family as usize].remove(key)),
            false => *versions = kept,
        }
        match crowded {
            true => self.crowded.insert((family, key.clone())),
            false => self.crowded.remove(&(family, key.clone())),
        };
    }

    pub(super) fn pin(&mut self) -> u64 {
        *self.pinned.entry(self.now).or_default() += 1;
        self.now
    }

    pub(super) fn unpin(&mut self, moment: u64) {
        let Some(holders) = self.pinned.get_mut(&moment) else {
            return;
        };
        *holders -= 1;
        if *holders == 0 {
            self.pinned.remove(&moment);
            for (family, key) in std::mem::take(&mut self.crowded) {
                self.prune(family, &key);
            }
        }
    }

    pub(super) fn get(&self, family: Family, key: &[u8], moment: u64) -> Option<Bytes> {
        visible(self.families[family as usize].get(key)?, moment).cloned()
    }

    /// The first `wanted` entries at `moment` within `from..to`, beyond `last` in the given direction; fewer only when
    /// there are no more.
    pub(super) fn page(
        &self,
        family: Family,
        (from, to): (&[u8], &[u8]),
        last: Option<&[u8]>,
        direction: Direction,
        (moment, wanted): (u64, usize),
    ) -> Vec<(Bytes, Bytes)> {
        let (low, high) = match (direction, last) {
            (_, None) => (Bound::Included(from), to),
            (Direction::Ascending, Some(last)) => (Bound::Excluded(last), to),
            (Direction::Descending, Some(last)) => (Bound::Included(from), last),
        };
        // An excluded bound that equals the other one is refused by the map.
        let empty = last.map_or(from >= to, |last| from > last || last >= to);
        if empty || from >= high {
            return Vec::new();
        }
        let range = self.families[family as usize].range::<[u8], _>((low, Bound::Excluded(high)));
        let entry = |(key, versions): (&Bytes, &Vec<Version>)| {
            visible(versions, moment).map(|value| (key.clone(), value.clone()))
        };
        match direction {
            Direction::Ascending => range.filter_map(entry).take(wanted).collect(),
            Direction::Descending => range.rev().filter_map(entry).take(wanted).collect(),
        }
    }

    #[cfg(test)]
    pub(super) fn versions_kept(&self) -> usize {
        self.families
            .iter()
            .flat_map(|map| map.values())
            .map(Vec::len)
            .sum()
    }
}

fn visible(versions: &[Version], moment: u64) -> Option<&Bytes> {
    versions
        .iter()
        .rev()
        .find(|version| version.0 <= moment)?
        .1
        .as_ref()
}
