//! What two sides of a pairing agree on, and the proofs over it. Written down byte by byte in
//! `docs/protocol/pairing.md`, with test vectors that `tests/vectors.rs` recomputes.
//!
//! What never lives here: where the key comes from (a ticket's key, or the PAKE's session key) and what is
//! stored.
//!
//! Invariants: the hash covers everything that decides who is paired with whom: cluster, code, node, the
//! server's certificate, the node's key; proofs of the two directions have different labels, so neither can
//! be reflected; proofs are compared in constant time.

use std::fmt;

use zeroize::Zeroizing;

use crate::codec::{Fields, hmac256, same, sha256};
use crate::identity::is_ulid;

/// The first field of every pairing transcript.
pub const LABEL: &str = "palyra pairing v1";
/// The length of both nonces, in bytes.
pub const NONCE_LEN: usize = 32;

/// How a node proves that it was invited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// A 128-bit secret in a ticket.
    Ticket,
    /// Eight digits, through a PAKE.
    Pin,
}

impl Method {
    /// The method as it is spelt in transcripts.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ticket => "ticket",
            Self::Pin => "pin",
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why there is no transcript.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TranscriptError {
    /// An id isn't a ULID.
    #[error("{what} {value:?} is no ULID: 26 characters of 0-9 and A-Z without I, L, O, U are expected")]
    Id {
        /// Which id.
        what: &'static str,
        /// The id as it came in, cut to 64 characters.
        value: String,
    },
}

/// What both sides know before the second message: all fields of the transcript but the messages of the PAKE.
#[derive(Debug, Clone)]
pub struct Opening<'a> {
    /// The cluster's id, a ULID.
    pub cluster_id: &'a str,
    /// Ticket or PIN.
    pub method: Method,
    /// The id of the PIN code or ticket, a ULID.
    pub code_id: &'a str,
    /// The node's device id, a ULID.
    pub node_id: &'a str,
    /// `tls-server-end-point` of the enrol server's certificate as this side sees it.
    pub server_end_point: [u8; 32],
    /// SHA-256 of the node's signing request (DER). Whoever gets the request itself must compare.
    pub csr_sha256: [u8; 32],
    /// Drawn by the node.
    pub node_nonce: [u8; NONCE_LEN],
    /// Drawn by the server.
    pub server_nonce: [u8; NONCE_LEN],
}

/// A pairing transcript. Bind it to the messages of the PAKE with [`Transcript::with_messages`] in PIN mode,
/// use it as it is in ticket mode.
#[derive(Debug, Clone)]
pub struct Transcript {
    opening: Fields,
    ke1: Option<[u8; 32]>,
    ke2: Option<[u8; 32]>,
}

impl Transcript {
    /// Begins a transcript; refuses ids that are no ULIDs.
    pub fn new(opening: &Opening<'_>) -> Result<Self, TranscriptError> {
        let ids = [
            ("cluster id", opening.cluster_id),
            ("code id", opening.code_id),
            ("node id", opening.node_id),
        ];
        for (what, value) in ids {
            if !is_ulid(value) {
                return Err(TranscriptError::Id {
                    what,
                    value: value.chars().take(64).collect(),
                });
            }
        }
        let mut fields = Fields::default();
        let parts: [&[u8]; 9] = [
            LABEL.as_bytes(),
            opening.cluster_id.as_bytes(),
            opening.method.as_str().as_bytes(),
            opening.code_id.as_bytes(),
            opening.node_id.as_bytes(),
            &opening.server_end_point,
            &opening.csr_sha256,
            &opening.node_nonce,
            &opening.server_nonce,
        ];
        for part in parts {
            fields.push(part);
        }
        Ok(Self {
            opening: fields,
            ke1: None,
            ke2: None,
        })
    }

    /// The encoded fields that are known before the second message: OPAQUE's context.
    pub fn context(&self) -> &[u8] {
        self.opening.as_bytes()
    }

    /// Adds the first two messages of the PAKE. Without it they count as absent, as in ticket mode.
    #[must_use]
    pub fn with_messages(mut self, ke1: &[u8], ke2: &[u8]) -> Self {
        self.ke1 = Some(sha256(ke1));
        self.ke2 = Some(sha256(ke2));
        self
    }

    /// All encoded fields: what is hashed.
    pub fn encoded(&self) -> Vec<u8> {
        let mut all = Fields::default();
        all.extend(self.opening.as_bytes());
        all.push(self.ke1.as_ref().map_or(&[][..], |hash| hash));
        all.push(self.ke2.as_ref().map_or(&[][..], |hash| hash));
        all.as_bytes().to_vec()
    }

    /// SHA-256 of [`Transcript::encoded`].
    pub fn hash(&self) -> [u8; 32] {
        sha256(&self.encoded())
    }

    /// The node's proof: HMAC-SHA256(key, `palyra pairing v1 node` || hash).
    pub fn node_proof(&self, key: &[u8]) -> [u8; 32] {
        hmac256(key, &[b"palyra pairing v1 node", &self.hash()])
    }

    /// Whether `proof` is the node's, compared in constant time.
    pub fn check_node_proof(&self, key: &[u8], proof: &[u8]) -> bool {
        same(&self.node_proof(key), proof)
    }

    /// The server's proof, which also vouches for a trust bundle: HMAC-SHA256(key, `palyra pairing v1 server`
    /// || hash
    /// || [`crate::TrustBundle::digest`]).
    pub fn server_proof(&self, key: &[u8], bundle_digest: &[u8; 32]) -> [u8; 32] {
        hmac256(key, &[b"palyra pairing v1 server", &self.hash(), bundle_digest])
    }

