//! openraft's network, client side: append streams, votes, snapshots and leader transfer over a
//! [`PeerTransport`].
//!
//! openraft puts no time limit on append streams and snapshots; here everything has one. The timer of a
//! stream runs only while requests are unanswered: an idle pipeline says nothing, rightly. Every failure is
//! `Unreachable`, since openraft retries other kinds at once. Invariants: a vote that cannot be asked for is
//! an error and never a grant; answers are matched to requests by order alone; nobody connects to itself.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, BoxStream, Stream, StreamExt};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption,
    RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{EmptyNode, OptionalSend, alias};
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use prost::Message;
use tokio::sync::Notify;
use wire::append_reply;

use crate::codec;
use crate::freshness::Ack;
use crate::links::Links;
use crate::machine::SnapshotData;
use crate::peer::{Bodies, Lane, Method, PeerError};
use crate::snapshot;
use crate::types::{LogId, TypeConfig, Vote};
use crate::valve::{Valve, valve};

/// How long a replication stream may leave a request unanswered before it is given up.
const REPLICATION_IDLE: Duration = Duration::from_secs(2);
/// How long setting up a stream may take.
const SETUP: Duration = Duration::from_secs(2);
/// First pause before an unreachable peer is tried again; doubles up to [`BACKOFF_MAX_MS`].
const BACKOFF_MIN_MS: u64 = 50;
/// Longest pause: a peer that came back is found within this time.
const BACKOFF_MAX_MS: u64 = 500;

type RpcError = RPCError<TypeConfig>;
type AppendResult = StreamAppendResult<TypeConfig>;

/// Makes clients for peers.
pub(crate) struct Network {
    pub(crate) links: Arc<Links>,
}

/// A client for one peer and one purpose.
pub(crate) struct Client {
    links: Arc<Links>,
    to: u64,
    lane: Lane,
}

