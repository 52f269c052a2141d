//! Nodes: what the paired machines can do, and which replica holds the session of each.
//!
//! What never lives here: heartbeats (they stay in the memory of the replica that holds the connection) and
//! trust (that is `identity`).
//! Invariants: a node has at most one session; epochs of a node strictly increase, for an epoch is the log
//! index of its attach; a session ends by the next attach, by a detach that names its epoch, or by
//! revocation; a status that time alone changes is in the index of due nodes, no other is.

mod rules;
mod status;

pub(crate) use rules::{apply, close_session, count_ban, count_device};
pub(crate) use status::forget;
pub use status::{
    Condition, ConditionKind, NodeStatus, SessionCount, Truth, by_status, due, next_due, session_count,
};

use std::collections::BTreeMap;

use crate::ids::Id;
use crate::read::Read;
use crate::tables;

/// What happens when a capability is run twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Effect {
    /// Must not be run twice: when it is not known whether it ran, the dispatch ends as `session_lost`.
    Once = 0,
    /// May be run again.
    Idempotent = 1,
}

impl Effect {
    /// Stable text form.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Effect::Once => "once",
            Effect::Idempotent => "idempotent",
        }
    }

    /// From the text form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Effect> {
        [Effect::Once, Effect::Idempotent]
            .into_iter()
            .find(|effect| effect.as_str() == text)
    }
}

/// Something that a node can be asked to do.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Capability {
    /// Unique on its node, `[a-z0-9][a-z0-9._-]{0,62}`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What happens when it is run twice.
    #[prost(enumeration = "Effect", tag = "2")]
    pub effect: i32,
    /// How long the node lets it run, in milliseconds; 0: until the deadline.
    #[prost(uint64, tag = "3")]
    pub timeout_ms: u64,
    /// How many at once; 0: no limit of its own.
    #[prost(uint32, tag = "4")]
    pub max_concurrency: u32,
    /// A person at the machine must agree.
    #[prost(bool, tag = "5")]
    pub local_mediation: bool,
    /// For people.
    #[prost(string, tag = "6")]
    pub description: String,
    /// How many dispatches may wait for it; 0: as many as for the node.
    #[prost(uint32, tag = "7")]
    pub queue_limit: u32,
    /// Attempts in all when it is idempotent; 0: one, and what its session lost moves on. See `dispatch::Retry`.
    #[prost(uint32, tag = "8")]
    pub max_attempts: u32,
    /// Wait before the second attempt, in milliseconds; doubles with each further one.
    #[prost(uint64, tag = "9")]
    pub backoff_ms: u64,
    /// After what it is tried again; none: after what may pass by itself.
    #[prost(string, repeated, tag = "10")]
    pub retry_on: Vec<String>,
}

/// One live authenticated connection of a node.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Session {
    /// Log index of the attach.
    #[prost(uint64, tag = "1")]
    pub epoch: u64,
    /// Replica that holds the connection.
    #[prost(uint64, tag = "2")]
    pub replica_id: u64,
    /// When it was attached.
    #[prost(uint64, tag = "3")]
    pub attached_at: u64,
    /// `stream`, `quic` or `poll`.
    #[prost(string, tag = "4")]
    pub transport: String,
    /// Why it is not on the transport that the node would rather use; empty when it is.
    #[prost(string, tag = "30")]
    pub fallback: String,
}

