//! Who watches a cluster while it is harmed: who leads, which process has ended, and what they say of each other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Cluster, Ended, Metrics, State};
use crate::record::Record;

/// How often each replica is asked: an election takes half a second.
const LOOK: Duration = Duration::from_millis(150);
/// A service manager waits before it starts what has ended.
const AGAIN: Duration = Duration::from_millis(1_000);

/// Who leads, as the replicas themselves say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leader {
    /// The replica.
    pub replica: u64,
    /// In this term.
    pub term: u64,
}

/// What the watcher has seen. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Leaders(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    /// By term: everyone who said that it leads in it.
    claims: BTreeMap<u64, BTreeSet<u64>>,
    /// What each said last; empty when it does not answer.
    last: BTreeMap<u64, Metrics>,
}

impl Leaders {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who leads in the newest term, unless it has stopped saying so.
    #[must_use]
    pub fn now(&self) -> Option<Leader> {
        let seen = self.lock();
        let leading = seen.last.iter().filter(|(_, metrics)| metrics.leads());
        let leader = leading.max_by_key(|(_, metrics)| metrics.term())?;
        Some(Leader {
            replica: *leader.0,
            term: leader.1.term(),
        })
    }

    /// How many leaders there were.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().claims.len()
    }

    /// By term: everyone who said that it leads in it.
    #[must_use]
    pub fn claims(&self) -> BTreeMap<u64, BTreeSet<u64>> {
        self.lock().claims.clone()
    }

    /// What a replica said last; nothing when it does not answer.
    #[must_use]
    pub fn last(&self, id: u64) -> Option<Metrics> {
        self.lock().last.get(&id).cloned()
    }

    /// Waits until somebody leads, `within` at most.
    pub async fn wait(&self, within: Duration) -> Option<Leader> {
        let until = Instant::now() + within;
        loop {
            let leader = self.now();
            if leader.is_some() || Instant::now() >= until {
                return leader;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Notes what a replica says; answers whether it leads in a term in which it was not known to.
    fn note(&self, id: u64, metrics: Option<Metrics>) -> Option<Leader> {
        let mut seen = self.lock();
        let Some(metrics) = metrics else {
            seen.last.remove(&id);
            return None;
        };
        let (leads, term) = (metrics.leads(), metrics.term());
        seen.last.insert(id, metrics);
        let new = leads && seen.claims.entry(term).or_default().insert(id);
        new.then_some(Leader { replica: id, term })
    }
}

/// Asks each replica again and again who it is, and writes each new leader into the history.
pub async fn follow_leaders(
    cluster: Arc<Cluster>,
    leaders: Leaders,
    record: Record,
    stop: CancellationToken,
) {
    loop {
        let looks = cluster.replicas().into_iter().map(|id| {
            let cluster = &cluster;
            async move { (id, cluster.metrics(id).await.ok()) }
        });
        for (id, metrics) in futures::future::join_all(looks).await {
            if let Some(leader) = leaders.note(id, metrics) {
                let value = json!({"replica": format!("r{}", leader.replica), "term": leader.term});
                record.fault("leader", value);
            }
        }
        tokio::select! {
            () = sleep(LOOK) => {},
            () = stop.cancelled() => return,
        }
    }
}

/// Notices processes that ended by themselves, writes that down, and starts them again.
pub async fn mind(cluster: Arc<Cluster>, record: Record, stop: CancellationToken) {
    loop {
        for id in cluster.replicas() {
            if let Some(ended) = cluster.has_ended(id, &record) {
                let value = json!({"replica": format!("r{id}"), "how": ended.how, "allowed": ended.allowed});
                record.fault("ended", value);
                let (cluster, stop) = (Arc::clone(&cluster), stop.clone());
                tokio::spawn(async move {
                    sleep(AGAIN).await;
                    // A nemesis may have taken it down, or started it, meanwhile. One that does not come up is found by
                    // whoever waits for the cluster to be whole.
                    if cluster.state(id) == State::Ended && !stop.is_cancelled() {
                        drop(cluster.start(id).await);
                    }
                });
            }
        }
        tokio::select! {
            () = sleep(Duration::from_millis(100)) => {},
            () = stop.cancelled() => return,
        }
    }
}

impl Cluster {
    fn has_ended(&self, id: u64, record: &Record) -> Option<Ended> {
        let (status, allowed) = self
            .with(id, |member| {
                let status = member.child.as_mut()?.try_wait().ok()??;
                member.child = None;
                member.pid = None;
                member.state = State::Ended;
                Some((status, member.may_end > 0))
            })
            .ok()??;
        let ended = Ended {
            time: record.clock().nanos(),
            replica: id,
            how: format!("{status}; it said: {}", self.last_words(id)),
            allowed,
        };
        self.ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ended.clone());
        Some(ended)
    }
}
