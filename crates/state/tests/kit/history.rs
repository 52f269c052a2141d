//! Random histories: commands that mostly make sense, by actors that mostly may, over few names, so that they
//! meet.

#[path = "approvals.rs"]
mod approvals;
#[path = "authorities.rs"]
mod authorities;
#[path = "lives.rs"]
mod lives;

#[path = "fleets.rs"]
mod fleets;
#[path = "runs.rs"]
mod runs;

#[path = "dispatches.rs"]
mod dispatches;

use bytes::Bytes;
use palyra_state::cluster::ReplicaStatus;
use palyra_state::{Actor, Command, access, ca, cluster, dispatch, identity, nodes, pairing};
use proptest::prelude::*;

use self::lives::{shown, shown_operator};
use crate::kit::{World, certificate, commands, id_at, operator, replica};

/// One step of a history: who, what, and how much later.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub actor: u8,
    pub kind: u8,
    pub one: u8,
    pub two: u8,
    pub wait: u64,
    /// Sends the request of an earlier step again instead.
    pub again: bool,
    /// The clock of whoever proposes is behind.
    pub back: bool,
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let wait = prop_oneof![
        60 => Just(0u64),
        30 => 0u64..1_500,
        6 => 0u64..60_000,
        2 => 0u64..700_000,
        1 => 0u64..5_000_000,
        1 => Just(90_000_000u64),
    ];
    (
        any::<u8>(),
        any::<u8>(),
        0u8..6,
        0u8..5,
        wait,
        prop::bool::weighted(0.05),
        prop::bool::weighted(0.03),
    )
        .prop_map(|(actor, kind, one, two, wait, again, back)| Step {
            actor,
            kind,
            one,
            two,
            wait,
            again,
            back,
        })
}

/// A cluster of two replicas with three nodes, two of them attached.
pub(crate) fn fleet() -> World {
    let mut world = World::born();
    let root = operator("root");
    let mint = commands::mint_token(&mut world, "t", "r2");
    world.accept(root, mint);
    let allocate = commands::allocate(&mut world, "t", "r2");
    world.accept(replica(1), allocate);
    world.accept(replica(1), commands::admit(2, "r2"));
    for (name, held_by) in [("n0", 1), ("n1", 2), ("n2", 0)] {
        let node = world.pair(name);
        let register = commands::register(&mut world, name);
        world.accept(node.clone(), patient(register, 4));
        if held_by != 0 {
            let attach = commands::attach(&mut world, name, held_by, &[]);
            world.accept(node, attach);
        }
    }
    fleets::begin(&mut world);
    world
}

/// The same registration, with attempts of what may be run again.
fn patient(mut register: nodes::Register, attempts: u32) -> nodes::Register {
    register.capabilities[0].max_attempts = attempts;
    register.capabilities[0].backoff_ms = 200;
    register
}

/// What a step asks for, and who usually does.
pub(crate) fn command(world: &mut World, step: &Step) -> (Actor, Command) {
    let usual = match step.kind % 34 {
        _ if step.kind >= 236 => approvals::command(world, step),
        _ if step.kind >= 200 => fleets::command(world, step),
        _ if step.kind >= 164 => runs::command(world, step),
        0..8 => pairing_command(world, step),
        13 | 23 => lives::command(world, step),
        8..14 => nodes_command(world, step),
        14..24 => dispatches::command(world, step),
        24..28 => identity_command(world, step),
        32.. => authorities::command(world, step),
        _ => people_command(world, step),
    };
    // One in sixteen is asked by somebody else.
    let actor = match step.actor {
        0 => Actor::System,
        1..4 => replica(u64::from(step.one)),
        4..8 => shown_operator(world, ["root", "op1", "op2", "op3"][usize::from(step.two) % 4]),
        8..12 => shown(world, &format!("n{}", step.two)),
        12..16 => Actor::Anonymous {
            source: "192.0.2.1".to_owned(),
        },
        _ => usual.0,
    };
    (actor, usual.1)
}

