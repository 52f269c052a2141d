//! The journal, read to its end over several replicas. What goes on for ever is [`crate::Events`].
//!
//! What never lives here: checking the hash chain (the server does), and printing.
//! Invariants: a row is delivered once and in order, over all replicas: the cursor of the last one is where
//! the next stream begins; rows that were trimmed meanwhile are told as a gap, never passed over in silence;
//! what is held is one message, so that a slow reader costs no memory.

use std::collections::VecDeque;
use std::time::Duration;

use palyra_proto::common::v1::ReadInfo;
use palyra_proto::journal::v1::{Cursor, Row, TailRequest, TailResponse};
use tokio::time::timeout;

use crate::client::Client;
use crate::error::{Error, Failure, classify};
use crate::road::{Open, Road, Tried};
use crate::services::journal;

/// What happened on a feed.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Rows, oldest first; never empty.
    Rows(Vec<Row>),
    /// Rows before this cursor were trimmed; some were missed.
    Gap(Cursor),
    /// No replica lets the feed go on now; it keeps trying. Told once for each outage.
    Lost {
        /// Why.
        cause: String,
    },
    /// The feed goes on at another connection.
    Moved {
        /// `host:port` that it is read from now.
        endpoint: String,
        /// Why the former one ended.
        cause: String,
    },
    /// The server has no more rows, and none are awaited.
    End,
}

/// A feed of journal rows.
#[derive(Debug)]
pub struct Follow {
    road: Road,
    request: TailRequest,
    stream: Option<Box<Open<TailResponse>>>,
    ready: VecDeque<Step>,
    ended: bool,
    read: Option<ReadInfo>,
}

/// Whether the first cursor is behind the second.
fn before(first: &Cursor, second: &Cursor) -> bool {
    (first.index, first.ordinal) < (second.index, second.ordinal)
}

impl Client {
    /// The journal from where `request` says. With `follow` it goes on until `patience` passes without any
    /// replica being reachable; without `patience`, for ever.
    #[must_use]
    pub fn follow(&self, request: TailRequest, patience: Option<Duration>) -> Follow {
        let request = TailRequest {
            read: Some(self.read_options()),
            ..request
        };
        let ready = VecDeque::new();
        Follow {
            road: Road::new(self.clone(), patience),
            request,
            stream: None,
            ready,
            ended: false,
            read: None,
        }
    }
}

impl Follow {
    /// The next step. Safe to drop and call again.
    ///
    /// # Errors
    /// A refusal, or [`Class::Unreachable`] when patience ended.
    pub async fn next(&mut self) -> Result<Step, Error> {
        loop {
            if let Some(step) = self.ready.pop_front() {
                return Ok(step);
            }
            if self.ended {
                return Ok(Step::End);
            }
            let Some(open) = &mut self.stream else {
                self.open().await?;
                continue;
            };
            // A feed that follows may be quiet for hours, and a dead connection is found by its pings. One that
            // ends has to come to its end.
            let patience = self.road.patience().filter(|_| !self.request.follow);
            let message = match patience {
                Some(patience) => timeout(patience, open.stream.message()).await,
                None => Ok(open.stream.message().await),
            };
            match message {
                Ok(Ok(Some(answer))) => self.take(answer),
                Ok(Ok(None)) if !self.request.follow => self.ended = true,
                Ok(Ok(None)) => self.lose("the replica ended the stream".to_owned()).await,
                Err(_) => self.lose("no answer in time".to_owned()).await,
                Ok(Err(status)) => match classify(&status) {
                    Failure::Answered(error) if !error.retryable => return Err(error),
                    Failure::Answered(error) => self.lose(error.message).await,
                    Failure::Lost { cause, .. } => self.lose(cause).await,
                },
            }
        }
    }

    /// The cursor after which the feed goes on; nothing before the first row.
    #[must_use]
    pub fn cursor(&self) -> Option<Cursor> {
        self.request.after
    }

    /// Where and when the last answer was true; nothing before the first.
    #[must_use]
    pub fn read(&self) -> Option<ReadInfo> {
        self.read
    }

