//! Who reads the feed from this replica, and who of them has something to read.
//!
//! What never lives here: rows. A reader holds a seat; the follower of the feed looks at each row once and notes in
//! the seats that it concerns where that row is, so that ten thousand readers that wait cost nothing until something
//! happens that is theirs, and a reader whose rows are rare never looks through those of others. Invariants: a seat is
//! entered before its reader first looks at the state, so that a row is either seen then or noted; what is held for a
//! reader is one cursor; a seat that was handed something and does not come back for more is closed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_state::journal::audience::{Concerns, concerns};
use palyra_state::{Cursor, Id, Row};
use tokio::sync::Notify;

use crate::error::Error;

/// What a reader wants to see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    /// Actions that begin so.
    pub(crate) action_prefix: String,
    /// Rows of this subject; empty: of any.
    pub(crate) subject: String,
    /// Rows about this device and its dispatches.
    pub(crate) device: Option<Id>,
}

impl Filter {
    pub(crate) fn wants(&self, row: &Row) -> bool {
        let about = |id: Id| {
            let id = id.to_string();
            row.subject == id || row.detail("device") == id
        };
        row.action.starts_with(&self.action_prefix)
            && (self.subject.is_empty() || row.subject == self.subject)
            && self.device.is_none_or(about)
    }
}

/// One reader's place.
#[derive(Debug)]
pub(crate) struct Seat {
    key: u64,
    identity: String,
    /// The node that reads; none: an operator.
    node: Option<Id>,
    filter: Filter,
    /// The connection that carries the stream; 0 when it is not known.
    connection: u64,
    /// Rows after this cursor may concern the reader.
    waiting: Mutex<Option<Cursor>>,
    /// When it was handed something and did not ask again since.
    handed: Mutex<Option<Instant>>,
    stalled: AtomicBool,
    woken: Notify,
}

impl Seat {
    /// A row that concerns the reader follows `before`.
    fn flag(&self, before: Cursor) {
        lock(&self.waiting).get_or_insert(before);
        self.woken.notify_one();
    }

    /// Resolves after a row was noted, or the reader should look around for another reason.
    pub(crate) async fn woken(&self) {
        self.woken.notified().await;
    }

    /// Something was handed to the reader.
    pub(crate) fn handed(&self) {
        *lock(&self.handed) = Some(platform::now());
    }

    /// The reader asks for more.
    pub(crate) fn asks(&self) {
        *lock(&self.handed) = None;
    }

    /// Whether the reader let too much time pass.
    pub(crate) fn has_stalled(&self) -> bool {
        self.stalled.load(Ordering::Acquire)
    }

    fn handed_for(&self) -> Option<Duration> {
        lock(&self.handed).map(|at| at.elapsed())
    }
}

#[derive(Debug, Default)]
struct Inside {
    seats: BTreeMap<u64, Arc<Seat>>,
    of_node: BTreeMap<Id, BTreeSet<u64>>,
    operators: BTreeSet<u64>,
    of_identity: BTreeMap<String, usize>,
    /// The last row that was looked at.
    at: Cursor,
    next: u64,
}

impl Inside {
    fn flag(&self, keys: impl IntoIterator<Item = u64>, row: &Row, before: Cursor) {
        for key in keys {
            if let Some(seat) = self.seats.get(&key)
                && seat.filter.wants(row)
            {
                seat.flag(before);
            }
        }
    }
}

/// All seats.
#[derive(Debug)]
pub(crate) struct Readers {
    inside: Mutex<Inside>,
    limit: usize,
    per_identity: usize,
}

/// A seat for as long as it is held.
#[derive(Debug)]
pub(crate) struct Seated {
    pub(crate) seat: Arc<Seat>,
    readers: Arc<Readers>,
}

impl Drop for Seated {
    fn drop(&mut self) {
        self.readers.leave(&self.seat);
    }
}

impl Readers {
    pub(crate) fn new(limit: usize, per_identity: usize) -> Arc<Readers> {
        Arc::new(Readers {
            inside: Mutex::default(),
            limit,
            per_identity,
        })
    }

