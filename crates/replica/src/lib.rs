//! One replica of the state: Raft, its log, its snapshots and its peers behind one type, [`Replica`].
//!
//! The only crate that knows openraft. What never lives here: sessions, domains, listeners, certificates;
//! commands are opaque bytes until the state machine applies them, peers are numbers. Promises: a command
//! that was answered is durable on a majority and is applied once; a read barrier covers everything answered
//! before it began; a view is one position of the state; the feed passes nothing over in silence; a replica
//! that cannot trust its disk, or whose Raft has ended, ends the process.

mod codec;
mod config;
mod core;
mod courier;
mod feed;
mod forwarded;
mod freshness;
mod hot;
pub mod inspect;
mod links;
mod log;
mod log_clock;
mod machine;
mod members;
mod meta;
mod network;
mod peer;
mod propose;
mod read;
mod service;
mod size;
mod snapshot;
mod status;
pub mod testing;
pub mod transport;
mod types;
mod valve;
mod view;

#[cfg(test)]
mod conformance;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use palyra_platform as platform;
use palyra_state::{Cursor, Envelope};
use palyra_storage::Engine;
use tokio::sync::watch;

pub use config::{Compaction, ReplicaConfig, Timing};
pub use feed::{Feed, FeedItem};
pub use members::MemberError;
pub use meta::{Identity, OpenError, identity};
pub use peer::{Bodies, Lane, Method, PeerError, PeerHandler, PeerTransport, Refusal};
pub use propose::{Committed, ProposeError};
pub use read::ReadError;
pub use service::PeerService;
pub use status::{Members, Peer, Role, Status};
pub use view::View;

/// A running replica. Cheap to clone; all clones are the same replica.
#[derive(Clone)]
pub struct Replica {
    core: Arc<core::Core>,
}

impl Replica {
    /// Opens the data that `engine` holds, or makes an empty one this replica's, and prepares to take part.
    /// Nothing is sent or voted before [`Replica::start`], so that the listener can be up first.
    ///
    /// # Errors
    /// [`OpenError`]: the data is somebody else's, newer than this binary, damaged, or cannot be read.
    pub async fn open(
        config: ReplicaConfig,
        engine: Arc<dyn Engine>,
        transport: Arc<dyn PeerTransport>,
    ) -> Result<Replica, OpenError> {
        let raft_config = Arc::new(config.openraft()?);
        meta::claim(&*engine, config.identity())?;
        let log = log::LogStore::open(engine.clone())?;
        let machine = machine::Machine::open(engine, log.clone())?;
        let links = Arc::new(links::Links::new(
            config.identity(),
            transport,
            machine.watch(),
            Arc::clone(machine.clock()),
        ));
        let network = network::Network { links: links.clone() };
        let built = types::Raft::build(
            config.replica_id,
            raft_config,
            network,
            log.clone(),
            machine.clone(),
        )
        .await;
        let raft = built.map_err(|fatal| OpenError::Damaged(fatal.to_string()))?;
        links.connect(raft.metrics());
        Ok(Replica {
            core: Arc::new(core::Core::new(config, raft, machine, log, links)),
        })
    }

    /// Begins to take part: follows, votes, stands for election.
    pub fn start(&self) {
        self.core.raft.run();
        let metrics = self.core.raft.metrics();
        platform::spawn(core::guard(Arc::downgrade(&self.core), metrics)).detach();
        platform::spawn(core::keep_house(Arc::downgrade(&self.core))).detach();
    }

