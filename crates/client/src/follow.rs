//! The journal as a feed that survives the replica it is read from.
//!
//! What never lives here: checking the hash chain (the server does), and printing.
//! Invariants: a row is delivered once and in order, over all replicas: the cursor of the last one is where
//! the next stream begins; rows that were trimmed meanwhile are told as a gap, never passed over in silence.

use std::collections::VecDeque;
use std::time::Duration;

use palyra_proto::common::v1::ReadInfo;
use palyra_proto::journal::v1::{Cursor, Row, TailRequest, TailResponse};
use tokio::time::{Instant, sleep, timeout};
use tonic::Streaming;

use crate::client::Client;
use crate::error::{Class, E_UNREACHABLE, Error, Failure, classify};
use crate::ids::below;
use crate::services::journal;

/// The longest pause between two tries to find a replica.
const PAUSE_MAX_MS: u64 = 1_000;
/// How long the opening of a stream may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(6);

/// What happened on a feed.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Rows, oldest first; never empty.
    Rows(Vec<Row>),
    /// Rows before this cursor were trimmed; some were missed.
    Gap(Cursor),
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
    client: Client,
    request: TailRequest,
    stream: Option<(String, Streaming<TailResponse>)>,
    /// Where the last stream ended, and why.
    lost: Option<(String, String)>,
    ready: VecDeque<Step>,
    patience: Option<Duration>,
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
            client: self.clone(),
            request,
            stream: None,
            lost: None,
            ready,
            patience,
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
            if self.stream.is_none() {
                self.open().await?;
                continue;
            }
            let Some((endpoint, stream)) = &mut self.stream else {
                continue;
            };
            match stream.message().await {
                Ok(Some(answer)) => self.take(answer),
                Ok(None) if self.request.follow => {
                    let endpoint = endpoint.clone();
                    self.lose(endpoint, "the replica ended the stream".to_owned())
                        .await;
                }
                Ok(None) => self.ended = true,
                Err(status) => match classify(&status) {
                    Failure::Answered(error) if !error.retryable => return Err(error),
                    Failure::Answered(error) => {
                        let endpoint = endpoint.clone();
                        self.lose(endpoint, error.message).await;
                    }
                    Failure::Lost { cause, .. } => {
                        let endpoint = endpoint.clone();
                        self.lose(endpoint, cause).await;
                    }
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
            self.ready.push_back(Step::Rows(rows));
        }
    }

    async fn lose(&mut self, endpoint: String, cause: String) {
        self.stream = None;
        self.client.pool().forget(&endpoint).await;
        self.lost = Some((endpoint, cause));
    }

    async fn open(&mut self) -> Result<(), Error> {
        let since = Instant::now();
        let mut pause = 50;
        loop {
            let error = match self.try_open().await {
                Ok((endpoint, stream)) => {
                    if let Some((_, cause)) = self.lost.take() {
                        self.ready.push_back(Step::Moved {
                            endpoint: endpoint.clone(),
                            cause,
                        });
                    }
                    self.stream = Some((endpoint, stream));
                    return Ok(());
                }
                Err(error) => error,
            };
            let impatient = self.patience.is_some_and(|patience| since.elapsed() >= patience);
            if !error.retryable || impatient {
                return Err(error);
            }
            sleep(Duration::from_millis(1 + below(pause))).await;
            pause = (pause * 2).min(PAUSE_MAX_MS);
        }
    }

    async fn try_open(&mut self) -> Result<(String, Streaming<TailResponse>), Error> {
        let avoid = self.lost.as_ref().map(|(endpoint, _)| endpoint.clone());
        let reached = self.client.pool().reach(avoid.as_deref()).await?;
        let opened = timeout(OPEN_TIMEOUT, journal(reached.channel).tail(self.request.clone())).await;
        let cause = match opened {
            Ok(Ok(response)) => return Ok((reached.address, response.into_inner())),
            Ok(Err(status)) => match classify(&status) {
                Failure::Answered(error) => {
                    self.lost = Some((reached.address, error.message.clone()));
                    return Err(error);
                }
                Failure::Lost { cause, refused: true } => {
                    return Err(Error::new(
                        Class::Denied,
                        crate::error::E_CERTIFICATE_REFUSED,
                        cause,
                    ));
                }
                Failure::Lost {
                    cause,
                    refused: false,
                } => cause,
            },
            Err(_) => "no answer in time".to_owned(),
        };
        self.lose(reached.address.clone(), cause.clone()).await;
        let mut error = Error::new(
            Class::Unreachable,
            E_UNREACHABLE,
            format!("{}: {cause}", reached.address),
        );
        error.retryable = true;
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::{ConnectOptions, enrol_recording};
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
