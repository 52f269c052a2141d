//! Reconcilers: what the leader does on its own. Each looks at the state and at the Raft group, and proposes
//! what is missing; none remembers what it did, so a new leader goes on where the old one stopped. There are
//! two loops: a change of the group may take seconds, and a deadline does not wait for it.
//!
//! What never lives here: anything that a follower does. Invariants: a pass that finds nothing to do proposes
//! nothing, so an idle cluster's log does not grow; every batch is bounded; a reconciler that fails is tried
//! again with the next pass and stops no other.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use palyra_platform::{self as platform, Instant};
use palyra_replica::{Peer, Status};
use palyra_state::cluster::{self, Replica as Record, ReplicaStatus, SetReplicaStatus};
use palyra_state::nodes::{self, DetachReplica, Lapse};
use palyra_state::{Actor, Command, Id, Reply, approvals, dispatch, limits, pairing};

use crate::caller::millis;
use crate::control::Control;
use crate::error::Error;
use crate::limits::DIGEST_KNOCKING;

/// The longest pause between two passes of a leader, and the pause between two looks whether this is one.
pub(crate) const PASS: Duration = Duration::from_millis(500);
/// The shortest pause: what cannot be done now is not tried in a tight loop.
pub(crate) const PAUSE_MIN: Duration = Duration::from_millis(10);
/// How far a learner may lag behind to count as caught up, in entries.
const LAG: u64 = 64;
/// Batches of ended sessions or late nodes that one pass commits.
const DETACH_PASSES: u32 = 16;
/// How many passes in a row a learner must be caught up before it gets a vote.
const CAUGHT_UP: u32 = 3;

/// What a leader keeps from pass to pass. Lost with the leadership, which delays and never breaks.
struct Leading {
    since: Instant,
    /// Since when its word counts without a break. Nobody could come back before.
    steady_since: Instant,
    caught_up: BTreeMap<u64, u32>,
}

