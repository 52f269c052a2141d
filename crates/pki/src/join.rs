//! The cryptography of `palyrad join`: a new replica proves its token, and gets the key encryption key back
//! under it.
//!
//! What never lives here: checking and consuming the token, and the certificates (see [`crate::ca`]).
//!
//! Invariants: the proof covers both signing requests, the name and the addresses, so nothing of what is
//! admitted can be exchanged on the way; the key encryption key opens only for who holds the token and sent
//! exactly this request.

use zeroize::Zeroizing;

use crate::codec::{Fields, derive, hmac256, same, sha256};
use crate::seal::{Purpose, SealError, open_under, seal_under};
use crate::ticket::Secret;
use crate::{Entropy, Kek};

/// The first field of every join transcript.
pub const LABEL: &str = "palyra join v1";

/// What a joining replica asks for.
#[derive(Debug, Clone)]
pub struct JoinRequest<'a> {
    /// The cluster's id.
    pub cluster_id: &'a str,
    /// The token's id.
    pub token_id: &'a str,
    /// The signing request for the replica's certificate, DER.
    pub replica_csr: &'a [u8],
    /// The signing request for the replica's authority, DER.
    pub authority_csr: &'a [u8],
    /// The replica's name.
    pub name: &'a str,
    /// The replica's addresses, in the order in which they are sent.
    pub addresses: &'a [String],
    /// `tls-server-end-point` of the enrol server's certificate as this side sees it.
    pub server_end_point: [u8; 32],
}

impl JoinRequest<'_> {
    /// SHA-256 over the fields label, cluster id, token id, SHA-256 of both signing requests, name, each
    /// address, and the server's end point.
    pub fn hash(&self) -> [u8; 32] {
        let mut fields = Fields::default();
        fields.push(LABEL.as_bytes());
        fields.push(self.cluster_id.as_bytes());
        fields.push(self.token_id.as_bytes());
        fields.push(&sha256(self.replica_csr));
        fields.push(&sha256(self.authority_csr));
        fields.push(self.name.as_bytes());
        let mut addresses = Fields::default();
        for address in self.addresses {
            addresses.push(address.as_bytes());
        }
        fields.push(addresses.as_bytes());
        fields.push(&self.server_end_point);
        sha256(fields.as_bytes())
    }

    /// The proof of the token: HMAC-SHA256(derived key, `palyra join v1 replica` || hash).
    pub fn proof(&self, secret: &Secret) -> [u8; 32] {
        hmac256(
            proof_key(secret).as_slice(),
            &[b"palyra join v1 replica", &self.hash()],
        )
    }

    /// Whether `proof` was made with this token over this request, compared in constant time.
    pub fn check_proof(&self, secret: &Secret, proof: &[u8]) -> bool {
        same(&self.proof(secret), proof)
    }

    /// The cluster's proof over its answer: HMAC-SHA256(derived key, `palyra join v1 cluster` || hash ||
    /// SHA-256 over the answer's parts as fields). Both sides give the parts in the order that
    /// `docs/protocol/pairing.md` says.
    pub fn answer_proof(&self, secret: &Secret, parts: &[&[u8]]) -> [u8; 32] {
        let mut fields = Fields::default();
        for part in parts {
            fields.push(part);
        }
        let answer = sha256(fields.as_bytes());
        hmac256(
            proof_key(secret).as_slice(),
            &[b"palyra join v1 cluster", &self.hash(), &answer],
        )
    }

    /// Whether `proof` is the cluster's over these parts, compared in constant time.
    pub fn check_answer_proof(&self, secret: &Secret, parts: &[&[u8]], proof: &[u8]) -> bool {
        same(&self.answer_proof(secret, parts), proof)
    }

    /// The key encryption key, sealed for who sent this request with this token.
    pub fn wrap_kek(&self, secret: &Secret, kek: &Kek, rng: &mut dyn Entropy) -> Result<Vec<u8>, SealError> {
        seal_under(
            &wrap_key(secret),
            Purpose::KekHandOver,
            &self.hash(),
            kek.bytes(),
            rng,
        )
    }

    /// Opens what [`JoinRequest::wrap_kek`] made.
    pub fn unwrap_kek(&self, secret: &Secret, blob: &[u8]) -> Result<Kek, SealError> {
        Kek::from_bytes(&open_under(
            &wrap_key(secret),
            Purpose::KekHandOver,
            &self.hash(),
            blob,
        )?)
    }
}

