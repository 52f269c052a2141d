//! What a node signs to recover after its certificate ran out. Written down byte by byte in
//! `docs/protocol/recovery.md`, with vectors that `tests/vectors.rs` checks.
//!
//! What never lives here: whether a device may recover (the replicated state decides), and keys.
//!
//! Invariants: the signed bytes cover the cluster, the device, the certificate whose key signs, the server's
//! certificate, the new key, both nonces and the counter; they begin with a label that no certificate, signing
//! request or TLS handshake begins with.

use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

use crate::codec::{Fields, Fingerprint, sha256};
use crate::identity::{is_ulid, parse_certificate};
use crate::keys::{KeyError, KeyPair};
use crate::transcript::{NONCE_LEN, TranscriptError};

/// The first field of what is signed.
pub const LABEL: &str = "palyra recovery v1";
/// Stands before the hash that is signed.
const SIGNED: &[u8] = b"palyra recovery v1 node";
/// The longest signature that is looked at, in bytes of DER.
pub const MAX_SIGNATURE: usize = 72;

/// A request for recovery, as both sides see it.
#[derive(Debug, Clone)]
pub struct Recovery<'a> {
    /// The cluster's id, a ULID.
    pub cluster_id: &'a str,
    /// The device's id, a ULID.
    pub device_id: &'a str,
    /// SHA-256 of the certificate whose key signs.
    pub certificate: Fingerprint,
    /// `tls-server-end-point` of the enrol server's certificate as this side sees it.
    pub server_end_point: [u8; 32],
    /// SHA-256 of the signing request for the new key (DER).
    pub csr_sha256: [u8; 32],
    /// Drawn by the node.
    pub node_nonce: [u8; NONCE_LEN],
    /// Drawn by the server.
    pub server_nonce: [u8; NONCE_LEN],
    /// The counter that the node asks for.
    pub counter: u64,
}

