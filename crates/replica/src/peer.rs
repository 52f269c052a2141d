//! The seam between Raft and whatever carries bytes between replicas.
//!
//! In production that is `transport` (gRPC over mTLS), in simulation a message bus. Bodies are opaque here:
//! what is in them, and every check of them, belongs to `network` and `service`. Invariant for
//! implementations: an answer comes from the replica that was addressed, the service is told who really
//! called, streams keep their order, and what was never handed over is reported as
//! [`PeerError::Unreachable`], never as a guess.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

/// Bodies that the other side sends.
pub type Bodies = BoxStream<'static, Result<Bytes, PeerError>>;

/// What a connection is for; each has its own, so that bulk never delays heartbeats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lane {
    /// Log entries.
    Replication,
    /// One empty request and its answer.
    Heartbeat,
    /// Snapshots.
    Snapshot,
    /// Single calls.
    Call,
    /// Commands for the leader.
    Forward,
}

/// What a single call is for: for counting and tracing; the body says it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Method {
    /// A request for a vote.
    Vote,
    /// A question whether a vote would be granted.
    PreVote,
    /// A leader hands over.
    Transfer,
    /// A forwarded command.
    Propose,
    /// Up to where a linearizable read must wait.
    ReadIndex,
    /// A call of the layer above.
    Application,
}

/// Why a replica refuses to talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The caller belongs to another cluster.
    WrongCluster,
    /// The call was meant for another replica.
    WrongReplica,
    /// The caller claims to be another replica than its certificate says.
    Impostor,
    /// The body cannot be decoded.
    Malformed,
    /// The replica is stopping.
    Stopped,
    /// The layer above has no answer to this.
    Unsupported,
    /// The caller is no member any more.
    Removed,
}

impl Refusal {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Refusal::WrongCluster => "wrong_cluster",
            Refusal::WrongReplica => "wrong_replica",
            Refusal::Impostor => "impostor",
            Refusal::Malformed => "malformed",
            Refusal::Stopped => "stopped",
            Refusal::Unsupported => "unsupported",
            Refusal::Removed => "removed",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why there is no answer from another replica.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The request never reached it: nothing happened there.
    #[error("unreachable: {0}")]
    Unreachable(String),
    /// The request was sent and the answer is lost: what happened there is not known.
    #[error("the answer is lost: {0}")]
    Lost(String),
    /// No answer came in time: what happened there is not known.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// It answered that it will not; nothing happened there.
    #[error("refused ({refusal}): {message}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// The whole story.
        message: String,
    },
}

impl PeerError {
    pub(crate) fn refused(refusal: Refusal, message: impl fmt::Display) -> PeerError {
        PeerError::Refused {
            refusal,
            message: message.to_string(),
        }
    }
}

/// Carries bodies to other replicas.
pub trait PeerTransport: Send + Sync + 'static {
    /// One request, one answer within `timeout`.
    fn call(
        &self,
        to: u64,
        method: Method,
        body: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>>;

    /// A stream of requests and the stream of answers: of AppendEntries, in order, or on [`Lane::Forward`] of commands.
    /// Ends when either side ends it. A replica that is older than [`Lane::Forward`] refuses it as
    /// [`Refusal::Unsupported`].
    fn stream(
        &self,
        to: u64,
        lane: Lane,
        requests: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bodies, PeerError>>;

    /// A stream of frames and the one answer after the last.
    fn snapshot(
        &self,
        to: u64,
        frames: BoxStream<'static, Bytes>,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>>;
}

/// The layer above, for what other replicas ask on behalf of theirs: answers their calls
/// ([`crate::Replica::call_peer`]), and knows who has been removed.
pub trait PeerHandler: Send + Sync + 'static {
    /// Whether commands and calls of the replica `from` are taken. Raft's own messages do not ask: a leader that was
    /// removed still has to hand over.
    fn admits(&self, from: u64) -> bool {
        let _ = from;
        true
    }

    /// The answer to a call from the replica `from`.
    fn handle(&self, from: u64, topic: String, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>>;
}
