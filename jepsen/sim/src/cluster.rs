//! The cluster of a run: replicas on their disks, and how clients reach them.
//!
//! Starting, killing and burying replicas, proposals and reads in tasks of the replica that serves them, and the
//! list of problems. Never here: what clients want, and when faults strike.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use palyra_control::{Control, ControlConfig, Limits, Timings};
use palyra_jepsen_check::Recorder;
use palyra_platform as platform;
use palyra_replica::{Committed, OpenError, ProposeError, ReadError, Replica, ReplicaConfig, Status, View};
use palyra_state::{Envelope, Id, Reject, Reply};
use palyra_storage::Engine;

use crate::breaks::Break;
use crate::bus::Bus;
use crate::chance;
use crate::disk::SimDisk;
use crate::fleet;
use crate::held::Resource;
use crate::history::{Asked, History, Op, Outcome, changes_nothing};
use crate::load::{self, Load};
use crate::oracle::{self, Glimpse, Oracle};
use crate::papers::{CLUSTER, Papers};
use crate::revocation::Probed;
use crate::setup::Setup;
use crate::world::{self, Life, World};

/// Virtual time between two comparisons of a replica that applies nothing.
const COMPARE: Duration = Duration::from_millis(97);
/// Replicas that a client tries with one request.
const TRIES: usize = 3;

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Clients ask, faults strike.
    Faults,
    /// No more faults and no new work; what is open must end.
    Drain,
    /// Everybody stops.
    Over,
}

/// What became of one request.
pub(crate) struct Answer {
    /// As the history has it.
    pub(crate) outcome: Outcome,
    /// The state machine's word, when there was one.
    pub(crate) reply: Option<Result<Reply, Reject>>,
    /// The request id under which it was asked last.
    pub(crate) request: Id,
    /// It was decided by an earlier entry than the one that the index names.
    pub(crate) again: bool,
}

/// A process of a replica: the replica, and the control plane on it.
#[derive(Clone)]
struct Running {
    replica: Replica,
    control: Control,
}

/// The cluster of a run.
pub(crate) struct Cluster {
    pub(crate) world: &'static World,
    pub(crate) bus: Bus,
    pub(crate) papers: Papers,
    pub(crate) load: Load,
    pub(crate) history: RefCell<History>,
    /// The same for the shared checkers.
    pub(crate) tape: RefCell<Recorder>,
    pub(crate) probed: Probed,
    /// Streams of watchers so far.
    pub(crate) streams: Cell<u64>,
    /// Attempts at codes that may count as failures.
    pub(crate) spent: Cell<u64>,
    /// What leases protect.
    pub(crate) resource: Resource,
    pub(crate) phase: Cell<Phase>,
    /// A change of the members is under way: a replica of it.
    pub(crate) changing: Cell<bool>,
    disks: RefCell<BTreeMap<u64, Arc<SimDisk>>>,
    /// Processes; without a replica while they start.
    live: RefCell<BTreeMap<u64, (Life, Option<Running>)>>,
    /// Replicas that are to run.
    members: RefCell<BTreeSet<u64>>,
    /// Those of them that are not to be started yet.
    held: RefCell<BTreeSet<u64>>,
    oracle: RefCell<Oracle>,
    problems: RefCell<Vec<String>>,
    pub(crate) setup: Setup,
    /// Of the control planes.
    pub(crate) timings: Timings,
}

impl Cluster {
    /// A cluster of this configuration; nothing runs yet.
    pub(crate) fn new(world: &'static World, setup: Setup, load: Load) -> Rc<Self> {
        world.note(&setup.to_string());
        let replicas = setup.replicas;
        let cluster = Rc::new(Cluster {
            world,
            bus: Bus::new(world, setup.net.clone()),
            papers: Papers::default(),
            load,
            history: RefCell::default(),
            tape: RefCell::default(),
            probed: Probed::default(),
            streams: Cell::new(0),
            spent: Cell::new(0),
            resource: Resource::default(),
            phase: Cell::new(Phase::Faults),
            changing: Cell::new(false),
            disks: RefCell::default(),
            live: RefCell::default(),
            members: RefCell::default(),
            held: RefCell::default(),
            oracle: RefCell::new(Oracle::new(world.worst_drift())),
            problems: RefCell::default(),
            setup,
            timings: load::timings(),
        });
        (1..=replicas).for_each(|id| cluster.admit(id));
        cluster
    }

