//! What the parts of a replica share: Raft, the machine, the links, and the task that ends the process when
//! Raft dies.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use palyra_platform as platform;
use palyra_proto::peer::v1 as wire;
use tokio::sync::{Semaphore, watch};

use crate::config::ReplicaConfig;
use crate::courier::Couriers;
use crate::links::{Links, MetricsReceiver};
use crate::log::LogStore;
use crate::machine::Machine;
use crate::members::HAND_OVER;
use crate::peer::{Method, PeerError, PeerHandler, Refusal};
use crate::read::ReadGate;
use crate::types::{Metrics, Raft};

/// How often the size of the log is looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(2);
/// Between the end of Raft and that of the process. Long for a runtime that ends, nothing for who waits for a replica.
const LAST_MOMENT: Duration = Duration::from_millis(20);

/// Shared by all handles of a replica.
pub(crate) struct Core {
    pub(crate) config: ReplicaConfig,
    pub(crate) raft: Raft,
    pub(crate) machine: Machine,
    pub(crate) log: LogStore,
    pub(crate) links: Arc<Links>,
    pub(crate) couriers: Couriers,
    /// Bytes of commands that may still be taken on.
    pub(crate) in_flight: Semaphore,
    /// Bytes of other replicas' commands that may still be taken on as leader. A pool of their own: replicas that take
    /// each other for the leader must not wait for each other's room.
    pub(crate) forwarded: Semaphore,
    pub(crate) reads: ReadGate,
    handler: RwLock<Option<Arc<dyn PeerHandler>>>,
    stopping: AtomicBool,
    /// Counts snapshot transfers that began here.
    transfers: watch::Sender<u64>,
}

impl Core {
    pub(crate) fn new(
        config: ReplicaConfig,
        raft: Raft,
        machine: Machine,
        log: LogStore,
        links: Arc<Links>,
    ) -> Core {
        let room = config.in_flight_bytes.min(Semaphore::MAX_PERMITS);
        Core {
            in_flight: Semaphore::new(room),
            forwarded: Semaphore::new(room),
            config,
            raft,
            machine,
            log,
            couriers: Couriers::new(Arc::clone(&links)),
            links,
            reads: ReadGate::default(),
            handler: RwLock::new(None),
            stopping: AtomicBool::new(false),
            transfers: watch::channel(0).0,
        }
    }

    /// The room that a command of `bytes` takes up in a pool: all of it when it is larger.
    pub(crate) fn room(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.min(self.config.in_flight_bytes)).unwrap_or(u32::MAX)
    }

    pub(crate) fn me(&self) -> u64 {
        self.config.replica_id
    }

    /// A copy of Raft's metrics: a held reference would block its core.
    pub(crate) fn metrics(&self) -> Metrics {
        self.raft.metrics().borrow_watched().clone()
    }

    /// The leader that this replica knows, and whether that is itself.
    pub(crate) fn leader(&self) -> Option<(u64, bool)> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow_watched();
        let leader = metrics.current_leader?;
        // A leader that was just deposed may still be named here: it is not asked again.
        let leads = metrics.state == ServerState::Leader;
        (leads == (leader == self.me())).then_some((leader, leads))
    }

    pub(crate) fn leader_hint(&self) -> Option<u64> {
        self.leader().map(|(leader, _)| leader)
    }

    /// Waits until vote, role, leader or membership change, at most for `limit`.
    pub(crate) async fn changed(&self, limit: Duration) {
        // Not the other metrics: Raft's core publishes those after every message. A command that a cut-off
        // leader refuses would wake itself up by being refused, and be tried again at once, until its
        // deadline.
        let mut metrics = self.raft.server_metrics();
        metrics.borrow_and_update();
        let change = async {
            if metrics.changed().await.is_err() {
                // Raft is gone and nothing changes any more. Answering at once would make every loop around
                // this one spin, with no await that could end it, until its deadline.
                std::future::pending::<()>().await;
            }
        };
        // Either outcome is a reason to look again.
        let _ = platform::timeout(limit, change).await;
    }

    /// Waits until the entry at `index` is applied here; false when `limit` passes first.
    pub(crate) async fn wait_applied(&self, index: u64, limit: Duration) -> bool {
        let mut applied: watch::Receiver<u64> = self.machine.watch();
        let reached = applied.wait_for(|at| *at >= index);
        matches!(platform::timeout(limit, reached).await, Ok(Ok(_)))
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }

    /// Raft's core is gone: a replica without it answers nothing any more and never heals, so the process
    /// ends, unless it is on its way out already.
    ///
    /// By a task and a moment later: a runtime that ends drops Raft's tasks while others still run, and takes this one
    /// with it.
    pub(crate) fn raft_died(&self, why: &dyn std::fmt::Display) {
        if self.stopping() {
            return;
        }
        let last_words = format!("Raft has stopped: {why}");
        platform::spawn(async move {
            platform::sleep(LAST_MOMENT).await;
            platform::abort(&last_words);
        })
        .detach();
    }

    pub(crate) fn set_handler(&self, handler: Arc<dyn PeerHandler>) {
        *self.handler.write().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    fn handler(&self) -> Option<Arc<dyn PeerHandler>> {
        self.handler
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Refuses what a replica asks that the layer above knows to be none any more.
    pub(crate) fn check_admitted(&self, from: u64) -> Result<(), PeerError> {
        match self.handler() {
            Some(handler) if !handler.admits(from) => Err(PeerError::refused(
                Refusal::Removed,
                format_args!("replica {from} was removed from the cluster; stop it"),
            )),
            _ => Ok(()),
        }
    }

    pub(crate) async fn handle_application(
        &self,
        from: u64,
        topic: String,
        body: Bytes,
    ) -> Result<Bytes, PeerError> {
        match self.handler() {
            Some(handler) => handler.handle(from, topic, body).await,
            None => Err(PeerError::refused(
                Refusal::Unsupported,
                format_args!("nobody answers `{topic}` here yet"),
            )),
        }
    }

    pub(crate) async fn call_application(
        &self,
        to: u64,
        topic: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Bytes, PeerError> {
        let request = wire::ApplicationRequest {
            topic: topic.to_owned(),
            body,
        };
        match self
            .links
            .call(
                to,
                Method::Application,
                wire::request::Body::Application(request),
                limit,
            )
            .await?
        {
            wire::response::Body::Application(answer) => Ok(answer),
            _ => Err(PeerError::Lost(format!(
                "replica {to} answered something else than was asked"
            ))),
        }
    }

    pub(crate) async fn shutdown(&self) {
        if self.metrics().state == ServerState::Leader {
            // Without a successor the others elect one by themselves, only later.
            let _ = self.transfer_leader(None, HAND_OVER).await;
        }
        self.stop();
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "Raft did not end in good order");
        }
        self.log.stop().await;
    }

    /// A snapshot begins to arrive; its number, and a watch that shows another number once the next one does.
    pub(crate) fn begin_transfer(&self) -> (u64, watch::Receiver<u64>) {
        let mut turn = 0;
        self.transfers.send_modify(|count| {
            *count += 1;
            turn = *count;
        });
        (turn, self.transfers.subscribe())
    }
}

