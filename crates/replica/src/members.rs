//! Who takes part: initialisation, learners, promotion, removal, leader transfer, and the end of half-done
//! changes.
//!
//! openraft leaves a joint configuration standing when a leader dies between its two steps, and lets two
//! changes interleave; so each change here is conditional on the membership that it was computed from, and
//! whoever leads flattens what it finds. All of it runs on the leader; elsewhere it is refused with the
//! leader's id.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, InitializeError, RaftError};
use openraft::{ChangeMembers, EmptyNode, Precondition, ServerState};
use palyra_platform as platform;

use crate::core::Core;
use crate::types::{Metrics, TypeConfig};

/// Limit for one change of the membership.
const CHANGE: Duration = Duration::from_secs(10);
/// How long a leader that stops waits for its successor.
pub(crate) const HAND_OVER: Duration = Duration::from_secs(2);
/// How often it looks whether there is one.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

type Change = ChangeMembers<u64, EmptyNode>;

/// Why a change of the membership did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// Only the leader changes the membership.
    #[error("this replica does not lead; ask the leader")]
    NotLeader {
        /// The leader that this replica knows.
        leader_hint: Option<u64>,
    },
    /// Another change is under way, or came first.
    #[error("the membership is being changed by somebody else ({0}); look at it and try again")]
    Busy(String),
    /// The change makes no sense.
    #[error("{0}")]
    Impossible(String),
    /// Perhaps it happened.
    #[error("the outcome of the membership change is not known; look at the membership")]
    Unknown,
}

