//! What both directions of the peer protocol share: who we are, the transport, and the check of each
//! message's origin.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use openraft::async_runtime::watch::WatchReceiver;
use palyra_proto::peer::v1 as wire;
use prost::Message;
use tokio::sync::watch;

use crate::freshness::Freshness;
use crate::log_clock::LogClock;
use crate::meta::Identity;
use crate::peer::{Method, PeerError, PeerTransport, Refusal};
use crate::types::{Membership, Metrics, TypeConfig};

/// Raft's metrics as they change.
pub(crate) type MetricsReceiver = openraft::alias::WatchReceiverOf<TypeConfig, Metrics>;

/// Shared by the network client, the peer service and the replica. Holds no Raft: Raft holds this.
pub(crate) struct Links {
    pub(crate) me: Identity,
    pub(crate) transport: Arc<dyn PeerTransport>,
    pub(crate) freshness: Freshness,
    pub(crate) clock: Arc<LogClock>,
    /// Index of the last entry that is applied here.
    applied: watch::Receiver<u64>,
    metrics: OnceLock<MetricsReceiver>,
}

impl Links {
    pub(crate) fn new(
        me: Identity,
        transport: Arc<dyn PeerTransport>,
        applied: watch::Receiver<u64>,
        clock: Arc<LogClock>,
    ) -> Links {
        Links {
            me,
            transport,
            freshness: Freshness::new(),
            clock,
            applied,
            metrics: OnceLock::new(),
        }
    }

    /// Once Raft is there.
    pub(crate) fn connect(&self, metrics: MetricsReceiver) {
        // Set once, right after Raft is built; a second call would bring the same receiver.
        let _ = self.metrics.set(metrics);
    }

    /// The members as this replica has them.
    pub(crate) fn members(&self) -> Membership {
        // Cloned at once: a held reference would block Raft's core.
        let stored = self
            .metrics
            .get()
            .map(|metrics| metrics.borrow_watched().membership_config.clone());
        stored
            .map(|stored| stored.membership().clone())
            .unwrap_or_default()
    }

    /// Whether everything that was answered to anybody so far lies at or below `commit`.
    pub(crate) fn covers_answers(&self, commit: u64) -> bool {
        commit >= *self.applied.borrow()
    }

    pub(crate) fn origin(&self, to: u64) -> wire::Origin {
        wire::Origin {
            cluster_id: Bytes::copy_from_slice(&self.me.cluster_id.to_bytes()),
            from: self.me.replica_id,
            to,
        }
    }

    /// Checks that a message of our cluster, from who the transport says, is meant for us.
    pub(crate) fn check(&self, from: u64, origin: Option<&wire::Origin>) -> Result<(), PeerError> {
        let Some(origin) = origin else {
            return Err(PeerError::refused(
                Refusal::Malformed,
                "the message does not say where it comes from",
            ));
        };
        if origin.cluster_id[..] != self.me.cluster_id.to_bytes() {
            let theirs = palyra_state::Id::from_slice(&origin.cluster_id)
                .map_or_else(|| "no id".to_owned(), |id| id.to_string());
            return Err(PeerError::refused(
                Refusal::WrongCluster,
                format_args!(
                    "replica {} speaks for cluster {theirs}, this is {}",
                    origin.from, self.me
                ),
            ));
        }
        if origin.to != self.me.replica_id {
            return Err(PeerError::refused(
                Refusal::WrongReplica,
                format_args!("the message is for replica {}, this is {}", origin.to, self.me),
            ));
        }
        if origin.from != from || from == self.me.replica_id {
            return Err(PeerError::refused(
                Refusal::Impostor,
                format_args!(
                    "the message says it comes from replica {}, its certificate from {from}",
                    origin.from
                ),
            ));
        }
        Ok(())
    }

    /// Checks that a vote that must be the sender's own is.
    pub(crate) fn check_vote(from: u64, vote: &crate::types::Vote) -> Result<(), PeerError> {
        if vote.leader_id.node_id == from {
            return Ok(());
        }
        Err(PeerError::refused(
            Refusal::Impostor,
            format_args!("replica {from} sent a vote of replica {}", vote.leader_id.node_id),
        ))
    }

    /// One call to another replica.
    pub(crate) async fn call(
        &self,
        to: u64,
        method: Method,
        body: wire::request::Body,
        timeout: Duration,
    ) -> Result<wire::response::Body, PeerError> {
        if to == self.me.replica_id {
            return Err(PeerError::Unreachable(
                "a replica does not call itself".to_owned(),
            ));
        }
        let request = wire::Request {
            origin: Some(self.origin(to)),
            body: Some(body),
        };
        let answer = self
            .transport
            .call(to, method, request.encode_to_vec().into(), timeout)
            .await?;
        wire::Response::decode(answer)
            .ok()
            .and_then(|response| response.body)
            .ok_or_else(|| PeerError::Lost(format!("the answer of replica {to} cannot be understood")))
    }
}
