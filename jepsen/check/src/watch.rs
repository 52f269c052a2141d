//! The workload `watch`: readers follow the journal as it grows, at every replica and roaming between them.
//!
//! Operations; CURSOR and ROW as in [`crate::journal`], of a ROW `index`, `ordinal`, `action`, `subject` and `hash`
//! (which may be empty where the reader may not see the whole row). A *watcher* is a name that lives through many
//! streams.
//!
//! | `f` | call | answer (`ok`) |
//! |---|---|---|
//! | `watch` | `{"watcher", "after": CURSOR, "first" or "now", "filter", "slow": BOOL}` | the same and `"stream"` |
//! | `next` | `{"watcher", "stream"}` | the same and one of what follows |
//! | | | `"rows": [ROW, ...], "cursor": CURSOR`: everything up to the cursor was looked at |
//! | | | `"caught_up": CURSOR` or `"heartbeat": CURSOR`: nothing for the reader up to there |
//! | | | `"gap": CURSOR, "rescan": INDEX`: rows before the cursor were trimmed |
//!
//! `filter`, if there is one, is `{"action": PREFIX, "subject": TEXT}`; `stream` a number that no other stream has.
//!
//! `next` ends as `fail` when the stream has ended; the watcher then opens another one, at any replica, after the last
//! cursor that it was given, or before it on purpose. The canonical journal is put together from the operations `rows`
//! and `tail`.
//!
//! Conditions, for each stream, from where it was asked to begin:
//! - `watch.ordered`: cursors rise; nothing comes twice.
//! - `watch.committed`: each row that is delivered is in the canonical journal, with the same hash.
//! - `watch.gapless`: the row that comes next is the first one that matches the filter; nothing is left out, also over
//!   a resumption elsewhere.
//! - `watch.bookmarks`: no cursor is ahead of a matching row that was not delivered.
//! - `watch.gaps`: a gap is ahead of what was delivered, and what follows it begins there.
//! - `watch.reaches-end`: within [`HEAL_MS`] after the faults have ended (bound `watch_heal_ms`) each watcher that is
//!   not slow and still reads has seen everything that was acknowledged before.
//!
//! That a list at a revision and the watch after it make up the state follows from these and `journal.state`, which
//! compares each list with the journal's rows up to its revision.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

use serde::Deserialize;
use serde_json::Value;

use crate::context::Context;
use crate::history::{History, Op};
use crate::journal::{Book, Cursor, cursor_of, node, show};
use crate::verdict::{Check, Violation};

#[cfg(test)]
mod tests;

/// What the operations of this workload are called.
pub const FUNCTIONS: &[&str] = &["watch", "next"];

/// How long a watcher may take to catch up after the last fault, in milliseconds, unless the run says otherwise: a few
/// elections and reconnections.
pub const HEAL_MS: f64 = 15_000.0;

/// A row as a watcher gets it.
#[derive(Debug, Deserialize)]
struct Row {
    index: u64,
    ordinal: u32,
    action: String,
    subject: String,
    #[serde(default)]
    hash: String,
}

/// What a stream is asked for.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Filter {
    action: String,
    subject: String,
}

impl Filter {
    fn takes(&self, action: &str, subject: &str) -> bool {
        action.starts_with(&self.action) && (self.subject.is_empty() || subject == self.subject)
    }
}

/// One stream, as far as it was read.
struct Stream<'a> {
    watcher: String,
    slow: bool,
    filter: Filter,
    /// Everything up to here was looked at; `None` until a stream that begins *now* has said where that is.
    at: Option<Cursor>,
    last: Op<'a>,
}

/// When a watcher had looked at everything up to a cursor.
#[derive(Clone, Copy)]
struct Reached {
    time: u64,
    at: Cursor,
}

/// All watchers of a history.
#[derive(Default)]
struct Watchers<'a> {
    streams: HashMap<u64, Stream<'a>>,
    reached: BTreeMap<String, Vec<Reached>>,
    slow: BTreeMap<String, bool>,
    found: BTreeMap<&'static str, Vec<Violation>>,
    rows: u64,
    opened: u64,
    resumed: u64,
    gaps: u64,
    bookmarks: u64,
}

