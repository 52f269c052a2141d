//! What waits for one session's reader, bounded, and why a session ends.
//!
//! What never lives here: payloads. An assignment waits as the dispatch's id; the payload is read from the
//! state when the reader comes for it, so a reader that stalls costs a few bytes per dispatch. Invariants:
//! putting never waits; a full box ends its session instead; after the end the reader gets one goodbye and
//! nothing more.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use palyra_platform::{self as platform, Instant};
use palyra_state::Id;
use tokio::sync::Notify;

use crate::pace::Pace;
use crate::workers::delivery::ChunkAsk;
use crate::workers::messages::ToWorker;

/// Why a session or connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The stream ended on the node's side.
    Disconnected,
    /// A newer session of the same device took its place.
    Superseded,
    /// The device, operator or certificate was revoked.
    Revoked,
    /// The certificate ran out, or by this replica's clock its time has not come.
    Expired,
    /// A newer certificate of the same holder is in use.
    Replaced,
    /// No heartbeat for too long.
    Silent,
    /// The reader does not take what is sent.
    SlowReader,
    /// This replica is cut off from the quorum.
    Stale,
    /// This replica stops.
    Draining,
    /// The node broke the protocol.
    Protocol,
    /// The node said that it goes.
    Left,
    /// The cluster had given the session up: the leader did not hear from this replica for too long.
    Lost,
}

impl End {
    /// Stable text form, as in the goodbye and the journal.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            End::Disconnected => "disconnected",
            End::Superseded => "superseded",
            End::Revoked => "revoked",
            End::Expired => "expired",
            End::Replaced => "certificate_superseded",
            End::Silent => "silent",
            End::SlowReader => "slow_reader",
            End::Stale => "stale",
            End::Draining => "draining",
            End::Protocol => "protocol",
            End::Left => "left",
            End::Lost => "lost",
        }
    }

    /// The sentence that goes with it.
    #[must_use]
    pub fn message(self) -> &'static str {
        match self {
            End::Disconnected => "the stream ended",
            End::Superseded => "a newer session of this device took the place of this one",
            End::Revoked => "the device or its certificate is revoked",
            End::Expired => "the certificate is not valid at this time; come back with a new one",
            End::Replaced => "a newer certificate of this identity is in use; this one works no more",
            End::Silent => "no heartbeat arrived for too long",
            End::SlowReader => "what was sent was not read for too long",
            End::Stale => "this replica is cut off from the others; connect to another",
            End::Draining => "this replica stops; connect to another",
            End::Protocol => "a message had no place in the stream",
            End::Left => "the node said that it goes",
            End::Lost => "the cluster had given this session up; attach again",
        }
    }

    /// When a node that hears this goodbye may come, here or elsewhere: at once, but not in step with the others.
    #[must_use]
    pub fn pace(self) -> Pace {
        match self {
            End::Draining | End::Stale | End::Lost => Pace::spread_over(crate::limits::MOVE_SPREAD),
            _ => Pace::default(),
        }
    }

    /// Whether the session is over in the replicated state already, so that nobody needs to detach it.
    pub(crate) fn is_settled(self) -> bool {
        matches!(self, End::Superseded | End::Revoked | End::Lost)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One thing for the node to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The dispatch.
    pub dispatch_id: Id,
    /// The session that it is bound to.
    pub epoch: u64,
    /// What to run.
    pub capability: String,
    /// Its input, JSON.
    pub payload: Bytes,
    /// `once` or `idempotent`.
    pub effect: &'static str,
    /// First moment at which it is too late.
    pub deadline_at_ms: u64,
    /// Milliseconds until the deadline, by this replica's clock.
    pub remaining_ms: u64,
    /// How often it was delivered, this time included.
    pub attempt: u32,
}

/// What became of a result that the node reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResultAnswer {
    /// The dispatch.
    pub dispatch_id: Id,
    /// Committed.
    pub accepted: bool,
    /// Code of the refusal; empty when accepted.
    pub error_code: String,
    /// The refusal in words; empty when accepted.
    pub error_message: String,
    /// The node should report it again, under the same request id; otherwise it forgets the result.
    pub retry: bool,
    /// Accepted, and only noted: the dispatch had ended before.
    pub late: bool,
}

/// A message to the node.
#[derive(Debug, Clone, PartialEq)]
pub enum Outbound {
    /// Do this.
    Assignment(Assignment),
    /// The heartbeat arrived.
    Heartbeat {
        /// The heartbeat's sequence number.
        sequence: u64,
    },
    /// What became of a result.
    Result(ResultAnswer),
    /// Stop this, its result is not wanted any more.
    Cancel {
        /// The dispatch.
        dispatch_id: Id,
        /// Why.
        reason: String,
        /// When the dispatch is open and the node has to say what became of it: its session, and its attempt.
        confirm: Option<(u64, u32)>,
    },
    /// This is whom to trust from now on; to be stored before it is acknowledged.
    Trust(TrustUpdate),
    /// An operator wants the node to change its certificate and key now.
    Rotate {
        /// Log index of the request; the same may come again.
        index: u64,
        /// Why.
        reason: String,
        /// After which it is overdue.
        deadline_at_ms: u64,
    },
    /// What the node is told as a worker.
    Worker(Box<ToWorker>),
    /// The session is over; this is the last message.
    Goodbye {
        /// Why.
        end: End,
        /// When to come back, or to go elsewhere.
        pace: Pace,
    },
}

