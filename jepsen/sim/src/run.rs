//! One seed: three replicas, clients, faults, then peace; and what must hold at the end.
//!
//! The seed draws everything: latencies, losses, timings, snapshot thresholds, which faults come and when.
//! Phases: birth of the cluster, faults under load, heal and settle, checks.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_replica::{Committed, Compaction, ProposeError, ReadError, Replica, ReplicaConfig, Timing};
use palyra_state::{Envelope, Id, MemRead};
use palyra_storage::{Disk, Fault, MemEngine};

use crate::bus::Bus;
use crate::chance;
use crate::fleet;
use crate::history::{self, Asked, History, Op, Outcome};
use crate::oracle::{self, Glimpse, Oracle};
use crate::world::{self, Life, World};

/// Replicas of a simulated cluster.
pub(crate) const REPLICAS: u64 = 3;
/// Registers, each the label of one device.
const KEYS: usize = 4;
/// Clients, each with one operation at a time.
const CLIENTS: u64 = 5;
/// Virtual seconds in which a healed cluster must agree and serve.
const SETTLE: Duration = Duration::from_secs(60);
/// Virtual time between two comparisons of the replicas.
const COMPARE: Duration = Duration::from_millis(97);
/// Longest stall of a disk, in virtual milliseconds; beyond the trust that a follower has in a silent leader.
const STALL_MS: u64 = 3_000;

/// The cluster of a run.
pub(crate) struct Cluster {
    world: &'static World,
    bus: Bus,
    disks: BTreeMap<u64, Arc<Disk>>,
    live: RefCell<BTreeMap<u64, (Life, Replica)>>,
    cluster_id: Id,
    timing: Timing,
    compaction: Compaction,
    history: RefCell<History>,
    problems: RefCell<Vec<String>>,
    calm: std::cell::Cell<bool>,
}

impl Cluster {
    /// Draws a configuration and makes the disks; nothing runs yet.
    pub(crate) fn new(world: &'static World) -> Rc<Self> {
        let election_min = chance::between(300, 600);
        let timing = Timing {
            heartbeat: Duration::from_millis(chance::between(60, 120)),
            election_min: Duration::from_millis(election_min),
            election_max: Duration::from_millis(election_min + chance::between(200, 500)),
            deadline: Duration::from_secs(4),
        };
        let compaction = Compaction {
            snapshot_every: chance::between(20, 120),
            keep: chance::between(0, 30),
            purge_batch: chance::between(1, 16),
        };
        Rc::new(Cluster {
            world,
            bus: Bus::new(world),
            disks: (1..=REPLICAS)
                .map(|id| (id, Disk::new(format!("disk-{id}"))))
                .collect(),
            live: RefCell::default(),
            cluster_id: fleet::fresh(),
            timing,
            compaction,
            history: RefCell::default(),
            problems: RefCell::default(),
            calm: std::cell::Cell::new(false),
        })
    }

    fn problem(&self, what: String) {
        self.world.note(&format!("PROBLEM {what}"));
        self.problems.borrow_mut().push(what);
    }

    /// The replica, unless it is dead, and the life that calls of it belong to.
    fn replica(&self, id: u64) -> Option<(Life, Replica)> {
        self.live
            .borrow()
            .get(&id)
            .filter(|(life, _)| self.world.lives(*life))
            .cloned()
    }

    /// Starts a replica on its disk.
    pub(crate) async fn start(&self, id: u64) {
        // Only now: what a dead life left unburied must not be taken for the next one's.
        self.bury();
        if self.live.borrow().contains_key(&id) {
            return;
        }
        let life = self.world.begin(id);
        self.world.note(&format!("start r{id}"));
        let engine = match MemEngine::open(&self.disks[&id]) {
            Ok(engine) => Arc::new(engine),
            Err(error) => return self.problem(format!("r{id} does not open its disk: {error}")),
        };
        let mut config = ReplicaConfig::new(id, self.cluster_id);
        config.timing = self.timing.clone();
        config.compaction = self.compaction.clone();
        let port = self.bus.port(id);
        let opened = platform::scope_sync(life.tag(), || {
            platform::spawn(async move {
                let replica = Replica::open(config, engine, port).await?;
                replica.start();
                Ok::<_, palyra_replica::OpenError>(replica)
            })
        });
        match opened.await {
            Ok(Ok(replica)) if self.world.lives(life) => {
                self.bus.plug(life, replica.peer_service());
                self.live.borrow_mut().insert(id, (life, replica));
            }
            Ok(Err(error)) if world::by_broken_disk(&error.to_string()) => {
                self.world.kill(life);
                self.disks[&id].kill();
            }
            Ok(Err(error)) => self.problem(format!("r{id} does not start: {error}")),
            // It died while it started; the nemesis starts it again.
            Ok(Ok(_)) | Err(_) => {
                self.world.kill(life);
                self.disks[&id].kill();
                self.bury();
            }
        }
    }