/// Judges a history.
#[must_use]
pub fn check(history: &History, context: &Context) -> Vec<Check> {
    match Book::read(history) {
        Ok(book) => judge(history, context, &book),
        Err(why) => vec![Check::unknown("watch.history", why)],
    }
}

/// Judges a history whose journal was read before.
#[must_use]
pub fn judge(history: &History, context: &Context, book: &Book<'_>) -> Vec<Check> {
    let mut watchers = Watchers::default();
    let mut ops = history.ops();
    // Streams are walked along in the order in which their items came.
    ops.sort_by_key(|op| op.end.map_or(u64::MAX, |end| end.index));
    for op in ops.into_iter().filter(Op::is_ok) {
        let taken = match op.invoke.f.as_str() {
            "watch" => watchers.open(op),
            "next" => watchers.next(op, book),
            _ => Ok(()),
        };
        if let Err(why) = taken {
            let why = format!("event {}: `{}`: {why}", op.start(), op.invoke.f);
            return vec![Check::unknown("watch.history", why)];
        }
    }
    watchers.checks(history, context, book)
}

fn text(op: &Op<'_>, name: &str) -> Result<String, String> {
    let found = op.field(name).and_then(Value::as_str);
    found.map(str::to_owned).ok_or(format!("no text `{name}`"))
}

fn number(op: &Op<'_>, name: &str) -> Result<u64, String> {
    let found = op.field(name).and_then(Value::as_u64);
    found.ok_or(format!("no number `{name}`"))
}

impl<'a> Watchers<'a> {
    fn open(&mut self, op: Op<'a>) -> Result<(), String> {
        let watcher = text(&op, "watcher")?;
        let at = match op.field("after").and_then(Value::as_str) {
            Some("now") => None,
            Some("first") => Some((0, 0)),
            Some(other) => {
                return Err(format!(
                    "`after` is {other:?}, and not \"first\", \"now\" or a cursor"
                ));
            }
            None => Some(cursor_of(op.field("after"))?.ok_or("no `after`")?),
        };
        let filter = match op.field("filter") {
            None | Some(Value::Null) => Filter::default(),
            Some(filter) => Filter::deserialize(filter).map_err(|error| error.to_string())?,
        };
        let slow = op.field("slow").and_then(Value::as_bool).unwrap_or(false);
        self.opened += 1;
        self.resumed += u64::from(at.is_some_and(|at| at != (0, 0)) && self.reached.contains_key(&watcher));
        *self.slow.entry(watcher.clone()).or_default() |= slow;
        self.reached.entry(watcher.clone()).or_default();
        let stream = Stream {
            watcher,
            slow,
            filter,
            at,
            last: op,
        };
        if self.streams.insert(number(&op, "stream")?, stream).is_some() {
            return Err("its stream has the number of another one".into());
        }
        Ok(())
    }

    fn next(&mut self, op: Op<'a>, book: &Book<'_>) -> Result<(), String> {
        let id = number(&op, "stream")?;
        let Some(mut stream) = self.streams.remove(&id) else {
            return Err(format!("stream {id} was never opened"));
        };
        let taken = self.item(&mut stream, op, book);
        let time = op.end.map_or(op.invoke.time, |end| end.time);
        if let (Some(at), Some(reached)) = (stream.at, self.reached.get_mut(&stream.watcher)) {
            reached.push(Reached { time, at });
        }
        stream.last = op;
        self.streams.insert(id, stream);
        taken
    }

    fn item(&mut self, stream: &mut Stream<'a>, op: Op<'a>, book: &Book<'_>) -> Result<(), String> {
        let value = op.value();
        if let Some(first) = cursor_of(value.get("gap"))? {
            self.gaps += 1;
            if stream.at.is_some_and(|at| first <= at) {
                self.wrong(
                    "watch.gaps",
                    stream,
                    op,
                    format!(
                        "was told that rows before {} are gone, but had seen them",
                        show(first)
                    ),
                );
            }
            // What follows begins with this row.
            stream.at = Some(before(first));
            return Ok(());
        }
        if let Some(rows) = value.get("rows") {
            let rows: Vec<Row> = Deserialize::deserialize(rows).map_err(|error| error.to_string())?;
            for row in &rows {
                self.row(stream, op, row, book);
            }
        }
        for name in ["cursor", "caught_up", "heartbeat"] {
            if let Some(cursor) = cursor_of(value.get(name))? {
                self.bookmark(stream, op, cursor, book);
            }
        }
        Ok(())
    }

