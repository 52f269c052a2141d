//! P-256 key pairs and certificate signing requests.
//!
//! What never lives here: issuing (see [`crate::ca`]), files, encryption of keys (see [`crate::seal`]).
//!
//! Invariants: a private key exists only as zeroized PKCS#8 and inside the crypto provider, and is never
//! printed; a request is believed only for its public key, after its signature is checked.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_lc_rs::encoding::AsBigEndian as _;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use ecdsa::hazmat::SignPrimitive as _;
use rcgen::{CertificateParams, DistinguishedName, PublicKeyData, SigningKey, SubjectPublicKeyInfo};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use crate::Entropy;
use crate::codec::sha256;

/// The largest certificate signing request that is looked at, in bytes of DER.
pub const MAX_CSR: usize = 4 * 1024;
/// The largest private key that is looked at, in bytes of PKCS#8.
pub const MAX_KEY: usize = 1024;

const KEY_PEM_LABEL: &str = "PRIVATE KEY";
const PUBLIC_KEY_OID: &str = "1.2.840.10045.2.1";
const P256_OID: &str = "1.2.840.10045.3.1.7";
const ECDSA_SHA256_OID: &str = "1.2.840.10045.4.3.2";

/// See [`sign_repeatably`].
static REPEATABLE: AtomicBool = AtomicBool::new(false);

/// From now on all keys of this process sign with nonces that come from key and message (RFC 6979) instead of the
/// provider's own randomness: the same message has the same signature. As safe and verified in the same way, but
/// slower. For simulations, whose runs must repeat byte by byte.
pub fn sign_repeatably() {
    REPEATABLE.store(true, Ordering::Relaxed);
}

/// Why a key or a signing request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not a P-256 private key in PKCS#8.
    #[error("not a P-256 private key in PKCS#8 form")]
    BadKey,
    /// The provider or the entropy source gives no usable key.
    #[error("no key could be made: the source of randomness gave nothing usable")]
    Generation,
    /// The request is larger than [`MAX_CSR`].
    #[error("the signing request has {0} bytes, more than the {MAX_CSR} allowed")]
    CsrTooLarge(usize),
    /// The bytes are no PKCS#10 request, or something follows it.
    #[error("not a PKCS#10 signing request in DER form")]
    CsrMalformed,
    /// Another kind of key.
    #[error("the signing request holds another kind of key; only ECDSA P-256 with SHA-256 is accepted")]
    CsrKeyType,
    /// The request isn't signed by the key inside it.
    #[error("the signing request is not signed by the key that it holds")]
    CsrSignature,
}

/// A P-256 key pair. The private half is zeroized on drop; `Debug` shows the public half's hash only.
pub struct KeyPair {
    pkcs8: Zeroizing<Vec<u8>>,
    pair: EcdsaKeyPair,
}

impl KeyPair {
    /// Makes a key from `rng`: a 32-byte candidate is drawn until it lies between 1 and the group order (FIPS
    /// 186-5, A.2.2), which fails once in 2^32 draws. [`KeyError::Generation`] after 16 of them: the source
    /// is broken.
    pub fn generate(rng: &mut dyn Entropy) -> Result<Self, KeyError> {
        // ECPrivateKey (RFC 5915) without its public half, which the provider computes.
        const HEAD: [u8; 7] = [0x30, 0x31, 0x02, 0x01, 0x01, 0x04, 0x20];
        const TAIL: [u8; 12] = [
            0xa0, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07,
        ];
        for _ in 0..16 {
            let mut sec1 = Zeroizing::new([0u8; 51]);
            sec1[..7].copy_from_slice(&HEAD);
            rng.fill(&mut sec1[7..39]);
            sec1[39..].copy_from_slice(&TAIL);
            let Ok(pair) =
                EcdsaKeyPair::from_private_key_der(&ECDSA_P256_SHA256_ASN1_SIGNING, sec1.as_slice())
            else {
                continue;
            };
            let document = pair.to_pkcs8v1().map_err(|_| KeyError::Generation)?;
            return Self::from_pkcs8(document.as_ref());
        }
        Err(KeyError::Generation)
    }