impl Control {
    /// Writes down what the clock has ended, while this replica leads, until it stops.
    pub(crate) async fn sweep(self) {
        let mut stopping = self.stopping();
        loop {
            let pause = if self.acts_as_leader() {
                self.until_next_deadline().clamp(PAUSE_MIN, PASS)
            } else {
                PASS
            };
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(pause) => {}
            }
            if self.acts_as_leader() {
                tried("deadlines", self.expire_dispatches().await);
                tried("attempts", self.wake_dispatches().await);
                tried("pairing", self.expire_pairing().await);
                tried("approvals", self.expire_approvals().await);
            }
        }
    }

    /// Sees to replicas that are lost, and to the group, while this replica leads, until it stops.
    pub(crate) async fn reconcile(self) {
        let mut stopping = self.stopping();
        let mut leading: Option<Leading> = None;
        loop {
            tokio::select! {
                biased;
                _ = stopping.wait_for(|stop| *stop) => return,
                () = platform::sleep(PASS) => {}
            }
            if !self.replica().leads() {
                leading = None;
                continue;
            }
            let leading = leading.get_or_insert_with(|| Leading {
                since: platform::now(),
                steady_since: platform::now(),
                caught_up: BTreeMap::new(),
            });
            if !self.acts_as_leader() {
                leading.steady_since = platform::now();
            } else {
                let status = self.replica().status();
                tried("lost replicas", self.detach_lost(&status, leading).await);
                tried("nodes that are late", self.give_up_late(&status, leading).await);
                tried("membership", self.settle_membership(&status, leading).await);
                tried("feature level", self.raise_level().await);
            }
        }
    }

    /// Only a leader whose word counts may act on what it sees; a deposed one cannot propose anyway.
    pub(crate) fn acts_as_leader(&self) -> bool {
        self.replica().leads() && self.check_fresh().is_ok()
    }

    /// Answers how much a batch changed.
    pub(crate) async fn as_system(&self, command: impl Into<Command>) -> Result<usize, Error> {
        let written = self.propose(self.fresh_id(), Actor::System, command).await?;
        // The next pass must see what this one did.
        self.applied(written.receipt).await?;
        Ok(match written.reply {
            Reply::Counted(counted) => counted.count as usize,
            _ => 0,
        })
    }

    /// How long until an open dispatch is too late or may be tried again, or an approval or a grant ends.
    fn until_next_deadline(&self) -> Duration {
        let view = self.replica().view();
        let next = [dispatch::next_deadline(&view), approvals::next_due(&view)];
        let next = next.into_iter().flatten().min().unwrap_or(u64::MAX);
        Duration::from_millis(next.saturating_sub(self.now_ms(&view)))
    }

    /// Ends dispatches whose deadline has passed.
    async fn expire_dispatches(&self) -> Result<(), Error> {
        let ids = {
            let view = self.replica().view();
            // Planted: what will be due when the entry is written is named already.
            let ahead = 1_000 * u64::from(palyra_fault::planted("deadline-by-sweeper"));
            dispatch::due(&view, self.now_ms(&view) + ahead, limits::EXPIRE_BATCH)
        };
        if ids.is_empty() {
            return Ok(());
        }
        self.as_system(dispatch::Expire { ids }).await.map(drop)
    }

    /// Lets dispatches run whose wait for the next attempt is over.
    async fn wake_dispatches(&self) -> Result<(), Error> {
        let ids = {
            let view = self.replica().view();
            dispatch::due_again(&view, self.now_ms(&view), limits::EXPIRE_BATCH)
        };
        if ids.is_empty() {
            return Ok(());
        }
        self.as_system(dispatch::Wake { ids }).await.map(drop)
    }

    /// Writes down which codes and pairing requests the clock has ended.
    async fn expire_pairing(&self) -> Result<(), Error> {
        let (mut codes, mut requests) = {
            let view = self.replica().view();
            let now = self.now_ms(&view);
            (pairing::due_codes(&view, now), pairing::due_requests(&view, now))
        };
        codes.truncate(limits::EXPIRE_BATCH);
        requests.truncate(limits::EXPIRE_BATCH - codes.len());
        if codes.is_empty() && requests.is_empty() {
            return Ok(());
        }
        self.as_system(pairing::Expire { codes, requests })
            .await
            .map(drop)
    }

    /// Ends approvals, standing decisions and grants whose time has passed.
    async fn expire_approvals(&self) -> Result<(), Error> {
        let (asked, given) = {
            let view = self.replica().view();
            let (now, limit) = (self.now_ms(&view), limits::EXPIRE_BATCH);
            (
                approvals::due_approvals(&view, now, limit),
                approvals::due_grants(&view, now, limit),
            )
        };
        if asked.is_empty() && given.is_empty() {
            return Ok(());
        }
        let expire = approvals::Expire {
            approvals: asked,
            grants: given,
        };
        self.as_system(expire).await.map(drop)
    }

    /// Raises the feature level once every member understands more than the cluster uses.
    async fn raise_level(&self) -> Result<(), Error> {
        match cluster::next_feature_level(&self.replica().view()) {
            Some(level) => self
                .as_system(cluster::RaiseFeatureLevel { level })
                .await
                .map(drop),
            None => Ok(()),
        }
    }

    /// Ends the sessions of replicas that the leader has not heard from for too long, in batches.
    async fn detach_lost(&self, status: &Status, leading: &Leading) -> Result<(), Error> {
        let (lost, index) = {
            let view = self.replica().view();
            let holds = |record: &&Record| nodes::session_count(&view, record.id) > 0;
            let records = cluster::replicas(&view);
            let lost: Vec<u64> = records
                .iter()
                .filter(|record| record.id != self.replica_id() && self.is_lost(record, status, leading))
                .filter(holds)
                .map(|record| record.id)
                .collect();
            (lost, view.index())
        };
        for replica_id in lost {
            tracing::warn!(replica = replica_id, "replica is lost: its sessions end");
            let heard = peer(status, replica_id).and_then(|peer| peer.silent_for);
            let silent_for = heard.unwrap_or_else(|| leading.since.elapsed());
            let command = DetachReplica {
                replica_id,
                limit: 0,
                up_to_epoch: index,
                reason: "replica_lost".to_owned(),
                suspect_for: millis(self.timings().suspect_for),
                silent_for: millis(silent_for),
            };
            // One pass ends a few thousand; the next goes on.
            for _ in 0..DETACH_PASSES {
                if self.as_system(command.clone()).await? < limits::DETACH_BATCH {
                    break;
                }
            }
        }
        Ok(())
    }

    fn is_lost(&self, record: &Record, status: &Status, leading: &Leading) -> bool {
        if record.status() == ReplicaStatus::Removed {
            return true;
        }
        // A new leader has heard from nobody yet.
        let patience = self.timings().replica_lost_after;
        let raft = peer(status, record.id).and_then(|peer| peer.silent_for);
        let digest = self.liveness().digest_age(record.id, leading.since);
        let heard = raft.into_iter().chain(digest).min();
        leading.since.elapsed() > patience && heard.is_none_or(|age| age > patience)
    }

    /// Moves nodes that are late to their next status, in batches. Not before this replica has led for as long as a
    /// suspect node may take to come back, for nobody could while there was no leader, and whatever clock the one
    /// before had; and not before each owner of sessions has told what it holds, or is lost.
    async fn give_up_late(&self, status: &Status, leading: &Leading) -> Result<(), Error> {
        if leading.steady_since.elapsed() < self.timings().suspect_for
            || !self.owners_have_told(status, leading)
        {
            return Ok(());
        }
        for _ in 0..DETACH_PASSES {
            let Some(ids) = self.late_nodes(leading) else {
                return Ok(());
            };
            let lapse = Lapse {
                lost_after: self.timings().lost_after_ms(),
                ids,
            };
            self.as_system(lapse).await?;
        }
        Ok(())
    }

    /// Nodes that are due, save those that are at somebody's door; nothing when there are none.
    fn late_nodes(&self, leading: &Leading) -> Option<Vec<Id>> {
        let view = self.replica().view();
        let now = self.now_ms(&view);
        if nodes::next_due(&view)? > now {
            return None;
        }
        let mut knocking: BTreeSet<Id> = self.liveness().knocking(leading.since)?.into_iter().collect();
        let (own, more) = self.admission().knocking(DIGEST_KNOCKING);
        if more {
            return None;
        }
        knocking.extend(own);
        let mut ids = nodes::due(&view, now, limits::LAPSE_BATCH + knocking.len());
        ids.retain(|id| !knocking.contains(id));
        ids.truncate(limits::LAPSE_BATCH);
        (!ids.is_empty()).then_some(ids)
    }

    fn owners_have_told(&self, status: &Status, leading: &Leading) -> bool {
        let records = cluster::replicas(&self.replica().view());
        let others = records.iter().filter(|record| record.id != self.replica_id());
        let mut members = others.filter(|record| record.is_member());
        members.all(|record| {
            let told = self.liveness().digest_age(record.id, leading.since);
            told.is_some() || self.is_lost(record, status, leading)
        })
    }

    /// Brings the Raft group to what the records say, and the records to what the group has become. One replica
    /// that cannot be settled holds no other up; answers the first problem.
    async fn settle_membership(&self, status: &Status, leading: &mut Leading) -> Result<(), Error> {
        let records = cluster::replicas(&self.replica().view());
        if status.members.joint {
            // An earlier leader died between the two steps of a change.
            self.change(0, "flatten", async {
                self.replica().flatten_membership().await.map(drop)
            })
            .await?;
        }
        let members = &status.members;
        leading.caught_up.retain(|id, _| members.learners.contains(id));
        let mut settled = Ok(());
        for record in records {
            let one = self.settle_member(&record, status, leading).await;
            settled = settled.and(one);
        }
        settled
    }

    async fn settle_member(
        &self,
        record: &Record,
        status: &Status,
        leading: &mut Leading,
    ) -> Result<(), Error> {
        let id = record.id;
        let is_voter = status.members.voters.contains(&id);
        let is_learner = status.members.learners.contains(&id);
        match record.status() {
            ReplicaStatus::Allocated => Ok(()),
            // The leader cannot take itself out; the next one will.
            ReplicaStatus::Removed if id == self.replica_id() => {
                let hand_over = self.replica().transfer_leader(None);
                self.change(id, "hand over before the removal of", hand_over)
                    .await
            }
            ReplicaStatus::Removed if is_voter || is_learner => {
                self.change(id, "remove", self.replica().remove(id)).await
            }
            ReplicaStatus::Removed => Ok(()),
            ReplicaStatus::Joining | ReplicaStatus::Learner | ReplicaStatus::Voter => {
                if is_voter {
                    self.record_status(record, ReplicaStatus::Voter).await
                } else if is_learner && self.leaving().has(id) {
                    Ok(())
                } else if is_learner {
                    self.record_status(record, ReplicaStatus::Learner).await?;
                    self.promote_if_caught_up(id, status, leading).await
                } else {
                    self.change(id, "add as learner", self.replica().add_learner(id))
                        .await
                }
            }
        }
    }

    async fn record_status(&self, record: &Record, status: ReplicaStatus) -> Result<(), Error> {
        if record.status() == status {
            return Ok(());
        }
        tracing::info!(
            replica = record.id,
            from = record.status().as_str(),
            to = status.as_str(),
            "membership"
        );
        self.as_system(SetReplicaStatus {
            replica_id: record.id,
            status: status as i32,
        })
        .await
        .map(drop)
    }

    async fn promote_if_caught_up(
        &self,
        id: u64,
        status: &Status,
        leading: &mut Leading,
    ) -> Result<(), Error> {
        let close = peer(status, id).is_some_and(|peer| {
            let recent = peer
                .silent_for
                .is_some_and(|silent| silent < self.timings().replica_lost_after);
            recent
                && peer
                    .matched
                    .is_some_and(|matched| status.last_log.saturating_sub(matched) <= LAG)
        });
        let passes = leading.caught_up.entry(id).or_default();
        *passes = if close { *passes + 1 } else { 0 };
        if *passes < CAUGHT_UP {
            return Ok(());
        }
        leading.caught_up.remove(&id);
        self.change(id, "promote", self.replica().promote(id)).await
    }

    /// One change of the group, bounded in time: the next pass sees what became of it.
    pub(crate) async fn change<E: std::fmt::Display>(
        &self,
        id: u64,
        what: &'static str,
        change: impl Future<Output = Result<(), E>>,
    ) -> Result<(), Error> {
        tracing::info!(replica = id, what, "changing the group");
        match platform::timeout(self.timings().call_timeout, change).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Error::Internal(format!("{what} replica {id}: {error}"))),
            Err(_) => Err(Error::Internal(format!("{what} replica {id}: not done in time"))),
        }
    }
}

pub(crate) fn tried<T>(step: &'static str, outcome: Result<T, Error>) {
    if let Err(error) = outcome {
        tracing::warn!(step, cause = error.for_log(), "a reconciler will try again");
    }
}

fn peer(status: &Status, id: u64) -> Option<&Peer> {
    status.peers.iter().find(|peer| peer.id == id)
}
