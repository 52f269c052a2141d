//! What a session keeps of the worker behind it, in memory: whether it was reconciled, what it was told, and
//! whose turn it is.
//!
//! Lost with the session, which delays and never breaks: all of it follows from the state. Invariants: nothing
//! is offered before the worker was reconciled in this session; an offer and an end are told once in a session;
//! of what a worker says about one lease, one message is committed at a time, in the order in which it came.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use palyra_state::Id;
use tokio::sync::oneshot;

use super::care::Why;

/// Pieces of files that wait for one session's reader.
const CHUNKS: usize = 8;

/// The seat of a worker in its session.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    inside: Mutex<Inside>,
    /// Held while a challenge is opened.
    pub(crate) opening: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
pub(crate) struct Inside {
    /// The worker has reported, and was told what the ledger has.
    pub(crate) reconciled: bool,
    /// Leases that were offered and are not taken yet.
    pub(crate) offered: BTreeSet<Id>,
    /// Leases that it was told to end, as long as the state names them.
    pub(crate) told: BTreeSet<Id>,
    /// When a challenge was shown over which nothing was said yet.
    pub(crate) shown: Option<u64>,
    /// A challenge is being opened.
    pub(crate) asking: bool,
    /// What it was asked to attest for.
    pub(crate) asked: BTreeSet<(Why, u64)>,
    /// Since when its statement is good, and until when.
    pub(crate) statement: Option<(u64, u64)>,
    /// The request of an operator for a cleanup that it was told of.
    pub(crate) cleanup: u64,
    lines: BTreeMap<Id, oneshot::Receiver<()>>,
    chunks: usize,
}

/// A place in a line. The next in it moves up when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    _mine: oneshot::Sender<()>,
}

impl Turn {
    /// Waits until those before are done.
    pub(crate) async fn comes(&mut self) {
        if let Some(before) = self.before.take() {
            // They say nothing; they go.
            let _ = before.await;
        }
    }
}

impl Seat {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place in the line for one thing.
    pub(crate) fn queue(&self, what: Id) -> Turn {
        let (mine, next) = oneshot::channel();
        let mut inside = self.lock();
        let waits = |line: &mut oneshot::Receiver<()>| {
            matches!(line.try_recv(), Err(oneshot::error::TryRecvError::Empty))
        };
        inside.lines.retain(|_, line| waits(line));
        let before = inside.lines.insert(what, next);
        Turn { before, _mine: mine }
    }

    /// Whether one more piece of a file may wait for the reader.
    pub(crate) fn begin_chunk(&self) -> bool {
        let mut inside = self.lock();
        let fits = inside.chunks < CHUNKS;
        inside.chunks += usize::from(fits);
        fits
    }

    /// The reader has come for one.
    pub(crate) fn end_chunk(&self) {
        let mut inside = self.lock();
        inside.chunks = inside.chunks.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[test]
    fn one_message_of_a_lease_is_worked_on_at_a_time_in_order() {
        let seat = Seat::default();
        let other = Id::from_bytes([1; 16]);
        let mut first = seat.queue(Id::ZERO);
        let mut second = seat.queue(Id::ZERO);
        let mut third = seat.queue(Id::ZERO);
        let mut elsewhere = seat.queue(other);
        assert!(first.comes().now_or_never().is_some());
        assert!(
            elsewhere.comes().now_or_never().is_some(),
            "another lease does not wait"
        );
        assert!(
            third
                .before
                .as_mut()
                .is_some_and(|line| line.now_or_never().is_none())
        );
        drop(first);
        assert!(second.comes().now_or_never().is_some());
        drop(second);
        assert!(third.comes().now_or_never().is_some());
        drop((third, elsewhere));
        drop(seat.queue(other));
        assert_eq!(seat.lock().lines.len(), 1, "nothing is left behind but the last");
    }

    #[test]
    fn few_pieces_of_files_wait_for_a_reader() {
        let seat = Seat::default();
        assert!((0..CHUNKS).all(|_| seat.begin_chunk()));
        assert!(!seat.begin_chunk());
        seat.end_chunk();
        assert!(seat.begin_chunk());
    }
}