    /// Reads PKCS#8 in DER form. Refuses other curves, other algorithms and more than [`MAX_KEY`] bytes.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, KeyError> {
        if der.len() > MAX_KEY {
            return Err(KeyError::BadKey);
        }
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der).map_err(|_| KeyError::BadKey)?;
        Ok(Self {
            pkcs8: Zeroizing::new(der.to_vec()),
            pair,
        })
    }

    /// Reads a PEM block `PRIVATE KEY`.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        if text.len() > 2 * MAX_KEY {
            return Err(KeyError::BadKey);
        }
        let block = pem::parse(text).map_err(|_| KeyError::BadKey)?;
        if block.tag() != KEY_PEM_LABEL {
            return Err(KeyError::BadKey);
        }
        let der = Zeroizing::new(block.into_contents());
        Self::from_pkcs8(&der)
    }

    /// The private key in PKCS#8 DER form. Seal it before it is stored.
    pub fn to_pkcs8(&self) -> &Zeroizing<Vec<u8>> {
        &self.pkcs8
    }

    /// The private key as a PEM block `PRIVATE KEY`.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(pem::encode(&pem::Pem::new(KEY_PEM_LABEL, self.pkcs8.to_vec())))
    }

    /// SHA-256 of the subject public key info.
    pub fn spki_sha256(&self) -> [u8; 32] {
        sha256(&self.subject_public_key_info())
    }

    /// Signs a message: ECDSA P-256 with SHA-256, ASN.1. Whoever calls puts a label of its own in front.
    pub(crate) fn sign_message(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        if REPEATABLE.load(Ordering::Relaxed) {
            return self.sign_by_message(message);
        }
        let signature = self.pair.sign(&SystemRandom::new(), message);
        signature
            .map(|signature| signature.as_ref().to_vec())
            .map_err(|_| KeyError::Generation)
    }

    /// See [`sign_repeatably`]. The key is taken as the number that it is: `p256`'s own key types compute the public
    /// key first, which takes as long as the signature.
    fn sign_by_message(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let failed = |_| KeyError::Generation;
        let number = self.pair.private_key().as_be_bytes().map_err(failed)?;
        let key = p256::SecretKey::from_slice(number.as_ref()).map_err(|_| KeyError::Generation)?;
        let (signature, _) = key
            .to_nonzero_scalar()
            .try_sign_prehashed_rfc6979::<sha2::Sha256>(&sha256(message).into(), &[])
            .map_err(|_| KeyError::Generation)?;
        Ok(signature.to_der().as_bytes().to_vec())
    }

    /// A signing request (PKCS#10, DER) that carries the public key and nothing else: names come from whoever
    /// issues.
    pub fn make_csr(&self) -> Result<Vec<u8>, KeyError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(self).map_err(|_| KeyError::Generation)?;
        Ok(request.der().to_vec())
    }
}

impl fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyPair({})", hex::encode(self.spki_sha256()))
    }
}

