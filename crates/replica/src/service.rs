//! The server side of the peer protocol: bytes in, bytes out.
//!
//! Whoever carries the bytes says who the caller is (by its certificate); each message says it again, with
//! cluster and addressee, and all of it must agree before Raft sees anything. A message that does not decode
//! ends its stream: skipping it would leave a hole that the sender believes filled.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, StreamExt};
use openraft::raft::{AppendEntriesRequest, StreamAppendError, TransferLeaderRequest, VoteRequest};
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use prost::Message;
use tokio::sync::watch;
use wire::{request, response};

use crate::codec::{self, Malformed};
use crate::core::Core;
use crate::forwarded;
use crate::links::Links;
use crate::machine::SnapshotData;
use crate::network::own_commit;
use crate::peer::{Bodies, PeerError, Refusal};
use crate::propose::Attempt;
use crate::snapshot::{self, Receiver};
use crate::types::{Entry, LogId, TypeConfig, Vote};

/// How long the sender of a snapshot may be silent; longer than senders keep one up that does not move.
const SNAPSHOT_SILENCE: Duration = Duration::from_secs(15);

/// Answers other replicas. Cheap to clone.
#[derive(Clone)]
pub struct PeerService {
    core: Arc<Core>,
}

pub(crate) fn malformed(error: impl std::fmt::Display) -> PeerError {
    PeerError::refused(Refusal::Malformed, error)
}

impl From<Malformed> for PeerError {
    fn from(error: Malformed) -> Self {
        malformed(error)
    }
}

fn stopped(error: impl std::fmt::Display) -> PeerError {
    PeerError::refused(Refusal::Stopped, error)
}

/// What a request says about the leader's quorum, kept until Raft has accepted the request.
struct Claim {
    commit: Option<u64>,
    age_ms: Option<u64>,
    echo: Option<u64>,
    log_ms: Option<u64>,
}

/// Between the two halves of an append stream.
#[derive(Default)]
struct Exchange {
    claims: Mutex<VecDeque<Claim>>,
    broken: Mutex<Option<PeerError>>,
}

impl Exchange {
    fn push(&self, claim: Claim) {
        self.claims
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(claim);
    }