/// A trust bundle for a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustUpdate {
    /// Its generation.
    pub generation: u64,
    /// The roots, DER, the one that signs first.
    pub roots: Vec<Vec<u8>>,
}

/// A message as it waits.
#[derive(Debug, Clone)]
pub(crate) enum Waiting {
    Assign(Id),
    Heartbeat(u64),
    Result(ResultAnswer),
    Cancel {
        dispatch_id: Id,
        reason: String,
        confirm: Option<(u64, u32)>,
    },
    Rotate {
        index: u64,
        reason: String,
        deadline_at_ms: u64,
    },
    Trust,
    Worker(Box<ToWorker>),
    /// A lease: it is read from the state when the reader comes.
    Offer(Id),
    Chunk(Box<ChunkAsk>),
}

/// What the reader takes out.
#[derive(Debug)]
pub(crate) enum Taken {
    Message(Waiting),
    Goodbye(End),
    Over,
}

#[derive(Debug, Default)]
struct Inside {
    queue: VecDeque<(Instant, Waiting)>,
    end: Option<(End, Instant)>,
    said_goodbye: bool,
}

/// The box between the control plane and one session's reader.
#[derive(Debug)]
pub(crate) struct Outbox {
    inside: Mutex<Inside>,
    arrived: Notify,
    limit: usize,
}

impl Outbox {
    pub(crate) fn new(limit: usize) -> Outbox {
        Outbox {
            inside: Mutex::new(Inside::default()),
            arrived: Notify::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a message in; `false` when the box is full. A box that has ended swallows it.
    pub(crate) fn put(&self, message: Waiting) -> bool {
        let mut inside = self.lock();
        if inside.end.is_some() {
            return true;
        }
        if inside.queue.len() >= self.limit {
            return false;
        }
        // Only the newest heartbeat matters to a reader that lags.
        if matches!(message, Waiting::Heartbeat(_)) {
            inside
                .queue
                .retain(|(_, waiting)| !matches!(waiting, Waiting::Heartbeat(_)));
        }
        inside.queue.push_back((platform::now(), message));
        drop(inside);
        self.arrived.notify_one();
        true
    }

    /// Ends the session; the first reason stays. `false` when it had ended before.
    pub(crate) fn close(&self, end: End) -> bool {
        let mut inside = self.lock();
        if inside.end.is_some() {
            return false;
        }
        inside.end = Some((end, platform::now()));
        inside.queue.clear();
        drop(inside);
        self.arrived.notify_waiters();
        self.arrived.notify_one();
        true
    }

    pub(crate) fn end(&self) -> Option<End> {
        self.lock().end.map(|(end, _)| end)
    }

    /// How long ago it ended; nothing while it has not.
    pub(crate) fn ended_for(&self) -> Option<Duration> {
        self.lock().end.map(|(_, at)| at.elapsed())
    }

    /// How long the oldest message has been waiting.
    pub(crate) fn stalled(&self) -> Duration {
        self.lock()
            .queue
            .front()
            .map_or(Duration::ZERO, |(since, _)| since.elapsed())
    }

    /// What is there now, without waiting.
    pub(crate) fn try_take(&self) -> Option<Taken> {
        let mut inside = self.lock();
        match inside.end {
            Some(_) if inside.said_goodbye => Some(Taken::Over),
            Some((end, _)) => {
                inside.said_goodbye = true;
                Some(Taken::Goodbye(end))
            }
            None => inside
                .queue
                .pop_front()
                .map(|(_, message)| Taken::Message(message)),
        }
    }

    /// Waits for the next message.
    pub(crate) async fn take(&self) -> Taken {
        loop {
            let arrived = self.arrived.notified();
            if let Some(taken) = self.try_take() {
                return taken;
            }
            arrived.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_box_refuses_and_an_ended_one_says_goodbye_once() {
        let outbox = Outbox::new(2);
        assert!(outbox.put(Waiting::Assign(Id::ZERO)));
        assert!(outbox.put(Waiting::Assign(Id::ZERO)));
        assert!(!outbox.put(Waiting::Assign(Id::ZERO)));
        assert!(outbox.close(End::SlowReader));
        assert!(!outbox.close(End::Silent), "the first reason stays");
        assert!(matches!(outbox.take().await, Taken::Goodbye(End::SlowReader)));
        assert!(matches!(outbox.take().await, Taken::Over));
    }

    #[tokio::test]
    async fn only_the_newest_heartbeat_waits() {
        let outbox = Outbox::new(8);
        for sequence in 1..=20 {
            assert!(outbox.put(Waiting::Heartbeat(sequence)));
        }
        assert!(matches!(
            outbox.take().await,
            Taken::Message(Waiting::Heartbeat(20))
        ));
        assert!(outbox.try_take().is_none());
    }
}