    /// A violated property.
    pub(crate) fn problem(&self, what: String) {
        self.world.note(&format!("PROBLEM {what}"));
        self.problems.borrow_mut().push(what);
    }

    /// Problems found, in order; empty when the seed is good.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.borrow().clone()
    }

    /// A replica that is to run from now on, on an empty disk.
    pub(crate) fn admit(&self, id: u64) {
        self.disks.borrow_mut().insert(id, SimDisk::new(id, self.world));
        self.members.borrow_mut().insert(id);
    }

    /// A replica that is never started again; its process, if it runs, goes on until it is killed.
    pub(crate) fn retire(&self, id: u64) {
        self.members.borrow_mut().remove(&id);
    }

    /// Nobody starts this replica until it is let go.
    pub(crate) fn hold(&self, id: u64, held: bool) {
        let mut all = self.held.borrow_mut();
        if held {
            all.insert(id)
        } else {
            all.remove(&id)
        };
    }

    /// Replicas that are to run.
    pub(crate) fn members(&self) -> Vec<u64> {
        self.members.borrow().iter().copied().collect()
    }

    /// One of them.
    pub(crate) fn any_member(&self) -> u64 {
        let members = self.members();
        members[usize::try_from(chance::below(members.len() as u64)).unwrap_or(0)]
    }

    /// One of those that run, members or not.
    pub(crate) fn any_running(&self) -> u64 {
        let ids: Vec<u64> = self.live.borrow().keys().copied().collect();
        let at = usize::try_from(chance::below(ids.len() as u64)).unwrap_or(0);
        ids.get(at).copied().unwrap_or(0)
    }

    /// Its disk.
    pub(crate) fn disk(&self, id: u64) -> Option<Arc<SimDisk>> {
        self.disks.borrow().get(&id).cloned()
    }

    /// The replica, unless it is dead or starts, and the life that calls of it belong to.
    pub(crate) fn replica(&self, id: u64) -> Option<(Life, Replica)> {
        let (life, running) = self.running(id)?;
        Some((life, running.replica))
    }

    /// Its control plane.
    pub(crate) fn control(&self, id: u64) -> Option<(Life, Control)> {
        let (life, running) = self.running(id)?;
        Some((life, running.control))
    }

    fn running(&self, id: u64) -> Option<(Life, Running)> {
        let (life, running) = self.live.borrow().get(&id).cloned()?;
        self.world.lives(life).then_some(())?;
        Some((life, running?))
    }

    /// Calls a replica's control plane in a task of that replica; `None` when it is dead, or dies meanwhile.
    pub(crate) async fn call<T, F>(&self, id: u64, call: impl FnOnce(Control) -> F) -> Option<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (life, control) = self.control(id)?;
        let task = platform::scope_sync(life.tag(), || platform::spawn(call(control)));
        task.await.ok()
    }

    /// What a replica says of itself; `None` when its disk fails meanwhile, of which it dies and not who asks.
    pub(crate) fn status(life: Life, replica: &Replica) -> Option<Status> {
        let ask = || catch_unwind(AssertUnwindSafe(|| replica.status()));
        platform::scope_sync(life.tag(), ask).ok()
    }

    /// Everybody who believes that they lead, whether they are still members or not.
    pub(crate) fn leaders(&self) -> Vec<(Life, Replica)> {
        let ids: Vec<u64> = self.live.borrow().keys().copied().collect();
        let running = ids.into_iter().filter_map(|id| self.replica(id));
        running.filter(|(_, replica)| replica.leads()).collect()
    }

    /// Starts a member on its disk, unless it runs.
    pub(crate) async fn start(self: &Rc<Self>, id: u64) {
        // Only now: what a dead life left unburied must not be taken for the next one's.
        self.bury();
        let starts = self.members.borrow().contains(&id) && !self.held.borrow().contains(&id);
        if self.live.borrow().contains_key(&id) || !starts {
            return;
        }
        let Some(disk) = self.disk(id) else { return };
        let life = self.world.begin(id);
        self.live.borrow_mut().insert(id, (life, None));
        self.world.note(&format!("start r{id}"));
        let engine = match disk.open() {
            Ok(engine) => engine,
            Err(error) => {
                self.problem(format!("r{id} does not open its disk: {error}"));
                return self.kill(id, false);
            }
        };
        let opened = self.open(life, engine).await;
        if !self.world.lives(life) {
            // It was killed or died while it started; the nemesis starts it again.
            return self.bury();
        }
        match opened {
            Some(Ok(running)) => {
                let replica = running.replica.clone();
                self.bus.plug(life, replica.peer_service());
                self.live.borrow_mut().insert(id, (life, Some(running)));
                tokio::task::spawn_local(self.clone().observe(id, life, replica));
                self.check_recovered(id).await;
            }
            Some(Err(error)) => {
                if !world::by_broken_disk(&error.to_string()) {
                    self.problem(format!("r{id} does not start: {error}"));
                }
                self.kill(id, false);
            }
            None => self.kill(id, false),
        }
    }

    /// Opens a replica on its disk and starts its control plane, in tasks of its own; `None` when it died meanwhile.
    async fn open(&self, life: Life, engine: Arc<dyn Engine>) -> Option<Result<Running, OpenError>> {
        let id = life.replica();
        let mut config = ReplicaConfig::new(id, CLUSTER);
        config.timing = self.setup.timing.clone();
        config.compaction = self.setup.compaction.clone();
        let port = self.bus.port(id);
        let keys = self.papers.keys(id);
        let control_config = ControlConfig {
            replica_id: id,
            cluster_id: CLUSTER,
            trust_domain: self.papers.domain().clone(),
            version: "sim".to_owned(),
            timings: self.timings,
            limits: Limits::default(),
        };
        let opening = async move {
            let replica = Replica::open(config, engine, port).await?;
            let control = Control::start(control_config, replica.clone(), keys);
            replica.start();
            Ok::<_, OpenError>(Running { replica, control })
        };
        platform::scope_sync(life.tag(), || platform::spawn(opening))
            .await
            .ok()
    }

    /// What a replica recovers after a crash is sound in itself.
    async fn check_recovered(&self, id: u64) {
        let found = self
            .look(id, |view| oracle::soundness(&oracle::state_of(view)))
            .await;
        for problem in found.unwrap_or_default() {
            self.problem(format!(
                "replica.invariants: r{id} recovered a state that is not: {problem}"
            ));
        }
    }

    /// Ends every fault that lasts; when the run is about to settle, those that would come as well.
    pub(crate) fn relieve(&self, settle: bool) {
        self.bus.heal(settle);
        for disk in self.disks.borrow().values() {
            disk.fill(false);
        }
        if settle {
            self.world.steady();
        }
    }

    /// Starts every member that is dead.
    pub(crate) async fn start_all(self: &Rc<Self>) {
        for id in self.members() {
            self.start(id).await;
        }
    }

    /// Ends a replica as SIGKILL would; with `power`, what was not synced is lost but for a prefix.
    pub(crate) fn kill(&self, id: u64, power: bool) {
        let Some(disk) = self.disk(id) else { return };
        self.world
            .note(&format!("{} r{id}", if power { "power loss" } else { "kill" }));
        self.bus.unplug(id);
        if let Some((life, _)) = self.live.borrow_mut().remove(&id) {
            self.world.kill(life);
            self.world.reach(if power { "power" } else { "kill" });
            if self.changing.get() {
                self.world.reach("died-in-change");
            }
        }
        if power {
            disk.power_loss();
        } else {
            disk.kill();
        }
    }

    /// Takes note of replicas that died by themselves: an injected crash is one more fault, anything else a
    /// finding.
    pub(crate) fn bury(&self) {
        for death in self.world.take_deaths() {
            let id = death.life.replica();
            if !death.injected {
                self.problem(format!("r{id} ended itself: {}", death.reason));
            }
            let is_last = self
                .live
                .borrow()
                .get(&id)
                .is_some_and(|(life, _)| *life == death.life);
            if is_last {
                self.kill(id, chance::percent(50));
            }
        }
    }

    /// Buries whoever dies, at once.
    pub(crate) async fn watch_over(self: Rc<Self>) {
        loop {
            self.world.died().await;
            self.bury();
        }
    }

    /// Compares one life of a replica with all others, at every index that it shows and every now and then.
    async fn observe(self: Rc<Self>, id: u64, life: Life, replica: Replica) {
        let mut applied = replica.applied();
        loop {
            let shown = replica.clone();
            // In a task of the replica: what it cannot read ends it, not us.
            let task =
                platform::scope_sync(life.tag(), || platform::spawn(async move { Glimpse::of(&shown) }));
            let Ok(glimpse) = task.await else { return };
            let now = self.world.elapsed_ms();
            if glimpse.leads() {
                self.world.raft().leads(life, glimpse.term());
            }
            let mut problems = self.world.raft().take_problems();
            problems.extend(self.oracle.borrow_mut().look(life, &glimpse, now));
            for problem in problems {
                self.problem(problem);
            }
            if self.oracle.borrow_mut().leads(id, &glimpse) {
                self.world.note(&format!("r{id} leads"));
                self.world.reach("leader-changed");
            }
            // Either is a reason to look again; a replica that is gone is seen by the next look.
            drop(platform::timeout(COMPARE, applied.changed()).await);
            if !self.world.lives(life) {
                return;
            }
        }
    }

    /// Proposes at a replica, in a task of that replica: if it is killed, nobody knows the outcome.
    pub(crate) async fn propose(&self, at: u64, envelope: Envelope) -> Result<Committed, ProposeError> {
        let Some((life, replica)) = self.replica(at) else {
            return Err(ProposeError::Unavailable { leader_hint: None });
        };
        let task = platform::scope_sync(life.tag(), || {
            platform::spawn(async move { replica.propose(envelope).await })
        });
        let result = task.await.unwrap_or(Err(ProposeError::Unknown));
        if result.is_ok() && self.bus.loses_answer() {
            return Err(ProposeError::Unknown);
        }
        if let Ok(committed) = &result {
            self.oracle
                .borrow_mut()
                .acknowledged(self.world.elapsed_ms(), committed.index);
        }
        result
    }

    /// Looks at a replica's own state, however old that is. `None` when the replica is gone.
    pub(crate) async fn look<T: Send + 'static>(
        &self,
        at: u64,
        look: impl FnOnce(&View) -> T + Send + 'static,
    ) -> Option<T> {
        let (life, replica) = self.replica(at)?;
        let task = platform::scope_sync(life.tag(), || {
            platform::spawn(async move { look(&replica.view()) })
        });
        task.await.ok()
    }

    /// Looks at a replica's state after a linearizable read barrier, and says at which index.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        at: u64,
        look: impl FnOnce(&View) -> T + Send + 'static,
    ) -> Option<(u64, T)> {
        let (life, replica) = self.replica(at)?;
        let asks = self.world.broken() != Some(Break::LocalReads);
        let task = platform::scope_sync(life.tag(), || {
            platform::spawn(async move {
                if asks {
                    replica.read_barrier().await?;
                }
                let view = replica.view();
                Ok::<_, ReadError>((view.index(), look(&view)))
            })
        });
        let result = task.await.ok()?.ok();
        if result.is_none() {
            self.world.reach("read-failed");
        }
        result
    }

    /// Asks as clients do: an unknown outcome is asked for again with the same request id, at another replica.
    pub(crate) async fn ask(&self, at: u64, mut envelope: Envelope) -> Answer {
        let members = self.members();
        let first = members.iter().position(|id| *id == at).unwrap_or(0);
        let mut sent = false;
        for attempt in 0..TRIES {
            let at = members[(first + attempt) % members.len()];
            match self.propose(at, envelope.clone()).await {
                Ok(Committed {
                    reply,
                    index,
                    duplicate,
                }) => {
                    if sent {
                        self.world.reach("answered-on-retry");
                    }
                    let outcome = match &reply {
                        Ok(reply) if changes_nothing(reply) => Outcome::Quiet(index),
                        Ok(_) => Outcome::Ok(index),
                        Err(_) => {
                            self.world.reach("command-refused");
                            Outcome::Refused
                        }
                    };
                    return Answer {
                        outcome,
                        reply: Some(reply),
                        request: envelope.request_id,
                        again: duplicate,
                    };
                }
                Err(ProposeError::Unknown) => {
                    self.world.reach("outcome-unknown");
                    sent |= self.world.broken() != Some(Break::GuessOutcome);
                }
                Err(ProposeError::Unavailable { .. }) => {}
                Err(error) => self.problem(format!("{error}")),
            }
            if self.world.broken() == Some(Break::RetryAnew) {
                envelope.request_id = fleet::fresh();
            }
        }
        Answer {
            outcome: if sent { Outcome::Unknown } else { Outcome::Refused },
            reply: None,
            request: envelope.request_id,
            again: sent,
        }
    }

    /// [`Cluster::ask`], with a place in the history.
    pub(crate) async fn ask_noted(
        &self,
        at: u64,
        envelope: Envelope,
        asked: impl FnOnce(&Answer) -> Asked,
    ) -> Answer {
        let invoked = self.history.borrow_mut().tick();
        let answer = self.ask(at, envelope).await;
        self.record(at, asked(&answer), answer.outcome.clone(), invoked);
        answer
    }

    /// Puts an operation that has ended into the history.
    pub(crate) fn record(&self, at: u64, asked: Asked, outcome: Outcome, invoked: u64) {
        self.world.note(&format!("r{at}: {asked:?} {outcome:?}"));
        let mut history = self.history.borrow_mut();
        let returned = history.tick();
        history.push(Op {
            asked,
            outcome,
            invoked,
            returned,
        });
    }

    /// Asks until it is committed; for what nobody may refuse. `None` after too long.
    pub(crate) async fn insist(&self, envelope: Envelope) -> Option<Reply> {
        for _ in 0..400 {
            // Whoever knows a leader: one that is not in the group yet would only let us wait.
            let knows = |id: &u64| {
                self.replica(*id)
                    .is_some_and(|(_, replica)| replica.leader().is_some())
            };
            let ids: Vec<u64> = self.members().into_iter().filter(knows).collect();
            let Some(at) = ids
                .get(usize::try_from(chance::below(ids.len() as u64)).unwrap_or(0))
                .copied()
            else {
                platform::sleep(Duration::from_millis(50)).await;
                continue;
            };
            match self.propose(at, envelope.clone()).await {
                Ok(Committed {
                    reply: Ok(reply),
                    index,
                    ..
                }) => {
                    self.world
                        .note(&format!("r{at}: {} at {index}", envelope.command.name()));
                    return Some(reply);
                }
                Ok(Committed {
                    reply: Err(reject), ..
                }) => {
                    let name = envelope.command.name();
                    self.problem(format!("{name} was refused: {reject}"));
                    return None;
                }
                Err(_) => platform::sleep(Duration::from_millis(50)).await,
            }
        }
        self.problem(format!("{} never committed", envelope.command.name()));
        None
    }
}
