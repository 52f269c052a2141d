//! Keys, certificates, pairing secrets and the TLS configurations of Palyra.
//!
//! What lives here: the certificate authority and its checks, the names inside certificates, sealing of
//! secrets, the text forms of tickets and join tokens, the PAKE behind the eight digits, the pairing
//! transcript, and the `rustls` configurations that all listeners and clients use.
//!
//! What never does: no clock, no file, no socket, no random source is read here. Time comes as `now_ms` (milliseconds
//! since the Unix epoch) or as a [`tls::Clock`], randomness as [`Entropy`]. One exception is inside the crypto
//! provider: ECDSA signatures draw their nonce from aws-lc's own generator, so two runs with the same [`Entropy`]
//! agree on keys, serials and secrets but not on signature bytes, unless [`keys::sign_repeatably`] was called.
//!
//! Invariants: private keys are P-256, zeroized on drop and never printed; every comparison of a secret is
//! constant time; every parser has a size limit that is checked before anything is allocated for the input.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod attestation;
pub mod ca;
pub mod chain;
mod codec;
pub mod credential;
mod entropy;
pub mod identity;
pub mod join;
pub mod keys;
pub mod layout;
pub mod pin;
pub mod recovery;
pub mod seal;
pub mod ticket;
pub mod tls;
pub mod transcript;

pub use ca::{Authority, CaError, IssuedCert, Root};
pub use chain::{ChainError, TrustBundle};
pub use codec::{Fingerprint, sha256};
pub use credential::Credential;
pub use entropy::Entropy;
pub use identity::{IdentityError, PeerIdentity, Role, SpiffeId, TrustDomain};
pub use keys::KeyPair;
pub use pin::Pin;
pub use recovery::Recovery;
pub use seal::{Kek, Purpose};
pub use ticket::{JoinToken, Ticket};
pub use transcript::{Method, Transcript};

#[cfg(test)]
mod testing;
