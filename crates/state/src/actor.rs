//! Who asks for a command: the identity that the edge has verified, carried in the log with the command.
//!
//! The edge decides who the actor is (by certificate); `apply` decides, at the entry's place in the log,
//! whether that actor is still valid and may do this. Text forms are stable: the journal and the
//! deduplication keys hold them.

use std::fmt;

use crate::ids::{Digest, Fingerprint, Id};

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// The leader's own reconcilers, and genesis.
    System,
    /// A replica, for what it does in its own name: serving a pairing, detaching a node, joining others.
    Replica {
        /// Replica id.
        id: u64,
    },
    /// A human or a tool with an operator's certificate.
    Operator {
        /// Name of the operator.
        name: String,
        /// Fingerprint of the certificate that was shown.
        fingerprint: Fingerprint,
    },
    /// A paired node, by its certificate.
    Node {
        /// Device id, as in the certificate.
        device_id: Id,
        /// Fingerprint of the certificate that was shown.
        fingerprint: Fingerprint,
    },
    /// Unauthenticated traffic of the enrol listener: it may begin, prove and fail pairing attempts only.
    Anonymous {
        /// Address that it came from.
        source: String,
    },
}

impl Actor {
    /// The key under which requests of this actor are deduplicated. A renewed certificate does not change it.
    pub(crate) fn dedup_key(&self) -> Id {
        let name = match self {
            // One key for all of them: otherwise strangers could fill the table with addresses.
            Actor::Anonymous { .. } => "anonymous".to_owned(),
            Actor::System | Actor::Replica { .. } | Actor::Operator { .. } | Actor::Node { .. } => {
                self.to_string()
            }
        };
        let digest = Digest::of(name.as_bytes()).to_bytes();
        Id::from_slice(&digest[..16]).unwrap_or(Id::ZERO)
    }
}

impl fmt::Display for Actor {
    /// `system`, `replica/2`, `operator/alice`, `node/<device id>`, `anonymous/<source>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Actor::System => f.write_str("system"),
            Actor::Replica { id } => write!(f, "replica/{id}"),
            Actor::Operator { name, .. } => write!(f, "operator/{name}"),
            Actor::Node { device_id, .. } => write!(f, "node/{device_id}"),
            Actor::Anonymous { source } => write!(f, "anonymous/{source}"),
        }
    }
}

/// [`Actor`] as it is encoded.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct WireActor {
    #[prost(oneof = "Who", tags = "1, 2, 3, 4, 5")]
    who: Option<Who>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Who {
    #[prost(bool, tag = "1")]
    System(bool),
    #[prost(uint64, tag = "2")]
    Replica(u64),
    #[prost(message, tag = "3")]
    Operator(WireOperator),
    #[prost(message, tag = "4")]
    Node(WireNode),
    #[prost(string, tag = "5")]
    Anonymous(String),
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireOperator {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, required, tag = "2")]
    fingerprint: Fingerprint,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WireNode {
    #[prost(message, required, tag = "1")]
    device_id: Id,
    #[prost(message, required, tag = "2")]
    fingerprint: Fingerprint,
}

impl From<&Actor> for WireActor {
    fn from(actor: &Actor) -> WireActor {
        let who = match actor {
            Actor::System => Who::System(true),
            Actor::Replica { id } => Who::Replica(*id),
            Actor::Operator { name, fingerprint } => Who::Operator(WireOperator {
                name: name.clone(),
                fingerprint: *fingerprint,
            }),
            Actor::Node {
                device_id,
                fingerprint,
            } => Who::Node(WireNode {
                device_id: *device_id,
                fingerprint: *fingerprint,
            }),
            Actor::Anonymous { source } => Who::Anonymous(source.clone()),
        };
        WireActor { who: Some(who) }
    }
}

impl WireActor {
    /// The actor, or `None` when this binary does not know such an actor.
    pub(crate) fn into_actor(self) -> Option<Actor> {
        Some(match self.who? {
            Who::System(_) => Actor::System,
            Who::Replica(id) => Actor::Replica { id },
            Who::Operator(wire) => Actor::Operator {
                name: wire.name,
                fingerprint: wire.fingerprint,
            },
            Who::Node(wire) => Actor::Node {
                device_id: wire.device_id,
                fingerprint: wire.fingerprint,
            },
            Who::Anonymous(source) => Actor::Anonymous { source },
        })
    }
}