fn proof_key(secret: &Secret) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(derive(secret.as_bytes(), "palyra join v1 proof key", &[]))
}

fn wrap_key(secret: &Secret) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(derive(secret.as_bytes(), "palyra join v1 wrap key", &[]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CLUSTER, DEVICE, Seeded};

    fn request(addresses: &[String]) -> JoinRequest<'_> {
        JoinRequest {
            cluster_id: CLUSTER,
            token_id: DEVICE,
            replica_csr: b"replica",
            authority_csr: b"authority",
            name: "r2",
            addresses,
            server_end_point: [5; 32],
        }
    }

    #[test]
    fn the_kek_opens_for_this_token_and_request_only() {
        let mut rng = Seeded::new(1);
        let (secret, other) = (Secret::generate(&mut rng), Secret::generate(&mut rng));
        let kek = Kek::generate(&mut rng);
        let addresses = ["a:1".to_owned(), "b:2".to_owned()];
        let asked = request(&addresses);
        let blob = asked.wrap_kek(&secret, &kek, &mut rng).unwrap();
        assert_eq!(asked.unwrap_kek(&secret, &blob).unwrap().id(), kek.id());
        assert!(asked.unwrap_kek(&other, &blob).is_err());
        let renamed = JoinRequest {
            name: "r3",
            ..request(&addresses)
        };
        assert!(renamed.unwrap_kek(&secret, &blob).is_err());
        assert!(asked.unwrap_kek(&secret, &blob[..blob.len() - 1]).is_err());
    }

    #[test]
    fn every_part_of_the_request_is_proved() {
        let secret = Secret::generate(&mut Seeded::new(2));
        let addresses = ["a:1".to_owned(), "b:2".to_owned()];
        let joined = ["a:1b:2".to_owned()];
        let proof = request(&addresses).proof(&secret);
        assert!(request(&addresses).check_proof(&secret, &proof));
        assert!(!request(&addresses).check_proof(&secret, &proof[1..]));
        assert!(!request(&addresses).check_proof(&Secret::generate(&mut Seeded::new(3)), &proof));
        let changed = [
            JoinRequest {
                cluster_id: DEVICE,
                ..request(&addresses)
            },
            JoinRequest {
                token_id: CLUSTER,
                ..request(&addresses)
            },
            JoinRequest {
                replica_csr: b"authority",
                ..request(&addresses)
            },
            JoinRequest {
                authority_csr: b"replica",
                ..request(&addresses)
            },
            JoinRequest {
                name: "r1",
                ..request(&addresses)
            },
            JoinRequest {
                server_end_point: [6; 32],
                ..request(&addresses)
            },
            request(&addresses[..1]),
            request(&joined),
        ];
        let answer = request(&addresses).answer_proof(&secret, &[b"a", b"b"]);
        assert!(request(&addresses).check_answer_proof(&secret, &[b"a", b"b"], &answer));
        assert!(!request(&addresses).check_answer_proof(&secret, &[b"ab", b""], &answer));
        assert!(!changed[0].check_answer_proof(&secret, &[b"a", b"b"], &answer));
        assert!(!request(&addresses).check_answer_proof(&secret, &[b"a", b"b"], &proof));
        for (index, other) in changed.iter().enumerate() {
            assert!(!other.check_proof(&secret, &proof), "case {index}");
        }
    }
}
