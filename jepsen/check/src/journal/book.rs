//! All that readers saw of the journal, put together, and whether it is one chain.

use std::collections::BTreeMap;
use std::ops::Bound;

use serde::Deserialize;
use serde_json::Value;

use super::hash;
use crate::history::{History, Op};
use crate::verdict::{Check, Violation};

/// Log index of an entry, and the place within it.
pub type Cursor = (u64, u32);

/// A row as a reader got it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Row {
    /// Log index of its entry.
    pub index: u64,
    /// Place within the entry, from 0.
    pub ordinal: u32,
    /// The server's time.
    pub at_ms: u64,
    /// Who asked.
    #[serde(default)]
    pub actor: String,
    /// What happened.
    pub action: String,
    /// To what.
    pub subject: String,
    /// Under which request.
    #[serde(default)]
    pub request: String,
    /// More, by name.
    #[serde(default)]
    pub detail: BTreeMap<String, String>,
    /// Hash of the row before.
    pub prev: String,
    /// Its own.
    pub hash: String,
}

impl Row {
    /// Where it is.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        (self.index, self.ordinal)
    }
}

/// A row, and the operation that first showed it.
#[derive(Clone, Debug)]
pub struct Seen<'a> {
    /// The row.
    pub row: Row,
    /// Who first saw it.
    pub op: Op<'a>,
}

/// An answer of `head`.
#[derive(Deserialize)]
struct Head {
    rows: u64,
    first: Cursor,
    last: Cursor,
    head: String,
    intact: bool,
}

/// Everything that was read of the journal.
#[derive(Debug, Default)]
pub struct Book<'a> {
    /// Each row once.
    pub rows: BTreeMap<Cursor, Seen<'a>>,
    /// It has the first row ever, and a last read found nothing behind its end.
    pub whole: bool,
    /// Replicas that were read after everything had ended: the last cursor that each has.
    pub ends: BTreeMap<String, (Cursor, Op<'a>)>,
    /// How many answers it is made of.
    pub answers: u64,
    /// Cursors at which the oldest rows were said to be trimmed.
    pub gaps: u64,
    /// No row is missing between the first and the last that were read.
    pub unbroken: bool,
    heads: Vec<Op<'a>>,
    neighbours: Vec<(Cursor, Cursor, Op<'a>)>,
    gapless: Vec<Violation>,
    chain: Vec<Violation>,
    forks: Vec<Violation>,
    hashed: u64,
}

/// A cursor for people.
pub(crate) fn show(cursor: Cursor) -> String {
    format!("{}.{}", cursor.0, cursor.1)
}

/// The replica that answered.
pub(crate) fn node<'a>(op: &Op<'a>) -> &'a str {
    let answered = op.end.and_then(|end| end.node.as_deref());
    answered.or(op.invoke.node.as_deref()).unwrap_or("a replica")
}

impl<'a> Book<'a> {
    /// Reads it out of a history.
    ///
    /// # Errors
    /// An answer that has not the shape that the doc of [`crate::journal`] says.
    pub fn read(history: &'a History) -> Result<Self, String> {
        let mut book = Book::default();
        for op in history.ops().into_iter().filter(Op::is_ok) {
            let taken = match op.invoke.f.as_str() {
                "tail" | "rows" => book.take(op),
                "head" => {
                    book.heads.push(op);
                    Ok(())
                }
                _ => Ok(()),
            };
            taken.map_err(|why| format!("event {}: `{}`: {why}", op.start(), op.invoke.f))?;
        }
        book.link();
        Ok(book)
    }

    fn take(&mut self, op: Op<'a>) -> Result<(), String> {
        self.answers += 1;
        let value = op.value();
        let after = cursor_of(op.field("after"))?;
        if cursor_of(value.get("gap"))?.is_some() {
            self.gaps += 1;
            return Ok(());
        }
        let rows: Vec<Row> = match value.get("rows") {
            Some(rows) => Deserialize::deserialize(rows).map_err(|error| error.to_string())?,
            None => return Err("no `rows` and no `gap`".into()),
        };
        let is_end = value.get("end").and_then(Value::as_bool).unwrap_or(false);
        let last = rows.last().map(Row::cursor).or(after);
        if op.invoke.f == "rows"
            && is_end
            && let Some(last) = last
        {
            self.ends.insert(node(&op).to_owned(), (last, op));
        }
        let mut before = after;
        for (at, row) in rows.into_iter().enumerate() {
            self.follow(before, at == 0, &row, op);
            if let Some(before) = before {
                self.neighbours.push((before, row.cursor(), op));
            }
            before = Some(row.cursor());
            self.enter(row, op);
        }
        Ok(())
    }

    /// Whether a row follows another one without a hole, as far as cursors tell.
    fn follow(&mut self, before: Option<Cursor>, is_first: bool, row: &Row, op: Op<'a>) {
        let cursor = row.cursor();
        let fits = match before {
            None => true,
            Some(before) if before.0 == cursor.0 => cursor.1 == before.1 + 1,
            Some(before) => cursor.0 > before.0 && cursor.1 == 0,
        };
        if !fits {
            let what = if is_first {
                "the cursor it was asked after"
            } else {
                "the row before it"
            };
            let what = format!(
                "{} answered row {} behind {what}, {}",
                node(&op),
                show(cursor),
                before.map_or(String::new(), show)
            );
            self.gapless.push(Violation::of(what, &[&op]));
        }
    }