/// A member of the fleet.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Node {
    /// The device id.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Operating system and architecture, `linux/x86_64`.
    #[prost(string, tag = "2")]
    pub platform: String,
    /// Version of the agent.
    #[prost(string, tag = "3")]
    pub agent_version: String,
    /// What it can do, by name.
    #[prost(message, repeated, tag = "4")]
    pub capabilities: Vec<Capability>,
    /// Free labels.
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: BTreeMap<String, String>,
    /// When it first registered.
    #[prost(uint64, tag = "6")]
    pub registered_at: u64,
    /// Counts changes of its registration, from 1.
    #[prost(uint64, tag = "7")]
    pub generation: u64,
    /// The live session, if there is one.
    #[prost(message, optional, tag = "8")]
    pub session: Option<Session>,
    /// Where it stands.
    #[prost(enumeration = "NodeStatus", tag = "9")]
    pub status: i32,
    /// Since when.
    #[prost(uint64, tag = "10")]
    pub status_since: u64,
    /// Why.
    #[prost(string, tag = "11")]
    pub status_reason: String,
    /// Epoch of the newest session, live or ended; 0 when there was none.
    #[prost(uint64, tag = "12")]
    pub last_epoch: u64,
    /// How long it may be offline before it counts as gone, in milliseconds; 0: as the cluster has it,
    /// `limits::NEVER`: as long as it takes.
    #[prost(uint64, tag = "20")]
    pub lost_after: u64,
    /// What the status rests on, one of each kind.
    #[prost(message, repeated, tag = "21")]
    pub conditions: Vec<Condition>,
    /// When it was last heard, as known at the end of its newest session; 0: never, or in the live one.
    #[prost(uint64, tag = "22")]
    pub last_seen_at: u64,
    /// When its status changes unless it attaches; 0: time changes nothing.
    #[prost(uint64, tag = "23")]
    pub due_at: u64,
    /// How many dispatches it is given at a time; 0: `limits::BOUND_PER_DEVICE`.
    #[prost(uint32, tag = "35")]
    pub max_concurrency: u32,
    /// How many dispatches may wait for it; 0: `limits::OPEN_PER_DEVICE`.
    #[prost(uint32, tag = "36")]
    pub queue_limit: u32,
}

impl Node {
    /// The capability with this name.
    #[must_use]
    pub fn capability(&self, name: &str) -> Option<&Capability> {
        self.capabilities
            .iter()
            .find(|capability| capability.name == name)
    }
}

/// What is asked about nodes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Command {
    /// The one thing that is asked.
    #[prost(oneof = "Action", tags = "1, 2, 3, 4, 5, 6")]
    pub action: Option<Action>,
}

/// One thing to ask about nodes.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Action {
    /// See [`Register`].
    #[prost(message, tag = "1")]
    Register(Register),
    /// See [`Attach`].
    #[prost(message, tag = "2")]
    Attach(Attach),
    /// See [`Detach`].
    #[prost(message, tag = "3")]
    Detach(Detach),
    /// See [`DetachReplica`].
    #[prost(message, tag = "4")]
    DetachReplica(DetachReplica),
    /// See [`DetachMany`].
    #[prost(message, tag = "5")]
    DetachMany(DetachMany),
    /// See [`Lapse`].
    #[prost(message, tag = "6")]
    Lapse(Lapse),
}

/// Says what a node is and can do; the same again changes nothing. Actor: that node. Reply: `Registered`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Register {
    /// The node.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Operating system and architecture.
    #[prost(string, tag = "2")]
    pub platform: String,
    /// Version of the agent.
    #[prost(string, tag = "3")]
    pub agent_version: String,
    /// What it can do.
    #[prost(message, repeated, tag = "4")]
    pub capabilities: Vec<Capability>,
    /// Free labels.
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: BTreeMap<String, String>,
    /// How long it may be offline before it counts as gone, in milliseconds; 0: as the cluster has it,
    /// `limits::NEVER`: as long as it takes.
    #[prost(uint64, tag = "10")]
    pub lost_after: u64,
    /// How many dispatches it takes at a time; 0: as many as there may be.
    #[prost(uint32, tag = "13")]
    pub max_concurrency: u32,
    /// How many dispatches may wait for it; 0: as many as there may be.
    #[prost(uint32, tag = "14")]
    pub queue_limit: u32,
}

/// Begins a session; the one before it ends. Open dispatches move to it: see `dispatch`. Actor: that node.
/// Reply: `Attached`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Attach {
    /// The node.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// Replica that holds the connection.
    #[prost(uint64, tag = "2")]
    pub replica_id: u64,
    /// `stream`, `quic` or `poll`.
    #[prost(string, tag = "3")]
    pub transport: String,
    /// Dispatches that the node has begun, or has finished without an accepted result.
    #[prost(message, repeated, tag = "4")]
    pub held: Vec<Id>,
    /// The attempt of each, in the same order; one that is missing or 0 is the present one.
    #[prost(uint32, repeated, tag = "9")]
    pub held_attempts: Vec<u32>,
    /// Why it is not on the transport that the node would rather use; empty when it is.
    #[prost(string, tag = "30")]
    pub fallback: String,
}

/// Ends a session, if it is still that one; otherwise nothing happens. A node that ends its own is offline, one
/// whose session another ends is suspect. Actor: that node, its replica, or system. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Detach {
    /// The node.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// The session's epoch.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// Why: `disconnected`, `silent`, `draining`.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Ends sessions that a lost replica held, at most `limit`. Actor: system or a replica. Reply: `Counted`;
