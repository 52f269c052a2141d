//! Workers and grants for tests: admitted, reconciled, with free slots.

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_state::fleet::{self, Evidence};
use palyra_state::{Actor, approvals, leases, nodes, tables};
use prost::Message as _;

use super::{World, commands, operator};

/// Allows these tools, with so many slots of a worker.
pub fn policy(world: &mut World, tools: &[&str], slots: u32) {
    let trusted = |name: &&str| fleet::TrustedCapability {
        name: (*name).to_owned(),
        authorities: vec!["vendor".to_owned()],
        min_evidence: Evidence::SelfReported as i32,
    };
    let policy = fleet::Policy {
        version: 1,
        set_at: world.at,
        capabilities: tools.iter().map(trusted).collect(),
        leases_per_worker: slots,
        max_lease_ttl: 60_000,
        heartbeat_timeout: 15_000,
        max_workers: 1_000,
        ..fleet::Policy::default()
    };
    put(world, tables::FLEET_POLICY.key(()), policy.encode_to_vec());
}

fn put(world: &mut World, key: Vec<u8>, value: Vec<u8>) {
    world
        .state
        .absorb(&BTreeMap::from([(key, Some(Bytes::from(value)))]));
}

/// A session of this worker, in which it says what it holds.
pub fn report(world: &mut World, name: &str, held: Vec<leases::Held>) {
    let node = world.node(name);
    let attach = commands::attach(world, name, 1, &[]);
    world.accept(node.clone(), attach);
    let report = leases::Reconcile {
        worker_id: world.id(name),
        epoch: world.index,
        held,
    };
    world.accept(node, report);
}

/// A worker that may be given these tools.
pub fn ready(world: &mut World, name: &str, slots: u32, evidence: Evidence, tools: &[&str]) -> Actor {
    let node = world.pair(name);
    report(world, name, Vec::new());
    let id = world.id(name);
    let mut worker = fleet::worker(&world.state, id).unwrap();
    worker.attested = Some(fleet::Attested {
        evidence: evidence as i32,
        accepted_at: world.at,
        policy_version: 1,
        expires_at: world.at + 30 * 86_400_000,
        slots,
        tools: tools.iter().map(|tool| (*tool).to_owned()).collect(),
        ..fleet::Attested::default()
    });
    put(world, tables::WORKERS.key(id), worker.encode_to_vec());
    put(world, tables::WORKERS_CHECKED.key((1u64, id)), Vec::new());
    let mut totals = fleet::totals(&world.state);
    totals.admitted += 1;
    put(world, tables::FLEET_TOTALS.key(()), totals.encode_to_vec());
    report(world, name, Vec::new());
    node
}

/// The present session of a worker.
pub fn epoch(world: &mut World, name: &str) -> u64 {
    let id = world.id(name);
    let session = nodes::node(&world.state, id).and_then(|node| node.session);
    session.map_or(0, |session| session.epoch)
}

/// A grant of this run, asked for and allowed by `root`.
pub fn grant(world: &mut World, run: &str, tool: &str) {
    let create = approvals::CreateGrant {
        grant_id: world.id(&format!("grant-{run}")),
        run_id: world.id(run),
        tool: tool.to_owned(),
        approval_id: world.id(&format!("approval-{run}")),
        ..approvals::CreateGrant::default()
    };
    let approval_id = create.approval_id;
    world.accept(operator("root"), create);
    let decide = approvals::Decide {
        approval_id,
        allow: true,
        ..approvals::Decide::default()
    };
    world.accept(operator("root"), decide);
}
