//! The hash of a journal row, from its published definition: SHA-256 over `"palyra journal row\0"` and then each field
//! behind its length in eight bytes, big-endian: index (8 bytes), ordinal (4), time (8), actor, action, subject,
//! request id (16 bytes), number of details (8 bytes), each detail's name and value in the order of the names, hash of
//! the row before (32 bytes).
//!
//! Written a second time on purpose: a checker that used the product's own function would believe its mistakes.

use sha2::{Digest, Sha256};

use super::Row;

/// What stands before the first row.
pub(super) const ZERO: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// The hash that a row must have, in hexadecimal; `None` when its request id or its `prev` is not one.
pub(super) fn of(row: &Row) -> Option<String> {
    let mut hasher = Sha256::new();
    hasher.update(b"palyra journal row\0");
    let mut field = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_be_bytes());
        hasher.update(bytes);
    };
    field(&row.index.to_be_bytes());
    field(&row.ordinal.to_be_bytes());
    field(&row.at_ms.to_be_bytes());
    field(row.actor.as_bytes());
    field(row.action.as_bytes());
    field(row.subject.as_bytes());
    field(&ulid(&row.request)?.to_be_bytes());
    field(&(row.detail.len() as u64).to_be_bytes());
    for (name, value) in &row.detail {
        field(name.as_bytes());
        field(value.as_bytes());
    }
    field(&bytes(&row.prev)?);
    let hash = hasher.finalize();
    Some(hash.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The number that a ULID's 26 characters of Crockford's base 32 stand for.
fn ulid(text: &str) -> Option<u128> {
    const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let small = text.len() == 26 && text.as_bytes()[0] <= b'7';
    small.then_some(())?;
    text.bytes().try_fold(0u128, |sum, byte| {
        let digit = ALPHABET
            .iter()
            .position(|known| *known == byte.to_ascii_uppercase())?;
        Some(sum << 5 | digit as u128)
    })
}

fn bytes(hex: &str) -> Option<Vec<u8>> {
    let whole = hex.len() == 64 && hex.is_ascii();
    whole.then_some(())?;
    (0..32)
        .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok())
        .collect()
}