fn pairing_command(world: &mut World, step: &Step) -> (Actor, Command) {
    let (one, device) = (step.one, format!("n{}", step.two));
    let name = format!("c{}", world.index);
    let pairing_id = id_at(world.at, (4 << 40) + world.index);
    let open = pairing::open_codes(&world.state, world.at);
    let picked = open
        .get(usize::from(one) % open.len().max(1))
        .cloned()
        .unwrap_or_default();
    // Of every other code nobody knows the PIN.
    let is_known = |code: &&pairing::Code| code.number % 2 == 1;
    let tried: Vec<(&pairing::Code, &pairing::Attempt)> = open
        .iter()
        .filter_map(|code| Some((code, code.attempts.last().filter(|attempt| !attempt.failed)?)))
        .collect();
    let root = operator("root");
    match step.kind % 8 {
        // Few at a time, so that attempts gather at the same one.
        0 if open.len() < 3 => {
            let method = if one % 2 == 0 { "pin" } else { "ticket" };
            (root, commands::mint(world, &name, method).into())
        }
        1..5 if one > 2 && !tried.is_empty() => {
            let (code, attempt) = tried[usize::from(step.actor) % tried.len()];
            if is_known(&code) {
                let mut prove = commands::prove(world, "p", &name, None, &attempt.device_id.to_string());
                prove.pairing_id = pairing_id;
                prove.code_id = code.id;
                prove.attempt_id = Some(attempt.id);
                return (replica(1), prove.into());
            }
            let fail = pairing::FailAttempt {
                attempt_id: attempt.id,
                code_id: code.id,
                source: String::new(),
            };
            (replica(1), fail.into())
        }
        5 | 6 if one > 1 => decide(world, step),
        0..7 => {
            let begin = pairing::BeginAttempt {
                attempt_id: pairing_id,
                code_id: Some(picked.id),
                method: picked.method,
                ..commands::begin(world, "a", &name, &device)
            };
            (replica(1), begin.into())
        }
        7 if one == 5 => {
            let revoke = pairing::RevokeCode {
                code_id: picked.id,
                reason: "typo".to_owned(),
            };
            (root, revoke.into())
        }
        7 if one > 2 => {
            let approved = pairing::requests(&world.state, None, 500)
                .into_iter()
                .rfind(|found| found.status() == pairing::RequestStatus::Approved);
            let pairing_id = approved.map_or(pairing_id, |found| found.id);
            (replica(1), pairing::MarkCompleted { pairing_id }.into())
        }
        _ => expire_pairing(world),
    }
}

/// Names every code and every request that is due, the open ones too.
fn expire_pairing(world: &World) -> (Actor, Command) {
    let codes = pairing::codes(&world.state).into_iter().map(|code| code.id);
    let requests = pairing::due_requests(&world.state, world.at).into_iter();
    let expire = pairing::Expire {
        codes: codes.take(100).collect(),
        requests: requests.take(100).collect(),
    };
    (Actor::System, expire.into())
}

/// Approves or rejects a request that waits.
fn decide(world: &mut World, step: &Step) -> (Actor, Command) {
    let root = operator("root");
    let waiting = pairing::pending(&world.state, world.at);
    let Some(found) = waiting.get(usize::from(step.one) % waiting.len().max(1)) else {
        let expire = pairing::Expire {
            codes: Vec::new(),
            requests: Vec::new(),
        };
        return (Actor::System, expire.into());
    };
    let pairing_id = found.id;
    if step.one == 5 {
        return (
            root,
            pairing::Reject {
                pairing_id,
                reason: "no".to_owned(),
            }
            .into(),
        );
    }
    let certificate = identity::NewCertificate {
        der: Bytes::from(format!("certificate {}", world.index)),
        spki: found.csr_spki,
        ..certificate("any")
    };
    (
        root,
        pairing::Approve {
            pairing_id,
            certificate,
            sas: String::new(),
            reason: String::new(),
        }
        .into(),
    )
}