    /// Starts every replica that is dead.
    async fn start_all(&self) {
        for id in 1..=REPLICAS {
            self.start(id).await;
        }
    }

    /// Ends a replica as SIGKILL would; with `power`, what was not synced is lost but for a prefix.
    pub(crate) fn kill(&self, id: u64, power: bool) {
        self.world
            .note(&format!("{} r{id}", if power { "power loss" } else { "kill" }));
        self.bus.unplug(id);
        if let Some((life, _)) = self.live.borrow_mut().remove(&id) {
            self.world.kill(life);
        }
        let disk = &self.disks[&id];
        if power {
            disk.power_loss(usize::try_from(chance::below(disk.unsynced() as u64 + 1)).unwrap_or(0));
        } else {
            disk.kill();
        }
    }

    /// Takes note of replicas that died by themselves: an injected crash is one more fault, anything else a
    /// finding.
    pub(crate) fn bury(&self) {
        for death in self.world.take_deaths() {
            if !death.injected {
                self.problem(format!(
                    "r{} ended itself: {}",
                    death.life.replica(),
                    death.reason
                ));
            }
            self.kill(death.life.replica(), chance::percent(50));
        }
    }

    /// Buries whoever dies, at once.
    pub(crate) async fn watch_over(self: Rc<Self>) {
        loop {
            self.world.died().await;
            self.bury();
        }
    }

    /// Proposes at a replica, in a task of that replica: if it is killed, nobody knows the outcome.
    async fn propose(&self, at: u64, envelope: Envelope) -> Result<Committed, ProposeError> {
        let Some((life, replica)) = self.replica(at) else {
            return Err(ProposeError::Unavailable { leader_hint: None });
        };
        let task = platform::scope_sync(life.tag(), || {
            platform::spawn(async move { replica.propose(envelope).await })
        });
        task.await.unwrap_or(Err(ProposeError::Unknown))
    }

    /// A linearizable read at a replica: the index that it reflects, and the value.
    async fn read(&self, at: u64, key: Id) -> Option<(u64, u64)> {
        let (life, replica) = self.replica(at)?;
        let task = platform::scope_sync(life.tag(), || {
            platform::spawn(async move {
                replica.read_barrier().await?;
                let view = replica.view();
                Ok::<_, ReadError>((view.index(), fleet::value(&view, key)))
            })
        });
        task.await.ok()?.ok()
    }

    /// Proposes until it is committed, while the cluster is calm.
    async fn insist(&self, envelope: Envelope) {
        for attempt in 0..200 {
            let at = 1 + attempt % REPLICAS;
            match self.propose(at, envelope.clone()).await {
                Ok(Committed { reply: Ok(_), .. }) => return,
                Ok(Committed {
                    reply: Err(reject), ..
                }) => {
                    return self.problem(format!("setting up was refused: {reject}"));
                }
                Err(_) => platform::sleep(Duration::from_millis(50)).await,
            }
        }
        self.problem("setting up never committed".into());
    }

    /// Births the cluster and pairs the devices that hold the registers.
    pub(crate) async fn birth(&self) -> Vec<Id> {
        self.start_all().await;
        let Some((life, first)) = self.replica(1) else {
            return Vec::new();
        };
        let grown = platform::scope_sync(life.tag(), || platform::spawn(grow(first)));
        if !matches!(grown.await, Ok(true)) {
            self.problem("the cluster was not born".into());
        }
        self.insist(fleet::genesis(self.cluster_id)).await;
        let keys: Vec<Id> = (0..KEYS).map(|_| fleet::fresh()).collect();
        for key in &keys {
            for envelope in fleet::pair(*key) {
                self.insist(envelope).await;
            }
        }
        keys
    }

    /// One client: one operation after the other, at a replica of its choice, until the run is calm.
    pub(crate) async fn client(self: Rc<Self>, number: u64, keys: Vec<Id>) {
        let mut value = number * 1_000_000;
        let mut at = 1 + number % REPLICAS;
        while !self.calm.get() {
            let key = keys[usize::try_from(chance::below(keys.len() as u64)).unwrap_or(0)];
            let outcome = if chance::percent(60) {
                value += 1;
                self.write_at(at, key, value).await
            } else {
                self.read_at(at, key).await
            };
            if !matches!(outcome, Outcome::Ok(_)) || chance::percent(10) {
                at = 1 + chance::below(REPLICAS);
            }
            platform::sleep(Duration::from_millis(chance::between(1, 40))).await;
        }
    }

