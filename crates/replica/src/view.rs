//! Reading the state: a pinned view of it, and the overlay under which entries of one batch see each other.
//!
//! State keys on disk carry the generation in front (4 bytes, big endian); nothing above this file knows
//! that. The generation and the position are read through the same pinned view as the state, so they always
//! belong together. Invariant: reading the state cannot fail; a disk error ends the process, since an entry
//! must never be half applied.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use palyra_platform as platform;
use palyra_state::{Position, Read, Visit, Writes, tables};
use palyra_storage::{Engine, Family, Snapshot};

use crate::hot::Hot;
use crate::meta::{self, OpenError, Place};

/// Length of the generation prefix.
const PREFIX: usize = 4;

/// The key under which a state key lies on disk.
pub(crate) fn disk_key(generation: u32, key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(PREFIX + key.len());
    out.extend_from_slice(&generation.to_be_bytes());
    out.extend_from_slice(key);
    out
}

fn ok<T>(result: palyra_storage::Result<T>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => platform::abort(&format!("the state cannot be read: {error}")),
    }
}

/// One generation of the state, as a snapshot or the engine has it.
pub(crate) struct Generation<'a> {
    pub(crate) source: &'a dyn Snapshot,
    pub(crate) number: u32,
}

impl Read for Generation<'_> {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        ok(self.source.get(Family::State, &disk_key(self.number, key)))
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        let (from, to) = (disk_key(self.number, from), disk_key(self.number, to));
        ok(self.source.scan(Family::State, &from, &to, &mut |key, value| {
            visit(&key[PREFIX..], value)
        }));
    }

    fn scan_rev(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        let (from, to) = (disk_key(self.number, from), disk_key(self.number, to));
        ok(self
            .source
            .scan_rev(Family::State, &from, &to, &mut |key, value| {
                visit(&key[PREFIX..], value)
            }));
    }
}

/// The state at one position. Cheap to make and to clone; it keeps what it shows on disk, so let go of it.
#[derive(Clone)]
pub struct View {
    snapshot: Arc<dyn Snapshot>,
    place: Place,
}

impl View {
    /// Pins the present state of an engine, also of one that no replica runs on.
    ///
    /// # Errors
    /// [`OpenError::Storage`] or [`OpenError::Damaged`].
    pub fn of(engine: &dyn Engine) -> Result<View, OpenError> {
        let snapshot = engine.snapshot()?;
        let place = meta::pinned_place(&*snapshot)?;
        Ok(View { snapshot, place })
    }

    /// Pins the present state of a running replica.
    pub(crate) fn pin(engine: &dyn Engine) -> View {
        match View::of(engine) {
            Ok(view) => view,
            Err(error) => platform::abort(&error.to_string()),
        }
    }

    /// Log index of the last entry that the view holds; 0 before the first.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.place.last.map_or(0, |id| id.index)
    }

    /// Position of the last entry that the view holds.
    #[must_use]
    pub fn position(&self) -> Option<Position> {
        self.place.last.map(|id| Position {
            term: id.leader_id.term,
            index: id.index,
        })
    }

    fn generation(&self) -> Generation<'_> {
        Generation {
            source: &*self.snapshot,
            number: self.place.generation,
        }
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View(at {})", self.index())
    }
}

impl Read for View {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        self.generation().get(key)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        self.generation().scan(from, to, visit);
    }

    fn scan_rev(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        self.generation().scan_rev(from, to, visit);
    }
}

/// Writes that are not in the engine yet, over what is.
pub(crate) struct Overlay<'a> {
    base: Generation<'a>,
    /// What of it is in memory.
    hot: RefCell<Hot>,
    writes: Writes,
}