/// when it is `limit`, there may be more.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DetachReplica {
    /// The lost replica.
    #[prost(uint64, tag = "1")]
    pub replica_id: u64,
    /// How many, 1 to `limits::DETACH_BATCH`; 0: as many.
    #[prost(uint32, tag = "2")]
    pub limit: u32,
    /// Only sessions of this epoch or an older one; 0: all. Spares those that came back meanwhile.
    #[prost(uint64, tag = "3")]
    pub up_to_epoch: u64,
    /// Why.
    #[prost(string, tag = "4")]
    pub reason: String,
    /// How long the nodes may take to come back before they are offline, in milliseconds; 0:
    /// `limits::SUSPECT_FOR`.
    #[prost(uint64, tag = "5")]
    pub suspect_for: u64,
    /// How long ago the replica was heard: no node of it was heard later. In milliseconds.
    #[prost(uint64, tag = "6")]
    pub silent_for: u64,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum How {
    /// Without the node's saying so: it is suspect.
    Lost = 0,
    /// The node said that it goes: it is offline.
    Left = 1,
    /// Its replica sent it to another one: it is online until it is late.
    Moving = 2,
}

/// The end of one session.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ended {
    /// The node.
    #[prost(message, required, tag = "1")]
    pub device_id: Id,
    /// The session's epoch; when the node has another session, nothing happens.
    #[prost(uint64, tag = "2")]
    pub epoch: u64,
    /// Why: `disconnected`, `silent`, `draining`.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// How.
    #[prost(enumeration = "How", tag = "4")]
    pub how: i32,
    /// How long ago the node was heard, in milliseconds.
    #[prost(uint64, tag = "5")]
    pub silent_for: u64,
}

/// Ends sessions of one replica. Actor: that replica, or system. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DetachMany {
    /// At most `limits::DETACH_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub ends: Vec<Ended>,
    /// How long nodes may take to come back before they are offline, in milliseconds; 0: `limits::SUSPECT_FOR`.
    #[prost(uint64, tag = "2")]
    pub suspect_for: u64,
    /// How long nodes that said nothing of it may be offline before they are gone, in milliseconds; 0:
    /// `limits::LOST_AFTER`, `limits::NEVER`: as long as it takes.
    #[prost(uint64, tag = "3")]
    pub lost_after: u64,
}

/// Moves those of the list that are due to their next status: suspect to offline, offline to gone. Others are
/// left alone. Actor: system or a replica. Reply: `Counted`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Lapse {
    /// At most `limits::LAPSE_BATCH`.
    #[prost(message, repeated, tag = "1")]
    pub ids: Vec<Id>,
    /// As in [`DetachMany`].
    #[prost(uint64, tag = "2")]
    pub lost_after: u64,
}

/// The node with this device id.
#[must_use]
pub fn node(r: &dyn Read, device_id: Id) -> Option<Node> {
    tables::NODES.get(r, device_id)
}

/// Nodes by device id, at most `limit`, from the one after `after` on.
#[must_use]
pub fn nodes(r: &dyn Read, after: Option<Id>, limit: usize) -> Vec<Node> {
    tables::NODES.page(r, (), after, limit)
}

/// Device ids of the nodes whose session this replica holds, from the one after `after` on.
#[must_use]
pub fn sessions_of(r: &dyn Read, replica_id: u64, after: Option<Id>, limit: usize) -> Vec<Id> {
    tables::SESSIONS_OF.ids(r, replica_id, after, limit)
}

/// Counters of the registry.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Totals {
    /// Registered nodes.
    #[prost(uint64, tag = "1")]
    pub nodes: u64,
    /// Those that are online.
    #[prost(uint64, tag = "2")]
    pub online: u64,
    /// Devices, revoked ones included.
    #[prost(uint64, tag = "3")]
    pub devices: u64,
    /// Those that are suspect.
    #[prost(uint64, tag = "20")]
    pub suspect: u64,
    /// Those that are gone.
    #[prost(uint64, tag = "21")]
    pub gone: u64,
    /// Devices that were removed and stay refused.
    #[prost(uint64, tag = "30")]
    pub bans: u64,
}

/// Counters of the registry.
#[must_use]
pub fn totals(r: &dyn Read) -> Totals {
    tables::NODE_TOTALS.get(r, ()).unwrap_or_default()
}