    /// A read as clients make it, in the history.
    async fn read_at(&self, at: u64, key: Id) -> Outcome {
        let invoked = self.history.borrow_mut().tick();
        let read = self.read(at, key).await;
        let asked = Asked::Read {
            key,
            value: read.map_or(0, |(_, value)| value),
        };
        let outcome = read.map_or(Outcome::Unknown, |(index, _)| Outcome::Ok(index));
        self.record(at, asked, outcome, invoked)
    }

    /// A write as clients make it, in the history.
    async fn write_at(&self, at: u64, key: Id, value: u64) -> Outcome {
        let invoked = self.history.borrow_mut().tick();
        let (asked, outcome) = self.write_once(at, key, value).await;
        self.record(at, asked, outcome, invoked)
    }

    fn record(&self, at: u64, asked: Asked, outcome: Outcome, invoked: u64) -> Outcome {
        self.world.note(&format!("r{at}: {asked:?} {outcome:?}"));
        let mut history = self.history.borrow_mut();
        let returned = history.tick();
        history.push(Op {
            asked,
            outcome: outcome.clone(),
            invoked,
            returned,
        });
        outcome
    }

    /// Compares the replicas all the time, as far as they show themselves.
    async fn compare(self: Rc<Self>) {
        let mut oracle = Oracle::default();
        loop {
            platform::sleep(COMPARE).await;
            for id in 1..=REPLICAS {
                let Some((life, replica)) = self.replica(id) else {
                    continue;
                };
                // In a task of the replica: what it cannot read ends it, not us.
                let task = platform::scope_sync(life.tag(), || {
                    platform::spawn(async move { Glimpse::of(&replica) })
                });
                if let Ok(glimpse) = task.await {
                    for problem in oracle.look(life, &glimpse) {
                        self.problem(problem);
                    }
                }
            }
        }
    }

    /// A write; an unknown outcome is retried a few times with the same request id, as clients do.
    async fn write_once(&self, at: u64, key: Id, value: u64) -> (Asked, Outcome) {
        let envelope = fleet::write(key, value);
        let asked = Asked::Write {
            key,
            value,
            request: envelope.request_id,
        };
        let mut sent = false;
        for attempt in 0..3 {
            match self
                .propose(1 + (at - 1 + attempt) % REPLICAS, envelope.clone())
                .await
            {
                Ok(Committed {
                    reply: Ok(_), index, ..
                }) if !sent => return (asked, Outcome::Ok(index)),
                // The answer of the first time does not say at which index that was.
                Ok(Committed { reply: Ok(_), .. }) => return (asked, Outcome::Unknown),
                Ok(Committed { reply: Err(_), .. }) => return (asked, Outcome::Refused),
                Err(ProposeError::Unknown) => sent = true,
                Err(_) => {}
            }
        }
        (asked, if sent { Outcome::Unknown } else { Outcome::Refused })
    }
}

/// Makes the first replica a cluster and brings the others in, as the reconciler of a real one does.
async fn grow(first: Replica) -> bool {
    if first.initialize().await.is_err() {
        return false;
    }
    for id in 2..=REPLICAS {
        let mut voter = false;
        for _ in 0..200 {
            voter = first.add_learner(id).await.is_ok() && first.promote(id).await.is_ok();
            if voter {
                break;
            }
            platform::sleep(Duration::from_millis(50)).await;
        }
        if !voter {
            return false;
        }
    }
    true
}

/// Everything between birth and peace: faults of the seed's choice.
async fn faults(cluster: &Cluster) {
    for _ in 0..chance::between(6, 14) {
        platform::sleep(Duration::from_millis(chance::between(150, 1200))).await;
        cluster.bury();
        let victim = 1 + chance::below(REPLICAS);
        match chance::below(12) {
            0 => cluster.kill(victim, false),
            1 => cluster.kill(victim, true),
            2 => (1..=REPLICAS).for_each(|id| cluster.kill(id, true)),
            3 => cluster.world.crash_at_io_point(victim, chance::between(1, 40)),
            4 => isolate(cluster, victim),
            5 => skew(cluster, victim),
            6 => snapshot(cluster, victim).await,
            7 => break_disk(cluster, victim),
            8 => cluster.world.stall_disk(victim, chance::between(100, STALL_MS)),
            9 => hand_over(cluster, victim).await,
            _ => {
                cluster.world.note("heal");
                cluster.bus.heal(false);
                cluster.start_all().await;
            }
        }
    }
}

fn skew(cluster: &Cluster, victim: u64) {
    let ms = i64::try_from(chance::below(8_000)).unwrap_or(0) - 4_000;
    cluster.world.note(&format!("skew r{victim} {ms} ms"));
    cluster.world.skew(victim, ms);
}

/// Fails one operation of the victim's disk: it must end itself, and come back with what it had promised.
fn break_disk(cluster: &Cluster, victim: u64) {
    let faults = [
        Fault::WriteFails,
        Fault::WriteFindsNoSpace,
        Fault::SyncFails,
        Fault::SyncFindsNoSpace,
    ];
    let fault = faults[usize::try_from(chance::below(4)).unwrap_or(0)];
    cluster.world.note(&format!("disk of r{victim}: {fault:?}"));
    cluster.disks[&victim].inject(fault);
}

