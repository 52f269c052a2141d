//! Replicas of one process on a message bus, under virtual time, that can be killed and lose their power.
//!
//! The hooks are those of a simulation, kept per thread: each test runs on a thread of its own. Tasks carry
//! the id of their replica, so killing one aborts exactly its tasks.
#![allow(dead_code, unreachable_pub, missing_docs, clippy::unwrap_used)]

pub mod medium;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::{Arc, Once};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use palyra_platform::{self as platform, AbortHandle, Hooks, IoVerdict};
use palyra_replica::testing::Bus;
use palyra_replica::{Compaction, OpenError, Replica, ReplicaConfig, Status};
use palyra_state::cluster::{self, Addresses};
use palyra_state::identity::NewCertificate;
use palyra_state::{Actor, Command, Digest, Envelope, Id, Read};

use self::medium::Medium;

pub const CLUSTER: u128 = 0x0123_4567_89AB_CDEF_0123_4567_89AB_CDEF;
/// No test waits longer, in virtual time.
pub const PATIENCE: Duration = Duration::from_secs(60);

thread_local! {
    static TASKS: RefCell<HashMap<u64, Vec<AbortHandle>>> = RefCell::default();
    static SEED: RefCell<u64> = const { RefCell::new(1) };
    static START: RefCell<Option<platform::Instant>> = const { RefCell::new(None) };
    /// Counts down IO points of one replica; it dies at zero.
    static FUSE: RefCell<Option<(u64, u64)>> = const { RefCell::new(None) };
    /// The replica whose disk stands still.
    static STALLED: RefCell<Option<u64>> = const { RefCell::new(None) };
    static DEATHS: RefCell<Vec<(u64, String)>> = RefCell::default();
}

struct Simulated;

fn virtual_ms() -> u64 {
    let now = platform::now();
    START.with(|start| {
        let start = *start.borrow_mut().get_or_insert(now);
        1_000_000 + now.duration_since(start).as_millis() as u64
    })
}

impl Hooks for Simulated {
    fn on_spawn(&self, tag: Option<u64>, _name: &str, task: AbortHandle) {
        TASKS.with(|tasks| tasks.borrow_mut().entry(tag.unwrap_or(0)).or_default().push(task));
    }

    fn wall_ms(&self, _tag: Option<u64>) -> u64 {
        1_700_000_000_000 + virtual_ms()
    }

    fn boot_ms(&self, _tag: Option<u64>) -> u64 {
        virtual_ms()
    }

    fn fill_random(&self, _tag: Option<u64>, buf: &mut [u8]) {
        SEED.with(|seed| {
            for byte in buf {
                let mut seed = seed.borrow_mut();
                *seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                *byte = (*seed >> 33) as u8;
            }
        });
    }

    fn io_point(&self, tag: Option<u64>, _name: &'static str) -> Option<BoxFuture<'static, IoVerdict>> {
        let burnt = FUSE.with(|fuse| {
            let mut fuse = fuse.borrow_mut();
            match fuse.as_mut() {
                Some((victim, left)) if tag == Some(*victim) => {
                    *left = left.saturating_sub(1);
                    *left == 0
                }
                _ => false,
            }
        });
        Some(Box::pin(async move {
            while tag.is_some() && STALLED.with(|stalled| *stalled.borrow() == tag) {
                platform::sleep(Duration::from_millis(1)).await;
            }
            if burnt {
                IoVerdict::Crash
            } else {
                IoVerdict::Continue
            }
        }))
    }

    fn abort(&self, tag: Option<u64>, reason: &str) {
        let tag = tag.unwrap_or(0);
        DEATHS.with(|deaths| deaths.borrow_mut().push((tag, reason.to_owned())));
        kill_tasks(tag);
    }
}

fn kill_tasks(tag: u64) {
    for task in TASKS
        .with(|tasks| tasks.borrow_mut().remove(&tag))
        .unwrap_or_default()
    {
        task.abort();
    }
}

/// Runs a test under virtual time.
pub fn run<F: Future<Output = ()>>(seed: u64, body: impl FnOnce() -> F) {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| platform::install(&Simulated));
    SEED.with(|state| *state.borrow_mut() = seed);
    START.with(|start| *start.borrow_mut() = None);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(body());
}

