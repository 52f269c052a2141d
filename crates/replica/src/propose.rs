//! Commands on their way into the log.
//!
//! Forwarding happens here and once: a command that arrived from another replica is taken by the leader or
//! refused. Every retry carries the same request id, and the state machine answers a known one without
//! applying it again; so a lost answer may be asked for again until the deadline, and only then is the
//! outcome unknown. Invariant: `Unavailable` means that the command was appended nowhere.

use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{ClientWriteError, RaftError};
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use palyra_state::reply::Submitted;
use palyra_state::{Command, Envelope, Reject, Reply, dispatch, limits};
use wire::propose_response::Outcome;

use crate::codec;
use crate::core::Core;
use crate::peer::{Method, PeerError, Refusal};
use crate::types::{Decided, LogCommand};

/// Pause before a command is tried again when nothing is heard of a new leader.
const RETRY: Duration = Duration::from_millis(50);

/// How often a wait for a forwarded command's answer looks whether its leader still leads, besides being
/// told.
const DEPOSED: Duration = Duration::from_millis(250);

/// A command that is in the log and applied on the replica that led.
#[derive(Clone, Debug, PartialEq)]
pub struct Committed {
    /// Log index: who has applied it sees what the command did.
    pub index: u64,
    /// The state machine's answer.
    pub reply: Result<Reply, Reject>,
    /// The request was decided in an earlier entry, and this is the answer of that time. Who sent it once may see that,
    /// too: a replica sends again by itself what it cannot know to have arrived.
    pub duplicate: bool,
}

/// Why there is no answer of the state machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nothing was appended: there was no leader within the deadline.
    #[error("no leader took the command in time; nothing was changed, try again")]
    Unavailable {
        /// The leader that this replica knows.
        leader_hint: Option<u64>,
    },
    /// Perhaps it was appended. Asking again with the same request id tells.
    #[error("the outcome of the command is not known; ask again with the same request id")]
    Unknown,
    /// The encoded command is beyond the limit; nothing was appended.
    #[error("the command has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// Bytes of the encoded command.
        size: usize,
        /// Most that an entry may have.
        limit: usize,
    },
}

/// What one attempt came to.
pub(crate) enum Attempt {
    Done {
        index: u64,
        answer: Decided,
    },
    /// Not appended; the leader that was named.
    NotLeader(Option<u64>),
    Unknown,
    Stopped,
}

impl Core {
    /// Proposes until there is an answer, or `limit` passes.
    pub(crate) async fn propose(
        &self,
        envelope: &Envelope,
        limit: Duration,
    ) -> Result<Committed, ProposeError> {
        let bytes = Bytes::from(envelope.encode());
        if bytes.len() > limits::ENVELOPE_MAX {
            return Err(ProposeError::TooLarge {
                size: bytes.len(),
                limit: limits::ENVELOPE_MAX,
            });
        }
        let end = platform::now() + limit;
        let permits = self.room(bytes.len());
        let unavailable = || ProposeError::Unavailable {
            leader_hint: self.leader_hint(),
        };
        let Ok(Ok(_room)) = platform::timeout(limit, self.in_flight.acquire_many(permits)).await else {
            return Err(unavailable());
        };
        let mut ambiguous = false;
        loop {
            let left = end.saturating_duration_since(platform::now());
            if left.is_zero() || self.stopping() {
                return Err(if ambiguous {
                    ProposeError::Unknown
                } else {
                    unavailable()
                });
            }
            match self.attempt(&bytes, left).await {
                Attempt::Done { index, answer } => {
                    return Ok(Committed {
                        index,
                        reply: answer.reply,
                        duplicate: answer.duplicate,
                    });
                }
                // Planted: a lost answer is taken for a refusal.
                Attempt::Unknown => ambiguous = !palyra_fault::planted("unknown-told-as-refused"),
                Attempt::NotLeader(_) | Attempt::Stopped => {}
            }
            self.changed(RETRY.min(end.saturating_duration_since(platform::now())))
                .await;
        }
    }

    /// One attempt: here when this replica leads, else at the leader that it knows.
    async fn attempt(&self, bytes: &Bytes, left: Duration) -> Attempt {
        match self.leader() {
            None => Attempt::NotLeader(None),
            Some((_, true)) => match platform::timeout(left, self.propose_here(bytes.clone())).await {
                Ok(attempt) => attempt,
                // Giving up on the wait takes nothing back.
                Err(_) => Attempt::Unknown,
            },
            Some((leader, false)) => tokio::select! {
                biased;
                attempt = self.forward(leader, bytes.clone(), left) => attempt,
                // The leader was sent the command and is no more: its successor knows, or may take it anew.
                () = self.deposed(leader) => Attempt::Unknown,
            },
        }
    }

