//! The part of a random history that is about workers.

use bytes::Bytes;
use palyra_state::{Actor, Command, Id, fleet, identity, nodes};

use super::Step;
use super::lives::{renewal, shown};
use crate::kit::{World, attack, operator, workers};

/// What workers show, mostly honest.
const STEPS: [&[&str]; 8] = [
    &[],
    &[],
    &[],
    &["evidence 3", "quote good"],
    &["expires +10m"],
    &["image other"],
    &["sign impostor"],
    &["issued +40s"],
];

/// A policy, and two nodes with real keys: one has attested, the other was asked to.
pub(super) fn begin(world: &mut World) {
    let set = workers::set_policy(world, attack::policy());
    workers::ask(world, set);
    for name in ["n0", "n1"] {
        let renew = identity::RenewCertificate {
            device_id: world.id(name),
            certificate: workers::worker_certificate(name, 1),
            counter: 1,
            source: "192.0.2.7".to_owned(),
        };
        let node = world.node(name);
        world.accept(node.clone(), renew);
        let report = workers::reconcile(world, name, Vec::new());
        world.accept(node, report);
        workers::challenged(world, name);
    }
    workers::attests(world, "n0", &[]);
}

pub(super) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    if fleet::policy(&world.state).is_none() {
        let set = workers::set_policy(world, attack::policy());
        return (operator("root"), set.into());
    }
    let due = fleet::due(&world.state, world.at, 50);
    let unchecked = fleet::unchecked(&world.state, 20);
    match step.actor % 16 {
        0 | 6 | 7 if !due.is_empty() => return (Actor::System, fleet::Lapse { ids: due }.into()),
        1 | 4 | 5 if !unchecked.is_empty() => {
            return (Actor::System, fleet::Recheck { ids: unchecked }.into());
        }
        2 => return (operator("root"), policy(world, step).into()),
        3 => {
            let older_than_ms = u64::from(step.one) * 100_000 + 1;
            return (Actor::System, fleet::Reap { older_than_ms }.into());
        }
        _ => {}
    }
    // Few, so that what they go through has several steps.
    let name = format!("n{}", step.two % 2);
    let worker_id = world.id(&name);
    let held = fleet::worker(&world.state, worker_id).unwrap_or_default();
    let waits = held.quarantine.is_some() && held.reverify_at == 0;
    match step.kind % 3 {
        _ if waits && step.one > 0 => asked(world, step, worker_id),
        0 if step.actor > 128 && held.reverify_at == 0 => asked(world, step, worker_id),
        _ => attests(world, step, &name),
    }
}

fn policy(world: &World, step: &Step) -> fleet::SetPolicy {
    let mut policy = attack::policy();
    policy.leases_per_worker = u32::from(step.one) + 1;
    policy.heartbeat_timeout = 5_000;
    if step.one == 5 {
        policy.images = vec![attack::digest("other")];
    }
    workers::set_policy(world, policy)
}

/// The next thing on the way to an accepted statement: a real key, a session, a challenge, a statement.
fn attests(world: &mut World, step: &Step, name: &str) -> (Actor, Command) {
    let worker_id = world.id(name);
    let node = shown(world, name);
    let spki = workers::worker_certificate(name, 0).spki;
    let kept = identity::certificates_of(
        &world.state,
        identity::CertificateKind::Node,
        &worker_id.to_string(),
    );
    let works = |found: &identity::Certificate| {
        found.spki == spki
            && found.not_after > world.at
            && !matches!(
                found.status(),
                identity::CertificateStatus::Superseded | identity::CertificateStatus::Revoked
            )
    };
    if !kept.iter().any(works) {
        let made = identity::NewCertificate {
            not_after: world.at + 3_000_000,
            der: Bytes::from(format!("worker certificate {}", world.index)),
            ..workers::worker_certificate(name, 0)
        };
        return (node, renewal(world, worker_id, made, 1).into());
    }
    if nodes::node(&world.state, worker_id).is_none_or(|found| found.session.is_none()) {
        let attach = crate::kit::commands::attach(world, name, 1, &[]);
        return (node, attach.into());
    }
    let known = fleet::worker(&world.state, worker_id).unwrap_or_default();
    if known.reconciled_epoch == 0 && step.one > 1 {
        return (node, workers::reconcile(world, name, Vec::new()).into());
    }
    let open = known.challenge;
    if open.is_none() && step.one != 5 {
        return (node, workers::challenge(world, name).into());
    }
    let at = workers::situation(world, name);
    let steps = STEPS[usize::from(step.actor) % STEPS.len()];
    let made = attack::forge(&at, &attack::key(name), steps);
    (node, workers::attest(world, name, made).into())
}

/// What operators ask of a worker, and what it tells of a lease.
fn asked(world: &World, step: &Step, worker_id: Id) -> (Actor, Command) {
    let reason = "spring".to_owned();
    let held = fleet::worker(&world.state, worker_id).unwrap_or_default();
    let command = match step.actor % 8 {
        _ if held.quarantine.is_some() && step.one > 1 => fleet::Reverify { worker_id, reason }.into(),
        _ if held.drain.is_some() && step.one > 1 => fleet::Release { worker_id, reason }.into(),
        _ if !held.unclean.is_empty() || held.failure.is_some() => fleet::Cleanup {
            worker_id,
            reason,
            force: step.one > 2,
        }
        .into(),
        0 | 1 => fleet::Quarantine { worker_id, reason }.into(),
        2 | 3 => fleet::Reverify { worker_id, reason }.into(),
        4 | 5 => fleet::Drain {
            worker_id,
            reason,
            deadline_ms: u64::from(step.one) * 1_000,
            force: step.one == 0,
        }
        .into(),
        6 => fleet::Release { worker_id, reason }.into(),
        _ => fleet::Cleanup {
            worker_id,
            reason,
            force: step.one > 2,
        }
        .into(),
    };
    (operator("root"), command)
}
