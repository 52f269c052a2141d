//! A state of realistic size, the same at every call: what guards of instruction counts measure against.
//!
//! Two replicas, twenty operators, a thousand nodes of which nine hundred are connected, dispatches in all stages,
//! forty workers that are all busy, runs that wait for a worker of another kind, grants that wait for a decision. A
//! worker or node that comes on top is therefore the only free one. Making it takes some thousand entries; [`keep`]
//! and [`kept`] put it into a file, so that a process that is simulated instruction by instruction only reads it.

use std::path::Path;

use bytes::{Buf, BufMut, Bytes};
use palyra_state::cluster::{ReplicaStatus, SetReplicaStatus};
use palyra_state::dispatch::Outcome;
use palyra_state::{Id, MemRead, access, approvals, leases, nodes};

use super::{World, commands, fleet, operator, replica};

/// Nodes that are paired and registered.
pub const NODES: u64 = 1_000;
/// Those of them that are in a session, every other one at each replica.
pub const CONNECTED: u64 = 900;

/// The name of a node, from 0.
pub fn node(number: u64) -> String {
    format!("node-{number:04}")
}

/// The state.
pub fn large() -> World {
    let mut world = World::born();
    world.checked = false;
    second_replica(&mut world);
    for number in 0..20 {
        let added = commands::add_operator(&format!("operator-{number:02}"), access::Role::Operator);
        world.accept(operator("root"), added);
    }
    for number in 0..NODES {
        world.pair(&node(number));
    }
    for number in 0..CONNECTED {
        let (name, at) = (node(number), 1 + number % 2);
        let (actor, attach) = (world.node(&name), commands::attach(&mut world, &name, at, &[]));
        world.accept(actor, attach);
    }
    dispatches(&mut world);
    workers(&mut world);
    for number in 0..100 {
        let create = approvals::CreateGrant {
            grant_id: world.id(&format!("wish-{number}")),
            run_id: world.id(&format!("wished-{number}")),
            tool: "lint".to_owned(),
            approval_id: world.id(&format!("question-{number}")),
            ..approvals::CreateGrant::default()
        };
        world.accept(operator(&format!("operator-{:02}", number % 20)), create);
    }
    world
}

fn second_replica(world: &mut World) {
    let mint = commands::mint_token(world, "token-r2", "r2");
    world.accept(operator("root"), mint);
    let allocate = commands::allocate(world, "token-r2", "r2");
    world.accept(replica(1), allocate);
    let mut admit = commands::admit(2, "r2");
    (
        admit.root,
        admit.certificate.authority,
        admit.certificate.authority_number,
    ) = (1, 0, 1);
    world.accept(replica(1), admit);
    for (by, status) in [(2, ReplicaStatus::Learner), (1, ReplicaStatus::Voter)] {
        let set = SetReplicaStatus {
            replica_id: 2,
            status: status as i32,
        };
        world.accept(replica(by), set);
    }
}

/// Of every nine connected nodes one has an ended dispatch, one a dispatch under way, one more that waits behind it.
fn dispatches(world: &mut World) {
    for number in 0..CONNECTED {
        let (name, count) = (node(number), number % 9);
        for turn in 0..count.min(2) {
            let dispatch = format!("dispatch-{number}-{turn}");
            let submit = commands::submit(world, &dispatch, &name, "echo");
            world.accept(operator("root"), submit);
        }
        if count == 1 {
            let id = world.id(&name);
            let epoch = nodes::node(&world.state, id).map_or(0, |node| node.last_epoch);
            let dispatch = format!("dispatch-{number}-0");
            let complete = commands::complete(world, &dispatch, epoch, Outcome::Succeeded);
            let actor = world.node(&name);
            world.accept(actor, complete);
        }
    }
}

/// Workers with one slot, each of them with a run; and runs that none of them may be given.
fn workers(world: &mut World) {
    fleet::policy(world, 1);
    for number in 0..40 {
        let (worker, run) = (format!("worker-{number:02}"), format!("run-{number:02}"));
        let actor = fleet::ready(world, &worker, &[]);
        fleet::grant(world, &run, "lint");
        let start = start(world, &run);
        world.accept(operator("root"), start);
        let run_id = world.id(&run);
        let lease = leases::leases_of_run(&world.state, run_id).remove(0);
        let accept = leases::Accept {
            lease_id: lease.id,
            fence: lease.fence,
            epoch: lease.epoch,
        };
        world.accept(actor, accept);
    }
    for number in 0..40 {
        let run = format!("waiting-{number:02}");
        fleet::grant(world, &run, "lint");
        let mut start = start(world, &run);
        start.labels.insert("site".to_owned(), "elsewhere".to_owned());
        world.accept(operator("root"), start);
    }
}

fn start(world: &mut World, run: &str) -> leases::StartRun {
    leases::StartRun {
        run_id: world.id(run),
        tool: "lint".to_owned(),
        params: Bytes::from_static(b"{}"),
        effect: palyra_state::dispatch::Effect::Idempotent as i32,
        ttl_ms: 60_000,
        timeout_ms: 3_600_000,
        ..leases::StartRun::default()
    }
}

/// Writes a world into a file: its place, its names, its keys and values.
#[allow(clippy::disallowed_methods)]
pub fn keep(world: &World, path: &Path) {
    let mut out = Vec::new();
    let mut part = |bytes: &[u8]| {
        out.put_u32(u32::try_from(bytes.len()).unwrap());
        out.put_slice(bytes);
    };
    part(&world.index.to_be_bytes());
    part(&world.at.to_be_bytes());
    part(&(world.names.len() as u64).to_be_bytes());
    for (name, id) in &world.names {
        part(name.as_bytes());
        part(&id.to_bytes());
    }
    for (key, value) in world.state.iter() {
        part(key);
        part(value);
    }
    std::fs::write(path, out).unwrap();
}

/// The world that lies in a file.
#[allow(clippy::disallowed_methods)]
pub fn kept(path: &Path) -> World {
    let mut rest = Bytes::from(std::fs::read(path).unwrap());
    let mut part = || {
        rest.has_remaining().then(|| {
            let length = rest.get_u32() as usize;
            rest.split_to(length)
        })
    };
    let mut number = || part().unwrap().get_u64();
    let mut world = World::new();
    world.checked = false;
    (world.index, world.at) = (number(), number());
    for _ in 0..number() {
        let name = String::from_utf8(part().unwrap().to_vec()).unwrap();
        world
            .names
            .insert(name, Id::from_slice(&part().unwrap()).unwrap());
    }
    let pairs = std::iter::from_fn(|| Some((part()?.to_vec(), part()?)));
    world.state = MemRead::from_iter(pairs);
    world
}

/// Has the allocator put together what was freed so far. It does so at the next request that is not small, and what is
/// counted must not pay for what was freed while it was prepared.
pub fn settle() {
    drop(std::hint::black_box(Vec::<u8>::with_capacity(64 * 1024)));
}
