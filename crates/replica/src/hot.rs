//! What apply reads again and again, in memory beside the engine.
//!
//! Two kinds: tables that are small by their limits and that every entry looks into are here whole, so that also what
//! is not there, and what comes first in them, is known without the engine; of all others, single keys are kept once
//! they were read. What never lives here: anything that a view shows, and anything that is not on its way to the
//! engine. Invariants: it belongs to one generation of the state; only apply writes that generation, and tells it all
//! that it wrote; what it answers is what the engine would have.

use std::collections::{BTreeMap, HashMap};
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use palyra_state::{Read, Visit, Writes, tables};

use crate::view::Generation;

/// Bytes of single keys and their values until the older half is let go: twice as many at most.
const POINT_BYTES: usize = 16 * 1024 * 1024;
/// A larger value is not kept: it is a payload or a result, and those are read once.
const VALUE_MAX: usize = 4 * 1024;

/// See the module.
#[derive(Default)]
pub(crate) struct Hot {
    /// The generation that it belongs to; none before anything was loaded.
    generation: Option<u32>,
    whole: BTreeMap<Vec<u8>, Bytes>,
    points: Points,
}

/// Single keys, also of what is not there. Those that were used since the older half was last let go are in `young`.
#[derive(Default)]
struct Points {
    young: HashMap<Vec<u8>, Option<Bytes>>,
    old: HashMap<Vec<u8>, Option<Bytes>>,
    /// Of what is in `young`.
    bytes: usize,
}

/// Whether a key belongs to a table that is here whole.
fn is_whole(key: &[u8]) -> bool {
    key.first().is_some_and(|tag| tables::HOT.contains(tag))
}

/// Whether everything between two keys belongs to one such table.
fn covers(from: &[u8], to: &[u8]) -> bool {
    let (Some(first), Some(end)) = (from.first(), to.first()) else {
        return false;
    };
    let within = first == end || (first.checked_add(1) == Some(*end) && to.len() == 1);
    within && is_whole(from)
}

impl Hot {
    /// Makes it that of a generation, reading what it holds whole, unless it is that already.
    pub(crate) fn belong(&mut self, state: &Generation<'_>) {
        if self.generation == Some(state.number) {
            return;
        }
        *self = Hot {
            generation: Some(state.number),
            ..Hot::default()
        };
        for tag in tables::HOT {
            state.scan(&[tag], &[tag + 1], &mut |key, value| {
                self.whole.insert(key.to_vec(), Bytes::copy_from_slice(value));
                ControlFlow::Continue(())
            });
        }
    }

    /// The value under `key`, from here or from the engine.
    pub(crate) fn get(&mut self, state: &Generation<'_>, key: &[u8]) -> Option<Bytes> {
        if is_whole(key) {
            return self.whole.get(key).cloned();
        }
        self.points.get(key, || state.get(key))
    }

    /// Visits keys in `from..to` when they are here; whether they are.
    pub(crate) fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> bool {
        if !covers(from, to) {
            return false;
        }
        let range = (Bound::Included(from), Bound::Excluded(to));
        let _ = self
            .whole
            .range::<[u8], _>(range)
            .try_for_each(|(key, value)| visit(key, value));
        true
    }

    /// Takes in what was written.
    pub(crate) fn absorb(&mut self, writes: &Writes) {
        for (key, value) in writes {
            if !is_whole(key) {
                self.points.change(key, value);
                continue;
            }
            match value {
                Some(value) => drop(self.whole.insert(key.clone(), value.clone())),
                None => drop(self.whole.remove(key)),
            }
        }
    }
}

fn size(key: &[u8], value: Option<&Bytes>) -> usize {
    // What the map itself takes for an entry, about.
    64 + key.len() + value.map_or(0, Bytes::len)
}

impl Points {
    fn get(&mut self, key: &[u8], read: impl FnOnce() -> Option<Bytes>) -> Option<Bytes> {
        if let Some(value) = self.young.get(key) {
            return value.clone();
        }
        let value = self.old.remove(key).unwrap_or_else(read);
        self.keep(key.to_vec(), value.clone());
        value
    }

