//! `Control`: what every part of the control plane hangs on, and the two roads to the state: proposals and
//! reads.
//!
//! What never lives here: domains. Invariants: every proposal carries a request id; an outcome that is not
//! known is said to be unknown; what a caller reads after its own write contains the write.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use palyra_pki::{Authority, Kek, TrustBundle, TrustDomain};
use palyra_platform as platform;
use palyra_replica::{ProposeError, Replica, View};
use palyra_state::{Actor, Command, Envelope, Id, Read, Reply, ca, cluster};
use tokio::sync::{Semaphore, watch};

use crate::admission::Admission;
use crate::ca::{Authorities, MemoryVault, Vault};
use crate::caller::millis;
use crate::connections::Connections;
use crate::drain::COMMITS;
use crate::endpoints::Told;
use crate::ends::Ends;
use crate::error::Error;
use crate::limits::{Limits, Timings};
use crate::liveness::Liveness;
use crate::outputs::Outputs;
use crate::pairing::exchange::Exchanges;
use crate::readers::Readers;
use crate::registry::Registry;
use crate::removal::Leaving;
use crate::revocation::Marks;
use crate::waiters::Waiters;
use crate::workers::Workers;

/// What a control plane is made with.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// This replica.
    pub replica_id: u64,
    /// The cluster.
    pub cluster_id: Id,
    /// Its trust domain.
    pub trust_domain: TrustDomain,
    /// Version of this binary, for `cluster status`.
    pub version: String,
    /// Durations.
    pub timings: Timings,
    /// Bounds.
    pub limits: Limits,
}

/// The keys of this replica.
#[derive(Debug)]
pub struct Keys {
    /// Its own issuing authority.
    pub authority: Authority,
    /// The cluster's key encryption key.
    pub kek: Kek,
}

/// The way back from what must not keep a stopped control plane alive.
#[derive(Clone)]
pub(crate) struct WeakControl(Weak<Inner>);

impl WeakControl {
    pub(crate) fn upgrade(&self) -> Option<Control> {
        self.0.upgrade().map(|inner| Control { inner })
    }
}

/// The control plane of one replica. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
}

struct Inner {
    config: ControlConfig,
    replica: Replica,
    keys: Keys,
    registry: Registry,
    connections: Arc<Connections>,
    waiters: Waiters,
    readers: Arc<Readers>,
    marks: Marks,
    outputs: Outputs,
    workers: Workers,
    exchanges: Exchanges,
    polled: crate::poll::Polled,
    authorities: Authorities,
    minting: Semaphore,
    admission: Admission,
    ends: Ends,
    liveness: Liveness,
    committing: Arc<Semaphore>,
    enforced: watch::Sender<u64>,
    leaving: Leaving,
    endpoints: Told,
    draining: AtomicBool,
    stopping: watch::Sender<bool>,
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Control(replica {})", self.inner.config.replica_id)
    }
}

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// What this replica has will do; otherwise the read is confirmed with the leader.
    pub local: bool,
    /// Wait until this log index is applied.
    pub min_index: u64,
}

/// What comes back with every read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadInfo {
    /// The log index that the answer reflects.
    pub index: u64,
    /// The replica that answers.
    pub served_by: u64,
    /// Milliseconds since it last had contact with a quorum.
    pub age_ms: u64,
}

/// What comes back with every accepted mutation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteInfo {
    /// The log index of the entry.
    pub index: u64,
    /// The replica that answers.
    pub served_by: u64,
    /// The request id was known: this is the answer of the first time.
    pub duplicate: bool,
}

/// A committed and accepted proposal.
#[derive(Debug)]
pub(crate) struct Written {
    pub(crate) index: u64,
    pub(crate) reply: Reply,
    pub(crate) info: WriteInfo,
    pub(crate) receipt: Receipt,
}

/// That a request was decided, and where. Whatever goes wrong after that, the answer is never that nothing happened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Receipt {
    index: u64,
    request_id: Id,
}

impl Receipt {
    /// What is answered when this replica cannot say what became of the request.
    fn unknown(self) -> Error {
        Error::Unknown {
            request_id: self.request_id.to_string(),
        }
    }
}

