//! Following the journal: a cursor and a watch on the applied index, nothing else.
//!
//! Every follower reads the journal that the state holds, so it sees the same rows in the same order on every
//! replica, and misses nothing by coming late. Rows that were trimmed meanwhile are announced as a gap, never
//! passed over.

use palyra_state::journal::{self, Rows};
use palyra_state::{Cursor, Row};
use palyra_storage::Engine;
use std::sync::Arc;
use tokio::sync::watch;

use crate::view::View;

/// Rows handed over at a time.
const PAGE: usize = 256;

/// What a follower of the journal gets.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedItem {
    /// The next rows, in order; at least one.
    Rows(Vec<Row>),
    /// Rows after the follower's cursor were trimmed. The feed goes on with the first row that is held.
    Gap {
        /// That row.
        first: Cursor,
    },
}

/// A follower of the journal.
pub struct Feed {
    engine: Arc<dyn Engine>,
    applied: watch::Receiver<u64>,
    cursor: Cursor,
}

impl Feed {
    pub(crate) fn new(engine: Arc<dyn Engine>, applied: watch::Receiver<u64>, after: Cursor) -> Feed {
        Feed {
            engine,
            applied,
            cursor: after,
        }
    }

    /// The last row that was handed over.
    #[must_use]
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next item; waits until there is one. `None` once the replica is gone. Cancel safe.
    pub async fn next(&mut self) -> Option<FeedItem> {
        loop {
            // Marked as seen before reading: what is applied meanwhile wakes the next wait.
            self.applied.borrow_and_update();
            if let Some(item) = self.read() {
                return Some(item);
            }
            self.applied.changed().await.ok()?;
        }
    }

    /// The next item if there is one now.
    pub fn try_next(&mut self) -> Option<FeedItem> {
        self.read()
    }

    fn read(&mut self) -> Option<FeedItem> {
        let view = View::pin(&*self.engine);
        match journal::rows_after(&view, self.cursor, PAGE) {
            Rows::Rows(rows) => {
                self.cursor = rows.last()?.cursor();
                Some(FeedItem::Rows(rows))
            }
            Rows::Gap { first } => {
                self.cursor = journal::before_first(&view);
                Some(FeedItem::Gap { first })
            }
        }
    }
}