/// Lets a replica die at its `at`-th IO point from now.
pub fn light_fuse(id: u64, at: u64) {
    FUSE.with(|fuse| *fuse.borrow_mut() = Some((id, at)));
}

/// Has the disk of one replica stand still, or none.
pub fn stall(id: Option<u64>) {
    STALLED.with(|stalled| *stalled.borrow_mut() = id);
}

/// Why a replica died first, if it died by itself.
pub fn death(id: u64) -> Option<String> {
    DEATHS.with(|deaths| {
        deaths
            .borrow()
            .iter()
            .find(|(dead, _)| *dead == id)
            .map(|(_, why)| why.clone())
    })
}

pub fn forget_deaths() {
    DEATHS.with(|deaths| deaths.borrow_mut().clear());
    FUSE.with(|fuse| *fuse.borrow_mut() = None);
}

pub struct World {
    pub bus: Arc<Bus>,
    pub disks: BTreeMap<u64, Arc<dyn Medium>>,
    /// Makes the disk of a new replica.
    pub new_disk: fn(u64) -> Arc<dyn Medium>,
    pub replicas: BTreeMap<u64, Replica>,
    pub compaction: Compaction,
    pub log_bytes: u64,
    pub in_flight_bytes: usize,
    requests: u128,
}

impl World {
    pub fn new() -> World {
        World {
            bus: Bus::new(),
            disks: BTreeMap::new(),
            new_disk: medium::in_memory,
            replicas: BTreeMap::new(),
            compaction: Compaction {
                snapshot_every: 100_000,
                keep: 100_000,
                purge_batch: 1,
            },
            log_bytes: u64::MAX,
            in_flight_bytes: 64 * 1024 * 1024,
            requests: 0,
        }
    }

    /// A cluster of `voters`, born and with its genesis applied.
    pub async fn born(voters: u64) -> World {
        let mut world = World::new();
        world.birth(voters).await;
        world
    }

    pub async fn birth(&mut self, voters: u64) {
        self.boot(1).await;
        self.replicas[&1].initialize().await.unwrap();
        self.propose_at(1, genesis()).await;
        for id in 2..=voters {
            self.boot(id).await;
            self.enlarge(id).await;
        }
    }

    /// Adds a running replica to the group and gives it a vote.
    pub async fn enlarge(&self, id: u64) {
        let leader = &self.replicas[&self.leader().await];
        leader.add_learner(id).await.unwrap();
        let target = leader.status().last_log;
        until(leader, |status| {
            status
                .peers
                .iter()
                .any(|peer| peer.id == id && peer.matched.is_some_and(|at| at >= target))
        })
        .await;
        leader.promote(id).await.unwrap();
    }

    pub fn config(&self, id: u64) -> ReplicaConfig {
        let mut config = ReplicaConfig::new(id, Id::from_bytes(CLUSTER.to_be_bytes()));
        config.compaction = self.compaction.clone();
        config.log_bytes = self.log_bytes;
        config.in_flight_bytes = self.in_flight_bytes;
        config
    }

    pub async fn boot(&mut self, id: u64) {
        self.try_boot(id).await.unwrap();
    }

    pub async fn try_boot(&mut self, id: u64) -> Result<(), OpenError> {
        let new_disk = self.new_disk;
        let disk = self.disks.entry(id).or_insert_with(|| new_disk(id)).clone();
        let config = self.config(id);
        let transport = self.bus.transport(id);
        let replica = platform::scope(id, async move {
            let engine = disk.open().await;
            let replica = Replica::open(config, engine, transport).await?;
            replica.start();
            Ok::<Replica, OpenError>(replica)
        })
        .await?;
        self.bus.attach(id, replica.peer_service());
        self.replicas.insert(id, replica);
        Ok(())
    }

    /// SIGKILL: the page cache survives.
    pub fn kill(&mut self, id: u64) {
        self.vanish(id);
        self.disks[&id].kill();
    }

    /// The plug: of what was not synced, the first `keep` batches survive.
    pub fn power_loss(&mut self, id: u64, keep: usize) {
        self.vanish(id);
        self.disks[&id].power_loss(keep);
    }

