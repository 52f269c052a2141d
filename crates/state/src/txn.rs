//! One entry's view of the state: what lies below, with what the entry has written so far on top.
//!
//! Domains read and write through it and say what happened with [`Txn::emit`]. Nothing leaves it when the
//! entry is refused.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::{Bound, ControlFlow};

use bytes::Bytes;
use prost::Message;

use crate::actor::Actor;
use crate::check::cut;
use crate::ids::Id;
use crate::limits;
use crate::read::{Read, Visit, Writes};
use crate::tables::{Key, Present, Table};

/// What happened, before it gets its place in the journal.
#[derive(Debug)]
pub(crate) struct Draft {
    pub(crate) action: &'static str,
    pub(crate) subject: String,
    pub(crate) detail: BTreeMap<String, String>,
}

/// One entry's view of the state.
pub(crate) struct Txn<'a> {
    base: &'a dyn Read,
    writes: Writes,
    drafts: Vec<Draft>,
    /// Time of the state at this entry.
    pub(crate) now: u64,
    /// Log index of this entry.
    pub(crate) index: u64,
    /// Who asks.
    pub(crate) actor: &'a Actor,
    /// The request.
    pub(crate) request_id: Id,
}

impl<'a> Txn<'a> {
    pub(crate) fn new(base: &'a dyn Read, index: u64, now: u64, actor: &'a Actor, request_id: Id) -> Txn<'a> {
        Txn {
            base,
            writes: Writes::new(),
            drafts: Vec::new(),
            now,
            index,
            actor,
            request_id,
        }
    }

    pub(crate) fn put<V: Message + Default>(&mut self, table: &Table<V>, key: impl Key, value: &V) {
        self.writes
            .insert(table.key(key), Some(Bytes::from(value.encode_to_vec())));
    }

    pub(crate) fn delete<V: Message + Default>(&mut self, table: &Table<V>, key: impl Key) {
        self.writes.insert(table.key(key), None);
    }

    /// Adds a row to an index.
    pub(crate) fn mark(&mut self, table: &Table<Present>, key: impl Key) {
        self.put(table, key, &Present {});
    }

    /// Says what happened; becomes a journal row if the entry is accepted.
    pub(crate) fn emit<const N: usize>(
        &mut self,
        action: &'static str,
        subject: impl ToString,
        detail: [(&str, String); N],
    ) {
        const { assert!(N <= limits::DETAILS) };
        let detail = detail
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(name, value)| (name.to_owned(), cut(value, limits::DETAIL_VALUE)))
            .collect();
        self.drafts.push(Draft {
            action,
            subject: cut(subject.to_string(), limits::DETAIL_VALUE),
            detail,
        });
    }

    /// Whether anything happened so far.
    pub(crate) fn has_news(&self) -> bool {
        !self.drafts.is_empty()
    }

    /// Forgets everything that was written and said.
    pub(crate) fn roll_back(&mut self) {
        self.writes.clear();
        self.drafts.clear();
    }

    pub(crate) fn take_drafts(&mut self) -> Vec<Draft> {
        std::mem::take(&mut self.drafts)
    }

    pub(crate) fn writes(&self) -> &Writes {
        &self.writes
    }

    pub(crate) fn into_writes(self) -> Writes {
        self.writes
    }
}

impl Read for Txn<'_> {
    fn get(&self, key: &[u8]) -> Option<Bytes> {
        match self.writes.get(key) {
            Some(value) => value.clone(),
            None => self.base.get(key),
        }
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        if from >= to {
            return;
        }
        let mut over = self
            .writes
            .range::<[u8], _>((Bound::Included(from), Bound::Excluded(to)))
            .peekable();
        let mut stopped = false;
        self.base.scan(from, to, &mut |key, value| {
            // What the entry wrote in front of this key comes first.
            while let Some((own, written)) = over.next_if(|(own, _)| own.as_slice() < key) {
                if written.as_ref().is_some_and(|bytes| visit(own, bytes).is_break()) {
                    stopped = true;
                    return ControlFlow::Break(());
                }
            }
            let flow = match over.next_if(|(own, _)| own.as_slice() == key) {
                Some((_, Some(written))) => visit(key, written),
                Some((_, None)) => ControlFlow::Continue(()),
                None => visit(key, value),
            };
            stopped = flow.is_break();
            flow
        });
        if stopped {
            return;
        }
        for (own, written) in over {
            if written.as_ref().is_some_and(|bytes| visit(own, bytes).is_break()) {
                return;
            }
        }
    }

    fn scan_rev(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) {
        // Rare inside an entry, and bounded by the caller's range: merge in full, then walk back.
        let mut merged: BTreeMap<Vec<u8>, Bytes> = BTreeMap::new();
        self.base.scan(from, to, &mut |key, value| {
            merged.insert(key.to_vec(), Bytes::copy_from_slice(value));
            ControlFlow::Continue(())
        });
        if from < to {
            for (key, written) in self
                .writes
                .range::<[u8], _>((Bound::Included(from), Bound::Excluded(to)))
            {
                match (written, merged.entry(key.clone())) {
                    (Some(bytes), Entry::Occupied(mut slot)) => drop(slot.insert(bytes.clone())),
                    (Some(bytes), Entry::Vacant(slot)) => drop(slot.insert(bytes.clone())),
                    (None, Entry::Occupied(slot)) => drop(slot.remove()),
                    (None, Entry::Vacant(_)) => {}
                }
            }
        }
        for (key, value) in merged.iter().rev() {
            if visit(key, value).is_break() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::read::MemRead;

    type Pairs = Vec<(Vec<u8>, Vec<u8>)>;

    fn collect(read: &dyn Read, from: &[u8], to: &[u8], limit: usize, reverse: bool) -> Pairs {
        let mut found = Pairs::new();
        let mut visit = |key: &[u8], value: &[u8]| {
            found.push((key.to_vec(), value.to_vec()));
            if found.len() >= limit {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        if reverse {
            read.scan_rev(from, to, &mut visit)
        } else {
            read.scan(from, to, &mut visit)
        }
        found
    }

    fn key() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(0u8..4, 1..3)
    }

    proptest! {
        /// An entry reads what lies below with its own writes on top, as if they were absorbed already.
        #[test]
        fn a_view_reads_like_the_state_after_it(
            below in prop::collection::btree_map(key(), any::<u8>(), 0..12),
            own in prop::collection::btree_map(key(), any::<Option<u8>>(), 0..12),
            (from, to, limit, reverse) in (key(), key(), 1usize..9, any::<bool>()),
        ) {
            let mut base = MemRead::new();
            let value = |value| Some(Bytes::from(vec![value]));
            base.absorb(&below.into_iter().map(|(key, byte)| (key, value(byte))).collect());
            let mut txn = Txn::new(&base, 1, 1, &Actor::System, Id::ZERO);
            for (key, byte) in own {
                txn.writes.insert(key, byte.and_then(value));
            }
            let mut after = base.clone();
            after.absorb(txn.writes());
            let found = collect(&txn, &from, &to, limit, reverse);
            prop_assert_eq!(found, collect(&after, &from, &to, limit, reverse));
            prop_assert_eq!(txn.get(&from), after.get(&from));
        }
    }
}
