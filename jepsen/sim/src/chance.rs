//! The seed's stream of numbers, and the C symbols through which everything else in the process draws from
//! it.
//!
//! Hash-map keys, tokio's wake order, `rand`'s thread generator and crypto libraries all ask `getrandom` or
//! `getentropy` of the C library. This binary defines both symbols itself, so that one seed decides all of
//! them. Unsafe code is here, in `fork.rs` and in `memory.rs`. Never linked into a product.
#![allow(unsafe_code, unreachable_pub)]

use std::cell::Cell;

thread_local! {
    static STATE: Cell<u64> = const { Cell::new(0x9e37_79b9_7f4a_7c15) };
}

/// One step of splitmix64 (Steele, Lea, Flood 2014): the state after it, and a number.
const fn step(state: u64) -> (u64, u64) {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (state, z ^ (z >> 31))
}

/// A stream of its own: what is drawn from it does not depend on what the rest of the run draws. Faults are drawn from
/// such, so that leaving one out leaves the others where they were.
#[derive(Clone, Debug)]
pub(crate) struct Stream(u64);

impl Stream {
    /// The stream of this purpose in this seed.
    pub(crate) fn new(seed: u64, purpose: &str) -> Stream {
        let salt = purpose.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Stream(step(seed ^ salt).1)
    }

    /// The next number.
    pub(crate) fn next(&mut self) -> u64 {
        let (state, number) = step(self.0);
        self.0 = state;
        number
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// Inclusive on both sides.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True `percent` times in a hundred.
    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        from.get(usize::try_from(self.below(from.len() as u64)).unwrap_or(0))
    }

    /// In another order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, usize::try_from(self.below(last as u64 + 1)).unwrap_or(0));
        }
    }
}

/// Starts the stream of this process (one seed per process, one thread per process).
pub(crate) fn seed(seed: u64) {
    STATE.with(|state| state.set(seed.wrapping_mul(0x5851_f42d_4c95_7f2d) ^ 0x1405_7b7e_f767_814f));
}

/// The next number.
pub(crate) fn next() -> u64 {
    STATE.with(|state| {
        let (after, number) = step(state.get());
        state.set(after);
        number
    })
}

/// A number below `bound`; 0 when `bound` is 0.
pub(crate) fn below(bound: u64) -> u64 {
    if bound == 0 { 0 } else { next() % bound }
}

/// Inclusive on both sides.
pub(crate) fn between(low: u64, high: u64) -> u64 {
    low + below(high - low + 1)
}

/// True `percent` times in a hundred.
pub(crate) fn percent(percent: u64) -> bool {
    below(100) < percent
}

/// Fills a buffer.
pub(crate) fn fill(buf: &mut [u8]) {
    for chunk in buf.chunks_mut(8) {
        let bytes = next().to_le_bytes();
        chunk.copy_from_slice(&bytes[..chunk.len()]);
    }
}

/// Stands in for the C library's `getrandom(2)`.
///
/// # Safety
/// As the original: `buf` must be valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buf: *mut u8, len: usize, _flags: u32) -> isize {
    if buf.is_null() {
        return 0;
    }
    // SAFETY: the caller promises `len` writable bytes at `buf`.
    fill(unsafe { std::slice::from_raw_parts_mut(buf, len) });
    isize::try_from(len).unwrap_or(isize::MAX)
}

/// Stands in for the C library's `getentropy(3)`.
///
/// # Safety
/// As the original: `buf` must be valid for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getentropy(buf: *mut u8, len: usize) -> i32 {
    // SAFETY: as for `getrandom`.
    unsafe { getrandom(buf, len, 0) };
    0
}