    fn vanish(&mut self, id: u64) {
        self.bus.detach(id);
        kill_tasks(id);
        self.replicas.remove(&id);
    }

    /// The replica that leads and that most others agree on.
    pub async fn leader(&self) -> u64 {
        let wait = async {
            loop {
                for (id, replica) in &self.replicas {
                    if replica.leads() {
                        return *id;
                    }
                }
                platform::sleep(Duration::from_millis(20)).await;
            }
        };
        platform::timeout(PATIENCE, wait).await.expect("nobody leads")
    }

    pub fn request(&mut self) -> Id {
        self.requests += 1;
        Id::from_bytes(((1_700_000_000_000u128 << 80) + self.requests).to_be_bytes())
    }

    pub fn envelope(&mut self, command: impl Into<Command>) -> Envelope {
        Envelope::new(self.request(), Actor::System, command)
    }

    /// Proposes at one replica, which must succeed.
    pub async fn propose_at(&mut self, id: u64, command: impl Into<Command>) -> u64 {
        let envelope = self.envelope(command);
        let replica = self.replicas[&id].clone();
        let task = platform::scope_sync(id, || {
            platform::spawn(async move { replica.propose(envelope).await })
        });
        let committed = task.await.unwrap().unwrap();
        committed.reply.unwrap();
        committed.index
    }

    /// Sets the register that tests write.
    pub async fn set(&mut self, at: u64, value: u64) -> u64 {
        self.propose_at(at, set(value)).await
    }

    /// Waits until all running replicas have applied `index`, and compares their states.
    pub async fn converged(&self, index: u64) {
        for replica in self.replicas.values() {
            assert!(
                replica.wait_applied(index, PATIENCE).await,
                "replica {} stays behind {index}",
                replica.id()
            );
        }
        let mut at: BTreeMap<u64, Digest> = BTreeMap::new();
        for replica in self.replicas.values() {
            let status = replica.status();
            let hash = at.entry(status.applied).or_insert(status.state_hash);
            assert_eq!(
                *hash, status.state_hash,
                "states differ at index {}",
                status.applied
            );
        }
    }
}

/// Waits until a replica's status is as it should be.
pub async fn until(replica: &Replica, mut good: impl FnMut(&Status) -> bool) {
    let wait = async {
        while !good(&replica.status()) {
            replica.changed(Duration::from_millis(100)).await;
        }
    };
    if platform::timeout(PATIENCE, wait).await.is_err() {
        panic!("replica {} never got there: {:?}", replica.id(), replica.status());
    }
}

pub fn genesis() -> cluster::Genesis {
    let certificate = |name: &'static str| NewCertificate {
        der: Bytes::from_static(name.as_bytes()),
        spki: Digest::of(name.as_bytes()),
        serial: Bytes::from_static(b"\x01"),
        not_before: 0,
        not_after: u64::MAX / 2,
        authority: 0,
        authority_number: 0,
    };
    cluster::Genesis {
        cluster_id: Id::from_bytes(CLUSTER.to_be_bytes()),
        trust_domain: "palyra.test.internal".to_owned(),
        root_cert_der: Bytes::from_static(b"root"),
        root_key_sealed: Bytes::from_static(b"sealed"),
        replica_name: "r1".to_owned(),
        addresses: addresses(0),
        authority_cert_der: Bytes::from_static(b"authority"),
        replica_certificate: certificate("r1"),
        operator_name: "root".to_owned(),
        operator_certificate: certificate("operator"),
    }
}

fn addresses(value: u64) -> Addresses {
    Addresses {
        peer: format!("h{value}:7444"),
        node: "h:7441".into(),
        enrol: "h:7442".into(),
        ..Addresses::default()
    }
}

/// A command that sets a register: replica 1's peer address.
pub fn set(value: u64) -> cluster::UpdateReplicaAddresses {
    cluster::UpdateReplicaAddresses {
        replica_id: 1,
        addresses: addresses(value),
        feature_level: 0,
        max_staleness_ms: 0,
    }
}

/// What the register holds.
pub fn get(view: &dyn Read) -> u64 {
    let peer = cluster::replica(view, 1)
        .expect("genesis is applied")
        .addresses
        .peer;
    peer.trim_start_matches('h')
        .split(':')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}
