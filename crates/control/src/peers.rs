//! What the control planes of two replicas ask each other: "have you carried this out?", "how are you?",
//! "let another lead", "what has that program written?".
//!
//! What never lives here: Raft. Nothing here changes the state; every question may be asked again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use palyra_platform as platform;
use palyra_replica::{PeerError, PeerHandler, Refusal as PeerRefusal};
use palyra_state::Id;
use palyra_state::cluster::{self, ReplicaStatus};
use prost::Message;

use crate::control::{Control, WeakControl};
use crate::error::Error;
use crate::outputs::{AskOutput, Piece};

/// The topic of all calls of this layer.
const TOPIC: &str = "control";

/// A question.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Call {
    #[prost(message, tag = "1")]
    Enforce(Enforce),
    #[prost(message, tag = "2")]
    Status(AskStatus),
    #[prost(message, tag = "3")]
    HandOver(HandOver),
    #[prost(message, tag = "6")]
    TakeVote(TakeVote),
    #[prost(message, tag = "4")]
    Digest(Digest),
    #[prost(message, tag = "5")]
    Seen(Seen),
    #[prost(message, tag = "10")]
    Output(AskOutput),
    /// As `Output`, of a run.
    #[prost(message, tag = "30")]
    RunOutput(AskOutput),
}

/// Has everything up to `index` been carried out, and is no connection of `subject` left? Waits for it.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Enforce {
    #[prost(uint64, tag = "1")]
    pub(crate) index: u64,
    #[prost(string, tag = "2")]
    pub(crate) subject: String,
    #[prost(uint64, tag = "3")]
    pub(crate) wait_ms: u64,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct AskStatus {}

/// To the leader: hand over to this voter, or to the best one when 0.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct HandOver {
    #[prost(uint64, tag = "1")]
    pub(crate) to: u64,
}

/// To the leader: this replica is to have no vote any more, for it will be removed.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct TakeVote {
    #[prost(uint64, tag = "1")]
    pub(crate) replica_id: u64,
}

/// To the leader, once a second: what a replica holds.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Digest {
    #[prost(uint64, tag = "1")]
    pub(crate) sessions: u64,
    /// Devices that wait to be attached: whoever knocks is not given up.
    #[prost(message, repeated, tag = "2")]
    pub(crate) knocking: Vec<Id>,
    /// There are more of them.
    #[prost(bool, tag = "3")]
    pub(crate) more_knock: bool,
}

/// When was each of these devices last heard, in the session of that epoch?
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Seen {
    #[prost(message, repeated, tag = "1")]
    pub(crate) devices: Vec<Id>,
    #[prost(uint64, repeated, tag = "2")]
    pub(crate) epochs: Vec<u64>,
}

/// An answer.
#[derive(Clone, PartialEq, prost::Oneof)]
pub(crate) enum Answer {
    #[prost(message, tag = "1")]
    Enforced(Enforced),
    #[prost(message, tag = "2")]
    Status(OwnStatus),
    #[prost(message, tag = "3")]
    HandedOver(HandedOver),
    #[prost(message, tag = "6")]
    VoteTaken(HandedOver),
    #[prost(message, tag = "4")]
    Digest(DigestTaken),
    #[prost(message, tag = "5")]
    Seen(SeenAges),
    #[prost(message, tag = "10")]
    Output(Piece),
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Enforced {
    #[prost(bool, tag = "1")]
    pub(crate) done: bool,
    /// The replica is cut off and serves nobody at the moment.
    #[prost(bool, tag = "2")]
    pub(crate) stale: bool,
}

/// A digest arrived at a leader.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct DigestTaken {
    /// Replicas that the leader has not heard for a while.
    #[prost(message, repeated, tag = "1")]
    pub(crate) silent: Vec<Silent>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub(crate) struct Silent {
    #[prost(uint64, tag = "1")]
    pub(crate) replica_id: u64,
    #[prost(uint64, tag = "2")]
    pub(crate) silent_for_ms: u64,
}

/// In the order of the question: one more than the age in milliseconds, or 0 when that session is not held here.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct SeenAges {
    #[prost(uint64, repeated, tag = "1")]
    pub(crate) ages: Vec<u64>,
}

/// Empty when it is done.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct HandedOver {
    #[prost(string, tag = "1")]
    pub(crate) problem: String,
}

impl From<Result<(), Error>> for HandedOver {
    fn from(done: Result<(), Error>) -> Self {
        let problem = done.err().map(|error| error.to_string());
        HandedOver {
            problem: problem.unwrap_or_default(),
        }
    }
}