impl PublicKeyData for KeyPair {
    fn der_bytes(&self) -> &[u8] {
        self.pair.public_key().as_ref()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl SigningKey for KeyPair {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.sign_message(message)
            .map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

/// What a checked signing request is believed for: its public key.
#[derive(Debug)]
pub struct CsrKey {
    pub(crate) public_key: SubjectPublicKeyInfo,
    /// SHA-256 of the subject public key info.
    pub spki_sha256: [u8; 32],
}

/// Checks a signing request: size, form, key type, and that it is signed by the key it holds. All names and
/// extensions in it are ignored.
pub fn check_csr(der: &[u8]) -> Result<CsrKey, KeyError> {
    if der.len() > MAX_CSR {
        return Err(KeyError::CsrTooLarge(der.len()));
    }
    let (rest, csr) = X509CertificationRequest::from_der(der).map_err(|_| KeyError::CsrMalformed)?;
    if !rest.is_empty() {
        return Err(KeyError::CsrMalformed);
    }
    let info = &csr.certification_request_info;
    let spki = &info.subject_pki;
    let curve = spki
        .algorithm
        .parameters
        .as_ref()
        .and_then(|any| any.as_oid().ok());
    let point = spki.subject_public_key.data.as_ref();
    let right_kind = spki.algorithm.algorithm.to_id_string() == PUBLIC_KEY_OID
        && curve.is_some_and(|oid| oid.to_id_string() == P256_OID)
        && csr.signature_algorithm.algorithm.to_id_string() == ECDSA_SHA256_OID
        && point.len() == 65
        && point[0] == 4;
    if !right_kind {
        return Err(KeyError::CsrKeyType);
    }
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, point)
        .verify(info.raw, csr.signature_value.data.as_ref())
        .map_err(|_| KeyError::CsrSignature)?;
    let public_key = SubjectPublicKeyInfo::from_der(spki.raw).map_err(|_| KeyError::CsrKeyType)?;
    Ok(CsrKey {
        public_key,
        spki_sha256: sha256(spki.raw),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Seeded;

    #[test]
    fn the_same_entropy_gives_the_same_key() {
        let first = KeyPair::generate(&mut Seeded::new(7)).unwrap();
        let again = KeyPair::generate(&mut Seeded::new(7)).unwrap();
        let other = KeyPair::generate(&mut Seeded::new(8)).unwrap();
        assert_eq!(first.to_pkcs8(), again.to_pkcs8());
        assert_ne!(first.spki_sha256(), other.spki_sha256());
    }

    #[test]
    fn candidates_outside_the_group_are_drawn_again() {
        let mut calls = 0;
        let mut rng = |out: &mut [u8]| {
            calls += 1;
            out.fill(if calls <= 2 {
                0xff * (calls - 1) as u8
            } else {
                0x11
            });
        };
        KeyPair::generate(&mut rng).unwrap();
        assert_eq!(calls, 3, "0 and 2^256-1 are both outside");
        assert_eq!(
            KeyPair::generate(&mut |out: &mut [u8]| out.fill(0)).unwrap_err(),
            KeyError::Generation
        );
    }

    #[test]
    fn keys_survive_pkcs8_and_pem() {
        let key = KeyPair::generate(&mut Seeded::new(1)).unwrap();
        assert_eq!(
            KeyPair::from_pkcs8(key.to_pkcs8()).unwrap().spki_sha256(),
            key.spki_sha256()
        );
        assert_eq!(
            KeyPair::from_pem(&key.to_pem()).unwrap().spki_sha256(),
            key.spki_sha256()
        );
        assert!(!format!("{key:?}").contains("PRIVATE"));
        assert_eq!(
            KeyPair::from_pkcs8(&key.to_pkcs8()[..60]).unwrap_err(),
            KeyError::BadKey
        );
        assert_eq!(KeyPair::from_pkcs8(&[0x30; 5000]).unwrap_err(), KeyError::BadKey);
        let wrong_label = key.to_pem().replace("PRIVATE KEY", "CERTIFICATE");
        assert_eq!(KeyPair::from_pem(&wrong_label).unwrap_err(), KeyError::BadKey);
    }

    #[test]
    fn a_request_is_checked_before_it_is_believed() {
        let key = KeyPair::generate(&mut Seeded::new(2)).unwrap();
        let csr = key.make_csr().unwrap();
        assert_eq!(check_csr(&csr).unwrap().spki_sha256, key.spki_sha256());
        assert_eq!(
            check_csr(&csr[..csr.len() - 1]).unwrap_err(),
            KeyError::CsrMalformed
        );
        assert_eq!(check_csr(&[]).unwrap_err(), KeyError::CsrMalformed);
        let mut longer = csr.clone();
        longer.push(0);
        assert_eq!(check_csr(&longer).unwrap_err(), KeyError::CsrMalformed);
        assert_eq!(
            check_csr(&vec![0x30; MAX_CSR + 1]).unwrap_err(),
            KeyError::CsrTooLarge(MAX_CSR + 1)
        );
    }

    #[test]
    fn no_flipped_bit_makes_a_request_believed_for_another_key() {
        let key = KeyPair::generate(&mut Seeded::new(3)).unwrap();
        let csr = key.make_csr().unwrap();
        let mut accepted = 0;
        for index in 0..csr.len() {
            let mut bent = csr.clone();
            bent[index] ^= 0x01;
            if let Ok(believed) = check_csr(&bent) {
                assert_eq!(believed.spki_sha256, key.spki_sha256(), "byte {index}");
                accepted += 1;
            }
        }
        // The algorithm identifier is outside of what a request signs; the parser reads its tag loosely.
        assert!(accepted <= 2, "{accepted} bent requests accepted");
    }

    #[test]
    fn other_kinds_of_key_are_refused() {
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let csr = CertificateParams::default().serialize_request(&key).unwrap();
            assert_eq!(check_csr(csr.der()).unwrap_err(), KeyError::CsrKeyType);
        }
    }
}
