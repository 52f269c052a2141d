//! The journal: one row for each thing that happened, hash-chained, in the same entry as the thing itself.
//!
//! What never lives here: secrets, payloads, and refusals (they change nothing).
//! Invariants: cursors strictly increase; each row's hash covers the row before it and every field; trimming
//! takes the oldest rows only. Actions are stable strings, because followers and auditors match on them.

pub mod audience;
mod chain;

pub use chain::{Broken, Summary, row_hash, verify, verify_all};

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use crate::check::cut;
use crate::ids::{Digest, Id};
use crate::limits;
use crate::meta::{Meta, meta};
use crate::read::Read;
use crate::tables;
use crate::txn::Txn;

/// Position in the journal and in the feed: the same on every replica.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
pub struct Cursor {
    /// Log index of the entry.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// Place within the entry, from 0.
    #[prost(uint32, tag = "2")]
    pub ordinal: u32,
}

/// One thing that happened.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Row {
    /// Log index of the entry.
    #[prost(uint64, tag = "1")]
    pub index: u64,
    /// Place within the entry, from 0.
    #[prost(uint32, tag = "2")]
    pub ordinal: u32,
    /// Time of the state.
    #[prost(uint64, tag = "3")]
    pub at_ms: u64,
    /// Who asked, as `Actor` prints itself.
    #[prost(string, tag = "4")]
    pub actor: String,
    /// What happened, such as `pairing.approved`.
    #[prost(string, tag = "5")]
    pub action: String,
    /// To what: an id or a name.
    #[prost(string, tag = "6")]
    pub subject: String,
    /// Under which request.
    #[prost(message, required, tag = "7")]
    pub request_id: Id,
    /// More, by name; at most `limits::DETAILS`, each value at most `limits::DETAIL_VALUE` bytes.
    #[prost(btree_map = "string, string", tag = "8")]
    pub detail: BTreeMap<String, String>,
    /// Hash of the row before; zero for the first.
    #[prost(message, required, tag = "9")]
    pub prev_hash: Digest,
    /// Hash of this row.
    #[prost(message, required, tag = "10")]
    pub hash: Digest,
}

impl Row {
    /// Where the row is.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        Cursor {
            index: self.index,
            ordinal: self.ordinal,
        }
    }

    /// A detail; empty when there is none of that name.
    #[must_use]
    pub fn detail(&self, name: &str) -> &str {
        self.detail.get(name).map_or("", String::as_str)
    }
}

/// What a reader of the journal finds after its cursor.
#[derive(Clone, Debug, PartialEq)]
pub enum Rows {
    /// Rows in order; none when the reader has seen all.
    Rows(Vec<Row>),
    /// Rows after the reader's cursor were trimmed; what is held begins here.
    Gap {
        /// The first row held.
        first: Cursor,
    },
}

/// Rows after `after`, at most `limit`, or the gap when some of them were trimmed.
///
/// A reader that starts anew and wants what is held begins at [`before_first`].
#[must_use]
pub fn rows_after(r: &dyn Read, after: Cursor, limit: usize) -> Rows {
    let meta = meta(r);
    if after < meta.journal_trimmed {
        return Rows::Gap {
            first: meta.journal_first,
        };
    }
    Rows::Rows(read_after(r, after, limit))
}

/// The cursor right before the first row held, from which [`rows_after`] finds no gap.
#[must_use]
pub fn before_first(r: &dyn Read) -> Cursor {
    meta(r).journal_trimmed
}

