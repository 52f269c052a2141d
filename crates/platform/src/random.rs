//! Randomness: the operating system's in production, the seed's in a simulation.
//!
//! Never here: a generator of our own. Keys, tokens and nonces come from [`fill_random`] and from nowhere
//! else.

use crate::clock::wall_ms;
use crate::hooks::{abort, hooks, tag};

/// Fills `buf` with bytes fit for keys. Aborts the process when the operating system has none to give: there
/// is no safe way to go on.
pub fn fill_random(buf: &mut [u8]) {
    match hooks() {
        Some(hooks) => hooks.fill_random(tag(), buf),
        None => {
            if let Err(error) = getrandom::fill(buf) {
                abort(&format!("the operating system gives no random bytes: {error}"));
            }
        }
    }
}

/// 64 random bits.
pub fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    fill_random(&mut bytes);
    u64::from_le_bytes(bytes)
}

/// A random number in `0..bound`, for jitter and for picking one of several; the bias is below `bound /
/// 2^64`. 0 when `bound` is 0.
pub fn random_below(bound: u64) -> u64 {
    let wide = u128::from(random_u64()) * u128::from(bound);
    (wide >> 64) as u64
}

/// A new ULID as its 16 bytes: 48 bits of [`wall_ms`] followed by 80 random bits, big endian. Sorts by
/// creation time to the millisecond, on one replica's clock.
pub fn new_ulid_bytes() -> [u8; 16] {
    ulid_bytes_at(wall_ms())
}

/// The same of another time, in milliseconds since 1970; its upper 16 bits are left out.
pub fn ulid_bytes_at(ms: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    fill_random(&mut bytes[6..]);
    bytes[..6].copy_from_slice(&ms.to_be_bytes()[2..]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ulids_carry_the_clock_and_differ() {
        let before = wall_ms();
        let one = new_ulid_bytes();
        let other = new_ulid_bytes();
        let after = wall_ms();
        let mut stamp = [0; 8];
        stamp[2..].copy_from_slice(&one[..6]);
        assert!((before..=after).contains(&u64::from_be_bytes(stamp)));
        assert_ne!(one[6..], other[6..]);
    }

    #[test]
    fn bounded_numbers_stay_below_their_bound() {
        let mut seen = [false; 3];
        for _ in 0..200 {
            seen[random_below(3) as usize] = true;
        }
        assert_eq!(seen, [true; 3]);
        assert_eq!(random_below(1), 0);
        assert_eq!(random_below(0), 0);
    }
}
