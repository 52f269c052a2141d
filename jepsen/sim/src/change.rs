//! Changes of the membership, while faults strike: a new replica comes in by a token, catches up, gets its vote; an
//! old one goes. What an operator does; the rest is the work of the real reconciler in whoever leads.

use std::rc::Rc;
use std::time::Duration;

use palyra_jepsen_check::Kind;
use palyra_jepsen_check::history::Answer as Told;
use palyra_platform as platform;
use palyra_replica::{Replica, View};
use palyra_state::Reply;
use palyra_state::cluster::{self as state, ReplicaStatus};
use serde_json::json;

use crate::chance;
use crate::cluster::{Cluster, Phase};
use crate::fleet;
use crate::world::Life;

/// Replacements of one run besides those that are faults, at most: ids are small numbers.
const CHANGES: u64 = 4;
/// Between two looks how far it is.
const AGAIN: Duration = Duration::from_millis(120);

/// Births the cluster: the first replica alone, then the others, each known to the state before it is known to Raft.
pub(crate) async fn birth(cluster: &Rc<Cluster>) -> bool {
    cluster.start_all().await;
    let Some((life, first)) = cluster.replica(1) else {
        return false;
    };
    let born = platform::scope_sync(life.tag(), || {
        platform::spawn(async move { first.initialize().await })
    });
    if !matches!(born.await, Ok(Ok(()))) || cluster.insist(fleet::genesis(&cluster.papers)).await.is_none() {
        return false;
    }
    for id in 2..=cluster.setup.replicas {
        if invite(cluster).await != Some(id) {
            cluster.problem(format!("replica {id} got another id"));
            return false;
        }
    }
    for id in 2..=cluster.setup.replicas {
        joined(cluster, id).await;
    }
    true
}

/// Replaces a replica by a new one, on a new disk and under a new id. Only one such change runs at a time.
pub(crate) async fn replace(cluster: Rc<Cluster>, old: u64) {
    comes_back_wiped(&cluster, old).await;
    if let Some(new) = invite(&cluster).await {
        cluster.world.note(&format!("r{new} replaces r{old}"));
        cluster.admit(new);
        cluster.start(new).await;
        joined(&cluster, new).await;
        leave(&cluster, old).await;
    }
    cluster.changing.set(false);
}

/// One replica more. No later change ends what a death in the middle of this one has left.
async fn grow(cluster: &Rc<Cluster>) {
    if let Some(new) = invite(cluster).await {
        cluster.world.note(&format!("r{new} comes in"));
        cluster.admit(new);
        cluster.start(new).await;
        joined(cluster, new).await;
    }
    cluster.changing.set(false);
}

/// Replaces one replica after another, or takes one more in, until faults end.
pub(crate) async fn again_and_again(cluster: Rc<Cluster>) {
    let replicas = usize::try_from(cluster.setup.replicas).unwrap_or(usize::MAX);
    for _ in 0..CHANGES {
        platform::sleep(Duration::from_millis(chance::between(200, 2_000))).await;
        if cluster.phase.get() != Phase::Faults {
            return;
        }
        if cluster.changing.replace(true) {
            continue;
        }
        if chance::percent(40) {
            cluster.world.kill_in_change();
        }
        if cluster.members().len() == replicas && chance::percent(30) {
            grow(&cluster).await;
        } else {
            replace(cluster.clone(), cluster.any_member()).await;
        }
    }
}

/// A replica that lost its disk asks to be let in under its name. It has forgotten its votes: as long as it is a
/// member, nobody gets its id.
async fn comes_back_wiped(cluster: &Cluster, id: u64) {
    let named = move |view: &View| state::replica(view, id).map(|record| record.name);
    let Some((_, Some(name))) = cluster.read(cluster.any_member(), named).await else {
        return;
    };
    let [mint, allocate] = fleet::invite(&name);
    // Whatever becomes of the token: the second answer tells.
    drop(cluster.ask(cluster.any_member(), mint).await);
    let answer = cluster.ask(cluster.any_member(), allocate).await;
    if let Some(Ok(Reply::ReplicaAllocated(allocated))) = answer.reply {
        let got = allocated.replica_id;
        cluster.problem(format!(
            "membership.ids-are-new: {name}, a member, was let in again without its disk, as replica {got}"
        ));
    }
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
    cluster.insist(fleet::admit(id, &cluster.papers)).await?;
    Some(id)
}

/// Waits until whoever leads has brought a replica that runs into the group: as a learner first, with a vote when it
/// has caught up.
async fn joined(cluster: &Rc<Cluster>, id: u64) {
    let is_voter = move |view: &View| {
        let found = state::replica(view, id);
        found.is_some_and(|record| record.status() == ReplicaStatus::Voter)
    };
    while cluster.phase.get() != Phase::Over {
        if let Some((_, true)) = cluster.read(cluster.any_member(), is_voter).await {
            return cluster.world.reach("replica-joined");
        }
        platform::sleep(AGAIN).await;
    }
}

/// Takes a replica out: by its record, and whoever leads takes it out of the group. Its process stays for a while and
/// does not know it.
async fn leave(cluster: &Rc<Cluster>, id: u64) {
    // A refusal is a problem that `insist` has noted.
    let _ = cluster.insist(fleet::remove(id)).await;
    while cluster.phase.get() != Phase::Over {
        // One that was cut off while it handed over, and was voted out, takes itself for the leader until its process
        // ends (docs/decisions/simulation.md). What the group is, is what those say that stay.
        let stays = |(life, _): &(Life, Replica)| life.replica() != id;
        let is_out = |(life, leader): &(Life, Replica)| {
            Cluster::status(*life, leader).is_some_and(|status| {
                let members = status.members;
                !members.joint && !members.voters.contains(&id) && !members.learners.contains(&id)
            })
        };
        let leaders: Vec<_> = cluster.leaders().into_iter().filter(stays).collect();
        if !leaders.is_empty() && leaders.iter().all(is_out) {
            break;
        }
        platform::sleep(AGAIN).await;
    }
    // Only now: as long as the group counts on it, whoever runs it starts it again when it dies.
    cluster.retire(id);
    platform::sleep(Duration::from_millis(chance::below(2_000))).await;
    cluster.kill(id, false);
    cluster.world.reach("replica-removed");
}

/// Asks replicas who the members are, in the words of `palyra_jepsen_check::membership`, until faults end: also
/// those that are cut off, and those that were removed and do not know it.
pub(crate) async fn look_on(cluster: Rc<Cluster>) {
    while cluster.phase.get() == Phase::Faults {
        platform::sleep(Duration::from_millis(chance::between(50, 300))).await;
        tell_members(&cluster, cluster.any_running()).await;
    }
}

/// The members as each replica has them at the end.
pub(crate) async fn last_members(cluster: &Cluster) {
    for id in cluster.members() {
        tell_members(cluster, id).await;
    }
}

/// What a replica has of the members, however old that is.
async fn tell_members(cluster: &Cluster, at: u64) {
    let call = cluster.invoke("members", json!({}), Some(at), None);
    let members = |view: &View| {
        let known = state::replicas(view).into_iter();
        let members = known.filter(|record| record.status() != ReplicaStatus::Removed);
        let members: Vec<(u64, &str)> = members
            .map(|record| (record.id, record.status().as_str()))
            .collect();
        (view.index(), json!({"members": members}))
    };
    match cluster.look(at, members).await {
        Some((index, value)) => {
            let answer = Told {
                value,
                rev: Some(index),
                ..Told::default()
            };
            cluster.complete(&call, Kind::Ok, answer);
        }
        None => cluster.complete(&call, Kind::Fail, Told::default()),
    }
}
