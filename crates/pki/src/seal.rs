//! Sealing of secrets at rest under the cluster's key encryption key (KEK).
//!
//! What never lives here: reading or writing the key file, and where blobs are stored.
//!
//! Invariants: a sealed blob opens only under the same KEK, for the same purpose and in the same context, so
//! blobs can't be swapped between records; a sealed blob shows the length of its secret and nothing else.
//!
//! Form of a blob: one byte 0x01, 12 bytes nonce, then AES-256-GCM-SIV ciphertext with its 16-byte tag.
//! Additional data: the fields (32-bit big-endian length, bytes) `palyra seal v1`, purpose, context.

use std::fmt;

use aes_gcm_siv::aead::{Aead, KeyInit, Payload};
use aes_gcm_siv::{Aes256GcmSiv, Nonce};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

use crate::Entropy;
use crate::codec::{Fields, hmac256};
use crate::entropy::draw;

/// The largest secret that is sealed, in bytes.
pub const MAX_SECRET: usize = 64 * 1024;
/// How many bytes a blob is longer than its secret.
pub const OVERHEAD: usize = 1 + NONCE + TAG;
const NONCE: usize = 12;
const TAG: usize = 16;
const FORM: u8 = 1;
const LABEL: &[u8] = b"palyra seal v1";
const HEADER: &str = "palyra key encryption key, form 1";

/// What a sealed secret is for. Part of what is authenticated, so a blob made for one purpose opens for no
/// other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// The cluster root's private key; context: cluster id.
    RootKey,
    /// A replica's private key, of its authority or its certificate; context: cluster id and replica id, and
    /// which.
    ReplicaKey,
    /// What a PIN code keeps: the PAKE's server side; context: code id.
    PinVerifier,
    /// A pairing ticket's key; context: ticket id.
    TicketKey,
    /// A join token's secret; context: token id.
    JoinSecret,
    /// The KEK itself on its way to a joining replica; context: the join transcript's hash.
    KekHandOver,
}

impl Purpose {
    /// The label that is authenticated.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RootKey => "root-key",
            Self::ReplicaKey => "replica-key",
            Self::PinVerifier => "pin-verifier",
            Self::TicketKey => "ticket-key",
            Self::JoinSecret => "join-secret",
            Self::KekHandOver => "kek-hand-over",
        }
    }
}

/// Why something was not sealed, or does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// The secret is larger than [`MAX_SECRET`].
    #[error("a secret of {0} bytes can't be sealed; at most {MAX_SECRET} are allowed")]
    TooLarge(usize),
    /// Too short for a blob, or of another form.
    #[error("not a sealed secret, or one of a newer form")]
    Malformed,
    /// Another KEK, another purpose or context, or bytes were changed.
    #[error("the sealed {0} does not open: another key encryption key, another record, or changed bytes")]
    WontOpen(&'static str),
    /// The text is no key file.
    #[error("not a key encryption key file: {0}")]
    KeyFile(&'static str),
}

/// The cluster's key encryption key: 32 bytes, zeroized on drop, never printed.
#[derive(Clone)]
pub struct Kek(Zeroizing<[u8; 32]>);

impl Kek {
    /// Draws a new key.
    pub fn generate(rng: &mut dyn Entropy) -> Self {
        Self(Zeroizing::new(draw(rng)))
    }

    /// Takes exactly 32 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SealError> {
        let key = bytes
            .try_into()
            .map_err(|_| SealError::KeyFile("a key has exactly 32 bytes"))?;
        Ok(Self(Zeroizing::new(key)))
    }

    /// The text of a key file: a header line, then the key in base64.
    pub fn to_text(&self) -> Zeroizing<String> {
        Zeroizing::new(format!(
            "{HEADER}\n{}\n",
            *Zeroizing::new(STANDARD.encode(self.0.as_slice()))
        ))
    }

    /// Reads the text of a key file; the key may be base64 or hexadecimal. Refuses another header, another
    /// length and anything after the key.
    pub fn from_text(text: &str) -> Result<Self, SealError> {
        if text.len() > 512 {
            return Err(SealError::KeyFile("it is too long"));
        }
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        if lines.next() != Some(HEADER) {
            return Err(SealError::KeyFile(
                "the first line is not the header of a key file",
            ));
        }
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err(SealError::KeyFile(
                "exactly one line with the key is expected after the header",
            ));
        };
        let decoded = if line.len() == 64 {
            hex::decode(line).ok()
        } else {
            STANDARD.decode(line).ok()
        };
        let decoded =
            Zeroizing::new(decoded.ok_or(SealError::KeyFile("the key is neither base64 nor hexadecimal"))?);
        Self::from_bytes(&decoded)
    }

    /// Sixteen hexadecimal digits that name the key without telling it, to compare what two replicas hold.
    pub fn id(&self) -> String {
        hex::encode(&hmac256(self.0.as_slice(), &[b"palyra kek id"])[..8])
    }

    /// Seals a secret for a purpose and context.
    pub fn seal(
        &self,
        purpose: Purpose,
        context: &[u8],
        secret: &[u8],
        rng: &mut dyn Entropy,
    ) -> Result<Vec<u8>, SealError> {
        seal_under(&self.0, purpose, context, secret, rng)
    }

    /// Opens what [`Kek::seal`] made for the same purpose and context.
    pub fn open(
        &self,
        purpose: Purpose,
        context: &[u8],
        blob: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SealError> {
        open_under(&self.0, purpose, context, blob)
    }

    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for Kek {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kek({})", self.id())
    }
}