    fn pop(&self) -> Option<Claim> {
        self.claims
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    fn fail(&self, error: PeerError) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    fn take_failure(&self) -> Option<PeerError> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl PeerService {
    pub(crate) fn new(core: Arc<Core>) -> PeerService {
        PeerService { core }
    }

    fn links(&self) -> &Links {
        &self.core.links
    }

    /// Answers one call of the replica `from`.
    ///
    /// # Errors
    /// [`PeerError::Refused`] when the message is not for us, not from `from`, or cannot be understood.
    pub async fn handle_call(&self, from: u64, body: Bytes) -> Result<Bytes, PeerError> {
        let message = wire::Request::decode(body).map_err(malformed)?;
        self.links().check(from, message.origin.as_ref())?;
        let body = message
            .body
            .ok_or_else(|| malformed("the request is empty, or of a kind not known here"))?;
        let answer = match body {
            request::Body::Vote(asked) => response::Body::Vote(self.vote(from, asked, false).await?),
            request::Body::PreVote(asked) => response::Body::Vote(self.vote(from, asked, true).await?),
            request::Body::Transfer(asked) => response::Body::Transfer(self.transfer(from, asked).await?),
            request::Body::Propose(asked) => {
                self.core.check_admitted(from)?;
                response::Body::Propose(self.propose(asked).await?)
            }
            request::Body::ReadIndex(_) => response::Body::ReadIndex(self.read_index().await?),
            request::Body::Application(asked) => {
                self.core.check_admitted(from)?;
                let answer = self.core.handle_application(from, asked.topic, asked.body);
                response::Body::Application(answer.await?)
            }
        };
        Ok(wire::Response { body: Some(answer) }.encode_to_vec().into())
    }

    async fn vote(
        &self,
        from: u64,
        asked: wire::VoteRequest,
        pre: bool,
    ) -> Result<wire::VoteResponse, PeerError> {
        let vote = codec::need_vote(asked.vote.as_ref())?;
        Links::check_vote(from, &vote)?;
        let request = VoteRequest {
            vote,
            last_log_id: codec::to_maybe_log_id(asked.last.as_ref()),
            leadership_transfer: asked.leadership_transfer,
        };
        let raft = &self.core.raft;
        let answer = if pre {
            raft.pre_vote(request).await
        } else {
            raft.vote(request).await
        };
        let answer = answer.map_err(stopped)?;
        Ok(wire::VoteResponse {
            vote: Some(codec::vote(&answer.vote)),
            last: codec::maybe_log_id(answer.last_log_id.as_ref()),
            granted: answer.vote_granted,
        })
    }

    async fn transfer(
        &self,
        from: u64,
        asked: wire::TransferRequest,
    ) -> Result<wire::TransferResponse, PeerError> {
        let leader = codec::need_vote(asked.from_leader.as_ref())?;
        Links::check_vote(from, &leader)?;
        let request =
            TransferLeaderRequest::new(leader, asked.to, codec::to_maybe_log_id(asked.last.as_ref()));
        let result = self
            .core
            .raft
            .handle_transfer_leader(request)
            .await
            .map_err(stopped)?;
        Ok(wire::TransferResponse {
            refused: result.err().map(|error| error.to_string()).unwrap_or_default(),
        })
    }

    /// Answers a stream of commands of the replica `from`, each when it is decided. The stream ends with the first
    /// message that is not for us or cannot be understood; what is not answered then may have been taken or not.
    pub fn handle_forward(&self, from: u64, bodies: Bodies) -> Bodies {
        forwarded::serve(self.clone(), from, bodies)
    }

    /// Checks that a message is for us, and from the replica `from`.
    pub(crate) fn check(&self, from: u64, origin: Option<&wire::Origin>) -> Result<(), PeerError> {
        self.links().check(from, origin)
    }

    /// Whether commands of the replica `from` are taken.
    pub(crate) fn admits(&self, from: u64) -> bool {
        self.core.check_admitted(from).is_ok()
    }

    /// A forwarded command: taken by a leader, never forwarded again.
    pub(crate) async fn propose(
        &self,
        asked: wire::ProposeRequest,
    ) -> Result<wire::ProposeResponse, PeerError> {
        use wire::propose_response::Outcome;
        // An entry that nobody understands would stop every replica.
        palyra_state::decode(&asked.envelope).map_err(malformed)?;
        // The others bound what they forward, each for itself; together it would still pile up here. Refused at once,
        // it is asked for again in a moment.
        let room = self.core.room(asked.envelope.len());
        let Ok(_room) = self.core.forwarded.try_acquire_many(room) else {
            return Ok(wire::ProposeResponse {
                outcome: Some(Outcome::NotLeader(0)),
            });
        };
        let outcome = match self.core.propose_here(asked.envelope).await {
            Attempt::Done { index, answer } => Outcome::Committed(wire::Committed {
                index,
                answer: codec::answer(&answer.reply),
                duplicate: answer.duplicate,
            }),
            Attempt::NotLeader(hint) => Outcome::NotLeader(hint.unwrap_or(0)),
            Attempt::Unknown => Outcome::Unknown(wire::Blank {}),
            Attempt::Stopped => return Err(stopped("the replica is stopping")),
        };
        Ok(wire::ProposeResponse {
            outcome: Some(outcome),
        })
    }

    async fn read_index(&self) -> Result<wire::ReadIndexResponse, PeerError> {
        use wire::read_index_response::Result as Outcome;
        let result = match self.core.read_index_here().await {
            Ok(id) => Outcome::Index(codec::log_id(&id)),
            Err(hint) => Outcome::NotLeader(hint.unwrap_or(0)),
        };
        Ok(wire::ReadIndexResponse { result: Some(result) })
    }

    /// Answers a stream of AppendEntries of the replica `from`, in order. The stream ends after the first
    /// request that is refused, cannot be understood, or that Raft rejects.
    pub fn handle_append(&self, from: u64, bodies: Bodies) -> Bodies {
        let exchange = Arc::new(Exchange::default());
        let requests = {
            let (core, exchange) = (self.core.clone(), exchange.clone());
            stream::unfold(bodies, move |mut bodies| {
                let (core, exchange) = (core.clone(), exchange.clone());
                async move {
                    let request = bodies
                        .next()
                        .await?
                        .and_then(|body| decode_append(&core.links, from, body));
                    match request {
                        Ok((request, claim)) => {
                            exchange.push(claim);
                            Some((request, bodies))
                        }
                        Err(error) => {
                            exchange.fail(error);
                            None
                        }
                    }
                }
            })
        };
        let core = self.core.clone();
        let failed = exchange.clone();
        let replies = self.core.raft.stream_append(requests).map(move |result| {
            let result = result.map_err(stopped)?;
            Ok(encode_append_reply(&core.links, result, exchange.pop()))
        });
        let last = stream::once(async move { failed.take_failure() })
            .filter_map(|error| async move { error.map(Err) });
        replies.chain(last).boxed()
    }

    /// Receives a snapshot of the replica `from`, and answers when it is installed.
    ///
    /// # Errors
    /// [`PeerError::Refused`], or what broke the stream off.
    pub async fn handle_snapshot(&self, from: u64, mut bodies: Bodies) -> Result<Bytes, PeerError> {
        let header = self.snapshot_header(from, &mut bodies).await?;
        let vote = codec::need_vote(header.vote.as_ref())?;
        Links::check_vote(from, &vote)?;
        let meta = header
            .meta
            .as_ref()
            .ok_or_else(|| malformed("a snapshot without position"))?;
        let meta = codec::to_snapshot_meta(meta)?;
        // openraft panics on it.
        if meta
            .last_log_id
            .is_some_and(|last| last.leader_id > vote.leader_id)
        {
            return Err(malformed(
                "a snapshot of a term that its sender's vote does not reach",
            ));
        }
        // One at a time: a newer transfer ends the older one, which its sender has given up.
        let turn = self.core.begin_transfer();
        let mut receiver = Receiver::new(self.core.machine.clone());
        if let Err(error) = receive(&mut receiver, &mut bodies, turn).await {
            receiver.discard();
            return Err(error);
        }
        platform::io_point("snapshot.received").await;
        let data = SnapshotData::Received(receiver.generation());
        let snapshot = openraft::Snapshot { meta, snapshot: data };
        let (raft, guard) = (self.core.raft.clone(), self.core.log.installing());
        // A task of its own: the guard must outlive a caller that hangs up.
        let installed = platform::spawn(async move {
            let answer = raft.install_full_snapshot(vote, snapshot).await;
            drop(guard);
            answer
        });
        let answer = installed.await.map_err(stopped)?.map_err(stopped)?;
        // Raft answers after the installation, or at once when it had no use for the snapshot.
        if self.core.machine.generation() != receiver.generation() {
            receiver.discard();
            // It has none when it accepted what the snapshot covers as entries, written or not. The leader takes the
            // answer for a promise to keep them, counts on it, and never sends them again.
            self.core.log.flushed().await.map_err(stopped)?;
        }
        Ok(wire::SnapshotReply {
            vote: Some(codec::vote(&answer.vote)),
        }
        .encode_to_vec()
        .into())
    }

    async fn snapshot_header(
        &self,
        from: u64,
        bodies: &mut Bodies,
    ) -> Result<wire::SnapshotHeader, PeerError> {
        let first = bodies
            .next()
            .await
            .ok_or_else(|| malformed("an empty snapshot stream"))??;
        let frame = wire::SnapshotFrame::decode(first).map_err(malformed)?.frame;
        let Some(wire::snapshot_frame::Frame::Header(header)) = frame else {
            return Err(malformed("a snapshot must begin with its header"));
        };
        self.links().check(from, header.origin.as_ref())?;
        if header.format != snapshot::FORMAT {
            return Err(malformed(format_args!(
                "the snapshot has format {}, this replica reads {}",
                header.format,
                snapshot::FORMAT
            )));
        }
        Ok(header)
    }
}

/// Takes all frames of a snapshot, until a newer transfer begins or its sender falls silent.
async fn receive(
    receiver: &mut Receiver,
    bodies: &mut Bodies,
    (turn, mut newest): (u64, watch::Receiver<u64>),
) -> Result<(), PeerError> {
    loop {
        let body = tokio::select! {
            biased;
            _ = newest.wait_for(|at| *at != turn) => {
                return Err(PeerError::Lost("a newer snapshot transfer began".to_owned()));
            }
            body = platform::timeout(SNAPSHOT_SILENCE, bodies.next()) => {
                body.map_err(|_| PeerError::Timeout(SNAPSHOT_SILENCE))?
            }
        };
        let Some(body) = body else {
            return Err(PeerError::Lost(
                "the snapshot stream ended before its trailer".to_owned(),
            ));
        };
        if receiver.take(body?).await? {
            return Ok(());
        }
    }
}

fn decode_append(
    links: &Links,
    from: u64,
    body: Bytes,
) -> Result<(AppendEntriesRequest<TypeConfig>, Claim), PeerError> {
    let message = wire::AppendRequest::decode(body).map_err(malformed)?;
    links.check(from, message.origin.as_ref())?;
    let vote: Vote = codec::need_vote(message.vote.as_ref())?;
    Links::check_vote(from, &vote)?;
    let leader_commit = codec::to_maybe_log_id(message.leader_commit.as_ref());
    let claim = Claim {
        commit: own_commit(&vote, leader_commit.as_ref()),
        age_ms: message.quorum_age_ms,
        echo: message.echo,
        log_ms: message.log_ms,
    };
    let entries = message
        .entries
        .into_iter()
        .map(codec::to_entry)
        .collect::<Result<Vec<_>, _>>()?;
    let prev_log_id = codec::to_maybe_log_id(message.prev.as_ref());
    in_sequence(prev_log_id.as_ref(), &entries)?;
    let request = AppendEntriesRequest {
        vote,
        prev_log_id,
        entries,
        leader_commit,
    };
    Ok((request, claim))
}

/// openraft appends what it gets without looking: a hole would stay in the log.
fn in_sequence(prev: Option<&LogId>, entries: &[Entry]) -> Result<(), PeerError> {
    let mut next = prev.map_or(Some(0), |id| id.index.checked_add(1));
    for entry in entries {
        let index = entry.log_id.index;
        if next != Some(index) {
            return Err(malformed(format_args!(
                "entry {index} does not follow the one before it"
            )));
        }
        next = index.checked_add(1);
    }
    Ok(())
}

fn encode_append_reply(
    links: &Links,
    result: openraft::raft::StreamAppendResult<TypeConfig>,
    claim: Option<Claim>,
) -> Bytes {
    use wire::append_reply::Result as Outcome;
    // Of a leader that is one still.
    if let Some(claim) = claim.filter(|_| !matches!(result, Err(StreamAppendError::HigherVote(_)))) {
        if let (Some(commit), Some(echo), Some(age)) = (claim.commit, claim.echo, claim.age_ms) {
            links.freshness.heard(commit, echo, age);
        }
        if let Some(log_ms) = claim.log_ms {
            links.clock.heard(log_ms, platform::boot_ms());
        }
    }
    let result = match result {
        Ok(matched) => Outcome::Matched(wire::Matched {
            log_id: codec::maybe_log_id(matched.as_ref()),
        }),
        Err(StreamAppendError::Conflict(id)) => Outcome::Conflict(codec::log_id(&id)),
        Err(StreamAppendError::HigherVote(vote)) => Outcome::HigherVote(codec::vote(&vote)),
    };
    wire::AppendReply {
        result: Some(result),
        stamp: links.freshness.stamp(platform::boot_ms()),
    }
    .encode_to_vec()
    .into()
}