/// Watches Raft until it ends.
pub(crate) async fn guard(core: std::sync::Weak<Core>, metrics: MetricsReceiver) {
    let why = end_of(metrics).await;
    // Nobody uses the replica any more when it is gone.
    if let Some(core) = core.upgrade() {
        core.raft_died(&why);
    }
}

/// Waits until Raft has ended; why it did.
async fn end_of(mut metrics: MetricsReceiver) -> String {
    loop {
        let running = metrics.borrow_watched().running_state.clone();
        if let Err(fatal) = running {
            return fatal.to_string();
        }
        if metrics.changed().await.is_err() {
            // It says why it ends, unless it panics.
            return "its core is gone without a word".to_owned();
        }
    }
}

/// Keeps the log within its limit of bytes: openraft counts entries only.
pub(crate) async fn keep_house(core: std::sync::Weak<Core>) {
    loop {
        platform::sleep(HOUSEKEEPING).await;
        let Some(core) = core.upgrade() else { return };
        if core.stopping() {
            return;
        }
        let Some(upto) = core.log.excess(core.config.log_bytes) else {
            continue;
        };
        let covered = core.metrics().snapshot.is_some_and(|id| id.index >= upto);
        let trigger = core.raft.trigger();
        let done = if covered {
            trigger.purge_log(upto).await
        } else {
            trigger.snapshot().await
        };
        if let Err(fatal) = done {
            core.raft_died(&fatal);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use openraft::async_runtime::watch::WatchSender;
    use openraft::errors::Fatal;
    use openraft::type_config::TypeConfigExt;

    use super::*;
    use crate::types::TypeConfig;

    #[tokio::test]
    async fn the_end_of_raft_is_noticed_also_when_it_says_nothing() {
        let running = Metrics::new_initial(1);
        let (sender, receiver) = TypeConfig::watch_channel(running.clone());
        let end = platform::spawn(end_of(receiver));
        let stopped = Metrics {
            running_state: Err(Fatal::Stopped),
            ..running.clone()
        };
        sender.send(stopped).ok();
        assert_eq!(end.await, Ok(Fatal::<TypeConfig>::Stopped.to_string()));

        let (sender, receiver) = TypeConfig::watch_channel(running);
        let end = platform::spawn(end_of(receiver));
        drop(sender);
        assert!(end.await.is_ok_and(|why| why.contains("without a word")));
    }
}
