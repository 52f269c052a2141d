//! A state in memory with names for ids, shared by the tests of this crate.
//!
//! Every entry goes through bytes, as in a log, and is followed by a check of all invariants.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;

use bytes::Bytes;
use palyra_state::identity::NewCertificate;
use palyra_state::{
    Actor, Applied, Command, Digest, Envelope, Fingerprint, Id, MemRead, Position, Reply, apply, decode,
    invariants,
};

pub mod attack;
pub mod commands;
pub mod fleet;
pub mod large;
pub mod workers;

/// When every test begins.
pub const T0: u64 = 1_000_000_000_000;

/// A state with a log position and a clock.
#[derive(Clone)]
pub struct World {
    pub state: MemRead,
    pub index: u64,
    pub at: u64,
    pub names: BTreeMap<String, Id>,
    /// Everything applied so far: time and bytes.
    pub log: Vec<(u64, Vec<u8>)>,
    /// How often each command was accepted and changed something.
    pub effective: BTreeMap<&'static str, u32>,
    /// Whether each step is checked.
    pub checked: bool,
}

impl World {
    pub fn new() -> World {
        World {
            state: MemRead::new(),
            index: 0,
            at: T0,
            names: BTreeMap::new(),
            log: Vec::new(),
            effective: BTreeMap::new(),
            checked: true,
        }
    }

    /// A world with a cluster: replica 1 and the admin `root`.
    pub fn born() -> World {
        let mut world = World::new();
        let genesis = commands::genesis(&mut world);
        world.accept(Actor::System, genesis);
        world
    }

    /// The id of a name, made at its first mention.
    pub fn id(&mut self, name: &str) -> Id {
        if let Some(id) = Id::parse(name) {
            return id;
        }
        let next = self.names.len() as u64 + 1;
        let at = self.at;
        *self
            .names
            .entry(name.to_owned())
            .or_insert_with(|| id_at(at, next))
    }

    /// Applies a command under a fresh request id.
    pub fn run(&mut self, actor: Actor, command: impl Into<Command>) -> Applied {
        let request_id = id_at(self.at, (1 << 40) + self.index);
        self.apply(&Envelope::new(request_id, actor, command))
    }

    /// Applies an envelope at the next index.
    pub fn apply(&mut self, envelope: &Envelope) -> Applied {
        let bytes = envelope.encode();
        let decoded = decode(&bytes).unwrap();
        assert_eq!(decoded, *envelope, "an envelope must survive its encoding");
        self.index += 1;
        let pos = Position {
            term: 1,
            index: self.index,
        };
        let applied = apply(&self.state, pos, self.at, &decoded, &bytes);
        let before = self.checked.then(|| self.state.clone());
        self.state.absorb(&applied.writes);
        self.log.push((self.at, bytes));
        if !applied.rows.is_empty() || has_renewed(&applied) {
            *self.effective.entry(envelope.command.name()).or_default() += 1;
        }
        if let Some(before) = before {
            let mut found = invariants::check(&self.state);
            found.extend(invariants::check_step(&before, &self.state, envelope, &applied));
            assert!(
                found.is_empty(),
                "entry {} ({envelope:?}) broke {found:#?}",
                self.index
            );
        }
        applied
    }

    /// Applies a command that must be accepted.
    #[track_caller]
    pub fn accept(&mut self, actor: Actor, command: impl Into<Command>) -> Applied {
        let applied = self.run(actor, command);
        assert!(applied.reply.is_ok(), "refused: {}", applied.reply.unwrap_err());
        applied
    }

    /// Applies a command that must be refused with this code.
    #[track_caller]
    pub fn refuse(&mut self, code: &str, actor: Actor, command: impl Into<Command>) {
        let applied = self.run(actor, command);
        match applied.reply {
            Ok(reply) => panic!("accepted instead of {code}: {reply:?}"),
            Err(reject) => assert_eq!(reject.code(), code, "{reject}"),
        }
    }

    pub fn advance(&mut self, ms: u64) {
        self.at += ms;
    }

    /// A node of this name: paired, registered, not attached.
    pub fn pair(&mut self, name: &str) -> Actor {
        let pairing = format!("pairing-{name}");
        let mint = commands::mint(self, &format!("code-{name}"), "ticket");
        self.accept(operator("root"), mint);
        let prove = commands::prove(self, &pairing, &format!("code-{name}"), None, name);
        self.accept(replica(1), prove);
        let approve = commands::approve(self, &pairing, name);
        self.accept(operator("root"), approve);
        let node = self.node(name);
        let register = commands::register(self, name);
        self.accept(node.clone(), register);
        node
    }

    /// The actor for a node with the certificate of its name.
    pub fn node(&mut self, name: &str) -> Actor {
        Actor::Node {
            device_id: self.id(name),
            fingerprint: fingerprint(name),
        }
    }
}

/// Renewals have an effect and no row.
fn has_renewed(applied: &Applied) -> bool {
    match &applied.reply {
        Ok(Reply::LeasesRenewed(reply)) => reply.renewals.iter().any(|renewal| renewal.refusal.is_none()),
        _ => false,
    }
}

/// An id with this time and this number.
pub fn id_at(at: u64, number: u64) -> Id {
    let value = (u128::from(at) << 80) | u128::from(number);
    Id::from_bytes(value.to_be_bytes())
}

pub fn operator(name: &str) -> Actor {
    Actor::Operator {
        name: name.to_owned(),
        fingerprint: fingerprint(name),
    }
}

pub fn replica(id: u64) -> Actor {
    Actor::Replica { id }
}

/// The fingerprint of [`certificate`] with this name.
pub fn fingerprint(name: &str) -> Fingerprint {
    certificate(name).fingerprint()
}

/// The key of [`certificate`] with this name.
pub fn key(name: &str) -> Digest {
    Digest::of(format!("key of {name}").as_bytes())
}

/// A certificate with this name, valid for ten days.
pub fn certificate(name: &str) -> NewCertificate {
    NewCertificate {
        der: Bytes::from(format!("certificate of {name}")),
        spki: key(name),
        serial: Bytes::from_static(&[7]),
        not_before: T0 - 1_000,
        not_after: T0 + 10 * 24 * 3_600_000,
        authority: 1,
        authority_number: 0,
    }
}
