//! Identifiers: ULIDs and SHA-256 digests, as small copyable values that encode as protobuf messages.
//!
//! Nothing here makes an identifier: randomness and time belong to the caller. Both types order like their
//! bytes, so a table keyed by `Id` is ordered by the time in the id.

use std::fmt;

use sha2::{Digest as _, Sha256};

/// A ULID: 48 bits of milliseconds since the Unix epoch, then 80 random bits. Text form: 26 characters.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
#[prost(skip_debug)]
pub struct Id {
    #[prost(fixed64, tag = "1")]
    hi: u64,
    #[prost(fixed64, tag = "2")]
    lo: u64,
}

impl Id {
    /// All zeroes: "no id". Never a valid id of anything.
    pub const ZERO: Id = Id { hi: 0, lo: 0 };

    /// From the 16 bytes of a ULID.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Id {
        let value = u128::from_be_bytes(bytes);
        Id {
            hi: (value >> 64) as u64,
            lo: value as u64,
        }
    }

    /// From a slice that must be 16 bytes long.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Id> {
        bytes.try_into().ok().map(Id::from_bytes)
    }

    /// The 16 bytes, most significant first.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.value().to_be_bytes()
    }

    /// From the 26-character text form; lower case is accepted. `None` when it is no ULID.
    #[must_use]
    pub fn parse(text: &str) -> Option<Id> {
        // The first character holds 3 bits only; a larger one would overflow silently.
        if text.len() != 26 || !matches!(text.as_bytes().first(), Some(b'0'..=b'7')) {
            return None;
        }
        ulid::Ulid::from_string(text)
            .ok()
            .map(|ulid| Id::from_bytes(ulid.0.to_be_bytes()))
    }

    /// The time in the id, in milliseconds since the Unix epoch, as its maker's clock had it.
    #[must_use]
    pub fn time_ms(self) -> u64 {
        self.hi >> 16
    }

    /// Whether this is [`Id::ZERO`].
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Id::ZERO
    }

    /// The first and the last id whose text form begins with `prefix` (Crockford base 32, either case).
    /// `None` when no id can begin so.
    #[must_use]
    pub fn prefix_range(prefix: &str) -> Option<(Id, Id)> {
        if prefix.len() > 26 || !prefix.is_ascii() {
            return None;
        }
        let first = Id::parse(&format!("{prefix:0<26}"))?;
        let last = Id::parse(&format!("{prefix:Z<26}"))?;
        // An empty prefix cannot be padded with Z: the first character goes to 7 only.
        Some((first, last))
    }

    fn value(self) -> u128 {
        (u128::from(self.hi) << 64) | u128::from(self.lo)
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&ulid::Ulid(self.value()).to_string())
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// 32 bytes of SHA-256. Of a certificate's DER it is the certificate's fingerprint.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Message)]
#[prost(skip_debug)]
pub struct Digest {
    #[prost(fixed64, tag = "1")]
    a: u64,
    #[prost(fixed64, tag = "2")]
    b: u64,
    #[prost(fixed64, tag = "3")]
    c: u64,
    #[prost(fixed64, tag = "4")]
    d: u64,
}

/// SHA-256 of a certificate's DER, or of a public key's SubjectPublicKeyInfo where a field says so.
pub type Fingerprint = Digest;

impl Digest {
    /// All zeroes: what a hash chain starts from, and "none".
    pub const ZERO: Digest = Digest {
        a: 0,
        b: 0,
        c: 0,
        d: 0,
    };

    /// SHA-256 of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Digest {
        Digest::from_bytes(Sha256::digest(bytes).into())
    }

    /// From 32 bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Digest {
        let word = |at: usize| {
            bytes[at..at + 8]
                .iter()
                .fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte))
        };
        Digest {
            a: word(0),
            b: word(8),
            c: word(16),
            d: word(24),
        }
    }

    /// From a slice that must be 32 bytes long.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Digest> {
        bytes.try_into().ok().map(Digest::from_bytes)
    }

    /// From 64 hexadecimal characters, either case.
    #[must_use]
    pub fn parse(text: &str) -> Option<Digest> {
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let word = |at: usize| u64::from_str_radix(&text[at..at + 16], 16).ok();
        Some(Digest {
            a: word(0)?,
            b: word(16)?,
            c: word(32)?,
            d: word(48)?,
        })
    }

    /// The 32 bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (slot, word) in bytes.chunks_exact_mut(8).zip([self.a, self.b, self.c, self.d]) {
            slot.copy_from_slice(&word.to_be_bytes());
        }
        bytes
    }

    /// Whether this is [`Digest::ZERO`].
    #[must_use]
    pub fn is_zero(self) -> bool {
        self == Digest::ZERO
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}{:016x}{:016x}{:016x}", self.a, self.b, self.c, self.d)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_read_back_from_text_and_keep_their_time() {
        let id = Id::parse("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap();
        assert_eq!(id.to_string(), "01ARZ3NDEKTSV4RRFFQ69G5FAV");
        assert_eq!(id.time_ms(), 1_469_922_850_259);
        assert_eq!(Id::parse("01arz3ndektsv4rrffq69g5fav"), Some(id));
        assert_eq!(Id::from_slice(&id.to_bytes()), Some(id));
    }

    #[test]
    fn what_is_no_ulid_is_refused() {
        for text in [
            "",
            "01ARZ3NDEKTSV4RRFFQ69G5FA",
            "81ARZ3NDEKTSV4RRFFQ69G5FAV",
            "01ARZ3NDEKTSV4RRFFQ69G5FA!",
        ] {
            assert_eq!(Id::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_prefix_spans_exactly_the_ids_that_begin_so() {
        let id = Id::parse("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap();
        let (first, last) = Id::prefix_range("01arz3").unwrap();
        assert!(first <= id && id <= last);
        let (first, last) = Id::prefix_range("01ARZ4").unwrap();
        assert!(id < first && first < last);
        assert_eq!(Id::prefix_range("9"), None);
        assert_eq!(Id::prefix_range("0!"), None);
    }

    #[test]
    fn digests_read_back() {
        let digest = Digest::of(b"palyra");
        assert_eq!(Digest::from_slice(&digest.to_bytes()), Some(digest));
        assert_eq!(Digest::parse(&digest.to_string()), Some(digest));
        assert_eq!(Digest::parse("12"), None);
    }
}