/// The newest `count` rows, oldest first.
#[must_use]
pub fn last_rows(r: &dyn Read, count: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    if count == 0 {
        return rows;
    }
    let (from, to) = (tables::JOURNAL.key(0u64), tables::JOURNAL.key(u64::MAX));
    r.scan_rev(&from, &to, &mut |_, value| {
        rows.push(tables::JOURNAL.decode(value));
        if rows.len() < count {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    });
    rows.reverse();
    rows
}

/// Turns what an entry said into rows, writes them, and trims a few old ones.
pub(crate) fn append(txn: &mut Txn<'_>, meta: &mut Meta) -> Vec<Row> {
    let mut rows = Vec::new();
    for (ordinal, draft) in (0u32..).zip(txn.take_drafts()) {
        debug_assert!(
            cfg!(test) || audience::audience(draft.action).is_some(),
            "{} is not in journal/audience.rs: say there who sees it",
            draft.action
        );
        let mut row = Row {
            index: txn.index,
            ordinal,
            at_ms: txn.now,
            actor: cut(txn.actor.to_string(), limits::DETAIL_VALUE),
            action: draft.action.to_owned(),
            subject: draft.subject,
            request_id: txn.request_id,
            detail: draft.detail,
            prev_hash: meta.journal_head,
            hash: Digest::ZERO,
        };
        row.hash = row_hash(&row);
        txn.put(&tables::JOURNAL, (row.index, row.ordinal), &row);
        if meta.journal_rows == 0 {
            meta.journal_first = row.cursor();
        }
        meta.journal_rows += 1;
        meta.journal_last = row.cursor();
        meta.journal_head = row.hash;
        rows.push(row);
    }
    trim(txn, meta, rows.len() as u64);
    rows
}

/// Takes the oldest rows out: as many as came, for one entry can bring a thousand, and a few more.
fn trim(txn: &mut Txn<'_>, meta: &mut Meta, added: u64) {
    let surplus = meta
        .journal_rows
        .saturating_sub(limits::JOURNAL_ROWS)
        .min(added + limits::JOURNAL_TRIM) as usize;
    if surplus == 0 {
        return;
    }
    let oldest = read_after(txn, meta.journal_trimmed, surplus + 1);
    for row in &oldest[..surplus.min(oldest.len())] {
        txn.delete(&tables::JOURNAL, (row.index, row.ordinal));
        meta.journal_rows -= 1;
        meta.journal_trimmed = row.cursor();
        meta.journal_trimmed_hash = row.hash;
    }
    meta.journal_first = oldest.get(surplus).map(Row::cursor).unwrap_or_default();
}

fn read_after(r: &dyn Read, after: Cursor, limit: usize) -> Vec<Row> {
    let mut from = tables::JOURNAL.key((after.index, after.ordinal));
    from.push(0);
    let mut rows = Vec::new();
    r.scan(&from, &tables::JOURNAL.key(u64::MAX), &mut |_, value| {
        if rows.len() >= limit {
            return ControlFlow::Break(());
        }
        rows.push(tables::JOURNAL.decode(value));
        ControlFlow::Continue(())
    });
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actor::Actor;
    use crate::read::MemRead;

    /// Appends one entry of `count` rows.
    fn entry(state: &mut MemRead, index: u64, count: usize, rows_held: Option<u64>) {
        let mut meta = meta(state);
        meta.journal_rows = rows_held.unwrap_or(meta.journal_rows);
        let mut txn = Txn::new(state, index, index, &Actor::System, Id::ZERO);
        for number in 0..count {
            txn.emit("test.row", number, []);
        }
        append(&mut txn, &mut meta);
        txn.put(&tables::META, (), &meta);
        let writes = txn.into_writes();
        state.absorb(&writes);
    }

    #[test]
    fn trimming_leaves_a_chain_that_verifies_and_a_gap_that_is_seen() {
        let mut state = MemRead::new();
        for index in 1..=5 {
            entry(&mut state, index, 3, None);
        }
        assert_eq!(verify_all(&state).unwrap().rows, 15);
        let seen = Cursor { index: 2, ordinal: 0 };
        // Pretend that the journal is full: this entry's rows push the oldest out.
        entry(&mut state, 6, 2, Some(limits::JOURNAL_ROWS + 3));
        let held = read_after(&state, Cursor::default(), 100);
        assert_eq!(held[0].cursor(), Cursor { index: 2, ordinal: 2 });
        assert_eq!(meta(&state).journal_first, held[0].cursor());
        assert_eq!(
            rows_after(&state, seen, 10),
            Rows::Gap {
                first: held[0].cursor()
            }
        );
        assert_eq!(
            rows_after(&state, before_first(&state), 100),
            Rows::Rows(held.clone())
        );
        // A reader that has seen exactly what was trimmed has missed nothing.
        let exact = Cursor { index: 2, ordinal: 1 };
        assert_eq!(rows_after(&state, exact, 100), Rows::Rows(held.clone()));
        assert_eq!(
            verify(held.clone(), meta(&state).journal_trimmed_hash)
                .unwrap()
                .rows,
            12
        );
        assert!(verify(held, Digest::ZERO).is_err());
    }

    #[test]
    fn missing_rows_are_found_at_both_ends() {
        let mut state = MemRead::new();
        for index in 1..=3 {
            entry(&mut state, index, 2, None);
        }
        for (cursor, problem) in [
            (
                Cursor { index: 1, ordinal: 0 },
                "it does not follow the row before it",
            ),
            (
                Cursor { index: 2, ordinal: 1 },
                "it does not follow the row before it",
            ),
            (Cursor { index: 3, ordinal: 1 }, "the newest rows are missing"),
        ] {
            let mut cut = state.clone();
            let key = tables::JOURNAL.key((cursor.index, cursor.ordinal));
            cut.absorb(&BTreeMap::from([(key, None)]));
            assert_eq!(verify_all(&cut).unwrap_err().problem, problem);
        }
    }

    #[test]
    fn rows_that_cannot_be_read_or_lie_elsewhere_are_found() {
        let mut state = MemRead::new();
        for index in 1..=3 {
            entry(&mut state, index, 2, None);
        }
        let key = tables::JOURNAL.key((2u64, 1u32));
        let row = state.get(&key).unwrap();
        let mut cut = state.clone();
        cut.absorb(&BTreeMap::from([(key.clone(), Some(row.slice(..row.len() - 1)))]));
        let broken = verify_all(&cut).unwrap_err();
        assert_eq!(broken.cursor, Cursor { index: 2, ordinal: 1 });
        assert_eq!(broken.problem, "it cannot be read");
        // Between the same neighbours, so that the chain alone does not show it.
        let mut moved = state.clone();
        let elsewhere = tables::JOURNAL.key((2u64, 7u32));
        moved.absorb(&BTreeMap::from([(key, None), (elsewhere, Some(row))]));
        let broken = verify_all(&moved).unwrap_err();
        assert_eq!(broken.cursor, Cursor { index: 2, ordinal: 7 });
        assert_eq!(broken.problem, "it is not where it says");
    }

    /// The fault harness has its own copy of the definition, and pins the same row to the same hash
    /// (`jepsen/check/src/journal/tests.rs`).
    #[test]
    fn the_hash_of_a_row_is_pinned() {
        let detail = [("generation", "2"), ("platform", "linux/x86_64")];
        let row = Row {
            index: 258,
            ordinal: 3,
            at_ms: 1_700_000_000_123,
            actor: "operator/x".into(),
            action: "node.registered".into(),
            subject: "a".into(),
            request_id: Id::parse("01J00000000000000000000007").unwrap(),
            detail: detail.map(|(name, value)| (name.into(), value.into())).into(),
            prev_hash: Digest::from_bytes([0x11; 32]),
            hash: Digest::ZERO,
        };
        let pinned = "408b2a5d04584c5242bcab21ee6ac0ffbc7a6e33839389f16651d37cf6823745";
        assert_eq!(row_hash(&row).to_string(), pinned);
    }

    #[test]
    fn last_rows_come_in_order() {
        let mut state = MemRead::new();
        entry(&mut state, 1, 3, None);
        entry(&mut state, 2, 2, None);
        let cursors: Vec<_> = last_rows(&state, 3)
            .iter()
            .map(|row| (row.index, row.ordinal))
            .collect();
        assert_eq!(cursors, [(1, 2), (2, 0), (2, 1)]);
        assert!(last_rows(&state, 0).is_empty());
    }
}
