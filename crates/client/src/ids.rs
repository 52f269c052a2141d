//! Time, randomness and request ids of this process.
//!
//! What never lives here: anything about the network. The client runs in short-lived commands and in the node
//! agent; neither is simulated, so both read the operating system directly.

use std::time::{SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch by this machine's clock; 0 when the clock is before it.
#[must_use]
pub fn wall_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// Fills `out` from the operating system's generator.
///
/// # Panics
/// When the operating system has no randomness to give: nothing secret may be made then.
pub fn fill_random(out: &mut [u8]) {
    getrandom::fill(out).expect("the operating system gives no randomness");
}

/// A fresh ULID in text form: the id of one request, the same for all its tries.
#[must_use]
pub fn new_ulid() -> String {
    let mut random = [0u8; 16];
    fill_random(&mut random);
    ulid::Ulid::from_parts(wall_ms(), u128::from_be_bytes(random)).to_string()
}

/// Whether `text` is a ULID in its one spelling (26 characters, upper case).
#[must_use]
pub fn is_ulid(text: &str) -> bool {
    palyra_pki::identity::is_ulid(text)
}

/// A number below `bound`, for jitter. 0 when `bound` is 0.
pub(crate) fn below(bound: u64) -> u64 {
    let mut bytes = [0u8; 8];
    fill_random(&mut bytes);
    // The bias of the remainder doesn't matter for jitter.
    u64::from_be_bytes(bytes).checked_rem(bound).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_ulids_and_differ() {
        let (first, second) = (new_ulid(), new_ulid());
        assert!(is_ulid(&first) && is_ulid(&second));
        assert_ne!(first, second);
    }
}