pub(crate) fn seal_under(
    key: &[u8; 32],
    purpose: Purpose,
    context: &[u8],
    secret: &[u8],
    rng: &mut dyn Entropy,
) -> Result<Vec<u8>, SealError> {
    if secret.len() > MAX_SECRET {
        return Err(SealError::TooLarge(secret.len()));
    }
    let nonce: [u8; NONCE] = draw(rng);
    let aad = additional_data(purpose, context);
    let ciphertext = Aes256GcmSiv::new(key.into())
        .encrypt(
            Nonce::from_slice(&nonce),
            Payload {
                msg: secret,
                aad: aad.as_bytes(),
            },
        )
        .map_err(|_| SealError::TooLarge(secret.len()))?;
    let mut blob = Vec::with_capacity(OVERHEAD + secret.len());
    blob.push(FORM);
    blob.extend_from_slice(&nonce);
    blob.extend_from_slice(&ciphertext);
    Ok(blob)
}

pub(crate) fn open_under(
    key: &[u8; 32],
    purpose: Purpose,
    context: &[u8],
    blob: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    if blob.len() < OVERHEAD || blob.len() > OVERHEAD + MAX_SECRET || blob[0] != FORM {
        return Err(SealError::Malformed);
    }
    let (nonce, ciphertext) = blob[1..].split_at(NONCE);
    let aad = additional_data(purpose, context);
    Aes256GcmSiv::new(key.into())
        .decrypt(
            Nonce::from_slice(nonce),
            Payload {
                msg: ciphertext,
                aad: aad.as_bytes(),
            },
        )
        .map(Zeroizing::new)
        .map_err(|_| SealError::WontOpen(purpose.as_str()))
}

fn additional_data(purpose: Purpose, context: &[u8]) -> Fields {
    let mut fields = Fields::default();
    fields.push(LABEL);
    fields.push(purpose.as_str().as_bytes());
    fields.push(context);
    fields
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Seeded;

    #[test]
    fn a_blob_opens_only_for_its_purpose_and_context() {
        let mut rng = Seeded::new(1);
        let kek = Kek::generate(&mut rng);
        let other = Kek::generate(&mut rng);
        let blob = kek.seal(Purpose::TicketKey, b"T1", b"secret", &mut rng).unwrap();
        assert_eq!(blob.len(), 6 + OVERHEAD);
        assert_eq!(
            kek.open(Purpose::TicketKey, b"T1", &blob).unwrap().as_slice(),
            b"secret"
        );
        assert_eq!(
            kek.open(Purpose::TicketKey, b"T2", &blob),
            Err(SealError::WontOpen("ticket-key"))
        );
        assert_eq!(
            kek.open(Purpose::RootKey, b"T1", &blob),
            Err(SealError::WontOpen("root-key"))
        );
        assert_eq!(
            other.open(Purpose::TicketKey, b"T1", &blob),
            Err(SealError::WontOpen("ticket-key"))
        );
    }

    #[test]
    fn purpose_and_context_do_not_run_into_each_other() {
        let mut rng = Seeded::new(2);
        let kek = Kek::generate(&mut rng);
        let blob = kek.seal(Purpose::RootKey, b"", b"x", &mut rng).unwrap();
        assert!(kek.open(Purpose::RootKey, b"\0", &blob).is_err());
    }

    #[test]
    fn no_flipped_or_missing_byte_goes_unnoticed() {
        let mut rng = Seeded::new(3);
        let kek = Kek::generate(&mut rng);
        let blob = kek
            .seal(Purpose::RootKey, b"c", b"a secret of some length", &mut rng)
            .unwrap();
        for index in 0..blob.len() {
            let mut bent = blob.clone();
            bent[index] ^= 0x80;
            assert!(kek.open(Purpose::RootKey, b"c", &bent).is_err(), "byte {index}");
            assert!(
                kek.open(Purpose::RootKey, b"c", &blob[..index]).is_err(),
                "cut at {index}"
            );
        }
        assert_eq!(
            kek.open(Purpose::RootKey, b"c", &vec![1; MAX_SECRET + 100]),
            Err(SealError::Malformed)
        );
        let large = kek.seal(Purpose::RootKey, b"c", &vec![0; MAX_SECRET + 1], &mut rng);
        assert_eq!(large, Err(SealError::TooLarge(MAX_SECRET + 1)));
    }

    #[test]
    fn the_same_secret_seals_to_different_bytes() {
        let mut rng = Seeded::new(4);
        let kek = Kek::generate(&mut rng);
        let first = kek.seal(Purpose::RootKey, b"c", b"same", &mut rng).unwrap();
        assert_ne!(
            first,
            kek.seal(Purpose::RootKey, b"c", b"same", &mut rng).unwrap()
        );
    }

    #[test]
    fn key_files_are_read_strictly() {
        let kek = Kek::generate(&mut Seeded::new(5));
        let text = kek.to_text();
        assert_eq!(Kek::from_text(&text).unwrap().id(), kek.id());
        let hexadecimal = format!("{HEADER}\r\n{}\r\n", hex::encode(kek.bytes()));
        assert_eq!(Kek::from_text(&hexadecimal).unwrap().id(), kek.id());
        assert!(!format!("{kek:?}").contains(&STANDARD.encode(kek.bytes())));
        for bad in [
            String::new(),
            HEADER.to_owned(),
            text.replace("form 1", "form 2"),
            format!("{HEADER}\n{}\n", STANDARD.encode([1u8; 31])),
            format!("{HEADER}\n{}\n", STANDARD.encode([1u8; 33])),
            format!("{HEADER}\n{}\n", "zz".repeat(32)),
            format!("{}more\n", *text),
            format!("{HEADER}\n{}", "A".repeat(600)),
        ] {
            assert!(
                matches!(Kek::from_text(&bad), Err(SealError::KeyFile(_))),
                "{bad:?}"
            );
        }
        assert!(Kek::from_bytes(&[0; 16]).is_err());
    }
}
