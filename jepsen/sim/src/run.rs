//! One seed: birth of the cluster, faults under load, heal and drain, and what must hold at the end.
//!
//! The seed draws everything, see `setup` and `faults`.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use palyra_pki::KeyPair;
use palyra_platform as platform;
use palyra_replica::Replica;
use palyra_state::journal::Row;
use palyra_state::{Fingerprint, Id, MemRead};
use serde_json::json;
use tokio::task::{JoinHandle, spawn_local};

use crate::agents;
use crate::change;
use crate::clients;
use crate::cluster::{Cluster, Phase};
use crate::enrol;
use crate::fleet;
use crate::history;
use crate::judge::{self, Times};
use crate::ledger;
use crate::load::Workload;
use crate::nemesis;
use crate::oracle;
use crate::readers;
use crate::revocation;
use crate::runs;
use crate::setup::Setup;
use crate::watchers::Watcher;
use crate::workers;
use crate::world::{Life, World};

/// Registers, each the label of one device.
const REGISTERS: usize = 3;
/// Writes and reads that each replica has to answer in the end.
const LAST_ASKED: usize = 10;
/// Virtual time in which a healed cluster must finish what is open, and then agree and serve.
const SETTLE: Duration = Duration::from_secs(60);

/// Runs the whole of it on the paused runtime of this process.
pub(crate) async fn whole(world: &'static World, setup: Setup, workload: Workload) -> Rc<Cluster> {
    let cluster = Cluster::new(world, setup, workload.draw());
    world.note(&format!("{} {:?}", workload.name(), cluster.load));
    spawn_local(cluster.clone().watch_over());
    let devices = birth(&cluster).await;
    // What Raft did wrong by then is no reason to stop: it shows more of it.
    if cluster
        .problems()
        .iter()
        .all(|problem| problem.starts_with("raft."))
    {
        live(&cluster, devices).await;
    }
    cluster
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
        nodes: fresh(cluster.load.nodes),
        workers: fresh(cluster.load.workers)
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

/// Those who ask for something, until faults end.
fn asking(cluster: &Rc<Cluster>, registers: &[Id], nodes: &[Id]) -> Vec<JoinHandle<()>> {
    let load = cluster.load;
    let mut busy = Vec::new();
    for number in 0..load.clients {
        let client = clients::registers(cluster.clone(), number, registers.to_vec());
        busy.push(spawn_local(client));
    }
    for number in 0..load.steady {
        let client = clients::steady(cluster.clone(), load.clients + number, registers.to_vec());
        busy.push(spawn_local(client));
    }
    if !nodes.is_empty() {
        busy.push(spawn_local(agents::operator(cluster.clone(), nodes.to_vec())));
    }
    for _ in 0..load.doors {
        busy.push(spawn_local(enrol::door(cluster.clone())));
    }
    if load.workers > 0 {
        busy.push(spawn_local(runs::operator(cluster.clone())));
    }
    for _ in 0..load.readers {
        busy.push(spawn_local(readers::reader(cluster.clone())));
    }
    if load.replaced {
        busy.push(spawn_local(change::again_and_again(cluster.clone())));
        busy.push(spawn_local(change::look_on(cluster.clone())));
    }
    busy
}

/// Those who do what is asked, and look on, until everything is over.
fn serving(cluster: &Rc<Cluster>, nodes: &[Id], workers: Vec<(Id, KeyPair)>) -> Vec<JoinHandle<()>> {
    let mut steady: Vec<JoinHandle<()>> = nodes
        .iter()
        .map(|node| spawn_local(agents::agent(cluster.clone(), *node)))
        .collect();
    for (device, key) in workers {
        steady.push(spawn_local(workers::worker(cluster.clone(), device, key)));
    }
    for _ in 0..cluster.load.probes {
        steady.push(spawn_local(revocation::prober(cluster.clone())));
    }
    steady
}

/// Load and faults, then peace, then the verdict.
async fn live(cluster: &Rc<Cluster>, devices: Devices) {
    let Devices {
        registers,
        nodes,
        workers,
    } = devices;
    let busy = asking(cluster, &registers, &nodes);
    let steady = serving(cluster, &nodes, workers);
    let watchers = watching(cluster, &registers);

    nemesis::strike(cluster).await;

    cluster.world.note("calm");
    let calm = cluster.world.elapsed_ns();
    cluster.phase.set(Phase::Drain);
    cluster.relieve(true);
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
    let watchers = still_watching(cluster, watchers).await;
    settle(cluster, &registers).await;
    revocation::opens(cluster, registers[0]).await;
    let settled = cluster.world.elapsed_ns();
    cluster.tape.borrow_mut().fault(settled, "healed", json!({}));
    last_words(cluster, watchers).await;
    keeper.abort();
    check(cluster, &Times { calm, settled }).await;
}

fn watching(cluster: &Rc<Cluster>, registers: &[Id]) -> Vec<JoinHandle<Watcher>> {
    let watch = |number| {
        let roams = number < cluster.load.roaming;
        spawn_local(Watcher::new(cluster, number, roams, registers).watch())
    };
    (0..cluster.load.watchers()).map(watch).collect()
}

async fn still_watching(cluster: &Cluster, tasks: Vec<JoinHandle<Watcher>>) -> Vec<Watcher> {
    let mut watchers = Vec::new();
    for task in tasks {
        match task.await {
            Ok(watcher) => watchers.push(watcher),
            Err(died) => cluster.problem(format!("a watcher did not end: {died}")),
        }
    }
    watchers
}

/// Everything is whole: a machine that is alone is let in, watchers see what there is to see, and heads are read.
async fn last_words(cluster: &Cluster, watchers: Vec<Watcher>) {
    if cluster.load.doors > 0 {
        enrol::alone_at_last(cluster).await;
    }
    futures::future::join_all(watchers.into_iter().map(Watcher::see_all)).await;
    if cluster.load.readers > 0 {
        readers::last_heads(cluster).await;
    }
    if cluster.load.replaced {
        change::last_members(cluster).await;
    }
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
            let tell = |(life, leader): &(Life, Replica)| {
                let known = Cluster::status(*life, leader).map(|status| (status.term, status.members));
                format!("r{} with its term and members {known:?}", life.replica())
            };
            let leaders: Vec<String> = cluster.leaders().iter().map(tell).collect();
            return cluster.problem(format!(
                "healed, but a change of the members does not end; leaders: {leaders:?}"
            ));
        }
        platform::sleep(Duration::from_millis(100)).await;
    }
}

