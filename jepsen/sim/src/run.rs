//! One seed: birth of the cluster, faults under load, heal and drain, and what must hold at the end.
//!
//! The seed draws everything: latencies, losses, timings, snapshot thresholds, which faults come and when.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use palyra_pki::KeyPair;
use palyra_platform as platform;
use palyra_state::{Fingerprint, Id, MemRead};
use tokio::task::{JoinHandle, spawn_local};

use crate::agents;
use crate::change;
use crate::clients::{self, Seen};
use crate::cluster::{Cluster, Phase};
use crate::enrol;
use crate::fleet;
use crate::history;
use crate::ledger;
use crate::nemesis;
use crate::oracle;
use crate::revocation;
use crate::runs;
use crate::workers;
use crate::world::World;

/// Registers, each the label of one device.
const REGISTERS: usize = 3;
/// Clients of the registers, each with one operation at a time.
const CLIENTS: u64 = 4;
/// Nodes that work.
const NODES: usize = 2;
/// Workers that hold leases.
const WORKERS: usize = 2;
/// Followers of the journal.
const FOLLOWERS: usize = 2;
/// Virtual time in which a healed cluster must finish what is open, and then agree and serve.
const SETTLE: Duration = Duration::from_secs(60);

/// Runs the whole of it on the paused runtime of this process; gives back how many operations were answered.
pub(crate) async fn whole(world: &'static World) -> (Rc<Cluster>, usize) {
    let cluster = Cluster::new(world);
    spawn_local(cluster.clone().watch_over());
    let devices = birth(&cluster).await;
    if cluster.problems().is_empty() {
        live(&cluster, devices).await;
    }
    let answered = cluster.history.borrow().answered();
    (cluster, answered)
}

/// Paired and registered devices.
struct Devices {
    registers: Vec<Id>,
    nodes: Vec<Id>,
    workers: Vec<(Id, KeyPair)>,
}

/// A cluster with its devices.
async fn birth(cluster: &Rc<Cluster>) -> Devices {
    let fresh = |count: usize| (0..count).map(|_| fleet::fresh()).collect::<Vec<Id>>();
    let devices = Devices {
        registers: fresh(REGISTERS),
        nodes: fresh(NODES),
        workers: fresh(WORKERS)
            .into_iter()
            .filter_map(|id| Some((id, KeyPair::generate(&mut platform::fill_random).ok()?)))
            .collect(),
    };
    if !change::birth(cluster).await {
        cluster.problem("the cluster was not born".into());
        return devices;
    }
    let plain = devices
        .registers
        .iter()
        .chain(&devices.nodes)
        .map(|id| (*id, None));
    let keyed = devices
        .workers
        .iter()
        .map(|(id, key)| (*id, Some(Fingerprint::from_bytes(key.spki_sha256()))));
    for (device, key) in plain.chain(keyed) {
        for envelope in fleet::pair(device, key) {
            // What is refused here is noted as a problem, which ends the run.
            let _ = cluster.insist(envelope).await;
        }
    }
    let workers = devices.workers.iter().map(|(id, _)| id);
    for node in devices.nodes.iter().chain(workers) {
        let first = fleet::write(fleet::node(*node, 0), *node, 1);
        let _ = cluster.insist(first).await;
    }
    let _ = cluster.insist(fleet::policy()).await;
    devices
}

