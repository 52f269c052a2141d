//! Golden bytes: every record and every command, one hex line each. The log and the state outlive the binary,
//! so these bytes never change; a new field adds a line, and the old lines stay and must still decode.
//!
//! `UPDATE_EXPECT=1` adds lines for new names. It does not rewrite a line: that takes a hand, and a reason.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "golden/approvals.rs"]
mod approvals;
#[path = "golden/fleet.rs"]
mod fleet;
mod kit;
#[path = "golden/later.rs"]
mod later;
#[path = "golden/leases.rs"]
mod leases;
#[path = "golden/lives.rs"]
mod lives;
#[path = "golden/records.rs"]
mod records;
#[path = "golden/replies.rs"]
mod replies;

use std::collections::BTreeMap;
use std::path::Path;

use kit::{World, certificate, commands, fingerprint};
use palyra_state::{
    Actor, Command, Envelope, access, ca, cluster, decode, dispatch, identity, journal, nodes, pairing,
    reply, state_hash, tables,
};
use records::{id, records, text};

#[test]
fn bytes_never_change() {
    let path = Path::new(".").join("tests/golden.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let mut golden: BTreeMap<String, String> = text
        .lines()
        .map(|line| line.split_once(' ').expect(line))
        .map(|(name, hex)| (name.to_owned(), hex.to_owned()))
        .collect();
    let mut found = records();
    approvals::records(&mut found);
    approvals::commands(&mut found);
    approvals::shapes(&mut found);
    fleet::records(&mut found);
    fleet::commands(&mut found);
    fleet::shapes(&mut found);
    found.extend(command_samples());
    found.extend(shape_samples());
    leases::records(&mut found);
    let mut missing = Vec::new();
    for (name, bytes) in &found {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match golden.get(name) {
            Some(old) => assert_eq!(*old, hex, "the bytes of {name} changed"),
            None => missing.push((name.clone(), hex)),
        }
    }
    for name in golden.keys() {
        assert!(
            found.contains_key(name),
            "{name} is golden, but no sample makes it any more"
        );
    }
    if std::env::var("UPDATE_EXPECT").is_ok() {
        golden.extend(missing);
        let text: String = golden
            .iter()
            .map(|(name, hex)| format!("{name} {hex}\n"))
            .collect();
        std::fs::write(&path, text).unwrap();
        return;
    }
    assert!(
        missing.is_empty(),
        "no golden line for {missing:?}; UPDATE_EXPECT=1 adds it"
    );
}

#[test]
fn commands_decode_to_what_they_were() {
    for (name, envelope) in envelopes() {
        assert_eq!(decode(&envelope.encode()), Ok(envelope), "{name}");
    }
}

#[test]
fn what_is_not_understood_is_an_error() {
    let (_, envelope) = envelopes().into_iter().next().unwrap();
    let bytes = envelope.encode();
    assert!(decode(&bytes[..bytes.len() - 1]).is_err());
    assert!(decode(&[]).is_err());
    // Field 40 is no command of this version: the command is missing, not empty.
    let mut later = Envelope::new(
        envelope.request_id,
        Actor::System,
        pairing::Expire {
            codes: Vec::new(),
            requests: Vec::new(),
        },
    )
    .encode();
    let at = later.len() - 4;
    assert_eq!(later[at], (13 << 3) | 2, "the command's field");
    later[at] = (14 << 3) | 2;
    assert!(decode(&later).is_err(), "an action that the domain does not have");
    let unknown_role = access::SetRole {
        name: "a".to_owned(),
        role: 9,
    };
    assert!(decode(&Envelope::new(envelope.request_id, Actor::System, unknown_role).encode()).is_err());
    assert!(decode(&vec![0; palyra_state::limits::ENVELOPE_MAX + 1]).is_err());
}

fn command_samples() -> BTreeMap<String, Vec<u8>> {
    let mut samples = envelopes();
    let base = &samples["command.cluster.update_replica_addresses"];
    let with_level = cluster::UpdateReplicaAddresses {
        replica_id: 2,
        addresses: commands::addresses("r2"),
        feature_level: 2,
        max_staleness_ms: 0,
    };
    let with_level = Envelope::new(base.request_id, base.actor.clone(), with_level);
    let base = &samples["command.cluster.admit_replica"];
    let mut by_second_root = commands::admit(2, "r2");
    by_second_root.root = 2;
    by_second_root.certificate.authority_number = 2;
    let by_second_root = Envelope::new(base.request_id, base.actor.clone(), by_second_root);
    samples.insert(
        "command.cluster.admit_replica.by_root_2".to_owned(),
        by_second_root,
    );
    samples.insert(
        "command.cluster.update_replica_addresses.with_level".to_owned(),
        with_level,
    );
    let base = &samples["command.cluster.update_replica_addresses"];
    let with_staleness = cluster::UpdateReplicaAddresses {
        replica_id: 2,
        addresses: commands::addresses("r2"),
        feature_level: 0,
        max_staleness_ms: 5,
    };
    let with_staleness = Envelope::new(base.request_id, base.actor.clone(), with_staleness);
    samples.insert(
        "command.cluster.update_replica_addresses.with_staleness".to_owned(),
        with_staleness,
    );
    let base = &samples["command.nodes.register"];
    let mut world = World::new();
    let with_lost_after = nodes::Register {
        lost_after: 5,
        ..commands::register(&mut world, "n1")
    };
    let with_lost_after = Envelope::new(base.request_id, base.actor.clone(), with_lost_after);
    samples.insert(
        "command.nodes.register.with_lost_after".to_owned(),
        with_lost_after,
    );
    let base = &samples["command.nodes.detach_replica"];
    let with_times = nodes::DetachReplica {
        replica_id: 1,
        limit: 2,
        up_to_epoch: 3,
        reason: text("lost"),
        suspect_for: 4,
        silent_for: 5,
    };
    let with_times = Envelope::new(base.request_id, base.actor.clone(), with_times);
    samples.insert("command.nodes.detach_replica.with_times".to_owned(), with_times);
    later::fields(&mut samples);
    let base = &samples["command.identity.renew_certificate"];
    let counted = identity::RenewCertificate {
        device_id: id(3),
        certificate: certificate("n1"),
        counter: 3,
        source: text("192.0.2.7"),
    };
    let counted = Envelope::new(base.request_id, base.actor.clone(), counted);
    samples.insert("command.identity.renew_certificate.counted".to_owned(), counted);
    samples
        .into_iter()
        .map(|(name, envelope)| (name, envelope.encode()))
        .collect()
}

/// What is no message and lies on disk all the same: tags and key layouts of tables, the numbers of every enum, and
/// the two hashes.
fn shape_samples() -> BTreeMap<String, Vec<u8>> {
    let mut samples: BTreeMap<String, Vec<u8>> = tables::ALL
        .iter()
        .map(|(tag, name)| (format!("table.{name}"), vec![*tag]))
        .collect();
    let (one, other) = (id(1), id(2));
    let keys = [
        ("number", tables::REPLICAS.key(258u64)),
        ("id", tables::DEVICES.key(one)),
        ("digest", tables::CERTIFICATES.key(fingerprint("n1"))),
        ("text", tables::OPERATORS.key("alice")),
        ("cursor", tables::JOURNAL.key((258u64, 3u32))),
        ("request", tables::REQUESTS_SEEN.key((one, other))),
        (
            "request_by_age",
            tables::REQUESTS_BY_AGE.key((258u64, one, other)),
        ),
        (
            "certificate_of",
            tables::CERTIFICATES_OF.key((1u32, tables::Text("alice"), fingerprint("alice"))),
        ),
        ("session_of", tables::SESSIONS_OF.key((258u64, one))),
        ("node_due", tables::NODES_DUE.key((258u64, one))),
        ("node_by_status", tables::NODES_BY_STATUS.key((3u32, one))),
        ("by_state", tables::DISPATCHES_BY_STATE.key((8u32, one))),
        ("authority", tables::AUTHORITIES.key((258u64, 3u32))),
        ("member_ack", tables::MEMBER_ACKS.key((1u32, "alice"))),
        (
            "issued",
            tables::ISSUED.key(((258u64, 3u32, 4u64), fingerprint("n1"))),
        ),
        (
            "waiting",
            tables::WAITING.key(((one, tables::Text("echo")), (258u64, 259u64, other))),
        ),
    ];
    samples.extend(keys.map(|(name, key)| (format!("key.{name}"), key)));
    for (name, numbers) in enums() {
        let text: String = numbers
            .iter()
            .map(|(text, number)| format!("{text}={number} "))
            .collect();
        samples.insert(format!("enum.{name}"), text.into_bytes());
    }
    // A journal verifies, and replicas agree, only while these are computed as they always were.
    let mut world = World::born();
    let node = world.pair("n1");
    let attach = commands::attach(&mut world, "n1", 1, &[]);
    world.accept(node, attach);
    let last = journal::last_rows(&world.state, 1);
    samples.insert("hash.journal_row".to_owned(), last[0].hash.to_bytes().to_vec());
    samples.insert(
        "hash.state".to_owned(),
        state_hash(&world.state).to_bytes().to_vec(),
    );
    samples
}

/// The number of each variant of each enum that lies on disk.
fn enums() -> Vec<(&'static str, Vec<(String, i32)>)> {
    fn numbers<E: TryFrom<i32> + std::fmt::Debug>() -> Vec<(String, i32)> {
        let known = |number: i32| {
            E::try_from(number)
                .ok()
                .map(|variant| (format!("{variant:?}"), number))
        };
        (0..64).filter_map(known).collect()
    }
    vec![
        ("replica_status", numbers::<cluster::ReplicaStatus>()),
        ("role", numbers::<access::Role>()),
        ("operator_status", numbers::<access::OperatorStatus>()),
        ("device_status", numbers::<identity::DeviceStatus>()),
        ("certificate_kind", numbers::<identity::CertificateKind>()),
        ("certificate_status", numbers::<identity::CertificateStatus>()),
        ("method", numbers::<pairing::Method>()),
        ("code_status", numbers::<pairing::CodeStatus>()),
        ("request_status", numbers::<pairing::RequestStatus>()),
        ("attempt_outcome", numbers::<reply::AttemptOutcome>()),
        ("renewal_outcome", numbers::<reply::RenewalOutcome>()),
        ("effect", numbers::<nodes::Effect>()),
        ("node_status", numbers::<nodes::NodeStatus>()),
        ("condition_kind", numbers::<nodes::ConditionKind>()),
        ("truth", numbers::<nodes::Truth>()),
        ("how", numbers::<nodes::How>()),
        ("dispatch_state", numbers::<dispatch::State>()),
        ("outcome", numbers::<dispatch::Outcome>()),
        ("ca_phase", numbers::<ca::Phase>()),
        ("authority_status", numbers::<ca::AuthorityStatus>()),
        ("priority", numbers::<dispatch::Priority>()),
        ("run_state", numbers::<palyra_state::leases::RunState>()),
        ("lease_state", numbers::<palyra_state::leases::LeaseState>()),
        ("end_reason", numbers::<palyra_state::leases::EndReason>()),
        ("run_outcome", numbers::<palyra_state::leases::Outcome>()),
        ("held_state", numbers::<palyra_state::leases::HeldState>()),
    ]
}

/// One envelope for each command, by actors in turn.
fn envelopes() -> BTreeMap<String, Envelope> {
    let mut world = World::new();
    let device_id = world.id("n1");
    let actors = [
        Actor::System,
        Actor::Replica { id: 1 },
        Actor::Operator {
            name: text("alice"),
            fingerprint: fingerprint("alice"),
        },
        Actor::Node {
            device_id,
            fingerprint: fingerprint("n1"),
        },
        Actor::Anonymous {
            source: text("192.0.2.7"),
        },
    ];
    let mut commands = cluster_commands(&mut world);
    commands.extend(identity_commands(&mut world));
    commands.extend(pairing_commands(&mut world));
    commands.extend(node_commands(&mut world));
    commands.extend(later::dispatch_commands(&mut world));
    // What came later follows: the place in the list is in the request id, and so in the bytes.
    commands.extend(liveness_commands(&mut world));
    let ids = vec![world.id("d1")];
    commands.push(dispatch::Wake { ids }.into());
    let named = commands.into_iter().enumerate().map(|(at, command)| {
        let name = format!("command.{}", command.name());
        (
            name,
            Envelope {
                request_id: id(100 + at as u64),
                actor: actors[at % actors.len()].clone(),
                command,
            },
        )
    });
    let named: BTreeMap<String, Envelope> = named.collect();
    let mut named = named;
    // By themselves, so that what others append does not move them.
    let ca = (300..).zip(ca_commands(&mut world));
    let bans = (400..).zip(ban_commands(&mut world));
    let certificates = (500..).zip(certificate_commands(&mut world));
    let runs = (700..).zip(leases::commands());
    for (at, command) in ca.chain(bans).chain(certificates).chain(runs) {
        let envelope = Envelope {
            request_id: id(at),
            actor: actors[at as usize % actors.len()].clone(),
            command,
        };
        named.insert(format!("command.{}", envelope.command.name()), envelope);
    }
    assert_eq!(named.len(), 65, "a command without a sample");
    named
}

fn cluster_commands(world: &mut World) -> Vec<Command> {
    vec![
        commands::genesis(world).into(),
        cluster::MintJoinToken {
            ttl_ms: 1,
            ..commands::mint_token(world, "t", "r2")
        }
        .into(),
        commands::allocate(world, "t", "r2").into(),
        commands::admit(2, "r2").into(),
        cluster::SetReplicaStatus {
            replica_id: 2,
            status: cluster::ReplicaStatus::Voter as i32,
        }
        .into(),
        cluster::UpdateReplicaAddresses {
            replica_id: 2,
            addresses: commands::addresses("r2"),
            feature_level: 0,
            max_staleness_ms: 0,
        }
        .into(),
        cluster::RemoveReplica { replica_id: 2 }.into(),
        cluster::RaiseFeatureLevel { level: 2 }.into(),
        commands::add_operator("alice", access::Role::Admin).into(),
        access::RemoveOperator {
            name: text("alice"),
            reason: text("left"),
        }
        .into(),
        access::SetRole {
            name: text("alice"),
            role: access::Role::Admin as i32,
        }
        .into(),
    ]
}

fn identity_commands(world: &mut World) -> Vec<Command> {
    let (device_id, certificate) = (world.id("n1"), certificate("n1"));
    vec![
        commands::revoke(world, "n1").into(),
        identity::RenewCertificate {
            device_id,
            certificate: certificate.clone(),
            counter: 0,
            source: String::new(),
        }
        .into(),
        identity::RevokeOperatorCertificate {
            fingerprint: fingerprint("alice"),
            reason: text("old"),
        }
        .into(),
        identity::RenewOperatorCertificate {
            name: text("alice"),
            certificate,
        }
        .into(),
    ]
}

fn ban_commands(world: &mut World) -> Vec<Command> {
    let device_id = world.id("n1");
    vec![
        identity::RemoveDevice {
            device_id,
            reason: text("sold"),
            revoke: true,
        }
        .into(),
        identity::PurgeDevice {
            device_id,
            reason: text("bought back"),
            force: true,
        }
        .into(),
    ]
}

fn certificate_commands(world: &mut World) -> Vec<Command> {
    let device_id = world.id("n1");
    vec![
        identity::ConfirmCertificate {}.into(),
        identity::RotateDevice {
            device_id,
            reason: text("spring"),
            deadline_ms: 3,
        }
        .into(),
        identity::RecoverDevice {
            device_id,
            certificate: certificate("n1"),
            counter: 3,
            source: text("192.0.2.7"),
            shown: fingerprint("n1"),
        }
        .into(),
        identity::ClearClone {
            device_id,
            reason: text("one machine"),
        }
        .into(),
        identity::SetPolicy { recovery_ms: 1 }.into(),
        cluster::AnnounceCertificate {
            replica_id: 2,
            certificate: fingerprint("r2"),
            not_after: 3,
        }
        .into(),
    ]
}

fn pairing_commands(world: &mut World) -> Vec<Command> {
    let (pairing_id, code_id) = (world.id("p1"), world.id("c1"));
    let mint = commands::mint(world, "c1", "ticket");
    let begin = commands::begin(world, "a1", "c1", "n1");
    let approve = commands::approve(world, "p1", "n1");
    vec![
        pairing::MintCode {
            ttl_ms: 1,
            device_name: text("press"),
            ..mint
        }
        .into(),
        pairing::RevokeCode {
            code_id,
            reason: text("typo"),
        }
        .into(),
        pairing::BeginAttempt {
            code_number: 7,
            method: pairing::Method::Ticket as i32,
            ..begin
        }
        .into(),
        commands::fail(world, "a1", "c1").into(),
        commands::prove(world, "p1", "c1", Some("a1"), "n1").into(),
        pairing::Approve {
            sas: text("123456"),
            reason: text("mine"),
            ..approve
        }
        .into(),
        pairing::Reject {
            pairing_id,
            reason: text("not mine"),
        }
        .into(),
        pairing::MarkCompleted { pairing_id }.into(),
        pairing::Expire {
            codes: vec![code_id],
            requests: vec![pairing_id],
        }
        .into(),
    ]
}

fn node_commands(world: &mut World) -> Vec<Command> {
    vec![
        commands::register(world, "n1").into(),
        commands::attach(world, "n1", 1, &["d1", "d2"]).into(),
        commands::detach(world, "n1", 7).into(),
        nodes::DetachReplica {
            replica_id: 1,
            limit: 2,
            up_to_epoch: 3,
            reason: text("lost"),
            suspect_for: 0,
            silent_for: 0,
        }
        .into(),
    ]
}

fn liveness_commands(world: &mut World) -> Vec<Command> {
    vec![
        nodes::DetachMany {
            ends: vec![nodes::Ended {
                device_id: world.id("n1"),
                epoch: 7,
                reason: text("silent"),
                how: nodes::How::Moving as i32,
                silent_for: 9,
            }],
            suspect_for: 4,
            lost_after: 5,
        }
        .into(),
        nodes::Lapse {
            ids: vec![world.id("n1")],
            lost_after: 6,
        }
        .into(),
    ]
}

fn ca_commands(world: &mut World) -> Vec<Command> {
    let device = world.id("n1");
    vec![
        ca::BeginRoot {
            reason: text("due"),
            ..commands::begin_root("2")
        }
        .into(),
        ca::AdvanceRoot {
            from: ca::Phase::Issue as i32,
            force: true,
            reason: text("lost"),
        }
        .into(),
        ca::RevertRoot {
            from: ca::Phase::Distribute as i32,
            reason: text("not yet"),
        }
        .into(),
        commands::certify(2, 1, 2).into(),
        commands::rotate_authority(2, 2, 1).into(),
        ca::AskRotation {
            replica_id: 2,
            reason: text("lost"),
        }
        .into(),
        ca::RetireAuthority {
            replica_id: 2,
            number: 1,
        }
        .into(),
        ca::Acknowledge {
            generation: 2,
            devices: vec![device],
            operators: vec![text("alice")],
        }
        .into(),
        ca::ReplicaReady {
            replica_id: 2,
            step: 3,
        }
        .into(),
        ca::PublishCrl {
            crl: ca::Crl {
                left_out: 2,
                ..commands::crl(2, 1, 7, kit::T0).crl
            },
        }
        .into(),
    ]
}
