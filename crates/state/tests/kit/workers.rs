//! Workers: nodes whose identity key is a real one, so that they can attest.

use bytes::Bytes;
use palyra_state::identity::{NewCertificate, RenewCertificate};
use palyra_state::{Actor, Applied, Command, Digest, Reply, cluster, fleet, leases, nodes, reply};

use super::attack::{self, Shown, Situation};
use super::{World, certificate, commands, operator};

/// The certificate of a worker of this name: over its real key.
pub fn worker_certificate(name: &str, number: u64) -> NewCertificate {
    NewCertificate {
        der: Bytes::from(format!("worker certificate {number} of {name}")),
        spki: Digest::of(&attack::public_key(&attack::key(name))),
        ..certificate(name)
    }
}

/// The policy, set on top of the present one.
pub fn set_policy(world: &World, policy: fleet::Policy) -> fleet::SetPolicy {
    fleet::SetPolicy {
        policy,
        expected_version: fleet::policy(&world.state).map_or(0, |known| known.version),
        reason: "spring".to_owned(),
    }
}

/// A node of this name with a real key, in a session.
pub fn pair(world: &mut World, name: &str) -> Actor {
    let node = world.pair(name);
    let renew = RenewCertificate {
        device_id: world.id(name),
        certificate: worker_certificate(name, 1),
        counter: 1,
        source: "192.0.2.7".to_owned(),
    };
    world.accept(node.clone(), renew);
    let attach = commands::attach(world, name, 1, &[]);
    world.accept(node.clone(), attach);
    node
}

/// Epoch of the present session of a node, or of its last one.
pub fn epoch(world: &mut World, name: &str) -> u64 {
    let id = world.id(name);
    nodes::node(&world.state, id).map_or(0, |node| node.last_epoch)
}

pub fn challenge(world: &mut World, name: &str) -> fleet::OpenChallenge {
    fleet::OpenChallenge {
        worker_id: world.id(name),
        epoch: epoch(world, name),
        nonce: Digest::of(format!("challenge at {}", world.index).as_bytes()),
    }
}

/// Opens a challenge, which must be accepted; the situation that a statement is made in.
#[track_caller]
pub fn challenged(world: &mut World, name: &str) -> Situation {
    let (node, open) = (world.node(name), challenge(world, name));
    let applied = world.accept(node, open);
    match applied.reply {
        Ok(Reply::Challenged(reply::Challenged { nonce, .. })) => Situation {
            nonce,
            ..situation(world, name)
        },
        other => panic!("{other:?}"),
    }
}

/// The situation of a worker now, over the nonce of its open challenge.
pub fn situation(world: &mut World, name: &str) -> Situation {
    let worker_id = world.id(name);
    let open = fleet::worker(&world.state, worker_id).and_then(|worker| worker.challenge);
    Situation {
        cluster_id: cluster::cluster(&world.state).map_or_else(Default::default, |born| born.cluster_id),
        worker_id,
        nonce: open.map_or_else(|| attack::digest("no nonce"), |open| open.nonce),
        now: world.at,
    }
}

pub fn attest(world: &mut World, name: &str, shown: Shown) -> fleet::Attest {
    fleet::Attest {
        worker_id: world.id(name),
        epoch: epoch(world, name),
        statement: shown.statement,
        public_key: shown.public_key,
        signature: shown.signature,
    }
}

/// Attests over a new challenge, with these steps; the entry must be accepted.
#[track_caller]
pub fn attests(world: &mut World, name: &str, steps: &[&str]) -> reply::Attestation {
    let at = challenged(world, name);
    let shown = attack::forge(&at, &attack::key(name), steps);
    let (node, attest) = (world.node(name), attest(world, name, shown));
    outcome(&world.accept(node, attest))
}

/// What became of a statement.
pub fn outcome(applied: &Applied) -> reply::Attestation {
    match &applied.reply {
        Ok(Reply::Attestation(attestation)) => attestation.clone(),
        other => panic!("{other:?}"),
    }
}

/// By the operator `root`.
pub fn ask(world: &mut World, command: impl Into<Command>) -> Applied {
    world.accept(operator("root"), command)
}

/// Whether a worker's statement counts.
pub fn is_admitted(world: &mut World, name: &str) -> bool {
    let id = world.id(name);
    let attested = fleet::worker(&world.state, id).and_then(|worker| worker.attested);
    attested.is_some_and(|attested| attested.policy_version != 0)
}

/// What a worker holds, in its present session: nothing but what is named.
pub fn reconcile(world: &mut World, name: &str, held: Vec<leases::Held>) -> leases::Reconcile {
    leases::Reconcile {
        worker_id: world.id(name),
        epoch: epoch(world, name),
        held,
    }
}

/// A worker of this name that may be given work.
pub fn ready(world: &mut World, name: &str) -> Actor {
    if fleet::policy(&world.state).is_none() {
        let set = set_policy(world, attack::policy());
        ask(world, set);
    }
    let node = pair(world, name);
    let nothing = reconcile(world, name, Vec::new());
    world.accept(node.clone(), nothing);
    assert_eq!(attests(world, name, &[]).refusal, None);
    node
}
