//! The peer protocol over gRPC and mutual TLS, and the book of addresses that it dials from.
//!
//! Lives here: connections, pools, keepalive, the mapping of failures. Never here: what a body means, or who
//! may be trusted: TLS configurations come from the caller, and a listener that has verified a client's
//! certificate says so by putting a [`PeerReplica`] into the request's extensions. Invariant: a request
//! without it is refused.

mod addresses;
mod client;
mod peers_cache;
mod server;

pub use addresses::AddressBook;
pub use client::{GrpcTransport, TlsFor};
pub use server::{PeerEndpoint, PeerReplica, peer_server};

/// Largest message in either direction. Far above a full batch of entries and above the largest value in a
/// snapshot.
pub const MESSAGE_MAX: usize = 16 * 1024 * 1024;

/// Metadata key that carries a refusal's text form.
const REFUSAL: &str = "palyra-refusal";
