//! How the state hears of sessions that ended on this replica: in batches, again and again until it is committed
//! or no longer true.
//!
//! While one batch is being committed the next one gathers, so that a single end is told at once and the ends of
//! thousands of sessions cost tens of entries. What never lives here: why a session ends (`sessions`).
//! Invariants: an end that the state knows already makes no entry; an entry is settled after the state knows.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::nodes::{self, DetachMany, Ended, How};
use palyra_state::{Read, limits};
use tokio::sync::Notify;

use crate::caller::millis;
use crate::control::Control;
use crate::error::Error;
use crate::outbox::End;
use crate::registry::Entry;

/// First pause after a batch that did not get through; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Ends that the state does not know of yet.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    queue: Mutex<VecDeque<(Arc<Entry>, End)>>,
    arrived: Notify,
}

impl Ends {
    /// Tells an end. The entry is settled when the state knows.
    pub(crate) fn tell(&self, entry: Arc<Entry>, end: End) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back((entry, end));
        self.arrived.notify_one();
    }

    fn take(&self) -> Vec<(Arc<Entry>, End)> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = queue.len().min(limits::DETACH_BATCH);
        queue.drain(..batch).collect()
    }
}

impl End {
    /// How the state takes it: whether the node is expected back.
    pub(crate) fn how(self) -> How {
        match self {
            End::Left => How::Left,
            // The replica sends it to another one.
            End::Draining | End::Stale => How::Moving,
            _ => How::Lost,
        }
    }
}

impl Control {
    /// Tells the state of ends, until this replica stops.
    pub(crate) async fn tell_ends(self) {
        let mut stopping = self.stopping();
        loop {
            let batch = self.ends().take();
            if batch.is_empty() {
                tokio::select! {
                    biased;
                    _ = stopping.wait_for(|stop| *stop) => return,
                    () = self.ends().arrived.notified() => {}
                }
                continue;
            }
            let ends: Vec<Ended> = batch.iter().map(|(entry, end)| ended(entry, *end)).collect();
            self.detach_all(ends).await;
            for (entry, _) in batch {
                self.registry().settle(&entry);
            }
        }
    }

    /// Tells the state that sessions ended, until it is committed or no longer true.
    pub(crate) async fn detach_all(&self, mut ends: Vec<Ended>) {
        let mut request_id = self.fresh_id();
        let mut pause = PAUSE_MIN;
        loop {
            let known = ends.len();
            {
                let view = self.replica().view();
                ends.retain(|end| is_live(&view, end));
            }
            if ends.is_empty() {
                return;
            }
            // The same request as before only while it asks for the same.
            if ends.len() != known {
                request_id = self.fresh_id();
            }
            let detach = DetachMany {
                ends: ends.clone(),
                suspect_for: millis(self.timings().suspect_for),
                lost_after: self.timings().lost_after_ms(),
            };
            match self.propose(request_id, self.as_replica(), detach).await {
                Ok(written) => {
                    // Whoever looks next must see the sessions gone.
                    let _ = self.applied(written.receipt).await;
                    return;
                }
                Err(error) if error.is_retryable() && !self.is_stopping() => {
                    tracing::debug!(sessions = ends.len(), cause = %error, "ends are told again");
                }
                Err(error) => return given_up(&ends, &error),
            }
            platform::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

fn given_up(ends: &[Ended], error: &Error) {
    tracing::warn!(sessions = ends.len(), cause = %error, "ends of sessions were refused");
}

fn is_live(view: &dyn Read, end: &Ended) -> bool {
    let session = nodes::node(view, end.device_id).and_then(|node| node.session);
    session.is_some_and(|session| session.epoch == end.epoch)
}

fn ended(entry: &Entry, end: End) -> Ended {
    Ended {
        device_id: entry.device_id,
        epoch: entry.epoch(),
        reason: end.as_str().to_owned(),
        how: end.how() as i32,
        silent_for: millis(entry.unheard_for()),
    }
}