    /// Waits until another leader than `leader` is known.
    async fn deposed(&self, leader: u64) {
        while self.leader_hint().is_none_or(|now| now == leader) {
            self.changed(DEPOSED).await;
        }
    }

    /// Takes a command as leader, or refuses; never forwards.
    pub(crate) async fn propose_here(&self, bytes: Bytes) -> Attempt {
        if bytes.len() > limits::ENVELOPE_MAX {
            return Attempt::NotLeader(None);
        }
        let command = LogCommand {
            at_ms: self.machine.log_ms(),
            bytes,
        };
        if let Some(early) = self.answer_early(&command) {
            return early;
        }
        platform::io_point("propose.append").await;
        let written = self.raft.client_write(command).await;
        platform::io_point("propose.appended").await;
        match written {
            Ok(written) => match written.data.0 {
                Some(answer) => Attempt::Done {
                    index: written.log_id.index,
                    answer,
                },
                None => Attempt::Unknown,
            },
            // Matched one by one: openraft's helper takes a discarded entry for one that was never appended.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => {
                Attempt::NotLeader(to.leader_id.filter(|leader| *leader != self.me()))
            }
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Attempt::Unknown,
            Err(RaftError::APIError(
                ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_),
            )) => Attempt::Unknown,
            Err(RaftError::Fatal(fatal)) => {
                self.raft_died(&fatal);
                Attempt::Stopped
            }
        }
    }

    /// Planted: a submission is answered as soon as a leader has it.
    fn answer_early(&self, command: &LogCommand) -> Option<Attempt> {
        if !palyra_fault::planted("ok-before-commit") {
            return None;
        }
        let envelope = palyra_state::decode(&command.bytes).ok()?;
        let Command::Dispatch(dispatch::Command {
            action: Some(dispatch::Action::Submit(submit)),
        }) = envelope.command
        else {
            return None;
        };
        let (raft, command) = (self.raft.clone(), command.clone());
        platform::spawn(async move { drop(raft.client_write(command).await) }).detach();
        let submitted = Submitted {
            dispatch_id: submit.dispatch_id,
            ..Submitted::default()
        };
        Some(Attempt::Done {
            index: self.metrics().last_log_index.unwrap_or_default() + 1,
            answer: Decided {
                reply: Ok(Reply::Submitted(submitted)),
                duplicate: false,
            },
        })
    }

    async fn forward(&self, leader: u64, envelope: Bytes, left: Duration) -> Attempt {
        platform::io_point("propose.forward").await;
        let carried = platform::timeout(left, self.couriers.deliver(leader, envelope.clone())).await;
        let answered = match carried {
            // It is older than the stream: one call for each command, as it knows it.
            Ok(Err(PeerError::Refused {
                refusal: Refusal::Unsupported,
                ..
            })) => self.forward_alone(leader, envelope, left).await,
            Ok(answered) => answered,
            Err(_) => Err(PeerError::Timeout(left)),
        };
        platform::io_point("propose.forwarded").await;
        match answered {
            Ok(response) => match response.outcome {
                Some(Outcome::Committed(committed)) => match codec::to_answer(committed.answer) {
                    Ok(reply) => Attempt::Done {
                        index: committed.index,
                        answer: Decided {
                            reply,
                            duplicate: committed.duplicate,
                        },
                    },
                    Err(_) => Attempt::Unknown,
                },
                Some(Outcome::NotLeader(hint)) => Attempt::NotLeader((hint != 0).then_some(hint)),
                Some(Outcome::Unknown(_)) | None => Attempt::Unknown,
            },
            Err(PeerError::Lost(_) | PeerError::Timeout(_)) => Attempt::Unknown,
            // It was on its way out: the entry may have been appended before.
            Err(PeerError::Refused {
                refusal: Refusal::Stopped,
                ..
            }) => Attempt::Unknown,
            Err(PeerError::Unreachable(_) | PeerError::Refused { .. }) => Attempt::NotLeader(None),
        }
    }

    /// One command in one call.
    async fn forward_alone(
        &self,
        leader: u64,
        envelope: Bytes,
        left: Duration,
    ) -> Result<wire::ProposeResponse, PeerError> {
        let body = wire::request::Body::Propose(wire::ProposeRequest { envelope });
        match self.links.call(leader, Method::Propose, body, left).await? {
            wire::response::Body::Propose(response) => Ok(response),
            _ => Err(PeerError::Lost(format!(
                "replica {leader} answered something else than was asked"
            ))),
        }
    }
}