fn nodes_command(world: &mut World, step: &Step) -> (Actor, Command) {
    let name = format!("n{}", step.two);
    let node = shown(world, &name);
    let device = world.id(&name);
    if step.actor.is_multiple_of(5) {
        return lapse_command(world, step);
    }
    match step.kind % 6 {
        0 | 1 => {
            let mut register = commands::register(world, &name);
            register.agent_version = format!("0.{}", step.one);
            register.lost_after = [0, 60_000, 600_000][usize::from(step.one) % 3];
            let slots = u32::from(step.one);
            let register = patient(commands::limited(register, [slots, slots / 2], [slots, 0]), slots);
            (node, register.into())
        }
        2..5 => {
            let open = dispatch::open_of_device(&world.state, device, None, 100);
            let held = open
                .iter()
                .map(|found| found.id)
                .filter(|id| id.to_bytes()[15] % 2 == 0)
                .collect();
            let replica_id = u64::from(step.one % 2) + 1;
            let attach = nodes::Attach {
                device_id: device,
                replica_id,
                transport: "stream".to_owned(),
                held,
                held_attempts: vec![u32::from(step.actor % 16 == 1)],
                fallback: String::new(),
            };
            (node, attach.into())
        }
        _ if step.one == 0 => (
            Actor::System,
            nodes::DetachReplica {
                replica_id: 1,
                limit: 2,
                up_to_epoch: 0,
                reason: "lost".to_owned(),
                suspect_for: u64::from(step.two) * 5_000,
                silent_for: u64::from(step.two) * 1_000,
            }
            .into(),
        ),
        _ if step.one.is_multiple_of(2) => detach_many_command(world, step),
        _ => {
            let session = nodes::node(&world.state, device).map_or(0, |node| node.last_epoch);
            let epoch = session.saturating_sub(u64::from(step.one == 1));
            (replica(1), commands::detach(world, &name, epoch).into())
        }
    }
}

/// Gives up whoever is late, and names some that are not.
fn lapse_command(world: &World, step: &Step) -> (Actor, Command) {
    let mut ids = nodes::due(&world.state, world.at, 50);
    ids.extend(
        nodes::nodes(&world.state, None, 2)
            .iter()
            .map(|node| node.device_id),
    );
    let lost_after = [0, 30_000, 300_000][usize::from(step.two) % 3];
    (Actor::System, nodes::Lapse { ids, lost_after }.into())
}

/// Ends the sessions that two nodes have or had, each in its way.
fn detach_many_command(world: &mut World, step: &Step) -> (Actor, Command) {
    let ends = [step.two, step.two + 1].map(|number| {
        let device_id = world.id(&format!("n{number}"));
        let epoch = nodes::node(&world.state, device_id).map_or(0, |node| node.last_epoch);
        nodes::Ended {
            device_id,
            epoch,
            reason: "gone quiet".to_owned(),
            how: i32::from((step.one + number) % 3),
            silent_for: u64::from(step.actor) * 100,
        }
    });
    let detach = nodes::DetachMany {
        ends: ends.to_vec(),
        suspect_for: u64::from(step.one) * 2_000,
        lost_after: u64::from(step.two) * 60_000,
    };
    (replica(1), detach.into())
}

fn identity_command(world: &mut World, step: &Step) -> (Actor, Command) {
    let name = format!("n{}", step.two);
    let device_id = world.id(&name);
    match step.kind % 4 {
        // Rare, for nothing can be done with a revoked device.
        0 if step.actor > 200 => (
            operator("root"),
            identity::RevokeDevice {
                device_id,
                reason: "lost".to_owned(),
            }
            .into(),
        ),
        0 if step.actor > 100 => {
            let end = commands::end_of_some(world, device_id, step.actor > 150, step.one);
            (operator("root"), end)
        }
        1 => {
            let made = identity::NewCertificate {
                der: Bytes::from(format!("certificate {}", world.index)),
                not_after: world.at + 3_000_000,
                ..certificate(&format!("key {name} {}", step.one))
            };
            (
                shown(world, &name),
                lives::renewal(world, device_id, made, step.actor).into(),
            )
        }
        2 => {
            let made = identity::NewCertificate {
                der: Bytes::from(format!("certificate {}", world.index)),
                not_after: world.at + 3_000_000,
                ..certificate("op1")
            };
            let name = "op1".to_owned();
            (
                shown_operator(world, "op1"),
                identity::RenewOperatorCertificate {
                    name,
                    certificate: made,
                }
                .into(),
            )
        }
        3 if step.one == 0 => {
            let Actor::Operator { fingerprint, .. } = shown_operator(world, "op1") else {
                unreachable!("it is one");
            };
            let revoke = identity::RevokeOperatorCertificate {
                fingerprint,
                reason: "old".to_owned(),
            };
            (operator("root"), revoke.into())
        }
        _ => {
            let register = commands::register(world, &name);
            (shown(world, &name), register.into())
        }
    }
}

