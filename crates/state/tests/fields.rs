//! Every field of every command has a bound: one step below it is accepted, one above is refused, with nothing
//! changed.
#![allow(clippy::unwrap_used)]

#[path = "fields/cluster.rs"]
mod about_cluster;
#[path = "fields/authorities.rs"]
mod authorities;
#[path = "fields/dispatch.rs"]
mod dispatches;
mod kit;
#[path = "fields/fleet.rs"]
mod workers;

use std::collections::BTreeMap;

use about_cluster::CLUSTER;
use authorities::CA;
use bytes::Bytes;
use kit::{World, certificate, commands, operator, replica};
use palyra_state::access::{self, Role};
use palyra_state::dispatch::Outcome;
use palyra_state::identity::{self, NewCertificate};
use palyra_state::nodes::Effect;
use palyra_state::{Actor, Command, Envelope, cluster, decode, dispatch, limits, nodes, pairing, tables};
use prost::Message as _;

/// A world with the admin `root`, the node `n1` with a session, an open code `c`, a proof of it on the way, a
/// pairing request `p` that waits, and an open dispatch `d`.
struct Stage {
    world: World,
    node: Actor,
    epoch: u64,
}

fn stage() -> Stage {
    let mut world = World::born();
    let node = world.pair("n1");
    let attach = commands::attach(&mut world, "n1", 1, &[]);
    world.accept(node.clone(), attach);
    let epoch = world.index;
    for code in ["c", "used"] {
        let mint = commands::mint(&mut world, code, "ticket");
        world.accept(operator("root"), mint);
    }
    let prove = commands::prove(&mut world, "p", "used", None, "n2");
    world.accept(replica(1), prove);
    let submit = commands::submit(&mut world, "d", "n1", "echo");
    world.accept(operator("root"), submit);
    Stage { world, node, epoch }
}

fn text(length: usize) -> String {
    "x".repeat(length)
}

fn bytes(length: usize) -> Bytes {
    Bytes::from(vec![b'x'; length])
}

/// Makes a command with a field of this size.
type Make = fn(&mut Stage, usize) -> (Actor, Command);

/// A field: its name, its limit, the code for more, and the command that has it.
type Field = (&'static str, usize, &'static str, Make);

#[test]
fn a_field_at_its_limit_is_accepted_and_one_above_is_refused() {
    let fields = [
        CLUSTER,
        PEOPLE,
        PAIRING,
        NODES,
        dispatches::DISPATCH,
        CA,
        workers::FLEET,
    ]
    .concat();
    for (name, limit, code, make) in fields {
        let mut fits = stage();
        let (actor, command) = make(&mut fits, limit);
        let reply = fits.world.run(actor, command).reply;
        assert!(reply.is_ok(), "{name} of {limit}: {}", reply.unwrap_err());
        let mut over = stage();
        let (actor, command) = make(&mut over, limit + 1);
        let rows = over.world.run(actor, command);
        match rows.reply {
            Ok(reply) => panic!("{name} of {} was accepted: {reply:?}", limit + 1),
            Err(reject) => assert_eq!(reject.code(), code, "{name}: {reject}"),
        }
    }
}

fn root(command: impl Into<Command>) -> (Actor, Command) {
    (operator("root"), command.into())
}

fn by_replica(command: impl Into<Command>) -> (Actor, Command) {
    (replica(1), command.into())
}

