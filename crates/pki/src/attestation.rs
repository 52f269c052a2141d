//! What signs the proofs of a worker: statements, egress bindings, and quotes of a provider in software.
//!
//! Works on bytes. What never lives here: what a statement says and whether it holds (`palyra_state::fleet`,
//! which judges it inside of apply; `docs/protocol/attestation.md` has every byte). A statement is encoded by
//! who makes it (`Statement::encode_to_vec` of prost is canonical), and signed here. Invariant: a label
//! stands in front of everything that is signed, so that no signature can pass for another's.
//!
//! [`TestProvider`] stands in for hardware: whoever holds its key file can vouch for anything. A policy that
//! names its key says that it takes that as hardware evidence; it is for tests, and for trying out how a
//! policy would work.

use rcgen::PublicKeyData as _;

use crate::KeyPair;
use crate::keys::KeyError;

/// In front of a statement when it is signed.
pub const STATEMENT_LABEL: &[u8] = b"palyra worker attestation v1\0";
/// In front of an egress binding when it is signed.
pub const EGRESS_LABEL: &[u8] = b"palyra egress binding v1\0";
/// In front of a hardware quote when it is signed.
pub const QUOTE_LABEL: &[u8] = b"palyra hardware quote v1\0";

/// A key's public half as statements and policies carry it: SubjectPublicKeyInfo, DER.
pub fn public_key(key: &KeyPair) -> Vec<u8> {
    key.subject_public_key_info()
}

/// Signs an encoded statement with the worker's identity key: ECDSA P-256 with SHA-256, ASN.1.
///
/// # Errors
/// The provider of cryptography gives no signature.
pub fn sign_statement(key: &KeyPair, statement: &[u8]) -> Result<Vec<u8>, KeyError> {
    key.sign_message(&[STATEMENT_LABEL, statement].concat())
}

/// By an egress proxy, for one worker: `palyra.worker.v1.EgressBinding`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressBinding {
    /// Name of the proxy, as the policy has it.
    pub proxy: String,
    /// The worker's ULID.
    pub worker_id: [u8; 16],
    /// First moment at which it is good, in milliseconds since the Unix epoch.
    pub not_before_ms: u64,
    /// First moment at which it is not good any more.
    pub expires_at_ms: u64,
    /// The proxy's signature.
    pub signature: Vec<u8>,
}

impl EgressBinding {
    /// Binds a worker to a proxy, with the proxy's key.
    ///
    /// # Errors
    /// The provider of cryptography gives no signature.
    pub fn sign(
        key: &KeyPair,
        proxy: &str,
        worker_id: [u8; 16],
        not_before_ms: u64,
        expires_at_ms: u64,
    ) -> Result<Self, KeyError> {
        let mut binding = Self {
            proxy: proxy.to_owned(),
            worker_id,
            not_before_ms,
            expires_at_ms,
            signature: Vec::new(),
        };
        binding.signature = key.sign_message(&[EGRESS_LABEL, &binding.encode()].concat())?;
        Ok(binding)
    }

    /// The message, canonically encoded: what a file of it holds, and without the signature what is signed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_bytes(&mut out, 1, self.proxy.as_bytes());
        put_bytes(&mut out, 2, &self.worker_id);
        put_number(&mut out, 3, self.not_before_ms);
        put_number(&mut out, 4, self.expires_at_ms);
        put_bytes(&mut out, 5, &self.signature);
        out
    }
}

/// By hardware, or a test provider: `palyra.worker.v1.HardwareQuote`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardwareQuote {
    /// Name of the provider, as the policy has it.
    pub provider: String,
    /// The statement's nonce.
    pub nonce: [u8; 32],
    /// Image, build, artifact.
    pub digests: [u8; 96],
    /// The provider's signature.
    pub signature: Vec<u8>,
}

impl HardwareQuote {
    /// The message, canonically encoded; without the signature what is signed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_bytes(&mut out, 1, self.provider.as_bytes());
        put_bytes(&mut out, 2, &self.nonce);
        put_bytes(&mut out, 3, &self.digests);
        put_bytes(&mut out, 4, &self.signature);
        out
    }
}

/// What vouches for the digests of a worker: hardware in production, a key in tests.
pub trait QuoteProvider {
    /// A quote over these digests (image, build, artifact) and the nonce of the open challenge.
    ///
    /// # Errors
    /// It gives none.
    fn quote(&self, nonce: [u8; 32], digests: [[u8; 32]; 3]) -> Result<HardwareQuote, KeyError>;
}