fn people_command(world: &mut World, step: &Step) -> (Actor, Command) {
    let name = format!("op{}", step.one % 3 + 1);
    let root = operator("root");
    match (step.actor >> 2) % 10 {
        0 => {
            let role = [access::Role::Viewer, access::Role::Operator, access::Role::Admin];
            let certificate = identity::NewCertificate {
                der: Bytes::from(format!("certificate of {name} {}", world.index)),
                ..certificate(&name)
            };
            let role = role[usize::from(step.two) % 3] as i32;
            (
                root,
                access::AddOperator {
                    name,
                    role,
                    certificate,
                }
                .into(),
            )
        }
        1 => (
            root,
            access::RemoveOperator {
                name,
                reason: String::new(),
            }
            .into(),
        ),
        2 => (
            root,
            access::SetRole {
                name,
                role: i32::from(step.two % 3),
            }
            .into(),
        ),
        _ => replica_command(world, step),
    }
}

/// Joins, moves and removes replicas.
fn replica_command(world: &mut World, step: &Step) -> (Actor, Command) {
    let replica_name = format!("r{}", step.one);
    let replica_id = u64::from(step.two);
    let token = format!("t{}", (world.index / 8 + u64::from(step.one)) % 50);
    let root = operator("root");
    match (step.actor >> 2) % 10 {
        0..4 if step.one > 3 => level_command(world),
        0..4 => (root, commands::mint_token(world, &token, &replica_name).into()),
        4 | 5 => {
            let open = cluster::join_tokens(&world.state)
                .into_iter()
                .rfind(|token| token.used_by == 0);
            let Some(found) = open else {
                return (root, commands::mint_token(world, &token, &replica_name).into());
            };
            let addresses = commands::addresses(&found.name);
            let allocate = cluster::AllocateReplica {
                token_id: found.id,
                name: found.name,
                addresses,
            };
            (replica(1), allocate.into())
        }
        6 | 7 => {
            let waiting = |found: &cluster::Replica| found.status() == ReplicaStatus::Allocated;
            let id = cluster::replicas(&world.state)
                .into_iter()
                .find(waiting)
                .map_or(replica_id, |found| found.id);
            let mut admit = commands::admit(id, &format!("replica {id}"));
            admit.root = ca::ca(&world.state).issuing;
            (replica(1), admit.into())
        }
        8 if step.one > 2 => level_command(world),
        8 => {
            let status = i32::from(step.one % 4) + 1;
            (
                Actor::System,
                cluster::SetReplicaStatus { replica_id, status }.into(),
            )
        }
        _ if step.one > 2 => (root, cluster::RemoveReplica { replica_id }.into()),
        _ => {
            let addresses = commands::addresses(&format!("host{}", step.one));
            (
                Actor::System,
                cluster::UpdateReplicaAddresses {
                    replica_id,
                    addresses,
                    feature_level: u32::from(step.actor % 4),
                    max_staleness_ms: u64::from(step.one) * 1_000,
                }
                .into(),
            )
        }
    }
}

/// Raises the feature level when it can be, and otherwise lets who understands least say that it was updated.
fn level_command(world: &World) -> (Actor, Command) {
    if let Some(level) = cluster::next_feature_level(&world.state) {
        return (Actor::System, cluster::RaiseFeatureLevel { level }.into());
    }
    let members = cluster::replicas(&world.state).into_iter();
    let lags = members
        .filter(cluster::Replica::is_member)
        .min_by_key(cluster::Replica::understands)
        .unwrap_or_default();
    let update = cluster::UpdateReplicaAddresses {
        replica_id: lags.id,
        feature_level: lags.understands() + 1,
        max_staleness_ms: 0,
        addresses: lags.addresses,
    };
    (replica(lags.id), update.into())
}
