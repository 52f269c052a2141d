//! The fields of commands about workers.

use palyra_state::fleet::{self, Policy};
use palyra_state::{Actor, Command, limits};

use super::kit::{attack, workers};
use super::{Field, Stage, by_replica, root, text};

/// The id of a node that has asked for a challenge.
fn worker(stage: &mut Stage) -> palyra_state::Id {
    workers::challenged(&mut stage.world, "n1").worker_id
}

fn policy(stage: &Stage, change: impl FnOnce(&mut Policy)) -> (Actor, Command) {
    let mut policy = attack::policy();
    change(&mut policy);
    root(workers::set_policy(&stage.world, policy))
}

fn names(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|at| format!("name-{at:03}"))
}

pub(super) const FLEET: &[Field] = &[
    (
        "the reason of a policy",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            root(fleet::SetPolicy {
                reason: text(size),
                ..workers::set_policy(&stage.world, attack::policy())
            })
        },
    ),
    (
        "images of the policy",
        limits::POLICY_ENTRIES,
        "E0807",
        |stage, size| {
            policy(stage, |policy| {
                policy.images = names(size).map(|name| attack::digest(&name)).collect()
            })
        },
    ),
    (
        "versions of the WIT ABI",
        limits::POLICY_ENTRIES,
        "E0807",
        |stage, size| policy(stage, |policy| policy.wit_abis = names(size).collect()),
    ),
    (
        "authorities of a tool",
        limits::AUTHORITIES_PER_TOOL,
        "E0807",
        |stage, size| {
            policy(stage, |policy| {
                policy.capabilities[0].authorities = names(size).collect()
            })
        },
    ),
    (
        "slots of a worker",
        limits::SLOTS_PER_WORKER as usize,
        "E0807",
        |stage, size| policy(stage, |policy| policy.leases_per_worker = size as u32),
    ),
    (
        "workers of the policy",
        limits::WORKERS as usize,
        "E0807",
        |stage, size| policy(stage, |policy| policy.max_workers = size as u32),
    ),
    (
        "the life of a lease",
        limits::LEASE_TTL_MAX as usize,
        "E0807",
        |stage, size| policy(stage, |policy| policy.max_lease_ttl = size as u64),
    ),
    (
        "the absence of a worker",
        limits::HEARTBEAT_TIMEOUT_MAX as usize,
        "E0807",
        |stage, size| policy(stage, |policy| policy.heartbeat_timeout = size as u64),
    ),
    (
        "the life of a statement",
        limits::ATTESTATION_LIFE_MAX as usize,
        "E0807",
        |stage, size| policy(stage, |policy| policy.max_attestation_life = size as u64),
    ),
    (
        "the reason of a quarantine",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            root(fleet::Quarantine {
                worker_id: worker(stage),
                reason: text(size),
            })
        },
    ),
    (
        "the reason of a reverification",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            root(fleet::Reverify {
                worker_id: worker(stage),
                reason: text(size),
            })
        },
    ),
    (
        "the reason of a drain",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            root(fleet::Drain {
                worker_id: worker(stage),
                reason: text(size),
                ..fleet::Drain::default()
            })
        },
    ),
    (
        "the deadline of a drain",
        limits::DRAIN_MAX as usize,
        "E0906",
        |stage, size| {
            root(fleet::Drain {
                worker_id: worker(stage),
                deadline_ms: size as u64,
                ..fleet::Drain::default()
            })
        },
    ),
    (
        "workers of a lapse",
        limits::LAPSE_BATCH,
        "E0907",
        |stage, size| {
            let ids = vec![worker(stage); size];
            by_replica(fleet::Lapse { ids })
        },
    ),
    (
        "workers of a recheck",
        limits::RECHECK_BATCH,
        "E0907",
        |stage, size| {
            let ids = vec![worker(stage); size];
            by_replica(fleet::Recheck { ids })
        },
    ),
];