impl Control {
    /// Starts the control plane: the follower of the feed, the watch over sessions, and the reconcilers that
    /// work while this replica leads. Must be called inside the runtime.
    #[must_use]
    pub fn start(config: ControlConfig, replica: Replica, keys: Keys) -> Control {
        Control::start_with(config, replica, keys, Arc::new(MemoryVault::default()))
    }

    /// [`Control::start`], with somebody who keeps keys and shows certificates.
    #[must_use]
    pub fn start_with(config: ControlConfig, replica: Replica, keys: Keys, vault: Arc<dyn Vault>) -> Control {
        let (limits, timings) = (config.limits, config.timings);
        let control = Control {
            inner: Arc::new(Inner {
                config,
                replica,
                keys,
                registry: Registry::new(&limits, timings.heartbeat_timeout.min(timings.stall_timeout)),
                connections: Connections::new(limits.connections),
                waiters: Waiters::new(limits.waiters),
                marks: Marks::new(),
                readers: Readers::new(limits.readers, limits.readers_per_identity),
                outputs: Outputs::default(),
                workers: Workers::new(),
                exchanges: Exchanges::new(limits.exchanges, limits.exchanges_per_source),
                polled: crate::poll::Polled::default(),
                authorities: Authorities::new(vault),
                minting: Semaphore::new(limits.minting),
                admission: Admission::new(&limits, timings.attach_wait),
                ends: Ends::default(),
                liveness: Liveness::default(),
                committing: Arc::new(Semaphore::new(COMMITS as usize)),
                enforced: watch::Sender::new(0),
                leaving: Leaving::default(),
                endpoints: Told::default(),
                draining: AtomicBool::new(false),
                stopping: watch::Sender::new(false),
            }),
        };
        let view = control.replica().view();
        control.look_up_staleness(&view);
        let start = view.index();
        drop(view);
        control.serve_peers();
        control.enforced().send_replace(start);
        control.readers().begin(start);
        control.marks().note(start);
        run_vital("the follower of the feed", control.clone().follow(start));
        run_vital("the watch over sessions", control.clone().watch_sessions());
        run_vital(
            "the word to the state of ended sessions",
            control.clone().tell_ends(),
        );
        run_vital("the digests to the leader", control.clone().tell_digests());
        run_vital("the search for orphans", control.clone().sweep_orphans());
        run_vital("the renewals of leases", control.clone().renew_leases());
        run_vital("the care for workers", control.clone().care_for_workers());
        run_vital("the sweeper of leases", control.clone().sweep_leases());
        run_vital("the sweeper of deadlines", control.clone().sweep());
        run_vital("the reconciler of members", control.clone().reconcile());
        run_vital("the care for authorities", control.clone().keep_authorities());
        control
    }

    /// From now on no session begins.
    pub(crate) fn begin_drain(&self) {
        self.inner.draining.store(true, Ordering::SeqCst);
    }

    /// Stops the background work.
    pub(crate) fn stop(&self) {
        self.inner.stopping.send_replace(true);
    }

    pub(crate) fn downgrade(&self) -> WeakControl {
        WeakControl(Arc::downgrade(&self.inner))
    }

    /// This replica.
    #[must_use]
    pub fn replica_id(&self) -> u64 {
        self.inner.config.replica_id
    }

    /// The cluster.
    #[must_use]
    pub fn cluster_id(&self) -> Id {
        self.inner.config.cluster_id
    }

