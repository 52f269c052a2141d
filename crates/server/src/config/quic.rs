//! The `[quic]` section.

use serde::Deserialize;

use super::quantity::Count;

/// Bounds of QUIC, which has its own: a datagram costs its sender nothing, not even an address.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct QuicSection {
    /// Connections.
    pub(crate) connections: Count<1, 100_000>,
    /// Connections of one identity. A node has one, and for a moment two when it moves.
    pub(crate) per_identity: Count<1, 1_000>,
    /// Connections from one address.
    pub(crate) per_source: Count<1, 100_000>,
    /// Calls that may be under way on one connection.
    pub(crate) streams: Count<4, 1_000>,
    /// While more handshakes than this are under way, a client has to prove first that it receives at its address.
    pub(crate) retry_above: Count<0, 10_000>,
}

impl Default for QuicSection {
    fn default() -> QuicSection {
        const DEFAULT: QuicSection = QuicSection {
            connections: Count::of(256),
            per_identity: Count::of(8),
            per_source: Count::of(192),
            streams: Count::of(32),
            retry_above: Count::of(32),
        };
        DEFAULT
    }
}