/// How a replica is, as it says itself.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct OwnStatus {
    #[prost(string, tag = "1")]
    pub(crate) role: String,
    #[prost(uint64, tag = "2")]
    pub(crate) last_log_index: u64,
    #[prost(uint64, tag = "3")]
    pub(crate) applied_index: u64,
    #[prost(uint64, tag = "4")]
    pub(crate) snapshot_index: u64,
    #[prost(uint64, tag = "5")]
    pub(crate) contact_age_ms: u64,
    #[prost(string, tag = "6")]
    pub(crate) version: String,
    #[prost(string, tag = "7")]
    pub(crate) state_hash: String,
    #[prost(uint64, tag = "8")]
    pub(crate) wall_ms: u64,
    #[prost(uint64, tag = "9")]
    pub(crate) sessions: u64,
    #[prost(uint64, tag = "20")]
    pub(crate) max_staleness_ms: u64,
    #[prost(bool, tag = "21")]
    pub(crate) draining: bool,
    #[prost(uint64, tag = "22")]
    pub(crate) attaches_waiting: u64,
    #[prost(uint64, tag = "40")]
    pub(crate) renewal_entries: u64,
    #[prost(uint64, tag = "41")]
    pub(crate) leases_renewed: u64,
    #[prost(uint64, tag = "42")]
    pub(crate) renewals_refused: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CallFrame {
    #[prost(oneof = "Call", tags = "1, 2, 3, 4, 5, 6, 10, 30")]
    call: Option<Call>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AnswerFrame {
    #[prost(oneof = "Answer", tags = "1, 2, 3, 4, 5, 6, 10")]
    answer: Option<Answer>,
}

impl Control {
    /// Answers the questions of other replicas from now on.
    pub(crate) fn serve_peers(&self) {
        self.replica().set_peer_handler(Arc::new(Door(self.downgrade())));
    }

    /// Asks another replica.
    pub(crate) async fn call_peer(
        &self,
        to: u64,
        call: Call,
        timeout: Duration,
    ) -> Result<Answer, PeerError> {
        let body = Bytes::from(CallFrame { call: Some(call) }.encode_to_vec());
        let answer = self.replica().call_peer(to, TOPIC, body, timeout).await?;
        self.liveness().heard(to);
        let malformed = || PeerError::Lost("the answer cannot be decoded".to_owned());
        AnswerFrame::decode(answer)
            .map_err(|_| malformed())?
            .answer
            .ok_or_else(malformed)
    }

    async fn answer_peer(&self, from: u64, body: Bytes) -> Result<Bytes, PeerError> {
        let unsupported = || PeerError::Refused {
            refusal: PeerRefusal::Unsupported,
            message: "this version does not know the question".to_owned(),
        };
        let frame = CallFrame::decode(body).map_err(|_| unsupported())?;
        let answer = match frame.call.ok_or_else(unsupported)? {
            Call::Enforce(ask) => {
                let wait = Duration::from_millis(ask.wait_ms).min(self.timings().call_timeout);
                let done = platform::timeout(wait, self.enforced_here(ask.index, &ask.subject))
                    .await
                    .is_ok();
                let stale = self.check_fresh().is_err();
                Answer::Enforced(Enforced { done, stale })
            }
            Call::Status(AskStatus {}) => Answer::Status(self.own_status()),
            Call::Digest(digest) => Answer::Digest(self.take_digest(from, digest)),
            Call::Seen(ask) => Answer::Seen(self.seen_ages(&ask)),
            Call::Output(ask) => {
                let wait = Duration::from_millis(ask.wait_ms).min(self.timings().call_timeout);
                let piece = self
                    .output_here(ask.dispatch_id, (ask.attempt, ask.line), wait)
                    .await;
                // Too many wait here: the other replica asks again.
                Answer::Output(piece.unwrap_or_default())
            }
            Call::RunOutput(ask) => {
                let wait = Duration::from_millis(ask.wait_ms).min(self.timings().call_timeout);
                let piece = self
                    .run_output_here(ask.dispatch_id, (ask.attempt, ask.line), wait)
                    .await;
                Answer::Output(piece.unwrap_or_default())
            }
            Call::HandOver(ask) => Answer::HandedOver(self.hand_over_here(ask.to).await.into()),
            Call::TakeVote(ask) => Answer::VoteTaken(self.take_vote_here(ask.replica_id).await.into()),
        };
        Ok(Bytes::from(AnswerFrame { answer: Some(answer) }.encode_to_vec()))
    }
}

/// What the replica holds of this layer. Weak, or neither could ever be let go.
struct Door(WeakControl);

impl PeerHandler for Door {
    fn admits(&self, from: u64) -> bool {
        let Some(control) = self.0.upgrade() else {
            return true;
        };
        cluster::replica(&control.replica().view(), from)
            .is_none_or(|record| record.status() != ReplicaStatus::Removed)
    }

    fn handle(&self, from: u64, topic: String, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let control = self.0.upgrade();
        async move {
            if topic != TOPIC {
                let message =
                    format!("replica {from} asked about {topic:?}, which this version does not know");
                return Err(PeerError::Refused {
                    refusal: PeerRefusal::Unsupported,
                    message,
                });
            }
            let stopped = || PeerError::Refused {
                refusal: PeerRefusal::Stopped,
                message: "the control plane has stopped".to_owned(),
            };
            let control = control.ok_or_else(stopped)?;
            control.liveness().heard(from);
            control.answer_peer(from, body).await
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_survive_their_encoding_and_unknown_ones_are_told_apart() {
        let call = Call::Enforce(Enforce {
            index: 7,
            subject: "x".to_owned(),
            wait_ms: 9,
        });
        let bytes = CallFrame {
            call: Some(call.clone()),
        }
        .encode_to_vec();
        assert_eq!(CallFrame::decode(bytes.as_slice()).unwrap().call, Some(call));
        // Field 9 of a later version.
        assert_eq!(CallFrame::decode([0x4a, 0].as_slice()).unwrap().call, None);
    }
}
