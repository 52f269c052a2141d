//! Linearizable reads: learn what is committed now, wait until it is applied here, then read the local view.
//!
//! Reads that arrive while a round is under way share the next one, which starts after they arrived; so a
//! round's index covers everything that was answered to anybody before any of its readers asked. Leader
//! leases are not used: a restarted follower grants them wrongly.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use openraft::ReadPolicy;
use openraft::errors::{LinearizableReadError, RaftError};
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use tokio::sync::oneshot;

use crate::codec;
use crate::core::Core;
use crate::peer::Method;
use crate::types::LogId;

/// Pause before a round is tried again when nothing is heard of a new leader.
const RETRY: Duration = Duration::from_millis(50);

/// Why a read cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader confirmed what is committed within the deadline, or this replica is too far behind.
    #[error("no leader confirmed in time what is committed; try again, or read what this replica has")]
    Unavailable {
        /// The leader that this replica knows.
        leader_hint: Option<u64>,
    },
}

type Waiter = oneshot::Sender<u64>;

/// Readers that wait for the next round.
#[derive(Default)]
pub(crate) struct ReadGate {
    state: Mutex<Gate>,
}

#[derive(Default)]
struct Gate {
    running: bool,
    waiting: Vec<Waiter>,
}

impl ReadGate {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    /// The index that this replica has applied and that covers everything committed when this was called.
    pub(crate) async fn read_barrier(self: &Arc<Self>, limit: Duration) -> Result<u64, ReadError> {
        let (done, answer) = oneshot::channel();
        let end = platform::now() + limit;
        let start = {
            let mut gate = self.reads.gate();
            gate.waiting.push(done);
            !std::mem::replace(&mut gate.running, true)
        };
        if start {
            platform::spawn(rounds(self.clone())).detach();
        }
        let unavailable = || ReadError::Unavailable {
            leader_hint: self.leader_hint(),
        };
        let Ok(Ok(index)) = platform::timeout(limit, answer).await else {
            return Err(unavailable());
        };
        let left = end.saturating_duration_since(platform::now());
        if self.wait_applied(index, left).await {
            Ok(index)
        } else {
            Err(unavailable())
        }
    }

    /// What must be applied before a read that begins now, as leader; else the leader that is known.
    pub(crate) async fn read_index_here(&self) -> Result<LogId, Option<u64>> {
        platform::io_point("read.index").await;
        let mark = self.links.freshness.mark();
        match self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await {
            Ok(linearizer) => {
                let id = *linearizer.read_log_id().log_id();
                // openraft asks a quorum, but takes the answer to an old request also for one to newer requests that
                // end at the same entry: late answers from before another leader's election would confirm this read.
                let members = self.links.members();
                let confirmed = self
                    .links
                    .freshness
                    .confirmed(id.leader_id.term, mark, &members, self.me());
                if confirmed { Ok(id) } else { Err(None) }
            }
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                Err(to.leader_id.filter(|leader| *leader != self.me()))
            }
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(_))) => Err(None),
            Err(RaftError::Fatal(fatal)) => {
                self.raft_died(&fatal);
                Err(None)
            }
        }
    }

    async fn round(&self) -> Option<u64> {
        let (leader, leads) = self.leader()?;
        if leads {
            // Planted: whoever believes that it leads asks nobody.
            if palyra_fault::planted("local-reads") {
                return Some(*self.machine.watch().borrow());
            }
            // Planted: a leader trusts a lease for reads that outlasts its followers' patience.
            let lease = self.config.timing.election_max * 4;
            if palyra_fault::planted("lease-read") && self.quorum_age().is_some_and(|age| age < lease) {
                return Some(*self.machine.watch().borrow());
            }
            return self.read_index_here().await.ok().map(|id| id.index);
        }
        let limit = self.config.timing.election_max;
        let body = wire::request::Body::ReadIndex(wire::ReadIndexRequest {});
        let answer = self
            .links
            .call(leader, Method::ReadIndex, body, limit)
            .await
            .ok()?;
        let wire::response::Body::ReadIndex(answer) = answer else {
            return None;
        };
        match answer.result? {
            wire::read_index_response::Result::Index(id) => Some(codec::to_log_id(&id).index),
            wire::read_index_response::Result::NotLeader(_) => None,
        }
    }
}

/// Rounds, one after another, while there are readers.
async fn rounds(core: Arc<Core>) {
    loop {
        let waiting: Vec<Waiter> = {
            let mut gate = core.reads.gate();
            // Readers that gave up need no answer.
            gate.waiting.retain(|waiter| !waiter.is_closed());
            if gate.waiting.is_empty() || core.stopping() {
                gate.running = false;
                gate.waiting.clear();
                return;
            }
            std::mem::take(&mut gate.waiting)
        };
        match core.round().await {
            Some(index) => {
                for waiter in waiting {
                    // A reader that gave up meanwhile is none of ours any more.
                    let _ = waiter.send(index);
                }
            }
            None => {
                core.reads.gate().waiting.extend(waiting);
                core.changed(RETRY).await;
            }
        }
    }
}