    /// The cluster's trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.inner.config.trust_domain
    }

    /// The durations in force.
    #[must_use]
    pub fn timings(&self) -> &Timings {
        &self.inner.config.timings
    }

    /// How many sessions of nodes this replica holds.
    #[must_use]
    pub fn session_count(&self) -> usize {
        self.registry().count()
    }

    /// How many readers of the feed this replica has.
    #[must_use]
    pub fn reader_count(&self) -> usize {
        self.readers().count()
    }

    /// How many nodes wait here for their session to begin.
    #[must_use]
    pub fn attaches_waiting(&self) -> usize {
        self.admission().waiting()
    }

    pub(crate) fn version(&self) -> &str {
        &self.inner.config.version
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.inner.config.limits
    }

    pub(crate) fn replica(&self) -> &Replica {
        &self.inner.replica
    }

    pub(crate) fn keys(&self) -> &Keys {
        &self.inner.keys
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    pub(crate) fn connections(&self) -> &Arc<Connections> {
        &self.inner.connections
    }

    pub(crate) fn waiters(&self) -> &Waiters {
        &self.inner.waiters
    }

    pub(crate) fn marks(&self) -> &Marks {
        &self.inner.marks
    }

    pub(crate) fn readers(&self) -> &Arc<Readers> {
        &self.inner.readers
    }

    pub(crate) fn outputs(&self) -> &Outputs {
        &self.inner.outputs
    }

    pub(crate) fn workers(&self) -> &Workers {
        &self.inner.workers
    }

    pub(crate) fn exchanges(&self) -> &Exchanges {
        &self.inner.exchanges
    }

    pub(crate) fn polled(&self) -> &crate::poll::Polled {
        &self.inner.polled
    }

    pub(crate) fn admission(&self) -> &Admission {
        &self.inner.admission
    }

    pub(crate) fn ends(&self) -> &Ends {
        &self.inner.ends
    }

    pub(crate) fn liveness(&self) -> &Liveness {
        &self.inner.liveness
    }

    /// What results hold while they are being committed.
    pub(crate) fn committing(&self) -> &Arc<Semaphore> {
        &self.inner.committing
    }

    pub(crate) fn authorities(&self) -> &Authorities {
        &self.inner.authorities
    }

    pub(crate) fn minting(&self) -> &Semaphore {
        &self.inner.minting
    }

    /// The log index up to which this replica's connections and sessions follow the journal.
    #[must_use]
    pub fn enforced_index(&self) -> u64 {
        *self.enforced().borrow()
    }

    /// The log index up to which this replica has carried out what the journal says about connections.
    pub(crate) fn enforced(&self) -> &watch::Sender<u64> {
        &self.inner.enforced
    }

    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.inner.stopping.subscribe()
    }

    /// Whether this replica takes no new sessions, because it is about to stop.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.inner.draining.load(Ordering::SeqCst)
    }

    pub(crate) fn told_endpoints(&self) -> &Told {
        &self.inner.endpoints
    }

    pub(crate) fn leaving(&self) -> &Leaving {
        &self.inner.leaving
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.inner.stopping.borrow()
    }

    /// The time by which expiry is judged here: never before the state's clock, also when a leader whose clock was
    /// ahead has moved that.
    pub(crate) fn now_ms(&self, view: &dyn Read) -> u64 {
        self.replica().log_ms().max(palyra_state::clock(view))
    }

    /// By the log's time: what is kept for so long is forgotten in the order of ids, and a replica whose wall clock is
    /// behind would have its own forgotten first.
    pub(crate) fn fresh_id(&self) -> Id {
        Id::from_bytes(platform::ulid_bytes_at(self.replica().log_ms()))
    }

    /// The actor for what this replica does in its own name.
    pub(crate) fn as_replica(&self) -> Actor {
        Actor::Replica {
            id: self.replica_id(),
        }
    }

    pub(crate) fn odd_reply(&self, to: &'static str) -> Error {
        Error::Internal(format!("{to} was answered with another command's reply"))
    }

    /// The request id of a caller: a ULID of its own, or a fresh one when it sent none.
    pub(crate) fn request_id(&self, text: &str) -> Result<Id, Error> {
        if text.is_empty() {
            Ok(self.fresh_id())
        } else {
            crate::selector::parse_id("request_id", text)
        }
    }

    /// Proposes a command and waits for its outcome.
    pub(crate) async fn propose(
        &self,
        request_id: Id,
        actor: Actor,
        command: impl Into<Command>,
    ) -> Result<Written, Error> {
        let envelope = Envelope::new(request_id, actor, command);
        // Replicas of an older version would stop at a command that they do not know.
        cluster::check_level(&self.replica().view(), &envelope.command)?;
        let committed = self
            .replica()
            .propose(envelope)
            .await
            .map_err(|error| match error {
                ProposeError::Unavailable { leader_hint } => Error::Unavailable { leader_hint },
                ProposeError::Unknown => Error::Unknown {
                    request_id: request_id.to_string(),
                },
                ProposeError::TooLarge { .. } => {
                    Error::invalid("request", "it is too large for one log entry", "send less")
                }
            })?;
        let reply = committed.reply?;
        let info = WriteInfo {
            index: committed.index,
            served_by: self.replica_id(),
            duplicate: committed.duplicate,
        };
        Ok(Written {
            index: committed.index,
            reply,
            info,
            receipt: Receipt {
                index: committed.index,
                request_id,
            },
        })
    }

    /// Waits until this replica has applied what was written, so that it can be read here.
    pub(crate) async fn applied(&self, receipt: Receipt) -> Result<(), Error> {
        let arrived = self.arrived(receipt.index).await;
        arrived.map_err(|_| receipt.unknown())
    }

    /// [`Control::check_fresh`] after something was written.
    pub(crate) fn fresh_after(&self, receipt: Receipt) -> Result<(), Error> {
        self.check_fresh().map_err(|_| receipt.unknown())
    }

    /// Waits until this replica has applied `index`.
    async fn arrived(&self, index: u64) -> Result<(), Error> {
        let limit = self.timings().call_timeout;
        if self.replica().wait_applied(index, limit).await {
            return Ok(());
        }
        Err(self.stale())
    }

    /// A view of the state, as fresh as asked for.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when a linearizable read finds no leader; [`Error::Stale`] when `min_index`
    /// does not arrive in time.
    pub async fn read(&self, options: ReadOptions) -> Result<(View, ReadInfo), Error> {
        if !options.local {
            self.barrier().await?;
        }
        if options.min_index > 0 {
            self.arrived(options.min_index).await?;
        }
        let view = self.replica().view();
        let info = self.read_info(view.index());
        Ok((view, info))
    }

    pub(crate) fn read_info(&self, index: u64) -> ReadInfo {
        ReadInfo {
            index,
            served_by: self.replica_id(),
            age_ms: millis(self.quorum_age()),
        }
    }

    /// After it, a view holds everything that was committed before it was called.
    pub(crate) async fn barrier(&self) -> Result<(), Error> {
        let confirmed = self
            .replica()
            .read_barrier_within(self.timings().call_timeout)
            .await;
        confirmed.map(drop).map_err(|_| Error::Unavailable {
            leader_hint: self.replica().leader(),
        })
    }

    fn stale(&self) -> Error {
        Error::Stale {
            age_ms: millis(self.quorum_age()),
        }
    }

    /// How long ago a quorum stood behind what is applied here; endless before the first contact.
    pub(crate) fn quorum_age(&self) -> Duration {
        self.replica().quorum_age().unwrap_or(Duration::MAX)
    }

    /// What a node or operator of this cluster trusts.
    ///
    /// # Errors
    /// [`Error::Unavailable`] before the cluster is born.
    pub fn trust_bundle(&self) -> Result<TrustBundle, Error> {
        let roots = ca::trusted_roots(&self.replica().view());
        if roots.is_empty() {
            return Err(Error::Unavailable { leader_hint: None });
        }
        let roots = roots.into_iter().map(|root| root.der.to_vec()).collect();
        TrustBundle::new(&self.cluster_id().to_string(), self.trust_domain().clone(), roots)
            .map_err(|error| Error::Internal(format!("the root in the state is unusable: {error}")))
    }
}

/// Runs a task without which this replica would not do what it promises: one that follows no feed or sweeps no
/// deadline looks alive and is not.
fn run_vital(what: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    platform::spawn(platform::vital(what, task)).detach();
}

/// A wait that a caller asked for, within bounds; 0 asks for `default`.
pub(crate) fn bounded_wait(asked_ms: u64, default: Duration, most: Duration) -> Duration {
    let asked = if asked_ms == 0 {
        default
    } else {
        Duration::from_millis(asked_ms)
    };
    asked.min(most)
}
