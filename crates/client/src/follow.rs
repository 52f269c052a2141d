//! The journal as a feed that survives the replica it is read from.
//!
//! What never lives here: checking the hash chain (the server does), and printing.
//! Invariants: a row is delivered once and in order, over all replicas: the cursor of the last one is where
//! the next stream begins; rows that were trimmed meanwhile are told as a gap, never passed over in silence;
//! what is held is one message, so that a slow reader costs no memory.

use std::collections::VecDeque;
use std::time::Duration;

use palyra_proto::common::v1::ReadInfo;
use palyra_proto::journal::v1::{Cursor, Row, TailRequest, TailResponse};
use tokio::time::{Instant, sleep_until, timeout};
use tonic::Streaming;

use crate::client::Client;
use crate::error::{Class, E_CERTIFICATE_REFUSED, E_NO_ANSWER, E_UNREACHABLE, Error, Failure, classify};
use crate::ids::below;
use crate::services::journal;

/// The longest pause between two tries to find a replica.
const PAUSE_MAX_MS: u64 = 1_000;
/// The longest first pause.
const PAUSE_MIN_MS: u64 = 50;
/// How long the opening of a stream may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(6);
/// A stream that lived so long was a good one, also when it had nothing to tell: what follows its end is not
/// a string of failures.
const SETTLED: Duration = Duration::from_secs(1);

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
    client: Client,
    request: TailRequest,
    stream: Option<Open>,
    /// Where the last stream ended, and why.
    lost: Option<(String, String)>,
    ready: VecDeque<Step>,
    patience: Option<Duration>,
    ended: bool,
    read: Option<ReadInfo>,
    outage: Outage,
}

#[derive(Debug)]
struct Open {
    endpoint: String,
    stream: Streaming<TailResponse>,
    since: Instant,
}

/// What is known of the failures since the feed last went well. Kept apart from the tries, which may be dropped
/// half-way: neither the pauses nor the end of patience begin anew then.
#[derive(Debug)]
struct Outage {
    since: Option<Instant>,
    pause: u64,
    not_before: Option<Instant>,
    told: bool,
}

impl Outage {
    fn none() -> Outage {
        Outage {
            since: None,
            pause: PAUSE_MIN_MS,
            not_before: None,
            told: false,
        }
    }

    /// Another failure: the next try comes later. Full jitter, so that clients do not come back in step.
    fn pace(&mut self) {
        self.not_before = Some(Instant::now() + Duration::from_millis(1 + below(self.pause)));
        self.pause = (self.pause * 2).min(PAUSE_MAX_MS);
    }
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
            outage: Outage::none(),
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
            let patience = self.patience.filter(|_| !self.request.follow);
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
            self.outage = Outage::none();
            self.ready.push_back(Step::Rows(rows));
        }
    }

    /// The stream is over, but not the feed.
    async fn lose(&mut self, cause: String) {
        let Some(open) = self.stream.take() else { return };
        if open.since.elapsed() >= SETTLED {
            self.outage = Outage::none();
        } else {
            // A replica that lets streams begin and ends them at once must not be asked without a pause.
            self.outage.since.get_or_insert(open.since);
            self.outage.pace();
        }
        // Before anything is awaited: this future may be dropped there.
        self.lost = Some((open.endpoint.clone(), cause));
        self.client.pool().forget(&open.endpoint).await;
    }

    /// Streams could be opened, but none came to anything.
    fn gave_up(&self) -> Error {
        let cause = self.lost.as_ref().map_or("", |(_, cause)| cause.as_str());
        let message = format!("no replica lets the journal be read to its end: {cause}");
        let mut error =
            Error::new(Class::Unavailable, E_NO_ANSWER, message).with_next("palyra cluster status");
        error.retryable = true;
        error
    }

    /// One try to go on somewhere.
    async fn open(&mut self) -> Result<(), Error> {
        let since = *self.outage.since.get_or_insert_with(Instant::now);
        let impatient = |patience: Option<Duration>| patience.is_some_and(|limit| since.elapsed() >= limit);
        if let Some(at) = self.outage.not_before {
            if impatient(self.patience) {
                return Err(self.gave_up());
            }
            sleep_until(at).await;
        }
        let error = match self.try_open().await {
            Ok(open) => {
                if let Some((_, cause)) = self.lost.take() {
                    let endpoint = open.endpoint.clone();
                    self.ready.push_back(Step::Moved { endpoint, cause });
                }
                self.outage.told = false;
                self.stream = Some(open);
                return Ok(());
            }
            Err(error) => error,
        };
        self.outage.pace();
        if !error.retryable || impatient(self.patience) {
            return Err(error);
        }
        if !self.outage.told {
            self.outage.told = true;
            let cause = error.message;
            self.ready.push_back(Step::Lost { cause });
        }
        Ok(())
    }

    async fn try_open(&mut self) -> Result<Open, Error> {
        let avoid = self.lost.as_ref().map(|(endpoint, _)| endpoint.clone());
        let reached = self.client.pool().reach(avoid.as_deref()).await?;
        let endpoint = reached.address;
        let opened = timeout(OPEN_TIMEOUT, journal(reached.channel).tail(self.request.clone())).await;
        let cause = match opened {
            Ok(Ok(response)) => {
                let stream = response.into_inner();
                let since = Instant::now();
                return Ok(Open {
                    endpoint,
                    stream,
                    since,
                });
            }
            Ok(Err(status)) => match classify(&status) {
                Failure::Answered(error) => {
                    self.lost = Some((endpoint, error.message.clone()));
                    return Err(error);
                }
                Failure::Lost { cause, refused: true } => {
                    return Err(Error::new(Class::Denied, E_CERTIFICATE_REFUSED, cause));
                }
                Failure::Lost {
                    cause,
                    refused: false,
                } => cause,
            },
            Err(_) => "no answer in time".to_owned(),
        };
        let mut error = Error::new(Class::Unreachable, E_UNREACHABLE, format!("{endpoint}: {cause}"));
        error.retryable = true;
        self.lost = Some((endpoint.clone(), cause));
        self.client.pool().forget(&endpoint).await;
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