    fn take(&mut self, answer: TailResponse) {
        self.read = answer.read.or(self.read);
        if let Some(first) = answer.gap_first {
            self.ready.push_back(Step::Gap(first));
        }
        let after = self.request.after;
        let mut rows = answer.rows;
        // A replica that was asked again may begin a little early; what was delivered is dropped.
        rows.retain(|row| match (&after, &row.cursor) {
            (Some(after), Some(cursor)) => before(after, cursor),
            _ => true,
        });
        if let Some(cursor) = rows.last().and_then(|row| row.cursor) {
            self.request.after = Some(cursor);
            self.request.last = 0;
        }
        if !rows.is_empty() {
            self.road.went_well();
            self.ready.push_back(Step::Rows(rows));
        }
    }

    /// The stream is over, but not the feed.
    async fn lose(&mut self, cause: String) {
        if let Some(open) = self.stream.take() {
            self.road.lose(open, cause).await;
        }
    }

    /// One try to go on somewhere.
    async fn open(&mut self) -> Result<(), Error> {
        let request = self.request.clone();
        let tried = self
            .road
            .open(|channel| async move { journal(channel).tail(request).await })
            .await?;
        match tried {
            Tried::Open { open, cause } => {
                if let Some(cause) = cause {
                    let endpoint = open.endpoint.clone();
                    self.ready.push_back(Step::Moved { endpoint, cause });
                }
                self.stream = Some(open);
            }
            Tried::Lost { cause } => self.ready.push_back(Step::Lost { cause }),
            Tried::Again => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::{ConnectOptions, enrol_recording};
    use crate::error::Class;
    use crate::pool::{Endpoints, Pool};
    use palyra_pki::tls::SeenServer;

    fn follow(request: TailRequest) -> Follow {
        let tls = enrol_recording(SeenServer::new()).unwrap();
        let pool = Pool::new(
            &Endpoints::parse("127.0.0.1:1").unwrap(),
            tls,
            ConnectOptions::default(),
        );
        Client::over(pool).follow(request, Some(Duration::ZERO))
    }

    fn row(index: u64, ordinal: u32) -> Row {
        Row {
            cursor: Some(Cursor { index, ordinal }),
            ..Row::default()
        }
    }

    #[tokio::test]
    async fn rows_come_once_and_move_the_cursor() {
        let mut feed = follow(TailRequest {
            follow: true,
            last: 5,
            ..TailRequest::default()
        });
        feed.take(TailResponse {
            rows: vec![row(3, 0), row(3, 1)],
            ..TailResponse::default()
        });
        assert_eq!(feed.cursor(), Some(Cursor { index: 3, ordinal: 1 }));
        assert_eq!(feed.request.last, 0, "`last` counts only until there is a cursor");
        feed.take(TailResponse {
            rows: vec![row(3, 1)],
            ..TailResponse::default()
        });
        feed.take(TailResponse {
            rows: vec![row(3, 1), row(4, 0)],
            ..TailResponse::default()
        });
        assert_eq!(feed.next().await.unwrap(), Step::Rows(vec![row(3, 0), row(3, 1)]));
        assert_eq!(feed.next().await.unwrap(), Step::Rows(vec![row(4, 0)]));
    }

    #[tokio::test]
    async fn a_gap_is_told_before_the_rows_behind_it() {
        let mut feed = follow(TailRequest {
            follow: true,
            ..TailRequest::default()
        });
        let first = Cursor { index: 9, ordinal: 0 };
        feed.take(TailResponse {
            rows: vec![row(9, 0)],
            gap_first: Some(first),
            ..TailResponse::default()
        });
        assert_eq!(feed.next().await.unwrap(), Step::Gap(first));
        assert!(matches!(feed.next().await.unwrap(), Step::Rows(_)));
    }

    #[tokio::test]
    async fn patience_ends() {
        let error = follow(TailRequest::default()).next().await.unwrap_err();
        assert_eq!(error.class, Class::Unreachable);
    }
}
