//! The journal: read, followed, verified.
//!
//! Invariant: a follower that is too slow for the trimming is told what it missed, never silently skipped
//! ahead.

use std::collections::VecDeque;
use std::fmt;

use palyra_replica::FeedItem;
use palyra_state::journal::{self, Broken, Cursor, Row, Summary};

use crate::control::{Control, ReadInfo, ReadOptions};
use crate::error::Error;
use crate::limits::{NEWEST_ROWS, TAIL_ROWS};

/// What to read.
#[derive(Debug, Clone, Default)]
pub struct TailOptions {
    /// After this row; none: from the first row held, or the last ones.
    pub after: Option<Cursor>,
    /// Stay, and go on as rows come.
    pub follow: bool,
    /// Without `after`, only the newest rows, as many as this but at most [`NEWEST_ROWS`]; 0: all.
    pub last: u32,
    /// Only actions that begin so; empty: all.
    pub action_prefix: String,
    /// Only of this subject; empty: all.
    pub subject: String,
    /// How fresh the beginning must be.
    pub read: ReadOptions,
}

/// A part of the journal.
#[derive(Debug, Clone, PartialEq)]
pub struct TailPart {
    /// Rows in order.
    pub rows: Vec<Row>,
    /// Rows before this one were trimmed, and the reader has missed some.
    pub gap_first: Option<Cursor>,
    /// How fresh it is.
    pub read: ReadInfo,
}

/// A reader of the journal.
pub struct Tail {
    control: Control,
    options: TailOptions,
    at: Cursor,
    newest: VecDeque<Row>,
    feed: Option<palyra_replica::Feed>,
}

/// What verification found.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// What was looked at, when the chain is intact.
    pub outcome: Result<Summary, Broken>,
    /// How fresh it is.
    pub read: ReadInfo,
}

impl Control {
    /// Opens a reader.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn tail(&self, options: TailOptions) -> Result<Tail, Error> {
        let (view, _) = self.read(options.read).await?;
        let mut newest = VecDeque::new();
        let at = match options.after {
            Some(after) => after,
            None if options.last > 0 => {
                let rows = journal::last_rows(&view, (options.last as usize).min(NEWEST_ROWS));
                let end = rows
                    .last()
                    .map_or_else(|| journal::before_first(&view), Row::cursor);
                newest.extend(rows);
                end
            }
            None => journal::before_first(&view),
        };
        Ok(Tail {
            control: self.clone(),
            options,
            at,
            newest,
            feed: None,
        })
    }

    /// Recomputes the chain over what this replica holds, and compares it with the chain's head in the state.
    ///
    /// # Errors
    /// What a read can say.
    pub async fn verify_journal(&self, read: ReadOptions) -> Result<Verified, Error> {
        let (view, info) = self.read(read).await?;
        // Hashing 200,000 rows takes a good part of a second.
        let outcome = palyra_platform::blocking(move || journal::verify_all(&view)).await;
        Ok(Verified { outcome, read: info })
    }
}

impl fmt::Debug for Tail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tail(after {}.{})", self.at.index, self.at.ordinal)
    }
}

impl Tail {
    /// The next part; `None` at the end, which a following reader never reaches before this replica stops.
    pub async fn next(&mut self) -> Option<TailPart> {
        if !self.newest.is_empty() {
            let rows = self.newest.drain(..self.newest.len().min(TAIL_ROWS)).collect();
            return Some(self.part(rows, None));
        }
        loop {
            let view = self.control.replica().view();
            match journal::rows_after(&view, self.at, TAIL_ROWS) {
                journal::Rows::Gap { first } => {
                    self.at = journal::before_first(&view);
                    return Some(self.part(Vec::new(), Some(first)));
                }
                journal::Rows::Rows(rows) if !rows.is_empty() => {
                    self.at = rows.last().map_or(self.at, Row::cursor);
                    let part = self.part(rows, None);
                    if !part.rows.is_empty() {
                        return Some(part);
                    }
                }
                journal::Rows::Rows(_) if !self.options.follow => return None,
                journal::Rows::Rows(_) => self.wait_for_more().await?,
            }
        }
    }

    /// Waits until something follows; `None` when this replica stops.
    async fn wait_for_more(&mut self) -> Option<()> {
        let at = self.at;
        let feed = self.feed.get_or_insert_with(|| self.control.replica().feed(at));
        let mut stopping = self.control.stopping();
        tokio::select! {
            biased;
            _ = stopping.wait_for(|stop| *stop) => None,
            // The rows themselves are read from a view, so that both kinds of reading filter alike.
            item = feed.next() => {
                if let FeedItem::Gap { .. } = item? {
                    self.feed = None;
                }
                Some(())
            }
        }
    }

    fn part(&self, mut rows: Vec<Row>, gap_first: Option<Cursor>) -> TailPart {
        let options = &self.options;
        rows.retain(|row| {
            row.action.starts_with(&options.action_prefix)
                && (options.subject.is_empty() || row.subject == options.subject)
        });
        TailPart {
            rows,
            gap_first,
            read: self.control.read_info(self.at.index),
        }
    }
}