impl Core {
    /// Makes this replica the first of a new cluster. Harmless when that happened before.
    pub(crate) async fn initialize(&self) -> Result<(), MemberError> {
        let alone = BTreeMap::from([(self.me(), EmptyNode {})]);
        match self.raft.initialize(alone).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {
                if self
                    .metrics()
                    .membership_config
                    .membership()
                    .nodes()
                    .next()
                    .is_some()
                {
                    return Ok(());
                }
                Err(MemberError::Impossible(
                    "the log is not empty, but holds no membership".to_owned(),
                ))
            }
            Err(RaftError::APIError(InitializeError::NotInMembers(error))) => {
                Err(MemberError::Impossible(error.to_string()))
            }
            Err(RaftError::Fatal(fatal)) => {
                self.raft_died(&fatal);
                Err(MemberError::Unknown)
            }
        }
    }

    /// Adds a replica that gets the log and has no vote. Does not wait for it to catch up.
    pub(crate) async fn add_learner(&self, id: u64) -> Result<(), MemberError> {
        if self
            .metrics()
            .membership_config
            .membership()
            .get_node(&id)
            .is_some()
        {
            return Ok(());
        }
        self.change(
            ChangeMembers::AddNodes(BTreeMap::from([(id, EmptyNode {})])),
            true,
        )
        .await
    }

    /// Gives a learner a vote.
    pub(crate) async fn promote(&self, id: u64) -> Result<(), MemberError> {
        let metrics = self.metrics();
        let members = metrics.membership_config.membership();
        if members.get_node(&id).is_none() {
            return Err(MemberError::Impossible(format!(
                "replica {id} is no learner; add it first"
            )));
        }
        if members.get_joint_config().len() == 1 && members.voter_ids().any(|voter| voter == id) {
            return Ok(());
        }
        self.change(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true)
            .await
    }

    /// Takes a replica's vote and leaves it in the group. A leader's own is only taken after it handed over.
    pub(crate) async fn demote(&self, id: u64) -> Result<(), MemberError> {
        let metrics = self.metrics();
        let members = metrics.membership_config.membership();
        if id == self.me() {
            return Err(MemberError::Impossible(
                "the leader does not take its own vote; transfer leadership first".into(),
            ));
        }
        if members.get_joint_config().len() == 1 && !members.voter_ids().any(|voter| voter == id) {
            return Ok(());
        }
        self.change(ChangeMembers::RemoveVoters(BTreeSet::from([id])), true)
            .await
    }

    /// Takes a replica out, voter or learner. A leader removes itself only by handing over first.
    pub(crate) async fn remove(&self, id: u64) -> Result<(), MemberError> {
        let metrics = self.metrics();
        let members = metrics.membership_config.membership();
        if members.get_node(&id).is_none() {
            return Ok(());
        }
        if id == self.me() && metrics.state == ServerState::Leader {
            return Err(MemberError::Impossible(
                "the leader does not remove itself; transfer leadership first".into(),
            ));
        }
        let change = if members.voter_ids().any(|voter| voter == id) {
            if members.voter_ids().count() == 1 {
                return Err(MemberError::Impossible(format!("replica {id} is the only voter")));
            }
            ChangeMembers::RemoveVoters(BTreeSet::from([id]))
        } else {
            ChangeMembers::RemoveNodes(BTreeSet::from([id]))
        };
        self.change(change, false).await
    }

    /// Ends a change that an earlier leader left half done. True when there was one.
    pub(crate) async fn flatten(&self) -> Result<bool, MemberError> {
        if self.metrics().membership_config.get_joint_config().len() < 2 {
            return Ok(false);
        }
        self.change(ChangeMembers::AddVoterIds(BTreeSet::new()), true)
            .await
            .map(|()| true)
    }

    async fn change(&self, change: Change, retain: bool) -> Result<(), MemberError> {
        let seen = *self.metrics().membership_config.log_id();
        let condition: Precondition<TypeConfig> = Precondition::LastMembershipLogId {
            last_membership_log_id: seen,
        };
        platform::io_point("members.change").await;
        let changed = self.raft.change_membership_if(change, retain, [condition]);
        let Ok(result) = platform::timeout(CHANGE, changed).await else {
            return Err(MemberError::Unknown);
        };
        platform::io_point("members.changed").await;
        match result {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => Err(MemberError::NotLeader {
                leader_hint: to.leader_id.filter(|leader| *leader != self.me()),
            }),
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(MemberError::Unknown),
            Err(RaftError::APIError(ClientWriteError::PreconditionFailed(error))) => {
                Err(MemberError::Busy(error.to_string()))
            }
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                error @ openraft::errors::ChangeMembershipError::InProgress(_),
            ))) => Err(MemberError::Busy(error.to_string())),
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(error))) => {
                Err(MemberError::Impossible(error.to_string()))
            }
            Err(RaftError::Fatal(fatal)) => {
                self.raft_died(&fatal);
                Err(MemberError::Unknown)
            }
        }
    }

    /// Hands leadership to `to`, or to the voter that has most of the log, and waits until somebody else
    /// leads.
    pub(crate) async fn transfer_leader(&self, to: Option<u64>, limit: Duration) -> Result<(), MemberError> {
        let metrics = self.metrics();
        if metrics.state != ServerState::Leader {
            return Err(MemberError::NotLeader {
                leader_hint: metrics.current_leader,
            });
        }
        let voters: BTreeSet<u64> = metrics
            .membership_config
            .voter_ids()
            .filter(|id| *id != self.me())
            .collect();
        let target = match to {
            Some(id) if voters.contains(&id) => id,
            Some(id) => return Err(MemberError::Impossible(format!("replica {id} is no other voter"))),
            None => furthest(&metrics, &voters)
                .ok_or_else(|| MemberError::Impossible("there is no other voter".to_owned()))?,
        };
        if let Err(fatal) = self.raft.trigger().transfer_leader(target).await {
            self.raft_died(&fatal);
            return Err(MemberError::Unknown);
        }
        let end = platform::now() + limit;
        while self.raft.server_metrics().borrow_watched().state == ServerState::Leader {
            let left = end.saturating_duration_since(platform::now());
            if left.is_zero() {
                return Err(MemberError::Busy(format!(
                    "replica {target} did not take over in time"
                )));
            }
            // Bounded: what changes just before the wait begins wakes nobody.
            self.changed(left.min(LOOK_AGAIN)).await;
        }
        Ok(())
    }
}

/// The voter that has most of the log.
fn furthest(metrics: &Metrics, voters: &BTreeSet<u64>) -> Option<u64> {
    let replication = metrics.replication.as_ref()?;
    voters.iter().copied().max_by_key(|id| {
        replication
            .get(id)
            .and_then(|matched| matched.as_ref().map(|id| id.index))
    })
}