    fn row(&mut self, stream: &mut Stream<'a>, op: Op<'a>, row: &Row, book: &Book<'_>) {
        self.rows += 1;
        let cursor = (row.index, row.ordinal);
        if stream.at.is_some_and(|at| cursor <= at) {
            let seen = stream.at.map_or(String::new(), show);
            self.wrong(
                "watch.ordered",
                stream,
                op,
                format!("got row {} after it was at {seen}", show(cursor)),
            );
            return;
        }
        if !stream.filter.takes(&row.action, &row.subject) {
            let what = format!(
                "got row {}, {} of {:?}, which it did not ask for",
                show(cursor),
                row.action,
                row.subject
            );
            self.wrong("watch.committed", stream, op, what);
        }
        match book.rows.get(&cursor) {
            Some(seen) if row.hash.is_empty() || seen.row.hash == row.hash => {}
            Some(seen) => {
                let what = format!(
                    "got row {} with hash {}, where the journal has {}",
                    show(cursor),
                    row.hash,
                    seen.row.hash
                );
                self.wrong("watch.committed", stream, op, what);
            }
            None if book.unbroken && book.covers(&op) && book.rows.keys().next() < Some(&cursor) => {
                self.wrong(
                    "watch.committed",
                    stream,
                    op,
                    format!("got row {}, which the journal does not have", show(cursor)),
                );
            }
            None => {}
        }
        if let Some(at) = stream.at
            && let Some(left_out) = first_match(book, at, cursor, &stream.filter)
        {
            let what = format!(
                "got row {} after {}, and row {} was left out",
                show(cursor),
                show(at),
                show(left_out)
            );
            self.wrong("watch.gapless", stream, op, what);
        }
        stream.at = Some(cursor);
    }

    fn bookmark(&mut self, stream: &mut Stream<'a>, op: Op<'a>, cursor: Cursor, book: &Book<'_>) {
        self.bookmarks += 1;
        let Some(at) = stream.at else {
            stream.at = Some(cursor);
            return;
        };
        if let Some(left_out) = first_match(book, at, (cursor.0, cursor.1.saturating_add(1)), &stream.filter)
        {
            let what = format!(
                "was told to resume after {}, but row {} was not delivered",
                show(cursor),
                show(left_out)
            );
            self.wrong("watch.bookmarks", stream, op, what);
        } else if cursor < at {
            let what = format!(
                "was told to resume after {}, but was at {} before",
                show(cursor),
                show(at)
            );
            self.wrong("watch.ordered", stream, op, what);
        }
        stream.at = Some(at.max(cursor));
    }

    fn wrong(&mut self, check: &'static str, stream: &Stream<'a>, op: Op<'a>, what: String) {
        let what = format!("watcher {} at {} {what}", stream.watcher, node(&stream.last));
        self.found
            .entry(check)
            .or_default()
            .push(Violation::of(what, &[&op]));
    }

    fn checks(mut self, history: &History, context: &Context, book: &Book<'_>) -> Vec<Check> {
        let reaches = self.reaches_end(history, context, book);
        let names = [
            "watch.ordered",
            "watch.committed",
            "watch.gapless",
            "watch.bookmarks",
            "watch.gaps",
        ];
        let mut checks = Vec::new();
        for name in names {
            let found = self.found.remove(name).unwrap_or_default();
            let needs_journal = !matches!(name, "watch.ordered" | "watch.gaps");
            let check = if self.rows == 0 {
                Check::unknown(name, "no row was ever delivered to a watcher")
            } else if needs_journal && !book.unbroken && found.is_empty() {
                Check::unknown(
                    name,
                    "the journal was not read without holes, so that nothing can be missed from it",
                )
            } else {
                Check::of(name, found)
            };
            checks.push(check.fact("rows", self.rows).fact("streams", self.opened));
        }
        let last = checks.len() - 1;
        checks[last].facts.insert("gaps".into(), self.gaps.into());
        checks[last]
            .facts
            .insert("bookmarks".into(), self.bookmarks.into());
        checks[last].facts.insert("resumed".into(), self.resumed.into());
        checks.push(reaches);
        checks
    }