impl<'a> Overlay<'a> {
    pub(crate) fn new(base: Generation<'a>, mut hot: Hot) -> Overlay<'a> {
        hot.belong(&base);
        Overlay {
            base,
            hot: RefCell::new(hot),
            writes: BTreeMap::new(),
        }
    }

    pub(crate) fn absorb(&mut self, writes: Writes) {
        self.writes.extend(writes);
    }

    /// What is to be written, and what is in memory with that in it.
    pub(crate) fn into_writes(self) -> (Writes, Hot) {
        let mut hot = self.hot.into_inner();
        hot.absorb(&self.writes);
        (self.writes, hot)
    }
}

/// Merges written keys into a scan of the base; both run in the same direction.
fn merge<'w>(
    scan: impl FnOnce(&mut Visit<'_>),
    writes: impl Iterator<Item = (&'w Vec<u8>, &'w Option<Bytes>)>,
    before: impl Fn(&[u8], &[u8]) -> Ordering,
    visit: &mut Visit<'_>,
) {
    let mut writes = writes.peekable();
    let mut flow = ControlFlow::Continue(());
    scan(&mut |key, value| {
        let mut shadowed = false;
        while let Some((written, new)) = writes.next_if(|(written, _)| before(written, key).is_le()) {
            shadowed = written.as_slice() == key;
            if let Some(new) = new {
                flow = visit(written, new);
            }
            if flow.is_break() {
                return flow;
            }
        }
        if !shadowed {
            flow = visit(key, value);
        }
        flow
    });
    for (written, new) in writes {
        if flow.is_break() {
            return;
        }
        if let Some(new) = new {
            flow = visit(written, new);
        }
    }
}

impl Read for Overlay<'_> {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        // Planted: the head of the journal is what the disk has, without the entries of the same batch.
        if palyra_fault::planted("head-without-batch") && key == tables::META.key(()) {
            return self.base.get(key);
        }
        match self.writes.get(key) {
            Some(written) => written.clone(),
            None => self.hot.borrow_mut().get(&self.base, key),
        }
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        if from < to {
            let base = |visit: &mut Visit<'_>| {
                if !self.hot.borrow().scan(from, to, visit) {
                    self.base.scan(from, to, visit);
                }
            };
            let writes = self
                .writes
                .range::<[u8], _>((bound(from), std::ops::Bound::Excluded(to)));
            merge(base, writes, |a, b| a.cmp(b), visit);
        }
    }

    fn scan_rev(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        if from < to {
            let writes = self
                .writes
                .range::<[u8], _>((bound(from), std::ops::Bound::Excluded(to)))
                .rev();
            merge(
                |visit| self.base.scan_rev(from, to, visit),
                writes,
                |a, b| b.cmp(a),
                visit,
            );
        }
    }
}

fn bound(from: &[u8]) -> std::ops::Bound<&[u8]> {
    std::ops::Bound::Included(from)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use palyra_state::MemRead;
    use palyra_storage::{Batch, Disk, MemEngine};

    fn keys(r: &dyn Read, reverse: bool, limit: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut seen = Vec::new();
        let mut visit = |key: &[u8], value: &[u8]| {
            seen.push((key.to_vec(), value.to_vec()));
            if seen.len() < limit {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        };
        if reverse {
            r.scan_rev(b"b", b"y", &mut visit)
        } else {
            r.scan(b"b", b"y", &mut visit)
        }
        seen
    }

    #[test]
    fn an_overlay_reads_like_the_state_after_its_writes() {
        let engine = MemEngine::open(&Disk::new("overlay")).unwrap();
        let mut batch = Batch::new();
        let mut model = MemRead::new();
        for key in [b"a", b"c", b"e", b"g", b"x", b"z"] {
            batch.put(Family::State, disk_key(3, key), key.to_vec());
            model.absorb(&Writes::from([(key.to_vec(), Some(Bytes::from_static(key)))]));
        }
        // A neighbour generation must stay out of sight.
        batch.put(Family::State, disk_key(4, b"d"), &b"other"[..]);
        engine.write(batch).unwrap();
        let base = Generation {
            source: &engine,
            number: 3,
        };
        let mut overlay = Overlay::new(base, Hot::default());
        let writes = Writes::from([
            (b"b".to_vec(), Some(Bytes::from_static(b"new"))),
            (b"c".to_vec(), None),
            (b"d".to_vec(), None),
            (b"e".to_vec(), Some(Bytes::from_static(b"changed"))),
            (b"w".to_vec(), Some(Bytes::from_static(b"late"))),
        ]);
        model.absorb(&writes);
        overlay.absorb(writes);
        for reverse in [false, true] {
            for limit in 1..6 {
                assert_eq!(
                    keys(&overlay, reverse, limit),
                    keys(&model, reverse, limit),
                    "{reverse} {limit}"
                );
            }
        }
        for key in [b"a", b"b", b"c", b"d", b"e", b"w"] {
            assert_eq!(overlay.get(key), model.get(key));
        }
    }
}
