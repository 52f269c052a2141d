//! Hashes, keyed hashes and the length-prefixed encoding that transcripts, tokens and sealed blobs share.
//!
//! Invariant: a field is a 32-bit big-endian length and then its bytes, so two different lists of fields
//! never encode to the same bytes.

use aws_lc_rs::{digest, hmac};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// SHA-256 of a certificate's DER: how a certificate is named in the registry, the journal and on screens.
pub type Fingerprint = [u8; 32];

/// SHA-256 of `bytes`.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0u8; 32];
    out.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    out
}

/// HMAC-SHA256 over the concatenation of `parts`. Callers keep the parts unambiguous: a fixed label, then
/// values of fixed length.
pub(crate) fn hmac256(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in parts {
        context.update(part);
    }
    let mut out = [0u8; 32];
    out.copy_from_slice(context.sign().as_ref());
    out
}

/// Derives a 32-byte key from a secret of at least 128 uniform bits: HMAC-SHA256(secret, fields(label,
/// context..)). One HMAC is a PRF, which is all that a single block of HKDF-Expand would add here.
pub(crate) fn derive(secret: &[u8], label: &str, context: &[&[u8]]) -> [u8; 32] {
    let mut fields = Fields::default();
    fields.push(label.as_bytes());
    for part in context {
        fields.push(part);
    }
    hmac256(secret, &[fields.as_bytes()])
}

/// A growing list of length-prefixed fields. Zeroized on drop, as some fields are secrets.
#[derive(Debug, Default, Clone, Zeroize, ZeroizeOnDrop)]
pub(crate) struct Fields(Vec<u8>);

impl Fields {
    /// Appends one field. Fields are bounded far below 4 GiB by the limits of their producers.
    pub(crate) fn push(&mut self, field: &[u8]) {
        let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
        self.0.extend_from_slice(&length.to_be_bytes());
        self.0.extend_from_slice(field);
    }

    /// The encoding so far.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Appends bytes that are already encoded fields.
    pub(crate) fn extend(&mut self, encoded: &[u8]) {
        self.0.extend_from_slice(encoded);
    }
}

/// Whether two byte strings are equal, in time that depends only on their lengths.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    use subtle::ConstantTimeEq;
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_do_not_run_into_each_other() {
        let mut first = Fields::default();
        first.push(b"ab");
        first.push(b"c");
        let mut second = Fields::default();
        second.push(b"a");
        second.push(b"bc");
        assert_ne!(first.as_bytes(), second.as_bytes());
        assert_eq!(first.as_bytes(), b"\0\0\0\x02ab\0\0\0\x01c");
    }

    #[test]
    fn hashes_match_published_values() {
        assert_eq!(
            hex::encode(sha256(b"abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        // RFC 4231, test case 2.
        assert_eq!(
            hex::encode(hmac256(b"Jefe", &[b"what do ya want ", b"for nothing?"])),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        );
    }

    #[test]
    fn derived_keys_depend_on_label_and_context() {
        let base = derive(b"0123456789abcdef", "label", &[b"x"]);
        assert_ne!(base, derive(b"0123456789abcdef", "label", &[b"y"]));
        assert_ne!(base, derive(b"0123456789abcdef", "labelx", &[]));
        assert_ne!(base, derive(b"0123456789abcdeg", "label", &[b"x"]));
    }
}
