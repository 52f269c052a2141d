//! What both ends of a QUIC connection share: frames, limits, faults, and why connections close.
//!
//! What lives here: [`frame`], the bytes of a stream; [`Fault`], the typed errors of the framing; [`close`], the
//! application codes of a connection's end; [`settings`], the transport's windows and timers. What never does: calls
//! and what they mean (the server's `nodeplane`), sockets, and TLS (`palyra-pki`). Invariants: a reader holds at most
//! one frame and one message, whatever it is sent; a frame's length is judged before its bytes are waited for.
//!
//! `docs/protocol/quic.md` is the protocol for other languages; the constants here are its numbers.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod close;
mod fault;
pub mod frame;
pub mod settings;

pub use fault::Fault;
pub use frame::{Broken, Reader, Writer};

/// The version of the protocol that a call's header names.
pub const VERSION: u32 = 1;

/// The longest frame that either side sends or takes, in bytes, without the four of its length.
pub const DEFAULT_MAX_FRAME_BYTES: usize = 512 * 1024;

/// The names of the calls, as a header has them.
pub mod method {
    /// Whether the replica serves nodes.
    pub const HEALTH: &str = "node.health";
    /// What the node is and can.
    pub const REGISTER: &str = "node.register";
    /// Heartbeats, dispatches, acknowledgements and results.
    pub const SESSION: &str = "node.session";
    /// A new certificate.
    pub const RENEW: &str = "node.renew";
    /// A result outside of a session.
    pub const REPORT: &str = "node.report";
    /// The feed, as far as it is the node's.
    pub const STREAM_EVENTS: &str = "node.stream_events";
}
