//! Workers that may be given work, and grants, for tests of leases.

use palyra_state::{Actor, approvals, fleet, leases};

use super::{World, attack, commands, operator, workers};

/// The policy that honest workers meet, with so many slots of each.
pub fn policy(world: &mut World, slots: u32) {
    let policy = fleet::Policy {
        leases_per_worker: slots,
        max_lease_ttl: 60_000,
        ..attack::policy()
    };
    let set = workers::set_policy(world, policy);
    world.accept(operator("root"), set);
}

/// The policy from now on wants no more of any worker than its own word.
pub fn lax(world: &mut World) {
    let mut lax = fleet::policy(&world.state).unwrap();
    for capability in &mut lax.capabilities {
        capability.min_evidence = fleet::Evidence::SelfReported as i32;
    }
    let set = workers::set_policy(world, lax);
    world.accept(operator("root"), set);
}

/// What a worker says it holds, in its present session.
pub fn report(world: &mut World, name: &str, held: Vec<leases::Held>) {
    let report = leases::Reconcile {
        worker_id: world.id(name),
        epoch: workers::epoch(world, name),
        held,
    };
    let node = world.node(name);
    world.accept(node, report);
}

/// A session of this worker, in which it says what it holds.
pub fn attach(world: &mut World, name: &str, held: Vec<leases::Held>) {
    let node = world.node(name);
    let attach = commands::attach(world, name, 1, &[]);
    world.accept(node, attach);
    report(world, name, held);
}

/// A worker that may be given `echo` and `lint`: reconciled and admitted. `steps` change what it shows, as in
/// attacks.
pub fn ready(world: &mut World, name: &str, steps: &[&str]) -> Actor {
    let node = workers::pair(world, name);
    report(world, name, Vec::new());
    let shown = workers::attests(world, name, steps);
    assert_eq!(shown.refusal, None, "{name}");
    node
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
