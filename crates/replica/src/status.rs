//! What a replica says about itself: for `cluster status`, metrics, health and the reconcilers.

use std::collections::BTreeSet;
use std::time::Duration;

use openraft::{Instant, ServerState};
use palyra_platform as platform;
use palyra_state::Digest;

use crate::core::Core;
use crate::types::{LogId, Metrics};
use crate::view::View;

/// What a replica does in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Takes commands.
    Leader,
    /// Votes and follows.
    Follower,
    /// Stands for election.
    Candidate,
    /// Follows without a vote.
    Learner,
    /// Raft has ended here.
    Stopped,
}

impl Role {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Leader => "leader",
            Role::Follower => "follower",
            Role::Candidate => "candidate",
            Role::Learner => "learner",
            Role::Stopped => "stopped",
        }
    }
}

impl From<ServerState> for Role {
    fn from(state: ServerState) -> Self {
        match state {
            ServerState::Leader => Role::Leader,
            ServerState::Follower => Role::Follower,
            ServerState::Candidate => Role::Candidate,
            ServerState::Learner => Role::Learner,
            ServerState::Shutdown => Role::Stopped,
        }
    }
}

/// Who takes part, as this replica has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// Replicas with a vote.
    pub voters: BTreeSet<u64>,
    /// Replicas that get the log and have no vote.
    pub learners: BTreeSet<u64>,
    /// A change is under way, or was left half done.
    pub joint: bool,
}

/// A peer as the leader sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Replica id.
    pub id: u64,
    /// The last entry that it is known to have.
    pub matched: Option<u64>,
    /// Since it last answered; `None` when it never did.
    pub silent_for: Option<Duration>,
}

/// A replica at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Replica id.
    pub id: u64,
    /// What it does.
    pub role: Role,
    /// Raft term.
    pub term: u64,
    /// The leader that it knows.
    pub leader: Option<u64>,
    /// Index of its last log entry.
    pub last_log: u64,
    /// Index of the last entry that it knows to be committed.
    pub committed: u64,
    /// Index of the last entry that it has applied.
    pub applied: u64,
    /// Hash of the state at `applied`: equal on all replicas at equal index.
    pub state_hash: Digest,
    /// Who takes part.
    pub members: Members,
    /// All others, on the leader only.
    pub peers: Vec<Peer>,
    /// Index that the last snapshot covers.
    pub snapshot: u64,
    /// Index up to which the log is purged.
    pub purged: u64,
    /// Since a quorum last stood behind what is applied here; `None` before the first contact.
    pub quorum_age: Option<Duration>,
}

fn index(id: Option<&LogId>) -> u64 {
    id.map_or(0, |id| id.index)
}

impl Core {
    pub(crate) fn status(&self) -> Status {
        let metrics = self.metrics();
        let view = View::pin(&**self.machine.engine());
        Status {
            id: self.me(),
            role: metrics.state.into(),
            term: metrics.current_term,
            leader: self.leader_hint(),
            last_log: metrics.last_log_index.unwrap_or(0),
            committed: index(metrics.local_committed.as_ref()),
            applied: view.index(),
            state_hash: palyra_state::state_hash(&view),
            members: members(&metrics),
            peers: peers(&metrics, self.me()),
            snapshot: index(metrics.snapshot.as_ref()),
            purged: index(metrics.purged.as_ref()),
            quorum_age: self.quorum_age(),
        }
    }

    pub(crate) fn quorum_age(&self) -> Option<Duration> {
        let now = platform::boot_ms();
        let metrics = self.raft.metrics();
        let alone = {
            use openraft::async_runtime::watch::WatchReceiver;
            let metrics = metrics.borrow_watched();
            // Planted: a leader takes its own word for a quorum's.
            let believed = palyra_fault::planted("leader-always-fresh");
            metrics.state == ServerState::Leader
                && (believed || metrics.membership_config.voter_ids().eq([self.me()]))
        };
        if alone {
            self.links.freshness.alone(now);
        }
        let applied = *self.machine.watch().borrow();
        self.links.freshness.age(applied, now)
    }
}

fn members(metrics: &Metrics) -> Members {
    let membership = metrics.membership_config.membership();
    Members {
        voters: membership.voter_ids().collect(),
        learners: membership.learner_ids().collect(),
        joint: membership.get_joint_config().len() > 1,
    }
}

fn peers(metrics: &Metrics, me: u64) -> Vec<Peer> {
    let Some(replication) = &metrics.replication else {
        return Vec::new();
    };
    let heartbeat = metrics.heartbeat.as_ref();
    let others = replication.iter().filter(|(id, _)| **id != me);
    others
        .map(|(id, matched)| Peer {
            id: *id,
            matched: matched.as_ref().map(|id| id.index),
            silent_for: heartbeat
                .and_then(|times| times.get(id))
                .and_then(|at| at.as_ref().map(|at| at.elapsed())),
        })
        .collect()
}