/// Whether a replica answers so many writes, and as many reads, all at once.
async fn serves(cluster: &Cluster, at: u64, key: Id, times: usize) -> bool {
    let ask = |_| async move {
        let value = platform::random_u64() >> 1;
        let wrote = clients::write(cluster, at, key, value).await.index().is_some();
        wrote && clients::read(cluster, at, key).await.index().is_some()
    };
    let answered = futures::future::join_all((0..times).map(ask)).await;
    answered.into_iter().all(|answered| answered)
}

/// Waits until all replicas serve and have applied the same; then they serve more, and agree again.
async fn settle(cluster: &Rc<Cluster>, keys: &[Id]) {
    let deadline = platform::now() + SETTLE;
    let mut times = 1;
    loop {
        let mut serving = true;
        for id in cluster.members() {
            serving &= serves(cluster, id, keys[0], times).await;
        }
        platform::sleep(Duration::from_millis(500)).await;
        let mut indexes = BTreeSet::new();
        for id in cluster.members() {
            indexes.insert(cluster.look(id, |view| view.index()).await);
        }
        if serving && indexes.len() == 1 && !indexes.contains(&None) {
            // What an earlier leader began is ended by the present one.
            let joint = |(life, leader): &(Life, Replica)| {
                Cluster::status(*life, leader).is_some_and(|status| status.members.joint)
            };
            if cluster.leaders().iter().any(joint) && platform::now() <= deadline {
                continue;
            }
            if cluster.leaders().iter().any(joint) {
                let what = "membership.no-joint-left: healed, but a change of the members stays half done";
                cluster.problem(what.into());
            }
            if times == LAST_ASKED {
                return;
            }
            times = LAST_ASKED;
            continue;
        }
        if platform::now() > deadline {
            return cluster.problem(format!(
                "healed, but it does not settle: applied {indexes:?}, serving {serving}"
            ));
        }
    }
}

/// The states of all members at one index: whoever leads goes on with its own work, so that they are looked at again
/// until nothing came in between.
async fn final_states(cluster: &Cluster) -> Vec<(u64, MemRead)> {
    let end = platform::now() + SETTLE;
    loop {
        let mut states = Vec::new();
        let mut indexes = BTreeSet::new();
        for id in cluster.members() {
            let found = cluster
                .look(id, |view| (view.index(), oracle::state_of(view)))
                .await;
            indexes.insert(found.as_ref().map(|(index, _)| *index));
            states.extend(found.map(|(_, state)| (id, state)));
        }
        if indexes.len() == 1 && !indexes.contains(&None) {
            return states;
        }
        if platform::now() > end {
            cluster.problem(format!(
                "healed, but replicas do not come to one index: {indexes:?}"
            ));
            return Vec::new();
        }
        platform::sleep(Duration::from_millis(50)).await;
    }
}

/// What must hold at the end: equal states, their invariants, and a history that the journal agrees with.
async fn check(cluster: &Cluster, times: &Times) {
    let states = final_states(cluster).await;
    let mut problems = oracle::agreement(&states);
    let agree = problems.is_empty();
    if let Some((_, state)) = states.first() {
        let rows = history::journal(state);
        let history = cluster.history.borrow();
        problems.extend(history.check(&rows));
        problems.extend(ledger::check(&history, &rows, state));
        runs::close(cluster, state);
        agents::close(cluster, state);
        if cluster.load.needs_rows() {
            cluster.close_journal(&states, agree);
        }
        problems.extend(judge::check(cluster, times, &rows));
        note_paths(cluster, &rows);
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

/// Counts what only the journal shows of the paths that were taken.
fn note_paths(cluster: &Cluster, rows: &[Row]) {
    let reach = |name: &str| cluster.world.reach(name);
    for row in rows {
        match (row.action.as_str(), row.detail("state")) {
            ("dispatch.finished", "timed_out") => reach("dispatch-timed-out"),
            ("dispatch.finished", "session_lost") => reach("dispatch-lost"),
            ("dispatch.rebound", _) => reach("dispatch-rebound"),
            ("run.requeued", _) => reach("run-requeued"),
            ("lease.rebound", _) => reach("lease-rebound"),
            _ => {}
        }
        match (row.action.as_str(), row.detail("reason")) {
            ("lease.ending", reason) => reach(&format!("lease-ending-{reason}")),
            ("node.gone" | "node.offline", _) => reach("node-given-up"),
            _ => {}
        }
    }
}