const PEOPLE: &[Field] = &[
    (
        "an operator's name",
        limits::SHORT_NAME_MAX,
        "E0203",
        |_, size| root(commands::add_operator(&text(size), Role::Viewer)),
    ),
    ("a certificate", limits::CERTIFICATE_MAX, "E0306", |_, size| {
        let certificate = NewCertificate {
            der: bytes(size),
            ..certificate("alice")
        };
        root(access::AddOperator {
            certificate,
            ..commands::add_operator("alice", Role::Viewer)
        })
    }),
    ("a serial number", 32, "E0306", |_, size| {
        let certificate = NewCertificate {
            serial: bytes(size),
            ..certificate("alice")
        };
        root(access::AddOperator {
            certificate,
            ..commands::add_operator("alice", Role::Viewer)
        })
    }),
    (
        "why an operator goes",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let add = commands::add_operator("alice", Role::Viewer);
            stage.world.accept(operator("root"), add);
            root(access::RemoveOperator {
                name: "alice".to_owned(),
                reason: text(size),
            })
        },
    ),
    (
        "why a device is revoked",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            root(identity::RevokeDevice {
                reason: text(size),
                ..commands::revoke(&mut stage.world, "n1")
            })
        },
    ),
    (
        "why a certificate is revoked",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let add = commands::add_operator("alice", Role::Viewer);
            stage.world.accept(operator("root"), add);
            root(identity::RevokeOperatorCertificate {
                fingerprint: kit::fingerprint("alice"),
                reason: text(size),
            })
        },
    ),
];

fn new_code(stage: &mut Stage) -> pairing::MintCode {
    commands::mint(&mut stage.world, "new", "pin")
}

fn proof(stage: &mut Stage) -> pairing::Prove {
    commands::prove(&mut stage.world, "p2", "c", None, "n3")
}

const PAIRING: &[Field] = &[
    ("a code's secret", limits::SEALED_MAX, "E0906", |stage, size| {
        let sealed = bytes(size);
        root(pairing::MintCode {
            sealed,
            ..new_code(stage)
        })
    }),
    ("a code's device", limits::NAME_MAX, "E0906", |stage, size| {
        let device_name = text(size);
        root(pairing::MintCode {
            device_name,
            ..new_code(stage)
        })
    }),
    (
        "a code's life",
        limits::CODE_TTL_MAX as usize,
        "E0411",
        |stage, size| {
            let ttl_ms = size as u64;
            root(pairing::MintCode {
                ttl_ms,
                ..new_code(stage)
            })
        },
    ),
    (
        "why a code is revoked",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let code_id = stage.world.id("c");
            root(pairing::RevokeCode {
                code_id,
                reason: text(size),
            })
        },
    ),
    (
        "an attempt's source",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            by_replica(pairing::BeginAttempt {
                source: text(size),
                ..commands::begin(&mut stage.world, "a", "c", "n3")
            })
        },
    ),
    (
        "a failure's source",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let begin = commands::begin(&mut stage.world, "a", "c", "n3");
            stage.world.accept(replica(1), begin);
            by_replica(pairing::FailAttempt {
                source: text(size),
                ..commands::fail(&mut stage.world, "a", "c")
            })
        },
    ),
    ("a proof's source", limits::REASON_MAX, "E0906", |stage, size| {
        let source = text(size);
        by_replica(pairing::Prove {
            source,
            ..proof(stage)
        })
    }),
    ("a machine's name", limits::NAME_MAX, "E0906", |stage, size| {
        let device_name = text(size);
        by_replica(pairing::Prove {
            device_name,
            ..proof(stage)
        })
    }),
    ("a CSR", limits::CERTIFICATE_MAX, "E0906", |stage, size| {
        let csr_der = bytes(size);
        by_replica(pairing::Prove {
            csr_der,
            ..proof(stage)
        })
    }),
    ("check digits", 16, "E0906", |stage, size| {
        let sas = text(size);
        by_replica(pairing::Prove { sas, ..proof(stage) })
    }),
    (
        "why a machine is let in",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            root(pairing::Approve {
                reason: text(size),
                ..commands::approve(&mut stage.world, "p", "n2")
            })
        },
    ),
    (
        "why a machine is not let in",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let pairing_id = stage.world.id("p");
            root(pairing::Reject {
                pairing_id,
                reason: text(size),
            })
        },
    ),
    (
        "codes and requests to expire",
        limits::EXPIRE_BATCH,
        "E0907",
        |stage, size| {
            let (code, request) = (stage.world.id("c"), stage.world.id("p"));
            by_replica(pairing::Expire {
                codes: vec![code; size / 2],
                requests: vec![request; size - size / 2],
            })
        },
    ),
];

