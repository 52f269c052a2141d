//! The workload `journal`: readers fetch the hash-chained journal from every replica, all the time, and keep what they
//! saw.
//!
//! Operations. A CURSOR is `[index, ordinal]`: the log index of an entry, and a place within it from 0.
//!
//! | `f` | call | answer (`ok`) |
//! |---|---|---|
//! | `tail` | `{"after": CURSOR or null}` | `{"after", "rows": [ROW, ...], "end": BOOL}` or `{"after", "gap"}` |
//! | `rows` | the same, after everything has ended | the same |
//! | `head` | `{}` | `{"rows": COUNT, "first": CURSOR, "last": CURSOR, "head": HEX, "intact": BOOL}` |
//!
//! A ROW is `{"index", "ordinal", "at_ms", "actor", "action", "subject", "request", "detail": {NAME: TEXT}, "prev":
//! HEX, "hash": HEX}`. `after: null` starts at the first row that is held; `end` says that no row follows on that
//! replica now; `gap`, a CURSOR, that the rows before it were trimmed.
//! `rev` is the index that the answer reflects, `node` the replica.
//!
//! Conditions:
//! - `journal.gapless`: in each answer rows follow each other and what was asked for: indexes rise, ordinals count
//!   from 0.
//! - `journal.chain`: each row's hash is that of its contents, and its `prev` the hash of the row before it; the first
//!   row ever has the zero hash before it.
//! - `journal.one-history`: at one cursor there is one row, in all answers of all replicas at all times, and between
//!   two rows that follow each other in one answer no other answer has a third.
//! - `journal.heads`: each head is the hash of the row at its cursor, counts the rows before it, and is intact.
//! - `journal.mutations`: an acknowledged change has exactly one entry, at the index that was told (at or before it
//!   when the answer is a `"duplicate"`, none when it says `"quiet": true`); a failed one has none, one of unknown
//!   outcome none or one. No actor of [`Facts::actors`] has an entry that nobody asked for. Which changes are meant:
//!   those with a request id, named in [`Facts::journaled`] or [`JOURNALED`].
//! - `journal.state`: what was read of a register at a revision is the version that the last row about it at or before
//!   that revision tells. With [`Facts::registers`] only.
//! - `journal.converged`: at the end each replica of [`Facts::replicas`] has every entry that was acknowledged.
//!
//! A journal that passes is [`Canonical`], and tells what became of requests whose outcome nobody knew.
//!
//! [`Facts::actors`]: crate::context::Facts::actors
//! [`Facts::journaled`]: crate::context::Facts::journaled
//! [`Facts::registers`]: crate::context::Facts::registers
//! [`Facts::replicas`]: crate::context::Facts::replicas

mod book;
mod hash;
mod requests;
#[cfg(test)]
pub(crate) mod tests;

use crate::context::Context;
use crate::history::History;
use crate::resolve::Canonical;
use crate::verdict::Check;

pub use book::{Book, Cursor, Row, Seen};
pub(crate) use book::{cursor_of, node, show};

/// What the operations of this workload are called.
pub const FUNCTIONS: &[&str] = &["tail", "rows", "head"];

/// The changes that leave an entry unless the run says otherwise.
pub const JOURNALED: &[&str] = &["write", "cas", "delete", "append"];

/// Judges a history.
#[must_use]
pub fn check(history: &History, context: &Context) -> Vec<Check> {
    match Book::read(history) {
        Ok(book) => judge(history, context, &book),
        Err(why) => vec![Check::unknown("journal.history", why)],
    }
}

/// Judges a history whose journal was read before.
#[must_use]
pub fn judge(history: &History, context: &Context, book: &Book<'_>) -> Vec<Check> {
    let ops = history.ops();
    let mut checks = book.checks();
    checks.push(requests::mutations(&ops, context, book));
    if let Some(registers) = &context.facts.registers {
        checks.push(requests::state(&ops, registers, book));
    }
    checks.push(requests::converged(&ops, context, book));
    checks
}

/// The journal that the cluster ended with, if its own checks hold: what was read of it is gapless, chained and one.
#[must_use]
pub fn canonical(history: &History, context: &Context) -> Option<Canonical> {
    let book = Book::read(history).ok()?;
    if book.rows.is_empty() || !book.checks().iter().all(Check::holds) {
        return None;
    }
    let mut canonical = Canonical {
        whole: context.facts.settled && book.whole,
        ..Canonical::default()
    };
    for (cursor, seen) in &book.rows {
        let request = seen.row.request.clone();
        canonical.revs.entry(request).or_insert(cursor.0);
    }
    Some(canonical)
}