    fn keep(&mut self, key: Vec<u8>, value: Option<Bytes>) {
        if value.as_ref().is_some_and(|value| value.len() > VALUE_MAX) {
            return;
        }
        self.bytes += size(&key, value.as_ref());
        self.young.insert(key, value);
        if self.bytes > POINT_BYTES {
            self.old = std::mem::take(&mut self.young);
            self.bytes = 0;
        }
    }

    /// What is not here is not read again soon, or it would be: the journal above all.
    fn change(&mut self, key: &[u8], value: &Option<Bytes>) {
        let known = self
            .young
            .remove_entry(key)
            .or_else(|| self.old.remove_entry(key));
        if let Some((key, _)) = known {
            self.keep(key, value.clone());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::view::disk_key;
    use palyra_storage::{Batch, Disk, Engine as _, Family, MemEngine};

    fn write(engine: &MemEngine, hot: &mut Hot, writes: &Writes) {
        let mut batch = Batch::new();
        for (key, value) in writes {
            let key = disk_key(3, key);
            match value {
                Some(value) => batch.put(Family::State, key, value.clone()),
                None => batch.delete(Family::State, key),
            };
        }
        engine.write(batch).unwrap();
        hot.absorb(writes);
    }

    fn seen(scan: impl FnOnce(&mut Visit<'_>)) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut all = Vec::new();
        scan(&mut |key, value| {
            all.push((key.to_vec(), value.to_vec()));
            ControlFlow::Continue(())
        });
        all
    }

    #[test]
    fn it_answers_what_the_engine_would_whatever_was_read_before() {
        let engine = MemEngine::open(&Disk::new("hot")).unwrap();
        let state = Generation {
            source: &engine,
            number: 3,
        };
        let mut hot = Hot::default();
        hot.belong(&state);
        let mut dice = 7_u64;
        let mut roll = |below: u64| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (dice >> 33) % below
        };
        for round in 0..2_000_u64 {
            let tag = [tables::HOT[0], tables::HOT[1], 0x30][usize::try_from(roll(3)).unwrap()];
            let key = vec![tag, u8::try_from(roll(20)).unwrap()];
            let value = (roll(4) > 0).then(|| Bytes::from(round.to_be_bytes().to_vec()));
            write(&engine, &mut hot, &Writes::from([(key, value)]));
            let looked_at = vec![tag, u8::try_from(roll(20)).unwrap()];
            assert_eq!(hot.get(&state, &looked_at), state.get(&looked_at));
            let (from, to) = (
                [tables::HOT[0], u8::try_from(roll(20)).unwrap()],
                [tables::HOT[0] + 1],
            );
            let mut here = false;
            let ours = seen(|visit| here = hot.scan(&from, &to, visit));
            assert!(here);
            assert_eq!(ours, seen(|visit| state.scan(&from, &to, visit)));
        }
        // What is loaded anew is what was kept.
        let mut anew = Hot::default();
        anew.belong(&state);
        assert_eq!(anew.whole, hot.whole);
        assert!(!hot.scan(&[0x30], &[0x31], &mut |_, _| ControlFlow::Continue(())));
        assert!(!hot.scan(&[tables::HOT[0]], &[0x30], &mut |_, _| ControlFlow::Continue(())));
    }

    #[test]
    fn single_keys_have_a_limit_and_the_used_ones_stay() {
        let mut points = Points::default();
        let value = || Some(Bytes::from(vec![1; VALUE_MAX]));
        points.get(b"used", value);
        for number in 0..40_000_u64 {
            points.get(&number.to_be_bytes(), value);
            points.get(b"used", || panic!("it was let go"));
        }
        let held: usize = [&points.young, &points.old].map(HashMap::len).iter().sum();
        assert!(held * VALUE_MAX <= 2 * (POINT_BYTES + VALUE_MAX), "{held}");
        points.change(b"used", &None);
        assert_eq!(points.get(b"used", value), None);
        let large = points.get(b"large", || Some(Bytes::from(vec![1; VALUE_MAX + 1])));
        assert!(large.is_some() && !points.young.contains_key(&b"large"[..]));
    }
}
