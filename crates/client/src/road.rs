//! The way of a feed from one replica to the next: opening a stream somewhere, pausing between tries, giving up.
//!
//! What never lives here: what the stream says. Invariants: the replica that the last stream was lost at is tried last;
//! pauses double up to a second, with full jitter, also when streams open and end at once; what is known of an outage
//! survives a try that was dropped half-way.

use std::future::Future;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::client::Client;
use crate::error::{Class, E_CERTIFICATE_REFUSED, E_NO_ANSWER, E_UNREACHABLE, Error, Failure, classify};
use crate::ids::below;

/// The longest pause between two tries to find a replica.
const PAUSE_MAX_MS: u64 = 1_000;
/// The longest first pause.
const PAUSE_MIN_MS: u64 = 50;
/// How long the opening of a stream may take: a replica may wait for the leader's word first.
const OPEN_TIMEOUT: Duration = Duration::from_secs(6);
/// A stream that lived so long was a good one, also when it had nothing to tell: what follows its end is not
/// a string of failures.
const SETTLED: Duration = Duration::from_secs(1);

/// An open stream.
#[derive(Debug)]
pub(crate) struct Open<T> {
    pub(crate) endpoint: String,
    pub(crate) stream: Streaming<T>,
    since: Instant,
}

/// What a try to open a stream came to, when there is no error.
#[derive(Debug)]
pub(crate) enum Tried<T> {
    /// It is open; after a loss with the loss's cause.
    Open {
        /// The stream.
        open: Box<Open<T>>,
        /// Why the former one ended.
        cause: Option<String>,
    },
    /// No replica lets it be opened now. Told once for each outage.
    Lost {
        /// Why.
        cause: String,
    },
    /// The same as before: try again.
    Again,
}

#[derive(Debug)]
pub(crate) struct Road {
    client: Client,
    /// Where the last stream ended, and why.
    lost: Option<(String, String)>,
    patience: Option<Duration>,
    outage: Outage,
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

impl Road {
    /// Without `patience` it goes on for ever.
    pub(crate) fn new(client: Client, patience: Option<Duration>) -> Road {
        Road {
            client,
            lost: None,
            patience,
            outage: Outage::none(),
        }
    }

    pub(crate) fn patience(&self) -> Option<Duration> {
        self.patience
    }

    /// Something came through: what follows is a new story.
    pub(crate) fn went_well(&mut self) {
        self.outage = Outage::none();
    }

    /// The stream is over, but not the feed.
    pub(crate) async fn lose<T>(&mut self, open: Box<Open<T>>, cause: String) {
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

    /// The stream is left for another replica's, of the reader's own accord.
    pub(crate) fn leave<T>(&mut self, open: Box<Open<T>>, cause: &str) {
        self.lost = Some((open.endpoint, cause.to_owned()));
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
    pub(crate) async fn open<T, Fut>(&mut self, send: impl FnOnce(Channel) -> Fut) -> Result<Tried<T>, Error>
    where
        Fut: Future<Output = Result<Response<Streaming<T>>, Status>>,
    {
        let since = *self.outage.since.get_or_insert_with(Instant::now);
        let impatient = |patience: Option<Duration>| patience.is_some_and(|limit| since.elapsed() >= limit);
        if let Some(at) = self.outage.not_before {
            if impatient(self.patience) {
                return Err(self.gave_up());
            }
            sleep_until(at).await;
        }
        let error = match self.try_open(send).await {
            Ok(open) => {
                self.outage.told = false;
                let cause = self.lost.take().map(|(_, cause)| cause);
                let open = Box::new(open);
                return Ok(Tried::Open { open, cause });
            }
            Err(error) => error,
        };
        self.outage.pace();
        if !error.retryable || impatient(self.patience) {
            return Err(error);
        }
        if self.outage.told {
            return Ok(Tried::Again);
        }
        self.outage.told = true;
        let cause = error.message;
        Ok(Tried::Lost { cause })
    }

    async fn try_open<T, Fut>(&mut self, send: impl FnOnce(Channel) -> Fut) -> Result<Open<T>, Error>
    where
        Fut: Future<Output = Result<Response<Streaming<T>>, Status>>,
    {
        let avoid = self.lost.as_ref().map(|(endpoint, _)| endpoint.clone());
        let reached = self.client.pool().reach(avoid.as_deref()).await?;
        let endpoint = reached.address;
        let opened = timeout(OPEN_TIMEOUT, send(reached.channel)).await;
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