fn register(stage: &mut Stage, change: impl FnOnce(&mut nodes::Register)) -> (Actor, Command) {
    let mut register = commands::register(&mut stage.world, "n1");
    change(&mut register);
    (stage.node.clone(), register.into())
}

fn label(stage: &mut Stage, name: String, value: String) -> (Actor, Command) {
    register(stage, |command| command.labels = BTreeMap::from([(name, value)]))
}

const NODES: &[Field] = &[
    (
        "a reason of a fallback",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            let mut attach = commands::attach(&mut stage.world, "n1", 1, &[]);
            attach.fallback = text(size);
            (stage.node.clone(), attach.into())
        },
    ),
    ("a platform", limits::NAME_MAX, "E0502", |stage, size| {
        register(stage, |command| command.platform = text(size))
    }),
    ("a version", limits::NAME_MAX, "E0502", |stage, size| {
        register(stage, |command| command.agent_version = text(size))
    }),
    ("labels", limits::LABELS, "E0502", |stage, size| {
        register(stage, |command| {
            command.labels = (0..size).map(|at| (format!("l{at}"), String::new())).collect();
        })
    }),
    ("a label's name", limits::NAME_MAX, "E0502", |stage, size| {
        label(stage, text(size), String::new())
    }),
    ("a label's value", limits::NAME_MAX, "E0502", |stage, size| {
        label(stage, "site".to_owned(), text(size))
    }),
    ("capabilities", limits::CAPABILITIES, "E0502", |stage, size| {
        register(stage, |command| {
            let made = (0..size).map(|at| commands::capability(&format!("c{at}"), Effect::Once));
            command.capabilities = made.collect();
        })
    }),
    (
        "a capability's name",
        limits::SHORT_NAME_MAX,
        "E0502",
        |stage, size| register(stage, |command| command.capabilities[0].name = text(size)),
    ),
    (
        "a capability's description",
        limits::DESCRIPTION_MAX,
        "E0502",
        |stage, size| register(stage, |command| command.capabilities[0].description = text(size)),
    ),
    (
        "a capability's timeout",
        limits::DEADLINE_MAX as usize,
        "E0502",
        |stage, size| register(stage, |command| command.capabilities[0].timeout_ms = size as u64),
    ),
    (
        "a capability's attempts",
        limits::DELIVERIES as usize,
        "E0502",
        |stage, size| {
            register(stage, |command| {
                command.capabilities[0].max_attempts = size as u32
            })
        },
    ),
    (
        "a capability's wait between attempts",
        limits::BACKOFF_MAX as usize,
        "E0502",
        |stage, size| register(stage, |command| command.capabilities[0].backoff_ms = size as u64),
    ),
    (
        "what a capability is tried again after",
        limits::SHORT_NAME_MAX,
        "E0502",
        |stage, size| {
            register(stage, |command| {
                command.capabilities[0].retry_on = vec![text(size)]
            })
        },
    ),
    (
        "reasons to try again",
        limits::RETRY_ON,
        "E0502",
        |stage, size| {
            register(stage, |command| {
                command.capabilities[0].retry_on = vec![text(1); size]
            })
        },
    ),
    (
        "held dispatches",
        limits::OPEN_PER_DEVICE as usize,
        "E0503",
        |stage, size| {
            let held = vec!["d"; size];
            (
                stage.node.clone(),
                commands::attach(&mut stage.world, "n1", 1, &held).into(),
            )
        },
    ),
    (
        "why a session ends",
        limits::REASON_MAX,
        "E0906",
        |stage, size| {
            by_replica(nodes::Detach {
                reason: text(size),
                ..commands::detach(&mut stage.world, "n1", stage.epoch)
            })
        },
    ),
    ("why sessions end", limits::REASON_MAX, "E0906", |_, size| {
        by_replica(nodes::DetachReplica {
            replica_id: 1,
            limit: 0,
            up_to_epoch: 0,
            reason: text(size),
            suspect_for: 0,
            silent_for: 0,
        })
    }),
];

