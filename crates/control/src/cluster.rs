//! The cluster itself: how it is, who leads.
//!
//! Invariant: a status works without a quorum and says so; a replica that does not answer is shown, not left
//! out.

use std::time::Duration;

use futures::future::join_all;
use palyra_platform as platform;
use palyra_state::cluster::{self, Replica as Record, ReplicaStatus};
use palyra_state::identity;
use palyra_state::{Read, dispatch, nodes, pairing};

use crate::caller::millis;
use crate::control::{Control, ReadInfo};
use crate::error::Error;
use crate::peers::{Answer, AskStatus, Call, HandOver, OwnStatus};
use crate::workers::renewals::RenewalCounts;

/// How long a status waits for another replica's word.
const STATUS_TIMEOUT: Duration = Duration::from_millis(1_000);

/// How the cluster is.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterStatus {
    /// The replica that leads, if any.
    pub leader_id: Option<u64>,
    /// Raft term, as the answering replica has it.
    pub term: u64,
    /// What every replica understands.
    pub feature_level: u32,
    /// Replicas with a vote.
    pub voters: u32,
    /// How many more voters may be lost now: reachable ones beyond a majority.
    pub failures_tolerated: u32,
    /// All replicas that are not removed.
    pub replicas: Vec<ReplicaView>,
    /// Counters of the fleet.
    pub fleet: FleetCounts,
    /// What an operator should see to, with the code of the page that explains it.
    pub warnings: Vec<String>,
    /// How fresh it is.
    pub read: ReadInfo,
}

/// Counters of the fleet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FleetCounts {
    /// Registered nodes.
    pub nodes: u64,
    /// Those that are online.
    pub online: u64,
    /// Those whose session ended, and that may come back any moment.
    pub suspect: u64,
    /// Those that were offline for longer than they may be.
    pub gone: u64,
    /// Pairing requests that wait for an operator.
    pub pending_approvals: u64,
    /// Dispatches that have not ended.
    pub open_dispatches: u64,
}

/// One replica.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaView {
    /// The record.
    pub record: Record,
    /// Whether it answered in time.
    pub reachable: bool,
    /// `leader`, `follower`, `learner`, `candidate`; `unreachable` when it did not answer.
    pub role: String,
    /// Last entry of its log.
    pub last_log_index: u64,
    /// Last entry that it applied.
    pub applied_index: u64,
    /// Last entry in its newest snapshot.
    pub snapshot_index: u64,
    /// Since it last had contact with a quorum.
    pub contact_age_ms: u64,
    /// Version of its binary.
    pub version: String,
    /// Hash of its state at `applied_index`, hexadecimal.
    pub state_hash: String,
    /// Difference of its wall clock from the answering replica's.
    pub clock_skew_ms: u64,
    /// Sessions of nodes that it holds.
    pub sessions: u64,
    /// The `max_staleness` by which it serves.
    pub max_staleness_ms: u64,
    /// It is about to stop and takes no sessions.
    pub draining: bool,
    /// Nodes that wait there to be attached.
    pub attaches_waiting: u64,
    /// What came of renewals of leases there.
    pub renewals: RenewalCounts,
    /// End of its certificate.
    pub certificate_not_after_ms: u64,
}

impl Control {
    /// How the cluster is, as far as this replica can tell. Needs no quorum.
    ///
    /// # Errors
    /// [`Error::Unavailable`] before the cluster is born.
    pub async fn cluster_status(&self) -> Result<ClusterStatus, Error> {
        let view = self.replica().view();
        let feature_level = cluster::cluster(&view)
            .ok_or(Error::Unavailable { leader_hint: None })?
            .feature_level;
        let members = cluster::replicas(&view)
            .into_iter()
            .filter(|r| r.status() != ReplicaStatus::Removed);
        let replicas = join_all(members.map(|record| self.replica_view(record))).await;
        let status = self.replica().status();
        let voters: Vec<&ReplicaView> = replicas
            .iter()
            .filter(|replica| replica.record.status() == ReplicaStatus::Voter)
            .collect();
        let reachable = voters.iter().filter(|replica| replica.reachable).count();
        let majority = voters.len() / 2 + 1;
        Ok(ClusterStatus {
            leader_id: status.leader,
            term: status.term,
            feature_level,
            voters: count(voters.len()),
            failures_tolerated: count(reachable.saturating_sub(majority)),
            fleet: fleet(&view),
            warnings: self
                .staleness_warning(&view)
                .map(|warning| format!("{}: {warning}; {}", warning.code(), warning.next()))
                .into_iter()
                .collect(),
            read: self.read_info(view.index()),
            replicas,
        })
    }

