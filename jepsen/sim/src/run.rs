//! One seed: birth of the cluster, faults under load, heal and drain, and what must hold at the end.
//!
//! The seed draws everything: latencies, losses, timings, snapshot thresholds, which faults come and when.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use palyra_platform as platform;
use palyra_state::{Id, MemRead};
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
use crate::world::World;

/// Registers, each the label of one device.
const REGISTERS: usize = 3;
/// Clients of the registers, each with one operation at a time.
const CLIENTS: u64 = 4;
/// Nodes that work.
const NODES: usize = 2;
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
        live(&cluster, &devices).await;
    }
    let answered = cluster.history.borrow().answered();
    (cluster, answered)
}

/// A cluster with paired and registered devices.
async fn birth(cluster: &Rc<Cluster>) -> Vec<Id> {
    if !change::birth(cluster).await {
        cluster.problem("the cluster was not born".into());
        return Vec::new();
    }
    let devices: Vec<Id> = (0..REGISTERS + NODES).map(|_| fleet::fresh()).collect();
    for device in &devices {
        for envelope in fleet::pair(*device) {
            // What is refused here is noted as a problem, which ends the run.
            let _ = cluster.insist(envelope).await;
        }
    }
    for node in &devices[REGISTERS..] {
        let first = fleet::write(fleet::node(*node, 0), *node, 1);
        let _ = cluster.insist(first).await;
    }
    devices
}

/// Load and faults, then peace, then the verdict.
async fn live(cluster: &Rc<Cluster>, devices: &[Id]) {
    let (registers, nodes) = devices.split_at(REGISTERS);
    let mut busy: Vec<JoinHandle<()>> = (0..CLIENTS)
        .map(|number| spawn_local(clients::registers(cluster.clone(), number, registers.to_vec())))
        .collect();
    busy.push(spawn_local(agents::operator(cluster.clone(), nodes.to_vec())));
    busy.push(spawn_local(enrol::door(cluster.clone())));
    let mut steady: Vec<JoinHandle<()>> = nodes
        .iter()
        .map(|node| spawn_local(agents::agent(cluster.clone(), *node)))
        .collect();
    steady.push(spawn_local(agents::sweeper(cluster.clone())));
    steady.push(spawn_local(change::flatten(cluster.clone())));
    let followers: Vec<JoinHandle<Seen>> = (0..FOLLOWERS)
        .map(|_| spawn_local(clients::follow(cluster.clone())))
        .collect();

    nemesis::strike(cluster).await;

    cluster.world.note("calm");
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
    cluster.phase.set(Phase::Over);
    ended(cluster, steady).await;
    let mut seen = Vec::new();
    for follower in followers {
        match follower.await {
            Ok(rows) => seen.push(rows),
            Err(died) => cluster.problem(format!("a follower did not end: {died}")),
        }
    }
    settle(cluster, registers).await;
    keeper.abort();
    check(cluster, &seen).await;
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
async fn check(cluster: &Cluster, followers: &[Seen]) {
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
