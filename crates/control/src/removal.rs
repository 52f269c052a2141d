//! A replica is removed for good: first it loses its vote, then its record ends, then it leaves the group.
//!
//! In this order, because a replica whose record has ended takes part no more: it stops by itself, and nobody sends it
//! anything. Were it still counted, its vote would be missing from every majority, the one that decides on its removal
//! included; with another voter down, the cluster would stand still for good.
//!
//! What never lives here: the last step, which is the leader's reconciler's. Invariants: the record ends only after the
//! group has decided that the replica has no vote; a removal that was broken off leaves a learner, which the reconciler
//! makes a voter again.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_replica::{PeerError, Refusal as PeerRefusal};
use palyra_state::cluster::{RemoveReplica, ReplicaStatus};

use crate::caller::Caller;
use crate::cluster::ReplicaView;
use crate::control::{Control, WriteInfo};
use crate::error::{Error, Refusal};
use crate::peers::{Answer, Call, TakeVote};

/// A replica that lost its vote and whose record does not end within this is to be a voter again.
const PATIENCE: Duration = Duration::from_secs(30);
/// Leadership may change as often meanwhile; the leader that is to go hands over first.
const TRIES: u32 = 4;

/// Replicas whose vote was taken for their removal, as the leader remembers it.
#[derive(Debug, Default)]
pub(crate) struct Leaving(Mutex<BTreeMap<u64, Instant>>);

impl Leaving {
    fn note(&self, id: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, since| since.elapsed() < PATIENCE);
        all.insert(id, platform::now());
    }

    fn forget(&self, id: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Whether it is on its way out and must not get its vote back.
    pub(crate) fn has(&self, id: u64) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&id).is_some_and(|since| since.elapsed() < PATIENCE)
    }
}

/// Whether the voters that are left can do without the one that goes: with one to spare, or with `force` just so. A
/// change on which they cannot decide holds everything up from the moment at which it is begun.
fn check_majority(replica_id: u64, left: &[&ReplicaView], force: bool) -> Result<(), Refusal> {
    let alive = left.iter().filter(|replica| replica.reachable).count();
    let spare = usize::from(!force);
    if alive > left.len() / 2 + spare {
        return Ok(());
    }
    Err(Refusal::WouldLoseMajority {
        replica_id,
        voters_left: left.len() as u64,
        alive: alive as u64,
    })
}

impl Control {
    /// Removes a replica for good. It may be stopped when this is answered. The caller is an admin.
    ///
    /// # Errors
    /// [`Refusal::WouldLoseMajority`], which `force` only answers as long as there is one; [`Error::Unavailable`] when
    /// the group does not decide on it in time; and what the state machine refuses. The replica stays a member then.
    pub async fn remove_replica(
        &self,
        caller: &Caller,
        request_id: &str,
        replica_id: u64,
        force: bool,
    ) -> Result<WriteInfo, Error> {
        let request_id = self.request_id(request_id)?;
        self.barrier().await?;
        let status = self.cluster_status().await?;
        let voter = |replica: &&ReplicaView| replica.record.status() == ReplicaStatus::Voter;
        let (going, left): (Vec<_>, Vec<_>) = status
            .replicas
            .iter()
            .filter(voter)
            .partition(|replica| replica.record.id == replica_id);
        // That the last one stays is the state machine's to say.
        if !going.is_empty() && !left.is_empty() {
            check_majority(replica_id, &left, force)?;
            self.take_vote(replica_id).await?;
        }
        let written = self
            .propose(request_id, caller.actor(), RemoveReplica { replica_id })
            .await?;
        Ok(written.info)
    }

    /// Has the leader take a replica's vote, whoever leads.
    async fn take_vote(&self, replica_id: u64) -> Result<(), Error> {
        let mut last = Error::Unavailable { leader_hint: None };
        for _ in 0..TRIES {
            match self.ask_for_vote(replica_id).await {
                Err(error @ Error::Unavailable { .. }) => last = error,
                decided => return decided,
            }
            self.barrier().await?;
        }
        Err(last)
    }

    async fn ask_for_vote(&self, replica_id: u64) -> Result<(), Error> {
        let leader = self.replica().leader();
        let unavailable = Error::Unavailable { leader_hint: leader };
        match leader {
            None => Err(unavailable),
            Some(leader) if leader == self.replica_id() => {
                let taken = self.take_vote_here(replica_id).await;
                taken.map_err(|error| {
                    tracing::warn!(
                        replica_id,
                        cause = error.for_log(),
                        "a replica keeps its vote for now"
                    );
                    unavailable
                })
            }
            Some(leader) => {
                let call = Call::TakeVote(TakeVote { replica_id });
                match self.call_peer(leader, call, self.timings().call_timeout).await {
                    Ok(Answer::VoteTaken(answer)) if answer.problem.is_empty() => Ok(()),
                    // A leader of before this: its reconciler takes the replica out after the record.
                    Err(PeerError::Refused {
                        refusal: PeerRefusal::Unsupported,
                        ..
                    }) => Ok(()),
                    answer => {
                        tracing::warn!(replica_id, leader, ?answer, "a replica keeps its vote for now");
                        Err(unavailable)
                    }
                }
            }
        }
    }

    /// Takes a replica's vote; this replica leads. One that is to lose its own hands over, and the next leader is to be
    /// asked.
    pub(crate) async fn take_vote_here(&self, replica_id: u64) -> Result<(), Error> {
        if replica_id == self.replica_id() {
            self.hand_over_here(0).await?;
            return Err(Error::Unavailable { leader_hint: None });
        }
        self.leaving().note(replica_id);
        let demoted = self.replica().demote(replica_id);
        let demoted = self.change(replica_id, "take the vote of", demoted).await;
        if demoted.is_err() {
            self.leaving().forget(replica_id);
        }
        demoted
    }
}