    fn reaches_end(&self, history: &History, context: &Context, book: &Book<'_>) -> Check {
        let name = "watch.reaches-end";
        let bound_ms = context.bound_or("watch_heal_ms", HEAL_MS);
        let Some(healed) = history.healed() else {
            return Check::unknown(
                name,
                "the history has no event `healed` of the nemesis, which says when faults had ended",
            );
        };
        if !book.unbroken {
            return Check::unknown(
                name,
                "the journal was not read without holes: nobody knows where its end is",
            );
        }
        let due = healed.saturating_add((bound_ms * 1e6) as u64);
        let acknowledged = history.ops().into_iter().filter(|op| {
            op.is_ok()
                && op.invoke.request.is_some()
                && op.returned().is_some_and(|returned| returned <= healed)
        });
        let target = acknowledged.filter_map(|op| op.rev()).max().unwrap_or(0);
        let ends = history.events.last().map_or(0, |event| event.time);
        let mut violations = Vec::new();
        let (mut judged, mut undecided, mut slowest) = (0u64, 0u64, 0u64);
        for (watcher, reached) in &self.reached {
            let reads_on = reached.last().is_some_and(|last| last.time > healed);
            if self.slow.get(watcher) == Some(&true) || !reads_on {
                continue;
            }
            let filter = self.filter_of(watcher);
            let wanted = last_match(book, target, &filter);
            let got = reached
                .iter()
                .find(|got| wanted.is_none_or(|wanted| got.at >= wanted));
            match got {
                Some(got) if got.time <= due => {
                    judged += 1;
                    slowest = slowest.max(got.time.saturating_sub(healed));
                }
                None if ends < due => undecided += 1,
                _ => {
                    let at = reached.iter().take_while(|got| got.time <= due).last();
                    let what = format!(
                        "watcher {watcher} had not seen row {} {bound_ms} ms after the faults had ended; it was at {}",
                        wanted.map_or(String::new(), show),
                        at.map_or("its begin".into(), |got| show(got.at))
                    );
                    violations.push(Violation {
                        what,
                        time: due,
                        events: self.last_event(watcher).into_iter().collect(),
                    });
                }
            }
        }
        let check = if judged == 0 && violations.is_empty() {
            Check::unknown(
                name,
                format!("no watcher read on after the faults had ended ({undecided} were cut short)"),
            )
        } else {
            Check::of(name, violations)
        };
        check
            .fact("watchers", judged)
            .fact("undecided", undecided)
            .fact("bound_ms", bound_ms)
            .fact("slowest_ms", slowest / 1_000_000)
    }

    fn filter_of(&self, watcher: &str) -> Filter {
        let stream = self
            .streams
            .values()
            .find(|stream| stream.watcher == watcher && !stream.slow);
        stream.map(|stream| stream.filter.clone()).unwrap_or_default()
    }

    fn last_event(&self, watcher: &str) -> Option<u64> {
        let mine = self.streams.values().filter(|stream| stream.watcher == watcher);
        mine.filter_map(|stream| stream.last.events().last().copied())
            .max()
    }
}

/// The cursor right before one.
fn before(cursor: Cursor) -> Cursor {
    match cursor.1.checked_sub(1) {
        Some(ordinal) => (cursor.0, ordinal),
        None => (cursor.0.saturating_sub(1), u32::MAX),
    }
}

/// The first matching row after one cursor and before another.
fn first_match(book: &Book<'_>, after: Cursor, until: Cursor, filter: &Filter) -> Option<Cursor> {
    if after >= until {
        return None;
    }
    let mut between = book.rows.range((Bound::Excluded(after), Bound::Excluded(until)));
    let found = between.find(|(_, seen)| filter.takes(&seen.row.action, &seen.row.subject));
    found.map(|(cursor, _)| *cursor)
}

/// The last matching row of the entries up to a log index.
fn last_match(book: &Book<'_>, index: u64, filter: &Filter) -> Option<Cursor> {
    let mut rows = book.rows.range(..=(index, u32::MAX));
    let found = rows.rfind(|(_, seen)| filter.takes(&seen.row.action, &seen.row.subject));
    found.map(|(cursor, _)| *cursor)
}