impl Recovery<'_> {
    /// All encoded fields: what is hashed. Refuses ids that are no ULIDs.
    pub fn encoded(&self) -> Result<Vec<u8>, TranscriptError> {
        for (what, value) in [("cluster id", self.cluster_id), ("node id", self.device_id)] {
            if !is_ulid(value) {
                let value = value.chars().take(64).collect();
                return Err(TranscriptError::Id { what, value });
            }
        }
        let mut fields = Fields::default();
        let counter = self.counter.to_be_bytes();
        let parts: [&[u8]; 9] = [
            LABEL.as_bytes(),
            self.cluster_id.as_bytes(),
            self.device_id.as_bytes(),
            &self.certificate,
            &self.server_end_point,
            &self.csr_sha256,
            &self.node_nonce,
            &self.server_nonce,
            &counter,
        ];
        for part in parts {
            fields.push(part);
        }
        Ok(fields.as_bytes().to_vec())
    }

    /// The bytes that are signed: a label, then the hash of [`Recovery::encoded`].
    pub fn signed(&self) -> Result<Vec<u8>, TranscriptError> {
        let mut signed = SIGNED.to_vec();
        signed.extend_from_slice(&sha256(&self.encoded()?));
        Ok(signed)
    }

    /// Signs with the node's key: ECDSA P-256 with SHA-256, ASN.1.
    pub fn sign(&self, key: &KeyPair) -> Result<Vec<u8>, KeyError> {
        let signed = self.signed().map_err(|_| KeyError::Generation)?;
        key.sign_message(&signed)
    }

    /// Whether `signature` is of the key in this certificate (DER), which must be the one that the request names.
    pub fn check(&self, certificate: &[u8], signature: &[u8]) -> bool {
        if sha256(certificate) != self.certificate || signature.len() > MAX_SIGNATURE {
            return false;
        }
        let (Ok(parsed), Ok(signed)) = (parse_certificate(certificate), self.signed()) else {
            return false;
        };
        let point = parsed.public_key().subject_public_key.data.as_ref();
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
            .verify(&signed, signature)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ca::HostNames;
    use crate::testing::{CLUSTER, DEVICE, NOW, Seeded, cluster};
    use crate::{Role, SpiffeId};

    const OTHER: &str = "01JD7ZA1B2C3D4E5F6G7H8J9K0";

    fn node(seed: u64) -> (KeyPair, Vec<u8>) {
        let mut rng = Seeded::new(seed);
        let cluster = cluster(1);
        let key = KeyPair::generate(&mut rng).unwrap();
        let id = SpiffeId::new(cluster.domain.clone(), Role::Node, DEVICE).unwrap();
        let (csr, names) = (key.make_csr().unwrap(), HostNames::default());
        let issued = cluster
            .authority
            .issue_from_csr(&csr, &id, 60_000, &names, NOW, &mut rng);
        (key, issued.unwrap().der)
    }

    fn request(certificate: &[u8]) -> Recovery<'static> {
        Recovery {
            cluster_id: CLUSTER,
            device_id: DEVICE,
            certificate: sha256(certificate),
            server_end_point: [1; 32],
            csr_sha256: [2; 32],
            node_nonce: [3; 32],
            server_nonce: [4; 32],
            counter: 5,
        }
    }

    #[test]
    fn every_field_is_signed() {
        let (key, certificate) = node(3);
        let base = request(&certificate);
        let signature = base.sign(&key).unwrap();
        assert!(base.check(&certificate, &signature));
        let changed: [&dyn Fn(&mut Recovery<'static>); 7] = [
            &|r| r.cluster_id = OTHER,
            &|r| r.device_id = OTHER,
            &|r| r.server_end_point[0] ^= 1,
            &|r| r.csr_sha256[31] ^= 1,
            &|r| r.node_nonce[0] ^= 1,
            &|r| r.server_nonce[0] ^= 1,
            &|r| r.counter += 1,
        ];
        for change in changed {
            let mut other = base.clone();
            change(&mut other);
            assert!(!other.check(&certificate, &signature), "{other:?}");
        }
    }

    #[test]
    fn only_the_key_of_the_named_certificate_will_do() {
        let ((key, certificate), (other_key, other)) = (node(3), node(4));
        let base = request(&certificate);
        let signature = base.sign(&key).unwrap();
        assert!(
            !base.check(&other, &signature),
            "another certificate of this device"
        );
        assert!(!request(&other).check(&other, &signature));
        assert!(!base.check(&certificate, &base.sign(&other_key).unwrap()));
        for bad in [&[][..], &signature[1..], &[0x30; 80][..]] {
            assert!(!base.check(&certificate, bad));
        }
        let bare = key.sign_message(&sha256(&base.encoded().unwrap())).unwrap();
        assert!(!base.check(&certificate, &bare), "the label is signed too");
    }

    /// The vector of docs/protocol/recovery.md, which was computed without this code.
    #[test]
    fn the_vector_holds() {
        let given = Recovery {
            cluster_id: "01JD7Z8QK3M5N7P9R1S3T5V7X9",
            device_id: "01JD7ZA1B2C3D4E5F6G7H8J9K0",
            certificate: [9; 32],
            server_end_point: [1; 32],
            csr_sha256: [2; 32],
            node_nonce: [3; 32],
            server_nonce: [4; 32],
            counter: 5,
        };
        let encoded = given.encoded().unwrap();
        assert_eq!(encoded.len(), 274);
        let expected = "d6ca58bc67b6919ddda26934f429a4458edca3ed88a21708c987c049920b3b14";
        assert_eq!(hex::encode(sha256(&encoded)), expected);
        assert_eq!(given.signed().unwrap()[..23], *b"palyra recovery v1 node");
    }

    #[test]
    fn ids_must_be_ulids() {
        let (_, certificate) = node(3);
        for bad in ["", "01jd7z8qk3m5n7p9r1s3t5v7x9"] {
            let mut request = request(&certificate);
            request.device_id = bad;
            assert!(request.encoded().is_err() && !request.check(&certificate, &[0x30; 70]));
        }
    }
}