    async fn replica_view(&self, record: Record) -> ReplicaView {
        let answer = if record.id == self.replica_id() {
            Some(self.own_status())
        } else {
            let asked = self.call_peer(record.id, Call::Status(AskStatus {}), STATUS_TIMEOUT);
            match platform::timeout(STATUS_TIMEOUT, asked).await {
                Ok(Ok(Answer::Status(status))) => Some(status),
                _ => None,
            }
        };
        let reachable = answer.is_some();
        let status = answer.unwrap_or_else(|| OwnStatus {
            role: "unreachable".to_owned(),
            wall_ms: platform::wall_ms(),
            ..OwnStatus::default()
        });
        let certificate = identity::certificate_by_fingerprint(&self.replica().view(), record.certificate);
        ReplicaView {
            reachable,
            role: status.role,
            last_log_index: status.last_log_index,
            applied_index: status.applied_index,
            snapshot_index: status.snapshot_index,
            contact_age_ms: status.contact_age_ms,
            version: status.version,
            state_hash: status.state_hash,
            clock_skew_ms: status.wall_ms.abs_diff(platform::wall_ms()),
            sessions: status.sessions,
            max_staleness_ms: status.max_staleness_ms,
            draining: status.draining,
            attaches_waiting: status.attaches_waiting,
            renewals: RenewalCounts {
                entries: status.renewal_entries,
                renewed: status.leases_renewed,
                refused: status.renewals_refused,
            },
            certificate_not_after_ms: match record.certificate_not_after {
                0 => certificate.map_or(0, |certificate| certificate.not_after),
                said => said,
            },
            record,
        }
    }

    /// What this replica says of itself.
    pub(crate) fn own_status(&self) -> OwnStatus {
        let status = self.replica().status();
        let renewals = self.renewal_counts();
        OwnStatus {
            role: status.role.as_str().to_owned(),
            last_log_index: status.last_log,
            applied_index: status.applied,
            snapshot_index: status.snapshot,
            contact_age_ms: millis(self.quorum_age()),
            version: self.version().to_owned(),
            state_hash: status.state_hash.to_string(),
            wall_ms: platform::wall_ms(),
            sessions: self.registry().count() as u64,
            max_staleness_ms: millis(self.staleness()),
            draining: self.is_draining(),
            attaches_waiting: self.admission().waiting() as u64,
            renewal_entries: renewals.entries,
            leases_renewed: renewals.renewed,
            renewals_refused: renewals.refused,
        }
    }

    /// Hands the leadership over; `to` 0 means the best caught-up voter. Answers who leads then.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when nobody took over in time.
    pub async fn transfer_leader(&self, to: u64) -> Result<u64, Error> {
        self.hand_over(to).await?;
        // The old leader is gone; who came instead is known once it has committed something.
        self.barrier().await?;
        self.replica()
            .leader()
            .ok_or(Error::Unavailable { leader_hint: None })
    }

    /// Hands over, or has the leader do it.
    async fn hand_over(&self, to: u64) -> Result<(), Error> {
        let leader = self
            .replica()
            .leader()
            .ok_or(Error::Unavailable { leader_hint: None })?;
        if leader == self.replica_id() {
            return self.hand_over_here(to).await;
        }
        let call = Call::HandOver(HandOver { to });
        match self.call_peer(leader, call, self.timings().call_timeout).await {
            Ok(Answer::HandedOver(answer)) if answer.problem.is_empty() => Ok(()),
            Ok(Answer::HandedOver(answer)) => Err(no_hand_over(answer.problem)),
            Ok(_) | Err(_) => Err(Error::Unavailable {
                leader_hint: Some(leader),
            }),
        }
    }

    /// Hands over; this replica leads.
    pub(crate) async fn hand_over_here(&self, to: u64) -> Result<(), Error> {
        let target = (to != 0).then_some(to);
        self.replica()
            .transfer_leader(target)
            .await
            .map_err(|error| no_hand_over(error.to_string()))
    }

    /// Asks for a snapshot of this replica's state now, and does not wait for it. Answers the index that it
    /// will hold at least.
    pub async fn trigger_snapshot(&self) -> u64 {
        let index = self.replica().view().index();
        self.replica().trigger_snapshot().await;
        index
    }
}

fn no_hand_over(problem: String) -> Error {
    Error::invalid(
        "to",
        problem,
        "name a voter that is up: palyra cluster status shows them",
    )
}

fn fleet(view: &dyn Read) -> FleetCounts {
    let totals = nodes::totals(view);
    FleetCounts {
        nodes: totals.nodes,
        online: totals.online,
        suspect: totals.suspect,
        gone: totals.gone,
        pending_approvals: pairing::pending(view, platform::wall_ms()).len() as u64,
        open_dispatches: dispatch::totals(view).open,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