    /// Whether `proof` is the server's over this bundle, compared in constant time.
    pub fn check_server_proof(&self, key: &[u8], bundle_digest: &[u8; 32], proof: &[u8]) -> bool {
        same(&self.server_proof(key, bundle_digest), proof)
    }

    /// The short authentication string that both screens show, `123 456`: the first eight bytes of
    /// HMAC-SHA256(key, `palyra pairing v1 sas` || hash) as a big-endian number, modulo 1,000,000.
    pub fn sas(&self, key: &[u8]) -> String {
        let mac = hmac256(key, &[b"palyra pairing v1 sas", &self.hash()]);
        let mut head = [0u8; 8];
        head.copy_from_slice(&mac[..8]);
        let digits = u64::from_be_bytes(head) % 1_000_000;
        format!("{:03} {:03}", digits / 1000, digits % 1000)
    }

    /// With which the node asks any replica for the outcome: HMAC-SHA256(key, `palyra pairing v1 fetch` ||
    /// hash).
    pub fn fetch_token(&self, key: &[u8]) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(hmac256(key, &[b"palyra pairing v1 fetch", &self.hash()]))
    }
}

/// What the cluster stores of a fetch token: its SHA-256.
pub fn fetch_token_hash(token: &[u8]) -> [u8; 32] {
    sha256(token)
}

/// Whether a presented fetch token is the one whose hash is stored, compared in constant time.
pub fn check_fetch_token(token: &[u8], stored_hash: &[u8]) -> bool {
    token.len() == 32 && same(&sha256(token), stored_hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CLUSTER, DEVICE};

    const CODE: &str = "01JD7ZA1B2C3D4E5F6G7H8J9K0";

    fn opening() -> Opening<'static> {
        Opening {
            cluster_id: CLUSTER,
            method: Method::Pin,
            code_id: CODE,
            node_id: DEVICE,
            server_end_point: [1; 32],
            csr_sha256: [4; 32],
            node_nonce: [2; 32],
            server_nonce: [3; 32],
        }
    }

    #[test]
    fn every_field_changes_every_proof() {
        let base = Transcript::new(&opening()).unwrap().with_messages(b"ke1", b"ke2");
        let begun = |change: &dyn Fn(&mut Opening<'static>)| {
            let mut other = opening();
            change(&mut other);
            Transcript::new(&other).unwrap().with_messages(b"ke1", b"ke2")
        };
        let others = [
            begun(&|o| o.cluster_id = DEVICE),
            begun(&|o| o.method = Method::Ticket),
            begun(&|o| o.code_id = DEVICE),
            begun(&|o| o.node_id = CODE),
            begun(&|o| o.server_end_point[31] ^= 1),
            begun(&|o| o.csr_sha256[0] ^= 1),
            begun(&|o| o.node_nonce[0] ^= 1),
            begun(&|o| o.server_nonce[0] ^= 1),
            Transcript::new(&opening()).unwrap().with_messages(b"ke2", b"ke1"),
            Transcript::new(&opening()).unwrap(),
        ];
        for other in &others {
            assert_ne!(other.hash(), base.hash());
            assert_ne!(other.sas(b"key"), base.sas(b"key"));
            assert!(!other.check_node_proof(b"key", &base.node_proof(b"key")));
            assert!(!other.check_server_proof(b"key", &[9; 32], &base.server_proof(b"key", &[9; 32])));
            assert_ne!(*other.fetch_token(b"key"), *base.fetch_token(b"key"));
        }
    }

    #[test]
    fn proofs_do_not_stand_in_for_each_other() {
        let transcript = Transcript::new(&opening()).unwrap();
        let (node, server) = (
            transcript.node_proof(b"key"),
            transcript.server_proof(b"key", &[9; 32]),
        );
        assert!(transcript.check_node_proof(b"key", &node));
        assert!(!transcript.check_node_proof(b"kez", &node));
        assert!(!transcript.check_node_proof(b"key", &server));
        assert!(!transcript.check_node_proof(b"key", &node[..31]));
        assert!(!transcript.check_node_proof(b"key", &[]));
        assert!(transcript.check_server_proof(b"key", &[9; 32], &server));
        assert!(
            !transcript.check_server_proof(b"key", &[8; 32], &server),
            "another trust bundle"
        );
        assert!(!transcript.check_server_proof(b"key", &[9; 32], &node));
    }

    #[test]
    fn the_sas_has_six_digits() {
        let transcript = Transcript::new(&opening()).unwrap();
        for key in 0u8..50 {
            let sas = transcript.sas(&[key; 32]);
            assert!(sas.len() == 7 && sas.as_bytes()[3] == b' ', "{sas}");
            assert!(sas.bytes().filter(u8::is_ascii_digit).count() == 6, "{sas}");
        }
    }

    #[test]
    fn fetch_tokens_are_checked_by_hash() {
        let token = Transcript::new(&opening()).unwrap().fetch_token(b"key");
        let stored = fetch_token_hash(token.as_slice());
        assert!(check_fetch_token(token.as_slice(), &stored));
        assert!(!check_fetch_token(&[0; 32], &stored));
        assert!(!check_fetch_token(&token[..31], &stored));
        assert!(!check_fetch_token(token.as_slice(), &[]));
    }

    #[test]
    fn ids_must_be_ulids() {
        for bad in [
            "",
            "not a ulid",
            "01jd7z8qk3m5n7p9r1s3t5v7x9",
            "81JD7Z8QK3M5N7P9R1S3T5V7X9",
        ] {
            let error = Transcript::new(&Opening {
                node_id: bad,
                ..opening()
            })
            .unwrap_err();
            assert_eq!(
                error,
                TranscriptError::Id {
                    what: "node id",
                    value: bad.to_owned()
                }
            );
        }
    }
}