#[test]
fn lives_have_a_lower_end() {
    for (ttl_ms, fits) in [
        (limits::CODE_TTL_MIN, true),
        (limits::CODE_TTL_MIN - 1, false),
        (1, false),
    ] {
        let mut world = World::born();
        let mint = commands::mint(&mut world, "c", "pin");
        let code = world.run(operator("root"), pairing::MintCode { ttl_ms, ..mint });
        let token = commands::mint_token(&mut world, "t", "r2");
        let token = world.run(operator("root"), cluster::MintJoinToken { ttl_ms, ..token });
        assert_eq!(
            (code.reply.is_ok(), token.reply.is_ok()),
            (fits, fits),
            "{ttl_ms}"
        );
    }
}

#[test]
fn texts_hold_no_control_characters() {
    for symbol in ['\0', '\n', '\u{1b}', '\u{7f}', '\u{9b}'] {
        let mut stage = stage();
        let reason = format!("a{symbol}b");
        let revoke = identity::RevokeDevice {
            reason,
            ..commands::revoke(&mut stage.world, "n1")
        };
        stage.world.refuse("E0906", operator("root"), revoke);
    }
}

#[test]
fn tables_that_take_long_to_fill_are_full_at_their_limit() {
    let mut world = World::born();
    world.pair("n1");
    let mint = commands::mint(&mut world, "c", "ticket");
    world.accept(operator("root"), mint);
    let prove = commands::prove(&mut world, "p", "c", None, "n2");
    world.accept(replica(1), prove);
    let token = commands::mint_token(&mut world, "t", "r2");
    world.accept(operator("root"), token);
    world.checked = false;
    let mut put = |key: Vec<u8>, value: Vec<u8>| {
        world.state.absorb(&BTreeMap::from([(key, Some(value.into()))]));
    };
    let devices = nodes::Totals {
        devices: limits::DEVICES,
        ..Default::default()
    };
    put(tables::NODE_TOTALS.key(()), devices.encode_to_vec());
    for number in 1..limits::OPERATORS {
        let name = format!("op{number}");
        let operator = access::Operator {
            name: name.clone(),
            ..Default::default()
        };
        put(tables::OPERATORS.key(name.as_str()), operator.encode_to_vec());
    }
    let mut born = cluster::cluster(&world.state).unwrap();
    born.next_replica_id = limits::REPLICAS_EVER + 1;
    let row = BTreeMap::from([(tables::CLUSTER.key(()), Some(born.encode_to_vec().into()))]);
    world.state.absorb(&row);
    let approve = commands::approve(&mut world, "p", "n2");
    world.refuse("E0311", operator("root"), approve);
    let add = commands::add_operator("alice", Role::Viewer);
    world.refuse("E0205", operator("root"), add);
    let allocate = commands::allocate(&mut world, "t", "r2");
    world.refuse("E0113", replica(1), allocate);
}

#[test]
fn a_number_that_no_enum_has_is_of_a_later_version() {
    let mut stage = stage();
    let world = &mut stage.world;
    let mut register = commands::register(world, "n1");
    register.capabilities[1].effect = 9;
    let replica_id = 1;
    let method = 9;
    let asked: [Command; 8] = [
        register.into(),
        cluster::SetReplicaStatus {
            replica_id,
            status: 9,
        }
        .into(),
        access::SetRole {
            name: "root".to_owned(),
            role: 9,
        }
        .into(),
        access::AddOperator {
            role: 9,
            ..commands::add_operator("a", Role::Admin)
        }
        .into(),
        pairing::MintCode {
            method,
            ..commands::mint(world, "x", "pin")
        }
        .into(),
        pairing::BeginAttempt {
            method,
            ..commands::begin(world, "a", "c", "n3")
        }
        .into(),
        dispatch::Submit {
            priority: 9,
            ..commands::submit(world, "d", "n1", "echo")
        }
        .into(),
        dispatch::Complete {
            outcome: 9,
            ..commands::complete(world, "d", 1, Outcome::Failed)
        }
        .into(),
    ];
    for command in asked {
        let name = command.name();
        let bytes = Envelope::new(world.id("request"), Actor::System, command).encode();
        assert_eq!(
            decode(&bytes),
            Err(palyra_state::Undecodable::UnknownCommand),
            "{name}"
        );
    }
}
