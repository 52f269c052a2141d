//! Apply: one entry of the log becomes one change of the state. Synchronous, infallible, deterministic.
//!
//! Order: clock, deduplication, is the actor still valid, the domain, journal rows, running hash. A refusal
//! keeps clock, deduplication and hash, and nothing else.

use bytes::Bytes;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use crate::command::{Command, Envelope};
use crate::dedup::{self, Known};
use crate::ids::Digest;
use crate::journal::Row;
use crate::meta::{Meta, meta};
use crate::read::{Read, Writes};
use crate::reject::{Code, Reject};
use crate::reply::Reply;
use crate::txn::Txn;
use crate::{
    access, admit, approvals, ca, cluster, dispatch, fleet, identity, journal, leases, nodes, pairing, tables,
};

/// Place of an entry in the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Raft term.
    pub term: u64,
    /// Raft log index.
    pub index: u64,
}

/// What an entry came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The answer to who asked.
    pub reply: Result<Reply, Reject>,
    /// What happened; already among `writes`.
    pub rows: Vec<Row>,
    /// What to write, atomically with the position.
    pub writes: Writes,
    /// The request was decided before: this is the answer of that time.
    pub duplicate: bool,
}

/// Applies one entry.
///
/// `at_ms` is the leader's clock when it proposed; `encoded` the envelope's bytes as they lie in the log.
pub fn apply(base: &dyn Read, pos: Position, at_ms: u64, envelope: &Envelope, encoded: &[u8]) -> Applied {
    let mut meta = meta(base);
    meta.clock = meta.clock.max(at_ms);
    meta.index = pos.index;
    meta.term = pos.term;
    let mut txn = Txn::new(base, pos.index, meta.clock, &envelope.actor, envelope.request_id);
    let (reply, duplicate) = decide(&mut txn, &mut meta, envelope);
    let rows = journal::append(&mut txn, &mut meta);
    meta.state_hash = state_hash(&meta, txn.writes(), encoded);
    txn.put(&tables::META, (), &meta);
    Applied {
        reply,
        rows,
        writes: txn.into_writes(),
        duplicate,
    }
}

/// The answer, and whether it is an old one.
fn decide(txn: &mut Txn<'_>, meta: &mut Meta, envelope: &Envelope) -> (Result<Reply, Reject>, bool) {
    match dedup::look_up(txn, envelope) {
        Known::New => {}
        Known::Decided(answer) => return (answer, true),
        Known::Unusable(reject) => return (Err(reject), false),
    }
    if cluster::cluster(txn).is_none() && envelope.command.name() != "cluster.genesis" {
        return (Err(Reject::new(Code::NoCluster, [])), false);
    }
    // Not remembered: an actor that is shut out must cost nothing, and must not push others' answers out.
    if let Err(reject) = admit::admit(txn, txn.now, envelope) {
        return (Err(reject), false);
    }
    let answer =
        cluster::check_level(txn, &envelope.command).and_then(|()| apply_command(txn, &envelope.command));
    if answer.is_ok() {
        identity::note_use(txn);
    }
    if answer.is_err() {
        txn.roll_back();
    } else if txn.has_news() {
        dispatch::forget_finished(txn);
        leases::forget(txn);
    }
    dedup::remember(txn, meta, envelope, &answer);
    (answer, false)
}

fn apply_command(txn: &mut Txn<'_>, command: &Command) -> Result<Reply, Reject> {
    let unknown = || Reject::new(Code::FieldInvalid, [&"the command", &"it is empty"]);
    match command {
        Command::Cluster(command) => cluster::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Access(command) => access::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Identity(command) => identity::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Pairing(command) => pairing::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Nodes(command) => nodes::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Dispatch(command) => dispatch::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Ca(command) => ca::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Approvals(command) => approvals::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Fleet(command) => fleet::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
        Command::Leases(command) => leases::apply(txn, command.action.as_ref().ok_or_else(unknown)?),
    }
}

/// The running hash: over the hash before (it is in `meta`), the entry's bytes, and all writes in key order.
fn state_hash(meta: &Meta, writes: &Writes, encoded: &[u8]) -> Digest {
    let mut hasher = Sha256::new();
    hasher.update(b"palyra state\0");
    let mut field = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    field(&meta.encode_to_vec());
    field(encoded);
    for (key, value) in writes {
        field(key);
        field(&[u8::from(value.is_some())]);
        field(value.as_ref().map_or(&[], Bytes::as_ref));
    }
    Digest::from_bytes(hasher.finalize().into())
}