/// Lets the victim hand leadership over, if it leads.
async fn hand_over(cluster: &Cluster, at: u64) {
    let Some((life, replica)) = cluster.replica(at) else {
        return;
    };
    cluster.world.note(&format!("hand over r{at}"));
    let task = platform::scope_sync(life.tag(), || {
        platform::spawn(async move { drop(replica.transfer_leader(None).await) })
    });
    drop(task.await);
}

/// Cuts a replica off, in one direction or in both.
fn isolate(cluster: &Cluster, victim: u64) {
    let (out, inward) = match chance::below(3) {
        0 => (true, false),
        1 => (false, true),
        _ => (true, true),
    };
    cluster
        .world
        .note(&format!("isolate r{victim} out={out} in={inward}"));
    for other in (1..=REPLICAS).filter(|other| *other != victim) {
        if out {
            cluster.bus.cut(victim, other);
        }
        if inward {
            cluster.bus.cut(other, victim);
        }
    }
}

async fn snapshot(cluster: &Cluster, at: u64) {
    let Some((life, replica)) = cluster.replica(at) else {
        return;
    };
    cluster.world.note(&format!("snapshot r{at}"));
    let task = platform::scope_sync(life.tag(), || {
        platform::spawn(async move { replica.trigger_snapshot().await })
    });
    drop(task.await);
}

/// Ends all faults and waits for the clients: a cluster that is left alone answers everybody within their
/// deadlines.
async fn calm(cluster: &Cluster, clients: Vec<tokio::task::JoinHandle<()>>) {
    cluster.world.note("calm");
    cluster.calm.set(true);
    cluster.bus.heal(true);
    cluster.world.steady();
    cluster.start_all().await;
    for client in clients {
        if let Err(ended) = client.await {
            cluster.problem(format!("a client did not end: {ended}"));
        }
    }
}

/// Waits until all replicas serve and have applied the same.
async fn settle(cluster: &Cluster, keys: &[Id]) {
    let deadline = platform::now() + SETTLE;
    loop {
        cluster.start_all().await;
        let mut serving = true;
        for id in 1..=REPLICAS {
            let value = platform::random_u64() >> 1;
            serving &= matches!(cluster.write_at(id, keys[0], value).await, Outcome::Ok(_));
            serving &= matches!(cluster.read_at(id, keys[0]).await, Outcome::Ok(_));
        }
        platform::sleep(Duration::from_millis(500)).await;
        let index = |id| {
            cluster
                .replica(id)
                .map_or(0, |(_, replica)| replica.view().index())
        };
        let indexes: BTreeSet<u64> = (1..=REPLICAS).map(index).collect();
        if serving && indexes.len() == 1 {
            return;
        }
        if platform::now() > deadline {
            return cluster.problem(format!(
                "healed, but it does not settle: applied {indexes:?}, serving {serving}"
            ));
        }
    }
}

/// What must hold at the end: equal states, their invariants, and a history that the journal agrees with.
fn check(cluster: &Cluster) {
    let live = cluster.live.borrow();
    let states: Vec<(u64, MemRead)> = live
        .iter()
        .map(|(id, (_, replica))| (*id, oracle::state_of(replica)))
        .collect();
    for problem in oracle::agreement(&states) {
        cluster.problem(problem);
    }
    if let Some((_, state)) = states.first() {
        for problem in cluster.history.borrow().check(&history::journal(state)) {
            cluster.problem(problem);
        }
    }
    for panic in cluster.world.panics() {
        cluster.problem(format!("panic: {panic}"));
    }
}

/// Runs the whole of it on the paused runtime of this process.
pub(crate) async fn whole(world: &'static World) -> (Rc<Cluster>, usize) {
    let cluster = Cluster::new(world);
    tokio::task::spawn_local(cluster.clone().watch_over());
    let keys = cluster.birth().await;
    if cluster.problems.borrow().is_empty() {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| tokio::task::spawn_local(cluster.clone().client(number, keys.clone())))
            .collect();
        let watch = tokio::task::spawn_local(cluster.clone().compare());
        faults(&cluster).await;
        calm(&cluster, clients).await;
        settle(&cluster, &keys).await;
        watch.abort();
        check(&cluster);
    }
    let answered = cluster.history.borrow().answered();
    (cluster, answered)
}

impl Cluster {
    /// Problems found, in order; empty when the seed is good.
    pub(crate) fn problems(&self) -> Vec<String> {
        self.problems.borrow().clone()
    }

    /// Messages that went over the bus.
    pub(crate) fn messages(&self) -> u64 {
        self.bus.messages()
    }
}