    /// Adds a row; the same one again must be the same.
    fn enter(&mut self, row: Row, op: Op<'a>) {
        let cursor = row.cursor();
        if let Some(known) = self.rows.get(&cursor) {
            if known.row != row {
                let what = format!(
                    "the journal forks at {}: {} answered {} of {:?}, hash {}; {} before that {} of {:?}, hash {}",
                    show(cursor),
                    node(&op),
                    row.action,
                    row.subject,
                    short(&row.hash),
                    node(&known.op),
                    known.row.action,
                    known.row.subject,
                    short(&known.row.hash),
                );
                self.forks.push(Violation::of(what, &[&known.op, &op]));
            }
            return;
        }
        self.hashed += 1;
        let wrong = match hash::of(&row) {
            None => Some("its request id or its `prev` cannot be read".to_owned()),
            Some(hash) if hash != row.hash => Some(format!("its contents have hash {}", short(&hash))),
            Some(_) => None,
        };
        if let Some(wrong) = wrong {
            let what = format!(
                "{} answered row {} with hash {}, but {wrong}",
                node(&op),
                show(cursor),
                short(&row.hash)
            );
            self.chain.push(Violation::of(what, &[&op]));
        }
        self.rows.insert(cursor, Seen { row, op });
    }

    /// Each answer's rows must name the ones before them, and leave none out, whoever showed those.
    fn link(&mut self) {
        for (before, cursor, op) in std::mem::take(&mut self.neighbours) {
            let between = (Bound::Excluded(before), Bound::Excluded(cursor));
            if let Some((third, seen)) = (before < cursor)
                .then(|| self.rows.range(between).next())
                .flatten()
            {
                let what = format!(
                    "{} answered row {} right behind {}, but {} had row {} between them",
                    node(&op),
                    show(cursor),
                    show(before),
                    node(&seen.op),
                    show(*third)
                );
                self.forks.push(Violation::of(what, &[&seen.op, &op]));
            } else if let (Some(before), Some(seen)) = (self.rows.get(&before), self.rows.get(&cursor))
                && seen.row.prev != before.row.hash
            {
                let what = format!(
                    "row {} (from {}) does not follow row {} (from {}): it names {} as the hash before it, which is {}",
                    show(cursor),
                    node(&seen.op),
                    show(before.row.cursor()),
                    node(&before.op),
                    short(&seen.row.prev),
                    short(&before.row.hash)
                );
                self.chain.push(Violation::of(what, &[&before.op, &seen.op]));
            }
        }
        let mut rows = self.rows.values();
        let mut before = rows.next();
        let from_first = before.is_some_and(|seen| seen.row.prev == hash::ZERO);
        let any = before.is_some();
        let joined = rows.all(|seen| {
            let before = before.replace(seen);
            before.is_some_and(|before| before.row.hash == seen.row.prev)
        });
        self.unbroken = any && joined;
        self.whole = from_first && self.unbroken && !self.ends.is_empty();
    }

    /// Whether it was read to its end after this operation had ended.
    pub(crate) fn covers(&self, op: &Op<'_>) -> bool {
        self.ends.values().any(|(_, read)| op.stop() < Some(read.start()))
    }

    /// What can be said of the journal by itself.
    pub(crate) fn checks(&self) -> Vec<Check> {
        let figures = |check: Check| check.fact("rows", self.rows.len()).fact("answers", self.answers);
        let or_unread = |name: &str, violations: &[Violation]| {
            if self.rows.is_empty() {
                return Check::unknown(name, "no row of the journal was ever read");
            }
            figures(Check::of(name, violations.to_vec()))
        };
        vec![
            or_unread("journal.gapless", &self.gapless).fact("gaps_said", self.gaps),
            or_unread("journal.chain", &self.chain).fact("hashes", self.hashed),
            or_unread("journal.one-history", &self.forks),
            self.heads(),
        ]
    }

    fn heads(&self) -> Check {
        let places: BTreeMap<Cursor, u64> = self.rows.keys().copied().zip(0..).collect();
        let mut violations = Vec::new();
        let mut unread = 0u64;
        for op in &self.heads {
            let head = match Head::deserialize(op.value()) {
                Ok(head) => head,
                Err(error) => {
                    return Check::unknown("journal.heads", format!("event {}: `head`: {error}", op.start()));
                }
            };
            let place = |cursor: Cursor| places.get(&cursor).copied();
            let wrong = match (self.rows.get(&head.last), place(head.first), place(head.last)) {
                _ if !head.intact => Some("says itself that its journal is broken".to_owned()),
                (Some(seen), ..) if seen.row.hash != head.head => Some(format!(
                    "has the head {} at {}, where {} answered a row with hash {}",
                    short(&head.head),
                    show(head.last),
                    node(&seen.op),
                    short(&seen.row.hash)
                )),
                (_, Some(first), Some(last))
                    if self.whole && (last + 1).saturating_sub(first) != head.rows =>
                {
                    Some(format!(
                        "counts {} rows from {} to {}, where {} are",
                        head.rows,
                        show(head.first),
                        show(head.last),
                        (last + 1).saturating_sub(first)
                    ))
                }
                (None, ..) => {
                    unread += 1;
                    None
                }
                _ => None,
            };
            if let Some(wrong) = wrong {
                violations.push(Violation::of(format!("{} {wrong}", node(op)), &[op]));
            }
        }
        Check::of("journal.heads", violations)
            .fact("heads", self.heads.len())
            .fact("heads_not_read", unread)
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

/// A cursor in a value: `[index, ordinal]`, or none.
pub(crate) fn cursor_of(value: Option<&Value>) -> Result<Option<Cursor>, String> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => Deserialize::deserialize(value)
            .map(Some)
            .map_err(|error| format!("a cursor {value}: {error}")),
    }
}