/// Load and faults, then peace, then the verdict.
async fn live(cluster: &Rc<Cluster>, devices: Devices) {
    let Devices {
        registers,
        nodes,
        workers,
    } = devices;
    let mut busy: Vec<JoinHandle<()>> = (0..CLIENTS)
        .map(|number| spawn_local(clients::registers(cluster.clone(), number, registers.clone())))
        .collect();
    busy.push(spawn_local(agents::operator(cluster.clone(), nodes.clone())));
    busy.push(spawn_local(enrol::door(cluster.clone())));
    busy.push(spawn_local(runs::operator(cluster.clone())));
    let mut steady: Vec<JoinHandle<()>> = nodes
        .iter()
        .map(|node| spawn_local(agents::agent(cluster.clone(), *node)))
        .collect();
    for (device, key) in workers {
        steady.push(spawn_local(workers::worker(cluster.clone(), device, key)));
    }
    steady.push(spawn_local(revocation::prober(cluster.clone())));
    let followers: Vec<JoinHandle<Seen>> = (0..FOLLOWERS)
        .map(|_| spawn_local(clients::follow(cluster.clone())))
        .collect();

    nemesis::strike(cluster).await;

    cluster.world.note("calm");
    let calm = cluster.world.elapsed_ns();
    cluster.phase.set(Phase::Drain);
    cluster.bus.heal(true);
    cluster.world.steady();
    let keeper = spawn_local(keep_up(cluster.clone()));
    // A cluster that is left alone answers everybody within their deadlines, and ends what was begun.
    ended(cluster, busy).await;
    finish_change(cluster).await;
    if !agents::drained(cluster, SETTLE).await {
        cluster.problem("healed, but dispatches stay open".into());
    }
    if !runs::ended(cluster, SETTLE).await {
        cluster.problem("healed, but runs stay open".into());
    }
    cluster.phase.set(Phase::Over);
    ended(cluster, steady).await;
    let mut seen = Vec::new();
    for follower in followers {
        match follower.await {
            Ok(rows) => seen.push(rows),
            Err(died) => cluster.problem(format!("a follower did not end: {died}")),
        }
    }
    settle(cluster, &registers).await;
    revocation::opens(cluster, registers[0]).await;
    keeper.abort();
    check(cluster, &seen, calm).await;
}

/// Starts whoever is dead: a fault that was armed may strike late.
async fn keep_up(cluster: Rc<Cluster>) {
    loop {
        cluster.start_all().await;
        platform::sleep(Duration::from_millis(200)).await;
    }
}

async fn ended(cluster: &Cluster, tasks: Vec<JoinHandle<()>>) {
    for task in tasks {
        if let Err(died) = task.await {
            cluster.problem(format!("a client did not end: {died}"));
        }
    }
}

async fn finish_change(cluster: &Cluster) {
    let end = platform::now() + SETTLE;
    while cluster.changing.get() {
        if platform::now() > end {
            return cluster.problem("healed, but a change of the members does not end".into());
        }
        platform::sleep(Duration::from_millis(100)).await;
    }
}

/// Waits until all replicas serve and have applied the same.
async fn settle(cluster: &Rc<Cluster>, keys: &[Id]) {
    let deadline = platform::now() + SETTLE;
    loop {
        let mut serving = true;
        for id in cluster.members() {
            let value = platform::random_u64() >> 1;
            serving &= clients::write(cluster, id, keys[0], value)
                .await
                .index()
                .is_some();
            serving &= clients::read(cluster, id, keys[0]).await.index().is_some();
        }
        platform::sleep(Duration::from_millis(500)).await;
        let mut indexes = BTreeSet::new();
        for id in cluster.members() {
            indexes.insert(cluster.look(id, |view| view.index()).await);
        }
        if serving && indexes.len() == 1 && !indexes.contains(&None) {
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
async fn check(cluster: &Cluster, followers: &[Seen], calm: u64) {
    let mut states: Vec<(u64, MemRead)> = Vec::new();
    for id in cluster.members() {
        if let Some(state) = cluster.look(id, oracle::state_of).await {
            states.push((id, state));
        }
    }
    let mut problems = oracle::agreement(&states);
    if let Some((_, state)) = states.first() {
        let rows = history::journal(state);
        let history = cluster.history.borrow();
        problems.extend(history.check(&rows));
        problems.extend(ledger::check(&history, &rows, state));
        runs::close(cluster, state, &rows);
        problems.extend(runs::check(cluster, calm));
        problems.extend(
            followers
                .iter()
                .filter_map(|seen| clients::check_seen(seen, &rows)),
        );
    }
    problems.extend(
        cluster
            .world
            .panics()
            .into_iter()
            .map(|panic| format!("panic: {panic}")),
    );
    for problem in problems {
        cluster.problem(problem);
    }
}