/// A provider in software. It proves nothing but that its key was there.
#[derive(Debug)]
pub struct TestProvider {
    name: String,
    key: KeyPair,
}

impl TestProvider {
    /// With this name and key, which the policy names.
    pub fn new(name: &str, key: KeyPair) -> Self {
        Self {
            name: name.to_owned(),
            key,
        }
    }
}

impl QuoteProvider for TestProvider {
    fn quote(&self, nonce: [u8; 32], digests: [[u8; 32]; 3]) -> Result<HardwareQuote, KeyError> {
        let mut joined = [0; 96];
        for (slot, digest) in joined.chunks_exact_mut(32).zip(digests) {
            slot.copy_from_slice(&digest);
        }
        let mut quote = HardwareQuote {
            provider: self.name.clone(),
            nonce,
            digests: joined,
            signature: Vec::new(),
        };
        quote.signature = self.key.sign_message(&[QUOTE_LABEL, &quote.encode()].concat())?;
        Ok(quote)
    }
}

/// A field of bytes or text; one that is empty is left out.
fn put_bytes(out: &mut Vec<u8>, tag: u8, bytes: &[u8]) {
    if !bytes.is_empty() {
        out.push(tag << 3 | 2);
        put_varint(out, bytes.len() as u64);
        out.extend_from_slice(bytes);
    }
}

/// A field with a number; 0 is left out.
fn put_number(out: &mut Vec<u8>, tag: u8, value: u64) {
    if value != 0 {
        out.push(tag << 3);
        put_varint(out, value);
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};

    use super::*;
    use crate::testing::Seeded;

    fn holds(key: &KeyPair, label: &[u8], message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key.der_bytes())
            .verify(&[label, message].concat(), signature)
            .is_ok()
    }

    /// The messages inside the test vector of the protocol, which the state's tests compare with what prost
    /// makes.
    #[test]
    fn messages_are_encoded_as_the_protocol_says() {
        let text = include_str!("../../../docs/protocol/attestation.md");
        let vector = text.split("```\n").nth(1).unwrap().replace('\n', "");
        let binding = EgressBinding {
            proxy: "egress-1".to_owned(),
            worker_id: [7; 16],
            not_before_ms: 1_000,
            expires_at_ms: 300,
            signature: vec![7; 3],
        };
        assert!(vector.contains(&hex::encode(binding.encode())));
        let quote = HardwareQuote {
            provider: "tp".to_owned(),
            nonce: [7; 32],
            digests: [7; 96],
            signature: vec![7; 3],
        };
        assert!(vector.contains(&hex::encode(quote.encode())));
    }

    #[test]
    fn signatures_hold_under_their_own_label_only() {
        let key = KeyPair::generate(&mut Seeded::new(1)).unwrap();
        let signature = sign_statement(&key, b"statement").unwrap();
        assert!(holds(&key, STATEMENT_LABEL, b"statement", &signature));
        assert!(!holds(&key, EGRESS_LABEL, b"statement", &signature));
        assert!(!holds(&key, STATEMENT_LABEL, b"statemenT", &signature));

        let mut binding = EgressBinding::sign(&key, "egress-1", [7; 16], 1, 2).unwrap();
        let signature = std::mem::take(&mut binding.signature);
        assert!(holds(&key, EGRESS_LABEL, &binding.encode(), &signature));
        binding.expires_at_ms += 1;
        assert!(!holds(&key, EGRESS_LABEL, &binding.encode(), &signature));
    }

    #[test]
    fn a_quote_vouches_for_its_digests_and_nonce() {
        let key = KeyPair::generate(&mut Seeded::new(2)).unwrap();
        let public = KeyPair::from_pkcs8(key.to_pkcs8()).unwrap();
        let provider = TestProvider::new("tp", key);
        let mut quote = provider.quote([1; 32], [[2; 32], [3; 32], [4; 32]]).unwrap();
        assert_eq!(
            (quote.digests[0], quote.digests[32], quote.digests[95]),
            (2, 3, 4)
        );
        let signature = std::mem::take(&mut quote.signature);
        assert!(holds(&public, QUOTE_LABEL, &quote.encode(), &signature));
        quote.nonce[0] ^= 1;
        assert!(!holds(&public, QUOTE_LABEL, &quote.encode(), &signature));
    }

    #[test]
    fn a_public_key_is_a_subject_public_key_info() {
        let key = KeyPair::generate(&mut Seeded::new(3)).unwrap();
        assert_eq!(crate::sha256(&public_key(&key)), key.spki_sha256());
        assert_eq!(public_key(&key).len(), 91);
    }
}
