//! How far a revocation is, told by whichever replica lives.
//!
//! What never lives here: the revocation itself (see [`Client::revoke_device`]), and printing. Invariant: losing the
//! replica that tells it loses nothing: any other can tell as much.

use std::time::Duration;

use palyra_proto::node::v1::{WatchRevocationRequest, WatchRevocationResponse};
use tokio::time::{Instant, timeout};

use crate::client::{Client, WAIT_MARGIN};
use crate::error::{Error, Failure, classify};
use crate::road::{Open, Road, Tried};
use crate::services::{MAX_WAIT_MS, fleet};

/// A replica that tells nothing for so long has gone: it speaks at least each second.
const SILENT: Duration = Duration::from_secs(4);

/// What happened to the question.
#[derive(Debug, Clone, PartialEq)]
pub enum Enforced {
    /// How far the revocation is. The last is complete, or the wait is over.
    Progress(WatchRevocationResponse),
    /// No replica tells it now; it keeps asking. Told once for each outage.
    Lost {
        /// Why.
        cause: String,
    },
}

/// The progress of a revocation.
#[derive(Debug)]
pub struct Revocation {
    road: Road,
    device: String,
    until: Instant,
    stream: Option<Box<Open<WatchRevocationResponse>>>,
    complete: bool,
}

impl Client {
    /// How far the revocation of a device is (by id, prefix or name), until no replica serves it, at most for `wait`.
    #[must_use]
    pub fn revocation(&self, device: &str, wait: Duration) -> Revocation {
        Revocation {
            road: Road::new(self.clone(), Some(wait + WAIT_MARGIN)),
            device: device.to_owned(),
            until: Instant::now() + wait,
            stream: None,
            complete: false,
        }
    }
}

impl Revocation {
    /// How far it is: at once, then whenever that changes and each second; nothing more once it is complete or the wait
    /// is over. Safe to drop and call again.
    ///
    /// # Errors
    /// A refusal, or that no replica could be reached for as long as the wait.
    pub async fn next(&mut self) -> Result<Option<Enforced>, Error> {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            if self.complete {
                return Ok(None);
            }
            let Some(open) = &mut self.stream else {
                let request = WatchRevocationRequest {
                    device_id: self.device.clone(),
                    // The last word is wanted also when there is no time left to wait for a better one.
                    wait_ms: u32::try_from(left.as_millis())
                        .unwrap_or(u32::MAX)
                        .clamp(1, MAX_WAIT_MS),
                };
                let opened = self
                    .road
                    .open(|channel| async move { fleet(channel).watch_revocation(request).await });
                match opened.await? {
                    Tried::Open { open, .. } => self.stream = Some(open),
                    Tried::Lost { cause } => return Ok(Some(Enforced::Lost { cause })),
                    Tried::Again => {}
                }
                continue;
            };
            let cause = match timeout(SILENT, open.stream.message()).await {
                Ok(Ok(Some(progress))) => {
                    self.road.went_well();
                    self.complete = progress.complete;
                    return Ok(Some(Enforced::Progress(progress)));
                }
                Ok(Ok(None)) if left.is_zero() => return Ok(None),
                Ok(Ok(None)) => "the replica ended the stream".to_owned(),
                Err(_) => "no word in time".to_owned(),
                Ok(Err(status)) => match classify(&status) {
                    Failure::Answered(error) if !error.retryable => return Err(error),
                    Failure::Answered(error) => error.message,
                    Failure::Lost { cause, .. } => cause,
                },
            };
            if let Some(open) = self.stream.take() {
                self.road.lose(open, cause).await;
            }
        }
    }
}
