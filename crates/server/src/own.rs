//! What a replica keeps right about itself and its peers: its addresses in the state, theirs in the address
//! book, which certificate it shows, and that it is still a member.
//!
//! Invariants: the book follows the state, and what it was before the state had any members stays in it until
//! then.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use palyra_control::Control;
use palyra_replica::transport::AddressBook;
use palyra_replica::{Peer, Replica};
use palyra_state::cluster::{self, Addresses, ReplicaStatus, UpdateReplicaAddresses};
use palyra_state::{Actor, Envelope, Id, limits};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::exit::{Code, Failure};
use crate::tls::Tls;

/// Pause between two looks at the state, each after something was applied.
const LOOK: Duration = Duration::from_millis(100);
/// Pause between two looks at the group.
const GROUP_LOOK: Duration = Duration::from_secs(1);
/// A replica that has not answered for so long is said to be silent.
const SILENT: Duration = Duration::from_secs(3);
/// Pause after an announcement that did not get through.
const RETRY: Duration = Duration::from_secs(2);

/// Announces this replica's addresses when they changed, keeps the cache, and fails once the replica is
/// removed.
pub(crate) fn look_after(
    config: &Config,
    replica: Replica,
    book: Arc<AddressBook>,
    stop: CancellationToken,
) -> impl Future<Output = Result<(), Failure>> + Send + use<> {
    let told = config.advertised_addresses();
    let staleness = u64::try_from(config.timers.max_staleness.get().as_millis()).unwrap_or(u64::MAX);
    let wanted = Addresses {
        peer: told.peers,
        node: told.node,
        enrol: told.enrol,
        http: String::new(),
        metrics: told.metrics,
        quic: told.quic,
    };
    async move {
        let mut applied = replica.applied();
        while !stop.is_cancelled() {
            applied.borrow_and_update();
            let settled = look(&replica, &book, &wanted, staleness).await?;
            let changed = async {
                if !settled {
                    tokio::time::sleep(RETRY).await;
                    return Ok(());
                }
                tokio::time::sleep(LOOK).await;
                applied.changed().await
            };
            match stop.run_until_cancelled(changed).await {
                Some(Ok(())) => {}
                // The replica is gone, or everything stops.
                Some(Err(_)) | None => return Ok(()),
            }
        }
        Ok(())
    }
}

/// One look; whether nothing is left to announce.
async fn look(
    replica: &Replica,
    book: &AddressBook,
    wanted: &Addresses,
    staleness: u64,
) -> Result<bool, Failure> {
    let members: Vec<cluster::Replica> = cluster::replicas(&replica.view());
    // An empty state says nothing: a fresh replica has the addresses that it was given when it joined.
    let Some(me) = members.iter().find(|member| member.id == replica.id()) else {
        return Ok(true);
    };
    if me.status() == ReplicaStatus::Removed {
        let next = "delete its folder, and join again with an empty one";
        let message = format!("replica {} was removed from the cluster; {next}", me.id);
        return Err(Failure::new(Code::Removed, message));
    }
    let level = cluster::cluster(&replica.view()).map_or(0, |born| born.feature_level);
    if level > limits::FEATURE_LEVEL {
        let known = limits::FEATURE_LEVEL;
        let next = "install a palyrad as new as the other replicas', and start it again";
        let message =
            format!("the cluster is at feature level {level}, and this palyrad knows {known}; {next}");
        return Err(Failure::new(Code::Unsupported, message));
    }
    if (1..limits::FIRST_FEATURE_LEVEL).contains(&level) {
        let next = "make a new cluster, and pair its nodes again";
        let message =
            format!("the cluster is at feature level {level}, of a version that was never released; {next}");
        return Err(Failure::new(Code::Unsupported, message));
    }
    let reachable = members
        .iter()
        .filter(|member| member.is_member() && !member.addresses.peer.is_empty());
    book.replace(
        reachable
            .map(|member| (member.id, member.addresses.peer.clone()))
            .collect(),
    );
    let is_known = me.addresses == *wanted
        && me.understands() == limits::FEATURE_LEVEL
        && me.max_staleness_ms == staleness;
    if !me.is_member() || is_known {
        return Ok(true);
    }
    let id = Id::from_bytes(palyra_platform::new_ulid_bytes());
    let command = UpdateReplicaAddresses {
        replica_id: me.id,
        addresses: wanted.clone(),
        feature_level: limits::FEATURE_LEVEL,
        max_staleness_ms: staleness,
    };
    let envelope = Envelope::new(id, Actor::Replica { id: me.id }, command);
    match replica.propose(envelope).await.map(|committed| committed.reply) {
        Ok(Ok(_)) => {
            tracing::info!(?wanted, "announced this replica's addresses");
            Ok(true)
        }
        Ok(Err(reject)) => {
            tracing::warn!(%reject, "this replica's addresses were refused");
            Ok(true)
        }
        Err(error) => {
            tracing::debug!(%error, "this replica's addresses are not announced yet");
            Ok(false)
        }
    }
}

/// Tells the cluster which certificate this replica shows, at its start and after each renewal, so that `palyra cluster
/// status` shows the one in use.
pub(crate) async fn announce_certificate(control: Control, tls: Arc<Tls>) {
    let mut shown = tls.shown();
    loop {
        let issued = shown.borrow_and_update().clone();
        let announced = control.announce_certificate(&issued).await;
        if let Err(error) = &announced {
            tracing::debug!(%error, "this replica's certificate is not announced yet");
        }
        if announced.is_ok_and(|done| done) {
            // Its end is the end of the process.
            if shown.changed().await.is_err() {
                return;
            }
        } else {
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// Logs what an operator wants to know of the group, once each time it changes: who leads, and, on the leader, which
/// replicas do not answer. Raft's own account of it, a dozen lines a second, stays out of the log.
pub(crate) async fn tell_changes(replica: Replica) {
    let mut leader = None;
    let mut silent = BTreeSet::new();
    loop {
        tokio::time::sleep(GROUP_LOOK).await;
        let status = replica.status();
        if leader != Some(status.leader) {
            match status.leader {
                Some(id) => tracing::info!(leader = id, term = status.term, "there is a leader"),
                None => tracing::warn!(term = status.term, "there is no leader"),
            }
            leader = Some(status.leader);
        }
        let is_silent = |peer: &&Peer| peer.silent_for.is_none_or(|age| age > SILENT);
        let now: BTreeSet<u64> = status
            .peers
            .iter()
            .filter(is_silent)
            .map(|peer| peer.id)
            .collect();
        for id in now.difference(&silent) {
            tracing::warn!(replica = id, "a replica does not answer");
        }
        for peer in status
            .peers
            .iter()
            .filter(|peer| silent.contains(&peer.id) && !now.contains(&peer.id))
        {
            tracing::info!(replica = peer.id, "a replica answers again");
        }
        silent = now;
    }
}