    /// The follower of the feed begins behind everything of this index.
    pub(crate) fn begin(&self, index: u64) {
        let ordinal = u32::MAX;
        lock(&self.inside).at = Cursor { index, ordinal };
    }

    /// Takes a seat.
    ///
    /// # Errors
    /// [`Error::Busy`] when this identity or all together have too many.
    pub(crate) fn enter(
        self: &Arc<Self>,
        identity: String,
        node: Option<Id>,
        filter: Filter,
        connection: u64,
    ) -> Result<Seated, Error> {
        let mut inside = lock(&self.inside);
        if inside.seats.len() >= self.limit {
            let what = "readers of the feed";
            return Err(Error::Busy { what });
        }
        if inside.of_identity.get(&identity).copied().unwrap_or_default() >= self.per_identity {
            let what = "readers of the feed under this identity";
            return Err(Error::Busy { what });
        }
        inside.next += 1;
        let seat = Arc::new(Seat {
            key: inside.next,
            identity,
            node,
            filter,
            connection,
            waiting: Mutex::default(),
            handed: Mutex::default(),
            stalled: AtomicBool::new(false),
            woken: Notify::new(),
        });
        match node {
            Some(id) => inside.of_node.entry(id).or_default().insert(seat.key),
            None => inside.operators.insert(seat.key),
        };
        *inside.of_identity.entry(seat.identity.clone()).or_default() += 1;
        inside.seats.insert(seat.key, Arc::clone(&seat));
        Ok(Seated {
            seat,
            readers: Arc::clone(self),
        })
    }

    fn leave(&self, seat: &Seat) {
        let mut inside = lock(&self.inside);
        inside.seats.remove(&seat.key);
        inside.operators.remove(&seat.key);
        if let Some(id) = seat.node
            && let Some(keys) = inside.of_node.get_mut(&id)
        {
            keys.remove(&seat.key);
            if keys.is_empty() {
                inside.of_node.remove(&id);
            }
        }
        if let Some(count) = inside.of_identity.get_mut(&seat.identity) {
            *count -= 1;
            if *count == 0 {
                inside.of_identity.remove(&seat.identity);
            }
        }
    }

    /// The next rows of the feed: notes them where they are wanted.
    pub(crate) fn publish(&self, rows: &[Row]) {
        let mut inside = lock(&self.inside);
        for row in rows {
            let before = inside.at;
            inside.at = before.max(row.cursor());
            if inside.seats.is_empty() {
                continue;
            }
            match concerns(row) {
                Concerns::Nobody => {}
                Concerns::Node(id) => {
                    let keys = inside.of_node.get(&id).into_iter().flatten().copied();
                    inside.flag(keys, row, before);
                }
                Concerns::All => inside.flag(inside.of_node.values().flatten().copied(), row, before),
            }
            inside.flag(inside.operators.iter().copied(), row, before);
        }
    }

    /// Rows were trimmed before they were looked at: every reader looks for itself.
    pub(crate) fn publish_gap(&self, index: u64) {
        let mut inside = lock(&self.inside);
        let ordinal = u32::MAX;
        inside.at = inside.at.max(Cursor { index, ordinal });
        for seat in inside.seats.values() {
            *lock(&seat.waiting) = Some(Cursor::default());
            seat.woken.notify_one();
        }
    }

    /// Where a reader goes on: after the first, when something waits for it; otherwise nothing up to the second
    /// concerns it.
    pub(crate) fn take(&self, seat: &Seat) -> (Option<Cursor>, Cursor) {
        let inside = lock(&self.inside);
        (lock(&seat.waiting).take(), inside.at)
    }

    /// Has every reader look whether it may still read here.
    pub(crate) fn wake_all(&self) {
        for seat in lock(&self.inside).seats.values() {
            seat.woken.notify_one();
        }
    }