impl Network {
    fn client(&self, to: u64, lane: Lane) -> Client {
        Client {
            links: self.links.clone(),
            to,
            lane,
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Client {
        self.client(target, Lane::Replication)
    }

    async fn new_heartbeat_client(&mut self, target: u64, _node: &EmptyNode) -> Client {
        self.client(target, Lane::Heartbeat)
    }

    async fn new_snapshot_client(&mut self, target: u64, _node: &EmptyNode) -> Client {
        self.client(target, Lane::Snapshot)
    }
}

fn gone(error: impl std::fmt::Display) -> Unreachable<TypeConfig> {
    Unreachable::from_string(error)
}

fn unreachable(error: impl std::fmt::Display) -> RpcError {
    RPCError::Unreachable(gone(error))
}

/// Requests that were handed over and have no answer yet, oldest first.
#[derive(Default)]
struct Flight {
    sent: Mutex<VecDeque<Sent>>,
    arrived: Notify,
    /// openraft has no more requests for this stream.
    complete: AtomicBool,
}

struct Sent {
    at: platform::Instant,
    boot_ms: u64,
    number: u64,
    /// The leader's term.
    term: u64,
    /// What the request says is committed, if it vouches for everything until it was sent.
    commit: Option<u64>,
}

impl Flight {
    fn push(&self, sent: Sent) {
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(sent);
        self.arrived.notify_one();
    }

    fn pop(&self) -> Option<Sent> {
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    }

    fn oldest(&self) -> Option<platform::Instant> {
        self.sent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .front()
            .map(|sent| sent.at)
    }
}

/// The index of a commit that this very leader made: older ones may hide what an earlier leader committed
/// since.
pub(crate) fn own_commit(vote: &Vote, commit: Option<&LogId>) -> Option<u64> {
    commit
        .filter(|id| id.leader_id == vote.leader_id)
        .map(|id| id.index)
}

impl Links {
    fn encode_append(&self, to: u64, request: &AppendEntriesRequest<TypeConfig>, flight: &Flight) -> Bytes {
        let now = platform::boot_ms();
        let term = request.vote.leader_id.term;
        let own = own_commit(&request.vote, request.leader_commit.as_ref());
        let (age, echo) = self.freshness.to_send(to, term, now);
        // openraft may have made the request long ago: it holds one back while a peer is unreachable, and dialling
        // takes time. What was committed and answered meanwhile is not in it, so it vouches for no moment. Looked at
        // last: nothing may be answered between this and the clock.
        let commit = own.filter(|commit| self.covers_answers(*commit));
        let quorum_age_ms = age.filter(|_| commit.is_some());
        let message = wire::AppendRequest {
            origin: Some(self.origin(to)),
            vote: Some(codec::vote(&request.vote)),
            prev: codec::maybe_log_id(request.prev_log_id.as_ref()),
            entries: request.entries.iter().map(codec::entry).collect(),
            leader_commit: codec::maybe_log_id(request.leader_commit.as_ref()),
            quorum_age_ms,
            echo,
            log_ms: Some(self.clock.now(platform::wall_ms(), now)),
        };
        let sent = Sent {
            at: platform::now(),
            boot_ms: now,
            number: self.freshness.number(),
            term,
            commit,
        };
        flight.push(sent);
        message.encode_to_vec().into()
    }

    /// Decodes an answer and notes what it says about the quorum.
    fn take_append_reply(&self, to: u64, body: Bytes, flight: &Flight) -> Result<AppendResult, PeerError> {
        let lost = |what: &str| PeerError::Lost(format!("replica {to}: {what}"));
        let reply = wire::AppendReply::decode(body).map_err(|error| lost(&error.to_string()))?;
        let sent = flight.pop().ok_or_else(|| lost("an answer without a request"))?;
        let result = match reply.result.ok_or_else(|| lost("an empty answer"))? {
            append_reply::Result::Matched(matched) => Ok(codec::to_maybe_log_id(matched.log_id.as_ref())),
            append_reply::Result::Conflict(id) => Err(StreamAppendError::Conflict(codec::to_log_id(&id))),
            append_reply::Result::HigherVote(vote) => {
                Err(StreamAppendError::HigherVote(codec::to_vote(&vote)))
            }
        };
        if !matches!(result, Err(StreamAppendError::HigherVote(_))) {
            let ack = Ack {
                term: sent.term,
                sent: sent.boot_ms,
                number: sent.number,
                commit: sent.commit,
                stamp: reply.stamp,
            };
            self.freshness
                .acknowledged(to, ack, &self.members(), self.me.replica_id, platform::boot_ms());
        }
        Ok(result)
    }
}

/// The answers of a stream, until it ends, fails, or leaves a request unanswered for `idle`.
struct Replies {
    /// Of the requests: they end with their answers.
    _open: Valve<Bytes>,
    links: Arc<Links>,
    to: u64,
    bodies: Bodies,
    flight: Arc<Flight>,
    idle: Duration,
}

impl Replies {
    async fn next_body(&mut self) -> Option<Result<Bytes, PeerError>> {
        loop {
            let expired = async {
                match self.flight.oldest() {
                    Some(at) => platform::sleep_until(at + self.idle).await,
                    None => self.flight.arrived.notified().await,
                }
            };
            tokio::select! {
                biased;
                body = self.bodies.next() => return body,
                () = expired => {
                    if self.flight.oldest().is_some_and(|at| at + self.idle <= platform::now()) {
                        return Some(Err(PeerError::Timeout(self.idle)));
                    }
                }
            }
        }
    }

    async fn next(mut self) -> Option<(Result<AppendResult, RpcError>, Option<Replies>)> {
        let Some(body) = self.next_body().await else {
            // Only our side ends a stream. openraft would open the next one at once, again and again, if the
            // other side's end looked like success.
            let complete = self.flight.complete.load(Ordering::Acquire);
            let cut = unreachable("the stream was ended by the other side");
            return (!complete).then_some((Err(cut), None));
        };
        let taken = body.and_then(|body| self.links.take_append_reply(self.to, body, &self.flight));
        match taken {
            Ok(Ok(matched)) => Some((Ok(Ok(matched)), Some(self))),
            Ok(Err(rejected)) => Some((Ok(Err(rejected)), None)),
            Err(error) => Some((Err(unreachable(error)), None)),
        }
    }
}

impl NetStreamAppend<TypeConfig> for Client {
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<AppendResult, RpcError>>, RpcError>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let (links, to, lane) = (self.links.clone(), self.to, self.lane);
        let flight = Arc::new(Flight::default());
        let idle = if lane == Lane::Heartbeat {
            option.hard_ttl()
        } else {
            REPLICATION_IDLE
        };
        Box::pin(async move {
            // openraft pauses after failures by holding back a stream's first request. Connecting before
            // asking for it would try a dead peer again at once, for ever.
            let mut input = input;
            let Some(first) = input.next().await else {
                return Ok(stream::empty().boxed() as BoxStream<'s, _>);
            };
            let input = stream::iter([first]).chain(input);
            let requests = {
                let (links, flight) = (links.clone(), flight.clone());
                let complete = flight.clone();
                let end = stream::poll_fn(move |_| {
                    complete.complete.store(true, Ordering::Release);
                    Poll::Ready(None)
                });
                input
                    .map(move |request| links.encode_append(to, &request, &flight))
                    .chain(end)
                    .boxed()
            };
            let (open, requests) = valve(requests);
            let opened = links.transport.stream(to, lane, requests.boxed());
            let bodies = match platform::timeout(SETUP, opened).await {
                Ok(Ok(bodies)) => bodies,
                Ok(Err(error)) => return Err(unreachable(error)),
                Err(_) => return Err(unreachable(PeerError::Timeout(SETUP))),
            };
            let replies = Replies {
                _open: open,
                links,
                to,
                bodies,
                flight,
                idle,
            };
            let answers = stream::unfold(Some(replies), |replies| async move { replies?.next().await });
            Ok(answers.boxed() as BoxStream<'s, _>)
        })
    }
}

impl Client {
    async fn ask(
        &self,
        method: Method,
        body: wire::request::Body,
        option: &RPCOption,
    ) -> Result<wire::response::Body, RpcError> {
        self.links
            .call(self.to, method, body, option.hard_ttl())
            .await
            .map_err(unreachable)
    }

    async fn ask_vote(
        &self,
        method: Method,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        let message = wire::VoteRequest {
            vote: Some(codec::vote(&request.vote)),
            last: codec::maybe_log_id(request.last_log_id.as_ref()),
            leadership_transfer: request.leadership_transfer,
        };
        let body = match method {
            Method::PreVote => wire::request::Body::PreVote(message),
            _ => wire::request::Body::Vote(message),
        };
        let wire::response::Body::Vote(answer) = self.ask(method, body, &option).await? else {
            return Err(unreachable("the answer to a vote request is none"));
        };
        let vote = codec::need_vote(answer.vote.as_ref()).map_err(unreachable)?;
        Ok(VoteResponse::new(
            vote,
            codec::to_maybe_log_id(answer.last.as_ref()),
            answer.granted,
        ))
    }
}

impl NetVote<TypeConfig> for Client {
    async fn vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        self.ask_vote(Method::Vote, request, option).await
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RpcError> {
        self.ask_vote(Method::PreVote, request, option).await
    }
}

impl NetTransferLeader<TypeConfig> for Client {
    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RpcError> {
        let body = wire::request::Body::Transfer(wire::TransferRequest {
            from_leader: Some(codec::vote(request.from_leader())),
            to: *request.to_node_id(),
            last: codec::maybe_log_id(request.last_log_id()),
        });
        match self.ask(Method::Transfer, body, &option).await? {
            wire::response::Body::Transfer(answer) if answer.refused.is_empty() => Ok(Ok(())),
            // Whatever the reason: nobody took over, and openraft does no more than log it.
            wire::response::Body::Transfer(answer) => Err(unreachable(answer.refused)),
            _ => Err(unreachable("the answer to a leader transfer is none")),
        }
    }
}

/// When the receiver last took a frame.
struct Progress(Mutex<platform::Instant>);

impl Progress {
    fn touch(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = platform::now();
    }

    async fn stalled(&self, limit: Duration) {
        loop {
            let end = *self.0.lock().unwrap_or_else(PoisonError::into_inner) + limit;
            if end <= platform::now() {
                return;
            }
            platform::sleep_until(end).await;
        }
    }
}

impl NetSnapshot<TypeConfig> for Client {
    type SnapshotData = SnapshotData;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: alias::SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let failed = |error: &dyn std::fmt::Display| StreamingError::Unreachable(gone(error));
        let SnapshotData::Pinned(view, generation) = snapshot.snapshot else {
            return Err(failed(&"the snapshot is not a view that can be sent"));
        };
        let header = wire::SnapshotHeader {
            origin: Some(self.links.origin(self.to)),
            vote: Some(codec::vote(&vote)),
            meta: Some(codec::snapshot_meta(&snapshot.meta)),
            format: snapshot::FORMAT,
        };
        let progress = Arc::new(Progress(Mutex::new(platform::now())));
        let taken = progress.clone();
        let frames = snapshot::frames(header, view, generation)
            .inspect(move |_| taken.touch())
            .boxed();
        let answer = tokio::select! {
            biased;
            answer = self.links.transport.snapshot(self.to, frames) => answer,
            closed = cancel => return Err(StreamingError::Closed(closed)),
            () = progress.stalled(option.hard_ttl()) => Err(PeerError::Timeout(option.hard_ttl())),
        };
        let reply = answer
            .and_then(|body| {
                wire::SnapshotReply::decode(body).map_err(|error| PeerError::Lost(error.to_string()))
            })
            .map_err(|error| failed(&error))?;
        let vote = codec::need_vote(reply.vote.as_ref()).map_err(|error| failed(&error))?;
        Ok(SnapshotResponse::new(vote))
    }
}

impl NetBackoff<TypeConfig> for Client {
    fn backoff(&self) -> Option<Backoff> {
        let pauses = std::iter::successors(Some(BACKOFF_MIN_MS), |ms| Some((ms * 2).min(BACKOFF_MAX_MS)));
        // Half of it at random: replicas that lost each other must not all come back in step.
        let jittered = pauses.map(|ms| Duration::from_millis(ms / 2 + platform::random_below(ms / 2 + 1)));
        Some(Backoff::new(jittered))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use palyra_state::Id;
    use tokio::sync::watch;

    use super::*;
    use crate::meta::Identity;
    use crate::types::{LeaderId, Membership};

    #[test]
    fn a_request_that_was_held_back_vouches_for_no_moment() {
        let (applied, watched) = watch::channel(5);
        let me = Identity {
            cluster_id: Id::from_bytes([7; 16]),
            replica_id: 1,
        };
        let links = Links::new(
            me,
            crate::testing::Bus::new().transport(1),
            watched,
            Arc::default(),
        );
        let leader_id = LeaderId { term: 1, node_id: 1 };
        let three = Membership::new_with_defaults(vec![[1, 2, 3].into()], []);
        let now = platform::boot_ms();
        let ack = Ack {
            term: 1,
            sent: now,
            number: 1,
            commit: Some(5),
            stamp: 77,
        };
        links.freshness.acknowledged(2, ack, &three, 1, now);
        let request = AppendEntriesRequest {
            vote: Vote {
                leader_id,
                committed: true,
            },
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: Some(LogId::new(leader_id, 5)),
        };
        let flight = Flight::default();
        let send = || {
            let body = links.encode_append(2, &request, &flight);
            let message = wire::AppendRequest::decode(body).unwrap();
            assert_eq!(message.echo, Some(77));
            (message.quorum_age_ms.is_some(), flight.pop().unwrap().commit)
        };
        assert_eq!(send(), (true, Some(5)));
        // Another entry was committed and answered meanwhile; a quorum stands behind that, and this request hides it.
        applied.send_replace(6);
        assert_eq!(send(), (false, None));
    }
}