    /// This replica's id.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.core.me()
    }

    /// The server side of the peer protocol.
    #[must_use]
    pub fn peer_service(&self) -> PeerService {
        PeerService::new(self.core.clone())
    }

    /// Puts a command into the log, at the leader if that is another replica, and returns what applying it
    /// answered. Waits for a leader, and asks again with the same request id when an answer is lost, for
    /// `timing.deadline`.
    ///
    /// # Errors
    /// [`ProposeError`]; only [`ProposeError::Unknown`] leaves open whether the command was applied.
    pub async fn propose(&self, envelope: Envelope) -> Result<Committed, ProposeError> {
        self.propose_within(envelope, self.core.config.timing.deadline)
            .await
    }

    /// [`Replica::propose`] with a deadline of the caller's.
    ///
    /// # Errors
    /// As [`Replica::propose`].
    pub async fn propose_within(
        &self,
        envelope: Envelope,
        limit: Duration,
    ) -> Result<Committed, ProposeError> {
        self.core.propose(&envelope, limit).await
    }

    /// Waits until this replica has applied everything that was committed anywhere when this was called; a
    /// view taken afterwards is linearizable. Returns the index that was waited for.
    ///
    /// # Errors
    /// [`ReadError::Unavailable`] when no leader confirms within `timing.deadline`.
    pub async fn read_barrier(&self) -> Result<u64, ReadError> {
        self.core.read_barrier(self.core.config.timing.deadline).await
    }

    /// [`Replica::read_barrier`] with a deadline of the caller's.
    ///
    /// # Errors
    /// As [`Replica::read_barrier`].
    pub async fn read_barrier_within(&self, limit: Duration) -> Result<u64, ReadError> {
        self.core.read_barrier(limit).await
    }

    /// Waits until the entry at `index` is applied here: read your own writes. False when `limit` passes
    /// first.
    pub async fn wait_applied(&self, index: u64, limit: Duration) -> bool {
        self.core.wait_applied(index, limit).await
    }

    /// The state as this replica has it now, pinned.
    #[must_use]
    pub fn view(&self) -> View {
        View::pin(&**self.core.machine.engine())
    }

    /// Follows the journal from the row after `after`; `Cursor::default()` for all of it.
    #[must_use]
    pub fn feed(&self, after: Cursor) -> Feed {
        Feed::new(
            self.core.machine.engine().clone(),
            self.core.machine.watch(),
            after,
        )
    }

    /// The index of the last applied entry. When it changes, what the entry did is visible in views.
    #[must_use]
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.core.machine.watch()
    }

    /// This replica at this moment.
    #[must_use]
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// The leader that this replica knows; itself when it leads.
    #[must_use]
    pub fn leader(&self) -> Option<u64> {
        self.core.leader_hint()
    }

    /// The time by which deadlines are judged, milliseconds since the Unix epoch: what this replica would stamp on an
    /// entry if it led. Never before the state's clock, and never standing still.
    #[must_use]
    pub fn log_ms(&self) -> u64 {
        self.core.machine.log_ms()
    }

    /// Whether this replica believes that it leads. Only a committed entry proves it.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.core.leader().is_some_and(|(_, leads)| leads)
    }

    /// Waits until vote, role, leader or membership change, at most for `limit`. Progress: see
    /// [`Replica::applied`].
    pub async fn changed(&self, limit: Duration) {
        self.core.changed(limit).await;
    }

    /// How long ago a quorum stood behind what is applied here, on the boot clock; never younger than the
    /// truth. `None` before the first contact: treat it as endless.
    #[must_use]
    pub fn quorum_age(&self) -> Option<Duration> {
        self.core.quorum_age()
    }

    /// Makes this replica the first of a new cluster. Harmless when it was done before.
    ///
    /// # Errors
    /// [`MemberError::Impossible`].
    pub async fn initialize(&self) -> Result<(), MemberError> {
        self.core.initialize().await
    }

    /// As leader: adds a replica that gets the log and has no vote; does not wait until it has caught up.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn add_learner(&self, id: u64) -> Result<(), MemberError> {
        self.core.add_learner(id).await
    }

    /// As leader: gives a learner a vote. See [`Status::peers`] for whether it has caught up.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn promote(&self, id: u64) -> Result<(), MemberError> {
        self.core.promote(id).await
    }

    /// As leader: takes another replica's vote; it stays as a learner.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn demote(&self, id: u64) -> Result<(), MemberError> {
        self.core.demote(id).await
    }

    /// As leader: takes another replica out, voter or learner.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn remove(&self, id: u64) -> Result<(), MemberError> {
        self.core.remove(id).await
    }

    /// As leader: ends a membership change that an earlier leader left half done. True when there was one.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn flatten_membership(&self) -> Result<bool, MemberError> {
        self.core.flatten().await
    }

    /// As leader: hands leadership to `to`, or to the voter with most of the log, and waits until it is gone.
    ///
    /// # Errors
    /// [`MemberError`].
    pub async fn transfer_leader(&self, to: Option<u64>) -> Result<(), MemberError> {
        self.core.transfer_leader(to, members::HAND_OVER).await
    }

    /// Asks for a snapshot and a purge of the log now. Does not wait for them.
    pub async fn trigger_snapshot(&self) {
        if let Err(fatal) = self.core.raft.trigger().snapshot().await {
            self.core.raft_died(&fatal);
        }
    }

    /// Calls the layer above on another replica: see [`PeerHandler`].
    ///
    /// # Errors
    /// [`PeerError`].
    pub async fn call_peer(
        &self,
        to: u64,
        topic: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Bytes, PeerError> {
        self.core.call_application(to, topic, body, limit).await
    }

    /// Who answers [`Replica::call_peer`] of other replicas here. Set it before [`Replica::start`].
    pub fn set_peer_handler(&self, handler: Arc<dyn PeerHandler>) {
        self.core.set_handler(handler);
    }

    /// Stops in good order: hands leadership over (within 2 s), ends Raft, and makes everything durable.
    pub async fn shutdown(&self) {
        self.core.shutdown().await;
    }
}