    /// Has the readers of one identity look whether they may still read.
    pub(crate) fn wake(&self, identity: &str) {
        for seat in lock(&self.inside).seats.values() {
            if seat.identity == identity {
                seat.woken.notify_one();
            }
        }
    }

    /// Closes the seats of readers that were handed something longer than `patience` ago and did not come back;
    /// answers the connections of those that have not even noticed that in as much time again.
    pub(crate) fn reap(&self, patience: Duration) -> Vec<u64> {
        let inside = lock(&self.inside);
        let mut hopeless = Vec::new();
        for seat in inside.seats.values() {
            let Some(since) = seat.handed_for().filter(|since| *since > patience) else {
                continue;
            };
            if !seat.stalled.swap(true, Ordering::AcqRel) {
                tracing::info!(reader = seat.identity, "a reader of the feed does not read");
            }
            if since > patience * 2 && seat.connection != 0 {
                hopeless.push(seat.connection);
            }
        }
        hopeless
    }

    pub(crate) fn count(&self) -> usize {
        lock(&self.inside).seats.len()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that runs under these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(index: u64, action: &str, subject: &str) -> Row {
        Row {
            index,
            action: action.to_owned(),
            subject: subject.to_owned(),
            ..Row::default()
        }
    }

    fn at(index: u64) -> Cursor {
        Cursor { index, ordinal: 0 }
    }

    #[test]
    fn only_whom_a_row_concerns_is_woken_and_told_where_it_is() {
        let readers = Readers::new(8, 8);
        let (own, other) = (Id::from_bytes([1; 16]), Id::from_bytes([2; 16]));
        let node = |id: Id| {
            readers
                .enter(id.to_string(), Some(id), Filter::default(), 0)
                .unwrap()
        };
        let (mine, theirs) = (node(own), node(other));
        let filter = Filter {
            action_prefix: "dispatch.".to_owned(),
            ..Filter::default()
        };
        let operator = readers.enter("anna".to_owned(), None, filter, 0).unwrap();
        readers.publish(&[
            row(1, "access.role_changed", "bob"),
            row(2, "node.attached", &own.to_string()),
            row(3, "node.detached", &own.to_string()),
        ]);
        assert_eq!(
            readers.take(&mine.seat),
            (Some(at(1)), at(3)),
            "the first of two, and what lies before it is passed over"
        );
        assert_eq!(readers.take(&mine.seat), (None, at(3)));
        assert_eq!(readers.take(&theirs.seat), (None, at(3)));
        assert_eq!(readers.take(&operator.seat), (None, at(3)));
        readers.publish(&[row(4, "cluster.replica_removed", "2")]);
        assert_eq!(readers.take(&theirs.seat).0, Some(at(3)), "everybody's business");
        readers.publish_gap(9);
        assert_eq!(readers.take(&operator.seat).0, Some(Cursor::default()));
    }

    #[test]
    fn seats_are_bounded_and_given_back() {
        let readers = Readers::new(2, 1);
        let enter = |name: &str| readers.enter(name.to_owned(), None, Filter::default(), 0);
        let first = enter("anna").unwrap();
        assert!(enter("anna").is_err(), "one for each");
        let _second = enter("bob").unwrap();
        assert!(enter("carl").is_err(), "two in all");
        drop(first);
        assert!(enter("anna").is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_does_not_come_back_is_closed_and_then_cut_off() {
        let readers = Readers::new(2, 2);
        let patience = Duration::from_secs(30);
        let slow = readers
            .enter("slow".to_owned(), None, Filter::default(), 7)
            .unwrap();
        let quick = readers
            .enter("quick".to_owned(), None, Filter::default(), 8)
            .unwrap();
        slow.seat.handed();
        quick.seat.handed();
        quick.seat.asks();
        platform::sleep(patience + Duration::from_secs(1)).await;
        assert!(readers.reap(patience).is_empty());
        assert!(slow.seat.has_stalled() && !quick.seat.has_stalled());
        platform::sleep(patience).await;
        assert_eq!(readers.reap(patience), [7]);
    }
}
