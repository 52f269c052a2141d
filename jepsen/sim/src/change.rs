//! Changes of the membership, while faults strike: a new replica comes in by a token, catches up, gets its vote; an old
//! one goes. What `palyra-control` and an operator do together in production, step by step and retried until done.

use std::rc::Rc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_replica::{MemberError, Replica};
use palyra_state::Reply;

use crate::chance;
use crate::cluster::{Cluster, Phase, REPLICAS};
use crate::fleet;

/// Between two tries of a step.
const AGAIN: Duration = Duration::from_millis(120);
/// A learner that is at most this many entries behind gets its vote.
const CAUGHT_UP: u64 = 60;

/// Births the cluster: the first replica alone, then the others, each known to the state before it is known to Raft.
pub(crate) async fn birth(cluster: &Rc<Cluster>) -> bool {
    cluster.start_all().await;
    let Some((life, first)) = cluster.replica(1) else {
        return false;
    };
    let born = platform::scope_sync(life.tag(), || {
        platform::spawn(async move { first.initialize().await })
    });
    if !matches!(born.await, Ok(Ok(()))) || cluster.insist(fleet::genesis(cluster.cluster_id)).await.is_none()
    {
        return false;
    }
    for id in 2..=REPLICAS {
        if invite(cluster).await != Some(id) {
            cluster.problem(format!("replica {id} got another id"));
            return false;
        }
        join(cluster, id).await;
    }
    true
}

/// Replaces a replica by a new one, on a new disk and under a new id. Only one such change runs at a time.
pub(crate) async fn replace(cluster: Rc<Cluster>, old: u64) {
    if let Some(new) = invite(&cluster).await {
        cluster.world.note(&format!("r{new} replaces r{old}"));
        cluster.admit(new);
        cluster.start(new).await;
        join(&cluster, new).await;
        leave(&cluster, old).await;
    }
    cluster.changing.set(false);
}

/// Makes a replica known to the state; its id comes from the log.
async fn invite(cluster: &Cluster) -> Option<u64> {
    // Names that a removed replica had may be used again: one is enough to tell a few replicas apart.
    let name = format!("r-{:08x}", platform::random_u64() >> 32);
    let [mint, allocate] = fleet::invite(&name);
    cluster.insist(mint).await?;
    let Some(Reply::ReplicaAllocated(allocated)) = cluster.insist(allocate).await else {
        return None;
    };
    let id = allocated.replica_id;
    cluster.insist(fleet::admit(id)).await?;
    Some(id)
}

/// Brings a replica that runs into the group: without a vote first, with one when it has caught up.
async fn join(cluster: &Rc<Cluster>, id: u64) {
    until(cluster, move |leader| async move { leader.add_learner(id).await }).await;
    until(cluster, move |leader| async move {
        let status = leader.status();
        // It may have its vote, from a try whose answer was lost, and even lead: a leader is no peer of its own.
        if status.members.voters.contains(&id) && !status.members.joint {
            return Ok(());
        }
        let matched = status
            .peers
            .iter()
            .find(|peer| peer.id == id)
            .and_then(|peer| peer.matched);
        if matched.is_none_or(|index| index + CAUGHT_UP < status.last_log) {
            return Err(MemberError::Busy("it has not caught up".to_owned()));
        }
        leader.promote(id).await
    })
    .await;
    if cluster.insist(fleet::voter(id)).await.is_some() {
        cluster.world.reach("replica-joined");
    }
}

/// Takes a replica out. Its process stays for a while and does not know it.
async fn leave(cluster: &Rc<Cluster>, id: u64) {
    until(cluster, move |leader| async move {
        if leader.id() == id {
            leader.transfer_leader(None).await?;
            return Err(MemberError::Busy("somebody else leads now".to_owned()));
        }
        leader.remove(id).await?;
        let members = leader.status().members;
        if members.joint || members.voters.contains(&id) || members.learners.contains(&id) {
            return Err(MemberError::Busy("it is still there".to_owned()));
        }
        Ok(())
    })
    .await;
    cluster.retire(id);
    // A refusal is a problem that `insist` has noted.
    let _ = cluster.insist(fleet::remove(id)).await;
    platform::sleep(Duration::from_millis(chance::below(2_000))).await;
    cluster.kill(id, false);
    cluster.world.reach("replica-removed");
}

/// Does a step at whoever leads, again and again until it is done or the run is over.
async fn until<F>(cluster: &Rc<Cluster>, step: impl Fn(Replica) -> F)
where
    F: Future<Output = Result<(), MemberError>> + Send + 'static,
{
    while cluster.phase.get() != Phase::Over {
        for (life, leader) in cluster.leaders() {
            let task = platform::scope_sync(life.tag(), || platform::spawn(step(leader)));
            match task.await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => cluster
                    .world
                    .note(&format!("r{} changes no members: {error}", life.replica())),
                Err(_) => {}
            }
        }
        platform::sleep(AGAIN).await;
    }
}

/// What the leader's reconciler does in production: ends a change that an earlier leader left half done.
pub(crate) async fn flatten(cluster: Rc<Cluster>) {
    while cluster.phase.get() != Phase::Over {
        for (life, leader) in cluster.leaders() {
            let task = platform::scope_sync(life.tag(), || {
                platform::spawn(async move { leader.flatten_membership().await })
            });
            if matches!(task.await, Ok(Ok(true))) {
                cluster.world.reach("change-flattened");
            }
        }
        platform::sleep(Duration::from_millis(700)).await;
    }
}
